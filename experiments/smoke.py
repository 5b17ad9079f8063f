"""Does every choice of the config train, and resume to the bit?

    python -m experiments.smoke --workdir=runs/smoke

For: all rules, sharings, wirings, kinds of iteration, recurrent models, and models of the
comparison, for a few updates at a tiny size. A run continues from an earlier checkpoint, as after a
kill, and must end with the state and the rows of the unbroken run. Not for: kills at random times
(`chaos.py`), or the quality of learning (`compare.py`).
"""

import argparse
import concurrent.futures
import contextlib
import io
import math
import multiprocessing
import os
import pathlib
import shutil
from typing import Any

import jax
from absl import logging

from experiments.chaos import outcome
from experiments.protocols import MODELS, PROTOCOLS, sized
from ngc_jax.commands.arguments import command
from ngc_jax.config import base, reset_unread
from ngc_jax.core.rules import rules_between_groups
from ngc_jax.core.wiring import DYNAMIC, WIRINGS
from ngc_jax.runtime.files import expand
from ngc_jax.training import loop as train

SHARINGS = ("depth3", "depth2,readers", "qkv,gate_up,depth3", "query+value,1+3")
TINY = {
    "data.context": 16,
    "model.width": 16,
    "model.hidden": 32,
    "model.groups": 4,
    "model.heads": 2,
    "model.channels": 1,
    "model.prelude": 0,  # only the loop: each stack of stages adds compile time
    "model.coda": 0,
    "train.steps": 4,
    "train.batch_size": 4,
    "train.warmup_steps": 1,
    "train.log_every": 1,
    "eval.windows": 8,
    "eval.batch_size": 8,
    "checkpoint.every_steps": 2,
    "stability.every": 0,
}
MANY = {"model.rounds": 3, "iteration.high": 4, "iteration.mean": 2.5}
ITERATIONS: dict[str, dict[str, Any]] = {
    "uniform": {"iteration.rounds": "uniform"},
    "lognormal_poisson": {"iteration.rounds": "lognormal_poisson", "iteration.backprop": 2},
    "all": {"iteration.rounds": "uniform", "iteration.backprop": 3, "iteration.supervise_every": 2},
    "no drive": {"model.drive": False},
    "bits on a route": {
        "model.state_activation": "tanh",
        "model.route": "start",
        "iteration.noise": 0.5,
    },
}
RECURRENT: dict[str, dict[str, Any]] = {
    "whole windows": {},
    "chunks": {"model.chunk": 8, "data.isolate_documents": True},
    "signals": {
        "model.core": 2,
        "model.form": "signals",
        "model.sharing": "gate_up",
        "model.wiring": "ring",
    },
}
# the wiring changes after each update
CHANGING = {"model.channels": 2, "rewire.channels": 1, "rewire.every": 1, "rewire.end": 1.0}


def choices() -> dict[str, dict[str, Any]]:
    """The fields of each choice, by its name."""
    short = {
        name: TINY[name]
        for name in ("train.steps", "train.warmup_steps", "train.log_every", "eval.windows")
    }
    short |= {"checkpoint.every_steps": 2, "eval.batch_size": 8}
    return {
        **{f"rule {name}": {**TINY, "model.rule": name} for name in rules_between_groups()},
        **{
            f"sharing {name}": {**TINY, "model.core": 3, "model.sharing": name} for name in SHARINGS
        },
        **{f"wiring {name}": {**TINY, "model.wiring": name} for name in WIRINGS},
        **{f"wiring {name}": {**TINY, **CHANGING, "model.wiring": name} for name in DYNAMIC},
        **{
            f"recurrent {name}": {**TINY, "model.kind": "recurrent", **fields}
            for name, fields in RECURRENT.items()
        },
        **{f"iteration {name}": {**TINY, **MANY, **fields} for name, fields in ITERATIONS.items()},
        **{
            f"model {of.model}": {**of.fields, **short}
            for of in sized(PROTOCOLS["smoke"], list(MODELS))
        },
    }


def resumes(home: pathlib.Path, fields: dict[str, Any]) -> float:
    """Train twice, once with a break; returns the held-out loss. Raises RuntimeError if the two
    differ.
    """
    config = base()
    config.update_from_flattened_dict(
        {"data.path": PROTOCOLS["smoke"].common["data.path"], **fields}
    )
    reset_unread(config)
    unbroken, killed = home / "unbroken", home / "killed"
    # the second run uses the compiled programs of the first
    jax.config.update("jax_compilation_cache_dir", str(home / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(config, unbroken)
        shutil.copytree(unbroken, killed)
        shutil.rmtree(killed / "checkpoints" / str(config.train.steps))
        train.run(config, killed)
    (expected, rows), found = outcome(unbroken), outcome(killed)
    if found != (expected, rows):
        raise RuntimeError(f"{killed} and {unbroken} ended differently: {found[0]}, not {expected}")
    loss = float(str(rows[-1]["final/loss"]))
    if not math.isfinite(loss):
        raise RuntimeError(f"{unbroken} ended with a loss of {loss}")
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workdir", type=expand, default=pathlib.Path("runs/smoke"))
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at a time; default: cores"
    )
    args = parser.parse_args()
    home = args.workdir.absolute()
    shutil.rmtree(home, ignore_errors=True)
    wanted = choices()
    # Spawned processes: JAX's threads do not survive a fork.
    anew = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        args.jobs, anew, logging.set_verbosity, (logging.ERROR,)
    ) as pool:
        losses = pool.map(
            resumes, [home / name.replace(" ", "-") for name in wanted], wanted.values()
        )
        for name, loss in zip(wanted, losses, strict=True):
            print(f"{name}: {loss:.4f} nats per byte; resumed to the bit", flush=True)


if __name__ == "__main__":
    command(main, goes_on=True)
