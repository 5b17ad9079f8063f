"""The requests of lm-evaluation-harness, answered without it: sums of nats, and greedy texts."""

import dataclasses
import pathlib
import types

import jax
import numpy as np
import pytest
from conftest import TINY, drawn, make_text

from ngc_jax.config import base, make_model
from ngc_jax.data.byte_pairs import BPE
from ngc_jax.data.tokenizer import Symbols
from ngc_jax.runtime.errors import UserError
from ngc_jax.training import harness
from ngc_jax.training.load import Trained

TEXT = make_text(700)


def request(*args):
    return types.SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def opened():
    """A harness of a tiny model, and what `load` gives."""
    tokenizer, config = BPE(BPE.train([TEXT], 280)), base()
    config.update_from_flattened_dict(TINY | {"data.tokenizer": "bpe", "eval.batch_size": 3})
    model = make_model(config, tokenizer.vocab)
    run = Trained(pathlib.Path("run"), config, model, drawn(model), tokenizer, 7, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "load", lambda *_: run)
        yield harness.Harness(workdir="run", batch_size=3, device="cpu"), run


def logs(run, tokens):
    """The log of the probability of each of tokens [T + 1], T <= 16, but the first."""
    padded = np.zeros((1, 16), np.int32)  # of one shape, so that one program is compiled
    padded[0, : len(tokens) - 1] = tokens[:-1]
    found = jax.nn.log_softmax(run.logits(padded)[0], -1)
    return np.asarray(found)[np.arange(len(tokens) - 1), tokens[1:]]


def test_a_rolling_score_is_the_loss_of_the_text(opened):
    lm, run = opened
    texts = [TEXT, TEXT[:150], ""]
    found = lm.loglikelihood_rolling([request(text) for text in texts])
    for text, total in zip(texts[:2], found, strict=False):
        count = len(run.tokenizer.encode(text.encode()))
        assert -total / count == pytest.approx(run.loss(text).nats_per_token, rel=1e-5)
    assert found[2] == 0


def test_a_continuation_is_scored_after_as_much_context_as_fits(opened):
    lm, run = opened
    # " state" is one token, which a count of those of "group " would miss
    pairs = [("group ", "state"), ("", "signal"), (TEXT[:300], "\nport"), ("\n", TEXT[:60])]
    found = lm.loglikelihood([request(*pair) for pair in pairs])
    for (context, text), (total, _) in zip(pairs[:3], found, strict=False):
        row = run.encode(context + text)[-17:]
        asked = len(run.encode(text.replace("state", " state"))) - 1
        assert total == pytest.approx(logs(run, row)[-asked:].sum(), rel=1e-4)
    row = run.encode("\n" + TEXT[:60])
    ends = range(len(row), 2, -16)  # of windows, from the last one on
    wanted = sum(
        logs(run, row[max(0, end - 17) : end])[-(min(16, end - 2)) :].sum() for end in ends
    )
    assert found[3][0] == pytest.approx(wanted, rel=1e-4)


def test_what_the_model_writes_is_the_likeliest_and_ends_at_a_stop(opened):
    lm, run = opened
    for (
        start
    ) in "abcdefghijklmnopqrstuvwxyz":  # until one is spelt in ASCII, and cut as it was made
        (made,) = lm.generate_until([request(start, {"max_gen_toks": 1})])
        if made.isascii() and len(run.encode(start + made)) == len(run.encode(start)) + 1:
            break
    found = lm.loglikelihood([request(start, made), request(start, "\x00")])
    assert [likeliest for _, likeliest in found] == [True, False]
    (made,) = lm.generate_until([request("ro", {"until": [], "max_gen_toks": 6})])
    assert made == run.generate("ro", tokens=6, temperature=0)
    stop = made[2:4]
    (cut,) = lm.generate_until([request("ro", {"until": stop, "max_gen_toks": 6})])
    assert cut == made[: made.index(stop)]


def test_a_model_of_a_task_is_refused(opened, monkeypatch):
    task = dataclasses.replace(opened[1], tokenizer=Symbols("01="))
    monkeypatch.setattr(harness, "load", lambda *_: task)
    with pytest.raises(UserError, match="reads no text"):
        harness.Harness(workdir="run")
    monkeypatch.setattr(harness, "load", lambda *_: opened[1])
    assert harness.Harness(workdir="run", rounds=5).run.model.shape.rounds == 5
