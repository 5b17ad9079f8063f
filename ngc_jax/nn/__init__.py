"""Models. Flax modules hold parameters here; every computation they name lives in `ngc_jax.core`."""
