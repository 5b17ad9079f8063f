"""Run a study: train the missing runs, several at a time, and continue from any state.

    python -m experiments.run STUDY [--workdir=DIR] [--jobs=N] [--index=I --count=N]
                              [--dry] [--report] [--larger] [--config.FIELD=VALUE ...]

Installed: `ngc study STUDY ...`. STUDY is a file of experiments/ by name, or the path of your file.
Every run is a `launch.py` run on its own part of the cores. A run that fails gets a record with its
error; the others continue, and the same command tries it again. For array jobs, `--index=I
--count=N` takes every Nth group.
`--config.FIELD=VALUE` sets a field of all runs; such a study needs its own folder. `--larger` uses
the study's setting for an accelerator. DIR keeps a folder and a log of each run, compiled programs,
and records/RUN.json. A run's folder may be deleted after that, unless the study reads it. When all
runs have ended, the report is written (`report.py`). Not for: the description of studies
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

from experiments.arguments import of_a_study
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
from ngc_jax.runtime.files import ROOT, expand, make_private, write_durably
from ngc_jax.runtime.metrics import duration, latest, read_rows
from ngc_jax.runtime.output import now
from ngc_jax.runtime.preemption import EXIT_CODE
from ngc_jax.training.workdir import in_use, versions

DIVERGED = 3  # launch.py's exit code
Record = dict[str, Any]


def execute(
    study: Study, reference: str, home: pathlib.Path, jobs: int, mine: Sequence[Group]
) -> dict[str, Record]:
    """Train the missing runs of these groups; returns all records of the study's folder, by run.

    reference: the study's name or path, for `find`. Raises UserError for a record of another study,
    and KeyboardInterrupt, after every run is saved, on a signal to stop.
    """
    records = read_records(home)
    tried: set[str] = set()  # since this start; earlier failures are tried again
    running: dict[str, subprocess.Popen[bytes]] = {}
    stopping = threading.Event()
    env = {"JAX_COMPILATION_CACHE_DIR": kept_programs(), **os.environ}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    available = sorted(os.sched_getaffinity(0))
    cores: queue.Queue[set[int]] = queue.Queue()
    for job in range(jobs):
        cores.put(set(available[job::jobs] or available))

    def python(run: Run, *line: str, on: set[int]) -> int:
        """Run Python on some cores, with its output in the run's log; returns the exit code."""
        with open(home / "logs" / f"{run.name}.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", *line], env=env, stdout=log, stderr=subprocess.STDOUT
            )
            os.sched_setaffinity(process.pid, on)  # before it starts threads, which inherit it
            running[run.name] = process
            if stopping.is_set():
                process.terminate()
            code = process.wait()
            del running[run.name]
        if code == EXIT_CODE:
            stopping.set()
        return code

    def train(run: Run) -> Record | None:
        """Train and measure one run; returns its record, or None after a signal to stop."""
        workdir = home / run.name
        while in_use(workdir) and not stopping.is_set():
            time.sleep(1)  # a process of an earlier, killed start is still at work
        on = cores.get()
        try:
            line = [str(ROOT / "launch.py"), *flags(study, run), f"--workdir={workdir}"]
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
                    measures |= {} if code else json.loads(out.read_text("utf-8"))
        finally:
            cores.put(on)
        if stopping.is_set():
            return None
        said = (home / "logs" / f"{run.name}.txt").read_text("utf-8", errors="replace").strip()
        final = said.rpartition("\n")[2]
        data = re.findall(r"^data: (.*)$", said, re.MULTILINE)
        return {
            "fields": dict(run.fields),
            "command": shlex.join(["python", "launch.py", *line[1:]]),
            "commit": commit(),
            "versions": versions(),
            "data": data[-1] if data else "",
            "measures": measures,
            "curve": curve,
            "error": f"exit code {code}: {final}" if code else "",
        }

    began, console = time.monotonic(), Console()
    now("")  # the table below tells what is done
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
                    # in the order of groups
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
            now("waiting for runs at work to be saved")
            stopping.set()
            for process in [*running.values()]:
                process.terminate()
            pool.shutdown()
    raise KeyboardInterrupt


def kept_programs() -> str:
    """The folder of compiled programs that all studies on this machine share. Raises UserError."""
    # All seeds share one compiled program, but machines do not: theirs may differ.
    # Not in the study's folder: programs are code, and a folder may be someone else's.
    programs = expand("~/.cache/ngc_jax/studies")
    try:
        make_private(programs.parent)
        make_private(programs)
    except OSError as error:
        raise UserError(f"compiled programs cannot be kept: {error}") from error
    return str(programs / platform.node())


def flags(study: Study, run: Run) -> list[str]:
    """A run's arguments, except its folder."""
    return [f"--config={study.config}", *settings(run.fields)]


def settings(fields: Mapping[str, Any]) -> list[str]:
    """Fields as arguments of a command line."""
    return [f"--config.{name}={value}" for name, value in fields.items()]


def losses(records: Mapping[str, Record]) -> dict[str, float]:
    """The losses known so far; inf for a run that diverged or failed."""
    return {name: record["measures"].get(LOSS, math.inf) for name, record in records.items()}


def check(home: pathlib.Path, run: Run, record: Record | None) -> None:
    """Raise UserError if the record of a run has other fields than the run has now."""
    fields = json.loads(json.dumps(dict(run.fields)))
    if record and record["fields"] != fields:
        changed = [
            k for k in sorted(fields | record["fields"]) if fields.get(k) != record["fields"].get(k)
        ]
        raise UserError(
            f"{run.name} in --workdir={home} was made with other fields ({', '.join(changed)}): "
            f"give another --workdir, or remove its folder and records/{run.name}.json"
        )


@functools.cache
def commit() -> str:
    """The commit of this repository, and whether files differ from it; "" without a repository."""
    if not (ROOT / ".git").exists():  # installed: another's repository may be around it
        return ""
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
    """The message at the end of a run."""
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
    """The live view: the runs at work, and the progress of the study."""
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


def carry_out(
    study: Study,
    reference: str,
    name: str,
    about: str,
    args: argparse.Namespace,
    changes: Sequence[str],
) -> None:
    """Do what the command line asks; if that completes the study, write its report.

    about: as in `report`. Exits as `launch.py` does, with 1 if runs failed.
    """
    home = (args.workdir or pathlib.Path("runs") / name).absolute()
    if args.index is not None and args.index >= args.count:
        raise UserError(f"--index={args.index}: must be below --count={args.count}")
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
                f"{state}\n    python launch.py {shlex.join(flags(study, run))} "
                f"--workdir={shlex.quote(str(home / run.name))}"
            )
        return
    if args.report:
        print(report(Results(study, home, everything, read_records(home)), about))
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as in the background
            signal.signal(number, signal.default_int_handler)
    try:
        records = execute(study, reference, home, args.jobs, mine)
    except KeyboardInterrupt:
        print("stopped: every run is saved; the same command continues", flush=True)
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
    args, changes = of_a_study().parse_known_args()
    name, study, about = find(args.study)
    if args.larger:
        if not study.larger:
            raise UserError(
                f"--larger: {name} has no larger setting: set fields with --config.FIELD=VALUE"
            )
        name, changes = f"{name}-larger", [*settings(study.larger), *changes]
    carry_out(study, args.study, name, about, args, changes)


if __name__ == "__main__":
    command(main, goes_on=True)
