"""A study: its description, and the runs that it needs next.

For: the plan as a pure function of the losses known so far, so that a study continues after a kill
and several machines can share it. Not for: running (`run.py`) or reporting (`report.py`).
"""

import ast
import dataclasses
import functools
import importlib
import json
import math
import pathlib
import re
import runpy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from experiments.sweeps import SEED, Sweep
from ngc_jax import count
from ngc_jax.config import make_model, named, reset_unread
from ngc_jax.data.settings import OUTSIDE
from ngc_jax.data.tokens import most_tokens
from ngc_jax.report.blocks import Block
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import expand, read_json, write_durably
from ngc_jax.training.match_size import cost, prepare

LARGEST = 1 << 24  # bytes of a record
RECORD = {"fields": dict, "measures": dict, "curve": list, "error": str}  # and what is only shown

TUNING_SEED = 1000  # of the runs that search a learning rate, and of no others
FURTHER = 2  # learning rates beyond the given ones that may be tried
LOSS = "held-out loss (nats per token)"
Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it. A file with a `STUDY` of this type can be run and
    reported.
    """

    sweep: Sweep
    config: str = "defaults"  # of configs/: the fields that variants do not set
    common: Fields = dataclasses.field(default_factory=dict)  # fields of all runs
    # fields of all runs from the command line, which replace those of the sweep
    changes: Fields = dataclasses.field(default_factory=dict)
    # fields of all runs when the study runs on an accelerator
    larger: Fields = dataclasses.field(default_factory=dict)
    tuning: float = 0.5  # length of a run that tries a learning rate, relative to train.steps
    # makes files in the study's folder, which fields call "{DIR}"
    prepare: Callable[[pathlib.Path], None] | None = None
    # measures of a trained run's folder, besides its loss
    measure: Callable[[pathlib.Path], dict[str, float]] | None = None
    outcome: str = LOSS  # the measure by which variants are compared
    # labels of the group with which another one is compared, seed by seed
    baseline: Mapping[str, str] | None = None
    # further columns of the table, for each group
    costs: Callable[[Sequence[ConfigDict]], list[dict[str, str]]] | None = None
    # meanings of the study's own columns and factors, by their names
    legend: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # further blocks of the report
    answer: Callable[["Results"], list[Block]] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run."""

    name: str  # of its folder
    fields: Fields  # that differ from the study's config

    @property
    def trial(self) -> bool:
        """Whether the run only tries a learning rate, so that only its loss is measured."""
        return self.fields.get(SEED) == TUNING_SEED


@dataclasses.dataclass(frozen=True)
class Group:
    """The variants that differ in their seed only."""

    name: str  # in names of folders
    labels: Mapping[str, str]  # factor -> value
    fields: Fields
    seeds: tuple[int, ...]

    def run(self, seed: int) -> str:
        """The name of the run with a seed."""
        return f"{self.name}-seed{seed}"

    @property
    def title(self) -> str:
        """The name in figures."""
        return ", ".join(self.labels.values())

    @property
    def others(self) -> str:
        """The labels of all factors but the first."""
        return ", ".join([*self.labels.values()][1:])

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try first; () means the config's own."""
        given = self.fields.get("rate", ())
        return tuple(given) if isinstance(given, tuple | list) else (given,)


class Cost(NamedTuple):
    """The cost of a group's models."""

    config: ConfigDict  # with solved sizes
    shapes: Any  # of its parameters
    info: Any  # their records
    matrices: int  # parameters in matrices
    parameters: int  # all parameters
    flops: int  # of the matrix products of a forward pass, per token


@dataclasses.dataclass(frozen=True)
class Results:
    """All results of a study."""

    study: Study
    home: pathlib.Path
    groups: list[Group]
    records: Mapping[str, dict[str, Any]]  # run -> the record that `run.py` keeps of it

    @functools.cached_property
    def costs(self) -> list[Cost]:
        """The cost of each group."""
        return [cost_of(config_of(self.study, group.fields)) for group in self.groups]

    @property
    def varied(self) -> dict[str, list[str]]:
        """Factor -> names of its values."""
        return {
            factor: list(dict.fromkeys(group.labels[factor] for group in self.groups))
            for factor in self.groups[0].labels
        }

    @property
    def first(self) -> str:
        """The first factor, which figures show by colours."""
        return next(iter(self.groups[0].labels))

    def baseline(self, group: Group) -> Group | None:
        """The group with which a group is compared: it has the same labels, except those of the
        study's baseline.
        """
        labels = {**group.labels, **(self.study.baseline or {})}
        return next(
            (other for other in self.groups if other.labels == labels and other != group), None
        )

    def of(self, group: Group, measure: str) -> dict[int, float]:
        """Seed -> value, for the runs that have one."""
        found = {seed: self.records.get(group.run(seed), {"measures": {}}) for seed in group.seeds}
        return {
            seed: record["measures"][measure]
            for seed, record in found.items()
            if measure in record["measures"]
        }

    def measures(self, group: Group) -> list[str]:
        """The measures of a group's runs, the outcome first."""
        found = (self.records.get(group.run(seed), {"measures": {}}) for seed in group.seeds)
        return list(
            dict.fromkeys(
                [self.study.outcome, *(name for record in found for name in record["measures"])]
            )
        )

    def workdirs(self, group: Group) -> dict[int, pathlib.Path]:
        """Seed -> folder, for the runs that ended without an error."""
        return {seed: self.home / group.run(seed) for seed in self.of(group, LOSS)}


def groups(study: Study) -> list[Group]:
    """The groups of a study, in order.

    Raises UserError for two variants of one name, and for a variant without a seed.
    """
    found: dict[str, Group] = {}
    for variant in study.sweep:
        if SEED not in variant.labels:
            raise UserError(
                f"{variant.name} has no seed: give the study's sweep seeds, for instance "
                "`sweep * seeds(3)`"
            )
        labels = {factor: label for factor, label in variant.labels.items() if factor != SEED}
        fields = {**study.common, **variant.fields, **study.changes}
        # Fields that several models share, and this one does not read, go back to their defaults.
        fields |= reset_unread(_with_fields(study, fields))
        seed = int(fields.pop(SEED))
        name = dataclasses.replace(variant, labels=labels).name
        before = found.get(name, Group(name, labels, fields, ()))
        if before.labels != labels or seed in before.seeds:
            raise UserError(
                f"two variants of the study have the name {variant.name}: give them other labels"
            )
        found[name] = dataclasses.replace(before, seeds=(*before.seeds, seed))
    if study.baseline and not any(
        study.baseline.items() <= group.labels.items() for group in found.values()
    ):
        raise UserError(f"no variant has the labels of baseline={dict(study.baseline)}")
    return list(found.values())


def plan(study: Study, of: Iterable[Group], losses: Mapping[str, float]) -> list[Run]:
    """The runs that groups need, given the losses known so far; finished runs are included.

    A group with several learning rates first tries each in a run of `study.tuning` of the length.
    If the best is the lowest or highest, one further rate is tried, with the same ratio, at most
    FURTHER times. Then each seed is trained with the best rate.
    """
    wanted = []
    for group in of:
        trials = {
            rate: Run(f"tune-{group.name}-{rate:g}", short(study, group, rate))
            for rate in group.rates
        }
        rates = list(group.rates)
        if len(rates) > 1:
            for _ in range(FURTHER + 1):
                wanted += [trials[rate] for rate in rates if trials[rate] not in wanted]
                known = {
                    rate: losses[run.name] for rate, run in trials.items() if run.name in losses
                }
                rates = (
                    beyond(known)
                    if len(known) == len(trials) and len(trials) < len(group.rates) + FURTHER
                    else []
                )
                trials |= {
                    rate: Run(f"tune-{group.name}-{rate:g}", short(study, group, rate))
                    for rate in rates
                }
            if any(run.name not in losses for run in trials.values()):
                continue
            rates = [best(known)]
        fields = at_rate(group.fields, rates[0]) if rates else dict(group.fields)
        wanted += [Run(group.run(seed), {**fields, SEED: seed}) for seed in group.seeds]
    return wanted


def short(study: Study, group: Group, rate: float) -> dict[str, Any]:
    """The fields of a run that tries a learning rate."""
    steps = group.fields.get("train.steps", named(study.config).train.steps)
    return {
        **at_rate(group.fields, rate),
        SEED: TUNING_SEED,
        "train.steps": round(study.tuning * steps),
    }


def at_rate(fields: Fields, rate: float) -> dict[str, Any]:
    """Fields with both learning rates in place of "rate"."""
    own = {name: value for name, value in fields.items() if name != "rate"}
    return {**own, "train.learning_rate": rate, "train.state_learning_rate": rate}


def best(tried: Mapping[float, float]) -> float:
    """The learning rate of the lowest loss; of equal ones, the lowest rate."""
    return min(tried, key=lambda rate: (tried[rate], rate))


def beyond(tried: Mapping[float, float]) -> list[float]:
    """The learning rate to try next, after `tried` (rate -> loss): beyond the end at which the best
    is, if it is at an end.
    """
    ordered, found = sorted(tried), best(tried)
    if not math.isfinite(tried[found]):
        return [ordered[0] ** 2 / ordered[1]]
    if found == ordered[-1]:
        return [found * found / ordered[-2]]
    return [found * found / ordered[1]] if found == ordered[0] else []


def config_of(study: Study, fields: Fields) -> ConfigDict:
    """The config of a group or run, checked, with solved sizes. Raises UserError."""
    config = _with_fields(study, fields)
    prepare(config)
    return config


def _with_fields(study: Study, fields: Fields) -> ConfigDict:
    config = named(study.config).lock()
    try:
        config.update_from_flattened_dict(
            {name: value for name, value in fields.items() if name != "rate"}
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the study sets a field that does not exist, or a value of another type: {error}"
        ) from error
    return config


def cost_of(config: ConfigDict) -> Cost:
    """The cost of a config's model."""
    model = make_model(config, most_tokens(config.data))
    shapes, info = jax.eval_shape(model.init, jax.random.key(0)), model.param_info()
    stored = count.parameters(shapes, info)
    flops = cost(config, "flops") // config.data.context
    return Cost(config, shapes, info, stored.matrices, stored.total, flops)


def prepared(study: Study, home: pathlib.Path, changes: Sequence[str] = ()) -> Study:
    """The study with the `--config.FIELD=VALUE` changes that its folder has, or gets; makes the
    folder.

    Raises UserError for any other argument, and for changes other than those of the folder.
    """
    given: dict[str, Any] = {}
    for change in changes:
        found = re.fullmatch(r"--config\.([\w.]+)=(.*)", change)
        if not found:
            raise UserError(f"unexpected argument {change!r}: set fields with --config.FIELD=VALUE")
        try:
            given[found[1]] = ast.literal_eval(found[2])
        except (ValueError, SyntaxError):
            given[found[1]] = found[2]
    kept = home / "changes.json"
    try:
        before = read_json(kept, LARGEST) if kept.exists() else given
        named = [name for name in before if not re.fullmatch(r"[\w.]+", name)]
        if not isinstance(before, dict) or named:
            raise ValueError("it is not {field: value}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{kept} cannot be read: {error}") from error
    places = [name for name in before if name in {f"data.{place}" for place in OUTSIDE}]
    if places and not changes:
        raise UserError(
            f"{kept} names places, {', '.join(f'{name}={before[name]!r}' for name in places)}, "
            "which are not read unless you say so: give the same --config.FIELD=VALUE again"
        )
    if changes and before != given:
        raise UserError(
            f"--workdir={home} has this study with other changes, {before}: give another --workdir"
        )
    for folder in ("logs", "measures", "records"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    write_durably(kept, json.dumps(before) + "\n")
    if study.prepare:
        study.prepare(home)

    def here(fields: Fields) -> dict[str, Any]:
        return {
            k: v.replace("{DIR}", str(home)) if isinstance(v, str) else v for k, v in fields.items()
        }

    sweep = Sweep(
        dataclasses.replace(variant, fields=here(variant.fields)) for variant in study.sweep
    )
    return dataclasses.replace(study, sweep=sweep, common=here(study.common), changes=before)


def read_records(home: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The records of all runs that have ended, by name. Raises UserError for what is no record."""
    records = {}
    for path in sorted((home / "records").glob("*.json")):
        try:
            record = records[path.stem] = read_json(path, LARGEST)
            kinds = {name: type(record[name]) for name in RECORD}
            sound = kinds == RECORD and all(
                isinstance(value, int | float) for value in record["measures"].values()
            )
            if not sound:
                raise ValueError("it is no record of a run")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    return records


def find(wanted: str) -> tuple[str, Study, str]:
    """A study by the name of its file in experiments/, or by the path of your file: its name, the
    study, its docstring.

    Raises UserError if there is none.
    """
    path = expand(wanted)
    try:
        module = (
            runpy.run_path(str(path))
            if path.suffix == ".py"
            else vars(importlib.import_module(f"experiments.{wanted}"))
        )
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"there is no study {wanted!r} ({error}): give one of experiments/, or a file.py"
        ) from error
    study = module.get("STUDY")
    if not isinstance(study, Study):
        raise UserError(f"{wanted!r} has no STUDY = Study(...): see experiments/README.md")
    return path.stem, study, module["__doc__"] or path.stem
