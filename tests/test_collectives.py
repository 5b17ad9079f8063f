"""The command that counts what crosses between devices: its flags, and the dense model beside."""

import itertools

import pytest
from conftest import python

from ngc_jax.config import base, config_names, named, reset_unread, validate
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.traffic import dense_of, layers


@pytest.mark.parametrize("name", config_names())
def test_a_valid_config_has_a_valid_dense_counterpart(name):
    config = named(name)
    dense = dense_of(config)
    validate(dense)
    assert (dense.model.rule, dense.model.prelude, dense.model.core) == ("dense", layers(config), 0)
    assert (dense.model.width, dense.model.hidden) == (config.model.width, config.model.hidden)
    assert dense.train.to_dict() == config.train.to_dict()


def test_so_has_each_kind_of_model_at_any_sizes_and_with_any_loop():
    tried = 0
    sizes = itertools.product(
        ("decoder", "recurrent", "bdh"), (12, 64, 66, 96), (1, 2, 8), (1, 3, 4)
    )
    for kind, width, groups, heads in sizes:
        config = base()
        config.model.update({"kind": kind, "width": width, "groups": groups, "heads": heads})
        config.model.hidden = 4 * width * heads
        if kind == "decoder":
            config.model.update({"route": "start", "state_activation": "tanh", "gates": groups > 1})
            config.iteration.update({"rounds": "uniform", "noise": 0.1, "supervise_every": 2})
            config.stability.regulariser, config.stability.low = "contraction", -3.0
        else:
            config.model.prelude = config.model.coda = config.stability.every = 0
            config.model.chunk = 8
        reset_unread(config)
        try:
            validate(config)
        except UserError:
            continue
        tried += 1
        for wider in (0, 48, 96):
            dense = dense_of(config, wider)
            validate(dense)
            if kind == "decoder" and not wider:
                assert dense.model.heads == heads
    assert tried > 40


@pytest.mark.slow
def test_the_command_line_of_collectives():
    shown = python("-m", "ngc_jax.collectives", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "--dense_width" in shown.stdout
    assert "state_learning_rate" in shown.stdout
    wrong = python("-m", "ngc_jax.collectives", "--config=ngc_tyni")
    assert wrong.returncode == 2
    assert "there is no config 'ngc_tyni'" in wrong.stderr
    assert "Did you mean 'ngc_tiny'?" in wrong.stderr
    flags = [
        "--config.train.batch_size=2",
        "--config.data.context=52",
        "--config.stability.every=0",
    ]
    counted = python("-m", "ngc_jax.collectives", "--config=ngc_hops", "--mesh=group:2", *flags)
    assert counted.returncode == 0, counted.stderr
    assert "in all, per layer" in counted.stdout
