"""Sizes that give a model a stated cost: a share of the parameters or FLOPs of another config.

For: `model.match`, and the last checks of a config. Not for: comparing models (`experiments/`).
"""

import bisect
import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from ngc_jax import count
from ngc_jax.config import SECTIONS, config_names, make_model, named, validate
from ngc_jax.core.rules import RULES
from ngc_jax.data.batches import Batch, abstract_batch
from ngc_jax.nn.settings import MATCHED, kind_of
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import check_fields

CLOSE = 0.01  # relative distance from the share that is allowed
VOCAB = 257  # bytes; matrices do not depend on it, and the logits' FLOPs are those of both sides


def prepare(config: ConfigDict) -> None:
    """Checks a config, sets the sizes that `model.match` asks for, and checks what comes of it.

    The share, "dense_small:0.25", is of the parameters in matrices; with ":flops" of the matrix
    products of a forward pass over an example. `model.match_by` names the size that is set; "width"
    scales hidden with it, which then takes up the rest. UserError unless some come within 1%.
    """
    check_fields(config, SECTIONS)
    if config.model.match:
        # What is to be set need not fit yet, nor what depends on it.
        trial, unit = config.copy_and_resolve_references(), _unit(config)
        for size in {"hidden", config.model.match_by} & {"width", "hidden"}:
            trial.model[size] = max(1, round(config.model[size] / unit)) * unit
        trial.model.init_rank = 0
        validate(trial)
        _resolve(config)
    validate(config)


def _resolve(config: ConfigDict) -> None:
    work = config.copy_and_resolve_references()
    m, unit = work.model, _unit(work)
    reference, share, what = _read(m.match)
    for name in ("context", "image_size", "colours"):
        reference.data[name] = config.data[name]
    target, ratio = share * cost(reference, what), m.hidden / m.width

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
    step = m.groups if "groups" in kind_of(config).reads else unit
    found, off = _nearest(lambda steps: sized("hidden", steps * step))
    sizes = {m.match_by: m[m.match_by], "hidden": found.model.hidden}
    if abs(off - 1) > CLOSE:
        made = " with ".join(f"{field}={found.model[field]}" for field in sizes)
        others = ", ".join(repr(field) for field in MATCHED if field != m.match_by)
        none = f"model.match={m.match!r}: no sizes come within 1% of {share:g}"
        ask = f"ask for that, or set model.match_by to {others}"
        raise UserError(f"{none}; {made} has {share * off:.4g}: {ask}")
    config.model.update(sizes)


def _unit(config: ConfigDict) -> int:
    """What a width is a multiple of."""
    return math.lcm(config.model.groups, 2 * config.model.heads)


def _nearest(at: Callable[[int], tuple[ConfigDict, float]]) -> tuple[ConfigDict, float]:
    """The at(n), n >= 1, whose second, which grows with n, is nearest to 1."""
    at = functools.cache(at)  # each costs some tenths of a second
    above = 1
    while at(above)[1] < 1 and above < 2**20:
        above *= 2
    n = bisect.bisect_left(range(above), 1, above // 2 + 1, above, key=lambda n: at(n)[1] >= 1)
    return min((at(n) for n in (n - 1, n) if n), key=lambda found: abs(found[1] - 1))


def cost(config: ConfigDict, what: str = "parameters") -> int:
    """Parameters in matrices, or FLOPs of a forward pass over one example in its cheaper form."""
    model: Any = make_model(config, VOCAB)
    rules = tuple(RULES.values())
    if what == "parameters":
        return _matrices(model, rules)
    found, formed = [], config.copy_and_resolve_references()
    forms = ["weights"] + ["signals"] * ("form" in kind_of(config).reads)
    for formed.model.form in forms:
        model = make_model(formed, VOCAB)
        found.append(_flops(model, rules, abstract_batch(config.data, 1)))
    return min(found)


# Both are traced, which takes some tenths of a second, and studies ask again and again. `rules`: a
# user may replace one, and with it the sizes of a model that looks the same.
@functools.cache
def _matrices(model: Any, rules: tuple[Any, ...]) -> int:
    return count.parameters(_traced(model, rules), model.param_info()).matrices


@functools.cache
def _flops(model: Any, rules: tuple[Any, ...], batch: Batch) -> int:
    return count.forward_flops(model.apply, _traced(model, rules), batch)


@functools.cache
def _traced(model: Any, rules: tuple[Any, ...]) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0))


def _read(match: str) -> tuple[Any, float, str]:
    """The reference's config, the share, and what is shared."""
    name, _, rest = match.partition(":")
    share, _, what = rest.partition(":")
    part = math.nan
    with contextlib.suppress(ValueError):
        part = float(share)
    if not 0 < part < math.inf or what not in ("", "parameters", "flops"):
        wants = "must be CONFIG:SHARE or CONFIG:SHARE:flops, for instance 'dense_small:0.25'"
        raise UserError(f"model.match={match!r}: {wants}")
    if name not in config_names():
        known = ", ".join(config_names())
        raise UserError(f"model.match={match!r}: there is no config {name!r}, but {known}")
    return named(name), part, what or "parameters"
