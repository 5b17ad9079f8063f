"""Did a refactor change a number? Short training runs of two checkouts, compared to the bit.

    python -m experiments.unchanged --record=CHECKOUT --out=FILE.json [--runs=NAME,...]
    python -m experiments.unchanged --compare=FILE.json --checkout=. [--runs=NAME,...]

For: every rule, sharing, wiring, kind of iteration, model, task, optimizer and mesh that a config
can choose, a few updates each at a tiny size. A run is `launch.py` in a process of its own on one
core, since the number of threads changes bits. What is compared: all rows of metrics.jsonl without
their times, and all arrays of the last checkpoint, the optimizer's too. `--runs` takes patterns,
"rule_*,mesh_*". `--workdir=DIR` keeps the runs. `--begin=DIR` takes each run from DIR, where
another checkout left it, cuts it back to half its length, and goes on from there. `--programs=DIR`
keeps compiled programs of runs on one device: a program that is the same is not compiled again.
Exit code 0: all runs are equal. Not for: comparing machines or versions of JAX, commands on trained
models, TFDS sets. It uses nothing of `ngc_jax`, so that both checkouts may be of any layout.
"""

import argparse
import concurrent.futures
import fnmatch
import hashlib
import itertools
import json
import math
import os
import pathlib
import platform
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from typing import Any, NamedTuple

Path = pathlib.Path
Record = dict[str, Any]
TIMES = re.compile("second|mfu|memory")  # in the names of values that no two runs share
LIMIT, STOPPED = 900.0, 75  # seconds that a process may take; launch.py's exit code after SIGTERM
WORDS = "group state signal round port weight drive neuron token core leak send read rule".split()
SETS = {  # fields that runs share, by a word that stands for them
    # The loop alone: each stack of stages is one more thing to compile, and so is each measure.
    "TINY": """data.path={text} data.context=16 model.width=16 model.hidden=32 model.groups=4
        model.heads=2 model.prelude=0 model.coda=0 train.steps=8 train.batch_size=4
        train.warmup_steps=2 train.log_every=1 eval.every=4 eval.windows=8 eval.batch_size=8
        checkpoint.every_steps=4 stability.every=0 stability.tokens=32 stability.rounds=3""",
    "REAL": """data.path={text} train.steps=8 train.batch_size=4 train.warmup_steps=2
        train.log_every=1 eval.windows=8 checkpoint.every_steps=4 stability.every=0""",
    "STACKS": "model.prelude=1 model.core=2 model.coda=1",
    "WATCH": "stability.every=4",
    "DENSE": "model.rule=dense model.prelude=1 model.core=0",  # what compiles soonest
    "LOW_RANK": "model.rule=broadcast model.p_intra=0",
    "CELLS": "model.kind=recurrent",
    "BDH": "model.kind=bdh model.hidden=64",
    "MANY": "model.rounds=3 iteration.high=4 iteration.mean=2.5",
    "WIRED": "model.groups=8 model.channels=3 model.wiring_seed=3",
    "CHANGING": """model.groups=8 model.channels=4 rewire.channels=2 rewire.every=2 rewire.end=1.0
        rewire.exchange=0.5""",
    "FEW": "data.path= data.problems=60",
    "MESH": "devices=8 train.batch_size=8",
}
# A run a line, or one for each name in brackets, which {} is: its fields, of which the last one
# counts. `config`: of configs/, with TINY where none is named. `broken`: "lost", later checkpoints
# are removed and it starts again, or "stop", by SIGTERM. `code`: of launch.py's exit, 3 = diverged.
TABLE = """\
rule_addressed          STACKS WATCH
rule_[broadcast,metric,metric_diagonal,metric_scalar,tanh,shift,riemannian,none] model.rule={}
rule_distance           model.rule=distance model.p_inter=5
rule_within             model.p_intra=2
rule_block              model.p_intra=4 model.form=signals model.rule=broadcast
rule_no_intra           model.p_intra=0
signals_[addressed,metric_diagonal,metric_scalar,tanh,none] model.form=signals model.rule={} WATCH
signals_metric          model.form=signals model.rule=metric model.p_intra=2
message_silu            model.message_activation=silu
message_relu            model.message_activation=relu model.rule=metric
message_gelu            model.message_activation=gelu model.wiring=ring WIRED
sharing_[qkv,gate_up]   model.sharing={}
sharing_depth2          model.sharing=depth2 STACKS WATCH
sharing_readers         model.sharing=depth2,readers model.core=4
sharing_sets            model.sharing=query+value,1+3 model.form=signals STACKS
sharing_all_metric      model.sharing=qkv,gate_up,depth3 model.core=3 model.rule=metric
wiring_[others,small_world,regular,block] model.wiring={} WIRED
wiring_ring             model.wiring=ring model.form=signals WIRED
dynamic_gradient        model.wiring=dynamic CHANGING WATCH
dynamic_[correlation,random] model.wiring=dynamic rewire.regrow={} CHANGING STACKS
dynamic_shared          model.wiring=dynamic model.sharing=qkv,1+3 CHANGING STACKS
                        rewire.begin=0.25 train.accumulation=2 train.compute_dtype=bfloat16
dynamic_ports           model.wiring=dynamic_ports model.p_inter=2 model.form=signals CHANGING
dynamic_ports_shared    model.wiring=dynamic_ports model.sharing=qkv,depth2 model.core=2 CHANGING
                        rewire.regrow=correlation
gates                   model.gates=True STACKS
gates_dense             model.gates=True DENSE
no_loop                 model.prelude=2 model.core=0 WATCH
one_round               model.rounds=1
loop                    model.rounds=4 model.core=2 model.keep=0.5 WATCH
loop_no_drive           model.rounds=3 model.drive=False WATCH
loop_start              model.rounds=3 model.route=start model.qk_gain=3.0 WATCH
loop_tanh               model.rounds=3 model.state_activation=tanh model.exchange_activation=gelu
plain                   model.qk_norm=False model.exchange_activation=none model.attend=6
remat_none              model.remat=none model.rounds=3
remat_stages            model.remat=stages model.exchange_activation=relu STACKS
init_rank_[addressed,metric] model.init_rank=4 model.rule={}
init_rank_dense         model.init_rank=3 DENSE
iteration_uniform       iteration.rounds=uniform MANY
iteration_lognormal     iteration.rounds=lognormal_poisson iteration.backprop=2 MANY
iteration_backprop      iteration.backprop=1 MANY
iteration_supervise     iteration.supervise_every=1 iteration.supervise_weight=0.5 MANY
iteration_noise         iteration.noise=0.5 model.state_activation=tanh model.route=start MANY
iteration_all           iteration.rounds=uniform iteration.backprop=3 iteration.noise=0.1 MANY
                        iteration.supervise_every=2 train.accumulation=2 STACKS
iteration_marked        config=ngc_hops REAL FEW data.high=3 data.context=47 model.width=16
held_[contraction,exponent] stability.regulariser={} stability.low=-1.0 stability.high=-0.5
held_jacobian           stability.jacobian=0.1 train.accumulation=2
watch_dense             DENSE WATCH
watch_some              stability.measures=rounds,departure WATCH
warning                 train.learning_rate=0.3 train.warmup_steps=0 DENSE
spikes                  train.spike=1.0 train.steps=96 train.learning_rate=0.001 DENSE
                        train.max_bad_steps=3 train.max_rewinds=9 train.log_every=16
                        eval.every=48 checkpoint.every_steps=16
diverges                code=3 train.learning_rate=1e20 train.warmup_steps=4 DENSE
                        train.max_bad_steps=2 train.max_rewinds=1 checkpoint.every_steps=1
muon                    train.optimizer=muon model.rule=metric model.p_intra=2
muon_tanh               train.optimizer=muon model.rule=tanh train.schedule=wsd
muon_dense              train.optimizer=muon train.weight_decay=0.3 DENSE
accumulation            train.accumulation=2 train.clip_norm=0.1
bfloat16                train.compute_dtype=bfloat16 WATCH
bfloat16_signals        train.compute_dtype=bfloat16 train.schedule=wsd model.form=signals
seed                    seed=7 train.b1=0.8 train.b2=0.95 train.final_fraction=0.0 DENSE
dense_loop              model.rule=dense STACKS
low_rank                LOW_RANK model.form=signals
cola                    LOW_RANK model.message_activation=silu model.exchange_activation=none
                        model.qk_norm=False model.prelude=2 model.core=0
basis_sharing           LOW_RANK model.sharing=depth2,readers model.prelude=4 model.core=0
matched                 DENSE model.match=dense_small:0.02 model.prelude=4 model.heads=4
bdh                     BDH
bdh_isolated            BDH data.isolate_documents=True model.remat=none
recurrent               CELLS model.rounds=2 model.core=2
recurrent_chunk         CELLS model.chunk=8 data.isolate_documents=True
recurrent_signals       CELLS model.form=signals model.sharing=gate_up model.wiring=ring
                        model.channels=2 model.drive=False
recurrent_dense         CELLS model.rule=dense model.remat=none train.compute_dtype=bfloat16
isolate                 data.isolate_documents=True
bpe                     data.tokenizer=bpe data.vocab_size=300 data.validation_fraction=0.2 DENSE
one_file                data.path={text}/00.txt eval.windows=0 DENSE
library                 data.path= data.context=128 eval.batch_size=64 DENSE
task_[parity,running_parity] data.task={} data.high=14 data.problem_seed=5 FEW CELLS
task_[modular,addition,listops,dyck,path,maze,sudoku4,sudoku9] data.task={} data.low=3 data.high=4
                        data.context=256 FEW DENSE
task_[maze,sudoku6]_in_place data.task={}_in_place data.low=3 data.high=4 data.context=96 FEW
                        model.drive=False WATCH
config_[ngc_tiny,ngc_small,dense_small] config={} REAL
config_recurrent_small  config=recurrent_small REAL data.context=32
config_recurrent_parity config=recurrent_parity REAL FEW
config_ngc_base         config=ngc_base TINY data.tfds_name= data.vocab_size=300 model.p_intra=16
                        model.groups=8 train.accumulation=2 model.core=1
mesh_data               MESH
mesh_group              MESH mesh.group=2 WATCH
mesh_fsdp               MESH mesh.fsdp=2 STACKS
mesh_all                MESH mesh.group=2 mesh.fsdp=2 train.accumulation=2
mesh_metric             MESH mesh.group=2 model.rule=metric model.sharing=qkv model.gates=True
mesh_tanh               MESH mesh.group=2 mesh.fsdp=2 model.rule=tanh
mesh_ring               MESH mesh.group=2 model.wiring=ring WIRED
mesh_dynamic            MESH mesh.group=2 mesh.fsdp=2 model.wiring=dynamic CHANGING
mesh_dense              MESH mesh.group=2 mesh.fsdp=2 train.optimizer=muon DENSE
mesh_recurrent          MESH mesh.fsdp=2 CELLS
mesh_bdh                MESH mesh.group=2 mesh.fsdp=2 BDH
resumed                 broken=lost train.steps=16 checkpoint.every_steps=8 iteration.noise=0.2
resumed_dynamic         broken=lost model.wiring=dynamic train.optimizer=muon CHANGING
resumed_recurrent       broken=lost CELLS model.chunk=8
resumed_mesh            broken=lost MESH mesh.group=2 mesh.fsdp=2
stopped                 broken=stop train.steps=400 checkpoint.every_steps=200 train.log_every=20
                        eval.every=200 DENSE
"""


class Run(NamedTuple):
    """A training run: its fields, each FIELD=VALUE, and how it is done."""

    fields: list[str]  # {text} in them is a folder of documents
    config: str = "ngc_tiny"
    broken: str = ""
    devices: int = 1
    code: int = 0


def runs_of(table: str) -> dict[str, Run]:
    """The runs of a table, by name."""
    runs = {}
    for line in re.sub(r"\n +", " ", table).splitlines():
        before, names, after = re.fullmatch(r"([^[ ]*)(?:\[(.*)\])?(.*)", line).groups()
        for name in (names or "").split(","):
            rest, *words = after.replace("{}", name).split(" ")
            words = words if "config=" in line else ["TINY", *words]
            pairs = [word.split("=", 1) for word in " ".join(SETS.get(w, w) for w in words).split()]
            fields = dict(pairs)
            own = {key: fields.pop(key) for key in ("config", "broken") if key in fields}
            count = {key: int(fields.pop(key)) for key in ("devices", "code") if key in fields}
            runs[before + name + rest] = Run([*map("=".join, fields.items())], **own, **count)
    return runs


class Place(NamedTuple):
    """Where runs are done."""

    checkout: Path
    home: Path  # their work directories, by name; text/ and cache/ beside them
    begin: Path | None  # holds those that they go on from
    programs: Path | None


def launch(name: str, run: Run, place: Place, stop: bool = False) -> tuple[int, str]:
    """Run launch.py; its exit code, and its last line. `stop`: SIGTERM as soon as it trains."""
    home = place.home
    line = [sys.executable, "launch.py", f"--config=configs/{run.config}.py"]
    line += [f"--workdir={home / name}", f"--config.data.cache_dir={home / 'cache'}"]
    line += [f"--config.{field}".replace("{text}", str(home / "text")) for field in run.fields]
    env = {key: value for key, value in os.environ.items() if key[:4] not in ("XLA_", "JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPYCACHEPREFIX": str(home / "cache" / "python")}
    if run.devices > 1:
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={run.devices}"
    elif place.programs:  # for several devices XLA's CPU backend keeps no sound programs
        env["JAX_COMPILATION_CACHE_DIR"] = str(place.programs)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process, last = subprocess.Popen(line, cwd=place.checkout, env=env, **pipes), ""
    timer = threading.Timer(LIMIT, process.kill)
    timer.start()
    for said in process.stdout or ():
        last = said.strip() or last
        if stop and said.startswith("step "):
            process.terminate()
            stop = False
    timer.cancel()
    return process.wait(), last


def checkpoints(workdir: Path) -> dict[int, Path]:
    paths = (workdir / "checkpoints").glob("*")
    return {int(path.name): path for path in paths if path.name.isdecimal()}


def cut_back(workdir: Path) -> None:
    """Remove the checkpoints of a run's second half, as if it had been killed before they were."""
    steps = checkpoints(workdir)
    for step in [step for step in steps if step > max(steps) / 2]:
        shutil.rmtree(steps[step])


def perform(name: str, run: Run, place: Place) -> Record:
    """Do a run, with its break; how it went."""
    workdir, began = place.home / name, time.monotonic()
    shutil.rmtree(workdir, ignore_errors=True)
    if place.begin:
        run = run._replace(broken="")
        shutil.copytree(place.begin / name, workdir)
        cut_back(workdir)
    code, said = launch(name, run, place, stop=run.broken == "stop")
    if run.broken == "stop" and code != STOPPED:
        code, said = code or -1, f"it was to be stopped, and ended: {said}"
    elif run.broken and code in (0, STOPPED):
        if run.broken == "lost":
            cut_back(workdir)
        code, said = launch(name, run, place)
    return {"code": code, "said": said, "seconds": round(time.monotonic() - began, 1)}


def outcome(workdir: Path) -> Record:
    """All rows without times; of the last checkpoint all arrays, and what was saved beside them."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    log, saved = workdir / "metrics.jsonl", checkpoints(workdir)
    rows = map(json.loads, log.read_text().splitlines() if log.exists() else ())
    found: Record = {"rows": [{k: row[k] for k in row if not TIMES.search(k)} for row in rows]}
    found |= {"arrays": {}, "beside": {}}
    if saved:
        last, reader = saved[max(saved)], ocp.PyTreeCheckpointer()
        tree = reader.metadata(last / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(last / "state", restore_args=as_numpy)
        for path, array in jax.tree_util.tree_leaves_with_path(state):
            digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
            at = jax.tree_util.keystr(path, simple=True, separator="/")
            found["arrays"][at] = [str(array.dtype), list(array.shape), digest]
        beside = json.loads((last / "meta" / "metadata").read_text())
        found["beside"] = {k: beside[k] for k in beside if k not in ("seconds", "versions")}
    return found


def differences(old: Record, new: Record) -> list[str]:
    """In what two outcomes differ, in words; [] where they are equal."""
    found = []
    if old["rows"] != new["rows"]:
        pairs = itertools.zip_longest(old["rows"], new["rows"], fillvalue={})
        i, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        keys = [key for key in a | b if a.get(key, "absent") != b.get(key, "absent")]
        words = [f"{key} {a.get(key, 'absent')} -> {b.get(key, 'absent')}" for key in keys[:2]]
        found.append(f"row {i + 1} (step {(a or b)['step']}): {', '.join(words)}")
        losses = (k for row in old["rows"] for k in row if k.endswith("loss"))
        ...
    return found
