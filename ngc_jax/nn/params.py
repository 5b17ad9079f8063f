"""Records of a model's parameters: collected from the layers that create them, and used on trees.

For: `declare` in a Flax module, in place of `self.param`; `describe`, which returns what a module
has declared; and splits of a tree by its records. Not for: what a record says (`core/params.py`).
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from ngc_jax.core.params import ParamInfo

Tree = Any
_RECORDS: ContextVar[dict[tuple[str, ...], Any] | None] = ContextVar("records", default=None)


def declare(
    module: nn.Module, name: str, info: Callable[[], Any], init: Callable[..., Any], *args: Any
) -> Any:
    """Returns `module.param(name, init, *args)`; `info()` makes its record, or tree of records."""
    records = _RECORDS.get()
    if records is not None:
        records[(*module.path, name)] = info()
    return module.param(name, init, *args)


def declare_scale(
    module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...]
) -> Any:
    """Returns a parameter of one number a channel."""
    return declare(module, name, lambda: ParamInfo("scale", (None,) * len(shape)), init, shape)


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
    return jax.tree.map(lambda one: one.stacked(counts), info)


def partition(tree: Tree, info: Tree) -> tuple[Tree, Tree]:
    """Splits a tree that is parallel to the records: what is trained, and wiring, which is not."""
    flat, records = flatten_dict(tree), flatten_dict(info)
    fixed = {path: leaf for path, leaf in flat.items() if records[path].kind == "wiring"}
    trained = {path: leaf for path, leaf in flat.items() if path not in fixed}
    return unflatten_dict(trained), unflatten_dict(fixed)


def combine(trained: Tree, fixed: Tree) -> Tree:
    """The tree that `partition` has split."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(fixed))


def merge_trees(*trees: Tree) -> Tree:
    """One nested dict of the leaves of several; of two at one place the last."""
    flat: dict[Any, Any] = {}
    for tree in trees:
        flat |= flatten_dict(tree)
    return unflatten_dict(flat)
