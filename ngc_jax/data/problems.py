"""Sets of problems: drawn once from a seed, kept as a TFDS set, with tests held apart.

For: how many problems of which difficulty a set has, and the one part that each may be in, again
and again if it is easy. Not for: what a problem is (`tasks.py`).
"""

import hashlib
import json
import linecache
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ngc_jax.data import NOTHING, grids, stored, tasks
from ngc_jax.data.batches import Batch, segments_of
from ngc_jax.data.cache import entry
from ngc_jax.data.tasks import Problem
from ngc_jax.runtime.errors import UserError

PARTS = {0: "validation", 1: "test"}  # by the hash modulo ten; the rest is "train"
PATIENCE = 10_000  # problems drawn in vain, one after another, that say that there are none


class Problems:
    """A part of a set, as examples of `length` tokens; padding follows the token `boundary`."""

    def __init__(self, home: pathlib.Path, part: str, length: int, boundary: int | None = None):
        self.source, self.length, self.boundary = stored.read(home, part), length, boundary

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        problem = self.source[int(index)]["problem"]
        inputs, targets = np.array([[0], [NOTHING]], np.int32).repeat(self.length, axis=1)
        inputs[: problem.shape[1]], targets[: problem.shape[1]] = problem
        return Batch(inputs, targets, segments_of(inputs, self.boundary))


class ProblemSet(NamedTuple):
    """Where a set is kept, and what there is to know of it."""

    home: pathlib.Path
    fingerprint: str  # sha256, hex: equal fingerprints are equal problems
    longest: int  # tokens of its longest problem
    summary: str  # one line for the log and the card


def part_of(problem: Problem) -> str:
    """The one part that a problem may be in, by a hash of what it gives to read."""
    # Not a cyclic code, whose bits are parities: they would tell part of the answer to `parity`.
    digest = hashlib.sha256(problem.inputs.astype("<i4").tobytes()).digest()
    return PARTS.get(int.from_bytes(digest[:8], "little") % 10, "train")


def draw_set(
    task: str, low: int, high: int, counts: Mapping[str, int], seed: int
) -> dict[str, list[Problem]]:
    """Problems for each part, of random difficulties. Raises UserError if there are too few."""
    rng = np.random.default_rng([seed, low, high])
    drawn: dict[str, list[Problem]] = {part: [] for part in counts}
    vain = 0
    while any(len(drawn[part]) < count for part, count in counts.items()):
        problem = tasks.draw(task, rng, int(rng.integers(low, high + 1)))
        part = part_of(problem)
        wanted = len(drawn.get(part, ())) < counts.get(part, 0)
        if wanted:
            drawn[part].append(problem)
        vain = 0 if wanted else vain + 1
        if vain == PATIENCE:
            missing = " and ".join(p for p, count in counts.items() if len(drawn[p]) < count)
            raise UserError(
                f"data.task={task!r} has too few problems of difficulty {low} to {high} to have "
                f"one for {missing}: give harder ones, for instance data.high={high + 3}"
            )
    return drawn


def problem_set(
    task: str, low: int, high: int, counts: Mapping[str, int], seed: int, cache: pathlib.Path
) -> ProblemSet:
    """The set that `draw_set` draws, from the cache if it was drawn before. Raises UserError."""
    # What draws is part of the name, so that no set of an older program is taken for this one's.
    writer: Any = tasks.TASKS[task].write  # of any file, also one that is no module
    files = [__file__, str(grids.__file__), str(tasks.__file__), writer.__code__.co_filename]
    drawers = ["".join(linecache.getlines(file)) for file in files]
    recipe = json.dumps([task, low, high, dict(counts), seed, np.__version__, drawers])
    name = f"{task}-{low}-{high}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"

    def write(home: pathlib.Path) -> None:
        drawn, digest = draw_set(task, low, high, counts, seed), hashlib.sha256()
        splits = {
            part: [(str(i), {"problem": np.stack(p)}) for i, p in enumerate(problems)]
            for part, problems in drawn.items()
        }
        for part, examples in splits.items():
            for _, example in examples:
                digest.update(part.encode() + example["problem"].astype("<i4").tobytes())
        stored.write(task, _feature, splits, home)
        longest = max(len(problem.inputs) for problems in drawn.values() for problem in problems)
        meta = {"fingerprint": digest.hexdigest(), "longest": longest}
        (home / "set.json").write_text(json.dumps(meta), encoding="utf-8")

    home = entry(cache, name, write)
    meta = json.loads((home / "set.json").read_text("utf-8"))
    fingerprint, longest = meta["fingerprint"], meta["longest"]
    parts = ", ".join(f"{count} {part}" for part, count in counts.items())
    of = f"{task} of {low} to {high} {tasks.TASKS[task].unit}, seed {seed}: {parts} problems"
    summary = f"{of} of up to {longest} tokens, fingerprint {fingerprint[:16]}"
    return ProblemSet(home, fingerprint, longest, summary)


def _feature(kind: Any) -> Any:
    return {"problem": kind.Tensor(shape=(2, None), dtype=np.int32, encoding=kind.Encoding.BYTES)}
