"""Did a refactor change a number? Short training runs of two checkouts, compared to the bit.

    python -m experiments.unchanged --record=CHECKOUT --out=FILE.json [--runs=NAME,...]
    python -m experiments.unchanged --compare=FILE.json --checkout=. [--runs=NAME,...]

For: every rule, sharing, wiring, kind of iteration, model, task, optimizer and mesh that a config
can choose, a few updates each at a tiny size. A run is `launch.py` in a process of its own on one
core, since the number of threads changes bits; `--jobs=2` of them at a time. What is compared: all
rows of metrics.jsonl without their times, and all arrays of the last checkpoint, the optimizer's
too. `--runs` takes patterns, "rule_*,mesh_*". `--workdir=DIR` keeps the runs. `--begin=DIR` takes
each run from such a DIR, cuts it back to half its length, and goes on from there: so a checkout
reads what another one wrote. `--programs=DIR` keeps compiled programs of runs on one device, so
that one that is the same is not compiled again. Exit code 0: all runs are equal. Not for: comparing
machines or versions of JAX, commands on trained models, TFDS sets. It uses nothing of `ngc_jax`, so
that both checkouts may be of any layout; the fields of a config must keep their names.
"""

import argparse
import concurrent.futures
import fnmatch
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

Path = pathlib.Path
Record = dict[str, Any]
Run = dict[str, str]  # fields of the config, and those of HOW
TIMES = re.compile("second|mfu|memory")  # in the names of values that no two runs share
LIMIT, STOPPED = 3600, 75  # seconds that a process may take; launch.py's exit code after SIGTERM
# `config`: of configs/, with TINY where none is named. `broken`: "lost", its later checkpoints are
# removed and it starts again, or "stop", by SIGTERM. `code`: of launch.py's exit, 3 = it diverged.
HOW = {"config": "ngc_tiny", "broken": "", "devices": "1", "code": "0"}
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
    # These two kinds of models refuse what they do not read, so it goes back to its default.
    "CELLS": "model.kind=recurrent model.heads=4 stability.tokens=1024 stability.rounds=8",
    "BDH": """model.kind=bdh model.hidden=64 model.groups=8 model.prelude=1 model.coda=1
        stability.tokens=1024 stability.rounds=8""",
    "MANY": "model.rounds=3",
    "WIRED": "model.groups=8 model.channels=3 model.wiring_seed=3",
    "MOVING": "model.groups=8 model.channels=5 rewire.channels=3 rewire.every=1 rewire.exchange=1",
    "FEW": "data.path= data.problems=60",
    "MESH": "devices=8 train.batch_size=8",
    "SPLIT": "devices=8 train.batch_size=8 mesh.group=2 mesh.fsdp=2",
}
TABLE = """\
rule_addressed          STACKS WATCH
rule_[broadcast,metric,metric_diagonal,metric_scalar,tanh,shift,riemannian] model.rule={}
rule_distance           model.rule=distance model.p_inter=5
rule_within             model.p_intra=2
rule_dense              model.rule=dense STACKS
signals_[metric,metric_diagonal,metric_scalar,none] model.form=signals model.rule={}
message_gelu            model.message_activation=gelu model.wiring=others WIRED
message_relu            model.message_activation=relu model.rule=metric
sharing_fans            model.sharing=qkv,gate_up data.isolate_documents=True
sharing_depth2          model.sharing=depth2 STACKS WATCH
sharing_readers         model.sharing=depth2,readers model.core=4
sharing_sets            model.sharing=query+value,1+3 model.form=signals STACKS
sharing_all_metric      model.sharing=qkv,gate_up,depth3 model.core=3 model.rule=metric
wiring_[small_world,regular,block] model.wiring={} WIRED
wiring_ring             model.wiring=ring model.form=signals model.p_intra=1 WIRED WATCH
dynamic_gradient        model.wiring=dynamic train.optimizer=muon MOVING WATCH
dynamic_correlation     model.wiring=dynamic rewire.regrow=correlation MOVING STACKS
dynamic_shared          model.wiring=dynamic model.sharing=qkv,1+3 MOVING STACKS
                        rewire.begin=0.25 train.accumulation=2 train.compute_dtype=bfloat16
dynamic_ports           model.wiring=dynamic_ports model.p_inter=2 model.form=signals MOVING
dynamic_ports_shared    model.wiring=dynamic_ports model.sharing=qkv,depth2 model.core=2 MOVING
                        rewire.regrow=correlation model.rounds=1
gates                   model.gates=True model.exchange_activation=gelu STACKS
gates_dense             model.gates=True DENSE WATCH
no_loop                 model.prelude=2 model.core=0 model.p_intra=0 WATCH
loop                    model.rounds=4 model.core=2 model.keep=0.5 model.remat=none WATCH
loop_no_drive           model.rounds=3 model.drive=False WATCH stability.measures=rounds,departure
loop_start              model.rounds=3 model.route=start model.qk_gain=3.0 WATCH
plain                   model.qk_norm=False model.exchange_activation=none model.attend=6
remat_stages            model.remat=stages model.exchange_activation=relu STACKS
init_rank_[metric,dense] model.init_rank=4 model.rule={}
iteration_lognormal     iteration.rounds=lognormal_poisson iteration.backprop=2 MANY
                        iteration.high=4 iteration.mean=2.5
iteration_supervise     iteration.supervise_every=1 iteration.supervise_weight=0.5 MANY
iteration_backprop      iteration.backprop=1 model.state_activation=tanh MANY
iteration_noise         iteration.noise=0.5 model.state_activation=tanh model.route=start MANY
iteration_all           iteration.rounds=uniform iteration.backprop=3 iteration.noise=0.1 MANY
                        iteration.supervise_every=2 train.accumulation=2 iteration.high=4 STACKS
iteration_marked        config=ngc_hops REAL FEW data.high=3 data.context=47 model.width=16
held_[contraction,exponent] stability.regulariser={} stability.low=-1.0 stability.high=-0.5
held_jacobian           stability.jacobian=0.1 train.accumulation=2 model.init_rank=8
warning                 train.learning_rate=0.3 train.warmup_steps=0 DENSE
spikes                  train.spike=0.2 train.steps=96 train.learning_rate=1e-6 DENSE
                        train.max_bad_steps=2 train.max_rewinds=9 checkpoint.every_steps=16
diverges                code=3 train.learning_rate=1e20 train.max_bad_steps=2 DENSE
muon_[metric,tanh]      train.optimizer=muon model.rule={} train.schedule=wsd
accumulation            train.accumulation=2 train.clip_norm=0.1 train.b1=0.8 train.b2=0.95
bfloat16                train.compute_dtype=bfloat16 WATCH
cola                    LOW_RANK model.message_activation=silu model.exchange_activation=none
basis_sharing           LOW_RANK model.sharing=depth2,readers model.prelude=4 model.core=0
                        model.form=signals
matched                 DENSE model.match=dense_small:0.0203 model.prelude=4 model.heads=4
bdh                     BDH
bdh_isolated            BDH data.isolate_documents=True model.remat=none
recurrent               CELLS model.rounds=2 model.core=2 model.remat=none
recurrent_signals       CELLS model.form=signals model.sharing=gate_up model.wiring=others
recurrent_dense         CELLS DENSE model.core=1 model.prelude=0 model.drive=False
bpe                     data.tokenizer=bpe data.vocab_size=300 data.validation_fraction=0.2 DENSE
one_file                data.path={text}/00.txt eval.windows=0 seed=7 train.weight_decay=0.3 DENSE
library                 data.path= data.context=128 eval.batch_size=64 DENSE
task_running_parity     data.task=running_parity data.high=14 data.problem_seed=5 FEW CELLS
task_[addition,listops,dyck,path,maze] data.task={} data.low=3 data.high=4 data.context=200 FEW
                        DENSE
task_[sudoku4,maze]_in_place data.task={}_in_place data.low=3 data.high=4 data.context=96 FEW
                        model.drive=False WATCH
config_[ngc_tiny,ngc_small,dense_small] config={} REAL
config_recurrent_small  config=recurrent_small REAL data.context=32
config_recurrent_parity config=recurrent_parity REAL FEW
config_ngc_base         config=ngc_base TINY data.tfds_name= data.vocab_size=300 model.p_intra=16
                        model.groups=8 train.accumulation=2 model.core=1
mesh_group              MESH mesh.group=2 WATCH
mesh_fsdp               MESH mesh.fsdp=2 STACKS
mesh_[metric,tanh]      SPLIT model.rule={} model.sharing=qkv model.gates=True
mesh_ring               SPLIT model.wiring=ring WIRED
mesh_dynamic            SPLIT model.wiring=dynamic MOVING
mesh_dense              SPLIT train.optimizer=muon DENSE
mesh_recurrent          MESH mesh.fsdp=2 CELLS
mesh_bdh                SPLIT BDH
resumed                 broken=lost train.steps=16 checkpoint.every_steps=8 iteration.noise=0.2
                        FEW data.task=modular data.low=2 data.high=8
resumed_dynamic         broken=lost model.wiring=dynamic rewire.regrow=random MOVING
resumed_recurrent       broken=lost CELLS model.chunk=8 data.isolate_documents=True
resumed_mesh            broken=lost SPLIT train.accumulation=2
stopped                 broken=stop train.steps=200 checkpoint.every_steps=100 DENSE
"""


def runs_of(table: str) -> dict[str, Run]:
    """The runs of a table, by name: one a line, or one for each word in brackets, which {} is."""
    runs = {}
    for line in re.sub(r"\n +", " ", table).splitlines():
        name, *words = line.split()
        words = words if "config=" in line else ["TINY", *words]
        before, _, rest = name.partition("[")
        names, _, after = rest.partition("]")
        for one in names.split(","):
            pairs = " ".join(SETS.get(word, word.replace("{}", one)) for word in words).split()
            runs[before + one + after] = HOW | dict(pair.split("=", 1) for pair in pairs)
    return runs


RUNS = runs_of(TABLE)


def launch(name: str, run: Run, place: argparse.Namespace, stop: bool) -> tuple[int, str]:
    """Run launch.py; its exit code and its last line. `stop`: SIGTERM as soon as it trains."""
    home, text = place.workdir, (place.begin or place.workdir) / "text"
    line = ["timeout", str(LIMIT), sys.executable, "launch.py", f"--workdir={home / name}"]
    line += [f"--config=configs/{run['config']}.py", f"--config.data.cache_dir={home / 'cache'}"]
    fields = (f"--config.{field}={value}" for field, value in run.items() if field not in HOW)
    line += [field.replace("{text}", str(text)) for field in fields]
    env = {key: value for key, value in os.environ.items() if key[:4] not in ("XLA_", "JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPYCACHEPREFIX": str(home / "cache" / "python")}
    if run["devices"] != "1":
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={run['devices']}"
    elif place.programs:  # for several devices XLA's CPU backend keeps no sound programs
        env["JAX_COMPILATION_CACHE_DIR"] = str(place.programs)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process, last = subprocess.Popen(line, cwd=place.checkout, env=env, **pipes), ""
    for said in process.stdout or ():
        last = said.strip() or last
        if stop and said.startswith("step "):
            process.terminate()
            stop = False
    return process.wait(), last


def checkpoints(workdir: Path) -> dict[int, Path]:
    """Those of a run, by step."""
    found = (workdir / "checkpoints").glob("*")
    return {int(path.name): path for path in found if path.name.isdecimal()}


def cut_back(workdir: Path) -> None:
    """Remove the checkpoints of a run's second half, as if it had been killed before they were."""
    steps = checkpoints(workdir)
    for step in [step for step in steps if step > max(steps) / 2]:
        shutil.rmtree(steps[step])


def perform(name: str, run: Run, place: argparse.Namespace) -> Record:
    """Do a run, with its break; how it went."""
    workdir, broken, began = place.workdir / name, run["broken"], time.monotonic()
    shutil.rmtree(workdir, ignore_errors=True)
    if place.begin:
        broken = ""
        shutil.copytree(place.begin / name, workdir)
        cut_back(workdir)
    code, said = launch(name, run, place, stop=broken == "stop")
    if broken == "stop" and code != STOPPED:
        code, said = code or -1, f"it was to be stopped, and ended: {said}"
    elif broken and code in (0, STOPPED):
        if broken == "lost":
            cut_back(workdir)
        code, said = launch(name, run, place, stop=False)
    return {"code": code, "said": said, "seconds": round(time.monotonic() - began, 1)}


def outcome(workdir: Path) -> Record:
    """All rows without times; of the last checkpoint all arrays, and what was saved beside them."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from absl import logging

    log, saved = workdir / "metrics.jsonl", checkpoints(workdir)
    rows = map(json.loads, log.read_text("utf-8").splitlines() if log.exists() else ())
    found: Record = {"rows": [{k: row[k] for k in row if not TIMES.search(k)} for row in rows]}
    found |= {"arrays": {}, "beside": {}}
    if saved:
        logging.set_verbosity(logging.ERROR)  # it misses a file that is there where a step is whole
        last, reader = saved[max(saved)], ocp.PyTreeCheckpointer()
        tree = reader.metadata(last / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(last / "state", restore_args=as_numpy)
        for path, array in jax.tree_util.tree_leaves_with_path(state):
            digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
            at = jax.tree_util.keystr(path, simple=True, separator="/")
            found["arrays"][at] = [str(array.dtype), list(array.shape), digest]
        old = last / "meta" / "metadata"  # where 0.1 had it
        manifest = json.loads((last / "MANIFEST.json").read_text("utf-8"))
        beside = json.loads(old.read_text("utf-8")) if old.exists() else manifest["meta"]
        found["beside"] = {k: beside[k] for k in ("data", "rewinds", "passed") if k in beside}
    return found


def differences(old: Record, new: Record) -> list[str]:
    """In what two outcomes differ, in words; [] where they are equal."""
    found = []
    if old["rows"] != new["rows"]:
        none: Record = {}
        pairs = enumerate(itertools.zip_longest(old["rows"], new["rows"], fillvalue=none))
        i, (a, b) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        keys = [key for key in a | b if a.get(key, "absent") != b.get(key, "absent")]
        words = [f"{key} {a.get(key, 'absent')} -> {b.get(key, 'absent')}" for key in keys[:2]]
        found.append(f"row {i + 1} (step {(a or b)['step']}): {', '.join(words)}")
        before, after = (
            {(i, k): v or 0.0 for i, row in enumerate(of["rows"]) for k, v in row.items()}
            for of in (old, new)
        )
        losses = [at for at in before.keys() & after.keys() if at[1].endswith("loss")]
        most = max((abs(before[at] - after[at]) for at in losses), default=math.nan)
        found.append(f"losses differ by at most {most:.3g}")
    was, now = old["arrays"], new["arrays"]
    changed = [path for path in was | now if was.get(path) != now.get(path)]
    if changed:
        first = min(changed, key=lambda path: (not path.startswith("params/"), path))
        here, there = (of.get(first, ["absent"])[:2] for of in (was, now))
        moved = " (the same ones at other paths)" * (sorted(was.values()) == sorted(now.values()))
        found.append(f"{len(changed)} of {len(was | now)} arrays{moved}, {first} {here} -> {there}")
    if old["beside"] != new["beside"]:
        found.append(f"beside the state: {old['beside']} -> {new['beside']}")
    return found


def circumstances(checkout: Path) -> Record:
    """Which commit it is, and what besides it decides on bits. Raises RuntimeError."""
    ask = functools.partial(subprocess.run, cwd=checkout, capture_output=True, text=True)
    used = ask([sys.executable, "-c", "import ngc_jax; print(ngc_jax.__file__)"]).stdout.strip()
    if not used.startswith(f"{checkout}/"):
        raise RuntimeError(f"in {checkout} ngc_jax is imported from {used or 'nowhere'}")
    commit = ask(["git", "describe", "--always", "--dirty"]).stdout.strip()
    told = Path("/proc/cpuinfo").read_text("utf-8")
    cpu = re.findall("^(?:model name|flags).*", told, re.MULTILINE)
    machine = {"cpu": hashlib.sha256("".join(sorted({*cpu})).encode()).hexdigest()[:16]}
    machine |= {"python": sys.version.split()[0]} | {it: version(it) for it in ("jax", "numpy")}
    return {"commit": commit, "machine": machine, "runs": {}}


def write_text(home: Path) -> None:
    """What runs learn from: a folder of documents, always the same."""
    draw = random.Random(0)
    home.mkdir(parents=True, exist_ok=True)
    for i in range(40):
        document = draw.choices("etaoin shrdlu\n", k=draw.randint(100, 2000))
        (home / f"{i:02}.txt").write_text("".join(document), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("record", "out", "compare", "checkout", "workdir", "begin", "programs"):
        parser.add_argument(f"--{name}", type=lambda path: Path(path).expanduser().absolute())
    parser.add_argument("--runs", default="*")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if bool(args.record) == bool(args.compare) or bool(args.record) != bool(args.out):
        parser.error("give --record=CHECKOUT --out=FILE, or --compare=FILE --checkout=CHECKOUT")
    args.checkout, kept = args.record or args.checkout or Path.cwd(), args.workdir
    args.workdir = kept or Path(tempfile.mkdtemp(prefix="unchanged-"))
    new: Record = circumstances(args.checkout)
    old: Record = (
        json.loads(args.compare.read_text("utf-8")) if args.compare else new | {"runs": {}}
    )
    if old["machine"] != new["machine"]:
        print(f"NOT as it was recorded: {old['machine']}, here {new['machine']}")
    write_text(args.workdir / "text")
    shutil.rmtree(args.workdir / "cache", ignore_errors=True)  # other code may prepare other data
    # The table may say a run that is the same in other fields than when it was recorded.
    runs = {name: RUNS.get(name, found["run"]) for name, found in old["runs"].items()} or RUNS
    asked = args.runs.split(",")
    runs = {name: runs[name] for name in runs if any(fnmatch.fnmatch(name, it) for it in asked)}
    ill, began, cores = [], time.monotonic(), sorted(os.sched_getaffinity(0))[: args.jobs]
    free, pin = iter(cores), os.sched_setaffinity  # of a thread, whose processes inherit its core
    jobs = concurrent.futures.ThreadPoolExecutor(len(cores), "", lambda: pin(0, {next(free)}))
    with jobs as pool:
        went = pool.map(lambda name: perform(name, runs[name], args), runs)
        for (name, run), how in zip(runs.items(), went, strict=True):
            failed = how["code"] != int(run["code"])
            words = [f"FAILED with exit code {how['code']}: {how['said']}"] * failed
            try:
                found = {"run": run, **how, **outcome(args.workdir / name)}
                words += differences(old["runs"][name], found) if args.compare else []
                new["runs"][name] = found
            except Exception as error:  # whatever a checkout may have written
                words += [f"FAILED to be read: {error!r}"]
            ill += [name] * bool(words)
            fine = "equal to the bit" if args.compare else "recorded"
            print(f"{name}: {'; '.join(words) or fine} ({how['seconds']} s)", flush=True)
            if args.out:
                args.out.write_text(json.dumps(new), "utf-8")
    if not kept:
        shutil.rmtree(args.workdir)
    print(f"{len(runs) - len(ill)} of {len(runs)} runs {fine}, {time.monotonic() - began:.0f} s")
    print(f"not so: {', '.join(ill) or 'none'}")
    sys.exit(bool(ill))


if __name__ == "__main__":
    main()
