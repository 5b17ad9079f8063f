"""What a model learns of a teacher: how far its output, and its stream after each stage, are off.

For: the distance of outputs, and a pass of both models side by side, whose gradients may stay
inside a stage. Not for: the update (`step.py`). Axes: B examples, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ngc_jax.data.batches import Batch, answered
from ngc_jax.nn import stacks
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import Params

Array = jax.Array
Tree = Any
Run = Callable[[Tree, Array], tuple[Array, Any]]  # of a stage: how far off, the streams after


def distance(logits: Array, taught: Array, temperature: float) -> Array:
    """Nats from a teacher's distribution to the model's, of each target: KL, by logits [..., V].

    Both are divided by the temperature, and the result is times its square (arXiv 1503.02531).
    """
    said, heard = (jax.nn.log_softmax(given / temperature) for given in (taught, logits))
    return temperature**2 * jnp.sum(jnp.exp(said) * (said - heard), axis=-1)


def error(x: Array, taught: Array) -> Array:
    """Squared distance of a token's stream [..., D] from the teacher's, over the size of that.

    Each token by itself: the first one of a window may be a thousand times as large as others.
    """
    x, taught = x.astype(jnp.float32), taught.astype(jnp.float32)
    energy = jnp.sum(jnp.square(taught), axis=-1)
    return jnp.sum(jnp.square(x - taught), axis=-1) / jnp.maximum(energy, 1e-30)


def side_by_side(
    model: Decoder, teacher: Decoder, alone: bool, both: tuple[Params, Params], batch: Batch
) -> tuple[Array, tuple[Array, Array]]:
    """Logits [B, T, V] of a model, those of its teacher, and how far the model's stream is off.

    both: their parameters, of as many stages and without a loop. The last is `error` after a stage,
    summed over `answered` tokens, the mean over stages. `alone`: it has the only gradient, which a
    stage finds for itself: the stream before it is given, and nothing of it is kept afterwards.
    """
    params, taught = model.expand_shared(both[0]), teacher.expand_shared(both[1])
    ends = jax.lax.stop_gradient(params) if alone else params
    streams = model.embed(ends, batch), teacher.embed(taught, batch)
    where, counts = (batch.segments, jnp.arange(streams[0].shape[1])), answered(batch.targets)

    def body(streams: tuple[Array, Array], layers: tuple[Tree, Tree], number: int = 0) -> Any:
        told, _ = teacher.run_stage(number, layers[1], streams[1], where, None)

        def run(weights: Tree, x: Array) -> tuple[Array, tuple[Array, Array]]:
            after, _ = model.run_stage(number, weights, x, where, None)
            return jnp.sum(error(after, told) * counts), (after, told)

        passed: Run = at_once(run) if alone else jax.checkpoint(run, policy=model.kept)
        off, streams = passed(layers[0], streams[0])
        return streams, off

    models = (model, params), (teacher, taught)
    if model.shape.apart or teacher.shape.apart:
        offs = []
        apart = (stacks.all_stages(one.shape, own) for one, own in models)
        for number, layers in enumerate(zip(*apart, strict=True)):
            streams, off = body(streams, layers, number)
            offs.append(off)
    else:
        stacked = tuple(stacks.join_stages(one.shape, own)[0] for one, own in models)
        streams, offs = jax.lax.scan(body, streams, stacked)
    logits, said = model.unembed(ends, streams[0]), teacher.unembed(taught, streams[1])
    return logits, (said, jnp.mean(jnp.asarray(offs)))


def at_once(run: Run) -> Run:
    """`run`, a loss and streams of (weights, x), whose gradient by the weights is found with it.

    The way back then needs that gradient alone. There is no other one.
    """

    def found(weights: Tree, x: Array) -> tuple[Array, Any]:
        graded = jax.value_and_grad(run, has_aux=True, allow_int=True)
        (loss, streams), grads = graded(*jax.lax.stop_gradient((weights, x)))
        pairs = zip(*map(jax.tree.leaves, (weights, grads)), strict=True)
        floats = [pair for pair in pairs if pair[1].dtype != jax.dtypes.float0]
        # Its gradient by the weights is `grads`.
        along = sum(jnp.vdot(*(a.astype(jnp.float32) for a in pair)) for pair in floats)
        still = jax.lax.stop_gradient(along)
        # The next stage waits for the gradient: else a compiler may order all stages before all
        # gradients, on some devices across an `optimization_barrier` too.
        streams = jax.tree.map(lambda x: jnp.where(jnp.isfinite(still), x, jnp.nan), streams)
        return loss + (along - still), streams

    return found
