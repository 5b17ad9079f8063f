"""Train many runs, as many at a time as asked for, each an ordinary `launch.py` run on its own share of the cores.

For: what the studies here have in common. Killed, the same call goes on where it was, for each run does. Not for: what
is compared, or reading results.
"""

import argparse
import concurrent.futures
import math
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ngc_jax.metrics import read_rows

DIVERGED = 3  # launch.py's exit code
ROOT = pathlib.Path(__file__).parent.parent


def options(about: str | None, workdir: str) -> argparse.ArgumentParser:
    """What each study's command line has; `about` is the study's own docstring."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path(workdir))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, the cores divided among them")
    return parser


def flags(config: str, fields: dict[str, Any]) -> list[str]:
    """The flags of a run: a config file, and the fields in which the run differs from it."""
    return [f"--config={config}", *(f"--config.{name}={value}" for name, value in fields.items())]


def train(home: pathlib.Path, runs: dict[str, list[str]], jobs: int) -> dict[str, float]:
    """Run `launch.py` with each list of flags in home/<name>; returns each one's loss on the whole held-out text.

    That of a run that diverges is inf. Raises RuntimeError, with the command, for a run that fails otherwise.
    """
    available = sorted(os.sched_getaffinity(0))
    cores: queue.Queue[set[int]] = queue.Queue()
    for job in range(jobs):
        cores.put(set(available[job::jobs] or available))

    def one(name: str) -> float:
        mine = cores.get()
        try:
            command = [sys.executable, "launch.py", *runs[name], f"--workdir={home / name}"]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
                os.sched_setaffinity(process.pid, mine)  # long before it starts threads, which inherit it
        finally:
            cores.put(mine)
        if process.returncode == DIVERGED:
            return math.inf
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode} from: {' '.join(command)}")
        loss = next(row["final/loss"] for row in reversed(read_rows(home / name)) if "final/loss" in row)
        print(f"{name}: {loss:.4f}", flush=True)
        return loss

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return dict(zip(runs, pool.map(one, runs), strict=True))


TUNING_SEED = 1000  # of the runs that try a learning rate; used for nothing else
FURTHER = 2  # learning rates beyond those given that may be tried


class Tuned(NamedTuple):
    """What came of a model whose learning rate was chosen."""

    tried: dict[float, float]  # learning rate -> loss of the short run that tried it; {} where there was one rate only
    rate: float  # the best of them
    losses: list[float]  # one a seed, at full length


def tune(
    home: pathlib.Path,
    rates: Mapping[str, Sequence[float]],
    run: Callable[[str, float, int, float], list[str]],
    *,
    seeds: Sequence[int],
    share: float,
    jobs: int,
) -> dict[str, Tuned]:
    """Try each model's learning rates at a `share` of the length, then train it at the best with each seed.

    Where the best is the first or the last of a model's, one beyond it is tried, as far again, at most FURTHER times:
    the rule is the same for all. A model with one rate has none tried. run(model, rate, seed, share of the length)
    gives the flags of a run.
    """
    tried: dict[str, dict[float, float]] = {model: {} for model in rates}
    wanted = {model: list(some) if len(some) > 1 else [] for model, some in rates.items()}
    for _ in range(FURTHER + 1):
        short = {f"tune-{m}-{r:g}": run(m, r, TUNING_SEED, share) for m in rates for r in wanted[m]}
        found = train(home, short, jobs)
        for model in rates:
            tried[model] |= {rate: found[f"tune-{model}-{rate:g}"] for rate in wanted[model]}
        wanted = {model: beyond(tried[model]) for model in rates}
    best = {m: min(tried[m], key=tried[m].__getitem__, default=rates[m][0]) for m in rates}
    final = train(home, {f"{m}-seed{seed}": run(m, best[m], seed, 1.0) for seed in seeds for m in rates}, jobs)
    return {m: Tuned(tried[m], best[m], [final[f"{m}-seed{seed}"] for seed in seeds]) for m in rates}


def beyond(tried: Mapping[float, float]) -> list[float]:
    """The learning rate to try next, if any, after these gave these losses: one beyond the end at which the best is."""
    ordered = sorted(tried)
    if len(ordered) < 2:
        return []
    best = min(ordered, key=tried.__getitem__)
    if best == ordered[-1]:
        return [best * best / ordered[-2]]
    return [best * best / ordered[1]] if best == ordered[0] else []
