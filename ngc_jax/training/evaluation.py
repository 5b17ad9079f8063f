"""Held-out loss of a model. As a command: `python -m ngc_jax.evaluate --workdir=DIR`, over all that
is held out.

`--rounds=8` runs the loop for another number of rounds than the config says; `--rounds=settled`
until a round moves no token's state by `--tolerance` of its length, for `--cap` rounds at most, and
says how many rounds that were.

For: turning held-out batches into nats per target, bits per byte or problems solved, and stability
measures. Not for: what one batch is worth (`steps.py`), what is measured of stability
(`stability/watch.py`), or tests by difficulty (`solve.py`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ngc_jax.data.batches import Examples, held_out_batches
from ngc_jax.data.tokens import Data, load_data
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import Path
from ngc_jax.training.rounds import Apply, marked
from ngc_jax.training.stability_metrics import make_watch
from ngc_jax.training.step import make_eval_step
from ngc_jax.training.workdir import Trained

CAP = 64  # rounds at most where the state says how many


def compile_eval(
    model: LanguageModel, config: Any, mesh: Mesh, data: Data, settle: Apply | None = None
) -> Callable[..., Any]:
    """The jitted evaluation of one batch for a config, on a mesh; `settle` stands for
    `model.apply`, if it is given.
    """
    step = make_eval_step(model, config.train, data.tokenizer.lengths, data.boundary, settle)
    return jax.jit(meshes.with_mesh(mesh, step), out_shardings=meshes.replicated(mesh))


def held_out(
    step: Callable[..., Any],
    params: Any,
    mesh: Mesh,
    examples: Examples,
    batch_size: int,
    limit: int = 0,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """{"loss": nats per target} on `limit` examples (0 = all); of text "bits_per_byte", of problems
    "exact"; and where the loop runs until it settles "rounds" per target.

    Bits per byte divide by the bytes of the text, whatever the tokens are, and so compare over
    tokenizers. Exact is the share of problems with every answer right. `between` is called before
    each batch, and may raise to abandon all.
    """
    batches = held_out_batches(
        examples, batch_size=batch_size, limit=limit, rows=meshes.local_batch_rows(mesh, batch_size)
    )
    total: dict[str, float] = {}
    for batch, real in batches:
        between()
        sums = step(params, meshes.put_batch(mesh, batch), meshes.put_batch(mesh, real))
        for name, value in jax.device_get(sums).items():
            total[name] = total.get(name, 0.0) + float(value)
    means = {"loss": total["nats"] / total["targets"]}
    if "problems" in total:
        means["exact"] = total["solved"] / total["problems"]
    else:
        means["bits_per_byte"] = total["nats"] / math.log(2) / total["bytes"]
    return means | ({"rounds": total["rounds"] / total["targets"]} if "rounds" in total else {})


def compile_watch(
    model: Decoder, config: Any, mesh: Mesh, data: Data
) -> Callable[[Any], dict[str, float]]:
    """The stability measures of `config.stability` on held-out data: params -> {"stability/...":
    value}.
    """
    parts = mesh.size // mesh.shape["group"]
    wanted = -(-config.stability.tokens // (config.data.context * parts)) * parts
    batches = held_out_batches(
        data.validation, batch_size=wanted, limit=wanted, rows=meshes.local_batch_rows(mesh, wanted)
    )
    tokens = meshes.put_batch(mesh, next(iter(batches))[0][:, 0])
    # It runs seldom: at optimization level 1 it compiles several times faster.
    options = {"xla_backend_optimization_level": 1}
    watch = meshes.with_mesh(mesh, make_watch(model, config.stability))
    step = jax.jit(watch, out_shardings=meshes.replicated(mesh), compiler_options=options)
    return lambda params: {
        name: float(value) for name, value in jax.device_get(step(params, tokens)).items()
    }


def data_of(trained: Trained, workdir: Path) -> Data:
    """What a run was trained on, and what was held out. Raises UserError where this is something
    else by now.
    """
    data = load_data(trained.config.data)
    if trained.meta["data"] != data.fingerprint:
        raise UserError(
            f"this is not what {workdir} was trained on: fingerprint {data.fingerprint[:16]}, trained on "
            f"{trained.meta['data'][:16]} (another Python version, or changed files at data.path, or another ngc_jax)"
        )
    return data


def as_trained(trained: Trained) -> tuple[LanguageModel, Apply | None]:
    """What `run_for` gives for the rounds that training had, or that an example's marks ask for."""
    decoder = trained.model if isinstance(trained.model, Decoder) else None
    return trained.model, marked(decoder, trained.config)
