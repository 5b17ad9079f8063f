"""The mathematics of the method: pure functions on arrays. Nothing here knows of Flax, training or
configuration.
"""
