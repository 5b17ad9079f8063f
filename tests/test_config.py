"""The shipped configs, the tables of fields, and the checks of a config's values."""

import json
import math
import re

import jax
import pytest
from conftest import ROOT

from ngc_jax import count
from ngc_jax.commands import settings
from ngc_jax.config import (
    SECTIONS,
    base,
    config_names,
    make_model,
    model_shape,
    named,
    reset_unread,
    validate,
)
from ngc_jax.core import wiring
from ngc_jax.core.rules import GATES, RULES, rules_between_groups
from ngc_jax.data.batches import token_batch
from ngc_jax.data.tasks import TASKS
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.settings import MODEL, MODELS, ModelKind
from ngc_jax.nn.shape import ModelShape
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import Field, help_text
from ngc_jax.training import match_size
from ngc_jax.training.stability_metrics import PROBES
from ngc_jax.training.workdir import differences, read_config

FIELDS = {section.path(field.name): field for section in SECTIONS for field in section.fields}


def counted(name):
    config = named(name)
    model = Decoder(model_shape(config, Bytes.vocab))
    params = jax.eval_shape(model.init, jax.random.key(0))
    return model, count.parameters(params, model.param_info())


@pytest.mark.parametrize("name", config_names())
def test_shipped_configs_are_valid_and_begin_with_their_command(name):
    validate(named(name))
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"python launch.py --config=configs/{name}.py" in text.split('"""')[1]


@pytest.mark.parametrize("name", ["ngc_small", "defaults"])
def test_a_third_of_dense_small_on_the_same_data_for_as_many_updates(name):
    _, ngc = counted(name)
    _, dense = counted("dense_small")
    assert ngc.matrices <= 0.33 * dense.matrices
    free = ("model.", "train.learning_rate", "train.state_learning_rate")
    changed = differences(named(name).to_dict(), named("dense_small").to_dict())
    assert not [d for d in changed if not d.startswith(free)]


def test_the_defaults_are_as_wide_and_as_deep_as_dense_small():
    ngc, dense = counted("defaults")[0].shape, counted("dense_small")[0].shape
    assert (ngc.depth, ngc.width, ngc.hidden) == (dense.depth, dense.width, dense.hidden)


def test_ngc_small_has_the_sizes_of_its_share():
    config = named("ngc_small")
    sizes = config.model.width, config.model.hidden
    config.model.match = "dense_small:0.32"
    match_size.prepare(config)
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
        params = jax.eval_shape(model.init, jax.random.key(0))
        return count.forward_flops(model.apply, params, token_batch(2, 128))

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
            "one of 'addressed', 'broadcast', 'leaders', 'metric', .*'distance', 'none', 'dense'",
        ),
        ("model.heads", 3, "a divisor or multiple of model.groups=8 .* for instance 2"),
        ("eval.sample", -1, "eval.sample=-1: must be 0 or more"),
        ("eval.prompt", "def ", "eval.prompt='def ': must be '' where eval.sample=0"),
        ("model.hidden", 100, "a multiple of model.groups=8, for instance 96"),
        ("model.rounds", 0, "1 or more"),
        (
            "model.init_rank",
            20,
            "model.init_rank=20: must be 0, or a multiple of 8 up to 128, for instance 16",
        ),
        ("model.init_rank", 144, "up to 128, for instance 128"),
        ("model.message_activation", "tanh", "one of 'none', 'silu'"),
        ("model.exchange_activation", None, "one of 'none', 'silu'"),
        (
            "train.accumulation",
            3,
            "train.batch_size=16: must be a multiple of train.accumulation=3 .* for instance 18",
        ),
        ("train.warmup_steps", 1000, "below train.steps=1000, for instance 100"),
        ("train.learning_rate", -1.0, "0 or more"),
        ("train.state_learning_rate", 0.0, "above 0"),
        ("train.temperature", 2.0, "nothing reads it|train.teacher"),
        ("train.imitate", "stages", "must be 'outputs' where train.teacher=''"),
        ("model.kv_heads", 3, "0, or a divisor of model.heads=4"),
        ("model.head_width", 7, "model.head_width=7: must be even, for instance 8"),
        ("model.rope_scaling", "yarn:2", "'linear:2' or such as 'llama3:8,1,4,8192'"),
        ("model.ranks", "query:3", "must name each of query, key, value, attention out, gate"),
        ("model.ranks", "query+up:3", "must be members of one synapse and a rank"),
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.imitate": "stream"}, "train.imitate='stream': must be 'outputs' where .* core"),
        ({"train.imitate": "stages", "model.core": 0}, "train.init_from='': must be a work dir"),
    ],
)
def test_streams_are_compared_where_there_are_stages_to_compare(fields, message):
    config = base()
    config.update_from_flattened_dict({"train.teacher": "runs/teacher", **fields})
    with pytest.raises(UserError, match=message):
        validate(config)


def test_one_group_has_nothing_to_share():
    config = base()
    config.model.update({"gates": True, "groups": 1, "heads": 1})
    with pytest.raises(UserError, match=r"model.gates=True: must be False where model.groups is 1"):
        validate(config)
    config.model.update({"gates": True, "groups": 2})
    validate(config)


def test_samples_are_of_text_and_of_one_process(monkeypatch):
    config = base()
    config.eval.sample, config.eval.prompt = 8, "def "
    validate(config)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"eval\.sample=8: must be 0 where 2 processes"):
        validate(config)
    config.data.task = "parity"
    with pytest.raises(UserError, match=r"eval\.sample=8: must be 0 where data\.task='parity'"):
        validate(config, here=False)


@pytest.mark.parametrize("rule", rules_between_groups())
def test_a_message_activation_wants_a_signal(rule):
    config = base()
    config.model.rule = rule
    validate(config)
    config.model.message_activation = "silu"
    if rule in ("tanh", "shift", "riemannian", "distance"):
        refused = (
            f"model.message_activation='silu': must be 'none' where model.rule='{rule}' .*: addr"
        )
        with pytest.raises(UserError, match=refused):
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


# ---- The tables of fields ----


def set_to(config, path, value):
    """Set a field whatever its type, as a config file can."""
    home, _, name = path.rpartition(".")
    with config.ignore_type():
        (config[home] if home else config)[name] = value


def wrong_values(field):
    """Values that a field cannot have: of other types, not finite, and outside its range."""
    wrong = {bool: [None, 1, "True"], int: [None, True, 1.5, "1"], str: [None, 3, True]}
    # (True becomes 1.0 as it is set)
    wrong[float] = [None, "0.1", math.nan, math.inf]
    values = wrong[type(field.default)]
    if isinstance(field.values, str) and field.values:
        low, high = map(float, field.values[1:-1].split(", "))
        kind, closed = type(field.default), (field.values[0] == "[", field.values[-1] == "]")
        values.append(kind(low - closed[0]))
        if high < math.inf:
            values.append(kind(high + closed[1]))
    elif field.values:
        values.append("nonesuch")
    return values


@pytest.mark.parametrize("path", FIELDS)
def test_each_field_refuses_wrong_values_and_names_one_that_works(path):
    for value in wrong_values(FIELDS[path]):
        config = base()
        set_to(config, path, value)
        with pytest.raises(UserError) as refused:
            validate(config)
        message = str(refused.value)
        assert message.startswith(f"{path}={value!r}: must be "), message
        works = re.search(r"for instance (.*)$|one of (?:'', )?'(\w+)'", message)
        assert FIELDS[path].fault(eval(works[1]) if works[1] else works[2]) == "", message


def test_the_defaults_are_in_their_ranges_and_valid():
    assert {path: field.fault(field.default) for path, field in FIELDS.items()} == dict.fromkeys(
        FIELDS, ""
    )
    validate(base())


def test_the_defaults_of_a_shape_are_those_of_the_config():
    assert model_shape(base(), Bytes.vocab) == ModelShape()


def test_the_page_of_settings_is_up_to_date():
    """Else: `python -m ngc_jax.settings > docs/settings.md`."""
    assert (ROOT / "docs" / "settings.md").read_text() == settings.page()


def test_help_has_each_field_of_each_section_in_columns_that_fit():
    lines = help_text(SECTIONS).splitlines()
    assert max(map(len, lines)) <= 100
    section, found = "", []
    for line in lines:
        head = re.match(r"(\w+): ", line)
        section = head[1] if head else section
        field = re.match(r"(\w+) {2,}\S", line)
        if field:
            found.append(f"{section}.{field[1]}".removeprefix("config."))
    assert found == [*FIELDS]


def test_a_field_that_there_is_not_is_named_with_the_one_that_was_meant():
    config = base()
    config.model.widht = 3
    with pytest.raises(UserError, match=r'Did you mean "model.width" instead of "model.widht"'):
        validate(config)
    for name in ("model", "mesh"):
        config = base()
        del config[name]
        with pytest.raises(UserError, match=f"no section '{name}': begin with base"):
            validate(config)
    config = base()
    del config.train.b1
    with pytest.raises(UserError, match=r"the config has no train.b1"):
        validate(config)


def test_tables_may_grow_after_they_are_imported(monkeypatch):
    config = base()
    fields = {"model.rule": "mine", "model.exchange_activation": "mine", "data.task": "mine"}
    for path, value in {**fields, "model.wiring": "mine"}.items():
        set_to(config, path, value)
        with pytest.raises(UserError, match=f"{path}='mine': must be one of"):
            validate(config)
        config = base()
    monkeypatch.setitem(RULES, "mine", RULES["broadcast"])
    monkeypatch.setitem(GATES, "mine", GATES["silu"])
    monkeypatch.setitem(TASKS, "mine", TASKS["parity"])
    config.update_from_flattened_dict(fields)
    validate(config)
    monkeypatch.setitem(wiring.WIRINGS, "mine", wiring.ring)
    config = base()
    config.stability.measures = "rounds,mine"
    with pytest.raises(UserError, match=r"stability.measures='rounds,mine': must be some of"):
        validate(config)
    monkeypatch.setitem(PROBES, "mine", PROBES["rounds"])
    validate(config)
    config.model.wiring = "mine"
    validate(config)


def test_a_kind_of_model_is_an_entry_of_a_table_with_fields_of_its_own(monkeypatch):
    made = []

    def make(config, vocab):
        made.append((config.model.kernel, vocab))

    MODEL.fields.append(Field("kernel", 3, "width of a convolution", "[1, inf)"))
    try:
        monkeypatch.setitem(MODELS, "mine", ModelKind(make, ("width", "kernel")))
        config = base()
        config.model.kind, config.model.kernel, config.stability.every = "mine", 5, 0
        validate(config)
        make_model(config, 9)
        assert made == [(5, 9)]
        config.model.gates = True
        with pytest.raises(UserError, match=r"model.gates=True: must be False where model.kind='m"):
            validate(config)
        config = base()
        config.model.kernel = 5
        with pytest.raises(
            UserError, match=r"model.kernel=5: must be 3 where model.kind='decoder'"
        ):
            validate(config)
    finally:
        MODEL.fields.pop()


# ---- Fields that nothing reads ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.kind": "bdh", "model.gates": True}, "model.gates=True: must be False where"),
        (
            {"model.kind": "bdh", "model.groups": 16, "model.gates": True},
            r"model.groups=16, model.gates=True: must be at their defaults \(model.groups=8, "
            r"model.gates=False\) where model.kind='bdh' does not read",
        ),
        ({"model.chunk": 8}, "model.chunk=8: must be 0 where model.kind='decoder'"),
        ({"model.kind": "bdh", "stability.tokens": 9}, "stability.tokens=9: must be 1024 where"),
        ({"iteration.high": 16}, "iteration.high=16: must be 8 where iteration.rounds='fixed'"),
        (
            {"iteration.rounds": "uniform", "iteration.mark": 2},
            "iteration.mark=2: must be 0 where iteration.rounds='uniform'",
        ),
        ({"iteration.supervise_weight": 2.0}, "must be 1.0 where iteration.supervise_every=0"),
        ({"rewire.every": 5}, "rewire.every=5: must be 50 where model.wiring='complete' does not"),
        ({"stability.low": -3.0}, "must be -2.0 where stability.regulariser='none'"),
        ({"model.core": 0, "iteration.noise": 0.1}, "must be 0.0 where the model has no loop"),
    ],
)
def test_what_nothing_reads_is_refused_and_can_be_reset(fields, message):
    config = base()
    config.update_from_flattened_dict(fields)
    if config.model.kind == "bdh":
        config.stability.every = 0
    with pytest.raises(UserError, match=message):
        validate(config)
    before = config.to_dict()
    reset = reset_unread(config)
    validate(config)
    assert reset == {path: FIELDS[path].default for path in reset}
    config.update_from_flattened_dict({path: fields[path] for path in reset})
    assert config.to_dict() == before


def test_a_run_of_an_older_version_opens_without_what_nothing_read(tmp_path):
    config = base()
    config.model.kind, config.stability.every = "bdh", 0
    config.update_from_flattened_dict({"model.groups": 4, "rewire.every": 5, "model.rounds": 3})
    stored = config.to_dict()
    del stored["model"]["qk_gain"]  # a field newer than the run
    (tmp_path / "config.json").write_text(json.dumps(stored))
    opened = read_config(tmp_path)
    validate(opened)
    assert differences(opened.to_dict(), base().to_dict()) == [
        "model.kind: 'bdh' -> 'decoder'",
        "model.rounds: 3 -> 2",
    ]


ONE = "query:9,key:9,value:9,attention out:9,gate:9,up:9,down:9"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"prelude": 2}, "model.prelude=2: must be 1, its stages"),
        ({"core": 1}, "model.core=1: must be 0"),
        ({"rule": "metric"}, "model.rule='metric': must be one of broadcast, leaders, addressed"),
        ({"rule": "addressed", "groups": 8}, "of key in stage 1 at most 8"),
        ({"rule": "addressed", "groups": 2, "heads": 8}, None),
        ({"ranks": ONE + "+49152"}, None),
        ({"ranks": ONE + "+49153"}, "of down in stage 1 with at most 49152 single"),
        ({"ranks": ONE + "+some"}, "'down:9.some' must be .* such as 'key.value:64', or"),
        ({"ranks": ONE.replace("key:9", "key:65")}, "of key in stage 1 at most 64"),
        ({"ranks": ""}, None),
        ({"ranks": "", "p_inter": 100}, "model.p_inter=100: must be at most 64"),
    ],
)
def test_ranks_fit_the_stages_and_the_matrices(change, message):
    config = base()
    config.model.update({"rule": "leaders", "prelude": 1, "core": 0, "coda": 0, "groups": 1})
    config.model.update({"p_intra": 0, "kv_heads": 2, "ranks": ONE, **change})
    reset_unread(config)
    if message is None:
        return validate(config)
    with pytest.raises(UserError, match=message):
        validate(config)
