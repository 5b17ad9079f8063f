"""Run a study: train what is missing, several runs at a time, and go on from wherever it was.

    python -m experiments.run STUDY [--workdir=DIR] [--jobs=N] [--index=I --count=N] [--dry] [--report] [--larger]
                              [--config.FIELD=VALUE ...]

STUDY is a file of experiments/ by name, or the path of a file of yours. Every run is an ordinary
`launch.py` run on its own share of the cores. A run that fails is marked with its error and stops
no other; the same command tries it again. For array jobs, `--index=I --count=N` takes every Nth
group of runs. `--config.FIELD=VALUE` changes all runs of a study, which must then have a folder of
its own; `--larger` sets what makes the study worth an accelerator. Kept in DIR: a folder and a log
of each run, compiled programs, records/RUN.json, after which a run's folder may go unless the study
itself looks into it, and, when all is done, the report (`report.py`). Not for: what a study is
(`study.py`).
"""

import argparse
import concurrent.futures
import functools
import json
import math
import os
import pathlib
import platform
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.console import Group as Lines
from rich.live import Live
from rich.table import Table

from experiments.report import report
from experiments.study import (
    LOSS,
    Group,
    Results,
    Run,
    Study,
    find,
    groups,
    plan,
    prepared,
    read_records,
)
from ngc_jax.commands.arguments import command
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import write_durably
from ngc_jax.runtime.metrics import duration, latest, read_rows
from ngc_jax.runtime.preemption import EXIT_CODE
from ngc_jax.training.costs import versions
from ngc_jax.training.workdir import in_use

ROOT = pathlib.Path(__file__).parent.parent
DIVERGED = 3  # launch.py's exit code
Record = dict[str, Any]


def execute(
    study: Study, reference: str, home: pathlib.Path, jobs: int, mine: Sequence[Group]
) -> dict[str, Record]:
    """Train what is missing of these groups; returns all records of the study's folder, by run.

    `reference` is what `find` finds the study by. Raises UserError where a record is of another
    study, and KeyboardInterrupt, with every run saved, when told to stop.
    """
    records = read_records(home)
    tried: set[str] = set()  # since this start: what failed before is tried again
    running: dict[str, subprocess.Popen[bytes]] = {}
    stopping = threading.Event()
    # Seeds differ in no program: one compiles it for the others, on this machine, since another
    # one's may not suit it.
    env = {"JAX_COMPILATION_CACHE_DIR": str(home / "programs" / platform.node()), **os.environ}
    available = sorted(os.sched_getaffinity(0))
    cores: queue.Queue[set[int]] = queue.Queue()
    for job in range(jobs):
        cores.put(set(available[job::jobs] or available))

    def python(run: Run, *line: str, on: set[int]) -> int:
        """Run Python on some cores, its words going to the run's log; its exit code."""
        with open(home / "logs" / f"{run.name}.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, *line], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT
            )
            os.sched_setaffinity(process.pid, on)  # long before it starts threads, which inherit it
            running[run.name] = process
            if stopping.is_set():
                process.terminate()
            code = process.wait()
            del running[run.name]
        if code == EXIT_CODE:
            stopping.set()
        return code

    def train(run: Run) -> Record | None:
        """Train and measure one run; its record, or None where it was told to stop."""
        workdir = home / run.name
        while in_use(workdir) and not stopping.is_set():
            time.sleep(1)  # a process that an earlier start, killed, has left behind
        on = cores.get()
        try:
            line = ["launch.py", *flags(study, run), f"--workdir={workdir}"]
            code, measures, curve = python(run, *line, on=on), {}, []
            if code == DIVERGED:
                code, measures = 0, {LOSS: math.inf}
            elif not code:
                rows = read_rows(workdir)
                loss = latest(rows)["final/loss"]
                measures = {LOSS: math.inf if loss is None else loss}
                curve = [[row["step"], row["eval/loss"]] for row in rows if row.get("eval/loss")]
                if study.measure and not run.trial:
                    out = home / "measures" / f"{run.name}.json"
                    code = python(
                        run, "-m", "experiments.measure", reference, str(workdir), str(out), on=on
                    )
                    measures |= {} if code else json.loads(out.read_text())
        finally:
            cores.put(on)
        if stopping.is_set():
            return None
        said = (home / "logs" / f"{run.name}.txt").read_text(errors="replace").strip()
        final = said.rpartition("\n")[2]
        data = re.findall(r"^data: (.*)$", said, re.MULTILINE)
        return {
            "fields": dict(run.fields),
            "command": shlex.join(["python", *line]),
            "commit": commit(),
            "versions": versions(),
            "data": data[-1] if data else "",
            "measures": measures,
            "curve": curve,
            "error": f"exit code {code}: {final}" if code else "",
        }

    began, console = time.monotonic(), Console()
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    at_work: dict[concurrent.futures.Future[Record | None], Run] = {}
    before = len([name for name in records if not records[name]["error"]])
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            while not stopping.is_set():
                wanted = plan(study, mine, losses(records))
                for run in wanted:
                    check(home, run, records.get(run.name))
                    missing = run.name not in tried and (
                        run.name not in records or records[run.name]["error"]
                    )
                    # no more yet: a group's runs come before the next group's
                    if missing and len(at_work) < jobs:
                        tried.add(run.name)
                        at_work[pool.submit(train, run)] = run
                if not at_work:
                    return records
                finished, _ = concurrent.futures.wait(
                    at_work, 2.0, concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    run, record = at_work.pop(future), future.result()
                    if record:
                        records[run.name] = record
                        write_durably(
                            home / "records" / f"{run.name}.json",
                            json.dumps(record, indent=1) + "\n",
                        )
                        console.print(ending(run.name, record), highlight=False)
                if console.is_terminal:
                    live.update(
                        progress(home, wanted, [*running], records, began, before), refresh=True
                    )
        finally:
            stopping.set()
            for process in [*running.values()]:
                process.terminate()
            pool.shutdown()
    raise KeyboardInterrupt


def flags(study: Study, run: Run) -> list[str]:
    """A run's arguments, but for its folder."""
    return [f"--config=configs/{study.config}.py", *settings(run.fields)]


def settings(fields: Mapping[str, Any]) -> list[str]:
    """Fields as a command line sets them."""
    return [f"--config.{name}={value}" for name, value in fields.items()]


def losses(records: Mapping[str, Record]) -> dict[str, float]:
    """Those known so far; of a run that diverged or failed it is inf."""
    return {name: record["measures"].get(LOSS, math.inf) for name, record in records.items()}


def check(home: pathlib.Path, run: Run, record: Record | None) -> None:
    """Raise UserError where a run was made, under its name, with other fields than it has now."""
    fields = json.loads(json.dumps(dict(run.fields)))
    if record and record["fields"] != fields:
        changed = [
            k for k in sorted(fields | record["fields"]) if fields.get(k) != record["fields"].get(k)
        ]
        raise UserError(
            f"{run.name} in --workdir={home} was made with other fields ({', '.join(changed)}): give another "
            f"--workdir, or remove its folder and records/{run.name}.json"
        )


@functools.cache
def commit() -> str:
    """The commit of this repository, and whether files differ from it; "" where there is none."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        head, changed = (
            git(["git", "rev-parse", "--short=12", "HEAD"]),
            git(["git", "status", "--porcelain"]),
        )
    except FileNotFoundError:
        return ""
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def ending(name: str, record: Record) -> str:
    """What to say when a run has ended."""
    measures = ", ".join(f"{measure} {value:.4f}" for measure, value in record["measures"].items())
    return f"{name}: FAILED: {record['error']}" if record["error"] else f"{name}: {measures}"


def progress(
    home: pathlib.Path,
    wanted: Sequence[Run],
    running: Sequence[str],
    records: Mapping[str, Record],
    began: float,
    before: int,
) -> Lines:
    """The live view: what runs now, and how far everything is."""
    table = Table("run", "update", "loss", box=None, header_style="bold")
    for name in sorted(running):
        rows = [row for row in read_rows(home / name) if "train/loss" in row]
        step, loss = (
            (str(rows[-1]["step"]), f"{rows[-1]['train/loss'] or math.nan:.4f}")
            if rows
            else ("", "")
        )
        table.add_row(name, step, loss)
    failed = [run.name for run in wanted if run.name in records and records[run.name]["error"]]
    done = len([run for run in wanted if run.name in records]) - len(failed)
    made = max(0, done - before)
    left = (
        f"ETA {duration((time.monotonic() - began) / made * (len(wanted) - done))}" if made else ""
    )
    return Lines(table, f"{done} of {len(wanted)} runs done, {len(failed)} failed  {left}")


def arguments(about: str | None) -> argparse.ArgumentParser:
    """What each command that runs a study takes."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--workdir", type=pathlib.Path, help="default: runs/STUDY")
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="runs at a time; default: cores",
    )
    parser.add_argument("--index", type=int, help="take groups index, index + count, ... only")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="say what would run, and run nothing")
    parser.add_argument(
        "--report", action="store_true", help="report what there is so far, and run nothing"
    )
    return parser


def carry_out(
    study: Study,
    reference: str,
    name: str,
    about: str,
    args: argparse.Namespace,
    changes: Sequence[str],
) -> None:
    """Do what the command line asks, and report where that was all of the study; `about` as in
    `report`.

    Exits as `launch.py` does, with 1 where runs failed.
    """
    home = (args.workdir or pathlib.Path("runs") / name).absolute()
    study = prepared(study, home, changes)
    everything = groups(study)
    mine = everything if args.index is None else everything[args.index :: args.count]
    if args.dry:
        records = read_records(home)
        for run in plan(study, mine, losses(records)):
            state = (
                ending(run.name, records[run.name]) if run.name in records else f"{run.name}: to do"
            )
            print(
                f"{state}\n    python launch.py {shlex.join(flags(study, run))} --workdir={home / run.name}"
            )
        return
    if args.report:
        print(report(Results(study, home, everything, read_records(home)), about))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        records = execute(study, reference, home, args.jobs, mine)
    except KeyboardInterrupt:
        print("asked to stop: every run is saved; the same command goes on from there", flush=True)
        sys.exit(EXIT_CODE)
    if args.index is None:
        print(report(Results(study, home, everything, dict(sorted(records.items()))), about))
    failed = [
        run.name
        for run in plan(study, mine, losses(records))
        if records.get(run.name, {}).get("error")
    ]
    if failed:
        print(
            f"{len(failed)} runs failed: {', '.join(failed)}; their logs are in {home / 'logs'}",
            file=sys.stderr,
        )
        sys.exit(1)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("study", help="a file of experiments/ by name, or a file.py of yours")
    parser.add_argument(
        "--larger", action="store_true", help="in the study's setting for an accelerator"
    )
    args, changes = parser.parse_known_args()
    name, study, about = find(args.study)
    if args.larger:
        if not study.larger:
            raise UserError(
                f"--larger: {name} has no larger setting: set fields by --config.FIELD=VALUE"
            )
        name, changes = f"{name}-larger", [*settings(study.larger), *changes]
    carry_out(study, args.study, name, about, args, changes)


if __name__ == "__main__":
    command(main)
