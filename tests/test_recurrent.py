"""The recurrent model: a plain NumPy loop, the stream in parts, documents, truncated gradients,
memory, and parity.
"""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, drawn, shaken
from test_decoder import numpy_norm

import ngc_jax
from experiments.chaos import outcome
from ngc_jax import count
from ngc_jax.config import base, make_model, reset_unread, validate
from ngc_jax.core.recurrence import along_tokens, in_chunks, time_scales
from ngc_jax.data.batches import Batch, token_batch
from ngc_jax.dynamics.lyapunov import leading_exponent
from ngc_jax.runtime.errors import UserError
from ngc_jax.training import loop as train
from ngc_jax.training import optimizer as optim

KIND = {"model.kind": "recurrent", "stability.every": 0}
VOCAB, LENGTH = 20, 7


def settings(**fields):
    config = base()
    config.update_from_flattened_dict({**TINY, **KIND, "data.context": LENGTH})
    reset_unread(config)
    config.model.update(fields)
    validate(config)
    return config


def build(**fields):
    """A model of two cells with two rounds, and parameters."""
    model = make_model(settings(**{"core": 2, **fields}), VOCAB)
    return model, drawn(model)


@pytest.fixture(scope="module")
def small():
    return build()


@pytest.fixture(scope="module")
def plain():
    """The least of them, as it starts but for a little."""
    model, _ = build(core=1, rounds=1, rule="dense")
    return model, shaken(jax.jit(model.init)(jax.random.key(0)))


TOKENS = np.array(jax.random.randint(jax.random.key(5), (2, LENGTH), 0, VOCAB))
SEGMENTS = np.array([[1] * 3 + [2] * 4, [1] * LENGTH])
PLAIN, DOCUMENTS = Batch(TOKENS), Batch(TOKENS, segments=SEGMENTS)
# These dynamics expand: from 2e-6 at the first token, rounding grows to 2e-4 at the seventh.
ROUNDING = {"rtol": 1e-4, "atol": 1e-3}


def numpy_weights(synapse):
    """W of the members of a synapse's fan, one below the other."""
    parts = ((name.partition("_")[2], states) for name, states in synapse.items())
    made = [
        jax.vmap(partial(ngc_jax.weights, rule))(states.get("pre", ()), states["post"])
        for rule, states in parts
    ]
    return np.concatenate(np.sum(np.asarray(made, np.float64), axis=0))


def numpy_model(model, params, tokens, segments):
    """Logits, one cell, token and round after another."""
    s, x = model.shape, np.asarray(params["embed"], np.float64)[tokens]
    for c in range(s.core):
        cell = jax.tree.map(lambda p, c=c: p[c], params["cells"])
        w = {name: numpy_weights(cell[name]) for name in ("token", "gate_up", "down", "out")}
        keep, drive = (
            1 / (1 + np.exp(np.asarray(cell["leak"], np.float64))),
            np.asarray(cell["drive"], np.float64),
        )
        e, after = numpy_norm(x, cell["norm"]["scale"]), np.zeros_like(x)
        for b, t in np.ndindex(tokens.shape):
            h = (
                np.zeros(s.width)
                if t == 0 or segments[b, t] != segments[b, t - 1]
                else after[b, t - 1]
            )
            for _ in range(s.rounds):
                gate, up = np.split(w["token"] @ e[b, t] + w["gate_up"] @ numpy_norm(h, 1.0), 2)
                exchanged = w["down"] @ (gate / (1 + np.exp(-gate)) * up)
                h = keep * h + np.sqrt(1 - keep**2) * (drive * e[b, t] + exchanged)
            after[b, t] = h
        x = x + numpy_norm(after, 1.0) @ w["out"].T
    return numpy_norm(x, params["norm"]["scale"]) @ np.asarray(params["unembed"], np.float64)


def test_the_model_is_its_formula(small):
    model, params = small
    found, _ = jax.jit(model.apply)(params, DOCUMENTS)
    expected = numpy_model(model, params, TOKENS, SEGMENTS)
    np.testing.assert_allclose(found, expected, **ROUNDING)


def test_a_stream_may_come_token_by_token_or_in_parts(small):
    model, params = small
    whole = jax.jit(model.apply)(params, PLAIN)[0]
    decode, cache = jax.jit(model.decode), model.init_cache(2, 5)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, model.init_cache(2, 10**9)), (
        "it does not grow"
    )
    for t in range(LENGTH):
        one, cache = decode(params, TOKENS[:, t : t + 1], cache, t)
        np.testing.assert_allclose(one[:, 0], whole[:, t], rtol=1e-4, atol=1e-5)
    with_segments = jax.jit(model.apply)(params, DOCUMENTS)[0]
    np.testing.assert_allclose(with_segments[:, :3], whole[:, :3], rtol=1e-5, atol=1e-5)
    alone = jax.jit(model.apply)(params, Batch(TOKENS[:, 3:]))[0]
    np.testing.assert_allclose(with_segments[0, 3:], alone[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(whole[0, 3:], alone[0], atol=1e-2)


@pytest.mark.parametrize("fields", [{"chunk": 3}, {"form": "signals", "remat": "stages"}])
def test_chunks_forms_and_remat_are_the_same_function(small, fields):
    model, params = small
    changed = make_model(settings(core=2, **fields), VOCAB)
    found, expected = (jax.jit(m.apply)(params, DOCUMENTS)[0] for m in (changed, model))
    np.testing.assert_allclose(found, expected, **ROUNDING)


def leaky(x, length):
    """h <- h / 2 + x, twice for each of x [T, 1, 1], in chunks of a length: h after each token."""

    def run(state, x):
        return along_tokens(lambda h, x: 0.5 * h + x, state, x, rounds=2)

    return in_chunks(run, jnp.zeros((1, 1)), x, length)[1]


def test_gradients_stay_within_a_chunk():
    x = jnp.arange(7.0).reshape(7, 1, 1)
    with jax.disable_jit():
        eager = leaky(x, 0)
    for length in (0, 3):
        np.testing.assert_allclose(jax.jit(leaky, static_argnums=1)(x, length), eager, rtol=1e-6)

    def owed(length, at):
        return jax.grad(lambda x: leaky(x, length)[at, 0, 0])(x).ravel() / 1.5

    np.testing.assert_allclose(owed(0, 5), [4.0**-5, 4.0**-4, 4.0**-3, 4.0**-2, 0.25, 1, 0])
    np.testing.assert_allclose(owed(3, 5), [0, 0, 0, 4.0**-2, 0.25, 1, 0])
    np.testing.assert_allclose(owed(3, 6), [0, 0, 0, 0, 0, 0, 1])  # the last chunk is shorter


def test_training_memory_grows_with_the_chunk_and_not_with_the_window():
    def temporary(chunk):
        model = make_model(settings(chunk=chunk, rounds=1, rule="dense"), VOCAB)
        params = jax.eval_shape(model.init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32)

        def loss(params, tokens):
            return optax.softmax_cross_entropy_with_integer_labels(
                model.apply(params, Batch(tokens))[0], tokens
            ).mean()

        return (
            jax.jit(jax.grad(loss))
            .lower(params, tokens)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    logits = 8 * 1024 * VOCAB * 4  # bytes, which the loss reads all at once
    assert temporary(32) < 4 * logits
    assert temporary(0) > 4 * temporary(32)


def test_neurons_start_with_time_scales_from_one_token_to_a_window(small):
    scales = time_scales(16, 4, 1000.0)
    np.testing.assert_allclose(scales, np.tile([1, 10, 100, 1000], 4))
    model = small[0]
    leak = jax.jit(model.init)(jax.random.key(0))["cells"]["leak"]
    keep = np.exp(-np.logaddexp(0, leak)) ** model.shape.rounds  # of a token
    np.testing.assert_allclose(
        keep, np.tile(np.exp(-1 / time_scales(16, 4, LENGTH)), (2, 1)), rtol=1e-4
    )


def test_a_cell_is_counted_as_it_is_documented():
    d, f, g, p, v = 16, 32, 4, 3, VOCAB
    model = make_model(settings(core=1, rounds=2), v)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tall, square = d * f // g + p * g * (d + f), d * d // g + 2 * p * g * d
    assert count.parameters(params, model.param_info()).matrices == 5 * tall + square
    assert count.generated_weights(model) == 5 * d * f + d * d
    # of both, the weights are made once
    more, fewer = (count.forward_flops(model.apply, params, token_batch(1, t)) for t in (50, 30))
    assert more - fewer == 20 * 2 * (2 * d * f + 2 * 3 * d * f + d * d + d * v)


def test_lyapunov_exponents_along_a_stream(plain):
    model, params = plain

    def step(states, token):
        return model.decode(params, token[None, None], states, 0)[1]

    stream = jax.random.randint(jax.random.key(1), (60,), 0, VOCAB)
    found = leading_exponent(step, model.init_cache(1, 0), stream, steps=50, transient=10)
    start, push = (
        model.init_cache(1, 0),
        1e-4 * jax.random.normal(jax.random.key(2), model.init_cache(1, 0).shape),
    )
    follow = jax.jit(lambda h, tokens: jax.lax.scan(lambda h, t: (step(h, t), None), h, tokens)[0])
    near = follow(start, stream[:10])
    grown = follow(near + push, stream[10:40]) - follow(near, stream[10:40])
    rate = np.log(np.linalg.norm(grown) / np.linalg.norm(push)) / 30
    assert found == pytest.approx(rate, abs=0.15)


def test_a_killed_run_ends_as_the_unbroken_one(tiny, tmp_path):
    tiny.update_from_flattened_dict(
        {**KIND, "model.rule": "none", "model.chunk": 8, "data.isolate_documents": True}
    )
    reset_unread(tiny)
    tiny.train.steps, tiny.checkpoint.every_steps, tiny.eval.every = 6, 3, 6
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    train.run(tiny, unbroken)
    shutil.copytree(unbroken, killed)
    shutil.rmtree(killed / "checkpoints" / "6")
    train.run(tiny, killed)
    assert outcome(unbroken) == outcome(killed)
    assert (
        "a Neuronal Group Communication recurrent model: 4 groups"
        in (unbroken / "card.md").read_text()
    )


def test_parity_of_short_streams_carries_over_to_long_ones():
    config = settings(rounds=1, core=1, rule="none", remat="none")
    config.train.update({"steps": 120, "warmup_steps": 20})
    model = make_model(config, 4)
    info = model.param_info()
    chain = optim.make_optimizer(config.train, info)

    def streams(key, length, rows=64):
        bits = jax.random.bernoulli(key, 0.5, (rows, length)).astype(jnp.int32)
        return bits, jnp.cumsum(bits, axis=1) % 2

    def loss(params, key):
        bits, parity = streams(key, 12)
        return optax.softmax_cross_entropy_with_integer_labels(
            model.apply(params, Batch(bits))[0], parity
        ).mean()

    @jax.jit
    def trained(params):
        def update(carry, step):
            params, memory = carry
            grads = jax.grad(loss)(params, jax.random.fold_in(jax.random.key(1), step))
            direction, memory = chain.update(grads, memory, params)
            return (optim.apply(config.train, params, direction, step, info), memory), None

        return jax.lax.scan(update, (params, chain.init(params)), jnp.arange(120))[0][0]

    params = trained(jax.jit(model.init)(jax.random.key(0)))
    bits, parity = streams(jax.random.key(2), 1000, rows=20)
    np.testing.assert_array_equal(jax.jit(model.apply)(params, Batch(bits))[0].argmax(-1), parity)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stability.every": 10}, "stability.every=10: must be 0 where model.kind='recurrent'"),
        ({"model.prelude": 1}, "model.prelude=1: must be 0 where"),
        ({"model.core": 0}, "model.core=0: must be 1 or more"),
        ({"model.gates": True}, "model.gates=True: must be False where"),
        ({"model.sharing": "qkv"}, "model.sharing='qkv': must be one of 'none', 'gate_up'"),
        (
            {"model.wiring": "dynamic", "rewire.channels": 2},
            "model.wiring='dynamic': must be one of 'complete'",
        ),
        ({"model.chunk": -1}, "model.chunk=-1: must be 0 or more"),
        (
            {"model.kind": "decoder", "model.chunk": 8},
            "model.chunk=8: must be 0 where model.kind='decoder'",
        ),
        (
            {"iteration.rounds": "uniform"},
            "iteration.rounds='uniform': must be 'fixed' where the model has no loop",
        ),
        ({"mesh.group": 2}, "mesh.group=2: must be 1 where model.kind='recurrent'"),
    ],
)
def test_what_a_recurrent_model_has_not_is_refused(fields, message):
    config = base()
    config.update_from_flattened_dict({**TINY, **KIND, "train.warmup_steps": 0})
    reset_unread(config)
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        validate(config)
