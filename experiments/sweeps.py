"""The algebra of what a study varies: variants, their product, chain and zip, and seeds.

    models = cases("model", {"NGC": {}, "dense": {"model.rule": "dense"}})
    models * vary("train.steps", (500, 1000)) * seeds(3)

For: a name and the config fields of each variant. Not for: running (`run.py`) or reporting
(`report.py`).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SEED = "seed"  # the factor over which reports take means


@dataclasses.dataclass(frozen=True)
class Variant:
    """A point of a sweep."""

    # factor -> name of its value; together they name the variant
    labels: Mapping[str, str]
    # of the config. "rate": both learning rates; of several, the best is searched
    fields: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name for folders: letters, digits, dots and dashes; a seed is marked as such."""
        said = (
            f"seed{label}" if factor == SEED else label for factor, label in self.labels.items()
        )
        return "-".join(
            re.sub(r"[^\w.]+", "-", re.sub(r" = ", "", label)).strip("-") for label in said
        )

    def joined(self, other: "Variant") -> "Variant":
        """Both together; `other` wins for a field that both set. Raises ValueError for a common
        factor.
        """
        twice = self.labels.keys() & other.labels.keys()
        if twice:
            raise ValueError(f"{sorted(twice)} is varied twice")
        return Variant({**self.labels, **other.labels}, {**self.fields, **other.fields})


class Sweep(tuple[Variant, ...]):
    """Variants in order. a * b: each of a with each of b. a + b: those of a, then those of b."""

    def __mul__(self, other: Any) -> "Sweep":
        return Sweep(a.joined(b) for a in self for b in other)

    def __add__(self, other: Any) -> "Sweep":
        return Sweep([*self, *other])


def cases(factor: str, of: Mapping[str, Mapping[str, Any]]) -> Sweep:
    """One variant for each label, with its fields."""
    return Sweep(Variant({factor: label}, fields) for label, fields in of.items())


def vary(field: str, values: Iterable[Any], factor: str = "") -> Sweep:
    """One variant for each value of a config field.

    factor: its name; default: the last part of the field's name.
    """
    name = factor or field.rpartition(".")[2]
    return cases(name, {f"{name} = {value}": {field: value} for value in values})


def seeds(count: int) -> Sweep:
    """Seeds 0 .. count - 1."""
    return cases(SEED, {str(seed): {SEED: seed} for seed in range(count)})


def zipped(*sweeps: Sequence[Variant]) -> Sweep:
    """The first variants joined, the second variants joined, and so on. Raises ValueError for
    different lengths.
    """
    joined = list(sweeps[0])
    for sweep in sweeps[1:]:
        joined = [a.joined(b) for a, b in zip(joined, sweep, strict=True)]
    return Sweep(joined)
