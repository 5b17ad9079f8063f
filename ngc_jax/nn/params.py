"""Records of a model's parameters: collected from the layers that create them, and used on trees.

For: `declare` in a Flax module, not `self.param`. Not for: what a record says (`core/params.py`).
"""

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ngc_jax.core.params import ParamInfo
from ngc_jax.runtime.errors import UserError

Tree = Any
STATES, STAGES = 2, 3  # of the keys of an update: what states, and what stages drop; 0, 1: split
_RECORDS: ContextVar[dict[tuple[str, ...], Any] | None] = ContextVar("records", default=None)


def declare(module: nn.Module, name: str, info: Callable[[], Any], init: Any, *args: Any) -> Any:
    """Returns `module.param(name, init, *args)`; `info()` makes its record, or tree of records."""
    records = _RECORDS.get()
    if records is not None:
        records[(*module.path, name)] = info()
    return module.param(name, init, *args)


def declare_scale(module: nn.Module, name: str, init: Any, channels: int) -> Any:
    """Returns a parameter of one number a channel."""
    return declare(module, name, lambda: ParamInfo("scale", (None,)), init, (channels,))


def describe(module: nn.Module, *args: Any) -> Tree:
    """The records of all parameters that `module.init(key, *args)` makes, as a parallel tree."""
    records: dict[tuple[str, ...], Any] = {}
    token = _RECORDS.set(records)
    try:
        jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    finally:
        _RECORDS.reset(token)
    return unflatten_dict(records)


def stacked(info: Tree, counts: str) -> Tree:
    """The records of parameters that lie behind one another on a new leading axis."""
    return jax.tree.map(lambda one: dataclasses.replace(one, axes=(counts, *one.axes)), info)


def partition(tree: Tree, info: Tree) -> tuple[Tree, Tree]:
    """Splits a tree that is parallel to the records: what is trained, and wiring, which is not."""
    flat, records = flatten_dict(tree), flatten_dict(info)
    fixed = {path: flat.pop(path) for path, one in records.items() if one.kind == "wiring"}
    return unflatten_dict(flat), unflatten_dict(fixed)


def combine(one: Tree, other: Tree) -> Tree:
    """The nested dict of the leaves of two, such as the tree that `partition` has split."""
    return unflatten_dict(flatten_dict(one) | flatten_dict(other))


def drop_states(params: Tree, info: Tree, share: float, key: jax.Array) -> Tree:
    """Parameters with a `share` of the numbers of neurons' states at 0, the others over 1 - share.

    Each number keeps its mean. Raises UserError for a model whose neurons have no states.
    """
    if not share:
        return params
    (leaves, tree), records = jax.tree.flatten(params), jax.tree.leaves(info)
    chosen = [one.kind == "state" and bool({"neuron", "channel"} & {*one.axes}) for one in records]
    if not any(chosen):
        wants = "must be 0.0 where neurons have no states of their own (model.rule)"
        raise UserError(f"model.state_dropout={share}: {wants}")
    # One draw for all: one for each compiles several times as long.
    sizes = [leaf.size for leaf, drops in zip(leaves, chosen, strict=True) if drops]
    drawn = jax.random.bernoulli(jax.random.fold_in(key, STATES), 1 - share, (sum(sizes),))
    kept = iter(jnp.split(drawn, np.cumsum(sizes)[:-1]))
    for i in (i for i, drops in enumerate(chosen) if drops):
        mask = next(kept).reshape(leaves[i].shape)
        leaves[i] = jnp.where(mask, leaves[i] / (1 - share), 0)
    return jax.tree.unflatten(tree, leaves)
