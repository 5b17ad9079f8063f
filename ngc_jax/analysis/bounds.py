"""A bound that holds before anything is run: the most that a synapse can stretch a difference.

For: upper bounds from states alone, by small Gram matrices (a port's p by p, a state's r by r, a
block's n by n) and one power iteration over groups; only a generated rule's weights are formed. Not
for: what a trained loop does on real inputs, which is less and is measured (`stability.py`,
`lyapunov.py`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.core.rules import Rule, States, named, weights
from ngc_jax.core.rules.addressed import Addressed, Rewirable
from ngc_jax.core.rules.signal import Block, Broadcast, Metric, Within
from ngc_jax.core.wiring import Wiring

Array = jax.Array
ROUNDING = 1 + 1e-5  # a bound computed in float32 is rounded up by this, so that it stays one


def gain_bound(parts: Sequence[tuple[str | Rule, States, States]]) -> Array:
    """At least the spectral norm of a synapse's W, the sum of `parts` (rule, pre, post): a scalar.

    Every part is reduced to norms between groups, N[g, h] >= |W[g, h]|, and |W| <= |N|, the norm of
    a G by G matrix (`broadcast` and the generated rules know no groups: G = 1). max_g |W_gg| + |R|
    |M| |S| bounds the same from above; this is tighter. Raises KeyError for an unknown rule.
    """
    norms = [_norms(*part) for part in parts]
    grouped = [n for n in norms if n.shape != (1, 1)]
    single = [n[0, 0] for n in norms if n.shape == (1, 1)]
    together = _nonnegative_norm(sum(grouped[1:], grouped[0])) if grouped else jnp.zeros(())
    return (together + sum(single)) * ROUNDING


def _product_norm(left: Array, right: Array) -> Array:
    """|R S^T| for R [..., m, p], S [..., n, p]: its square is the top eigenvalue of the product of
    Gram matrices.
    """
    a, b = (jnp.swapaxes(m, -1, -2) @ m for m in (left, right))
    return jnp.sqrt(_top_eigenvalue(a @ b))


def _matrix_norm(matrix: Array) -> Array:
    """|W| for W [..., m, n], from the Gram matrix of its smaller side."""
    small = matrix if matrix.shape[-2] <= matrix.shape[-1] else jnp.swapaxes(matrix, -1, -2)
    return jnp.sqrt(_top_eigenvalue(small @ jnp.swapaxes(small, -1, -2)))


def _top_eigenvalue(matrix: Array) -> Array:
    """The top eigenvalue of [..., n, n] whose eigenvalues are all >= 0, from above, by at most a
    share n^(1/512) - 1.

    (trace A^m)^(1/m) with m = 512, by nine squarings: products alone, which any device does well.
    (Many LAPACK eigenvalue calls in one program wait for each other for ever on XLA's CPU backend.)
    """
    logarithm, weight = jnp.zeros(matrix.shape[:-2]), 1.0
    for _ in range(9):
        trace = jnp.maximum(jnp.trace(matrix, axis1=-2, axis2=-1), 1e-30)
        logarithm, weight = logarithm + weight * jnp.log(trace), weight / 2
        matrix = matrix / trace[..., None, None]
        matrix = matrix @ matrix
    trace = jnp.maximum(jnp.trace(matrix, axis1=-2, axis2=-1), 1e-30)
    return jnp.exp(logarithm + weight * jnp.log(trace))


def _norms(rule: str | Rule, pre: States, post: States) -> Array:
    """At least |W[g, h]| for each pair of groups: [G, G], or [1, 1] of the whole W."""
    how = named(rule)
    if isinstance(how, Addressed):
        return _addressed(pre, post, how.wiring)
    if isinstance(how, Rewirable):
        return _addressed(*how.complete(pre, post), None)
    if isinstance(how, Metric):
        return _metric(pre, post)
    if isinstance(how, Within):
        return jnp.diag(_product_norm(post, pre))
    if isinstance(how, Block):
        return jnp.diag(_matrix_norm(post))
    whole = (
        _product_norm(post, pre)
        if isinstance(how, Broadcast)
        else _matrix_norm(weights(how, pre, post))
    )
    return whole[None, None]


def _addressed(pre: Array, post: Array, wiring: Wiring | None) -> Array:
    # pre S [h, i, g, p], post R [g, j, h, p]: for each pair g, h the product of R[g, :, h, :] and
    # S[h, :, g, :]^T; under a wiring, for each channel the product of R[g, :, s, :] and S[g, :, s,
    # :]^T.
    read, sent = (jnp.swapaxes(states, 1, 2) for states in (post, pre))
    if wiring is None:
        return _product_norm(read, jnp.swapaxes(sent, 0, 1))
    groups = len(pre)
    empty = jnp.zeros((groups, groups), pre.dtype)
    return empty.at[np.arange(groups)[:, None], np.array(wiring)].set(_product_norm(read, sent))


def _metric(pre: Array, post: dict[str, Array]) -> Array:
    # |R[g] M[g, h] S[h]^T|^2 is the top eigenvalue of (M[g, h]^T R[g]^T R[g] M[g, h]) (S[h]^T
    # S[h]).
    maps, r = post["map"], pre.shape[-1]
    if maps.ndim < 4:  # diagonal [G, G, r], or scalar [G, G]
        maps = maps.reshape(*maps.shape, *[1] * (4 - maps.ndim)) * jnp.eye(r, dtype=maps.dtype)
    read, sent = (jnp.einsum("gip,giq->gpq", states, states) for states in (post["state"], pre))
    seen = jnp.einsum("ghpq,gps,ghst->ghqt", maps, read, maps)
    return jnp.sqrt(_top_eigenvalue(seen @ sent))


def _nonnegative_norm(norms: Array) -> Array:
    """Spectral norm of a matrix without negative entries, from above.

    Power iteration comes from below, but each iterate v > 0 also gives the upper bound max_i (N^T N
    v)_i / v_i (Collatz 1942, Wielandt 1950).
    """
    square = norms.T @ norms

    def better(v: Array, _: None) -> tuple[Array, None]:
        after = square @ v
        # A group that nobody hears would leave a zero, and no bound: any positive v gives one.
        return jnp.maximum(after / (jnp.max(after) + 1e-30), 1e-3), None

    v, _ = jax.lax.scan(better, jnp.ones(norms.shape[0], norms.dtype), length=50)
    return jnp.sqrt(jnp.max(square @ v / v))
