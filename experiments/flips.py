"""What a flipped bit or another name does to a checkpoint: ours, and those of Orbax, safetensors.

    python -m experiments.flips --flips=500

For: one saved tree of arrays in each format, with one bit flipped anywhere in its files at a time:
is that refused, read as it was (a bit that means nothing), or read as other numbers? And a step
that is renamed: is it read under its new name? Not for: faults during a save (`chaos.py`).
"""

import argparse
import collections
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ngc_jax.commands.arguments import command
from ngc_jax.runtime.checkpoint import META, Checkpoints, digest

Path = pathlib.Path
Read = Callable[[Path], Any]  # the folder of a step -> its tree


def ours(home: Path, tree: Any) -> Read:
    with Checkpoints(epath.Path(home)) as checkpoints:
        checkpoints.save(1, tree, dict(META))

    def read(step: Path) -> Any:
        with Checkpoints(epath.Path(step.parent), read_only=True) as checkpoints:
            return checkpoints.restore(int(step.name), tree).state

    return read


def orbax(home: Path, tree: Any) -> Read:
    with ocp.StandardCheckpointer() as saver:
        saver.save(home / "1", tree)

    def read(step: Path) -> Any:
        with ocp.StandardCheckpointer() as loader:
            return loader.restore(step, tree)

    return read


def safetensors(home: Path, tree: Any) -> Read:
    from safetensors.numpy import load_file, save_file

    (home / "1").mkdir(parents=True)
    save_file(tree, home / "1" / "tree.safetensors")
    return lambda step: load_file(step / "tree.safetensors")


def outcomes(
    write: Callable[[Path, Any], Read], flips: int, seed: int
) -> tuple[dict[str, int], str]:
    """How often a flip ended how; and how a step that has another name is read."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    tree = {f"w{i}": rng.normal(size=(64, 64)).astype(np.float32) for i in range(4)}
    counts: dict[str, int] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "checkpoints"
        read, step = write(home, tree), home / "1"
        sound = digest(read(step))
        files = sorted(path for path in step.rglob("*") if path.is_file())
        sizes = [path.stat().st_size for path in files]

        def tried() -> str:
            try:
                return "as it was" if digest(read(step)) == sound else "other numbers"
            except Exception:  # whatever a library raises is a refusal
                return "refused"

        for _ in range(flips):
            (file,) = chance.choices(files, sizes)
            whole = file.read_bytes()
            data = bytearray(whole)
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(data)
            counts[tried()] += 1
            file.write_bytes(whole)
        shutil.move(step, home / "7")
        step = home / "7"
        return counts, tried()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| format | refused | as it was | other numbers | a step renamed |")
    print("| --- | --- | --- | --- | --- |")
    formats = {"ngc_jax": ours, "orbax-checkpoint": orbax, "safetensors": safetensors}
    for name, write in formats.items():
        counts, renamed = outcomes(write, args.flips, args.seed)
        shown = [str(counts[how]) for how in ("refused", "as it was", "other numbers")]
        print(f"| {name} {version(name)} | {' | '.join(shown)} | {renamed} |", flush=True)


if __name__ == "__main__":
    command(main, goes_on=True)
