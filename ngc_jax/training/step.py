"""One update and one evaluation, as pure functions; `train.py` compiles and calls them.

For: the train state, the loss, gradient accumulation, the guard against bad updates. Not for: the
loop, or how a gradient becomes a direction (`optim.py`).

Axes: A accumulated parts, B examples of a batch, T tokens, V vocabulary. A batch is int32 [B, 2,
T]: what is read, and the target of each position, below 0 where nothing is asked.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from ngc_jax.nn.model import LanguageModel
from ngc_jax.training import early_warning as monitor
from ngc_jax.training import loss_spikes as spikes
from ngc_jax.training import optimizer as optim
from ngc_jax.training.penalty import Penalty
from ngc_jax.training.rounds import Apply, Iteration

Array = jax.Array
Tree = Any
# of an update: a key, for the penalty; and how many rounds it has, or None
Drawn = tuple[Array, Any]


@flax.struct.dataclass
class TrainState:
    """All that a run is, after `step` updates. Learning rate and everything random follow from
    `step`.

    So does the batch, but for the count of batches that were passed over, which is saved beside it
    (`train.py`).
    """

    step: Array  # int32: updates, skipped ones counted
    params: Tree  # float32; and int32, not trained, where it says who hears whom (rewire.py)
    optimizer: Tree
    # int32: updates skipped so far because loss or gradient was not finite, or the loss a spike
    skipped: Array
    bad: Array  # int32: of these, the latest in a row
    # monitor.Memory, of the early warning; under train.spike the pair of it and spikes.Memory
    monitor: Any


def init_state(model: LanguageModel, config: Any, seed: int) -> TrainState:
    """The state before the first update."""
    params = model.init(jax.random.key(seed))
    zero, memory = jnp.zeros((), jnp.int32), optim.optimizer(config).init(partition(params)[0])
    watched = (monitor.begin(), spikes.begin()) if config.spike else monitor.begin()
    return TrainState(zero, params, memory, zero, zero, watched)


def partition(params: Tree) -> tuple[Tree, Tree]:
    """What of a model's parameters is trained, and what is not: the whole numbers. `combine` undoes
    it.
    """
    flat = flatten_dict(params)
    fixed = {path: leaf for path, leaf in flat.items() if jnp.issubdtype(leaf.dtype, jnp.integer)}
    return unflatten_dict(
        {path: leaf for path, leaf in flat.items() if path not in fixed}
    ), unflatten_dict(fixed)


def combine(trained: Tree, fixed: Tree) -> Tree:
    """The parameters that `partition` took apart."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(fixed))


def predict(
    apply: Apply, params: Tree, inputs: Array, boundary: int | None, dtype: Any
) -> tuple[Array, Any]:
    """Logits [..., B, T, V] of apply(params, inputs [B, T], segments), and what else it returns.

    No token sees back across the last `boundary` token, if one is given.
    """
    segments = None if boundary is None else jnp.cumsum(inputs == boundary, axis=1)
    params = jax.tree.map(
        lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params
    )
    return apply(params, inputs, segments)


def nats_of(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Nats of each target [..., B, T] by logits [..., B, T, V], and which of the targets [B, T]
    count [B, T] bool.
    """
    labels = jnp.broadcast_to(jnp.maximum(targets, 0), logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), targets >= 0


def losses(
    model: LanguageModel, params: Tree, batch: Array, boundary: int | None, dtype: Any
) -> tuple[Array, Array]:
    """Nats of each target of a batch [B, T], and which of them count [B, T] bool."""
    return nats_of(predict(model.apply, params, batch[:, 0], boundary, dtype)[0], batch[:, 1])


def make_train_step(
    model: LanguageModel,
    config: Any,
    boundary: int | None = None,
    penalty: Penalty | None = None,
    iteration: Iteration | None = None,
) -> Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]:
    """The update for `config.train`: (state, batch [B, 2, T]) -> (state, scalars of the state
    *before* it).

    `penalty` (stability/regulariser.py), nats per token, is added to what is minimised, and not to
    train/loss. `iteration` says how the model's loop is run; None: as `model.apply` runs it.
    """
    dtype = jnp.dtype(config.compute_dtype)
    chain = optim.optimizer(config)

    def summed(
        trained: Tree, fixed: Tree, batch: Array, drawn: Drawn
    ) -> tuple[Array, tuple[Array, Array]]:
        params, (key, rounds) = combine(trained, fixed), drawn
        apply = model.apply if iteration is None else iteration.apply(rounds, key)
        logits, weights = predict(apply, params, batch[:, 0], boundary, dtype)
        nats, counts = nats_of(logits, batch[:, 1])
        if iteration is not None:
            nats = jnp.sum(weights[..., None] * nats, axis=0)  # over read-outs
        total, count = jnp.sum(nats * counts), jnp.sum(counts)
        extra = 0.0 if penalty is None else penalty(params, batch[:, 0], key) * count
        return total + extra, (total, count)

    def gradient(
        trained: Tree, fixed: Tree, batch: Array, drawn: Drawn
    ) -> tuple[Array, Array, Tree]:
        (_, (nats, count)), grads = jax.value_and_grad(summed, has_aux=True)(
            trained, fixed, batch, drawn
        )
        return nats, count, grads

    def accumulated(
        trained: Tree, fixed: Tree, batch: Array, drawn: Drawn
    ) -> tuple[Array, Array, Tree]:
        # Part a takes rows a, a + A, ...: each device of a batch that is split by rows keeps all it
        # has in every part.
        parts = batch.reshape(-1, config.accumulation, *batch.shape[1:]).swapaxes(0, 1)
        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), jnp.zeros((), jnp.int32), trained))

        def add(total: Tree, part: Array) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, total, gradient(trained, fixed, part, drawn)), None

        return jax.lax.scan(add, zero, parts)[0]

    def step(state: TrainState, batch: Array) -> tuple[TrainState, dict[str, Array]]:
        # for noise, and for the Jacobian penalty
        key = jax.random.fold_in(jax.random.key(0), state.step)
        rounds = None if iteration is None else iteration.draw(state.step)
        old, fixed = partition(state.params)
        nats, count, grads = (gradient if config.accumulation == 1 else accumulated)(
            old, fixed, batch, (key, rounds)
        )
        grads = jax.tree.map(lambda g: g / count, grads)
        loss, norm = nats / count, optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        warned, before = state.monitor if config.spike else (state.monitor, spikes.begin())
        if config.spike:
            good = good & ~spikes.spiked(before, loss, config.spike)
        direction, memory = chain.update(grads, state.optimizer, old)
        params = optim.apply(config, old, direction, state.step)
        params, memory, losses = jax.tree.map(
            lambda after, before: jnp.where(good, after, before),
            (params, memory, spikes.advance(before, loss)),
            (old, state.optimizer, before),
        )
        change = optax.tree.norm(jax.tree.map(jnp.subtract, params, old)) / optax.tree.norm(old)
        warned, warning = monitor.advance(warned, change)
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
            **({} if iteration is None or iteration.mark is not None else {"train/rounds": rounds}),
        }
        watched = (warned, losses) if config.spike else warned
        return TrainState(
            state.step + 1, combine(params, fixed), memory, skipped, bad, watched
        ), scalars

    return step


def make_eval_step(
    model: LanguageModel,
    config: Any,
    lengths: np.ndarray | None,
    boundary: int | None = None,
    settle: Apply | None = None,
) -> Callable[[Tree, Array, Array], dict[str, Array]]:
    """Sums over one batch: (params, batch [B, 2, T], real [B] bool) -> nats and targets.

    Of text, whose tokens have `lengths` in bytes, also its bytes; of problems, how many there are
    and are solved. `settle` stands for `model.apply` where rounds differ (`Decoder.settle`,
    `iteration.marked`): then rounds too.
    """
    dtype = jnp.dtype(config.compute_dtype)
    apply = settle or model.apply

    def step(params: Tree, batch: Array, real: Array) -> dict[str, Array]:
        targets = batch[:, 1]
        logits, rounds = predict(apply, params, batch[:, 0], boundary, dtype)
        nats, counts = nats_of(logits, targets)
        counts = counts & real[:, None]
        sums = {"nats": jnp.sum(nats * counts), "targets": jnp.sum(counts)}
        if settle is not None:
            sums["rounds"] = jnp.sum(rounds * counts)
        if lengths is None:
            return sums | {
                "problems": jnp.sum(real),
                "solved": jnp.sum(solved(logits, targets) & real),
            }
        return sums | {"bytes": jnp.sum(jnp.asarray(lengths)[targets] * counts)}

    return step


def solved(logits: Array, targets: Array) -> Array:
    """Whether by logits [B, T, V] the likeliest symbol is the right one wherever targets [B, T] ask
    for one: [B].
    """
    return jnp.all((jnp.argmax(logits, axis=-1) == targets) | (targets < 0), axis=-1)
