"""How a decoder's parameters lie: stages in stacks, and send states that several stages share.

For: the layout {"embed", "norm", "unembed", "prelude", "core": {"stages", "leak", "drive"}, "coda",
"senders"}, the A stages of a stack behind one another on a leading axis, senders by sets of stages
that share them; stages that differ in shape each under its number. Not for: what a stage does with
them (`layers.py`).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ngc_jax.nn.shape import ModelShape
from ngc_jax.nn.sharing import leaders, take

Array = jax.Array
Tree = Any
Params = dict[str, Any]
STACKS = ("prelude", "core", "coda")
KEY = "dropout"  # beside the parameters of a stage: the key, as data, by which it drops


def stack_rows(shape: ModelShape) -> dict[str, slice]:
    """Where each stack that there is lies among all stages."""
    ends = [0, *itertools.accumulate(getattr(shape, name) for name in STACKS)]
    rows = zip(STACKS, itertools.pairwise(ends), strict=True)
    return {name: slice(*row) for name, row in rows if row[0] < row[1]}


def get_stack(params: Params, name: str) -> Tree:
    """The stages of a stack; None where there is none."""
    found = params.get(name)
    return found.get("stages") if name == "core" and found is not None else found


def restack(shape: ModelShape, params: Params, change: Callable[[Tree, slice], Tree]) -> Params:
    """Parameters with change(stack, its rows) in place of each stack."""
    found = dict(params)
    for name, rows in stack_rows(shape).items():
        stack = change(get_stack(params, name), rows)
        found[name] = {**params["core"], "stages": stack} if name == "core" else stack
    return found


def arrange(shape: ModelShape, stages: Tree, info: Tree, rest: Params, rows_of: Any) -> Params:
    """The parameters of a decoder from those of all its stages [A, ...] and the `rest`.

    info: records of a stage. rows_of(tree, rows): `take`, or the identity where stages are records.
    """
    params, sets, over = dict(rest), shape.shared.stages, shape.shared.over_depth
    if max(sets) + 1 < len(sets):
        records, flat = flatten_dict(info), flatten_dict(stages)
        tied = [p for p, one in records.items() if one.side == "pre" and p[0] in over]
        shared = unflatten_dict({path: flat.pop(path) for path in tied})
        params["senders"], stages = rows_of(shared, leaders(sets)), unflatten_dict(flat)
    return restack(shape, params, lambda _, rows: rows_of(stages, rows))


def join_stages(shape: ModelShape, params: Params) -> tuple[Tree, Tree]:
    """The stages of all stacks [A, ...], and the shared send states ({} where none are shared)."""
    stacks = [get_stack(params, name) for name in stack_rows(shape)]
    return jax.tree.map(lambda *p: jnp.concatenate(p), *stacks), params.get("senders", {})


def split_stages(shape: ModelShape, params: Params, stages: Tree, senders: Tree) -> Params:
    """The parameters with these stages and shared send states; undoes `join_stages`."""
    shared = {"senders": senders} if senders else {}
    return restack(shape, params | shared, lambda _, rows: take(stages, rows))


def numbered(stages: Sequence[Tree]) -> Params:
    """A stack of stages that differ in shape: {"0": stage, "1": ...}."""
    return {str(number): stage for number, stage in enumerate(stages)}


def keyed(stack: Tree, keys: Array) -> Params:
    """A stack whose stages drop by a key each, [stages]; without one a stage drops nothing."""
    data = jax.random.key_data(keys)
    if "0" in stack:
        return {number: {**stage, KEY: data[int(number)]} for number, stage in stack.items()}
    return {**stack, KEY: data}


def unkeyed(stage: Tree) -> tuple[Params, dict[str, Array]]:
    """A stage's parameters, and the `rngs` of its module that `keyed` asks for, if it does."""
    own = dict(stage)
    data = own.pop(KEY, None)
    return own, {} if data is None else {KEY: jax.random.wrap_key_data(data)}


def stages_of(stack: Tree) -> tuple[Tree, ...]:
    """The stages of a stack, each by itself."""
    if "0" in stack:
        return tuple(stack[str(number)] for number in range(len(stack)))
    return tuple(take(stack, i) for i in range(len(jax.tree.leaves(stack)[0])))


def all_stages(shape: ModelShape, params: Params) -> list[Tree]:
    """The stages of all stacks, each by itself."""
    return [s for name in stack_rows(shape) for s in stages_of(get_stack(params, name))]
