"""One file a command, run as `python -m ngc_jax.FILE`; commands share `arguments.py`."""

import atexit
import gc

# Imports make a million objects, none of them garbage: to search them, again at the end, is a third
# of the time of --help.
gc.set_threshold(100_000)
atexit.register(gc.freeze)
