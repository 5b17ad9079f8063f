"""A bound that holds before anything is run: the most that a synapse can stretch a difference.

For: upper bounds from states alone. Not for: what a loop does on real inputs, which is less.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ngc_jax.core.rules import Rule, States, named

Array = jax.Array
ROUNDING = 1 + 1e-5  # a bound computed in float32 is rounded up by this, so that it stays one


def gain_bound(parts: Sequence[tuple[str | Rule, States, States]]) -> Array:
    """At least the spectral norm of a synapse's W, the sum of `parts` (rule, pre, post): a scalar.

    Every part is reduced to norms between groups, N[g, h] >= |W[g, h]|, and |W| <= |N|, the norm of
    a G by G matrix; G = 1 for rules without groups. Raises KeyError for an unknown rule.
    """
    norms = [named(rule).block_norms(pre, post) for rule, pre, post in parts]
    grouped = [n for n in norms if n.shape != (1, 1)]
    single = [n[0, 0] for n in norms if n.shape == (1, 1)]
    together = _nonnegative_norm(sum(grouped[1:], grouped[0])) if grouped else jnp.zeros(())
    return (together + sum(single)) * ROUNDING


def _nonnegative_norm(norms: Array) -> Array:
    """Spectral norm of N >= 0, from above, by max (N^T N v) / v (Collatz 1942, Wielandt 1950)."""
    square = norms.T @ norms

    def better(v: Array, _: None) -> tuple[Array, None]:
        after = square @ v
        # A group that nobody hears would leave a zero, and no bound: any positive v gives one.
        return jnp.maximum(after / (jnp.max(after) + 1e-30), 1e-3), None

    v, _ = jax.lax.scan(better, jnp.ones(norms.shape[0], norms.dtype), length=50)
    return jnp.sqrt(jnp.max(square @ v / v))
