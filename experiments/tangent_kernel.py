"""Rich or lazy: did learning turn the features of a network, or use those that it began with?

For: the effective rank of a matrix, how far a tree of parameters moved, the tangent kernel of any
function and how far it turned, after arXiv 2310.08513. Not for: which function of a model is looked
at (`learning.py`), or the ranks that weights start with (`Rule.alike`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
Tree = Any


def effective_rank(matrix: Array) -> Array:
    """exp(-sum p log p), p the normalised singular values: 1 to min(m, n) for [..., m, n].

    Source: Roy and Vetterli, "The effective rank: A measure of effective dimensionality", EUSIPCO
    2007.
    """
    values = jnp.linalg.svd(matrix, compute_uv=False)
    total = jnp.sum(values, axis=-1, keepdims=True)
    share = values / jnp.where(total > 0, total, 1)
    nats = jnp.sum(jax.scipy.special.entr(share), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(nats), 0)


def movement(before: Tree, after: Tree) -> Array:
    """|after - before| / |before|, Euclidean norms over all leaves: 0 where nothing moved."""
    return optax.tree.norm(jax.tree.map(jnp.subtract, after, before)) / optax.tree.norm(before)


def tangent_kernel(
    function: Callable[[Tree, Array], Array], params: Tree, inputs: Array, block: int = 32
) -> Array:
    """K [N, N], K[a, b] = <dy_a, dy_b>, d the gradient of y_a = function(params, a).

    `block` gradients are held at a time, never the whole Jacobian; each block takes one pass over
    all inputs, which makes N + N^2 / block gradients. Source: Jacot et al. 2018, arXiv 1806.07572.
    """
    gradient = partial(jax.grad(function), params)

    def row(a: Array) -> Array:
        held = gradient(a)
        return jax.lax.map(lambda b: optax.tree.vdot(held, gradient(b)), inputs)

    return jax.lax.map(row, inputs, batch_size=block)


def alignment(a: Array, b: Array) -> Array:
    """<a, b> / (|a| |b|) of two kernels [N, N], Frobenius: 1 where they differ by a factor alone.

    Not centred, as in arXiv 2310.08513; kernels are positive semidefinite, so it lies in [0, 1].
    """
    return jnp.sum(a * b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
