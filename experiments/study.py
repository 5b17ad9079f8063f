"""What a study is, and which runs it wants next.

For: its description, and the plan as a pure function of the losses known so far, so that a study
which was killed, or is shared by several machines, goes on from what there is. Not for: running
(`run.py`) or reporting (`report.py`).
"""

import ast
import dataclasses
import functools
import importlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from experiments.blocks import Block
from experiments.sweeps import SEED, Sweep
from ngc_jax import count
from ngc_jax.config import module_at, named, reset_unread
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import write_durably
from ngc_jax.training.match_size import cost, prepare
from ngc_jax.training.timing import model_of

TUNING_SEED = 1000  # of the runs that try a learning rate; used for nothing else
FURTHER = 2  # learning rates beyond those given that may be tried
LOSS = "held-out loss (nats per token)"
Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
    """One question, and the runs that answer it. A file with a `STUDY` of this type can be run and
    reported.
    """

    sweep: Sweep
    config: str = "defaults"  # of configs/, from which variants differ
    common: Fields = dataclasses.field(default_factory=dict)  # fields of all runs
    # what a command line sets in all runs, over the sweep
    changes: Fields = dataclasses.field(default_factory=dict)
    # the same study for an accelerator: set in all runs
    larger: Fields = dataclasses.field(default_factory=dict)
    tuning: float = 0.5  # of train.steps, the length of a run that tries one of several rates
    # makes files in the study's folder; "{DIR}" in fields is it
    prepare: Callable[[pathlib.Path], None] | None = None
    # of a trained run's folder, beside its loss
    measure: Callable[[pathlib.Path], dict[str, float]] | None = None
    outcome: str = LOSS  # the measure by which variants are compared
    # a group is compared, seed by seed, with the one that has these labels
    baseline: Mapping[str, str] | None = None
    # of each group: columns of the table
    costs: Callable[[Sequence[ConfigDict]], list[dict[str, str]]] | None = None
    # what the report says besides its tables and figures
    answer: Callable[["Results"], list[Block]] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run."""

    name: str  # of its folder
    fields: Fields  # in which it differs from the study's config

    @property
    def trial(self) -> bool:
        """Whether it only tries a learning rate, so that its loss is all that is asked of it."""
        return self.fields.get(SEED) == TUNING_SEED


@dataclasses.dataclass(frozen=True)
class Group:
    """The variants that differ in their seed alone."""

    name: str
    labels: Mapping[str, str]
    fields: Fields
    seeds: tuple[int, ...]

    def run(self, seed: int) -> str:
        """The name of the run with a seed."""
        return f"{self.name}-seed{seed}"

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try first; () where the config's own is meant."""
        given = self.fields.get("rate", ())
        return tuple(given) if isinstance(given, tuple | list) else (given,)


class Cost(NamedTuple):
    """What a group's models cost."""

    config: ConfigDict  # sizes solved
    shapes: Any  # of its parameters
    info: Any  # their records
    matrices: int  # parameters in matrices
    parameters: int  # all of them
    flops: int  # of the products of a forward pass, per token


@dataclasses.dataclass(frozen=True)
class Results:
    """All that came of a study."""

    study: Study
    home: pathlib.Path
    groups: list[Group]
    records: Mapping[str, dict[str, Any]]  # run -> what `run.py` kept of it

    @functools.cached_property
    def costs(self) -> list[Cost]:
        """Of each group."""
        return [cost_of(config_of(self.study, group.fields)) for group in self.groups]

    @property
    def varied(self) -> dict[str, list[str]]:
        """Factor -> what its values are called."""
        factors = self.groups[0].labels
        return {
            factor: list(dict.fromkeys(group.labels[factor] for group in self.groups))
            for factor in factors
        }

    def baseline(self, group: Group) -> Group | None:
        """The group that a group is compared with: its own labels, but for those of the study's
        baseline.
        """
        labels = {**group.labels, **(self.study.baseline or {})}
        return next(
            (other for other in self.groups if other.labels == labels and other != group), None
        )

    def of(self, group: Group, measure: str) -> dict[int, float]:
        """Seed -> value, of the runs that have one."""
        found = {seed: self.records.get(group.run(seed), {"measures": {}}) for seed in group.seeds}
        return {
            seed: record["measures"][measure]
            for seed, record in found.items()
            if measure in record["measures"]
        }

    def measures(self, group: Group) -> list[str]:
        """What was measured of a group's runs, the outcome first."""
        found = (self.records.get(group.run(seed), {"measures": {}}) for seed in group.seeds)
        return list(
            dict.fromkeys(
                [self.study.outcome, *(name for record in found for name in record["measures"])]
            )
        )

    def workdirs(self, group: Group) -> dict[int, pathlib.Path]:
        """Seed -> the folder of a run that ended well."""
        return {seed: self.home / group.run(seed) for seed in self.of(group, LOSS)}


def groups(study: Study) -> list[Group]:
    """A study's groups, in order. Raises UserError where two variants have one name, or one has no
    seed.
    """
    found: dict[str, Group] = {}
    for variant in study.sweep:
        if SEED not in variant.labels:
            raise UserError(
                "a study's sweep wants seeds, for instance `sweep * seeds(3)`; "
                f"{variant.name} has none"
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
                f"two variants of the study are called {variant.name}: give them other labels"
            )
        found[name] = dataclasses.replace(before, seeds=(*before.seeds, seed))
    if study.baseline and not any(
        study.baseline.items() <= group.labels.items() for group in found.values()
    ):
        raise UserError(f"the study's baseline={dict(study.baseline)} are labels of no variant")
    return list(found.values())


def plan(study: Study, of: Iterable[Group], losses: Mapping[str, float]) -> list[Run]:
    """The runs that groups want, as far as the losses known so far tell; those with a loss among
    them.

    A group with several learning rates first tries each at `study.tuning` of the length. Where the
    best is the first or the last of them, one beyond it is tried, as far again, at most FURTHER
    times: the rule is the same for all. Then the best is trained with every seed.
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
    """Fields with both learning rates in the place of "rate"."""
    own = {name: value for name, value in fields.items() if name != "rate"}
    return {**own, "train.learning_rate": rate, "train.state_learning_rate": rate}


def best(tried: Mapping[float, float]) -> float:
    """The learning rate of the lowest loss, and of equal ones the lowest."""
    return min(tried, key=lambda rate: (tried[rate], rate))


def beyond(tried: Mapping[float, float]) -> list[float]:
    """The learning rate to try next, if any, after these gave these losses: one beyond the end at
    which the best is.
    """
    ordered, found = sorted(tried), best(tried)
    if not math.isfinite(tried[found]):
        return [ordered[0] ** 2 / ordered[1]]
    if found == ordered[-1]:
        return [found * found / ordered[-2]]
    return [found * found / ordered[1]] if found == ordered[0] else []


def config_of(study: Study, fields: Fields) -> ConfigDict:
    """The config of a group or run, checked, sizes solved. Raises UserError."""
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
            f"the study sets a field that no config has, or to what it cannot be: {error}"
        ) from error
    return config


def cost_of(config: ConfigDict) -> Cost:
    """Count a config's model."""
    model = model_of(config)
    shapes, info = jax.eval_shape(model.init, jax.random.key(0)), model.param_info()
    stored = count.parameters(shapes, info)
    flops = cost(config, "flops") // config.data.context
    return Cost(config, shapes, info, stored.matrices, stored.total, flops)


def prepared(study: Study, home: pathlib.Path, changes: Sequence[str] = ()) -> Study:
    """A study with its folder made, and with the `--config.FIELD=VALUE` changes that the folder
    keeps, or is given.

    Raises UserError for what is no change, and where the folder keeps other ones.
    """
    given: dict[str, Any] = {}
    for change in changes:
        found = re.fullmatch(r"--config\.([\w.]+)=(.*)", change)
        if not found:
            raise UserError(
                f"unexpected argument {change!r}: fields are set by --config.FIELD=VALUE"
            )
        try:
            given[found[1]] = ast.literal_eval(found[2])
        except (ValueError, SyntaxError):
            given[found[1]] = found[2]
    kept = home / "changes.json"
    before = json.loads(kept.read_text()) if kept.exists() else given
    if changes and before != given:
        raise UserError(
            f"--workdir={home} holds this study with other changes, {before}: give another"
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
    """What is kept of each run that has ended, by name."""
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted((home / "records").glob("*.json"))
    }


def find(wanted: str) -> tuple[str, Study, str]:
    """A study by the name of its file in experiments/, or by the path of a file of yours: its name,
    it, its words.

    Raises UserError where there is none.
    """
    path = pathlib.Path(wanted)
    try:
        module = (
            module_at(path)
            if path.suffix == ".py"
            else importlib.import_module(f"experiments.{wanted}")
        )
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"there is no study {wanted!r} ({error}): give one of experiments/, or a file.py"
        ) from error
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise UserError(f"{wanted!r} has no STUDY = Study(...): see experiments/README.md")
    return path.stem, study, module.__doc__ or path.stem
