"""What each dense matrix of a model does in use: Grams of its inputs and of its output gradients.

For: sums over the tokens of a text, kept and continued; `problems`, which `methods.py` compresses.
Not for: what is made of them (`convert.py`). The gradient is that of the summed loss of a window
whose labels are drawn from the model, so that its Gram is the Fisher information's factor (K-FAC,
arXiv 1503.05671). Axes: L stages, N tokens of a batch, n inputs and m outputs of a matrix.
"""

import json
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ngc_jax.analysis.probes import run_stage
from ngc_jax.convert.methods import Problem
from ngc_jax.data.batches import Batch, answered
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn import sharing, stacks
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import Params
from ngc_jax.nn.synapse import Heard, intercept
from ngc_jax.runtime import files
from ngc_jax.runtime.checkpoint import digest
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.begin import put_params
from ngc_jax.training.load import Trained
from ngc_jax.training.step import cast

Array = jax.Array
# "inputs" [L, n, n] and "magnitudes" [L, n] by synapse, "grads" [L, m, m] and "fisher" [L, m] by
# member of one.
Sums = dict[str, dict[str, Any]]
SAVED_EVERY = 8  # batches
FILE = "calibration.npz"


def calibrate(
    trained: Trained,
    batch: Batch,
    home: files.Path,
    rows: int = 1,
    say: Any = print,
    mesh: Mesh | None = None,
) -> Sums:
    """The means over the tokens of a batch [windows, T], continued from what `home` keeps of it.

    `rows` are done at a time, shared by the devices of a mesh; they compute in
    `train.compute_dtype` and sum in float32. Labels are drawn where the batch has targets. What was
    begun with other rows is begun anew, since their labels differ; another mesh of as many rows
    goes on with it, and differs by rounding. Raises UserError for a model with a loop or of another
    rule than dense, and where `home` is a link.
    """
    mesh = mesh or meshes.single_device()
    if os.path.islink(home):
        raise UserError(f"{home} is a link, which is not followed: give the place itself")
    model, params, count = _dense(trained), put_params(mesh, trained), len(batch.inputs)
    known = {"params": params, "batch": batch}
    dtype, whole = trained.config.train.compute_dtype, meshes.replicated(mesh)
    own = {} if dtype == "float32" else {"dtype": dtype}
    mark = json.dumps({"rows": rows, "sha256": digest(known)} | own)
    kept = home / FILE
    done, sums = _read(kept, mark)
    program = meshes.with_mesh(mesh, partial(_batch_sums, model, dtype))
    sum_batch = jax.jit(program, out_shardings=whole)
    key = jax.random.key(0)
    for first in range(done, count, rows):
        part = jax.tree.map(lambda a, at=first: a[at : at + rows], batch)
        shared = len(part.inputs) % meshes.num_shards("window", mesh) == 0
        part = jax.device_put(part, meshes.sharding(mesh, "window") if shared else whole)
        found = jax.device_get(sum_batch(params, part, jax.random.fold_in(key, first)))
        if sums is None:
            sums = jax.tree.map(np.array, found)
        else:
            for kind, of in found.items():
                for name, array in of.items():
                    sums[kind][name] += array
        done = first + len(part.inputs)
        say(f"calibrated on {done} of {count} windows", flush=True)
        if done == count or (first // rows) % SAVED_EVERY == SAVED_EVERY - 1:
            _write(kept, mark, done, sums)
    return jax.tree.map(lambda array: array / batch.inputs.size, sums or {})


def problems(model: Decoder, params: Params, means: Sums) -> Iterator[dict[str, Problem]]:
    """What is known of the matrices of a stage, by member of a synapse, stage after stage."""
    stages = stacks.stages_of(stacks.join_stages(model.shape, params)[0])
    for number, stage in enumerate(jax.device_get(stages)):
        of = {}
        for synapse, members in model.shape.fans().items():
            for place, member in enumerate(members):
                weight = stage[synapse]["dense_block"]["weight"][place, 0]
                at = {"inputs": synapse, "magnitudes": synapse, "grads": member, "fisher": member}
                told = {k: means[k][name][number] for k, name in at.items() if k in means}
                of[member] = Problem(weight, **told)
        yield of


def _dense(trained: Trained) -> Decoder:
    model = trained.decoder
    s = model.shape
    if s.rule != "dense" or s.core or s.delays:
        what = f"model.rule={s.rule!r} with model.core={s.core}, model.delays={s.delays!r}"
        raise UserError(f"{what}: only a dense model without a loop or delays is converted")
    return model


def run_tapped(
    model: Decoder, weights: Params, x: Array, segments: Any
) -> tuple[Array, dict[str, Array]]:
    """The stream [B, T, D] after a stage, and what each of its synapses reads."""
    after, (read, _) = _stage(model, Batch(x, segments=segments), None, x, weights)
    return after, read


def _batch_sums(model: Decoder, dtype: str, params: Params, batch: Batch, key: Array) -> Sums:
    """The sums of a batch: one pass forward and one back through probes of zeros at outputs."""
    params = cast(params, dtype)
    shape, (stack, _) = model.shape, stacks.join_stages(model.shape, params)
    x = model.embed(params, batch)
    blank = jax.eval_shape(partial(_stage, model, batch, None), x, sharing.take(stack, 0))
    probes = {
        name: jnp.zeros((shape.depth, *one.shape), one.dtype) for name, one in blank[1][1].items()
    }

    def loss(probes: dict[str, Array]) -> Any:
        def body(x: Array, given: Any) -> Any:
            x, (read, _) = _stage(model, batch, given[1], x, given[0])
            return x, read

        after, read = jax.lax.scan(jax.checkpoint(body), x, (stack, probes))
        logits = model.unembed(params, after)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)
        return -jnp.sum(chosen[..., 0] * (batch.targets >= 0)), read

    grads, read = jax.grad(loss, has_aux=True)(probes)
    sums: Sums = {kind: {} for kind in ("inputs", "magnitudes", "grads", "fisher")}
    counts = answered(batch.targets).reshape(-1, 1)
    for synapse, members in shape.fans().items():
        x = read[synapse].reshape(shape.depth, -1, read[synapse].shape[-1]) * counts
        sums["inputs"][synapse] = _grams(x)
        sums["magnitudes"][synapse] = jnp.sum(abs(x), axis=1, dtype=jnp.float32)
        square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)
        for place, member in enumerate(members):
            g = grads[synapse][..., place, :].reshape(*x.shape[:2], -1)
            sums["grads"][member] = _grams(g)
            squares = jnp.square(g.astype(jnp.float32))
            sums["fisher"][member] = jnp.einsum("lbm,lb->lm", squares, square)
    return sums


def _grams(x: Array) -> Array:
    """The sums over tokens of x x^T: x [L, N, n] -> [L, n, n]."""
    return jax.lax.map(lambda one: jnp.matmul(one.T, one, preferred_element_type=jnp.float32), x)


def _stage(model: Decoder, batch: Batch, probes: Any, x: Array, weights: Params) -> Any:
    """A stage with probes added to the outputs of its synapses: the stream, inputs, outputs."""
    read: dict[str, Array] = {}
    heard: dict[str, Array] = {}

    def probe(one: Heard) -> Array:
        name = str(one.synapse.name)
        read[name], heard[name] = one.x, one.y if probes is None else one.y + probes[name]
        return heard[name]

    with intercept(probe):
        after, _ = run_stage(model.shape, 0, weights, batch, x)
    return after, (read, heard)


def _read(kept: files.Path, mark: str) -> tuple[int, Sums | None]:
    try:
        with (
            open(kept, "rb", opener=files.no_follow) as file,
            np.load(file, allow_pickle=False) as held,
        ):
            if str(held["mark"]) != mark:
                return 0, None
            sums: Sums = {}
            for name in held.files:
                kind, _, of = name.partition("/")
                if of:
                    sums.setdefault(kind, {})[of] = held[name]
            return int(held["done"]), sums
    except Exception:  # whatever is wrong with it, it is made anew
        return 0, None


def _write(kept: files.Path, mark: str, done: int, sums: Sums) -> None:
    flat = {f"{kind}/{name}": a for kind, of in sums.items() for name, a in of.items()}
    files.write_durably(kept, lambda file: np.savez(file, mark=mark, done=done, **flat))
