"""Text or problems in, batches out.

Corpora become tokens, and problems are drawn into sets; both are read as batches of examples.
"""

NOTHING = -1  # the target where nothing is asked
