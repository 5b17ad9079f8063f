"""Kill a training run again and again, and see that it ends where an unbroken run ends:

    python -m experiments.chaos --kills=20 --workdir=runs/chaos

For: SIGKILL at random instants, every third of them while a checkpoint is being written; each time the same command
is given again. At the end the state's SHA-256 and all rows of metrics, but for times, must equal those of a run that
nothing happened to. A run that finishes before the kills are used up is followed by another. Not for: other faults.
"""

import argparse
import pathlib
import random
import shutil
import subprocess
import sys
import time

from ngc_jax.checkpoint import digest
from ngc_jax.metrics import TIMES, read_rows
from ngc_jax.workdir import command, open_trained

ROOT = pathlib.Path(__file__).parent.parent


def outcome(workdir: pathlib.Path) -> tuple[str, list[dict[str, object]]]:
    """SHA-256 of the final state, and all rows without their times."""
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(workdir)]
    return digest(open_trained(workdir).state), rows


def start(flags: list[str], workdir: pathlib.Path) -> "subprocess.Popen[str]":
    line = [sys.executable, "launch.py", *flags, f"--workdir={workdir}"]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def await_training(process: "subprocess.Popen[str]") -> bool:
    """Read until the first update is reported; False if the run ended before."""
    assert process.stdout
    return any(line.startswith("step ") for line in process.stdout)


def await_write(process: "subprocess.Popen[str]", checkpoints: pathlib.Path) -> bool:
    """Return when a checkpoint is being written; False if the run ended first."""
    while process.poll() is None:
        if any("tmp" in path.name for path in checkpoints.glob("*")):
            return True
        time.sleep(0.0005)
    return False


def campaign(home: pathlib.Path, flags: list[str], kills: int, seed: int) -> int:
    """Kill `kills` times or a few more; returns how often. Raises RuntimeError where a run ends anywhere else."""
    chance = random.Random(seed)
    began = time.monotonic()
    process = start(flags, home / "unbroken")
    if not await_training(process):
        raise RuntimeError(f"the unbroken run failed with exit code {process.wait()}")
    training = time.monotonic()
    process.communicate()
    length, start_up = time.monotonic() - training, training - began
    expected = outcome(home / "unbroken")
    killed, writes, runs = 0, 0, 0
    while killed < kills:
        workdir = home / "killed"
        shutil.rmtree(workdir, ignore_errors=True)
        while True:
            process = start(flags, workdir)
            in_write = False
            if killed < kills:
                if killed % 3 == 2:
                    in_write = await_write(process, workdir / "checkpoints")
                elif chance.random() < 0.2:  # before or during start-up
                    time.sleep(chance.uniform(0, start_up))
                elif await_training(process):
                    time.sleep(chance.uniform(0, length))
                if process.poll() is None:
                    process.kill()
                    killed, writes = killed + 1, writes + in_write
                    when = " while a checkpoint was written" if in_write else ""
                    print(f"kill {killed} of {kills}{when}", flush=True)
            process.communicate()
            if process.returncode == 0:
                break
            if process.returncode != -9:
                raise RuntimeError(f"a restarted run failed with exit code {process.returncode}")
        runs += 1
        found = outcome(workdir)
        if found != expected:
            raise RuntimeError(f"{workdir} ended elsewhere than {home / 'unbroken'}: {found[0]}, not {expected[0]}")
    print(
        f"{killed} kills, {writes} of them while a checkpoint was written, in {runs} runs: each ended with state "
        f"sha256 {expected[0]} and the {len(expected[1])} rows of the unbroken run"
    )
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/chaos"), help="emptied first")
    parser.add_argument("flags", nargs="*", default=["--config=configs/ngc_tiny.py"], help="of launch.py, after --")
    args = parser.parse_args()
    shutil.rmtree(args.workdir, ignore_errors=True)
    campaign(args.workdir.absolute(), args.flags, args.kills, args.seed)


if __name__ == "__main__":
    command(main)
