"""One update and one evaluation, as pure functions; `loop.py` compiles and calls them.

For: the train state, the loss, gradient accumulation, the guard against bad updates. Not for: the
loop, or a gradient's direction (`optimizer.py`). Axes: B examples, T tokens, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ngc_jax.data.batches import Batch, answered
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.nn.params import combine, partition
from ngc_jax.training import monitors, optimizer
from ngc_jax.training.imitation import distance, side_by_side
from ngc_jax.training.rounds import Apply, Iteration
from ngc_jax.training.stability_metrics import Penalty

Array = jax.Array
Tree = Any
Scalars = dict[str, Array]
Drawn = tuple[Array, Any]  # of an update: a key for what is random; its number of rounds, or None
# Of what runs seldom: it compiles several times faster, and elementary programs to the same bits.
SELDOM = {"xla_backend_optimization_level": 1}
RANDOM = 1  # of the keys of updates, apart from those of the initial parameters and of rounds


@flax.struct.dataclass
class TrainState:
    """All that a run is, after `step` updates: learning rate and all that is random follow."""

    step: Array  # int32: updates, skipped ones counted
    params: Tree  # float32; int32, and not trained, where they say who hears whom (rewiring.py)
    optimizer: Tree
    skipped: Array  # int32: updates skipped so far: loss or gradient not finite, or a loss spike
    bad: Array  # int32: of these, the latest in a row
    monitor: Any  # monitors.Updates; under train.spike the pair of it and monitors.Losses


@flax.struct.dataclass
class Averaged(TrainState):
    """A state that also keeps `train.ema`'s moving average of the parameters that are trained."""

    average: Tree


def init_state(model: LanguageModel, config: Any, seed: int, params: Tree = None) -> TrainState:
    """The state before the first update, of `params` if given; `config` is `config.train`."""
    info = model.param_info()
    params = model.init(jax.random.key(seed)) if params is None else params
    chain = optimizer.make_optimizer(config, partition(info, info)[0])
    trained = partition(params, info)[0]
    zero, memory = jnp.zeros((), jnp.int32), chain.init(trained)
    begun = monitors.begin()
    state = TrainState(zero, params, memory, zero, zero, begun if config.spike else begun[0])
    # A copy: updates donate their memory, and nothing can be donated twice.
    return Averaged(**vars(state), average=jax.tree.map(jnp.copy, trained)) if config.ema else state


def evaluated(state: TrainState) -> Tree:
    """The parameters that are evaluated and sampled: under `train.ema` their average."""
    return combine(state.params, state.average) if isinstance(state, Averaged) else state.params


def abstract_state(model: LanguageModel, config: Any, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a run's state on a mesh: moments lie as their parameters."""
    info, whole = model.param_info(), meshes.replicated(mesh)
    state = jax.eval_shape(lambda: init_state(model, config, 0))
    placed: TrainState = jax.tree.map(lambda leaf: meshes.abstract(leaf, whole), state)
    put, trained = partial(meshes.abstract_param, mesh), partition(info, info)[0]
    lay = partial(optimizer.map_kept, put, info=trained)
    memory = optimizer.map_like_params(lay, placed.optimizer, trained)
    params = jax.tree.map(put, placed.params, info)
    placed = dataclasses.replace(placed, params=params, optimizer=memory)
    if isinstance(placed, Averaged):
        mean = jax.tree.map(put, placed.average, trained)
        placed = dataclasses.replace(placed, average=mean)
    return placed


def predict(apply: Apply, params: Tree, batch: Batch, dtype: Any) -> tuple[Array, Any]:
    """Logits [..., B, T, V] of apply(params, batch) computed in `dtype`, and what else it gives."""
    return apply(cast(params, dtype), batch)


def cast(params: Tree, dtype: Any) -> Tree:
    """Parameters to compute in a dtype; wirings, which are whole numbers, stay."""
    floating = lambda p: jnp.issubdtype(p.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda p: p.astype(dtype) if floating(p) else p, params)


def nats_of(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Nats of each target [..., B, T] by logits [..., B, T, V], and which of them count [B, T]."""
    labels = jnp.broadcast_to(jnp.maximum(targets, 0), logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), targets >= 0


def smoothed(nats: Array, logits: Array, share: float) -> Array:
    """Nats of targets to which 1 - share goes, and share / V to each of V (arXiv 1512.00567)."""
    even = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    return (1 - share) * nats + share * even


def losses(model: LanguageModel, params: Tree, batch: Batch, dtype: Any) -> tuple[Array, Array]:
    """Nats of each target of a batch [B, T], and which of them count [B, T] bool."""
    return nats_of(predict(model.apply, params, batch, dtype)[0], batch.targets)


def make_train_step(
    model: LanguageModel,
    config: Any,
    penalty: Penalty | None = None,
    iteration: Iteration | None = None,
    seed: int = 0,
    teacher: Any = None,
) -> Callable[..., tuple[TrainState, Scalars]]:
    """The update for `config.train`: (state, batch) -> (state, scalars of the state *before* it).

    `penalty`, nats per token, is added to what is minimised, and not to train/loss. `iteration`:
    how the loop is run. What is random follows from `seed`, the update and the accumulated part.
    With a `teacher`, a model whose parameters are then a third argument, the distance from what
    `config.imitate` names of it is minimised; train/loss stays that of the data, as it does where
    `config.label_smoothing` changes what is minimised.
    """
    beside, kind = None, config.imitate if teacher else "outputs"
    if isinstance(model, Decoder) and kind != "outputs":
        beside = partial(side_by_side, model, teacher, kind == "stages")
    dtype, info = jnp.dtype(config.compute_dtype), model.param_info()
    trained_info = partition(info, info)[0]
    chain = optimizer.make_optimizer(config, trained_info)

    def summed(trained: Tree, others: Tree, batch: Batch, drawn: Drawn) -> tuple[Array, Any]:
        (fixed, taught, share), (key, rounds) = others, drawn
        params = combine(optimizer.held(config, trained, trained_info), fixed)
        noise, probe = jax.random.split(key)
        apply = model.apply if iteration is None else iteration.apply(rounds, noise)
        used = model.dropped(params, key)
        off: Array | float = 0.0
        if beside is not None:
            logits, (said, off) = predict(beside, (used, taught), batch, dtype)
        else:
            logits, weights = predict(apply, used, batch, dtype)
            said = predict(teacher.apply, taught, batch, dtype)[0] if teacher else None
        nats, counts = nats_of(logits, batch.targets)
        learned = nats if said is None else distance(logits, said, config.temperature)
        if config.label_smoothing:
            learned = smoothed(nats, logits, config.label_smoothing)
        if iteration is not None:
            mean = lambda nats: jnp.sum(weights[..., None] * nats, axis=0)  # noqa: E731
            nats, learned = mean(nats), mean(learned)  # over read-outs
        total, count = jnp.sum(nats * counts), jnp.sum(counts)
        plain = teacher is None and not config.label_smoothing
        aim = total if plain else jnp.sum(learned * counts)
        if beside is not None:  # `off` is a sum over tokens, and becomes the mean over them
            aim = share * off + (0.0 if kind == "stages" else aim)
        extra = 0.0 if penalty is None else penalty(params, batch, probe) * count
        return aim + extra, (total, count, aim)

    def gradient(*where: Any) -> tuple[Array, Array, Array, Tree]:
        (_, sums), grads = jax.value_and_grad(summed, has_aux=True)(*where)
        return *sums, grads

    def accumulated(trained: Tree, others: Tree, batch: Batch, drawn: Drawn) -> Any:
        # Part a takes rows a, a + A, ...: a device keeps the rows that it has in every part.
        every = config.accumulation
        parts = jax.tree.map(lambda a: a.reshape(-1, every, *a.shape[1:]).swapaxes(0, 1), batch)
        sums = jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros(())
        zero = jax.tree.map(jnp.zeros_like, (*sums, trained))
        keys = jax.random.split(drawn[0], every)

        def add(total: Tree, part: tuple[Batch, Array]) -> tuple[Tree, None]:
            one = gradient(trained, others, part[0], (part[1], drawn[1]))
            return jax.tree.map(jnp.add, total, one), None

        return jax.lax.scan(add, zero, (parts, keys))[0]

    def step(state: TrainState, batch: Batch, taught: Tree = None) -> tuple[TrainState, Scalars]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), RANDOM), state.step)
        rounds = None if iteration is None else iteration.draw(state.step)
        old, fixed = partition(state.params, info)
        compute = gradient if config.accumulation == 1 else accumulated
        share = jnp.sum(batch.targets >= 0) / jnp.sum(answered(batch.targets))
        nats, count, aim, grads = compute(old, (fixed, taught, share), batch, (key, rounds))
        grads = jax.tree.map(lambda g: g / count, grads)
        loss, norm = nats / count, optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        warned, before = state.monitor if config.spike else (state.monitor, monitors.begin()[1])
        if config.spike:
            good = good & ~monitors.spiked(before, loss, config.spike)
        direction, memory = chain.update(grads, state.optimizer, old)
        params = optimizer.apply(config, old, direction, state.step, trained_info)
        params, memory, seen = jax.tree.map(
            lambda after, before: jnp.where(good, after, before),
            (params, memory, monitors.remember(before, loss)),
            (old, state.optimizer, before),
        )
        change = optax.tree.norm(jax.tree.map(jnp.subtract, params, old)) / optax.tree.norm(old)
        warned, warning = monitors.warn(warned, change)
        bad = jnp.where(good, 0, state.bad + 1)
        skipped = state.skipped + jnp.where(good, 0, 1)
        scalars = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/learning_rate": config.learning_rate * optimizer.schedule(config, state.step),
            "train/skipped": skipped,
            "train/bad_in_a_row": bad,
            "stability/relative_update": change,
            "stability/warning": warning,
        }
        if teacher is not None:
            scalars["train/distance"] = aim / count
        if iteration is not None and iteration.mark is None:
            scalars["train/rounds"] = rounds
        watched = (warned, seen) if config.spike else warned
        new = {"params": combine(params, fixed), "optimizer": memory, "monitor": watched}
        new |= {"step": state.step + 1, "skipped": skipped, "bad": bad}
        after = dataclasses.replace(state, **new)
        if isinstance(after, Averaged):
            # The weighted mean of what updates have left, an earlier one's weight times `ema`: as
            # `optax.ema` without its bias, which is kept here too.
            share = (1 - config.ema) / -jnp.expm1(after.step * math.log(config.ema))
            mean = optax.incremental_update(params, after.average, share)
            after = dataclasses.replace(after, average=mean)
        return after, scalars

    return step


def make_eval_step(
    model: LanguageModel,
    config: Any,
    lengths: np.ndarray | None,
    settle: Apply | None = None,
    score: str = "exact",
) -> Callable[[Tree, Batch, Array], Scalars]:
    """(params, batch, real [B] bool) -> sums over a batch: nats and targets.

    Of text, whose tokens have `lengths`, also bytes; of problems and images, how many there are,
    and as `score` how many are solved; where `settle` (`Decoder.settle`, `rounds.marked`) replaces
    `model.apply`, rounds.
    """

    def step(params: Tree, batch: Batch, real: Array) -> Scalars:
        targets, dtype = batch.targets, jnp.dtype(config.compute_dtype)
        logits, rounds = predict(settle or model.apply, params, batch, dtype)
        nats, counts = nats_of(logits, targets)
        counts = counts & real[:, None]
        sums = {"nats": jnp.sum(nats * counts), "targets": jnp.sum(counts)}
        if settle is not None:
            sums["rounds"] = jnp.sum(rounds * counts)
        if lengths is None:
            right = jnp.sum(solved(logits, targets) & real)
            return sums | {"examples": jnp.sum(real), score: right}
        return sums | {"bytes": jnp.sum(jnp.asarray(lengths)[targets] * counts)}

    return step


def solved(logits: Array, targets: Array) -> Array:
    """Whether the likeliest symbol by logits [B, T, V] is right wherever one is asked: [B]."""
    return jnp.all((jnp.argmax(logits, axis=-1) == targets) | (targets < 0), axis=-1)
