"""Two processes train one model: they stop, lose one another, go on, and end where they would have
ended.
"""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from conftest import QUICK, ROOT, TINY, python
from ml_collections import ConfigDict

from experiments.chaos import outcome
from ngc_jax.config import base
from ngc_jax.runtime import multihost
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import read_rows
from ngc_jax.runtime.preemption import EXIT_CODE
from ngc_jax.training import loop as train

# What is told here does not depend on the model: the one that compiles soonest.
FIELDS = {
    **TINY,
    "model.rule": "dense",
    "model.prelude": 1,
    "model.core": 0,
    "train.steps": 12,
    "eval.every": 6,
    "stability.every": 0,
}


def pair(fields, workdir):
    """Both processes of a run, with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "launch.py", "--config=configs/ngc_tiny.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    command += [f"--coordinator={coordinator}", "--processes=2", "--lost_seconds=5"]
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([*command, f"--process={process}"], cwd=ROOT, env=environment, **pipes)
        for process in range(2)
    ]


def end(both):
    """(exit codes, what process 0 said on stdout, what each said on stderr)"""
    try:
        said = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    return [process.returncode for process in both], said[0][0], [errors for _, errors in said]


def await_line(process, start):
    assert any(line.startswith(start) for line in process.stdout), process.stderr.read()


@pytest.mark.slow
def test_two_processes_lose_one_another_are_stopped_and_go_on_to_the_bit(text, cache, tmp_path):
    fields = {**FIELDS, "data.path": text, "data.cache_dir": cache}
    whole, run = tmp_path / "whole", tmp_path / "run"
    codes, said, errors = end(pair(fields, whole))
    assert codes == [0, 0], errors
    assert "on 4 x cpu (data 4)" in said

    both = pair(fields, run)
    await_line(both[0], "step 6/")
    both[1].kill()
    codes, _, errors = end(both)
    assert codes[0] in (1, -signal.SIGABRT), "it does not wait for ever"
    assert "lost another one" in errors[0] or "another task died" in errors[0]

    both = pair(fields, run)
    await_line(both[0], "step 7/")
    both[1].send_signal(signal.SIGTERM)
    codes, said, errors = end(both)
    assert codes == [EXIT_CODE, EXIT_CODE], errors
    assert "is saved; the same command continues from there" in said
    shutil.copytree(run, tmp_path / "one")

    codes, said, errors = end(pair(fields, run))
    assert codes == [0, 0], errors
    assert "continuing from checkpoint" in said
    assert outcome(run) == outcome(whole)

    config = base()
    config.update_from_flattened_dict(
        {**fields, "data.path": str(text), "data.cache_dir": str(cache)}
    )
    assert train.run(ConfigDict(config), tmp_path / "one"), "one process, on a mesh of one device"
    for ours, theirs in zip(read_rows(tmp_path / "one"), read_rows(whole), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {"train/loss", "eval/loss", "final/loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


RESTORE = """
import sys
import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from ngc_jax.runtime import multihost
from ngc_jax.runtime.checkpoint import Checkpoints, Damaged

coordinator, process, home = sys.argv[1], int(sys.argv[2]), sys.argv[3]
multihost.join(coordinator, 2, process, lost=60)
places = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
state = {"a": jax.make_array_from_callback((8,), places, lambda at: np.arange(8.0)[at])}
like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=places), state)
with Checkpoints(home) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    multihost.exchange(0)
    found = checkpoints.restore(1, like).state["a"]
    mine = [shard.data.tolist() for shard in found.addressable_shards]
    def broken(*args, **kwargs):
        raise OSError("an unreadable disk")
    if process:
        ocp.CompositeCheckpointHandler.restore = broken
    try:
        checkpoints.restore(1, like)
    except Damaged as error:
        print(mine, error, file=sys.stderr)
"""


def test_where_one_cannot_restore_all_say_so_and_none_waits(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    codes, _, errors = end(
        [
            subprocess.Popen(
                [sys.executable, "-c", RESTORE, coordinator, str(process), str(tmp_path / "kept")],
                cwd=ROOT,
                env=environment,
                **pipes,
            )
            for process in range(2)
        ]
    )
    assert codes == [0, 0], errors
    for said, held in zip(
        errors, ([[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, 7.0]]), strict=True
    ):
        assert f"{held} it cannot be restored: an unreadable disk" in said


def test_one_who_waits_in_vain_says_for_whom():
    script = (
        "from ngc_jax.runtime import multihost; multihost.join('127.0.0.1:9', 2, 1, minutes=0.005)"
    )
    done = python("-c", script)
    assert done.returncode == 1
    assert (
        "waiting for all processes of this run (process 1 of 2, coordinator 127.0.0.1:9)"
        in done.stdout
    )
    assert (
        "process 0 at 127.0.0.1:9, or another, is missing; check that the same command was started"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((None, 2, 0), "--coordinator must be given too"),
        (("host:1", None, 0), "--processes must be given too"),
        (("host:1", 2, 2), "--process=2: must be from 0 to --processes - 1 = 1"),
        (("host", 2, 1), "--coordinator='host': must be HOST:PORT of process 0"),
        (("host:1", 2, 1, math.nan), "--join_minutes=nan: must be at most 1,000,000"),
        (("host:1", 2, 1, math.inf), "--join_minutes=inf: must be at most 1,000,000"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        multihost.join(*flags)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}, "SLURM"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # in the batch script itself, outside of srun
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_the_cluster_is_known_by_its_environment(environment, found):
    assert multihost.cluster({"JAX_PLATFORMS": "cpu", **environment}) == found


def test_one_process_agrees_with_itself():
    assert multihost.exchange({"a": [1]}) == [{"a": [1]}]
    with pytest.raises(UserError, match="no"), multihost.agreed():
        raise UserError("no")
