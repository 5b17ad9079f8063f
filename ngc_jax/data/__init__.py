"""Text or problems in, batches out.

Text: corpora become tokens. Reasoning: problems (`tasks.py`) are drawn into sets (`problems.py`).
Both are kept as TFDS sets (`stored.py`), and read as the batch of a step (`batches.py`).
"""

NOTHING = -1  # the target where nothing is asked
