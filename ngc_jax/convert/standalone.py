"""A run as a folder that needs no ngc_jax: for PyTorch, by one file; for any XLA, as StableHLO.

For: `export_torch`, of a decoder whose weights do not depend on what it reads, so that they are
formed once; `export_stablehlo`, of any model. Not for: published names (`pretrained.py`), or the
forward pass in PyTorch (`torch_model.py`, which is copied and never imported).
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from ngc_jax.convert.convert import formed_weights
from ngc_jax.convert.source import write_safetensors
from ngc_jax.core.attention import frequencies
from ngc_jax.data.batches import Batch
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.nn import stacks
from ngc_jax.runtime.fields import refusals
from ngc_jax.training.load import Trained

PLATFORMS = ("cpu", "cuda", "tpu")
ACTIVATIONS = ("none", "silu", "gelu", "relu")
CALLED = "forward.jax_export"


def export_torch(trained: Trained, folder: str) -> None:
    """Writes safetensors, config.json and model.py, whose `Model(folder)` has the same logits.

    Raises UserError, by name, for a model that model.py cannot be.
    """
    config, where = trained.config, "where --form='torch'"
    need = refusals(config)
    need(config.model.kind == "decoder", "model.kind", f"'decoder' {where}")
    shape, params = trained.decoder.shape, trained.decoder.expand_shared(trained.params)
    need(config.iteration.rounds != "marked", "iteration.rounds", f"another, as 'fixed', {where}")
    need(not shape.gates, "model.gates", f"False {where}")
    need(not shape.delays, "model.delays", f"'' {where}")
    wants = f"'none' {where}, since weights would depend on the signal"
    need(shape.message_activation is None, "model.message_activation", wants)
    able = ", ".join(map(repr, ACTIVATIONS))
    known = config.model.exchange_activation in ACTIVATIONS
    need(known, "model.exchange_activation", f"one of {able} {where}")
    need(shape.state_activation in (None, "tanh"), "model.state_activation", f"'tanh' {where}")

    tensors: dict[str, Any] = {"norm": params["norm"]["scale"], "embed": params["embed"]}
    tensors["frequency"] = frequencies(shape.head_size, shape.rope_base, shape.rope_scaling)
    if not shape.tied:
        tensors["unembed"] = params["unembed"].T
    if shape.core:
        tensors["keep"], tensors["drive"] = trained.decoder.scales(params)
    for number, stage in enumerate(stacks.all_stages(shape, params)):
        made: dict[str, Any] = formed_weights(shape, stage, number if shape.apart else 0)
        made |= {name: stage[name] for name in stage if name.endswith("_bias")}
        made |= {name: stage[name]["scale"] for name in stage if name.endswith("_norm")}
        tensors |= {f"stages.{number}.{n.replace(' ', '_')}": made[n] for n in made}
    told = {name: getattr(shape, name) for name in ("context", "causal", "vocab", "heads", "tied")}
    told |= {name: getattr(shape, name) for name in ("prelude", "core", "coda", "rounds", "route")}
    told |= {"norm_epsilon": shape.norm_epsilon, "state_activation": shape.state_activation}
    told |= {"activation": shape.exchange_activation, "boundary": trained.boundary}
    program = pathlib.Path(__file__).with_name("torch_model.py").read_bytes()
    _write(trained, folder, tensors, told, {"model.py": program})


def export_stablehlo(trained: Trained, folder: str) -> None:
    """Writes safetensors and the forward pass for PLATFORMS, as `jax.export` serialises it.

    It takes {name: array} and tokens [B, context] int32, any B, and gives logits [B, context, V].
    """
    flat, boundary = flatten_dict(trained.params, sep="."), trained.boundary
    context = trained.config.data.context

    def one(tensors: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        segments = None if boundary is None else jnp.cumsum(tokens == boundary, -1, jnp.int32)
        batch = jax.tree.map(lambda a: a[None], Batch(tokens, segments=segments))
        logits: jax.Array = trained.apply(unflatten_dict(tensors, sep="."), batch)[0]
        return logits[0]

    forward = jax.jit(jax.vmap(one, (None, 0)))  # so that no size in it is unknown
    (rows,) = export.symbolic_shape("batch")
    tokens = jax.ShapeDtypeStruct((rows, context), np.int32)
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}
    made = export.export(forward, platforms=PLATFORMS)(like, tokens)
    told = {"context": context, "vocab": trained.tokenizer.vocab, "platforms": PLATFORMS}
    _write(trained, folder, flat, told, {CALLED: bytes(made.serialize())})


def _write(trained: Trained, folder: str, tensors: Any, told: Any, more: dict[str, bytes]) -> None:
    tokenizer, data = trained.tokenizer, trained.config.data
    told = {"format": "ngc_jax", "step": trained.step, **told}
    told |= {"tokenizer": data.task or data.tokenizer, "mark": tokenizer.mark}
    text = "" if isinstance(tokenizer, Bytes) else tokenizer.serialised
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    write_safetensors(folder, arrays, told, text, more=more)
