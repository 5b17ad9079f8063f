"""The mathematics of the method: pure functions that know no Flax, training or config."""
