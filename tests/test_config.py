"""The shipped configs, and the checks of a config's numbers."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from ngc_jax import count
from ngc_jax.config import RULES_OF_A_MODEL, base, model_shape, validate
from ngc_jax.data.tokens import Bytes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.runtime.errors import UserError
from ngc_jax.training import match_size as budget
from ngc_jax.training.step import abstract_state
from ngc_jax.training.workdir import differences

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def counted(name):
    config = load(name)
    model = Decoder(model_shape(config, Bytes.vocab))
    return model, count.parameters(abstract_state(model, config).params)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs_are_valid_and_begin_with_their_command(name):
    validate(load(name))
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"python launch.py --config=configs/{name}.py" in text.split('"""')[1]


@pytest.mark.parametrize("name", ["ngc_small", "defaults"])
def test_a_third_of_dense_small_on_the_same_data_for_as_many_updates(name):
    _, ngc = counted(name)
    _, dense = counted("dense_small")
    assert ngc.matrices <= 0.33 * dense.matrices
    free = ("model.", "train.learning_rate", "train.state_learning_rate")
    changed = differences(load(name).to_dict(), load("dense_small").to_dict())
    assert not [d for d in changed if not d.startswith(free)]


def test_the_defaults_are_as_wide_and_as_deep_as_dense_small():
    ngc, dense = counted("defaults")[0].shape, counted("dense_small")[0].shape
    assert (ngc.depth, ngc.width, ngc.hidden) == (dense.depth, dense.width, dense.hidden)


def test_ngc_small_has_the_sizes_of_its_share():
    config = load("ngc_small")
    sizes = config.model.width, config.model.hidden
    config.model.match = "dense_small:0.32"
    budget.resolve(config)
    assert (config.model.width, config.model.hidden) == sizes
    assert counted("ngc_small")[1].matrices == 273_672


def test_parameters_and_weights_are_what_the_docstrings_say():
    model, parameters = counted("defaults")
    d, f, g, p = 128, 384, 8, 3
    square, tall = d * d // g + p * g * 2 * d, d * f // g + p * g * (d + f)
    assert parameters.matrices == 3 * (4 * square + 3 * tall)
    assert parameters.embeddings == 2 * 257 * d
    assert count.generated_weights(model) == 4 * (4 * d * d + 3 * d * f)
    assert count.generated_weights(counted("dense_small")[0]) == 0


def test_flops_count_loops_as_often_as_they_run():
    def flops(rounds):
        config = base()
        config.model.update({"rounds": rounds, "rule": "dense"})
        model = Decoder(model_shape(config, 257))
        params = abstract_state(model, config).params
        return count.forward_flops(model.apply, params, jax.ShapeDtypeStruct((2, 128), jnp.int32))

    d, f, tokens = 128, 384, 2 * 128
    # matrices, and attention's two products
    stage = 2 * tokens * (4 * d * d + 3 * d * f + 2 * 128 * d)
    assert flops(1) == 3 * stage + 2 * tokens * d * 257
    assert flops(9) - flops(1) == 8 * stage


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", 2**32, "seed=4294967296: must be from 0 to"),
        ("data.tokenizer", "words", "one of 'bytes', 'bpe'"),
        ("data.validation_fraction", 0.0, "above 0 and at most 0.5"),
        ("model.rule", "x", "one of 'addressed'"),
        (
            "model.rule",
            "within",
            "one of 'addressed', 'broadcast', 'metric', .*'distance', 'none', 'dense'",
        ),
        ("model.heads", 3, "a divisor of model.groups=8 .* for instance 2"),
        ("model.hidden", 100, "a multiple of model.groups=8, for instance 96"),
        ("model.rounds", 0, "1 or more"),
        (
            "model.init_rank",
            20,
            "model.init_rank=20: must be 0, or a multiple of 8 .* up to 128, for instance 16",
        ),
        ("model.init_rank", 144, "up to 128, for instance 128"),
        ("model.message_activation", "tanh", "one of 'none', 'silu'"),
        ("model.exchange_activation", None, "one of 'none', 'silu'"),
        (
            "train.accumulation",
            3,
            "train.batch_size=16: must be a multiple of train.accumulation=3 .* for instance 18",
        ),
        ("train.warmup_steps", 1000, "at least 0 and below train.steps=1000, for instance 100"),
        ("train.learning_rate", 0.0, "above 0"),
        ("train.b2", 1.0, "from 0 to below 1"),
        ("train.max_rewinds", -1, "0 or more"),
        ("train.hang_exit", True, "False where train.hang_minutes is 0"),
        ("train.spike", -1.0, "0 or more"),
        ("train.profile", "20:10", "for instance '10:20'"),
        ("train.profile", "ten", "for instance '10:20'"),
        ("checkpoint.keep", 1, "2 or more"),
        ("mesh.data", 3, "the 1 devices here / .mesh.fsdp=1 x mesh.group=1., 1, or -1"),
    ],
)
def test_impossible_values_are_refused(field, value, message):
    config = base()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        validate(config)


def test_one_group_has_nothing_to_share():
    config = base()
    config.model.update({"gates": True, "groups": 1, "heads": 1})
    with pytest.raises(UserError, match=r"model.gates=True: must be False where model.groups is 1"):
        validate(config)
    config.model.update({"gates": True, "groups": 2})
    validate(config)


@pytest.mark.parametrize("rule", RULES_OF_A_MODEL)
def test_a_message_activation_wants_a_signal(rule):
    config = base()
    config.model.rule = rule
    validate(config)
    config.model.message_activation = "silu"
    if rule in ("tanh", "shift", "riemannian", "distance"):
        named = f"model.message_activation='silu': must be 'none' where model.rule='{rule}' .*: addressed, broadcast"
        with pytest.raises(UserError, match=named):
            validate(config)
    else:
        validate(config)


def test_differences_ignore_how_a_run_is_watched():
    old, new = base(), base()
    new.eval.every, new.checkpoint.keep, new.train.log_every, new.data.cache_dir = (
        5,
        9,
        1,
        "elsewhere",
    )
    assert differences(old.to_dict(), new.to_dict()) == []
    new.seed, new.model.width = 3, 256
    assert differences(old.to_dict(), new.to_dict()) == ["model.width: 128 -> 256", "seed: 0 -> 3"]
