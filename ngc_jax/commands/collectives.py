"""Bytes between devices: `python -m ngc_jax.collectives --config=defaults --mesh=group:4`.

For: compiling a config's update for a mesh of devices that need not be there, and counting the
bytes that its collectives move. Beside them stand those of the dense model of the same sizes under
ordinary tensor parallelism: heads and hidden neurons are split, each device has the whole stream.
Fields are set as in `launch.py`: --config.model.heads=8. Not for: time.

Bytes are those that one device sends under the usual ring algorithms. For n participants and b
bytes of result they are: all-reduce 2 b (n - 1) / n, all-gather and all-to-all b (n - 1) / n,
reduce-scatter b (n - 1), collective-permute b. They are read from the compiled program of a device;
a loop's body counts as often as it runs. They are divided by the tokens that the device helps to
compute: those of the batch / (mesh.data x mesh.fsdp). The program is XLA's for CPUs. For other
devices it may split an all-reduce into a reduce-scatter and an all-gather, of the same bytes.
"""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ngc_jax import count
from ngc_jax.commands.arguments import command
from ngc_jax.commands.config_flag import read_config
from ngc_jax.config import base, make_model, model_shape, validate
from ngc_jax.data.batches import token_batch
from ngc_jax.data.tokens import most_tokens, segmented
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.nn.settings import head_counts, kind_of
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.match_size import prepare
from ngc_jax.training.penalty import make_penalty
from ngc_jax.training.rounds import mark_of
from ngc_jax.training.step import abstract_state, losses, make_train_step

KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
# fields of a model that its dense counterpart has too
KEPT = (
    *("width", "hidden", "groups", "heads", "attend", "remat"),
    *("exchange_activation", "qk_norm", "qk_gain"),
)
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?P<type>.+?) (?P<name>[\w-]+)\((?P<rest>.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


def wire_bytes(hlo: str) -> dict[str, float]:
    """Bytes that a device sends in one run of a compiled program, by kind of collective.

    `hlo` is the program as text. Raises ValueError for a loop of unknown length, and where the
    participants of a collective are not named.
    """
    computations, entry = _computations(hlo)
    runs: Counter[str] = Counter({entry: 1})
    total = dict.fromkeys(KINDS, 0.0)
    for name in _callers_first(computations, entry):
        for line in computations[name]:
            found = _OPERATION.match(line)
            if found is None:
                continue
            kind = found["name"].removesuffix("-start")
            if kind in KINDS:
                total[kind] += runs[name] * _sent(kind, found["type"], found["rest"])
            for called in _called(line):
                runs[called] += runs[name] * _times(found["name"], line)
    return total


def compile_forward(config: ConfigDict, mesh: Mesh) -> Any:
    """The loss of one accumulated part of a batch, compiled for a mesh; nothing is allocated."""
    part = config.train.batch_size // config.train.accumulation
    model, like, batch = _abstract(config, mesh, part)
    dtype = jnp.dtype(config.train.compute_dtype)

    def forward(params: Any, batch: Any) -> Any:
        return jnp.sum(losses(model, params, batch, dtype)[0])

    return jax.jit(meshes.with_mesh(mesh, forward)).lower(like.params, batch).compile()


def compile_update(config: ConfigDict, mesh: Mesh) -> Any:
    """The train step, with `model.rounds` rounds, compiled for a mesh; nothing is allocated."""
    model, like, batch = _abstract(config, mesh, config.train.batch_size)
    penalty = make_penalty(model, config.stability) if isinstance(model, Decoder) else None
    step = make_train_step(model, config.train, penalty)
    places = (meshes.shardings(like), meshes.replicated(mesh))
    jitted = jax.jit(meshes.with_mesh(mesh, step), out_shardings=places, donate_argnums=0)
    return jitted.lower(like, batch).compile()


def bytes_of_state(config: ConfigDict, mesh: Mesh) -> int:
    """Bytes of parameters and optimizer that one device holds."""
    return meshes.bytes_per_device(_abstract(config, mesh, 1)[1])


def _abstract(config: ConfigDict, mesh: Mesh, windows: int) -> tuple[LanguageModel, Any, Any]:
    """The model, and the shapes and places of its state and of a batch."""
    model = make_model(config, most_tokens(config.data))
    segments = segmented(config.data, mark_of(config))
    batch = token_batch(windows, config.data.context, segments)
    return model, abstract_state(model, config.train, mesh), meshes.abstract_batch(mesh, batch)


def layers(config: ConfigDict) -> int:
    """Stages that a token passes through, or layers of a BDH."""
    staged = "prelude" in kind_of(config).reads
    return model_shape(config, 1).depth if staged else config.model.rounds


def dense_of(config: ConfigDict, width: int = 0) -> ConfigDict:
    """The ordinary decoder of as many layers and of the same sizes.

    `width`, if given, is its width, and hidden is in proportion. What a dense layer does not have
    is at its default. Heads are those of the config, or as near as the sizes allow.
    """
    dense, fresh, reads = config.copy_and_resolve_references(), base(), kind_of(config).reads
    dense.update({name: fresh[name] for name in ("model", "iteration", "rewire", "stability")})
    m, given = dense.model, config.model
    m.update({name: given[name] for name in KEPT if name in reads})
    m.rule, m.prelude, m.core, m.coda = "dense", layers(config), 0, 0
    if width:
        unit = m.groups if "groups" in reads else 2 * m.heads
        m.width, m.hidden = width, max(1, round(m.hidden * width / m.width / unit)) * unit
    if "groups" not in reads:
        m.groups = math.gcd(m.heads, m.width // 2)
    m.heads = min(head_counts(m), key=lambda h: abs(h - m.heads), default=m.heads)
    return dense


class Traffic(NamedTuple):
    """What one model sends and holds."""

    forward: dict[str, float]  # by kind of collective, bytes that a device sends for a token
    update: dict[str, float]
    layers: int
    state: int  # bytes of parameters and optimizer on a device
    peak: int  # bytes of memory of the compiled update on a device


def traffic(config: ConfigDict, mesh: Mesh) -> Traffic:
    """The traffic of a config that is compiled for a mesh."""
    forward, update = compile_forward(config, mesh), compile_update(config, mesh)
    tokens = config.train.batch_size * config.data.context / (mesh.size / mesh.shape["group"])
    part = tokens / config.train.accumulation
    return Traffic(
        {kind: sent / part for kind, sent in wire_bytes(forward.as_text()).items()},
        {kind: sent / tokens for kind, sent in wire_bytes(update.as_text()).items()},
        layers(config),
        bytes_of_state(config, mesh),
        count.peak_memory(update),
    )


def table(model: Traffic, dense: Traffic) -> str:
    """The two side by side; a ratio says how many times as much the dense model sends."""
    both = ("dense", "ratio")
    rows = [["bytes sent per token and device", "forward", *both, "update", *both]]

    def row(name: str, *pairs: tuple[float, float]) -> None:
        rows.append([name])
        for ours, theirs in pairs:
            ratio = f"{theirs / ours:.2f}" if ours else ""
            rows[-1] += [f"{ours:,.1f}", f"{theirs:,.1f}", ratio]

    for kind in KINDS:
        pairs = (
            (model.forward[kind], dense.forward[kind]),
            (model.update[kind], dense.update[kind]),
        )
        if any(map(any, pairs)):
            row(kind, *pairs)
    forward = (sum(model.forward.values()), sum(dense.forward.values()))
    update = (sum(model.update.values()), sum(dense.update.values()))
    row("in all", forward, update)
    row("in all, per layer", *((a / model.layers, b / dense.layers) for a, b in (forward, update)))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([c[0].ljust(first), *map(str.rjust, c[1:], others)]) for c in rows]
    for what, ours, theirs in (
        ("parameters and optimizer", model.state, dense.state),
        ("the update", model.peak, dense.peak),
    ):
        sizes = f"{ours / 2**20:,.1f} MiB; dense {theirs / 2**20:,.1f} MiB"
        lines.append(f"memory per device, {what}: {sizes}")
    return "\n".join(lines)


def read_mesh(text: str) -> dict[str, int]:
    """{"data": 1, "fsdp": 2, "group": 4} from "fsdp:2,group:4". Raises UserError."""
    sizes = dict.fromkeys(meshes.MESH_AXES, 1)
    for item in text.split(","):
        name, _, size = item.partition(":")
        if name not in sizes or not size.isdecimal() or int(size) < 1:
            wants = "some of data:N,fsdp:N,group:N, for instance group:8"
            raise UserError(f"--mesh={text}: must be {wants}")
        sizes[name] = int(size)
    return sizes


def main() -> None:
    """Prints the table that the command line asks for."""
    own = flags.FlagValues()
    flags.DEFINE_string("mesh", "group:4", "Axes and their sizes: fsdp:2,group:4.", flag_values=own)
    flags.DEFINE_integer("dense_width", 0, "Of the dense model; 0 = the same.", flag_values=own)
    config, _ = read_config(__doc__ or "", own)
    sizes = read_mesh(own.mesh)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))
    config = config.copy_and_resolve_references()
    config.mesh.update(sizes)
    prepare(config)
    dense = dense_of(config, own.dense_width)
    try:
        validate(dense)
    except UserError as error:
        raise UserError(f"the dense model to compare with: {error}") from error
    print(table(*(traffic(model, meshes.make_mesh(model.mesh)) for model in (config, dense))))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a program, by name, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        begun = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if begun and not line.startswith(" "):
            lines = computations.setdefault(begun[2], [])
            entry = begun[2] if begun[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _called(line: str) -> list[str]:
    branches = [
        name.strip().lstrip("%") for found in _BRANCHES.findall(line) for name in found.split(",")
    ]
    return _CALLED.findall(line) + branches


def _callers_first(computations: dict[str, list[str]], entry: str) -> list[str]:
    """Computations in an order in which each comes after all that call it."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in done:
            for line in computations[name]:
                for called in _called(line):
                    visit(called)
            done[name] = None

    visit(entry)
    return list(reversed(done))


def _times(operation: str, line: str) -> int:
    """How often an operation runs the computations that it calls."""
    if operation != "while":
        return 1
    trips = _TRIPS.search(line)
    if trips is None:
        raise ValueError(f"a loop of unknown length: {line.strip()[:200]}")
    return int(trips[1])


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
    """Devices that take part together, from replica_groups: {{0,1},{2,3}}, [2,2]<=[4],
    mesh['a'=2,'b'=2] {'b'}.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    raise ValueError(f"a collective that does not name its participants: {rest[:200]}")


if __name__ == "__main__":
    command(main)
