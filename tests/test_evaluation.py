"""Evaluation counts what it should: each held-out window once, and attention as in training."""

import sys

import jax
import numpy as np
import pytest
from conftest import QUICK, TINY, python, shaken

from ngc_jax.config import base, make_model
from ngc_jax.data.batches import Windows
from ngc_jax.data.tasks import TASKS
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.data.tokens import Data
from ngc_jax.nn import mesh as meshes
from ngc_jax.training.evaluation import Settled, at_rounds, compile_watch, examine


def watched(windows: int, tokens: int) -> float:
    """The slope along tokens of an untrained model, on text of so many windows of 16 tokens."""
    config = base()
    config.update_from_flattened_dict(
        {**TINY, "stability.tokens": tokens, "stability.measures": "tokens"}
    )
    model = make_model(config, Bytes.vocab)
    stream = np.random.default_rng(0).integers(0, 256, 16 * windows + 1, np.uint8)
    text = Windows(stream, config.data.context, Bytes.mark)
    data = Data(Bytes(), text, text, "", "")
    watch = compile_watch(model, config, meshes.make_mesh(config.mesh), data)
    return watch(shaken(jax.jit(model.init)(jax.random.key(0))))["stability/contraction_per_token"]


def test_each_held_out_window_counts_once_where_there_are_few():
    assert watched(windows=3, tokens=1024) == watched(windows=3, tokens=48)


@pytest.mark.slow
def test_each_window_counts_equally_where_there_are_fewer_than_devices():
    script = f"import sys; sys.path[:0] = {sys.path[:1]}; import test_evaluation as t; "
    script += "print(t.watched(windows=3, tokens=1024))"
    done = python("-c", script, XLA_FLAGS=f"--xla_force_host_platform_device_count=4 {QUICK}")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(watched(windows=3, tokens=48), rel=1e-5)


@pytest.fixture(scope="module")
def parity(cache):
    """An untrained model of parity whose attention looks back on 3 tokens."""
    config = base()
    config.update_from_flattened_dict({**TINY, "data.task": "parity", "model.attend": 3})
    config.data.cache_dir = str(cache)
    model = make_model(config, len(TASKS["parity"].symbols))
    return model, shaken(jax.jit(model.init)(jax.random.key(0))), config


def test_examining_attends_as_training_did(parity):
    default = examine(*parity, 8, 40)
    assert default == examine(*parity, 8, 40, attend=3)
    assert default != examine(*parity, 8, 40, attend=0)


def test_rounds_are_those_of_training_or_those_asked_for(parity):
    model, _, config = parity
    assert at_rounds(model, config, None) == (model, None)
    assert at_rounds(model, config, 5)[0].shape.rounds == 5
    few = examine(*parity, 8, 40, rounds=Settled(tolerance=1e9))
    many = examine(*parity, 8, 40, rounds=Settled(tolerance=1e-9, cap=4))
    assert few["rounds"] < many["rounds"] == 4
    assert many["loss"] == pytest.approx(examine(*parity, 8, 40, rounds=4)["loss"], abs=1e-5)
