"""Rounds that are drawn, given for each example, or left to the state; gradients through some;
losses after several.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, WHOLE, batch_of, drawn

from ngc_jax.config import base, make_model, model_shape, validate
from ngc_jax.core.communicate import communicate_per_example, communicate_until_settled
from ngc_jax.count import forward_flops
from ngc_jax.data.batches import Batch, segments_of, token_batch
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.dynamics.measures import relative_change
from ngc_jax.nn.decoder import Decoder
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.rounds import Iteration, disturb, lognormal_poisson, make_iteration, marked
from ngc_jax.training.step import init_state, make_train_step

B, T, D = 4, 3, 8
ROUNDS = np.array([1, 3, 0, 6])


@pytest.fixture(scope="module")
def toy():
    """A round that is a plain function of weights, the drive's input and the state."""
    keys = jax.random.split(jax.random.key(0), 2)
    w, start = jax.random.normal(keys[0], (D, D)) * 0.4, jax.random.normal(keys[1], (B, T, D))
    return (lambda w, e, x: 0.5 * x + 0.3 * e + jnp.tanh(x @ w)), w, start


def run(turn, w, start, rounds=ROUNDS, backprop=2, truncated=True, **options):
    held = jax.lax.stop_gradient((w, start))
    still = partial(turn, *held) if truncated else None
    rounds = jnp.asarray(rounds)
    return communicate_per_example(
        partial(turn, w, start), start, rounds, backprop=backprop, still=still, **options
    )


@pytest.mark.parametrize(
    "options", [{"backprop": 2}, {"backprop": 0}, {"backprop": 6, "truncated": False}]
)
def test_each_example_has_the_rounds_it_asks_for(toy, options):
    _, w, start = toy
    (found,), (made,) = run(*toy, **options)
    np.testing.assert_array_equal(made, ROUNDS)
    for x, e, rounds in zip(found, start, ROUNDS, strict=True):
        expected = np.asarray(e)
        for _ in range(rounds):
            expected = 0.5 * expected + 0.3 * np.asarray(e) + np.tanh(expected @ np.asarray(w))
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", [True, False])
def test_gradients_go_through_the_last_rounds_alone(toy, remat):
    turn, w, start = toy

    def by_hand(w, start):
        total = 0.0
        for e, rounds in zip(start, ROUNDS, strict=True):
            x = e
            for left in range(rounds, 0, -1):
                x = turn(w, e, x) if left <= 2 else turn(*jax.lax.stop_gradient((w, e, x)))
                x = jax.lax.stop_gradient(x) if left == 3 else x
            total += jnp.sum(jnp.sin(x))
        return total

    found = jax.jit(
        jax.grad(lambda w, s: jnp.sum(jnp.sin(run(turn, w, s, remat=remat)[0])), (0, 1))
    )(w, start)
    expected = jax.grad(by_hand, (0, 1))(w, start)
    whole = jax.grad(
        lambda w: jnp.sum(jnp.sin(run(turn, w, start, backprop=6, truncated=False)[0]))
    )(w)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )
    assert not np.allclose(found[0], whole, rtol=0.01)


def test_memory_does_not_grow_with_the_rounds_before_the_last_ones(toy):
    turn, w, start = toy

    def temporary(rounds, **options):
        gradient = jax.grad(lambda w, s: jnp.sum(run(turn, w, s, [rounds] * B, **options)[0]))
        return jax.jit(gradient).lower(w, start).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1000) == temporary(8)
    assert temporary(1000, backprop=1000, truncated=False) > 1000 * start.nbytes


def test_states_are_read_out_counting_back_from_the_last_round(toy):
    states, made = run(*toy, backprop=5, every=2)
    np.testing.assert_array_equal(made, ROUNDS - np.array([4, 2, 0])[:, None])
    for state, so_far in zip(states, made, strict=True):
        (expected,), _ = run(*toy, rounds=np.maximum(so_far, 0))
        np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-6)


def test_tokens_rest_while_a_round_would_move_them_by_less_than_the_tolerance(toy):
    turn, w, start = toy
    turn = partial(turn, 0.5 * w, start)
    x, rounds = np.asarray(start), np.zeros((B, T), int)
    for _ in range(40):
        after = np.asarray(turn(x))
        moves = np.linalg.norm(after - x, axis=-1) >= 0.01 * np.linalg.norm(x, axis=-1)
        x, rounds = np.where(moves[..., None], after, x), rounds + moves
    found, made = jax.jit(partial(communicate_until_settled, turn, cap=40))(start, 0.01)
    assert 1 < rounds.min() < rounds.max() < 40, "tokens should differ in how long they take"
    np.testing.assert_array_equal(made, rounds)
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-6)
    assert np.all(relative_change(turn(found), found) < 0.01)

    capped, made = communicate_until_settled(turn, start, 0.0, cap=3)
    np.testing.assert_array_equal(made, 3)
    np.testing.assert_allclose(capped, turn(turn(turn(start))), rtol=1e-5, atol=1e-6)
    _, made = communicate_until_settled(lambda x: x * jnp.nan, start, 0.01, cap=5)
    np.testing.assert_array_equal(made, 5), "what is not finite has not settled"


# ---- The decoder ----


def settings(**fields):
    config = base()
    config.update_from_flattened_dict({**WHOLE, "data.context": 8, "model.rounds": 3, **fields})
    return config


@pytest.fixture(scope="module")
def decoder():
    model = Decoder(model_shape(settings(**{"model.rule": "dense"}), 50))
    return (
        model,
        jax.jit(model.init)(jax.random.key(0)),
        Batch(jax.random.randint(jax.random.key(1), (3, 8), 0, 50)),
    )


@pytest.fixture(scope="module")
def apply(decoder):
    return jax.jit(decoder[0].apply)


@pytest.fixture(scope="module")
def fixed(decoder, apply):
    """Logits after one and three rounds, as they are without any of this."""
    model, params, batch = decoder
    return {1: jax.jit(model.at(1).apply)(params, batch)[0], 3: apply(params, batch)[0]}


def test_logits_of_an_example_are_those_of_its_rounds(decoder, fixed):
    model, params, batch = decoder
    (logits,), _ = jax.jit(partial(model.iterate, backprop=1))(
        params, batch, rounds=jnp.array([3, 1, 3])
    )
    expected = np.stack([fixed[3][0], fixed[1][1], fixed[3][2]])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_settling_is_causal_and_within_the_cap_the_fixed_loop(decoder, fixed):
    model, params, batch = decoder
    settle = jax.jit(partial(model.settle, params, cap=3))
    np.testing.assert_allclose(settle(batch, tolerance=0.0)[0], fixed[3], rtol=1e-4, atol=1e-5)
    logits, rounds = settle(batch, tolerance=0.17)
    assert rounds.min() < rounds.max(), "tokens should differ in how long they take"
    later, _ = settle(Batch(batch.inputs.at[:, 5].add(1)), tolerance=0.17)
    np.testing.assert_array_equal(later[:, :5], logits[:, :5])
    assert np.all(np.any(later[:, 5:] != logits[:, 5:], axis=-1))


def test_a_model_without_a_loop_has_no_rounds_to_choose(decoder):
    _, params, batch = decoder
    with pytest.raises(ValueError, match=r"has no loop \(model.core=0\)"):
        Decoder(model_shape(settings(**{"model.core": 0}), 50)).settle(
            params, batch, tolerance=0.1, cap=2
        )


def test_without_a_drive_the_loop_is_the_one_whose_drive_is_zero(decoder, apply, fixed):
    model, params, batch = decoder
    bare = Decoder(dataclasses.replace(model.shape, drive=False))
    core = {name: leaf for name, leaf in params["core"].items() if name != "drive"}
    assert jax.tree.structure(jax.eval_shape(bare.init, jax.random.key(0))) == jax.tree.structure(
        {**params, "core": core}
    )
    silent = {**params, "core": {**core, "drive": jnp.zeros_like(core["leak"])}}
    found = jax.jit(bare.apply)({**params, "core": core}, batch)[0]
    np.testing.assert_allclose(found, apply(silent, batch)[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(found, fixed[3], atol=1e-3)


# ---- An update ----


def test_read_outs_before_the_last_are_weighed_and_none_is_of_round_zero(decoder):
    model, params, batch = decoder
    iteration = Iteration(model, 1, (1 / 3,) * 3, backprop=3, every=1, weight=0.5, seed=0)
    _, weights = jax.jit(lambda: iteration.apply(jnp.array([1, 2, 3]))(params, batch))()
    np.testing.assert_allclose(
        weights, [[0, 0, 0.25], [0, 1 / 3, 0.25], [1, 2 / 3, 0.5]], rtol=1e-6
    )


def test_rounds_follow_from_seed_and_update_and_have_the_shares_they_should():
    config = settings(**{"iteration.rounds": "uniform", "iteration.low": 2, "iteration.high": 5})
    uniform = make_iteration(make_model(config, 50), config)
    steps = jnp.arange(4000)
    drawn = np.asarray(jax.vmap(uniform.draw)(steps))
    np.testing.assert_array_equal(
        np.asarray([uniform.draw(jnp.int32(s)) for s in (0, 17)]), drawn[[0, 17]]
    )
    np.testing.assert_allclose(np.bincount(drawn, minlength=6)[2:] / 4000, 0.25, atol=0.03)
    other = dataclasses.replace(uniform, seed=1)
    assert np.any(np.asarray(jax.vmap(other.draw)(steps[:100])) != drawn[:100])

    draw = np.random.default_rng(0)
    rates = np.exp(draw.normal(np.log(3.0) - 0.125, 0.5, 200_000))
    by_chance = np.clip(draw.poisson(rates) + 1, 2, 9)
    shares = lognormal_poisson(4.0, 2, 9)
    np.testing.assert_allclose(
        shares, np.bincount(by_chance, minlength=10)[2:] / 200_000, atol=0.005
    )
    assert shares.sum() == pytest.approx(1)
    assert lognormal_poisson(4.0, 1, 200) @ np.arange(1, 201) == pytest.approx(4.0)


def test_an_update_has_the_mean_loss_of_its_read_outs_also_in_parts():
    fields = {
        "iteration.rounds": "uniform",
        "iteration.low": 3,
        "iteration.high": 4,
        "iteration.backprop": 2,
    }
    fields |= {**TINY, "iteration.supervise_every": 1, "train.accumulation": 2}
    config = settings(**fields)
    model = make_model(config, Bytes.vocab)
    iteration = make_iteration(model, config)
    tokens = np.array(jax.random.randint(jax.random.key(0), (8, 9), 0, 256))
    state = jax.jit(lambda: init_state(model, config.train, 0))().replace(step=jnp.int32(7))
    _, scalars = jax.jit(make_train_step(model, config.train, iteration=iteration))(
        state, batch_of(tokens)
    )
    rounds = int(scalars["train/rounds"])
    assert rounds == int(iteration.draw(jnp.int32(7)))

    apply = jax.jit(partial(model.iterate, state.params))

    def loss(rounds):
        share = jax.nn.log_softmax(apply(batch_of(tokens), rounds=jnp.int32(rounds))[0][0])
        return -np.mean(
            np.take_along_axis(np.asarray(share), np.asarray(tokens)[:, 1:, None], axis=-1)
        )

    by_hand = (loss(rounds) + loss(rounds - 1)) / 2
    assert float(scalars["train/loss"]) == pytest.approx(by_hand, rel=1e-5)


def test_marks_in_an_example_are_its_rounds():
    fields = {
        **TINY,
        "iteration.rounds": "marked",
        "iteration.mark": 3,
        "iteration.low": 1,
        "iteration.high": 3,
    }
    config = settings(**fields)
    model = make_model(config, Bytes.vocab)
    params = drawn(model)
    rows = [[3, 5, 6, 7, 8, 9, 1, 2], [3, 3, 3, 3, 3, 9, 1, 2], [5, 5, 6, 7, 8, 9, 1, 2]]
    tokens = np.array(rows, np.int32)
    batch = Batch(tokens, segments=segments_of(tokens, 3))
    trained, weights = jax.jit(make_iteration(model, config).apply(jnp.int32(9)))(params, batch)
    at_test, made = jax.jit(marked(model, config))(params, batch)
    np.testing.assert_array_equal(made[:, 0], [1, 5, 1])  # no mark is fewer than there may be
    np.testing.assert_array_equal(weights, 1)
    fixed = {count: jax.jit(model.at(count).apply)(params, batch)[0] for count in (1, 3, 5)}
    # iteration.high bounds training alone
    for logits, rounds in ((trained[-1], [1, 3, 1]), (at_test, [1, 5, 1])):
        for i, count in enumerate(rounds):
            np.testing.assert_allclose(logits[i], fixed[count][i], rtol=1e-5, atol=1e-6)
    assert marked(model, settings()) is None


def test_noise_is_of_the_size_asked_for_and_another_in_each_round():
    x = jnp.concatenate([jnp.ones((1, 50, 40)), 3 * jnp.ones((1, 50, 40))])
    noise = partial(disturb, 0.5, jax.random.key(1))
    first, second = (np.asarray(noise(x, jnp.int32(left)) - x) for left in (1, 2))
    np.testing.assert_allclose(first.std(axis=(1, 2)), [0.5, 1.5], rtol=0.05)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    np.testing.assert_array_equal(first, noise(x, jnp.int32(1)) - x)


def test_flops_count_rounds_without_gradients_once():
    config = settings()
    model = make_model(config, 50)
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = token_batch(2, 8)
    one, two = (forward_flops(model.at(r).apply, params, batch) for r in (1, 2))
    # 2 rounds, or 4
    iteration = Iteration(model, 2, (0.5, 0.0, 0.5), backprop=2, every=0, weight=1.0, seed=0)
    assert iteration.flops(params, batch) == pytest.approx(3 * two + (two - one))
    whole = dataclasses.replace(iteration, backprop=4)
    assert whole.flops(params, batch) == pytest.approx(
        3 * forward_flops(model.at(4).apply, params, batch)
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iteration.rounds": "some"}, "one of 'fixed', 'uniform', 'lognormal_poisson', 'marked'"),
        ({"iteration.rounds": "uniform", "model.core": 0}, "'fixed' where the model has no loop"),
        (
            {"iteration.backprop": 1, "model.kind": "bdh", "stability.every": 0},
            "0 where the model has no loop",
        ),
        (
            {"iteration.rounds": "uniform", "iteration.low": 9},
            "at most iteration.high=8, for instance 4",
        ),
        ({"iteration.mean": 1.0}, "above 1, for instance 4.0"),
        ({"iteration.backprop": 4}, "from 1 to model.rounds=3, or 0 for all"),
        ({"iteration.backprop": 1, "model.drive": False}, "0 where model.drive=False"),
        (
            {"iteration.backprop": 2, "iteration.supervise_every": 2},
            "0, or below the 2 rounds .* for instance 1",
        ),
        ({"iteration.supervise_weight": 0.0}, "above 0"),
        ({"iteration.noise": -0.1}, "0 or more"),
        ({"model.state_activation": "tanh", "model.core": 0}, "'none' where the model has no loop"),
        ({"model.route": "start", "model.core": 0}, "'state' where the model has no loop"),
        ({"model.qk_gain": 0.0}, "above 0, for instance 1.0"),
        ({"model.qk_norm": False, "model.qk_gain": 3.0}, "1.0 where model.qk_norm=False"),
        ({"model.state_activation": "relu"}, "one of 'none', 'tanh'"),
        ({"model.keep": 1.0}, "above 0 and below 1"),
    ],
)
def test_iterations_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        validate(settings(**fields))


def test_a_fixed_number_of_rounds_is_left_as_it_was():
    config = settings()
    validate(config)
    assert make_iteration(make_model(config, 50), config) is None
