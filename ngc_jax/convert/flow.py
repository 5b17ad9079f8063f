"""Methods that see what compression has done before: one stage after another.

For: `shifted_problems`, which gives each matrix the Grams of the inputs that compressed stages
before it make, beside those of the dense model (arXiv 2501.19090, 2604.02119). Within a stage all
matrices are dense while they are measured. Not for: the methods (`methods.py`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ngc_jax.convert.calibrate import Sums, problems, run_tapped
from ngc_jax.convert.methods import Problem
from ngc_jax.data.batches import Batch, answered
from ngc_jax.nn import stacks
from ngc_jax.nn.model import Params
from ngc_jax.nn.sharing import take
from ngc_jax.training.load import Trained

Array = jax.Array
Stage = dict[str, Problem]  # by member
Replace = Callable[[Params], None]  # with the stage's compressed parameters


def shifted_problems(
    trained: Trained, means: Sums, batch: Batch
) -> Iterator[tuple[Stage, Params, Replace]]:
    """Of each stage what is known of its matrices, its parameters, and what takes the new ones.

    `batch` is that of the means. The new parameters must be given before the next stage is asked
    for.
    """
    model = trained.decoder
    stack, _ = stacks.join_stages(model.shape, trained.params)
    tokens, segments, counts = batch.inputs, batch.segments, answered(jnp.asarray(batch.targets))
    dense = shifted = model.embed(trained.params, batch)

    @jax.jit
    def measure(weights: Params, dense: Array, shifted: Array) -> tuple[Array, dict[str, Params]]:
        """The dense stream after a stage, and sums over all tokens by synapse."""

        def one(sums: Params, row: Any) -> tuple[Params, Array]:
            row = jax.tree.map(lambda a: a[None], row)
            (after, x), (_, y) = (run_tapped(model, weights, row[i], row[2]) for i in (0, 1))
            of = {name: y[name][0] * row[3].T for name in y}
            grams = {n: {"shifted": of[n].T @ y[n][0], "cross": x[n][0].T @ of[n]} for n in of}
            return jax.tree.map(jnp.add, sums, grams), after[0]

        empty = {
            name: dict.fromkeys(("shifted", "cross"), jnp.zeros((size, size)))
            for name, size in sizes.items()
        }
        sums, after = jax.lax.scan(one, empty, (dense, shifted, segments, counts))
        return after, sums

    @jax.jit
    def go_on(weights: Params, stream: Array) -> Array:
        def one(row: Any) -> Array:
            return run_tapped(model, weights, *jax.tree.map(lambda a: a[None], row))[0][0]

        return jax.lax.map(one, (stream, segments))

    fans = model.shape.fans()
    sizes = {name: model.shape.sizes[members[0]][1] for name, members in fans.items()}
    for number, known in enumerate(problems(model, trained.params, means)):
        weights = take(stack, number)
        dense, sums = measure(weights, dense, shifted)
        told = jax.tree.map(lambda total: total / tokens.size, jax.device_get(sums))
        synapse = {member: name for name, members in fans.items() for member in members}
        stage = {m: dataclasses.replace(p, **told[synapse[m]]) for m, p in known.items()}
        new: list[Params] = []
        yield stage, weights, new.append
        shifted = go_on(new[-1], shifted)
