"""The report of `reasoning_kept.py`: what is solved, what stays stable, what foretells a loss.

For: tables of its records alone. A teacher, that is, a task and a seed, is the unit that is
independent of others: intervals are Student's over teachers, except where it is said that models of
a task were drawn again (bootstrap). Not for: making records.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import methodcaller
from typing import Any, NamedTuple

import numpy as np
import scipy  # scipy.stats is imported where it is used

from experiments.stats import interval
from ngc_jax.report.blocks import Block, heading, paragraph, table

Record = Mapping[str, Any]
RESAMPLES = 1000
STABILITY = ("drive", "departure", "exponent", "exponent of problems", "exponent along tokens")
ABOUT = """Exact match: the share of problems with every answer right, the mean over the \
difficulties of the test. Each cell that has ± is a mean with its 95% interval."""
PAIRED = """Sizes of changes by conversion, paired at equal share, means over teachers. Below 0: \
the first method stays closer to the teacher."""
CORRELATED = """Spearman's rank correlation of what conversion changes with the drop of exact \
match, over converted models of a task, with an interval by the bootstrap over models; those of \
one teacher are not independent. Last column: the mean over teachers of the correlation within \
each, with an interval over teachers, which are independent. A measure that foretells must do so \
at equal share too, and better than the rivals."""


class Model(NamedTuple):
    """A converted model, or a copy of its teacher, beside its teacher."""

    task: str
    seed: str
    method: str
    kept: str  # "" of a copy
    record: Record
    teacher: Record

    def exact(self, healed: bool, level: str = "") -> float:
        """Exact match, of a difficulty if one is given; a copy before healing is its teacher."""
        began = self.record if self.kept else self.teacher
        return exact(self.record["healed"] if healed else began, level)

    def change(self, name: str, healed: bool = False) -> float:
        """How far a measure is from its teacher's; "drop": what it does not solve any more."""
        if name == "drop":
            return exact(self.teacher) - self.exact(healed)
        after = self.record["healed"] if healed else self.record
        return measure(after, name) - measure(self.teacher, name)

    def size(self, name: str) -> float:
        """The size of the change by conversion, whatever its sign."""
        return abs(self.change(name))

    def before(self, name: str) -> float:
        """A measure of its teacher, or its exact match at a difficulty."""
        known = self.teacher["exact"]
        return float(known[name]) if name in known else measure(self.teacher, name)


def measure(record: Record, name: str) -> float:
    """A measure of STABILITY, or "nats"."""
    return float(record["nats"] if name == "nats" else record["stability"][name])


def exact(record: Record, level: str = "") -> float:
    """Exact match of a record at a difficulty, or the mean over all."""
    found = record["exact"]
    return float(found[level] if level else np.mean([*found.values()]))


def models(records: Mapping[str, Any], names: Iterable[str]) -> list[Model]:
    """The models of a study that have all of their records so far."""
    found, healed = [], records["settings"]["heal"] > 0
    for name in names:
        task, seed, kind = name.split(" ", 2)
        record = records.get(name, {})
        if kind != "teacher" and ("healed" if healed else "exact") in record:
            method, _, kept = kind.rpartition(" ") if " 0." in kind else (kind, "", "")
            teacher = records[f"{task} {seed} teacher"]
            found.append(Model(task, seed, method, kept, record, teacher))
    return found


def grouped(of: Iterable[Model], *fields: str) -> dict[tuple[str, ...], list[Model]]:
    """Models by some of their fields, in the order in which these first appear."""
    groups: dict[tuple[str, ...], list[Model]] = {}
    for model in of:
        groups.setdefault(tuple(getattr(model, field) for field in fields), []).append(model)
    return groups


def ordered(found: list[Model], *fields: str) -> list[tuple[tuple[str, ...], list[Model]]]:
    """The same, by task if that is among the fields, then copies first, then the largest share."""
    tasks = [*dict.fromkeys(one.task for one in found)]

    def place(group: tuple[tuple[str, ...], list[Model]]) -> tuple[int, float]:
        first = group[1][0]
        return tasks.index(first.task) if "task" in fields else 0, -float(first.kept or 1)

    return sorted(grouped(found, *fields).items(), key=place)


def over_teachers(of: Iterable[Model], value: Callable[[Model], float], digits: int = 3) -> str:
    """The mean of a value and its interval, one value a teacher."""
    by_teacher = grouped(of, "task", "seed").values()
    return interval([float(np.mean([value(one) for one in own])) for own in by_teacher], digits)


# ---- What is solved ------------------------------------------------------------------------------


def solved(found: list[Model], states: Sequence[bool]) -> Block:
    """Exact match by task, share and method, and both counts of numbers."""
    rows = []
    for (task, kept, method), own in ordered(found, "task", "kept", "method"):
        numbers = [one.record.get("numbers", {}) for one in own]
        shares = [
            f"{np.mean([of[name] / of['dense'] for of in numbers]):.3f}" if kept else "1"
            for name in ("led", "factored")
        ]
        values = [over_teachers(own, methodcaller("exact", state)) for state in states]
        rows.append([task, kept or "1", method, *shares, *values])
    told = ["converted", "healed"][: len(states)]
    return table(["task", "kept", "method", "r(m+n-r)", "r(m+n)", *told], rows)


def by_difficulty(own: list[Model], states: Sequence[bool]) -> Block:
    """Exact match on a task at each difficulty, before and after healing."""
    levels = [*own[0].teacher["exact"]]
    teacher = [over_teachers(own, methodcaller("before", level)) for level in levels]
    rows = [["1", "teacher", *teacher]]
    for (kept, method), group in ordered(own, "kept", "method"):
        cells = [[np.mean([m.exact(s, level) for m in group]) for s in states] for level in levels]
        rows.append([kept or "1", method, *(" / ".join(f"{v:.3f}" for v in of) for of in cells)])
    return table(["kept", "method", *levels], rows)


# ---- What stays stable ---------------------------------------------------------------------------


def of_teachers(found: list[Model]) -> Block:
    """The measures of the teachers, by task."""
    rows = [
        [task, *(over_teachers(own, methodcaller("before", name)) for name in STABILITY)]
        for (task,), own in grouped(found, "task").items()
    ]
    return table(["task", *STABILITY], rows)


def changes(found: list[Model], states: Sequence[bool]) -> Block:
    """How conversion, and then healing, changes each measure, over all tasks."""
    rows = []
    for state in states:
        here = [one for one in found if one.kept or state]  # a copy is changed by healing alone
        for (kept, method), own in ordered(here, "kept", "method"):
            cells = [over_teachers(own, methodcaller("change", name, state)) for name in STABILITY]
            rows.append(["healed" if state else "converted", kept or "1", method, *cells])
    return table(["state", "kept", "method", *STABILITY], rows)


def against_others(found: list[Model], ours: str) -> Block:
    """Size of a change by `ours`, minus that by each other method, paired at equal shares."""
    names = (*STABILITY, "drop")
    place = {(one.task, one.seed, one.kept, one.method): one for one in found if one.kept}
    rows = []
    for method in dict.fromkeys(one.method for one in place.values() if one.method != ours):
        pairs: dict[tuple[str, str], list[list[float]]] = {}
        for (task, seed, kept, of), one in place.items():
            other = place.get((task, seed, kept, method))
            if of == ours and other:
                more = [one.size(name) - other.size(name) for name in STABILITY]
                more.append(one.change("drop") - other.change("drop"))
                pairs.setdefault((task, seed), []).append(more)
        means = [np.mean(values, axis=0) for values in pairs.values()]
        rows.append([method, *(interval([float(m[i]) for m in means]) for i in range(len(names)))])
    return table([f"{ours} minus", *STABILITY, "drop of exact match"], rows)


# ---- What foretells a loss -----------------------------------------------------------------------


def rank_correlation(x: Any, y: Any, cells: Any = None) -> Any:
    """Spearman's rho of arrays [..., N] over their last axis: [...]; nan where one does not vary.

    cells: whole numbers [..., N]; of the ranks counts what is left when the mean of each cell is
    taken away, so that what differs between cells alone explains nothing.
    """
    x, y = np.asarray(x), np.asarray(y)
    ranks = [scipy.stats.rankdata(np.round(values, 12), axis=-1) for values in (x, y)]
    cells = np.zeros(x.shape, int) if cells is None else np.asarray(cells)
    among = (cells[..., None] == np.unique(cells)).astype(float)  # [..., N, cells]
    count = np.maximum(among.sum(axis=-2), 1)
    a, b = (
        of - (among @ ((of[..., None, :] @ among)[..., 0, :] / count)[..., None])[..., 0]
        for of in ranks
    )
    size = np.sqrt(np.sum(a**2, axis=-1) * np.sum(b**2, axis=-1))
    return np.where(size > 1e-9, np.sum(a * b, axis=-1) / np.where(size > 1e-9, size, 1), np.nan)


def resampled(x: Any, y: Any, cells: Any) -> str:
    """Spearman's rho and its 95% percentile interval, models drawn again."""
    at = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    if np.isnan(rho := rank_correlation(x, y, cells)):
        return "-"
    low, high = np.nanquantile(rank_correlation(x[at], y[at], cells[at]), [0.025, 0.975])
    return f"{rho:.2f} [{low:.2f}, {high:.2f}]"


def foretold(found: list[Model], healed: bool, equal: bool) -> Block:
    """Spearman's rho of what conversion changes with the drop, before or after healing.

    equal: at equal share, of what is left of ranks without the mean of each share.
    """
    found = [one for one in found if one.kept]
    signals: dict[str, Callable[[Model], float]] = {}
    for name in STABILITY:
        signals[name] = methodcaller("change", name)
        signals[f"{name}, size"] = methodcaller("size", name)
    signals["nats per answer (rival)"] = methodcaller("change", "nats")
    if not equal:
        signals["share taken away (rival)"] = lambda one: 1 - float(one.kept)

    def arrays(of: list[Model], signal: Callable[[Model], float]) -> list[np.ndarray]:
        drops = [one.change("drop", healed) for one in of]
        cells = [float(one.kept) if equal else 0.0 for one in of]
        return [np.array(values) for values in ([*map(signal, of)], drops, cells)]

    by_task, rows = grouped(found, "task"), []
    for name, signal in signals.items():
        each = [
            float(rank_correlation(*arrays(own, signal)))
            for own in grouped(found, "task", "seed").values()
        ]
        cells = [resampled(*arrays(own, signal)) for own in by_task.values()]
        rows.append([name, *cells, interval([rho for rho in each if not np.isnan(rho)], 2)])
    return table(["change", *(task for (task,) in by_task), "within a teacher, all tasks"], rows)


# ---- The page ------------------------------------------------------------------------------------


def report(records: Mapping[str, Any], names: Sequence[str]) -> str:
    """The report of the records of these names so far, as Markdown; "" where there are none."""
    found, settings = models(records, names), records["settings"]
    if not any(one.kept for one in found):
        return ""
    states = [False, True] if settings["heal"] else [False]
    methods = [one.method for one in found if one.kept]
    ours = "ngc" if "ngc" in methods else methods[0]
    told = (
        f"{ABOUT} {settings['problems']} problems of each difficulty; calibrated on "
        f"{settings['tokens']:,} tokens; healed for {settings['heal']} updates by the teacher. "
        "copy: the dense teacher, healed by itself; copy, answers: by the right answers."
    )
    blocks = [heading("What conversion leaves of reasoning", level=1), paragraph(told)]
    blocks += [heading("Exact match"), solved(found, states), heading("By difficulty")]
    blocks += [
        paragraph(" / ".join(["Converted", "healed"][: len(states)]) + ": means over seeds.")
    ]
    for (task,), own in grouped(found, "task").items():
        blocks += [heading(task, level=3), by_difficulty(own, states)]
    blocks += [heading("Stability of the teachers"), of_teachers(found)]
    blocks += [heading("What changes, over all tasks"), changes(found, states)]
    blocks += [heading(f"Does what {ours} keeps stay more stable?"), paragraph(PAIRED)]
    blocks += [against_others(found, ours), heading("Is a loss foretold?"), paragraph(CORRELATED)]
    for state in states:
        for equal in (False, True):
            among = "at equal share" if equal else "all shares"
            blocks += [heading(f"Drop {'after' if state else 'before'} healing, {among}", level=3)]
            blocks += [foretold(found, state, equal)]
    return "\n\n".join(block.markdown for block in blocks) + "\n"
