"""Gates over groups: how loudly each group speaks at a token, in shares that sum to one.

For: our reading of structured neuron encapsulation (arXiv 2502.07124), whose abstract alone gives
no formulas: a module is a group, and what modules say is summed with coefficients that depend on
the input and sum to one. Not for: what the coefficients are read from (`nn/layers.py`), or gates
within a signal (`rules/table.py`).

Axes: G groups, n neurons of one.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def encapsulate(said: Array, logits: Array) -> Array:
    """said [..., G n], each group's times G a_g, a = softmax(logits [..., G]) in float32.

    The factor G makes equal shares change nothing. Whatever reads the result linearly, W, gives G
    sum_g a_g W[:, g] said_g: the sum of what each module, W[:, g] said_g, gives by itself, with
    coefficients that sum to one.
    """
    groups = logits.shape[-1]
    share = groups * jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(said.dtype)
    by_group = said.reshape(*logits.shape, -1)
    return (share[..., None] * by_group).reshape(said.shape)
