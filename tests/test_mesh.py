"""Meshes: the same losses on every one, arrays that lie where the table says, and only signals
between groups.
"""

# ruff: noqa: E501 (a program of XLA)

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK, batch_of, drawn, python
from jax.sharding import AbstractMesh

from configs import ngc_base
from ngc_jax import count
from ngc_jax.commands import collectives
from ngc_jax.config import base, make_model, validate
from ngc_jax.core.rules.addressed import Addressed
from ngc_jax.core.wiring import WIRINGS
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.nn import mesh as meshes
from ngc_jax.runtime.checkpoint import Checkpoints, digest
from ngc_jax.runtime.errors import UserError
from ngc_jax.training import traffic
from ngc_jax.training.step import abstract_state, init_state, make_train_step

SMALL = {
    "data.context": 8,
    "model.width": 32,
    "model.hidden": 64,
    "model.groups": 8,
    "model.heads": 8,
    "model.prelude": 1,
    "model.core": 0,
    "model.coda": 0,
    "train.batch_size": 8,
    "train.steps": 50,
    "train.warmup_steps": 5,
}
MODELS = {
    "addressed": {
        "model.delays": "taps:2",
        "model.dropout": 0.1,
        "model.state_dropout": 0.05,
        "train.label_smoothing": 0.1,
        "train.ema": 0.9,
    },
    "dense": {"model.rule": "dense"},
    "recurrent": {
        "model.kind": "recurrent",
        "model.prelude": 0,
        "model.core": 1,
        "stability.every": 0,
    },
    "bdh": {
        "model.kind": "bdh",
        "model.hidden": 64,
        "train.learning_rate": 1e-3,
        "train.ema": 0.9,
        "stability.every": 0,
    },
}
ONE = (1, 1, 1)
MESHES = ((1, 8, 1), (1, 1, 8), (2, 2, 2))  # 8 along "data" are in tests/test_train.py


def settings(**fields):
    config = base()
    config.update_from_flattened_dict({**SMALL, **fields})
    return config


def mesh_of(*shape):
    config = settings(**dict(zip(("mesh.data", "mesh.fsdp", "mesh.group"), shape, strict=True)))
    return meshes.make_mesh(config.mesh, jax.devices()[: np.prod(shape)])


# ---- In a process that has 64 devices ----


def like(config, mesh):
    return abstract_state(make_model(config, Bytes.vocab), config.train, mesh)


def losses_on(config, mesh, state):
    """Losses of 50 updates from a state, and the state after them."""
    draw = np.random.default_rng(0)
    step = make_train_step(make_model(config, Bytes.vocab), config.train)
    places = meshes.shardings(like(config, mesh))
    step = jax.jit(meshes.with_mesh(mesh, step), out_shardings=(places, meshes.replicated(mesh)))
    state, losses = jax.device_put(state, places), []
    for _ in range(config.train.steps):
        tokens = (draw.integers(0, 257, (8, 1)) + np.arange(9)) % 257
        batch = meshes.put_batch(mesh, batch_of(tokens.astype(np.int32), Bytes.mark))
        state, scalars = step(state, batch)
        losses.append(float(scalars["train/loss"]))
    return np.array(losses), state


def compare_meshes(home):
    for name, fields in MODELS.items():
        config = settings(**fields)
        model, mesh = make_model(config, Bytes.vocab), mesh_of(2, 2, 2)
        places = meshes.shardings(like(config, mesh))
        start = jax.jit(
            lambda model=model, c=config: init_state(model, c.train, 0), out_shardings=places
        )()
        alone, _ = losses_on(config, mesh_of(*ONE), start)
        assert alone[-1] < alone[0] - 0.3, name
        for shape in {"addressed": MESHES, "recurrent": ((2, 4, 1),)}.get(name, MESHES[-1:]):
            spread, state = losses_on(config, mesh_of(*shape), start)
            np.testing.assert_allclose(spread, alone, rtol=1e-5, err_msg=f"{name} on {shape}")
        print(name, "equal")
    restore_elsewhere(config, state, home)


def restore_elsewhere(config, state, home):
    """From 8 devices to 4 to 1 and back: the same to the bit, and each time where the mesh says."""
    written, step = digest(state), int(state.step)
    for place, shape in enumerate(((1, 2, 2), ONE, (2, 2, 2))):
        checkpoints = Checkpoints(home / str(place))
        checkpoints.save(step, state, {})
        checkpoints.wait()
        wanted = like(config, mesh_of(*shape))
        state = checkpoints.restore(step, wanted).state
        checkpoints.close()
        assert digest(state) == written
        jax.tree.map(
            lambda a, b: a.sharding == b.sharding or pytest.fail(f"{a.sharding}"), state, wanted
        )
    print("restored")


def count_signals():
    """One number for each synapse and partner group, where tensor parallelism moves activations."""
    config = settings(**{"model.width": 128, "model.hidden": 384, "model.p_inter": 1})
    config.data.context, config.train.batch_size = 128, 16
    mesh, tokens = mesh_of(1, 1, 8), 16 * 128
    ours, theirs = (
        {kind: sent / tokens for kind, sent in traffic.wire_bytes(program.as_text()).items()}
        for program in (
            traffic.compile_forward(c, mesh) for c in (config, traffic.dense_of(config))
        )
    )
    # for the logits each device takes an eighth of the tokens
    others, synapses, stream = 7, 7, 128 / 8
    assert ours["all-to-all"] == 4 * others * (synapses + stream / 8)
    assert ours["all-reduce"] == pytest.approx(4 * 3 * 2 * 7 / 8, rel=0.01), (
        "a scalar for each norm"
    )
    assert theirs["all-reduce"] == pytest.approx(4 * 2 * 2 * 7 / 8 * 128, rel=0.01), (
        "after attention, and after down"
    )
    assert sum(theirs.values()) > 5 * sum(ours.values())
    print("counted")


def crossings(hlo):
    """The collectives of a compiled program, and those that its first result waits for."""
    line = re.compile(r"^ +(ROOT )?(%[\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:,|$)", re.M)
    lines = line.findall(hlo.split("ENTRY")[1])
    found = {name: (kind, re.findall(r"%[\w.-]+", args)) for _, name, kind, args in lines}
    waits, left = set(), next(found[name][1][:1] for root, name, *_ in lines if root)
    while left:
        waits.add(name := left.pop())
        left += {*found[name][1]} - waits
    moving = {name: kind for name, (kind, _) in found.items() if kind.startswith("all-")}
    return Counter(moving.values()), Counter(moving[name] for name in moving if name in waits)


def decode_late():
    """Groups on eight devices: where all ports are late, no logit waits for a signal of its token."""
    for delays, late in (("1", 4), ("0,1", 0)):
        config = settings(**{"model.delays": delays, "model.p_inter": 2})
        model, mesh = make_model(config, 50), mesh_of(1, 1, 8)
        params, x, seen = drawn(model), jnp.arange(12).reshape(2, 6), []
        place = functools.partial(meshes.abstract_param, mesh)
        places = meshes.shardings(jax.tree.map(place, params, model.param_info()))
        for own, on in ((params, mesh_of(*ONE)), (jax.device_put(params, places), mesh)):
            cache = jax.jit(meshes.with_mesh(on, functools.partial(model.init_cache, 2, 6)))()
            step = jax.jit(meshes.with_mesh(on, model.decode))
            step = step.lower(own, x[:, :1], cache, 0).compile()
            for t in range(6):
                logits, cache = step(own, x[:, t : t + 1], cache, t)
            seen.append(logits)
        np.testing.assert_allclose(*seen, rtol=1e-4, atol=1e-4)
        moved, waited = crossings(step.as_text())
        assert moved["all-to-all"] == 4, "of each synapse"
        assert waited["all-to-all"] == 4 - late, delays
        assert waited["all-reduce"] == 3, "a scalar for each norm"
    print("late")


def compile_base():
    config = ngc_base.get_config()
    config.mesh.fsdp, config.mesh.group = 8, 8
    validate(config)
    model = make_model(config, config.data.vocab_size)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert count.parameters(params, model.param_info()).total == pytest.approx(125e6, rel=0.1)
    alone, apart = (
        meshes.bytes_per_device(abstract_state(model, config.train, mesh_of(1, parts, 1)))
        for parts in (1, 8)
    )
    assert apart < alone / 7
    memory = traffic.compile_update(config, mesh_of(1, 8, 8)).memory_analysis()
    print(memory)
    assert memory.argument_size_in_bytes < 1.2 * alone / 64 + 2**20
    assert memory.temp_size_in_bytes < 16 * 2**30
    print("compiled")


@pytest.mark.slow
def test_losses_checkpoints_and_traffic_on_many_devices(tmp_path):
    script = (
        "import sys, pathlib; sys.path.insert(0, 'tests'); import test_mesh as t\n"
        f"t.compare_meshes(pathlib.Path({str(tmp_path)!r})); t.count_signals(); t.decode_late(); t.compile_base()"
    )
    done = python("-c", script, XLA_FLAGS=f"--xla_force_host_platform_device_count=64 {QUICK}")
    said = done.stdout.splitlines()
    wanted = [
        "addressed equal",
        "dense equal",
        "recurrent equal",
        "bdh equal",
        "restored",
        "counted",
        "late",
        "compiled",
    ]
    assert [line for line in said if line in wanted] == wanted, done.stdout + done.stderr


# ---- In this one ----


def test_two_axes_of_an_array_cannot_go_to_the_same_devices():
    assert meshes.partition_spec("window", None, "group") == jax.sharding.PartitionSpec(
        ("data", "fsdp"), None, "group"
    )
    for axes in (("group", "vocab"), ("window", "stored"), ("row", "group")):
        with pytest.raises(ValueError, match="same mesh axis"):
            meshes.partition_spec(*axes)


# what no neuron has for itself
WHOLE = {
    "scale",
    "leak",
    "drive",
    "map",
    "bias",
    "gain",
    "offset",
    "ns_coeffs",
    "hears",
    "position",
}


@pytest.mark.parametrize(
    "fields",
    [
        {"train.optimizer": "muon", "model.sharing": "qkv,depth2", "model.core": 2},
        {"model.wiring": "ring"},
        {"model.wiring": "dynamic", "model.gates": True},
        {"model.rule": "metric", "model.p_intra": 2},
        {"model.rule": "riemannian"},
        {"model.rule": "broadcast"},
        {"data.kind": "images", "model.kind": "vision"},
        MODELS["dense"],
        MODELS["bdh"],
    ],
)
def test_every_array_of_a_state_is_split_or_known_to_be_whole(fields):
    """Else: say in the parameter's record which axis counts groups, or here that none does."""
    config = settings(**fields)
    mesh = AbstractMesh((2, 2, 8), meshes.MESH_AXES)
    state = abstract_state(make_model(config, 264), config.train, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = re.findall(r"\w+", jax.tree_util.keystr(path[-1:]))[-1]
        whole = leaf.ndim == 0 or name in WHOLE or "gates" in jax.tree_util.keystr(path)
        assert whole or "group" in leaf.sharding.spec, (path, leaf.sharding)
        leaf.sharding.shard_shape(leaf.shape)  # raises where parts are not equal


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mesh.group": 8},
            "mesh.group=8: .* model.heads=4 and of the 8 devices of a process: 1, 2, 4",
        ),
        ({"mesh.group": 0}, "mesh.group=0: must be 1 or more"),
        (
            {"mesh.fsdp": 3, "mesh.group": 2},
            "mesh.fsdp=3: must be a divisor of the 8 devices .* mesh.group=2: 1, 2, 4",
        ),
        ({"mesh.data": 4, "mesh.group": 4}, "mesh.data=4: must be the 8 devices here .*, 2, or -1"),
        (
            {"mesh.fsdp": 2, "train.batch_size": 12},
            "train.batch_size=12: .* x 8 parts .*, for instance 16",
        ),
        (
            {"eval.batch_size": 12},
            "eval.batch_size=12: must be a multiple of 8 parts .*, for instance 16",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_with_numbers_that_do(fields, message, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    config = base()
    config.mesh.group = 2
    validate(config)
    config.update_from_flattened_dict({"mesh.group": 1, **fields})
    with pytest.raises(UserError, match=message):
        validate(config)


def test_states_of_speakers_make_the_same_weights():
    wiring = WIRINGS["small_world"](6, 2, 3)
    rule = Addressed(wiring)
    draw = np.random.default_rng(0)
    pre, post = (draw.normal(size=(6, neurons, 2, 2)).astype(np.float32) for neurons in (2, 3))

    @jax.jit
    def both(pre, post):
        return Addressed().weights(*rule.to_speakers(pre, post)), rule.weights(pre, post)

    np.testing.assert_array_equal(*both(pre, post))


PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %ar = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %ag = bf16[8,4]{1,0} all-gather(%y), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %w = (s32[], f32[8,4]{1,0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %w2 = (s32[], f32[8,4]{1,0}) while(%t), condition=%cond, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %aa = (f32[2,4]{1,0}, /*index=1*/f32[2,4]{1,0}) all-to-all(%a, %b), replica_groups=mesh['d'=4,'g'=2] {'g'}
  %at = f32[2,4]{1,0} all-to-all(%a), replica_groups=mesh['d'=4,'g'=2], device_ids=([2,4]T(1,0)) {'d'}, dimensions={0}
  %rs = f32[2,4]{1,0} reduce-scatter(%c), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %cp = f32[2,4]{1,0} collective-permute(%d), source_target_pairs={{0,1},{1,0}}
  %alone = f32[8,4]{1,0} all-reduce(%e), replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_wire_bytes_are_the_rings_and_loops_count_as_often_as_they_run():
    assert traffic.wire_bytes(PROGRAM) == {
        "all-reduce": 15 * 2 * 128 * 3 / 4,
        "all-gather": 15 * 64 * 3 / 4,
        "all-to-all": 64 * 1 / 2 + 32 * 3 / 4,
        "reduce-scatter": 32 * 3,
        "collective-permute": 32,
    }
    with pytest.raises(ValueError, match="a loop of unknown length"):
        traffic.wire_bytes(PROGRAM.replace("known_trip_count", "trips"))


def test_meshes_are_read_from_the_command_line():
    assert collectives.read_mesh("fsdp:2,group:4") == {"data": 1, "fsdp": 2, "group": 4}
    with pytest.raises(UserError, match="for instance group:8"):
        collectives.read_mesh("groups:8")
