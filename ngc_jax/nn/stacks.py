"""How a decoder's parameters lie: stages in stacks, and send states that several stages share.

For: the layout, as pure functions of a shape and a tree. Parameters are {"embed", "norm",
"unembed", "prelude", "core": {"stages", "leak", "drive"}, "coda"}, with the stages of a stack
behind one another on a leading axis; and "senders", send states by sets of stages that share them.
Not for: what a stage does with them (`layers.py`, `decoder.py`).

Axes: A stages, in the order prelude, core, coda.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ngc_jax.nn.params import merge_trees
from ngc_jax.nn.shape import ModelShape
from ngc_jax.nn.sharing import leaders, spread

Tree = Any
Params = dict[str, Any]
STACKS = ("prelude", "core", "coda")


def stack_rows(shape: ModelShape) -> dict[str, slice]:
    """Where each stack that there is lies among all stages."""
    first, rows = 0, {}
    for name in STACKS:
        count = getattr(shape, name)
        if count:
            rows[name] = slice(first, first + count)
        first += count
    return rows


def get_stack(params: Params, name: str) -> Tree:
    """The stages of a stack; None where there is none."""
    found = params.get(name)
    return found["stages"] if name == "core" and found is not None else found


def restack(
    shape: ModelShape, params: Params, change: Callable[[Tree, slice], Tree], shared: bool = True
) -> Params:
    """Parameters with change(stack, its rows) in place of each stack; without "senders" if told."""
    found = {name: leaf for name, leaf in params.items() if shared or name != "senders"}
    for name, rows in stack_rows(shape).items():
        stack = change(get_stack(params, name), rows)
        found[name] = {**params["core"], "stages": stack} if name == "core" else stack
    return found


def arrange(
    shape: ModelShape, stages: Tree, info: Tree, rest: Params, take: Callable[[Tree, Any], Tree]
) -> Params:
    """The parameters of a decoder from those of all its stages [A, ...] and the `rest`.

    info: records of one stage. take(tree, rows) takes rows of the leading axis; it is the identity
    where `stages` are records themselves.
    """
    params = {name: leaf for name, leaf in rest.items() if name not in STACKS}
    sets = shape.shared.stages
    if max(sets) + 1 < len(sets):
        records, flat = flatten_dict(info), flatten_dict(stages)
        over = shape.shared.over_depth
        tied = {p for p, one in records.items() if one.side == "pre" and p[0] in over}
        shared = unflatten_dict({path: flat[path] for path in tied})
        params["senders"] = take(shared, leaders(sets))
        stages = unflatten_dict({path: leaf for path, leaf in flat.items() if path not in tied})
    for name, rows in stack_rows(shape).items():
        stack = take(stages, rows)
        params[name] = {"stages": stack, **rest["core"]} if name == "core" else stack
    return params


def join_stages(shape: ModelShape, params: Params) -> tuple[Tree, Tree]:
    """The stages of all stacks [A, ...], and the shared send states ({} where none are shared)."""
    stacks = [get_stack(params, name) for name in stack_rows(shape)]
    return jax.tree.map(lambda *p: jnp.concatenate(p), *stacks), params.get("senders", {})


def split_stages(shape: ModelShape, params: Params, stages: Tree, senders: Tree) -> Params:
    """The parameters with these stages and shared send states; undoes `join_stages`."""
    found = restack(shape, params, lambda _, rows: jax.tree.map(lambda p: p[rows], stages))
    return {**found, "senders": senders} if senders else found


def expand_shared(shape: ModelShape, params: Params) -> Params:
    """Parameters in which each stage has its own send states, also those that stages share."""
    if "senders" not in params:
        return params
    shared = spread(shape.shared.stages, params["senders"])

    def own(stack: Tree, rows: slice) -> Tree:
        return merge_trees(stack, jax.tree.map(lambda p: p[rows], shared))

    return restack(shape, params, own, shared=False)


def unstack(shape: ModelShape, params: Params) -> Params:
    """Parameters with each stage's in arrays of its own, a tuple of stages for a stack.

    For decoding: a loop over a stack copies a stage before it is read, and one token is multiplied
    by it no sooner than that.
    """
    return restack(shape, expand_shared(shape, params), lambda stack, _: stages_of(stack))


def stages_of(stack: Tree) -> tuple[Tree, ...]:
    """The stages of a stack, each by itself."""
    count = len(jax.tree.leaves(stack)[0])
    return tuple(jax.tree.map(lambda p, i=i: p[i], stack) for i in range(count))
