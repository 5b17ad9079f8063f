"""What training gives back after conversion, beside a dense copy that is trained in the same way.

    python -m experiments.healing --teacher=runs/smollm2 --path=code.txt:0.5,verse.txt:0.5 \
        --test=code:code2.txt,verse:verse2.txt --updates=48 --batch_size=4

    python -m experiments.healing --teacher=dense_small --seeds=0,1,2 --scratch=ngc_small

The teacher is a work directory, or a config whose runs are trained here. Each is converted by `ngc`
at several shares and then trained on the same batches with each aim: the teacher's outputs, and
the text itself. A copy of the teacher goes through the same updates: what it gains as well is no
gain of healing. `--scratch` asks whether to convert or to train: a model of as many parameters in
matrices begins from nothing and gets all tokens that the teacher and the healed model have seen.
The first seed tries all learning rates, and the others take the best one of each kind. The study
continues after a kill. Not for: methods of conversion (`posthoc.py`), or reasoning
(`reasoning_kept.py`).
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from experiments.posthoc import Losses, fitted, losses
from experiments.reasoning_kept import commas, share_programs, trained_in, write_whole
from experiments.stats import interval
from ngc_jax.commands.arguments import command
from ngc_jax.commands.convert_model import examples
from ngc_jax.config import named, reset_unread
from ngc_jax.convert.calibrate import calibrate
from ngc_jax.convert.convert import formed, reconstructed
from ngc_jax.data.batches import Batch, held_out_batches
from ngc_jax.report.blocks import table
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import expand, write_durably
from ngc_jax.training.load import Trained, load
from ngc_jax.training.workdir import read_config

AIMS = ("teacher", "text")  # what is learned: the teacher's outputs, or the next token
Records = dict[str, Any]  # "0 teacher", "0 ngc 0.6", "0 ngc 0.6 text 0.001", "0 copy text 0.001"


def healing(start: Trained, teacher: pathlib.Path, aim: str, rate: float, args: Any) -> ConfigDict:
    """The config that trains what is in a work directory with one aim, from its parameters."""
    config, steps = read_config(epath.Path(start.workdir)), args.updates
    config.train.update({"init_from": str(start.workdir), "steps": steps})
    config.train.update({"learning_rate": rate, "state_learning_rate": rate, "weight_decay": 0.0})
    config.train.update({"schedule": "cosine", "warmup_steps": steps // 10, "log_every": 4})
    if aim == "teacher":
        config.train.update({"teacher": str(teacher), "imitate": args.imitate})
    if args.path:
        config.data.update({"path": args.path, "validation_fraction": 0.02})
    if args.batch_size:
        config.train.batch_size = config.eval.batch_size = args.batch_size
        config.eval.windows = 4 * args.batch_size
    config.eval.every = steps
    config.checkpoint.update({"every_steps": max(1, steps // 4), "keep": 2})
    reset_unread(config)
    return config


def tests_of(teacher: Trained, given: list[str], windows: int) -> dict[str, Batch]:
    """What models are tested on, by name: windows of files, else those held out of its own text."""
    named_files = (pair.partition(":")[::2] for pair in given)
    tokens = windows * teacher.config.data.context
    found = {name: examples(teacher, [file], tokens) for name, file in named_files}
    if not found:
        source = teacher.data().validation
        (batch, _), *_ = held_out_batches(source, batch_size=windows, limit=windows)
        found["held out"] = batch
    return found


def best(records: Records, seed: int, kind: str, rates: list[str]) -> str:
    """Of the learning rates that a seed has tried, that of the least mean loss."""
    tried = {rate: records[f"{seed} {kind} {rate}"] for rate in rates}
    return min(tried, key=lambda rate: float(np.mean([np.mean(v) for v in tried[rate].values()])))


def one(
    seed: int,
    teacher: Trained,
    records: Records,
    keep: Callable[[str, Losses], None],
    args: argparse.Namespace,
) -> None:
    """Makes the missing records of one teacher, and keeps each."""
    home, log = args.out / str(seed), args.out / str(seed) / "log.txt"
    tests = tests_of(teacher, args.test, args.windows)
    place = pathlib.Path(teacher.workdir)

    def done(name: str, make: Callable[[], Losses]) -> None:
        if name not in records:
            keep(name, make())

    done(f"{seed} teacher", lambda: losses(teacher, teacher.params, tests))

    def heal(kind: str, start: Trained) -> None:
        for aim in args.aims:
            rates = args.rates
            if seed != args.seeds[0]:
                rates = [best(records, args.seeds[0], f"{kind} {aim}", rates)]
            for rate in rates:

                def train(aim: str = aim, rate: str = rate) -> Losses:
                    config = healing(start, place, aim, float(rate), args)
                    run = trained_in(config, home / f"{kind} {aim} {rate}".replace(" ", "-"), log)
                    run = run if kind == "copy" else formed(run)
                    return losses(teacher, run.params, tests)

                done(f"{seed} {kind} {aim} {rate}", train)

    calibrated = home / "calibration"
    calibrated.mkdir(parents=True, exist_ok=True)
    texts = [part.rpartition(":")[0] or part for part in args.path.split(",")] if args.path else []
    for share in filter(None, args.kept):
        small = home / f"ngc-{share}"
        if not small.exists():
            batch = examples(teacher, texts, args.tokens)
            means = calibrate(teacher, batch, calibrated, say=lambda *said, **how: None)
            ((_, _, found, _),) = fitted(teacher, means, batch, "ngc", [share])
            keep(f"{seed} ngc {share}", losses(teacher, reconstructed(teacher, found), tests))
            write_whole(teacher, found, small, f"{teacher.workdir}, kept {share}")
        heal(f"ngc {share}", load(small))
    heal("copy", teacher)
    for share in filter(None, args.kept) if args.scratch else []:
        config = named(args.scratch)
        config.update_from_flattened_dict({"seed": seed, "model.match": f"{args.teacher}:{share}"})
        config.train.steps = teacher.step + args.updates
        reset_unread(config)

        def train(config: ConfigDict = config, share: str = share) -> Losses:
            run = trained_in(config, home / f"scratch-{share}", log)
            return losses(run, run.params, tests)

        done(f"{seed} scratch {share}", train)


def report(records: Records, args: argparse.Namespace) -> str:
    """The table: of each kind, what it adds to the teacher, and to the copy with the same aim."""
    first, rows = args.seeds[0], []
    seeds = [seed for seed in args.seeds if f"{seed} teacher" in records]
    tests = [*records[f"{first} teacher"]]
    kinds = sorted(
        {" ".join(n.split()[1:]) for n in records if n.startswith(f"{first} ")} - {"teacher"}
    )

    def told(kind: str, other: str, test: str) -> str:
        pairs = [(records.get(f"{s} {kind}"), records.get(f"{s} {other}")) for s in seeds]
        apart = [np.subtract(a[test], b[test]) for a, b in pairs if a and b]
        if len(apart) == 1:  # one teacher: over windows
            return f"{apart[0].mean():+.3f} ± {apart[0].std(ddof=1) / len(apart[0]) ** 0.5:.3f}"
        return interval([float(one.mean()) for one in apart])

    for kind in kinds:
        control, words = "", kind.split()
        if words[0] == "ngc" and len(words) > 2:
            aim = f"copy {words[2]}"
            control = f"{aim} {best(records, first, aim, args.rates)}"
        row = [kind] + [told(kind, "teacher", test) for test in tests]
        rows.append(row + [told(kind, control, test) if control else "" for test in tests])
    head = ["model", *tests, *(f"{test}, above the copy" for test in tests)]
    return table(head, rows).markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--teacher", required=True, help="a work directory, or the name of a config"
    )
    parser.add_argument("--seeds", type=commas(int), default=[0], help="of teachers trained here")
    parser.add_argument(
        "--path", default="", help="text to train and to calibrate on, as data.path"
    )
    parser.add_argument("--test", type=commas(), default=[], help="NAME:FILE, with commas")
    parser.add_argument("--kept", type=commas(), default=["0.6"])
    parser.add_argument("--aims", type=commas(), default=[*AIMS])
    parser.add_argument("--imitate", default="stream", help="of aim 'teacher', as train.imitate")
    parser.add_argument("--rates", type=commas(), default=["1e-3"], help="learning rates")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=0, help="0: as the teacher's run")
    parser.add_argument("--tokens", type=int, default=24_576, help="to calibrate on")
    parser.add_argument("--windows", type=int, default=24, help="of each test")
    parser.add_argument("--scratch", default="", help="config of a model from nothing; '': none")
    parser.add_argument("--out", type=expand, default=pathlib.Path("runs/healing"))
    args = parser.parse_args()
    if not set(args.aims) <= set(AIMS):
        raise UserError(f"--aims={','.join(args.aims)}: must be some of {','.join(AIMS)}")
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    share_programs()
    kept, began = args.out / "records.json", time.monotonic()
    records: Records = json.loads(kept.read_text("utf-8")) if kept.exists() else {}

    def keep(name: str, found: Losses) -> None:
        records[name] = found
        write_durably(kept, json.dumps(records))
        told = ", ".join(f"{test} {np.mean(of):.4f}" for test, of in found.items())
        print(f"{name}: {told} ({time.monotonic() - began:.0f} s)", flush=True)

    for seed in args.seeds:
        if expand(args.teacher).is_dir():
            teacher = load(args.teacher)
        else:
            config = named(args.teacher)
            config.seed = seed
            (args.out / str(seed)).mkdir(exist_ok=True)
            teacher = trained_in(
                config, args.out / str(seed) / "teacher", args.out / str(seed) / "log.txt"
            )
        one(seed, teacher, records, keep, args)
        (args.out / "report.md").write_text(report(records, args) + "\n", encoding="utf-8")
    print(args.out / "report.md")


if __name__ == "__main__":
    command(main)
