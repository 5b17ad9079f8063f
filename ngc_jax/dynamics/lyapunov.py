"""Lyapunov exponents of any map: how fast two close states move apart per step.

For: `step(x, u) -> x` of any kind (a recurrent cell, a loop of rounds, an integrator of an ODE),
with or without inputs. Not for: this project's models, of which `analysis/probes.py` makes steps.

With J_t the Jacobian of the step at x_t, tangent vectors follow Q_{t+1} R_{t+1} = J_t Q_t, and the
exponents are the means of log |R_t[i, i]| (Benettin et al. 1980, Meccanica 15; Eckmann and Ruelle
1985, Rev. Mod. Phys. 57, section V). Axes: n numbers of a state, k exponents.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

Array = jax.Array
Tree = Any
Step = Callable[[Any, Any], Any]
Key = Array | None
TALL = 16  # numbers of a state for each tangent, from which QR goes by Gram matrices
DIGITS = 400  # times the dtype's epsilon: what a step may shrink more than others, and be resolved
NEW = 0.3  # of a row's length that must be new, for the shift not to be seen in it


class Plan(NamedTuple):
    """What is measured, and how."""

    steps: int  # that are measured
    blocks: int = 1  # stretches of these steps, each by itself
    k: Any = None  # how many exponents, at most n; None: n
    transient: int = 0  # steps before, in which state and tangents settle
    qr_every: int = 1  # steps between orthonormalisations; too many lose the small exponents


def lyapunov_spectrum(
    step: Step, x0: Tree, inputs: Tree = None, *, key: Key = None, **plan: Any
) -> Array:
    """The k largest Lyapunov exponents of x <- step(x, u), nats per step: [k], descending.

    x0: the first state, a floating array of any shape or a tree of them, n numbers in all. inputs:
    None (u is None), or a tree of arrays whose leading axis has a u for each step, transient
    included. plan: steps, and k, transient and qr_every, as in `Plan`. key: of the first tangents.
    -inf is a direction that is lost; `unresolved` ones give a warning. Raises ValueError, naming
    the argument; inside jit or vmap gives nan. `step` is traced once for each function object.
    """
    return -jnp.sort(-_measure(step, x0, inputs, key, Plan(blocks=1, **plan))[0])


def leading_exponent(
    step: Step, x0: Tree, inputs: Tree = None, *, steps: int, transient: int = 0, key: Key = None
) -> Array:
    """The largest exponent alone, from one tangent vector renormalised at each step: a scalar.

    Costs two forward passes; differentiable in all that `step` reads. Else as `lyapunov_spectrum`.
    """
    return _measure(step, x0, inputs, key, Plan(steps, 1, 1, transient))[0, 0]


def local_exponents(
    step: Step, x0: Tree, inputs: Tree = None, *, key: Key = None, **plan: Any
) -> Array:
    """Finite-time exponents of `blocks` successive stretches, of a plan as in `Plan`: [blocks, k].

    Their mean over blocks is the spectrum; `bootstrap_interval` makes of them its interval. Columns
    are in the order of the tangents, descending in the long run. Else as `lyapunov_spectrum`.
    """
    return _measure(step, x0, inputs, key, Plan(**plan))


def unresolved(exponents: Any, qr_every: int = 1) -> Array:
    """Which of the exponents [..., k] lie so far below the largest that they are rounding error.

    That is more than -log(400 epsilon) / qr_every per step: 10 nats in float32, 30 in float64.
    """
    largest = jnp.max(exponents, axis=-1, keepdims=True)
    span = -jnp.log(DIGITS * jnp.finfo(exponents.dtype).eps) / qr_every
    return jnp.isfinite(exponents) & (exponents < largest - span)


def _measure(step: Step, x0: Tree, inputs: Tree, key: Key, plan: Plan) -> Array:
    """`local_exponents`, checked before and after."""
    x0, inputs = jax.tree.map(jnp.asarray, (x0, inputs))
    size, every, total = _check(step, x0, inputs, plan), plan.qr_every, plan.transient + plan.steps
    key = jax.random.key(0) if key is None else key
    rates, sound, tangents_sound = _run(step, x0, inputs, key, plan._replace(k=plan.k or size))
    if isinstance(sound, jax.core.Tracer):
        return rates
    if sound < total:
        raise ValueError(f"x0: the state stopped being finite in step {int(sound) + 1} of {total}")
    if not tangents_sound:
        fewer = f"qr_every={every}: take fewer, for instance 1"
        remedy = fewer if every > 1 else "step: look at its Jacobian"
        raise ValueError(f"{remedy}; the tangents stopped being finite while the state did not")
    small = unresolved(jnp.mean(rates, axis=0), every)
    if small.any():
        said = f"{int(small.sum())} of {small.size} exponents are too small beside the largest"
        warnings.warn(f"{said} for {rates.dtype}: rounding error (`unresolved`)", stacklevel=3)
    return rates


@partial(jax.jit, static_argnames=("step", "plan"))
def _run(step: Step, x0: Tree, inputs: Tree, key: Array, plan: Plan) -> tuple[Array, Array, Array]:
    """Exponents [blocks, k]; how many steps the state stayed finite; whether the tangents did."""
    steps, blocks, k, transient, qr_every = plan
    flat, unravel = ravel_pytree(x0)

    def advance(carry: Any, _: None) -> tuple[Any, None]:
        x, tangents, i, sound = carry  # i: steps made; scanning over a range would store it
        # Indexed, not scanned over: slicing off the transient would copy all inputs.
        u = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), inputs)
        after, tangents = push_forward(lambda x: ravel_pytree(step(unravel(x), u))[0], x, tangents)
        sound = jnp.where((sound == i) & jnp.all(jnp.isfinite(after)), i + 1, sound)
        return (after, tangents, i + 1, sound), None

    def stretch(carry: Any, every: int) -> tuple[Any, Array]:
        """`every` steps, then new tangents, orthonormal; and their log growth [k]."""
        carry, _ = _repeat(jax.checkpoint(advance, prevent_cse=False), carry, every)
        x, tangents, i, sound = carry
        tangents, growth = orthonormalise(tangents)
        return (x, tangents, i, sound), growth

    def measure(carry: Any, _: None) -> tuple[Any, None]:
        inner, mean, count = carry
        inner, growth = stretch(inner, qr_every)
        rate, count = growth / qr_every, count + 1
        # A running mean: a float32 sum of many equal terms would drift. Once -inf, it stays so.
        return (inner, mean + jnp.where(jnp.isinf(mean), 0, (rate - mean) / count), count), None

    def block(carry: Any, _: None) -> tuple[Any, Array]:
        start = (carry, jnp.zeros(k, flat.dtype), jnp.zeros((), flat.dtype))
        after, _ = jax.lax.scan(measure, start, length=steps // blocks // qr_every)
        return after[:2]

    tangents, _ = orthonormalise(jax.random.normal(key, (k, flat.size), flat.dtype))
    zero = jnp.zeros((), jnp.int32)
    settle = lambda carry, _: (stretch(carry, 1)[0], None)  # noqa: E731
    carry, _ = jax.lax.scan(settle, (flat, tangents, zero, zero), length=transient)
    (_, tangents, _, sound), rates = _repeat(block, carry, blocks)
    healthy = (sound == transient + steps) & jnp.all(jnp.isfinite(tangents))
    return jnp.where(healthy, rates, jnp.nan), sound, jnp.all(jnp.isfinite(tangents))


def _repeat(body: Callable[..., tuple[Any, Any]], carry: Any, turns: int) -> tuple[Any, Any]:
    """`lax.scan` over no inputs; one turn is a plain call, since a loop copies all tangents."""
    if turns > 1:
        return jax.lax.scan(body, carry, length=turns)
    carry, made = body(carry, None)
    return carry, jax.tree.map(lambda a: a[None], made)


def push_forward(f: Callable[[Array], Array], x: Array, tangents: Array) -> tuple[Array, Array]:
    """f(x) and J tangents for tangents [k, ...] at x [...]; f itself is computed once."""
    if tangents.shape[0] == 1:  # without a batch axis of one, which makes products slower
        after, tangent = jax.jvp(f, (x,), (tangents[0],))
        return after, tangent[None]
    after, push = jax.linearize(f, x)
    return after, jax.vmap(push)(tangents)


def orthonormalise(tangents: Array) -> tuple[Array, Array]:
    """Rows [k, n] -> orthonormal rows of the same span, and the log of what each added [k].

    That is QR of the transpose, with log |R[i, i]|; -inf marks a row that adds nothing. Where n is
    large the rows are orthonormal to 1e-3 only: what one call leaves undone the next one does.
    """
    k, n = tangents.shape
    if k == 1:  # has a gradient everywhere but at zero
        square = jnp.sum(jnp.square(tangents), axis=1)
        size = jnp.sqrt(jnp.where(square > 0, square, 1))
        return tangents / size[:, None], jnp.where(square > 0, jnp.log(size), -jnp.inf)
    if n < TALL * k:
        q, r = jnp.linalg.qr(tangents.T)
        return q.T, jnp.log(jnp.abs(jnp.diagonal(r)))

    # Cholesky of the k by k Gram matrix gives the same R by products alone: LAPACK's QR takes up to
    # 20 times as long. The shift, above rounding, keeps the matrix positive where rows are nearly
    # dependent; the next pass does what it leaves undone (Fukaya et al. 2020, SIAM J. Sci. Comput).
    shift = 10 * jnp.finfo(tangents.dtype).eps * n**0.5

    def again(carry: Any) -> tuple[Array, Array, Array, Array]:
        rows, growth, _, passes = carry
        gram = rows @ rows.T
        square = jnp.diagonal(gram)
        size = jnp.sqrt(jnp.where(square > 0, square, 1))
        filled = gram / jnp.outer(size, size) + jnp.diag(shift + jnp.where(square > 0, 0.0, 1.0))
        factor = jnp.linalg.cholesky(filled)
        new = jnp.diagonal(factor)  # the part of each row, of unit length, that the others lack
        identity = jnp.eye(k, dtype=rows.dtype)
        inverse = jax.scipy.linalg.solve_triangular(factor, identity, lower=True)
        gained = jnp.where(square > 0, jnp.log(size) + jnp.log(new), -jnp.inf)
        return (inverse / size) @ rows, growth + gained, new, passes + 1

    start = (tangents, *jnp.zeros((2, k), tangents.dtype), jnp.zeros((), jnp.int32))
    rows, growth, new, _ = jax.lax.while_loop(
        lambda carry: jnp.any(carry[2] < NEW) & (carry[3] < 5), again, again(start)
    )
    return rows, jnp.where(new < NEW, -jnp.inf, growth)  # five passes found nothing new in the row


def bootstrap_interval(
    blocks: Array, *, confidence: float = 0.95, resamples: int = 2000, key: Array | None = None
) -> tuple[Array, Array]:
    """Percentile interval (low, high) of the mean of `blocks` [N, ...] over its first axis.

    By the block bootstrap (Kuensch 1989, Annals of Statistics 17), for blocks that are independent
    of each other, such as means of long stretches. Raises ValueError for N < 2.
    """
    if blocks.shape[0] < 2:
        raise ValueError(f"blocks: {len(blocks)} of them; an interval needs 2 or more, better 20")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must be between 0 and 1, for instance 0.95")
    count, key = blocks.shape[0], jax.random.key(0) if key is None else key
    drawn = jax.random.randint(key, (resamples, count), 0, count)
    # How often each block was drawn makes one product of all resamples.
    times = jax.vmap(lambda row: jnp.bincount(row, length=count))(drawn).astype(blocks.dtype)
    means = jnp.tensordot(times, blocks, 1) / count
    tail = (1 - confidence) / 2
    return jnp.quantile(means, tail, axis=0), jnp.quantile(means, 1 - tail, axis=0)


def kaplan_yorke_dimension(exponents: Array) -> Array:
    """Lyapunov dimension, at most k, from exponents [k] in any order (Kaplan and Yorke 1979)."""
    ordered = -jnp.sort(-exponents)
    sums = jnp.cumsum(ordered)
    j = jnp.sum(jnp.cumprod(sums >= 0))
    below = jnp.where(j > 0, sums[jnp.maximum(j - 1, 0)], 0.0)
    following = ordered[jnp.minimum(j, ordered.size - 1)]
    part = below / jnp.where(following == 0, 1.0, jnp.abs(following))
    return jnp.where(j == ordered.size, j, j + part)


def entropy_rate(exponents: Array) -> Array:
    """The sum of the positive exponents, nats per step (Ruelle 1978; Pesin 1977)."""
    return jnp.sum(jnp.maximum(exponents, 0))


def _check(step: Step, x0: Tree, inputs: Tree, plan: Plan) -> int:
    """Refuses what cannot be measured, naming the argument; returns n."""
    steps, blocks, k, transient, qr_every = plan
    leaves = jax.tree.leaves(x0)
    size = sum(leaf.size for leaf in leaves)
    if size == 0:
        raise ValueError("x0: holds no numbers")
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"x0: dtype {leaf.dtype}; must be floating, for instance float32")
        if not isinstance(leaf, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(leaf))):
            raise ValueError("x0: not finite; must be finite in all its numbers")
    for name, least in {"steps": 1, "blocks": 1, "qr_every": 1, "transient": 0}.items():
        if getattr(plan, name) < least:
            raise ValueError(f"{name}={getattr(plan, name)}: must be {least} or more")
    if k is not None and not 1 <= k <= size:
        raise ValueError(f"k={k}: must be from 1 to {size}, the numbers of x0")
    length = steps // blocks
    parts = [("blocks", blocks, steps, f"steps={steps}")]
    parts += [("qr_every", qr_every, length, f"the {length} steps of a block")]
    for name, part, whole, what in parts:
        if whole % part:
            divisors = (d for d in range(1, whole + 1) if whole % d == 0)
            near = min(divisors, key=lambda d: abs(d - part))
            raise ValueError(f"{name}={part}: must divide {what}, for instance {near}")
    for leaf in jax.tree.leaves(inputs):
        if leaf.ndim == 0 or leaf.shape[0] < transient + steps:
            need = f"transient + steps = {transient + steps} entries"
            raise ValueError(f"inputs: shape {leaf.shape}; the leading axis must have {need}")
    u = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), inputs)
    kind = partial(jax.tree.map, lambda leaf: f"{leaf.dtype}{list(leaf.shape)}")
    made, given = (str(kind(tree)) for tree in (jax.eval_shape(step, x0, u), x0))
    if made != given:
        raise ValueError(f"step: makes {made} of {given}; must keep structure, shapes and dtypes")
    return size
