"""What is measured is what is trained: documents apart, and attention that looks both ways.

Positions are rotary, so a row of two documents that do not see each other is to a model what two
rows of one document are. And what a round or a stage does to a state is read from `model.stream`,
the forward pass that training differentiates.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WHOLE, drawn, make_text

import ngc_jax
from ngc_jax.analysis.probes import (
    activations,
    attention_weights_by_stage,
    round_states,
    token_exponents,
    traffic,
)
from ngc_jax.config import base, make_model
from ngc_jax.count import forward_flops
from ngc_jax.data.batches import Batch, token_batch
from ngc_jax.data.tokens import load_data
from ngc_jax.dynamics.measures import contraction
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.layers import RMSNorm, Stage
from ngc_jax.nn.synapse import intercept
from ngc_jax.training.evaluation import compile_watch
from ngc_jax.training.rewiring import make_rewire
from ngc_jax.training.rounds import make_iteration
from ngc_jax.training.stability_metrics import PROBES, make_penalty, make_watch
from ngc_jax.training.step import init_state, make_train_step

VOCAB, ROUNDS = 20, 3
CORE = {"model.prelude": 0, "model.coda": 0}  # each stack is one more thing to compile
LOOP = {**CORE, "model.drive": False}


def build(causal=True, **fields):
    config = base()
    config.update_from_flattened_dict({**WHOLE, "model.rounds": ROUNDS, **fields})
    model = make_model(config, VOCAB)
    model = Decoder(dataclasses.replace(model.shape, causal=causal))
    return config, model, drawn(model)


def documents():
    """Rows of two documents: apart in one row; each in a row of its own; and not apart."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, 16)).astype(np.int32)
    numbered = np.broadcast_to(np.arange(16, dtype=np.int32) // 8, tokens.shape)
    rows = Batch(tokens.reshape(6, 8), segments=np.zeros((6, 8), np.int32))
    one = Batch(tokens, segments=np.zeros_like(tokens))
    return Batch(tokens, segments=numbered), rows, one


@pytest.mark.parametrize("causal", [True, False])
def test_measures_of_stability_are_those_of_documents_alone(causal):
    config, model, params = build(causal, **CORE, **{"stability.measures": "rounds,departure"})
    watch = jax.jit(make_watch(model, config.stability))
    apart, rows, one = (
        {name: float(value) for name, value in watch(params, batch).items()}
        for batch in documents()
    )
    assert apart.keys() == {
        "stability/departure_messages",
        "stability/departure_drive",
        "stability/drive_ratio",
        "stability/boundedness",
        "stability/contraction_per_round",
        "stability/contraction_per_round_max",
    }
    assert apart == pytest.approx(rows, rel=1e-5)
    assert all(abs(apart[name] / one[name] - 1) > 1e-4 for name in apart)


def test_what_is_looked_at_is_what_a_document_alone_shows():
    _, model, params = build(**{"model.prelude": 0, "model.rounds": 1})

    @jax.jit
    def look(params, batch):
        return (
            model.apply(params, batch)[0],
            model.unembed(params, list(activations(model, params, batch).values())[-1]),
            traffic(model, params, batch),
            attention_weights_by_stage(model, params, batch),
        )

    apart, rows, one = (jax.device_get(look(params, batch)) for batch in documents())
    for logits, walked, _, _ in (apart, rows, one):
        np.testing.assert_allclose(walked, logits, rtol=1e-4, atol=1e-5)
    for name, loud in apart[2].items():
        np.testing.assert_allclose(loud, rows[2][name], rtol=1e-4)
        assert not np.allclose(loud, one[2][name], rtol=1e-3)
    for share in apart[3].values():
        assert np.all(share[:, :, 8:, :8] == 0)
        np.testing.assert_allclose(share.sum(-1), 1, rtol=1e-5)


@pytest.fixture(scope="module", params=[True, False], ids=["causal", "both ways"])
def loop(request):
    """A model that is its loop alone, so that `stream` of k rounds is k steps of it; where rounds
    lead to, and by how much they stretch a change.
    """
    config, model, params = build(request.param, **LOOP)

    @jax.jit
    def streams(params, batch):
        x = model.embed(params, batch)
        after = [
            model.at(rounds).stream(params, x, batch.segments)[0] for rounds in range(1, ROUNDS + 1)
        ]
        return jnp.stack([x, *after])

    def stretch(params, row):
        """log |J v| for ROUNDS rounds and one v of length 1."""
        x = model.embed(params, row)
        v = jax.random.normal(jax.random.key(0), (1, x.size)).reshape(x.shape)
        v = v / jnp.linalg.norm(v)
        _, moved = jax.jvp(lambda x: model.stream(params, x, row.segments)[0], (x,), (v,))
        return jnp.log(jnp.linalg.norm(moved))

    @jax.jit
    def stretches(params, batch):
        rows = jax.tree.map(lambda a: a[:, None], batch)
        return jax.lax.map(lambda row: stretch(params, row), rows)

    return config, model, params, streams, stretches


def test_exponents_are_of_the_trained_map(loop):
    config, model, params, _, stretches = loop
    config.stability.update({"measures": "exponents", "rounds": ROUNDS})
    watch = jax.jit(make_watch(model, config.stability))
    apart, _, one = documents()
    expected, leaky = (float(stretches(params, each).mean()) / ROUNDS for each in (apart, one))
    for value in watch(params, apart).values():
        assert float(value) == pytest.approx(expected, abs=1e-4)
    assert abs(expected - leaky) > 1e-3


@pytest.mark.parametrize("asked", ["contraction", "exponent", "jacobian"])
def test_penalties_are_of_the_trained_map(loop, asked):
    config, model, params, streams, stretches = loop
    stability = config.stability.copy_and_resolve_references()
    stability.update({"low": 2.0, "high": 3.0, "weight": 2.0})  # above what it is
    stability.update({"jacobian": 2.0} if asked == "jacobian" else {"regulariser": asked})
    key, (apart, _, one) = jax.random.key(3), documents()

    def expected(batch):
        states = streams(params, batch)
        if asked == "contraction":
            return 2 * (2.0 - np.mean(np.log(contraction(states)))) ** 2
        if asked == "exponent":
            return 2 * (2.0 - np.mean(stretches(params, batch)) / ROUNDS) ** 2
        step = lambda x: model.at(1).stream(params, x, batch.segments)[0]  # noqa: E731
        v = jax.random.normal(key, states[-1].shape)
        return 2 * np.mean(np.square(jax.jit(lambda x: jax.vjp(step, x)[1](v)[0])(states[-1])))

    found = jax.jit(make_penalty(model, stability))(params, apart, key)
    assert float(found) == pytest.approx(float(expected(apart)), rel=1e-4)
    assert abs(float(expected(one) / expected(apart)) - 1) > 1e-3


def test_the_watch_of_a_run_knows_the_documents_of_its_text(tiny, tmp_path, monkeypatch):
    """By a probe of one's own, put into the table after all was imported."""

    def documents(seen):
        return {"documents": jnp.mean(seen.batch.segments, dtype=jnp.float32)}

    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(make_text(50, seed=i))
    monkeypatch.setitem(PROBES, "documents", documents)
    tiny.data.path, tiny.data.validation_fraction = str(tmp_path), 0.5
    tiny.data.isolate_documents, tiny.stability.measures = True, "documents"
    tiny.stability.tokens = 10**6  # all there are
    data = load_data(tiny.data)
    model = make_model(tiny, data.tokenizer.vocab)
    params = drawn(model)
    (row,) = compile_watch(model, tiny, meshes.single_device(), data)(params).items()
    windows = [data.validation[i].inputs for i in range(len(data.validation))]
    expected = np.mean(np.cumsum(np.array(windows) == data.tokenizer.mark, axis=1))
    assert row == ("stability/documents", pytest.approx(expected))
    assert expected > 0.1


def test_a_change_fades_within_its_document():
    _, model, params = build(**CORE)
    rates = jax.jit(lambda batch: token_exponents(model, params, batch, k=2))
    apart, rows, one = (rates(batch) for batch in documents())
    np.testing.assert_allclose(apart, rows[::2], rtol=1e-3, atol=1e-4)
    assert not np.allclose(apart, one, atol=0.01)


class Seeing(Decoder):
    """Reads points of the plane in place of tokens."""

    def init(self, key):
        return {**super().init(key), "embed": jax.random.normal(key, (2, self.shape.width))}

    def embed(self, params, batch):
        return batch.inputs["points"] @ params["embed"]


def test_all_that_works_on_embeddings_takes_a_model_that_reads_no_tokens():
    asked = {"stability.jacobian": 0.1, "stability.measures": "exponents"}
    asked |= {"rewire.channels": 1, "rewire.regrow": "correlation", "iteration.backprop": 1}
    dynamic = {"model.wiring": "dynamic", "model.channels": 2, "model.p_intra": 0}
    config, model, params = build(**LOOP, **dynamic, **asked)
    model, params = Seeing(model.shape), {**params, "embed": params["unembed"][:, :2].T}
    draw = np.random.default_rng(0)
    points = draw.standard_normal((4, 8, 2)).astype(np.float32)
    batch = Batch({"points": points}, (points[..., 0] > 0).astype(np.int32))
    stream = model.stream(params, points @ params["embed"])[0]
    np.testing.assert_array_equal(model.apply(params, batch)[0], model.unembed(params, stream))
    # The rest is seen while it is traced: nothing asks for tokens.
    state = jax.eval_shape(lambda: init_state(model, config.train, 0))
    step, watch = make_train_step(model, config.train), make_watch(model, config.stability)
    penalty, rewire = make_penalty(model, config.stability), make_rewire(model, config)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = partial(jax.tree.map, jnp.shape)
    assert shapes(jax.eval_shape(step, state, batch)[0]) == shapes(state)
    assert shapes(jax.eval_shape(rewire, state, batch, number, number)[0]) == shapes(state)
    assert jax.eval_shape(penalty, state.params, batch, jax.random.key(0)).shape == ()
    assert "stability/exponent_per_round" in jax.eval_shape(watch, state.params, batch)
    assert make_iteration(model, config).flops(state.params, batch) > 0
    assert type(model.reshaped(context=4)) is type(model.at(2)) is Seeing


def test_queries_and_keys_of_a_route_are_made_once_of_what_they_read():
    _, model, params = build(**CORE, **{"model.p_intra": 0, "model.route": "start"})
    plain = Decoder(dataclasses.replace(model.shape, route="state"))
    batch = token_batch(2, 16)
    assert forward_flops(model.apply, params, batch) == forward_flops(plain.apply, params, batch)

    batch = documents()[0]
    weights = jax.tree.map(lambda p: p[0], params["core"]["stages"])
    calls = []

    def listen(read, heard):
        calls.append((str(heard.synapse.name), heard.members))
        read.append(heard.x)

    @jax.jit
    def look(params, weights):
        route, x = round_states(model, params, batch, 1)
        read, said = [], Stage(model.shape)
        with intercept(partial(listen, read)):
            said.apply({"params": weights}, x, jnp.arange(16), batch.segments, route=route)
        norm = RMSNorm().bind({"params": weights["attention_norm"]})
        return norm(route), norm(x), read, traffic(model, params, batch)["core 1, round 2"]

    route, state, read, loud = look(params, weights)
    assert calls[:3] == [
        ("query_key_value", (0, 1)),
        ("query_key_value", (2,)),
        ("attention_out", (0,)),
    ]
    np.testing.assert_allclose(read[0], route, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(read[1], state, rtol=1e-5, atol=1e-6)

    groups, by_synapse = model.shape.groups, {}
    for (name, members), x in zip(calls, read, strict=False):
        states = weights[name]["inter_addressed"]
        for member in members:
            W = ngc_jax.weights("addressed", states["pre"][member], states["post"][member])
            W = np.asarray(W).reshape(groups, len(W) // groups, groups, -1)
            heard = np.einsum("gjhi,thi->gjht", W, np.reshape(x, (-1, groups, W.shape[-1])))
            by_synapse.setdefault(name, []).append(np.mean(heard**2, axis=(1, 3)))
    expected = np.sqrt(np.mean([np.mean(of, axis=0) for of in by_synapse.values()], axis=0))
    np.testing.assert_allclose(loud, expected, rtol=1e-4)
