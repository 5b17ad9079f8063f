"""What conversion leaves of reasoning, and whether stability foretells it (the method's H5).

    python -m experiments.reasoning_kept --out=runs/reasoning_kept --tasks=modular,listops \
        --seeds=0,1,2 --methods=svd_llm,ngc --kept=0.9,0.6 --heal=200

Dense models learn tasks whose answers are known. Each is converted by several methods at several
shares, tested by difficulty, measured as a dynamical system, healed by its teacher, and tested and
measured again. Controls are two copies of the teacher, which go through the same updates: one with
its own teacher, one with the right answers. All models of a task see the same problems, which
neither training nor calibration has seen. The study continues after a kill, in the middle of a
training too. `reasoning_kept_report.py` writes report.md. Not for: text (`posthoc.py`).
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

import ngc_jax
from experiments.posthoc import fitted
from experiments.reasoning_kept_report import report
from experiments.run import kept_programs
from experiments.setting import learning
from ngc_jax.analysis import probes
from ngc_jax.analysis.stability import EXPONENTS
from ngc_jax.commands.arguments import command
from ngc_jax.commands.convert_model import examples
from ngc_jax.config import named, reset_unread
from ngc_jax.convert.calibrate import calibrate
from ngc_jax.convert.convert import Fit, convert, formed, reconstructed
from ngc_jax.convert.methods import METHODS
from ngc_jax.data.batches import Batch
from ngc_jax.data.cache import cache_directory
from ngc_jax.data.problems import Problems, problem_set
from ngc_jax.data.tasks import boundary
from ngc_jax.dynamics import measures
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import expand, write_durably
from ngc_jax.runtime.metrics import duration
from ngc_jax.training.evaluation import held_out
from ngc_jax.training.load import Trained, load
from ngc_jax.training.step import make_eval_step
from ngc_jax.training.workdir import read_config

Records = dict[str, Any]  # "settings", "modular 0 teacher", "modular 0 ngc 0.8", ...
Bench = Callable[[Any], dict[str, Any]]  # parameters of a dense model -> what is measured of it

# Of each task: fields, and the difficulties of the test, from easy to hard. There are few problems
# of two terms, so that they are trained on and not tested.
MODULAR = {"data.low": 2, "data.high": 5, "data.context": 10, "data.problems": 200_000}
TASKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "modular": (learning(3000) | MODULAR, (3, 4, 5)),
    "listops": (learning(2000) | {"data.low": 1, "data.high": 2, "data.context": 27}, (1, 2)),
    "addition": (learning(2000) | {"data.low": 1, "data.high": 4, "data.context": 14}, (2, 3, 4)),
    "sudoku4": (learning(1000) | {"data.low": 2, "data.high": 8, "data.context": 33}, (4, 6, 8)),
}
COMMON: dict[str, Any] = {"model.width": 64, "model.hidden": 128, "checkpoint.every_steps": 500}
RATE, HEALING = 5e-3, 1e-3  # learning rates of the teachers, and of all parameters in healing
MEASURED = 64  # problems on which stability is measured
COPIES = {"copy": True, "copy, answers": False}  # controls: whether the teacher teaches them
FOLDERS = ("teachers", "calibrations", "converted", "healed", "logs")


def teacher_config(task: str, seed: int) -> ConfigDict:
    """The config of a dense model without a loop that learns a task."""
    config, fields = named("dense_small"), TASKS[task][0]
    config.update_from_flattened_dict({"data.task": task, "seed": seed, **COMMON, **fields})
    config.train.update({"learning_rate": RATE, "state_learning_rate": RATE})
    config.train.warmup_steps = min(config.train.warmup_steps, config.train.steps // 10)
    reset_unread(config)
    return config


def bench(trained: Trained, difficulties: tuple[int, ...], count: int) -> Bench:
    """Measures dense parameters: shares solved and nats by difficulty, and measures of stability.

    `count` test problems of each difficulty, as `examine` draws them, all padded to one length: a
    program for all. Stability is measured on problems of the hardest, of the commonest length, so
    that no padding counts.
    """
    data, counts = trained.config.data, {"test": count}
    home, ends = cache_directory(data), boundary(data.task)
    found = [problem_set(data.task, d, d, counts, 0, home) for d in difficulties]
    longest = max(data.context, *(one.longest for one in found))
    tests = [Problems(one.home, "test", longest, ends) for one in found]
    model, mesh = trained.decoder.reshaped(context=longest), meshes.single_device()
    step = jax.jit(meshes.with_mesh(mesh, make_eval_step(model, trained.config.train, None)))
    batch, watch = of_one_length([tests[-1][i] for i in range(count)]), make_watch(model)

    def measure(params: Any) -> dict[str, Any]:
        scores = [held_out(step, params, mesh, test, 100) for test in tests]
        by_level = dict(zip(map(str, difficulties), scores, strict=True))
        exact = {level: score["exact"] for level, score in by_level.items()}
        nats = float(np.mean([score["loss"] for score in scores]))
        return {"exact": exact, "nats": nats, "stability": watch(params, batch)}

    return measure


def of_one_length(problems: list[Batch]) -> Batch:
    """The first problems of the commonest length, MEASURED at most, without padding."""
    lengths = [int(np.flatnonzero(one.targets >= 0)[-1]) + 1 for one in problems]
    common = Counter(lengths).most_common(1)[0][0]
    chosen = [one for one, n in zip(problems, lengths, strict=True) if n == common][:MEASURED]
    return jax.tree.map(lambda *arrays: np.stack(arrays)[:, :common], *chosen)


def make_watch(model: Decoder) -> Callable[[Any, Batch], dict[str, float]]:
    """Measures of a stack of stages, means over problems (docs/stability.md).

    drive: |e| / (|e| + |update|) as in a loop, with a stage for a round and the embedding for e.
    departure: of the last stream from e, that is, with no synapse sending anything. exponent: the
    leading one per stage, of random tangents. exponent of problems: the same of real differences,
    log |x - x'| / |e - e'| of two problems over the stages. exponent along tokens: per token.
    """

    def passing(params: Any, batch: Batch) -> dict[str, jax.Array]:
        first, *later = states = [*probes.activations(model, params, batch).values()]
        updates = [after - before for before, after in zip(states, later, strict=False)]
        driven = jnp.stack([measures.drive_ratio(first, update) for update in updates])
        apart = [
            measures.norm((x - jnp.roll(x, 1, axis=0)).reshape(len(x), -1))
            for x in (first, later[-1])
        ]
        stretch = jnp.log(apart[1] + measures.TINY) - jnp.log(apart[0] + measures.TINY)
        return {
            "drive": jnp.mean(driven),
            "departure": jnp.mean(measures.departure(later[-1], first)),
            "exponent of problems": jnp.mean(stretch) / len(later),
        }

    def leading(exponents: Any) -> Any:
        return lambda params, batch: jnp.mean(exponents(model, params, batch, k=EXPONENTS)[:, 0])

    # A program for each: two calls of LAPACK in one can wait for each other for ever on XLA:CPU.
    streams = jax.jit(passing)
    others = {"exponent": probes.depth_exponents, "exponent along tokens": probes.token_exponents}
    spectra = {name: jax.jit(leading(of)) for name, of in others.items()}

    def watch(params: Any, batch: Batch) -> dict[str, float]:
        found = streams(params, batch)
        found |= {name: run(params, batch) for name, run in spectra.items()}
        return {name: float(value) for name, value in found.items()}

    return watch


def trained_in(config: ConfigDict, workdir: pathlib.Path, log: pathlib.Path) -> Trained:
    """What `launch.py` would do, said to a log; a run that was stopped goes on."""
    with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        return ngc_jax.train(config, workdir)


def write_whole(teacher: Trained, found: Fit, home: pathlib.Path, origin: str) -> None:
    """Converts into a new folder, whole or not at all: what a kill leaves has another name."""
    part = home.with_name(f"{home.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    convert(teacher, found, part, origin)
    part.rename(home)


def share_programs() -> None:
    """Keeps compiled programs for all seeds, where the user has named no folder for them."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", kept_programs())


def healing(start: pathlib.Path, teacher: pathlib.Path, taught: bool, steps: int) -> ConfigDict:
    """The config that heals the run in `start` on the problems of its task."""
    config = read_config(epath.Path(start))
    config.train.update({"init_from": str(start), "teacher": str(teacher) if taught else ""})
    config.train.update({"steps": steps, "warmup_steps": steps // 10})
    config.train.update({"learning_rate": HEALING, "state_learning_rate": HEALING})
    config.eval.every = config.checkpoint.every_steps = steps
    return config


def slug(name: str) -> str:
    """The name of a record as that of a folder."""
    return name.replace(",", "").replace(" ", "-")


def wanted(args: argparse.Namespace) -> list[str]:
    """The names of all records that are asked for, in the order in which they are made."""
    kinds = ["teacher", *(f"{method} {share}" for method in args.methods for share in args.kept)]
    kinds += [*COPIES] if args.heal else []
    return [f"{task} {seed} {kind}" for task in args.tasks for seed in args.seeds for kind in kinds]


def missing(records: Records, names: list[str]) -> list[str]:
    """The names of those that have no record, or one that healing has not completed."""
    heal = records["settings"]["heal"]
    parts = {
        name: {"exact"} if name.endswith("teacher") or not heal else {"healed"} for name in names
    }
    return [name for name in names if not parts[name] <= records.get(name, {}).keys()]


def opened(home: pathlib.Path, settings: dict[str, int]) -> Records:
    """The records of a folder, which is made. Raises UserError for one of other settings."""
    for name in FOLDERS:
        (home / name).mkdir(parents=True, exist_ok=True)
    kept = home / "records.json"
    records: Records = (
        json.loads(kept.read_text("utf-8")) if kept.exists() else {"settings": settings}
    )
    if records["settings"] != settings:
        raise UserError(f"--out={home} was made with {records['settings']}, not {settings}")
    return records


def one(
    home: pathlib.Path,
    records: Records,
    names: list[str],
    keep: Callable[[str, dict[str, Any]], None],
) -> None:
    """Makes the missing records of these names, which are of one teacher, and keeps each."""
    left, settings = missing(records, names), records["settings"]
    if not left:
        return
    task, seed, _ = names[0].split(" ", 2)
    about, level = f"{task} {seed}", TASKS[task][1]
    workdir, log = home / "teachers" / slug(about), home / "logs" / f"{slug(about)}.txt"
    if f"{about} teacher" in left:
        teacher = trained_in(teacher_config(task, int(seed)), workdir, log)
    else:
        teacher = load(workdir)
    measure = bench(teacher, level, settings["problems"])
    if f"{about} teacher" in left:
        keep(f"{about} teacher", measure(teacher.params))

    def heal(name: str, start: pathlib.Path, taught: bool = True) -> None:
        if settings["heal"] and name in left:
            end = home / "healed" / slug(name)
            run = trained_in(healing(start, workdir, taught, settings["heal"]), end, log)
            run = run if start == workdir else formed(run)
            keep(name, {"healed": measure(run.params)})
            for folder in {start, end} - {workdir}:
                shutil.rmtree(folder)

    batch, folder = examples(teacher, [], settings["tokens"]), home / "calibrations" / slug(about)
    folder.mkdir(exist_ok=True)
    means = calibrate(teacher, batch, folder, rows=8, say=lambda *said, **how: None)
    for method, share, found, took in conversions(teacher, means, batch, left):
        name = f"{about} {method} {share}"
        start = home / "converted" / slug(name)
        if name not in records:
            told = {"predicted": found.predicted, "numbers": found.numbers, "seconds": took}
            keep(name, measure(reconstructed(teacher, found)) | told)
        if settings["heal"] and not start.exists():
            write_whole(teacher, found, start, name)
        heal(name, start)
    for copy, taught in COPIES.items():
        heal(f"{about} {copy}", workdir, taught)


def conversions(teacher: Trained, means: Any, batch: Batch, names: list[str]) -> Iterator[Any]:
    """(method, share, fit, seconds) for each name of a conversion, "modular 0 ngc 0.8"."""
    shares: dict[str, list[str]] = {}
    for name in names:
        _, _, *rest = name.split()
        if rest[-1].startswith("0."):
            shares.setdefault(rest[0], []).append(rest[1])
    for method, of in shares.items():
        for share, _, found, took in fitted(teacher, means, batch, method, of):
            yield method, share, found, took


def commas(kind: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    return lambda given: [kind(one) for one in given.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=expand, default=pathlib.Path("runs/reasoning_kept"))
    parser.add_argument("--tasks", type=commas(), default=[*TASKS])
    parser.add_argument("--seeds", type=commas(int), default=[0, 1, 2])
    parser.add_argument(
        "--methods", type=commas(), default=commas()("svd,svd_llm,mpifa,io_svd,ngc")
    )
    parser.add_argument("--kept", type=commas(), default=commas()("0.8,0.6,0.4,0.2"))
    parser.add_argument("--heal", type=int, default=200, help="updates of healing; 0: none")
    parser.add_argument("--problems", type=int, default=400, help="of a test, of each difficulty")
    parser.add_argument("--tokens", type=int, default=12_288, help="to calibrate on")
    args = parser.parse_args()
    for given, known in (("tasks", TASKS), ("methods", [*METHODS, "ngc+share"])):
        if not set(getattr(args, given)) <= set(known):
            told = ",".join(getattr(args, given))
            raise UserError(f"--{given}={told}: must be some of {','.join(known)}")
    if not all(re.fullmatch(r"0\.\d*[1-9]\d*", share) for share in args.kept):
        raise UserError(f"--kept={','.join(args.kept)}: must be above 0 and below 1, such as 0.8")
    home, names = args.out.absolute(), wanted(args)
    records = opened(home, {name: getattr(args, name) for name in ("heal", "problems", "tokens")})
    share_programs()
    began, before = time.monotonic(), len(missing(records, names))

    def keep(name: str, part: dict[str, Any]) -> None:
        records[name] = known = records.get(name, {}) | part
        write_durably(home / "records.json", json.dumps(records))
        seen = [known, known.get("healed", {})]
        told = [f"{np.mean([*of['exact'].values()]):.3f}" for of in seen if "exact" in of]
        left = len(missing(records, names))
        rate = (time.monotonic() - began) / max(1, before - left)
        print(
            f"{name}: exact {', healed '.join(told)}; {left} left, ETA {duration(rate * left)}",
            flush=True,
        )

    for seed, task in itertools.product(args.seeds, args.tasks):
        one(home, records, [name for name in names if name.startswith(f"{task} {seed} ")], keep)
        (home / "report.md").write_text(report(records, names), "utf-8")  # of what there is so far
        jax.clear_caches()
    for folder in ("converted", "healed"):  # what a kill has left
        shutil.rmtree(home / folder)
    print(home / "report.md")


if __name__ == "__main__":
    command(main, goes_on=True)
