"""Lyapunov exponents of any map: how fast two close states move apart per step.

For: `step(x, u) -> x` of any kind (a recurrent cell, a loop of rounds, an integrator of an ODE),
with or without inputs. Not for: this project's models, of which `analysis/probes.py` makes steps.

With J_t the Jacobian of the step at x_t, tangent vectors follow Q_{t+1} R_{t+1} = J_t Q_t, and the
exponents are the means of log |R_t[i, i]| (Benettin et al. 1980, Meccanica 15; Eckmann and Ruelle
1985, Rev. Mod. Phys. 57, section V). Tangents are pushed forward without forming J_t. Inputs make
exponents conditional: of two states fed the *same* inputs. Memory does not grow with the steps.

Axes: n numbers of a state, k exponents.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

Array = jax.Array
Tree = Any
Step = Callable[[Any, Any], Any]
Key = Array | None
Plan = tuple[int, int, Any, int, int]  # steps, blocks, k, transient, qr_every
TALL = 16  # numbers of a state for each tangent, from which QR goes by Gram matrices
DIGITS = 400  # times the dtype's epsilon: what a step may shrink more than others, and be resolved
NEW = 0.3  # of a row's length that must be new, for the shift not to be seen in it


def lyapunov_spectrum(
    step: Step,
    x0: Tree,
    inputs: Tree = None,
    *,
    steps: int,
    k: int | None = None,
    transient: int = 0,
    qr_every: int = 1,
    key: Key = None,
) -> Array:
    """The k largest Lyapunov exponents of x <- step(x, u), nats per step: [k], descending.

    x0: the first state, a floating array of any shape or a tree of them, n numbers in all. inputs:
    None (u is None), or a tree of arrays whose leading axis has a u for each step, transient
    included. steps: how many are measured, after `transient` steps in which state and tangents
    settle. k: at most n, default all n. qr_every: steps between orthonormalisations; more than 1 is
    cheaper and overflows or loses the small exponents if it is too many. key: of the tangents that
    it starts with. -inf is a direction that is lost altogether; of exponents that are `unresolved`
    a warning is given. Raises ValueError, naming the argument. Inside jit or vmap a state that
    stops being finite gives nan. `step` is traced once for each function object: define it once.
    """
    return -jnp.sort(-_measure(step, x0, inputs, key, (steps, 1, k, transient, qr_every))[0])


def leading_exponent(
    step: Step, x0: Tree, inputs: Tree = None, *, steps: int, transient: int = 0, key: Key = None
) -> Array:
    """The largest exponent alone, from one tangent vector renormalised at each step: a scalar.

    Costs about two forward passes. Differentiable in x0, inputs and whatever `step` closes over.
    Arguments and errors as in `lyapunov_spectrum`.
    """
    return _measure(step, x0, inputs, key, (steps, 1, 1, transient, 1))[0, 0]


def local_exponents(
    step: Step,
    x0: Tree,
    inputs: Tree = None,
    *,
    steps: int,
    blocks: int,
    k: int | None = None,
    transient: int = 0,
    qr_every: int = 1,
    key: Key = None,
) -> Array:
    """Finite-time exponents of successive stretches of steps / blocks steps each: [blocks, k].

    Their mean over blocks is the spectrum; `bootstrap_interval` makes of them its interval. Columns
    are in the order of the tangents, which is descending in the long run. Arguments and errors as
    in `lyapunov_spectrum`.
    """
    return _measure(step, x0, inputs, key, (steps, blocks, k, transient, qr_every))


def unresolved(exponents: Any, qr_every: int = 1) -> Array:
    """Which of the exponents [..., k] lie so far below the largest that they are rounding error.

    That is more than -log(400 epsilon) / qr_every per step: 10 nats in float32, 30 in float64. Of
    random linear maps of 4 to 1,500 numbers, float32 has all exponents above that to 0.06, those 14
    nats below the largest to 0.3, and those 16 nats below it to 2. A direction that such a map
    loses altogether shows up 14 nats below or further in the median, but 4 in the worst map.
    """
    largest = jnp.max(exponents, axis=-1, keepdims=True)
    span = -jnp.log(DIGITS * jnp.finfo(exponents.dtype).eps) / qr_every
    return jnp.isfinite(exponents) & (exponents < largest - span)


def _measure(step: Step, x0: Tree, inputs: Tree, key: Key, plan: Plan) -> Array:
    """`local_exponents`, checked before and after."""
    x0, inputs = jax.tree.map(jnp.asarray, (x0, inputs))
    size, (steps, blocks, k, transient, qr_every) = _check(step, x0, inputs, plan), plan
    key = jax.random.key(0) if key is None else key
    plan = (steps, blocks, k or size, transient, qr_every)
    rates, sound, tangents_sound = _run(step, x0, inputs, key, plan)
    if isinstance(sound, jax.core.Tracer):
        return rates
    if sound < transient + steps:
        at = f"step {int(sound) + 1} of {transient + steps}"
        raise ValueError(f"x0: the state stopped being finite in {at}")
    if not tangents_sound:
        fewer = f"qr_every={qr_every}: take fewer, for instance 1"
        remedy = fewer if qr_every > 1 else "step: look at its Jacobian"
        raise ValueError(f"{remedy}; the tangents stopped being finite while the state did not")
    small = unresolved(jnp.mean(rates, axis=0), qr_every)
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
    large the rows come out orthonormal to 1e-3 only: what one call leaves undone the next one does,
    so means of logarithms over many steps are none the worse.
    """
    k, n = tangents.shape
    if k == 1:  # has a gradient everywhere but at zero
        square = jnp.sum(jnp.square(tangents), axis=1)
        size = jnp.sqrt(jnp.where(square > 0, square, 1))
        return tangents / size[:, None], jnp.where(square > 0, jnp.log(size), -jnp.inf)
    if n < TALL * k:
        q, r = jnp.linalg.qr(tangents.T)
        return q.T, jnp.log(jnp.abs(jnp.diagonal(r)))

    # Cholesky of the k by k Gram matrix gives the same R by products alone. LAPACK's QR of a tall
    # matrix takes up to 20 times as long, and would gather one that is spread over devices. The
    # shift, above rounding, keeps the matrix positive where rows are nearly dependent. What it
    # leaves undone, the next pass does (Fukaya et al. 2020, SIAM J. Sci. Comput. 42).
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

    By the block bootstrap (Kuensch 1989, Annals of Statistics 17): give means of stretches long
    enough to be independent of each other, or one value a sequence. Raises ValueError for N < 2.
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
    """Lyapunov dimension of the attractor, from exponents [k] in any order (Kaplan and Yorke 1979).

    j + (sum of the j largest) / |next|, j the most whose sum is not negative: 0 where all contract.
    Where the sum of all k is not negative it is at least k, and k is returned.
    """
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
    counts = {"steps": steps, "blocks": blocks, "qr_every": qr_every, "transient": transient}
    for name, count in counts.items():
        least = 0 if name == "transient" else 1
        if count < least:
            raise ValueError(f"{name}={count}: must be {least} or more")
    if k is not None and not 1 <= k <= size:
        raise ValueError(f"k={k}: must be from 1 to {size}, the numbers of x0")
    length = steps // blocks
    for name, part, whole, what in (
        ("blocks", blocks, steps, f"steps={steps}"),
        ("qr_every", qr_every, length, f"the {length} steps of a block"),
    ):
        if whole % part:
            divisors = (d for d in range(1, whole + 1) if whole % d == 0)
            near = min(divisors, key=lambda d: abs(d - part))
            raise ValueError(f"{name}={part}: must divide {what}, for instance {near}")
    for leaf in jax.tree.leaves(inputs):
        if leaf.ndim == 0 or leaf.shape[0] < transient + steps:
            need = f"transient + steps = {transient + steps} entries"
            raise ValueError(f"inputs: shape {leaf.shape}; the leading axis must have {need}")
    u = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), inputs)
    after = jax.eval_shape(step, x0, u)
    made, given = (str(jax.tree.structure(tree)) for tree in (after, x0))
    if made != given:
        raise ValueError(f"step: makes a {made} of a {given}; must keep the structure of x0")
    for new, old in zip(jax.tree.leaves(after), leaves, strict=True):
        made, given = (f"{leaf.dtype}{list(leaf.shape)}" for leaf in (new, old))
        if made != given:
            raise ValueError(f"step: makes {made} of {given}; must keep shape and dtype of x0")
    return size
