"""Tables of settings: the name, default, help, range and unit of each field, written once.

For: defaults, checks, messages, `--help`. Not for: the fields (`settings.py` of each room).
"""

import dataclasses
import difflib
import functools
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from ngc_jax.runtime.errors import UserError

# need(holds, field, what it must be) raises UserError where it does not hold
Need = Callable[[bool, str, str], None]
TYPES = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a string"}
SEEDS = "[0, 4294967295]"  # the values of a seed
LARGEST = 1 << 31  # above any whole number that is meant, where a field has no end
# Columns of a table, and their characters in `--help`, where two spaces stand between them.
COLUMNS = {"field": 19, "default": 12, "unit": 10, "values": 26, "help": 25}


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting, whose values have the type of its default: bool, int, float or str.

    `values`: an interval, such as "(0, 0.5]" or "[1, inf)"; or the strings that may be, as a table
    or function, read at each check, so that it may grow; "": the type alone matters.
    """

    name: str
    default: bool | int | float | str
    help: str
    values: str | Iterable[str] | Callable[[], Iterable[str]] = ""
    unit: str = ""

    def options(self) -> list[str]:
        """The strings that may be, as of now; [] where they are not listed."""
        named = () if isinstance(self.values, str) else self.values
        return list(named() if callable(named) else named)

    def range(self) -> str:
        """The values that may be, in words: "from 0 to 1"; "" where the type alone matters."""
        if not isinstance(self.values, str):
            return "one of " + ", ".join(map(repr, self.options()))
        if not self.values:
            return ""
        low, high = (f"{end:,.15g}" for end in _ends(self.values))
        if high == "inf":
            return f"{low} or more" if self.values[0] == "[" else f"above {low}"
        if self.values[0] == "[":
            return f"from {low} to {'' if self.values[-1] == ']' else 'below '}{high}"
        return f"above {low} and {'at most' if self.values[-1] == ']' else 'below'} {high}"

    def fault(self, value: Any) -> str:
        """What the field must be, with a value that works; "" where this value may be."""
        kind, words, options = type(self.default), self.range(), self.options()
        typed = isinstance(value, (int, float) if kind is float else kind)
        typed = typed and isinstance(value, bool) == (kind is bool)
        typed = typed and (kind is not float or math.isfinite(value))
        bounded = str(self.values).endswith("]")
        if kind is int and typed and not bounded and not abs(value) < LARGEST:
            return f"below {LARGEST:,}, for instance {self.default!r}"
        if typed and (value in options if options else self._within(value)):
            return ""
        if options:
            near = difflib.get_close_matches(str(value), options, 1)
            return words + "".join(f", for instance {name!r}" for name in near)
        words = words if typed else ", ".join(filter(None, [TYPES[kind], words]))
        return f"{words}, for instance {self.default!r}"

    def _within(self, value: Any) -> bool:
        if not isinstance(self.values, str) or not self.values:
            return True
        least, most = _ends(self.values)
        above = value >= least if self.values[0] == "[" else value > least
        return above and (value <= most if self.values[-1] == "]" else value < most)


def _ends(interval: str) -> list[float]:
    return [float(end) for end in interval[1:-1].split(", ")]


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields that stand together: `config.NAME`, or the config itself where the name is "".

    Of a whole config, check(config, need) refuses values that do not go together, each within its
    own range; unread(config) names fields that nothing reads, {name: why}.
    """

    name: str
    about: str
    fields: list[Field]
    check: Callable[[Any, Need], None] = lambda config, need: None
    unread: Callable[[Any], Mapping[str, str]] = lambda config: {}

    def path(self, name: str) -> str:
        """The field as messages and the command line name it."""
        return f"{self.name}.{name}" if self.name else name

    def of(self, config: Any) -> Any:
        """The section's part of a config."""
        return config[self.name] if self.name else config

    def defaults(self) -> ConfigDict:
        """Every field at its default."""
        return ConfigDict({field.name: field.default for field in self.fields})

    def strays(self, config: Any) -> dict[str, tuple[Field, str]]:
        """Fields that nothing reads and that are not at their defaults, by path, and why."""
        own, why = self.of(config), self.unread(config)
        fields = (f for f in self.fields if f.name in why and own[f.name] != f.default)
        return {self.path(field.name): (field, why[field.name]) for field in fields}


def value_at(config: Any, path: str) -> Any:
    """The value of "train.steps" in a config."""
    return functools.reduce(lambda part, name: part[name], path.split("."), config)


def refusals(config: Any) -> Need:
    """The `need` of a config's checks."""

    def need(holds: bool, path: str, wants: str) -> None:
        if not holds:
            raise UserError(f"{path}={value_at(config, path)!r}: must be {wants}")

    return need


def unknown(path: str, sections: Sequence[Section]) -> str:
    """What to say of a field that does not exist, with the field that may have been meant."""
    known = [section.path(field.name) for section in sections for field in section.fields]
    near = difflib.get_close_matches(path, known, 1)
    hint = f' Did you mean "{near[0]}" instead of "{path}"?' if near else ""
    return f"there is no field {path!r}.{hint}"


def check_fields(config: Any, sections: Sequence[Section]) -> None:
    """Checks each field by itself: its name, type and range. Raises UserError."""
    need, names = refusals(config), {section.name for section in sections if section.name}
    for section in sections:
        if section.name and not isinstance(config.get(section.name), ConfigDict):
            raise UserError(f"the config has no section {section.name!r}: begin with base()")
        own, fields = section.of(config), {field.name: field for field in section.fields}
        for name in sorted({*own} - {*fields} - (set() if section.name else names)):
            raise UserError(unknown(section.path(name), sections))
        for name, field in fields.items():
            if name not in own:
                raise UserError(f"the config has no {section.path(name)}: begin with base()")
            fault = field.fault(own[name])
            need(not fault, section.path(name), fault)


def check_unread(config: Any, sections: Sequence[Section]) -> None:
    """Refuses fields that nothing reads and that are not at their defaults. Raises UserError."""
    strays = {path: found for s in sections for path, found in s.strays(config).items()}
    parts = []
    for reason in dict.fromkeys(reason for _, reason in strays.values()):
        fields = {path: field.default for path, (field, why) in strays.items() if why == reason}
        given = ", ".join(f"{path}={value_at(config, path)!r}" for path in fields)
        wants = ", ".join(f"{path}={default!r}" for path, default in fields.items())
        wants = f"at their defaults ({wants})" if len(fields) > 1 else wants.partition("=")[2]
        parts.append(f"{given}: must be {wants} where {reason}")
    if parts:
        raise UserError("; ".join(parts))


def rows_of(section: Section) -> list[list[str]]:
    """The COLUMNS of each field."""
    values = [field.range().removeprefix("one of ") for field in section.fields]
    told = zip(section.fields, values, strict=True)
    return [[field.name, repr(field.default), field.unit, may, field.help] for field, may in told]


def help_text(sections: Sequence[Section]) -> str:
    """The tables as text of at most 100 columns."""
    lines, widths = [], COLUMNS.values()
    for section in sections:
        lines += ["", f"{section.name or 'config'}: {section.about}"]
        for row in rows_of(section):
            row[1] = row[1].replace(",", ", ")  # a default such as "rounds,tokens" breaks there
            cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
            cells[1] = [line.replace(", ", ",") for line in cells[1]]
            for line in itertools.zip_longest(*cells, fillvalue=""):
                lines.append("  ".join(map(str.ljust, line, widths)).rstrip())
    return "\n".join(lines)
