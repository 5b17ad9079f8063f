"""Does a long run grow? Many tiny updates with saves, and what the process holds meanwhile.

    python -m experiments.soak --updates=50000 --workdir=runs/soak

For: the slope of the memory of its own (RssAnon: without the pages of files, as those of the text,
which are read one after the other) after a warm-up, in kB an update, by least squares; and the
number of open files and threads. Updates and saves are as of any run; the model is as small as it
can be, so that there are many. Not for: memory of a device, or the memory that a model needs.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

from ngc_jax.commands.arguments import command
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import expand

ROOT = pathlib.Path(__file__).parent.parent
TINY = """model.width=8 model.hidden=8 model.groups=2 model.heads=2 model.prelude=1 model.core=0
model.coda=0 data.context=8 train.batch_size=2 train.warmup_steps=10 train.log_every=100
eval.windows=2 eval.batch_size=2 stability.every=0"""
MOST = 0.2  # kB an update


class Sample(NamedTuple):
    """What a process holds after an update."""

    step: int
    resident: int  # kB
    files: int
    threads: int


def sample(process: int, workdir: pathlib.Path) -> Sample | None:
    """None before the first row, and when the process has ended."""
    home = pathlib.Path(f"/proc/{process}")
    try:
        with open(workdir / "metrics.jsonl", "rb") as rows:
            rows.seek(-min(rows.seek(0, 2), 4000), 2)
            step = json.loads(rows.read().decode().splitlines()[-1])["step"]
        status = dict(
            line.split(":\t", 1) for line in (home / "status").read_text("utf-8").splitlines()
        )
        resident = int(status["RssAnon"].removesuffix(" kB"))
        return Sample(step, resident, len([*(home / "fd").iterdir()]), int(status["Threads"]))
    except (OSError, ValueError, KeyError, IndexError):
        return None


def soak(workdir: pathlib.Path, updates: int, saves: int, more: list[str]) -> list[Sample]:
    """Trains; what the process holds about once a second."""
    fields = [*TINY.split(), f"train.steps={updates}", f"eval.every={updates // 10}"]
    fields += [f"checkpoint.every_steps={max(1, updates // saves)}"]
    line = [sys.executable, "launch.py", "--config=configs/ngc_tiny.py", f"--workdir={workdir}"]
    line += [f"--config.{field}" for field in fields] + more
    found = list[Sample]()
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(1)
            if (now := sample(process.pid, workdir)) and (not found or now.step > found[-1].step):
                found.append(now)
    if process.returncode:
        raise UserError(f"the run ended with exit code {process.returncode}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--updates", type=int, default=50_000)
    parser.add_argument("--saves", type=int, default=100)
    parser.add_argument("--workdir", type=expand, default=pathlib.Path("runs/soak"))
    parser.add_argument("flags", nargs="*", help="of launch.py, after --")
    args = parser.parse_args()
    workdir = args.workdir.absolute()
    shutil.rmtree(workdir, ignore_errors=True)
    samples = soak(workdir, args.updates, args.saves, args.flags)
    begin = 2 * args.updates / 5  # until then the threads of saves fill up
    warm = [one for one in samples if one.step >= begin]
    if len(warm) < 10:
        raise UserError(f"--updates={args.updates}: too few to see a slope, give 20,000 or more")
    for one in warm[:: max(1, len(warm) // 10)]:
        size = f"{one.resident / 1024:.1f} MB"
        print(f"update {one.step}: {size}, {one.files} files, {one.threads} threads")
    slope = np.polyfit([one.step for one in warm], [one.resident for one in warm], 1)[0]
    files, threads = ([one[kind] for one in warm] for kind in (2, 3))
    print(
        f"{args.updates} updates, {args.saves} saves: {slope:.3f} kB an update after the first two "
        f"fifths; files {min(files)} to {max(files)}, threads {min(threads)} to {max(threads)}"
    )
    if slope > MOST:
        raise UserError(f"memory grows by more than {MOST} kB an update")


if __name__ == "__main__":
    command(main, goes_on=True)
