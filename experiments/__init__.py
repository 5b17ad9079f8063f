"""Studies: each a file with one command. They use `ngc_jax` and `launch.py` as a user would."""
