"""One update and one evaluation, as pure functions; `train.py` compiles and calls them.

For: the train state, the loss, gradient accumulation, the guard against non-finite updates. Not for: the loop, or how
a gradient becomes a direction (`optim.py`).

Axes: A accumulated parts, B windows of a batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from ngc_jax import optim
from ngc_jax.iteration import Apply, Iteration
from ngc_jax.nn.model import LanguageModel
from ngc_jax.stability import monitor
from ngc_jax.stability.regulariser import Penalty

Array = jax.Array
Tree = Any
Drawn = tuple[Array, Any]  # of an update: a key, for the penalty; and how many rounds it has, or None


@flax.struct.dataclass
class TrainState:
    """All that a run is, after `step` updates. Learning rate and everything random follow from `step`.

    So does the batch, but for the count of batches that were passed over, which is saved beside it (`train.py`).
    """

    step: Array  # int32: updates, skipped ones counted
    params: Tree  # float32; and int32, not trained, where it says who hears whom (rewire.py)
    optimizer: Tree
    skipped: Array  # int32: updates skipped so far because loss or gradient was not finite
    bad: Array  # int32: of these, the latest in a row
    monitor: monitor.Memory  # of the early warning


def init_state(model: LanguageModel, config: Any, seed: int) -> TrainState:
    """The state before the first update."""
    params = model.init(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optim.optimizer(config).init(apart(params)[0]), zero, zero, monitor.begin())


def apart(params: Tree) -> tuple[Tree, Tree]:
    """What of a model's parameters is trained, and what is not: the whole numbers. `together` undoes it."""
    flat = flatten_dict(params)
    fixed = {path: leaf for path, leaf in flat.items() if jnp.issubdtype(leaf.dtype, jnp.integer)}
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path not in fixed}), unflatten_dict(fixed)


def together(trained: Tree, fixed: Tree) -> Tree:
    """The parameters that `apart` took apart."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(fixed))


def losses(
    model: LanguageModel, params: Tree, tokens: Array, mark: int, isolate: bool, dtype: Any
) -> tuple[Array, Array]:
    """Nats of each target [B, T] and which of them count [B, T] bool, for tokens [B, T + 1]."""
    return read(model.apply, params, tokens, mark, isolate, dtype)[:2]


def read(apply: Apply, params: Tree, tokens: Array, mark: int, isolate: bool, dtype: Any) -> tuple[Array, Array, Any]:
    """`losses` of apply(params, inputs, segments) -> (logits [..., B, T, V], what else): nats [..., B, T], and that.

    The mark that begins a document cannot be foreseen and is no text: it is read, but never a target.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    segments = jnp.cumsum(inputs == mark, axis=1) if isolate else None
    params = jax.tree.map(lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params)
    logits, beside = apply(params, inputs, segments)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(targets, logits.shape[:-1]))
    return nats, targets != mark, beside


def make_train_step(
    model: LanguageModel,
    config: Any,
    mark: int,
    isolate: bool,
    penalty: Penalty | None = None,
    iteration: Iteration | None = None,
) -> Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]:
    """The update for `config.train`: (state, tokens [B, T + 1]) -> (state, scalars of the state *before* it).

    `penalty` (stability/regulariser.py), nats per token, is added to what is minimised, and not to train/loss.
    `iteration` says how the model's loop is run; None: as `model.apply` runs it.
    """
    dtype = jnp.dtype(config.compute_dtype)
    chain = optim.optimizer(config)

    def summed(trained: Tree, fixed: Tree, tokens: Array, drawn: Drawn) -> tuple[Array, tuple[Array, Array]]:
        params, (key, rounds) = together(trained, fixed), drawn
        apply = model.apply if iteration is None else iteration.apply(rounds)
        nats, counts, weights = read(apply, params, tokens, mark, isolate, dtype)
        if iteration is not None:
            nats = jnp.sum(weights[..., None] * nats, axis=0)  # over read-outs
        total, count = jnp.sum(nats * counts), jnp.sum(counts)
        extra = 0.0 if penalty is None else penalty(params, tokens[:, :-1], key) * count
        return total + extra, (total, count)

    def gradient(trained: Tree, fixed: Tree, tokens: Array, drawn: Drawn) -> tuple[Array, Array, Tree]:
        (_, (nats, count)), grads = jax.value_and_grad(summed, has_aux=True)(trained, fixed, tokens, drawn)
        return nats, count, grads

    def accumulated(trained: Tree, fixed: Tree, tokens: Array, drawn: Drawn) -> tuple[Array, Array, Tree]:
        # Part a takes rows a, a + A, ...: each device of a batch that is split by rows keeps all it has in every part.
        parts = tokens.reshape(-1, config.accumulation, tokens.shape[1]).swapaxes(0, 1)
        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), jnp.zeros((), jnp.int32), trained))

        def add(total: Tree, part: Array) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, total, gradient(trained, fixed, part, drawn)), None

        return jax.lax.scan(add, zero, parts)[0]

    def step(state: TrainState, tokens: Array) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(0), state.step)  # only the Jacobian penalty draws
        rounds = None if iteration is None else iteration.draw(state.step)
        old, fixed = apart(state.params)
        nats, count, grads = (gradient if config.accumulation == 1 else accumulated)(old, fixed, tokens, (key, rounds))
        grads = jax.tree.map(lambda g: g / count, grads)
        loss, norm = nats / count, optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        direction, memory = chain.update(grads, state.optimizer, old)
        params = optim.apply(config, old, direction, state.step)
        params, memory = jax.tree.map(
            lambda after, before: jnp.where(good, after, before), (params, memory), (old, state.optimizer)
        )
        change = optax.tree.norm(jax.tree.map(jnp.subtract, params, old)) / optax.tree.norm(old)
        watched, warning = monitor.advance(state.monitor, change)
        bad = jnp.where(good, 0, state.bad + 1)
        skipped = state.skipped + jnp.where(good, 0, 1)
        scalars = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/learning_rate": config.learning_rate * optim.schedule(config, state.step),
            "train/skipped": skipped,
            "train/bad_in_a_row": bad,
            "stability/relative_update": change,
            "stability/warning": warning,
            **({} if rounds is None else {"train/rounds": rounds}),
        }
        return TrainState(state.step + 1, together(params, fixed), memory, skipped, bad, watched), scalars

    return step


def make_eval_step(
    model: LanguageModel, config: Any, mark: int, lengths: np.ndarray, isolate: bool, settle: Apply | None = None
) -> Callable[[Tree, Array, Array], dict[str, Array]]:
    """Sums over one batch: (params, tokens [B, T + 1], real [B] bool) -> nats, tokens, bytes.

    `settle` stands for `model.apply` where the loop is to run until it settles (`Decoder.settle`): then rounds too.
    """
    dtype = jnp.dtype(config.compute_dtype)
    apply = settle or model.apply

    def step(params: Tree, tokens: Array, real: Array) -> dict[str, Array]:
        nats, counts, rounds = read(apply, params, tokens, mark, isolate, dtype)
        counts = counts & real[:, None]
        made = {} if settle is None else {"rounds": jnp.sum(rounds * counts)}
        return {
            **made,
            "nats": jnp.sum(nats * counts),
            "tokens": jnp.sum(counts),
            "bytes": jnp.sum(jnp.asarray(lengths)[tokens[:, 1:]] * counts),
        }

    return step
