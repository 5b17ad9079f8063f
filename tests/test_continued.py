"""Runs that go on: from another run, for longer, until patience ends, from the best; and what keeps
them from learning by heart.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from conftest import TINY, batch_of, drawn, make_text

import ngc_jax
from ngc_jax.commands import config_flag, sample
from ngc_jax.config import base, make_model
from ngc_jax.core.params import ParamInfo
from ngc_jax.data import NOTHING
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.nn.params import drop_states
from ngc_jax.runtime.checkpoint import Checkpoints, digest
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import TIMES
from ngc_jax.training import begin, evaluation
from ngc_jax.training.load import Trained
from ngc_jax.training.longer import lengthen
from ngc_jax.training.step import evaluated, init_state, make_train_step, smoothed

VOCAB = 23
SMALL = {"model.rule": "broadcast", "model.p_inter": 2, "model.p_intra": 0, "model.rounds": 1}
SMALL |= {"model.form": "signals", "model.remat": "none", "stability.every": 0, "eval.windows": 8}
REGULAR = {"model.dropout": 0.1, "model.state_dropout": 0.1, "train.label_smoothing": 0.1}
REGULAR |= {"train.ema": 0.9, "train.schedule": "wsd", "train.decay_fraction": 0.5}
REGULAR |= {"train.steps": 12, "eval.every": 2, "checkpoint.every_steps": 3, "checkpoint.keep": 2}


@pytest.fixture
def make(tiny):
    """A config of a run of a second, with all that keeps it from learning by heart."""

    def made(**fields):
        config = tiny.copy_and_resolve_references()
        config.update_from_flattened_dict({**SMALL, **REGULAR, **fields})
        return config

    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "regular"


@pytest.fixture
def regular(home, make):
    """Such a run of 12 updates; made once."""
    return ngc_jax.load(home, trust=True) if home.exists() else ngc_jax.train(make(), home)


def steps_in(home):
    return sorted(int(path.name) for path in (home / "checkpoints").iterdir())


def rows_of(home):
    return [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]


def outcome(trained):
    """The state to the bit, and all rows without their times."""
    rows = [{k: v for k, v in r.items() if k not in TIMES} for r in rows_of(trained.workdir)]
    return digest(trained.state), rows


# ---- Longer --------------------------------------------------------------------------------------


def test_a_longer_run_under_wsd_goes_on_to_the_bit_as_one_so_long_from_the_start(
    regular, make, tmp_path, capsys
):
    """And so what drops and what is averaged follow from seed and update, in any start."""
    run, whole, longer = tmp_path / "run", tmp_path / "whole", make(**{"train.steps": 16})
    shutil.copytree(regular.workdir, run)
    assert steps_in(run) == [6, 9, 12], "two, and the last from before the decay"
    lengthen(run, make(), longer)  # as if it had been killed after this
    said = capsys.readouterr().out
    assert steps_in(run) == [6]
    trained = ngc_jax.train(longer, run)
    assert "train.steps: 12 -> 16: goes on from checkpoint 6, before the decay" in said
    assert outcome(trained) == outcome(ngc_jax.train(longer, whole))
    ended = ngc_jax.load(run / "ended_12")
    jax.tree.map(np.testing.assert_array_equal, ended.params, regular.params)
    assert rows_of(run / "ended_12") == rows_of(regular.workdir)
    longer.train.steps = 12
    with pytest.raises(UserError, match=r"train.steps: 16 -> 12.*, or more updates"):
        ngc_jax.train(longer, run)


def test_a_run_on_another_text_is_not_made_longer(regular, make, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other.txt"
    shutil.copytree(regular.workdir, run)
    other.write_text(make_text(60_000)[::-1])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="the text has changed since checkpoint 12"):
        ngc_jax.train(make(**{"train.steps": 16, "data.path": str(other)}), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_becomes_of_the_learning_rate_is_said(regular, make, capsys):
    def said(home, **fields):
        old, new = make(**fields), make(**fields, **{"train.steps": 24})
        lengthen(home, old, new)
        return capsys.readouterr().out

    cosine = said(regular.workdir, **{"train.schedule": "cosine"})
    assert "the cosine is drawn out: the learning rate goes from 0.001 to 0.0065" in cosine
    assert "at step 12, unlike in a run of that length from the start; 'wsd' can be" in cosine
    early = said(regular.workdir, **{"train.decay_fraction": 1.0})
    assert "no checkpoint is from before the decay: the learning rate goes from 0.00" in early
    late = said(regular.workdir, **{"train.decay_fraction": 0.01})
    assert "nothing has decayed, so it is as if it had been 24 from the start" in late
    with pytest.raises(UserError, match=r"steps=24: must stay 12 where model.wiring='dynamic'"):
        said(regular.workdir, **{"model.wiring": "dynamic"})
    assert steps_in(regular.workdir) == [6, 9, 12]


def test_checkpoints_that_are_spared_outlive_newer_ones(tmp_path):
    state = {"a": jnp.ones(3)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, state, {}, [range(3, 0, -1), [9, 2, 5], []])
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3, 6]


# ---- Regularisers, and the average ---------------------------------------------------------------


def test_the_average_is_what_is_evaluated_and_opened(regular):
    jax.tree.map(np.testing.assert_array_equal, regular.params, evaluated(regular.state))
    assert np.any(regular.params["embed"] != regular.state.params["embed"])
    held_out = regular.data().validation
    loss = regular.loss(bytes(held_out.tokens[1:].tolist())).nats_per_token
    assert loss == pytest.approx(rows_of(regular.workdir)[-1]["final/loss"], abs=1e-5)
    assert regular.told == "step 12, averaged (train.ema=0.9)"


def small(**fields):
    config = base()
    config.update_from_flattened_dict({**TINY, **SMALL, **fields})
    return config, make_model(config, VOCAB)


def some_batch():
    return batch_of(np.random.default_rng(0).integers(0, VOCAB, (8, 9)).astype(np.int32))


def test_label_smoothing_is_that_of_numpy():
    logits = np.random.default_rng(0).standard_normal((2, 5, VOCAB))
    targets = np.random.default_rng(1).integers(0, VOCAB, (2, 5))
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = 0.9 * np.eye(VOCAB)[targets] + 0.1 / VOCAB
    nats = -np.take_along_axis(log, targets[..., None], -1)[..., 0]
    found = smoothed(jnp.float32(nats), jnp.float32(logits), 0.1)
    np.testing.assert_allclose(found, -(wanted * log).sum(-1), rtol=1e-5)


def test_updates_follow_the_smoothed_loss_and_average_what_they_leave():
    config, model = small(**{"train.label_smoothing": 0.2, "train.ema": 0.8})
    params, batch = drawn(model), some_batch()
    batch.targets[0, 3:] = NOTHING

    def loss(params):
        log, labels = jax.nn.log_softmax(model.apply(params, batch)[0]), batch.targets
        wanted, counts = 0.8 * jax.nn.one_hot(labels, VOCAB) + 0.2 / VOCAB, labels >= 0
        plain = -jnp.sum(jax.nn.one_hot(labels, VOCAB) * log, -1)
        mean = lambda nats: jnp.sum(nats * counts) / jnp.sum(counts)  # noqa: E731
        return mean(-jnp.sum(wanted * log, -1)), mean(plain)

    (_, plain), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    step, seen = jax.jit(make_train_step(model, config.train)), []
    state = init_state(model, config.train, 0, params)
    for _ in range(4):
        state, scalars = step(state, batch)
        seen.append((scalars, np.asarray(state.params["embed"], np.float64)))
    assert float(seen[0][0]["train/loss"]) == pytest.approx(float(plain), rel=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    assert float(seen[0][0]["train/grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
    weights = 0.8 ** np.arange(3, -1, -1)
    mean = np.tensordot(weights / weights.sum(), np.stack([embed for _, embed in seen]), 1)
    np.testing.assert_allclose(evaluated(state)["embed"], mean, rtol=1e-5, atol=1e-7)


@functools.cache
def dropping(**fields):
    """A model that drops, the same one that does not, and parameters."""
    (_, model), (_, plain) = (
        small(**{**fields, "model.dropout": p, "model.rule": "dense"}) for p in (0.5, 0.0)
    )
    return model, plain, drawn(model)


@pytest.mark.parametrize("silent", ["attention_out", "down"])
def test_a_stage_leaves_out_part_of_what_its_branches_add(silent):
    model, plain, params = dropping(**{"model.prelude": 1, "model.core": 0})
    params = {**params, "prelude": dict(params["prelude"])}
    params["prelude"][silent] = jax.tree.map(jnp.zeros_like, params["prelude"][silent])
    batch = some_batch()
    x = model.embed(params, batch)
    added = plain.stream(params, x)[0] - x
    kept = (model.stream(model.dropped(params, jax.random.key(1)), x)[0] - x) / added
    assert np.mean(np.abs(kept) < 1e-3) == pytest.approx(0.5, abs=0.06)
    # What is not left out counts twice, so that the mean stays; but rounding is that of the sum.
    np.testing.assert_allclose(kept[np.abs(kept) > 1e-3], 2, rtol=0.05)


@pytest.mark.parametrize("kind", ["decoder", "recurrent"])
def test_nothing_drops_but_in_updates(kind):
    fields = {"model.core": 2, "stability.every": 0, "model.kind": kind}
    model, plain, params = dropping(**fields)
    batch = some_batch()
    same = jax.jit(plain.apply)(params, batch)[0]
    np.testing.assert_array_equal(jax.jit(model.apply)(params, batch)[0], same)

    @jax.jit
    def apply(key):
        return model.apply(model.dropped(params, key), batch)[0]

    one, again, other = (apply(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.mean(one != other) > 0.9 < np.mean(one != same)


def test_what_is_dropped_in_the_rounds_of_a_loop_is_the_same():
    model, _, params = dropping(**{"model.rounds": 3, "model.drive": False})
    params, batch = model.dropped(params, jax.random.key(1)), some_batch()
    x = start = model.embed(params, batch)
    turn = model.turn(params, start)
    for _ in range(3):
        x = turn(x)
    np.testing.assert_allclose(x, model.stream(params, start)[0], rtol=1e-4, atol=1e-4)


def test_numbers_of_states_keep_their_mean():
    own, other = ParamInfo("state", ("group", "neuron", None)), ParamInfo("state", (None, None))
    params, info = (jnp.full((2, 50, 50), 3.0), jnp.ones((4, 4))), (own, other)
    states, whole = drop_states(params, info, 0.25, jax.random.key(0))
    assert np.mean(states == 0) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_allclose(states[states != 0], 4.0)
    assert whole is params[1]
    assert drop_states(params, info, 0.0, None) is params
    with pytest.raises(UserError, match=r"model.state_dropout=0.1: must be 0.0 where neurons"):
        drop_states(params[1:], info[1:], 0.1, jax.random.key(0))


# ---- The best, and patience ----------------------------------------------------------------------


def test_patience_ends_a_run_and_the_best_is_kept_and_used(make, tmp_path, monkeypatch, capsys):
    real, run = evaluation.held_out, tmp_path / "run"

    def no_better_than(*given):
        return {name: max(loss, 5.45) for name, loss in real(*given).items()}

    monkeypatch.setattr(evaluation, "held_out", no_better_than)
    config = make(**{"train.patience": 2, "checkpoint.best": True, "checkpoint.every_steps": 9})
    config.train.decay_fraction = 1.0
    trained = ngc_jax.train(config, run)
    said, rows = capsys.readouterr().out, rows_of(run)
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    best = min(step for step, loss in losses.items() if loss == 5.45)
    assert 2 < best < 8 < max(losses) == best + 4, losses
    assert f"done: {best + 4} steps in" in said
    assert "train.patience=2 is at its end; see" in said
    assert [row["step"] for row in rows_of(run) if "final/loss" in row] == [best + 4]
    assert best in steps_in(run)
    assert trained.told == f"step {best}, the least held-out loss, averaged (train.ema=0.9)"
    monkeypatch.setattr(Trained, "generate", lambda *given, **more: "")
    monkeypatch.setattr("sys.argv", ["sample", f"--workdir={run}"])
    sample.main()
    assert capsys.readouterr().err == f"{run}, {trained.told}\n"
    # All that decides is in the rows, which are those of the checkpoint after a kill.
    shutil.copytree(run, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / str(best + 4))
    assert outcome(ngc_jax.train(config, tmp_path / "killed")) == outcome(trained)
    assert steps_in(tmp_path / "killed") == steps_in(run)
    shutil.rmtree(run / "checkpoints" / str(best) / "state")
    capsys.readouterr()
    assert ngc_jax.load(run).step == best + 4
    assert f"checkpoint {best} is skipped" in capsys.readouterr().err


# ---- From another run ----------------------------------------------------------------------------


def test_a_run_begins_with_another_one_on_new_data_a_larger_vocabulary_and_another_context(
    regular, make, tmp_path, capsys
):
    (tmp_path / "new.txt").write_text(make_text(20_000, seed=1))
    fields = {"train.learning_rate": 0.0, "train.state_learning_rate": 1e-30}  # nothing moves
    fields |= {"train.steps": 1, "train.warmup_steps": 0, "data.path": str(tmp_path / "new.txt")}
    fields |= {"train.init_from": f"{regular.workdir}:9", "data.context": 32}
    config = make(**fields, **{"data.tokenizer": "bpe", "data.vocab_size": 300})
    tuned = ngc_jax.train(config, tmp_path / "tuned")
    said, begun = capsys.readouterr().out, ngc_jax.load(regular.workdir, step=9)
    assert f"parameters of {regular.workdir}, step 9, averaged (train.ema=0.9); 43 of 300" in said
    assert "data.context=32 is longer than 16" in said
    fresh = tuned.model.init(jax.random.key(0))
    spelling, mark = tuned.tokenizer.spelling, tuned.tokenizer.mark
    for token, spelt in enumerate(spelling):
        old = spelt[0] if len(spelt) == 1 else 256 if token == mark else None
        embed, unembed = (
            (fresh["embed"][token], fresh["unembed"][:, token])
            if old is None
            else (begun.params["embed"][old], begun.params["unembed"][:, old])
        )
        np.testing.assert_array_equal(tuned.params["embed"][token], embed)
        np.testing.assert_array_equal(tuned.params["unembed"][:, token], unembed)
    jax.tree.map(np.testing.assert_array_equal, tuned.params["core"], begun.params["core"])
    assert tuned.data().fingerprint == tuned.meta["data"]
    # A tokenizer that was learned goes along.
    assert begin.tokenizer_of(config, tuned, None) is tuned.tokenizer
    same, said = begin.fitted(tuned, tuned.model, tuned.tokenizer, config, None)
    assert same.params is tuned.params
    assert "new" not in said
    with pytest.raises(UserError, match=r"or fewer; 43 of 300 are none of it"):
        begin.fitted(tuned, tuned.model, Bytes(), config, None)


def test_what_does_not_fit_is_listed_in_one_line(regular, make, tmp_path):
    begins = {"train.init_from": str(regular.workdir)}
    with pytest.raises(UserError) as refused:
        ngc_jax.train(make(**begins, **{"model.hidden": 48, "model.coda": 1}), tmp_path / "run")
    said = str(refused.value)
    assert said.count("\n") == 0
    assert "coda/attention_norm/scale none -> [1, 16]" in said
    assert "core/stages/down/inter_broadcast/pre [1, 1, 32, 2] -> [1, 1, 48, 2]; " in said
    begins["train.init_from"] += ":7"
    with pytest.raises(UserError, match=r"holds no checkpoint 7; there are: \[6, 9, 12\]"):
        ngc_jax.train(make(**begins), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_init_from_alone_is_a_run_like_that_one(regular, monkeypatch):
    words = ["train", f"--init_from={regular.workdir}:9", "--train.steps=7"]
    monkeypatch.setattr("sys.argv", words)
    config, file = config_flag.read_config("", flags.FlagValues())
    assert file.endswith(f"stored.py:{regular.workdir}")
    assert (config.train.init_from, config.train.steps) == (f"{regular.workdir}:9", 7)
    assert config.model.dropout == 0.1
