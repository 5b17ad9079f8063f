"""What published names mean: the tensors of the Llama family, and ours of converted models.

For: a table of names, read both ways (`read_params`, `tensors_of`): each parameter is filled once,
and each tensor used once. Not for: fields (`config_json.py`), or files (`source.py`).
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ngc_jax.convert.source import Lazy, Source, few, unwritten
from ngc_jax.nn.ranks import Joined
from ngc_jax.nn.sharing import FANS
from ngc_jax.runtime.errors import UserError


class Row(NamedTuple):
    """A parameter, and the tensors that it holds; {l} is the layer, the parameter's first axis."""

    ours: str
    theirs: tuple[str, ...]
    how: str = "same"  # or "transposed"; "stacked": [layer, tensor, 1, out, in]; "own": [layer, 1]


_LAYER = "model.layers.{l}."
_ATTEND, _MLP = f"{_LAYER}self_attn.", f"{_LAYER}mlp."
_Q, _K, _V = (f"{_ATTEND}{name}_proj.weight" for name in "qkv")
# Of a parameter's several rows, such as those of queries, a model has one
NAMES = [
    Row("embed", ("model.embed_tokens.weight",)),
    Row("unembed", ("lm_head.weight",), "transposed"),
    Row("norm/scale", ("model.norm.weight",)),
    Row("prelude/attention_norm/scale", (f"{_LAYER}input_layernorm.weight",)),
    Row("prelude/query_key_value/dense_block/weight", (_Q, _K, _V), "stacked"),
    Row("prelude/query/dense_block/weight", (_Q,), "stacked"),
    Row("prelude/key_value/dense_block/weight", (_K, _V), "stacked"),
    Row("prelude/query_bias", (f"{_ATTEND}q_proj.bias",)),
    Row("prelude/key_bias", (f"{_ATTEND}k_proj.bias",)),
    Row("prelude/value_bias", (f"{_ATTEND}v_proj.bias",)),
    Row("prelude/query_norm/scale", (f"{_ATTEND}q_norm.weight",)),
    Row("prelude/key_norm/scale", (f"{_ATTEND}k_norm.weight",)),
    Row("prelude/attention_out/dense_block/weight", (f"{_ATTEND}o_proj.weight",), "stacked"),
    Row("prelude/exchange_norm/scale", (f"{_LAYER}post_attention_layernorm.weight",)),
    Row(
        "prelude/gate_up/dense_block/weight",
        (f"{_MLP}gate_proj.weight", f"{_MLP}up_proj.weight"),
        "stacked",
    ),
    Row("prelude/down/dense_block/weight", (f"{_MLP}down_proj.weight",), "stacked"),
]
MEMBERS = {"query": "q", "key": "k", "value": "v", "attention out": "o"}
MEMBERS |= {name: name for name in ("gate", "up", "down")}
# Of a synapse of a converted model: its parameters, and their names; see docs/pretrained.md
PARTS = {"inter_broadcast/pre": "pre", "inter_broadcast/post": "post", "inter_leaders/pre": "lead"}
PARTS |= {"inter_leaders/post/state": "rest", "inter_leaders/post/gain": "gain"}
PARTS |= {"inter_leaders/post/order": "order"}


def _factored() -> Iterator[Row]:
    """The rows of converted models: a joined synapse, such as key+value, has one set of states."""
    for synapse, fan in FANS.items():
        home = _MLP if synapse in ("gate_up", "down") else _ATTEND
        for count in range(1, len(fan) + 1):
            for members in itertools.permutations(fan, count):
                ours = f"prelude/{Joined(members, 0).name}"
                theirs = home + "+".join(f"{MEMBERS[member]}_proj" for member in members)
                yield Row(f"{ours}/dense_block/weight", (f"{theirs}.weight",), "stacked")
                for part, name in PARTS.items():
                    yield Row(f"{ours}/{part}", (f"{theirs}.{name}",), "own")


HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
BUFFERS = "rotary_emb.inv_freq"  # in old files: what rope_theta says too


def _places(flat: Mapping[tuple[str, ...], Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor's name, and the part of a parameter that it is: a view, in the tensor's shape."""
    for row, first, leaf in _rows(flat):
        for layer in range(len(leaf)) if "{l}" in row.theirs[0] else [None]:
            part = leaf.T if row.how == "transposed" else leaf if layer is None else leaf[layer]
            for i, name in enumerate(row.theirs):
                own = part[i, 0] if row.how == "stacked" else part
                own = part[0, ...] if row.how == "own" else own
                yield name.format(l=None if layer is None else first + layer), own


def _rows(flat: Mapping[tuple[str, ...], Any]) -> Iterator[tuple[Row, int, Any]]:
    """The row of each parameter, its first layer, and it: [layers, ...], or without layers.

    A converted model's stages, each under its number, are layers by themselves. Raises UserError
    for parameters that have no row.
    """
    apart = any(path[:2] == ("prelude", "0") for path in flat)
    rows = {row.ours: row for row in (*NAMES, *(_factored() if apart else ()))}
    ours = {path: path[:1] + path[2:] if apart and len(path) > 2 else path for path in flat}
    if strange := {"/".join(path) for path in flat if "/".join(ours[path]) not in rows}:
        wants = "must be those of a dense decoder without a loop (model.rule='dense')"
        wants = "must be those of low rank; --form=formed writes others" if apart else wants
        raise UserError(f"the parameters {few(strange)} have no published name: {wants}")
    for path, leaf in flat.items():
        row, own = rows["/".join(ours[path])], ours[path] != path
        yield row, int(path[1]) if own else 0, leaf[None] if own else leaf


def read_params(source: Source, abstract: Any) -> Any:
    """The parameters of a checkpoint as a tree like `abstract`, jax.eval_shape(model.init, key).

    Arrays of NumPy, in the dtypes of `abstract`. Tensors are read one by one. Raises UserError
    where names are missing or left over, for another shape, and for what is not finite.
    """
    leaves, tensors = flatten_dict(abstract), source.tensors
    # Of shapes alone: memory is taken when the file is known to have as much.
    blank = {p: np.broadcast_to(np.zeros((), of.dtype), of.shape) for p, of in leaves.items()}
    places = dict(_places(blank))
    tied = HEAD not in places
    unused = {name for name in tensors if name.endswith(BUFFERS)} | ({HEAD} if tied else set())
    missing, over = {*places} - {*tensors}, {*tensors} - {*places} - unused
    if missing or over:
        said = [f"{len(missing)} tensors are missing: {few(missing)}"] * bool(missing)
        said += [f"{len(over)} are left over: {few(map(ascii, over))}"] * bool(over)
        raise UserError(f"{source.path} does not fit its config: {'; '.join(said)}")
    for name, part in places.items():
        if tensors[name].shape != part.shape:
            found = f"{name} has shape {[*tensors[name].shape]}"
            raise UserError(f"{source.path}: {found}: must be {[*part.shape]}")
        if (tensors[name].dtype == np.int32) != (part.dtype == np.int32):
            raise UserError(f"{source.path}: {name} is of {tensors[name].dtype}: not {part.dtype}")
    flat = {path: unwritten(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for name, part in _places(flat):
        part[...] = _finite(source, name)
    if tied and HEAD in tensors and not _equal(tensors[HEAD], flat[("embed",)]):
        wants = "tie_word_embeddings must be false"
        raise UserError(f"{source.path}: {HEAD} is not the table of embeddings: {wants}")
    return unflatten_dict(flat)


def tensors_of(params: Any) -> dict[str, np.ndarray]:
    """The tensors of a model's parameters, by their published names; undoes `read_params`.

    Raises UserError for parameters that such a model does not have.
    """
    return dict(_places({path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}))


def _finite(source: Source, name: str) -> np.ndarray:
    read = source.tensors[name].read()
    if not np.isfinite(read).all():
        raise UserError(f"{source.path} is damaged: {name} has numbers that are not finite")
    if read.dtype == np.int32 and not np.array_equal(np.sort(read), np.arange(len(read))):
        raise UserError(f"{source.path} is damaged: {name} is no order of {len(read)} neurons")
    return read


def _equal(one: Lazy, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.array_equal(one.read().astype(other.dtype), other)
