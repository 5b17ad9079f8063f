"""What is learned of a teacher's stream: against NumPy and stage by stage, in parts, on a mesh, and
the memory that it takes.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK, TINY, batch_of, drawn, python

from ngc_jax.analysis import probes
from ngc_jax.config import base, make_model
from ngc_jax.data import NOTHING
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn import stacks
from ngc_jax.nn.params import combine, partition
from ngc_jax.training.step import abstract_state, init_state, make_train_step

VOCAB = 23
# Of two stages that differ in shape: members together or apart, with leaders or dense.
RANKS = (
    "query+key+value:5,attention out:3,gate+up:4,down:0;"
    "query:0,key+value:4,attention out:0,gate+up:6,down:2"
)
LEADERS = {"rule": "leaders", "ranks": RANKS, "groups": 1, "p_intra": 0, "form": "signals"}
ANSWERED = np.ones((8, 8), bool)  # all tokens of the batch but those after the last target
ANSWERED[0, 2:] = False
STATES_ALONE = {"learning_rate": 0.0}


def models(**fields):
    """A config, a model with leaders, and a dense one of as many stages."""
    config = base()
    config.update_from_flattened_dict({**TINY, "model.core": 0, "train.batch_size": 8})
    config.model.update({"prelude": 2, **LEADERS})
    model = make_model(config, VOCAB)
    config.model.update({"prelude": 1, "coda": 1, "rule": "dense", "ranks": "", "form": "weights"})
    config.train.update(fields)
    return config.train, model, make_model(config, VOCAB)


def batch():
    made = batch_of(np.random.default_rng(0).integers(0, VOCAB, (8, 9)).astype(np.int32))
    made.targets[~ANSWERED], made.targets[1, 3] = NOTHING, NOTHING
    return made


@functools.cache
def before():
    """Parameters of both models."""
    _, model, teacher = models()
    return drawn(model), drawn(teacher)


@functools.cache
def updated(imitate, **fields):
    """The scalars of an update, its gradient (from Adam's first moment), and the state after it."""
    config, model, teacher = models(imitate=imitate, clip_norm=1e9, **fields)
    state = init_state(model, config, 0, before()[0])
    step = jax.jit(make_train_step(model, config, teacher=teacher))
    after, scalars = step(state, batch(), before()[1])
    adam = next(one for one in jax.tree.leaves(after.optimizer, is_leaf=_moments) if _moments(one))
    return scalars, jax.tree.map(lambda m: m / (1 - config.b1), adam.mu), after


def _moments(node):
    return hasattr(node, "mu")


@jax.jit
def alone(params, taught):
    """Streams after each stage, of model and teacher, and gradients of each stage by itself."""
    _, model, teacher = models()
    x, told = (m.embed(p, batch()) for m, p in ((model, params), (teacher, taught)))
    found = []
    for number, theirs in enumerate(stacks.stages_of(stacks.join_stages(teacher.shape, taught)[0])):
        told = probes.run_stage(teacher.shape, number, theirs, batch(), told)[0]

        def off(own, fixed, x=x, told=told, number=number):
            own = combine(own, fixed)
            made = probes.run_stage(model.shape, number, own, batch(), x)[0]
            error = jnp.sum((made - told) ** 2, axis=-1) / jnp.sum(told**2, axis=-1)
            return jnp.sum(error * ANSWERED) / np.sum(ANSWERED) / 2, made

        own, fixed = partition(params["prelude"][str(number)], model._info[number])
        grads, x = jax.grad(off, has_aux=True)(own, fixed)
        found.append((x, told, grads))
    return found, model.unembed(params, x), teacher.unembed(taught, told)


def test_distances_are_those_of_numpy():
    found, *both = alone(*before())
    errors = []
    for x, told, _ in found:
        x, told = (np.asarray(a, np.float64) for a in (x, told))
        error = np.sum((x - told) ** 2, axis=-1) / np.sum(told**2, axis=-1)
        errors.append(error[ANSWERED])
    off, counts = np.mean(errors), batch().targets >= 0  # of tokens, and of targets
    logits, said = (np.asarray(jax.nn.log_softmax(one), np.float64) for one in both)
    kl = np.sum(np.sum(np.exp(said) * (said - logits), axis=-1) * counts) / np.sum(counts)
    nats = -np.take_along_axis(logits, np.maximum(batch().targets, 0)[..., None], -1)[..., 0]
    for imitate, wanted in {"outputs": kl, "stream": kl + off, "stages": off}.items():
        scalars, *_ = updated(imitate, **(STATES_ALONE if imitate == "outputs" else {}))
        assert float(scalars["train/distance"]) == pytest.approx(wanted, rel=1e-4), imitate
        loss = np.sum(nats * counts) / np.sum(counts)
        assert float(scalars["train/loss"]) == pytest.approx(loss, rel=1e-4), imitate


def test_gradients_of_stages_are_those_of_each_stage_alone():
    _, grads, after = updated("stages")
    for number, (_, _, wanted) in enumerate(alone(*before())[0]):
        both = map(jax.tree.leaves, (grads["prelude"][str(number)], wanted))
        for got, leaf in zip(*both, strict=True):
            # rounding is of the largest terms of a sum, whatever comes of it
            np.testing.assert_allclose(got, leaf, rtol=2e-4, atol=1e-5 * np.abs(leaf).max())
    for name in ("embed", "norm", "unembed"):
        jax.tree.map(np.testing.assert_array_equal, before()[0][name], after.params[name])


def test_states_alone_count_where_the_learning_rate_is_0():
    scalars, grads, _ = updated("outputs", **STATES_ALONE)
    assert not np.any(grads["embed"])
    squares = sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(grads))
    assert float(scalars["train/grad_norm"]) == pytest.approx(np.sqrt(squares), rel=1e-5)


def test_parts_of_a_batch_have_its_distance():
    whole, grads, _ = updated("stages")
    parts, same, _ = updated("stages", accumulation=4)
    assert float(parts["train/distance"]) == pytest.approx(float(whole["train/distance"]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), grads, same)


@pytest.mark.parametrize("apart", [False, True])
def test_memory_of_stages_does_not_grow_with_their_number(apart):
    def needed(imitate, stages):
        config = base()
        config.update_from_flattened_dict({**TINY, "model.core": 0})
        config.train.imitate = imitate
        config.model.update({"prelude": stages, "rule": "dense", "groups": 1})
        model = teacher = make_model(config, VOCAB)
        if apart:
            ranks = ";".join([RANKS.split(";")[0]] * stages)
            config.model.update(LEADERS | {"ranks": ranks})
            model = make_model(config, VOCAB)
        like = jax.eval_shape(lambda: init_state(model, config.train, 0))
        taught = jax.eval_shape(teacher.init, jax.random.key(0))
        step = jax.jit(make_train_step(model, config.train, teacher=teacher))
        compiled = step.lower(like, batch_of(np.zeros((16, 65), np.int32)), taught).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = (needed("stages", stages) for stages in (2, 4))
    assert many < (1.25 if apart else 1.05) * few
    assert apart or needed("outputs", 4) > 1.5 * many


# ---- In a process that has 8 devices ----


def on_a_mesh():
    """The distance before an update on a mesh, and the norm of its gradient."""
    config, model, teacher = models(imitate="stages", clip_norm=1e9)
    settings = base().mesh
    settings.update({"fsdp": 2, "group": 2})
    mesh = meshes.make_mesh(settings)
    places = meshes.shardings(abstract_state(model, config, mesh))
    place = partial(meshes.abstract_param, mesh)
    theirs = meshes.shardings(jax.tree.map(place, before()[1], teacher.param_info()))
    step = meshes.with_mesh(mesh, make_train_step(model, config, teacher=teacher))
    step = jax.jit(step, out_shardings=(places, meshes.replicated(mesh)))
    state = jax.device_put(init_state(model, config, 0, before()[0]), places)
    given = meshes.put_batch(mesh, batch()), jax.device_put(before()[1], theirs)
    _, scalars = step(state, *given)
    print(*(float(scalars[name]) for name in ("train/distance", "train/grad_norm")))


@pytest.mark.slow
def test_a_mesh_gives_the_same_distance():
    script = "import sys; sys.path.insert(0, 'tests'); import test_imitation; "
    script += "test_imitation.on_a_mesh()"
    done = python("-c", script, XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK}")
    assert done.returncode == 0, done.stderr
    scalars, *_ = updated("stages")
    wanted = [float(scalars[name]) for name in ("train/distance", "train/grad_norm")]
    np.testing.assert_allclose(list(map(float, done.stdout.split())), wanted, rtol=1e-4)
