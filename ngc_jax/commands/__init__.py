"""One file a command, run as `python -m ngc_jax.FILE`; commands share `arguments.py`."""
