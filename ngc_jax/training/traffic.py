"""Bytes between devices, counted in the compiled programs of a config; and those of a dense model.

For: the bytes that the collectives of a config's update, compiled for devices that need not be
there, move per token that a device helps to compute: those of the batch / (mesh.data x mesh.fsdp).
Not for: time, or other programs than XLA's for CPUs; or the command (`commands/collectives.py`).
"""

import functools
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ngc_jax import count
from ngc_jax.config import base, make_model, model_shape
from ngc_jax.data.batches import abstract_batch
from ngc_jax.data.tokens import most_tokens, segmented
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.nn.settings import head_counts, kind_of, tokens_of
from ngc_jax.report.blocks import aligned
from ngc_jax.runtime.metrics import amount
from ngc_jax.training import rounds, stability_metrics, step

KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
# fields of a model that its dense counterpart has too
KEPT = ["width", "hidden", "groups", "heads", "attend", "remat", "exchange_activation"]
KEPT += ["qk_norm", "qk_gain"]
HEAD = ["bytes sent per token and device", "forward", "dense", "ratio", "update", "dense", "ratio"]
Costs = tuple[dict[str, list[float]], dict[str, int]]  # of a model: see `costs`
_COMPUTATION = re.compile(r"^(?:(ENTRY) )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.+?) ([\w-]+)\((.*)$", re.MULTILINE)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|(?:true|false)_computation|branch_computations)=(\{[^}]*\}|[^\s,]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


def wire_bytes(hlo: str) -> dict[str, float]:
    """Bytes that a device sends in one run of a compiled program, by kind of collective.

    `hlo` is the program as text; a loop's body counts as often as it runs. In the usual ring
    algorithms, for n participants and b bytes of result: all-reduce 2 b (n - 1) / n, all-gather and
    all-to-all b (n - 1) / n, reduce-scatter b (n - 1), collective-permute b. Raises ValueError for
    a loop of unknown length, and where the participants are not named.
    """
    computations = {entry or name: body for entry, name, body in _COMPUTATION.findall(hlo)}

    @functools.cache
    def sent(computation: str) -> dict[str, float]:
        total = dict.fromkeys(KINDS, 0.0)
        for operation in _OPERATION.finditer(computations[computation]):
            result, name, rest = operation.groups()
            kind, trips = name.removesuffix("-start"), _TRIPS.search(rest)
            if kind in KINDS:
                total[kind] += _sent(kind, result, rest)
            if name == "while" and trips is None:
                raise ValueError(f"a loop of unknown length: {operation[0].strip()[:200]}")
            times = int(trips[1]) if name == "while" and trips else 1
            for called in re.findall(r"[\w.-]+", " ".join(_CALLED.findall(rest))):
                for kind, size in sent(called).items():
                    total[kind] += times * size
        return total

    return sent("ENTRY")


def compile_forward(config: ConfigDict, mesh: Mesh) -> Any:
    """The loss of one accumulated part of a batch, compiled for a mesh; nothing is allocated."""
    train, dtype = config.train, jnp.dtype(config.train.compute_dtype)
    model, like, batch = _abstract(config, mesh, train.batch_size // train.accumulation)

    def forward(params: Any, batch: Any) -> Any:
        return jnp.sum(step.losses(model, params, batch, dtype)[0])

    return jax.jit(meshes.with_mesh(mesh, forward)).lower(like.params, batch).compile()


def compile_update(config: ConfigDict, mesh: Mesh) -> Any:
    """The train step, with `model.rounds` rounds, compiled for a mesh; nothing is allocated."""
    model, like, batch = _abstract(config, mesh, config.train.batch_size)
    penalty, places = None, (meshes.shardings(like), meshes.replicated(mesh))
    if isinstance(model, Decoder):
        penalty = stability_metrics.make_penalty(model, config.stability)
    update = step.make_train_step(model, config.train, penalty)
    jitted = jax.jit(meshes.with_mesh(mesh, update), out_shardings=places, donate_argnums=0)
    return jitted.lower(like, batch).compile()


def _abstract(config: ConfigDict, mesh: Mesh, windows: int) -> tuple[LanguageModel, Any, Any]:
    """The model, and the shapes and places of its state and of a batch."""
    model = make_model(config, most_tokens(config.data))
    data, mark = config.data, rounds.mark_of(config)
    batch = abstract_batch(data, windows, segmented(data, mark))
    return model, step.abstract_state(model, config.train, mesh), meshes.abstract_batch(mesh, batch)


def layers(config: ConfigDict) -> int:
    """Stages that a token passes through, or layers of a BDH."""
    staged = "prelude" in kind_of(config).reads
    return model_shape(config, 1).depth if staged else config.model.rounds


def dense_of(config: ConfigDict, width: int = 0) -> ConfigDict:
    """The ordinary decoder of the same sizes, or of `width`; heads as near as sizes allow."""
    dense, fresh, reads = config.copy_and_resolve_references(), base(), kind_of(config).reads
    dense.update({name: fresh[name] for name in ("model", "iteration", "rewire", "stability")})
    m, given = dense.model, config.model
    m.update({name: given[name] for name in KEPT if name in reads})
    if kind_of(config).data == "images":
        m.kind, m.patch, m.readout = given.kind, given.patch, given.readout
    m.rule, m.prelude, m.core, m.coda = "dense", layers(config), 0, 0
    if width:
        unit = m.groups if "groups" in reads else 2 * m.heads
        m.width, m.hidden = width, max(1, round(m.hidden * width / m.width / unit)) * unit
    if "groups" not in reads:
        m.groups = math.gcd(m.heads, m.width // 2)
    m.heads = min(head_counts(m), key=lambda h: abs(h - m.heads), default=m.heads)
    return dense


def costs(config: ConfigDict, mesh: Mesh) -> Costs:
    """Bytes that a device sends a token, [in a forward pass, in an update]; bytes that it holds."""
    forward, update = compile_forward(config, mesh), compile_update(config, mesh)
    tokens = config.train.batch_size * tokens_of(config) / (mesh.size / mesh.shape["group"])
    part, whole = wire_bytes(forward.as_text()), wire_bytes(update.as_text())
    of_part = tokens / config.train.accumulation
    sent = {kind: [part[kind] / of_part, whole[kind] / tokens] for kind in KINDS}
    sent["in all"] = [sum(column) for column in zip(*sent.values(), strict=True)]
    sent["in all, per layer"] = [total / layers(config) for total in sent["in all"]]
    state = meshes.bytes_per_device(_abstract(config, mesh, 1)[1])
    return sent, {"parameters and optimizer": state, "the update": count.peak_memory(update)}


def table(model: Costs, dense: Costs) -> str:
    """The two side by side; a ratio says how many times as much the dense model sends."""
    rows = [HEAD]
    for name, ours in model[0].items():
        both = list(zip(ours, dense[0][name], strict=True))
        if name not in KINDS or any(map(any, both)):
            cells = [(f"{a:,.1f}", f"{b:,.1f}", f"{b / a:.2f}" if a else "") for a, b in both]
            rows.append([name, *itertools.chain(*cells)])
    sizes = {
        what: (amount(size, "B"), amount(dense[1][what], "B")) for what, size in model[1].items()
    }
    held = [f"{what}: {here}; dense {there}" for what, (here, there) in sizes.items()]
    return "\n".join([aligned(rows), *(f"memory per device, {line}" for line in held)])


def _sent(kind: str, result: str, rest: str) -> float:
    size = sum(
        math.prod(map(int, filter(None, shape.split(",")))) * (int(bits) / 8 if bits else 1)
        for _, bits, shape in _ARRAY.findall(re.sub(r"/\*.*?\*/|\{[^}]*\}", "", result))
    )
    n = 2 if kind == "collective-permute" else _participants(rest)
    if n == 1:
        return 0.0
    factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    return size * factor.get(kind, (n - 1) / n)


def _participants(rest: str) -> int:
    """How many take part: of {{0,1},{2,3}}, [2,2]<=[4], or mesh['a'=2,'b'=2] {'b'}."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    raise ValueError(f"a collective that does not name its participants: {rest[:200]}")
