"""Break training runs as machines do, and check that they end where an unbroken run ends:

    python -m experiments.chaos --rounds=20 --faults=kill,stop,damage,fill --workdir=runs/chaos

For: a seeded series of faults, one in each round, each followed by the same command as before:

    kill    SIGKILL at a random time, every second time while a checkpoint is written
    stop    SIGTERM at a random time
    damage  SIGKILL, then a flipped byte, a cut or a removed file in the newest checkpoint
    fill    no file can grow (RLIMIT_FSIZE, as on a full disk) for a random time

At the end of each run, the state's SHA-256 and all rows of metrics, except times, must equal those
of an unbroken run. If a run ends early, another one uses the remaining rounds. Not for: faults of a
device, bad batches (tests/test_faults.py), or several processes.
"""

import argparse
import collections
import contextlib
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

from ngc_jax.commands.arguments import command
from ngc_jax.runtime.checkpoint import digest
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import TIMES, read_rows
from ngc_jax.runtime.preemption import EXIT_CODE
from ngc_jax.training.load import load

ROOT = pathlib.Path(__file__).parent.parent
Process = subprocess.Popen[str]
FULL = "the disk was full for a while"
FAULTS = ("kill", "stop", "damage", "fill")


def outcome(workdir: pathlib.Path) -> tuple[str, list[dict[str, object]]]:
    """SHA-256 of the final state, and all rows without their times."""
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(workdir)]
    return digest(load(workdir).state), rows


def start(flags: list[str], workdir: pathlib.Path) -> Process:
    line = [sys.executable, "launch.py", *flags, f"--workdir={workdir}"]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def await_training(process: Process) -> bool:
    """Read until the first update is reported; False if the run ended before."""
    assert process.stdout
    return any(line.startswith("step ") for line in process.stdout)


def await_write(process: Process, checkpoints: pathlib.Path) -> bool:
    """Return when a checkpoint is being written; False if the run ended first."""
    while process.poll() is None:
        if any("tmp" in path.name for path in checkpoints.glob("*")):
            return True
        time.sleep(0.0005)
    return False


class Chaos:
    """The faults: each method waits, breaks the run, and returns what it did ("" = too late)."""

    def __init__(self, seed: int, start_up: float, length: float):
        self.chance, self.start_up, self.length = random.Random(seed), start_up, length
        self.kills = 0

    def kill(self, process: Process, workdir: pathlib.Path) -> str:
        self.kills += 1
        in_write = self.kills % 2 == 0
        if in_write:
            await_write(process, workdir / "checkpoints")
        else:
            self._await_an_instant(process)
        return self._send(
            process, signal.SIGKILL, "killed" + " while a checkpoint was written" * in_write
        )

    def stop(self, process: Process, workdir: pathlib.Path) -> str:
        self._await_an_instant(process)
        return self._send(process, signal.SIGTERM, "asked to stop")

    def damage(self, process: Process, workdir: pathlib.Path) -> str:
        self._await_an_instant(process)
        done = self._send(process, signal.SIGKILL, "killed")
        # it ended before the signal, so there is no run that must continue
        if process.wait() == 0:
            return ""
        steps = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
        if not done or not steps:
            return done
        newest = max(steps, key=lambda path: int(path.name))
        file = self.chance.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        how = self.chance.choice(["flipped", "cut", "removed"])
        data = bytearray(file.read_bytes())
        if how == "removed":
            file.unlink()
        elif how == "cut" or not data:
            file.write_bytes(data[: len(data) // 2])
        else:
            data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
            file.write_bytes(data)
        return f"{done}, and {file.relative_to(workdir)} was {how}"

    def fill(self, process: Process, workdir: pathlib.Path) -> str:
        if not await_training(process):
            return ""
        self._sleep(process, self.length / 2)
        if process.poll() is not None:
            return ""
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        self._sleep(process, self.length)
        if process.poll() is None:
            resource.prlimit(
                process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
        return FULL

    def _await_an_instant(self, process: Process) -> None:
        if self.chance.random() < 0.2:  # before or during start-up
            self._sleep(process, self.start_up)
        elif await_training(process):
            self._sleep(process, self.length)

    def _sleep(self, process: Process, most: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.chance.uniform(0, most))

    def _send(self, process: Process, number: int, done: str) -> str:
        if process.poll() is not None:
            return ""
        process.send_signal(number)
        return done


def campaign(
    home: pathlib.Path, flags: list[str], rounds: int, faults: tuple[str, ...], seed: int
) -> dict[str, int]:
    """Run `rounds` rounds of these faults in turn; returns how often each occurred.

    Raises RuntimeError if a run ends in another state than the unbroken one.
    """
    began = time.monotonic()
    process = start(flags, home / "unbroken")
    if not await_training(process):
        raise RuntimeError(f"the unbroken run failed with exit code {process.wait()}")
    training = time.monotonic()
    process.communicate()
    chaos = Chaos(seed, start_up=training - began, length=time.monotonic() - training)
    expected = outcome(home / "unbroken")
    count: dict[str, int] = collections.Counter()
    runs = 0
    while sum(count.values()) < rounds:
        workdir = home / "troubled"
        shutil.rmtree(workdir, ignore_errors=True)
        returned = None
        while returned != 0:
            process, befell = start(flags, workdir), ""
            if (done := sum(count.values())) < rounds:
                fault = faults[done % len(faults)]
                befell = getattr(chaos, fault)(process, workdir)
                if befell:
                    count[fault] += 1
                    print(f"round {done + 1} of {rounds}: {befell}", flush=True)
            process.communicate()
            returned = process.returncode
            # A run that is stopped before it listens ends by the signal. A full disk is an error at
            # the end.
            if returned not in (
                0,
                1 if befell == FULL else 0,
                -signal.SIGKILL,
                -signal.SIGTERM,
                EXIT_CODE,
            ):
                raise RuntimeError(f"the run failed with exit code {returned}")
        runs += 1
        found = outcome(workdir)
        if found != expected:
            raise RuntimeError(
                f"{workdir} ended in another state than {home / 'unbroken'}: {found[0]}, not "
                f"{expected[0]}"
            )
    print(
        f"{', '.join(f'{fault}: {times}' for fault, times in count.items())}; {runs} runs, all "
        f"with state sha256 {expected[0]} and the {len(expected[1])} rows of the unbroken run"
    )
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--faults", default=",".join(FAULTS), help="used in turn; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        default=pathlib.Path("runs/chaos"),
        help="emptied at the start",
    )
    parser.add_argument(
        "flags", nargs="*", default=["--config=configs/ngc_tiny.py"], help="of launch.py, after --"
    )
    args = parser.parse_args()
    faults = tuple(args.faults.split(","))
    if not set(faults) <= set(FAULTS):
        raise UserError(f"--faults={args.faults}: must be some of {','.join(FAULTS)}")
    shutil.rmtree(args.workdir, ignore_errors=True)
    campaign(args.workdir.absolute(), args.flags, args.rounds, faults, args.seed)


if __name__ == "__main__":
    command(main)
