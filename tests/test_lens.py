"""The lens: sums are exact, no change changes nothing, all instruments find what was planted."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import TINY, drawn

import ngc_jax
from ngc_jax.analysis import excitation, lens
from ngc_jax.analysis.probes import stage_names
from ngc_jax.commands import lens as command
from ngc_jax.config import base, model_shape
from ngc_jax.data.batches import Batch
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.shape import ModelShape
from ngc_jax.runtime.errors import UserError

MODELS = {
    "loop": {"model.prelude": 1, "model.coda": 1},
    "signals": {"model.form": "signals", "model.coda": 1},
    "no coda": {"model.prelude": 1, "model.drive": False},
    "gates": {"model.gates": True, "model.prelude": 1, "model.core": 0},
    "late": {"model.delays": "taps:3", "model.coda": 1, "model.core": 0},
    "late loop": {"model.delays": "0,2", "model.p_inter": 2},
    "dense, tied": {"model.rule": "dense", "model.tied": True, "model.coda": 1},
}


@functools.cache
def built(name):
    config = base()
    config.update_from_flattened_dict({**TINY, "data.context": 6, **MODELS[name]})
    model = Decoder(model_shape(config, 40))
    return model, drawn(model)


def batch(rows=2, length=6):
    tokens = np.random.default_rng(0).integers(0, 40, (rows, length + 1)).astype(np.int32)
    documents = jnp.arange(length) // 4 * jnp.ones((rows, 1), int)
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), documents)


def run(function, model, params, *given, **fields):
    program = lambda params, *given: function(model, params, *given, **fields)  # noqa: E731
    return jax.jit(program)(params, *given)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_sums_to_the_logit_and_no_change_changes_nothing(name):
    model, params = built(name)
    logits = jax.jit(model.apply)(params, batch())[0]
    for centred in (False, True):
        found = run(lens.attribution, model, params, batch(), batch().targets, centred=centred)
        total = found.embedding + sum(jnp.sum(one, -1) for one in found.written.values())
        right = jnp.take_along_axis(logits, batch().targets[..., None], -1)[..., 0]
        right = right - jnp.mean(logits, -1) if centred else right
        np.testing.assert_allclose(total, right, rtol=1e-5, atol=1e-5 * np.abs(logits).max())
    sites = lens.SITES.values()
    assert {*found.written} == {(n, site) for n in stage_names(model.shape) for site in sites}
    same = run(lens.changed, model, params, batch(), change=lambda at, a: a)
    np.testing.assert_allclose(same, logits, rtol=1e-5, atol=1e-5)
    # A run into which what it wrote itself is patched is that run.
    own = run(lens.activity, model, params, batch())
    patched = run(lens.changed, model, params, batch(), change=lambda at, a: own[at])
    np.testing.assert_allclose(patched, logits, rtol=1e-5, atol=1e-5)


def test_the_lens_reads_the_output_at_the_last_place_and_the_embedding_at_the_first():
    model, params = built("loop")
    said = run(lens.logit_lens, model, params, batch())
    logs = jax.nn.log_softmax(jax.jit(model.apply)(params, batch())[0])
    *_, last = said.values()
    np.testing.assert_array_equal(last.top, jnp.argmax(logs, -1))
    np.testing.assert_allclose(last.divergence, 0, atol=1e-6)
    wanted = -np.take_along_axis(np.asarray(logs), np.asarray(batch().targets)[..., None], -1)
    np.testing.assert_allclose(last.nats, wanted[..., 0], rtol=1e-5)
    x = params["embed"][batch().inputs]
    x = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * params["norm"]["scale"]
    first = jax.nn.log_softmax(x @ params["unembed"])
    np.testing.assert_allclose(said["embedding"].share, jnp.exp(first.max(-1)), rtol=1e-5)
    both = jnp.sum(jnp.exp(logs) * (logs - first), -1)
    np.testing.assert_allclose(said["embedding"].divergence, both, rtol=1e-4, atol=1e-6)


def test_the_tuned_lens_begins_as_the_logit_lens_and_comes_nearer_to_the_output():
    model, params = built("loop")
    said = run(lens.logit_lens, model, params, batch())
    assert [*said] == lens.places(model)
    size = len(said), model.shape.width
    same = lens.Maps(jnp.tile(jnp.eye(size[1]), (size[0], 1, 1)), jnp.zeros(size))
    begun = run(lens.logit_lens, model, params, batch(), same)
    maps = lens.tuned_lens(model, params, [batch()] * 30, rate=3e-3)
    tuned = run(lens.logit_lens, model, params, batch(), maps)
    for place in said:
        np.testing.assert_allclose(begun[place].nats, said[place].nats, rtol=1e-5)
        before, after = (float(jnp.mean(of[place].divergence)) for of in (said, tuned))
        assert after < 0.8 * before or after < 0.01
    np.testing.assert_allclose(maps.shift[-1], 0, atol=0.02)  # the output is itself


def test_silence_of_one_unit_is_that_unit_written_by_hand():
    model, params = built("loop")
    silent = [one for one in lens.units(model) if one.place == "core 1, round 2"]
    fill = run(lens.means, model, params, batch())
    nothing, *added = lens.silenced_nats(model, params, batch(), silent, fill)

    def nats(change):
        logs = jax.nn.log_softmax(run(lens.changed, model, params, batch(), change=change))
        return -jnp.take_along_axis(logs, batch().targets[..., None], -1)[..., 0]

    np.testing.assert_allclose(nothing, nats(lambda at, a: a), rtol=1e-5)
    unit = silent[-1]
    assert (unit.name, unit.site) == ("group 3", "exchange")

    def by_hand(at, a):
        mine = at == (unit.place, unit.site)
        return a.at[..., unit.first :].set(fill[at][unit.first :]) if mine else a

    np.testing.assert_allclose(added[-1], nats(by_hand), rtol=1e-5)
    assert np.abs(added[-1] - nothing).max() > 1e-4
    heads = lens.units(model, "head")
    assert {one.site for one in heads} == {"attention"}
    with pytest.raises(ValueError, match="what='layer': must be one of group, head, site, neuron"):
        lens.units(model, "layer")


def planted():
    """A dense model whose group 3 of hidden neurons detects digits and says that one comes."""
    sizes = {"vocab": 257, "context": 16, "width": 32, "hidden": 64, "heads": 4, "groups": 4}
    stages = {"prelude": 1, "core": 0, "coda": 0, "rounds": 1}
    model = Decoder(ModelShape(**sizes, **stages, rule="dense"))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes)
    rng = np.random.default_rng(0)
    digits = np.arange(ord("0"), ord("9") + 1)
    params["embed"][:, :30] = rng.normal(size=(257, 30))
    params["embed"][digits, 31] = 5
    params["norm"]["scale"][:] = 1
    stage = params["prelude"]
    for norm in ("attention_norm", "exchange_norm", "query_norm", "key_norm"):
        stage[norm]["scale"][:] = 1
    stage["gate_up"]["dense_block"]["weight"][0, :, 0, 48:, 31] = 1  # group 3 reads channel 31
    stage["down"]["dense_block"]["weight"][0, 0, 0, 30, 48:] = 1  # and writes to channel 30
    params["unembed"][30, digits] = 3
    return model, jax.tree.map(jnp.asarray, params)


def test_every_instrument_finds_the_group_that_was_planted():
    model, params = planted()
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(8):  # a digit comes after a digit alone
        number = "".join(map(str, rng.integers(0, 10, 9)))
        rows.append([*b"ab cd ef", *number.encode()])
    tokens = np.array(rows, np.int32)
    given = Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))
    groups, classes = lens.units(model), excitation.class_of_tokens(Bytes())
    mine = [str(one) for one in groups].index("group 3, exchange, prelude 1")
    digit = excitation.CLASSES.index("digit")
    after = (classes[tokens[:, :-1]] == digit) & (classes[tokens[:, 1:]] == digit)

    said = run(lens.logit_lens, model, params, given)
    gained = said["embedding"].nats - said["prelude 1"].nats
    assert np.asarray(gained)[after].min() > 1

    written = run(lens.attribution, model, params, given, given.targets, centred=True).written
    own = {
        i: np.asarray(written[u.place, u.site][..., u.first : u.first + u.size]).sum(-1)
        for i, u in enumerate(groups)
    }
    assert own[mine][after].min() > 1
    assert all(np.abs(of).max() < 1e-5 for i, of in own.items() if i != mine)

    zero = jax.tree.map(jnp.zeros_like, run(lens.means, model, params, given))
    nothing, *added = lens.silenced_nats(model, params, given, groups, zero)
    assert (added[mine] - nothing)[after].min() > 1
    assert all(np.abs(of - nothing).max() < 1e-5 for i, of in enumerate(added) if i != mine)

    real = np.ones(len(tokens), bool)
    found = excitation.excitation(model, params, groups, [(given, real)] * 3, classes)
    assert found.auroc[mine, digit] == 1
    assert found.selected()[mine, digit]
    np.testing.assert_array_equal(classes[found.context[mine, :, excitation.BEFORE]], digit)


def test_a_patch_restores_what_its_place_and_token_decide():
    model, params = planted()
    prompt, other = (Batch(jnp.asarray([[*text]], jnp.int32)) for text in (b"ab7", b"abc"))
    found = run(lens.patching, model, params, prompt, other)
    assert chr(found.right).isdigit()
    # There is no attention: only the last token's own stream decides, at every place.
    np.testing.assert_allclose(found.restored, [[0, 0, 1]] * 2, atol=1e-6)

    model, params = built("loop")
    prompt, other = (Batch(batch().inputs[i : i + 1]) for i in (0, 1))
    found = run(lens.patching, model, params, prompt, other)
    assert found.restored.shape == (1 + len(stage_names(model.shape)), 6)
    np.testing.assert_allclose(found.restored[-1], [0, 0, 0, 0, 0, 1], atol=1e-5)
    # By hand: the embedding of the last token alone.
    mixed = Batch(other.inputs.at[0, 5].set(prompt.inputs[0, 5]))
    apart = [
        float(logits[0, -1, found.right] - logits[0, -1, found.wrong])
        for logits in (jax.jit(model.apply)(params, one)[0] for one in (prompt, other, mixed))
    ]
    share = (apart[2] - apart[1]) / (apart[0] - apart[1])
    assert found.restored[0, 5] == pytest.approx(share, rel=1e-3, abs=1e-4)


def test_labels_drawn_by_lot_are_told_from_chance_as_often_as_the_interval_says():
    rng, counts = np.random.default_rng(3), np.zeros((400, excitation.BINS, 2), np.int64)
    for unit in counts:
        np.add.at(unit, (rng.integers(0, excitation.BINS, 300), rng.integers(0, 2, 300)), 1)
    area, error = excitation._areas(counts)
    assert 0.03 < np.mean(np.abs(area - 0.5) > 1.96 * error) < 0.08


def test_areas_are_those_of_ranks_and_the_most_exciting_tokens_are_kept_over_batches():
    model, params = built("loop")
    neurons, rng = lens.units(model, "neuron")[:3], np.random.default_rng(2)
    classes = rng.integers(0, 3, 40)
    batches = []
    for _ in range(3):
        tokens = rng.integers(0, 40, (4, 6)).astype(np.int32)
        batches.append((Batch(jnp.asarray(tokens)), np.array([True, True, True, False])))
    found = excitation.excitation(model, params, neurons, batches, classes, most=5)
    loud = [run(excitation.loudness, model, params, batch=one, units=neurons) for one, _ in batches]
    values = np.concatenate([np.asarray(one)[:, :3].reshape(3, -1) for one in loud], axis=1)
    kinds = np.concatenate([classes[np.asarray(one.inputs)[:3].reshape(-1)] for one, _ in batches])
    np.testing.assert_allclose(found.top, -np.sort(-values, axis=1)[:, :5], rtol=1e-5)
    np.testing.assert_array_equal(found.counts, np.bincount(kinds, minlength=3))
    for unit in range(3):
        for kind in range(3):
            mine, rest = values[unit, kinds == kind], values[unit, kinds != kind]
            area = scipy.stats.mannwhitneyu(mine, rest).statistic / (len(mine) * len(rest))
            assert found.auroc[unit, kind] == pytest.approx(area, abs=0.05)  # of bins


def test_logits_that_are_no_sum_are_refused():
    config = base()
    config.update_from_flattened_dict({**TINY, "model.message_activation": "silu"})
    model = Decoder(model_shape(config, 40))
    with pytest.raises(
        ValueError, match=r"model.message_activation='silu': .* no sum then; None is"
    ):
        lens.attribution(model, {}, batch(), batch().targets)


def test_the_command_writes_a_page_that_needs_nothing_but_itself(
    tiny, tmp_path, monkeypatch, capsys
):
    home = tmp_path / "run"
    with tiny.unlocked():
        tiny.train.steps, tiny.train.warmup_steps, tiny.stability.every = 2, 1, 0
    ngc_jax.train(tiny, home)
    monkeypatch.setattr("sys.argv", ["lens", f"--workdir={home}", "--sequences=3", "--trust"])
    command.main()
    page = (home / "lens" / "index.html").read_text()
    for title in ("What is said at each place", "What groups are for", "What excites groups"):
        assert f"<h2>{title}</h2>" in page
    assert "http" not in page.replace("https://", "")
    assert f"wrote {home / 'lens' / 'index.html'}" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*sys.argv, "--prompt=ab", "--other=abc"])
    with pytest.raises(UserError, match="have 3 and 4 tokens: must have as many"):
        command.main()
    monkeypatch.setattr("sys.argv", [*sys.argv[:-1], "--other=ab"])
    with pytest.raises(UserError, match=r"are both followed by '.*': give one after which"):
        command.main()
    monkeypatch.setattr("sys.argv", ["lens", f"--workdir={home}", "--sequences=1"])
    with pytest.raises(UserError, match="--sequences=1: must be 2 or more"):
        command.main()
