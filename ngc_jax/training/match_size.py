"""A model of a given cost: solve a size so that a config stores, or computes, a stated share of
another's.

For: `config.model.match`, "dense_small:0.25" or "dense_small:0.25:flops". Not for: comparing what
such models are worth (`experiments/`).
"""

import functools
import importlib.util
import math
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from ml_collections import ConfigDict

from ngc_jax import count
from ngc_jax.config import OURS, make_model
from ngc_jax.data.batches import token_batch
from ngc_jax.runtime.errors import UserError

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CLOSE = 0.01  # how far off the share a model may be, relatively
# bytes; matrices do not depend on it, and of FLOPs the logits' share is the same on both sides
VOCAB = 257


def resolve(config: ConfigDict) -> None:
    """Set sizes so that the model has the cost that `config.model.match` asks for; nothing happens
    where that is "".

    The share is of the parameters in matrices, or, with ":flops", of the matrix products of one
    forward pass over `config.data.context` tokens, attention and logits included.
    `config.model.match_by` names the size that is set ("width" takes hidden along in proportion);
    `config.model.hidden` then makes up for what its steps leave. Raises UserError where match
    cannot be read, or no sizes come within 1%.
    """
    if not config.model.match:
        return
    work = config.copy_and_resolve_references()
    m = work.model
    reference, share, what = _read(m.match)
    if m.match_by not in FIELDS:
        raise UserError(
            f"model.match_by={m.match_by!r}: must be one of {', '.join(map(repr, FIELDS))}"
        )
    reference.data.context = config.data.context
    target = share * cost(reference, what)
    unit = math.lcm(m.groups, 2 * m.heads)
    ratio = m.hidden / m.width

    def sized(field: str, size: int) -> tuple[ConfigDict, float]:
        tried = work.copy_and_resolve_references()
        tried.model[field] = size
        if field == "width":
            tried.model.hidden = max(unit, round(size * ratio / unit) * unit)
        return tried, cost(tried, what) / target

    if m.match_by != "hidden":
        step = unit if m.match_by == "width" else 1
        found, _ = _nearest(lambda steps: sized(m.match_by, steps * step))
        m[m.match_by], m.hidden = found.model[m.match_by], found.model.hidden
    step = unit if m.kind == "bdh" else m.groups
    found, off = _nearest(lambda steps: sized("hidden", steps * step))
    if abs(off - 1) > CLOSE:
        closest = f"{m.match_by}={found.model[m.match_by]} with hidden={found.model.hidden} has {share * off:.4g}"
        others = ", ".join(repr(field) for field in FIELDS if field != m.match_by)
        raise UserError(
            f"model.match={config.model.match!r}: no sizes come within 1% of {share:g}; {closest}: ask for that, or "
            f"set model.match_by to {others}"
        )
    config.model.update({m.match_by: m[m.match_by], "hidden": found.model.hidden})


def _nearest(at: Callable[[int], tuple[ConfigDict, float]]) -> tuple[ConfigDict, float]:
    """The at(n), n >= 1, whose second, which grows with n, is nearest to 1."""
    at = functools.cache(at)  # each costs some tenths of a second
    above = 1
    while at(above)[1] < 1 and above < 2**20:
        above *= 2
    below = above // 2  # 0 where even the smallest is too large
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (middle, above) if at(middle)[1] < 1 else (below, middle)
    return min((at(n) for n in (below, above) if n), key=lambda found: abs(found[1] - 1))


FIELDS = ("width", "hidden", "p_inter", "p_intra")


def cost(config: ConfigDict, what: str = "parameters") -> int:
    """Parameters in matrices, or FLOPs of the products of a forward pass over one window, of a
    config's model.

    FLOPs are those of the form (weights or signals) that takes fewer, for the two are one function.
    """
    model = make_model(config, VOCAB)
    params = jax.eval_shape(model.init, jax.random.key(0))
    if what == "parameters":
        return count.parameters(params, model.param_info()).matrices
    window = token_batch(1, config.data.context)

    def flops(form: str) -> int:
        formed = config.copy_and_resolve_references()
        formed.model.form = form
        return count.forward_flops(make_model(formed, VOCAB).apply, params, window)

    return min(map(flops, ("weights", "signals") if config.model.kind in OURS else ("weights",)))


def _read(match: str) -> tuple[Any, float, str]:
    """The reference's config, the share, and what is shared."""
    name, _, rest = match.partition(":")
    share, _, what = rest.partition(":")
    known = sorted(path.stem for path in CONFIGS.glob("*.py"))
    wants = "must be CONFIG:SHARE or CONFIG:SHARE:flops, for instance 'dense_small:0.25'"
    try:
        part = float(share)
    except ValueError as error:
        raise UserError(f"model.match={match!r}: {wants}") from error
    if not 0 < part < math.inf or what not in ("", "parameters", "flops"):
        raise UserError(f"model.match={match!r}: {wants}")
    if name not in known:
        raise UserError(
            f"model.match={match!r}: no config {name!r} in {CONFIGS}; there are: {', '.join(known)}"
        )
    return named(name), part, what or "parameters"


def named(name: str) -> ConfigDict:
    """The config of configs/NAME.py."""
    config: ConfigDict = module_at(CONFIGS / f"{name}.py").get_config()
    return config


def module_at(path: pathlib.Path) -> ModuleType:
    """The module that a file holds, which need not be in a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
