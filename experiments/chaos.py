"""Breaks training runs as machines and people do; checks that they end where an unbroken one ends.

    python -m experiments.chaos --rounds=20 --workdir=runs/chaos
    python -m experiments.chaos --rounds=4 --processes=4 --faults=kill,stop

For: a seeded series of faults, one in each round, each followed by the same command as before. The
faults are the functions of `FAULTS`; each says what it does. What must hold after each of them:

- a run that ends early ends with an exit code that docs/running.md names, and at most one line on
  stderr, no traceback; it ends within `GONE` seconds of its last line, and leaves no process;
- a start that is refused says why in one line; the fault is then undone;
- failed saves leave no threads and no open files in a run that goes on (`SPARE` of each);
- nothing outside the work directory is touched;
- at the end, the state's SHA-256 and all rows of metrics, except times, are those of an unbroken
  run. If a run ends early, another one uses the remaining rounds.

Faults that need a file system of their own (`full`, `inodes`, `readonly`) are left out, by name,
where it cannot be mounted. Not for: faults of a device, bad batches (tests/test_faults.py), or
files that never were ours (`fuzz.py`).
"""

import argparse
import collections
import contextlib
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator

from experiments.faults import (
    FAULTS,
    HUNG,
    INODES,
    MOUNTED,
    SIGNALS,
    SIZE,
    Fault,
    Running,
    contents,
    copy,
    mount,
    remove,
)
from ngc_jax.commands.arguments import command
from ngc_jax.runtime.checkpoint import digest
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import expand
from ngc_jax.runtime.metrics import TIMES, read_rows
from ngc_jax.runtime.preemption import EXIT_CODE, INTERRUPTED
from ngc_jax.training.load import load

Path = pathlib.Path
SPARE = 12  # threads, and open files, that a run may have more after a fault than before
FAILED, REFUSED = 1, 2
# A short run with many saves.
SHORT = """--config=configs/ngc_tiny.py --config.train.steps=80 --config.checkpoint.every_steps=10
--config.eval.every=40 --config.eval.windows=8"""


def outcome(workdir: Path) -> tuple[str, list[dict[str, object]]]:
    """SHA-256 of the final state, and all rows without their times."""
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(workdir)]
    return digest(load(workdir).state), rows


def ends_of(fault: str) -> set[int]:
    """The exit codes that a run may have after a fault: its own, or that of a signal."""
    if fault == "interrupt":
        return {0, EXIT_CODE, INTERRUPTED, -signal.SIGINT}  # the last: Python had ended already
    if fault == "fill" or fault in MOUNTED:  # its last save may fail
        return {0, FAILED}
    return {0, EXIT_CODE, -SIGNALS.get(fault, signal.SIGKILL)}


def campaign(
    home: Path,
    flags: list[str],
    rounds: int,
    faults: tuple[str, ...],
    seed: int,
    processes: int = 1,
) -> dict[str, int]:
    """Runs `rounds` rounds of these faults in turn; returns how often each occurred.

    Raises RuntimeError if a run ends otherwise than this file's first lines say.
    """
    if processes == 1:  # that each start compiles the same anew tells nothing
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "programs"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    began = time.monotonic()
    run = Running(flags, home / "unbroken", processes)
    run.began.wait(HUNG)
    training = time.monotonic()
    run.end({0})
    fault = Fault(seed, training - began, time.monotonic() - training, home)
    expected = outcome(home / "unbroken")
    count: dict[str, int] = collections.Counter()
    workdir = home / "own" / "troubled"
    runs = refused = unsaved = 0
    while sum(count.values()) < rounds:
        remove(workdir)
        code = None
        while code != 0:
            run, befell, name, undo = Running(flags, workdir, processes), "", "", fault.kept
            fault.kept = None
            if (done := sum(count.values())) < rounds:
                name = faults[done % len(faults)]
                befell = (FAULTS | MOUNTED)[name](fault, run)
            if befell:
                count[name] += 1
                print(f"round {done + 1} of {rounds}: {befell}", flush=True)
            refusal = {FAILED, REFUSED} if undo or processes > 1 else set()
            refusal |= {-signal.SIGABRT} if processes > 1 else set()  # by jax, which lost one
            code = run.end(ends_of(name) | refusal)
            unsaved += run.unsaved
            if code == 0 and not befell:  # too late, as on a machine that has become less busy
                fault.length = max(1.0, min(fault.length, run.last - run.first))
            if code in (FAILED, REFUSED) and undo and not befell:
                refused += 1
                print(f"  refused: {run.errors[0][-1]}", flush=True)
                remove(workdir)
                copy(undo, workdir)
            if contents(fault.outside) != fault.left:
                raise RuntimeError(f"{workdir}: after {befell!r}, {fault.outside} was touched")
        runs += 1
        found = outcome(workdir)
        if found != expected:
            raise RuntimeError(
                f"{workdir} ended in another state than {home / 'unbroken'}: {found[0]}, not "
                f"{expected[0]}"
            )
    if fault.most > SPARE:
        raise RuntimeError(f"failed saves left {fault.most} threads or open files")
    print(
        f"{', '.join(f'{fault}: {times}' for fault, times in count.items())}; {refused} starts "
        f"refused, {unsaved} saves failed and left at most {fault.most} threads or files; {runs} "
        f"runs, all with state sha256 {expected[0]} and the {len(expected[1])} rows of the "
        "unbroken run"
    )
    return count


@contextlib.contextmanager
def own_file_system(place: Path) -> Iterator[bool]:
    """A small file system of its own at a place; yields whether this machine lets us have one."""
    place.mkdir(parents=True)
    try:
        mount("-t", "tmpfs", "-o", f"size={SIZE},nr_inodes={INODES}", "none", place)
    except (OSError, subprocess.CalledProcessError):
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def main() -> None:
    every = {**FAULTS, **MOUNTED}
    told = "\n".join(f"  {name:10} {one.__doc__}" for name, one in every.items())
    parser = argparse.ArgumentParser(
        description=f"{(__doc__ or '').splitlines()[0]}\n\nfaults:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--faults", default=",".join(every), help="used in turn; default: all")
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=expand, default=Path("runs/chaos"), help="emptied first")
    parser.add_argument("flags", nargs="*", default=SHORT.split(), help="of launch.py, after --")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had them ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    faults = tuple(args.faults.split(","))
    if not set(faults) <= every.keys():
        raise UserError(f"--faults={args.faults}: must be some of {','.join(every)}")
    if args.processes > 1 and not set(faults) <= SIGNALS.keys():
        raise UserError(f"--faults={args.faults}: with --processes, some of {','.join(SIGNALS)}")
    home = args.workdir.absolute()
    if (home / "own").is_mount():  # a campaign was killed
        subprocess.run(["umount", "--lazy", home / "own"], check=True)
    remove(home)
    with own_file_system(home / "own") as mounted:
        missing = [name for name in faults if name in MOUNTED and not mounted]
        if missing:
            print(f"left out, since no file system can be mounted here: {', '.join(missing)}")
        here = tuple(name for name in faults if name not in missing)
        campaign(home, args.flags, args.rounds, here, args.seed, args.processes)


if __name__ == "__main__":
    command(main, goes_on=True)
