"""One file a command, run as `python -m ngc_jax.<file>`; they share `arguments.py` alone."""
