"""Records: of every rule, wiring, sharing and kind of model each parameter says what it is.

What they must say is written here as it was when a parameter's path said it: in stored models the
paths still are the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, drawn
from flax.traverse_util import flatten_dict

from ngc_jax.analysis import gain_bound, traffic
from ngc_jax.analysis.probes import silenced_channels
from ngc_jax.config import base, make_model
from ngc_jax.core.rules import RULES, Rule, SignalRule
from ngc_jax.core.rules.base import normal
from ngc_jax.core.wiring import WIRINGS
from ngc_jax.data.batches import Batch
from ngc_jax.nn.params import combine, partition

BDH = {"model.kind": "bdh", "model.hidden": 64}
CELLS = {"model.kind": "recurrent", "model.core": 2}
STAGES = {"model.prelude": 1, "model.core": 2, "model.coda": 1}
MODELS = {
    **{f"rule {name}": {"model.rule": name} for name in RULES if not RULES[name].inside},
    **{
        name: {"model.wiring": name, "model.channels": 1 if name == "block" else 2}
        for name in WIRINGS
    },
    "dynamic": {"model.wiring": "dynamic", "model.channels": 2},
    "dynamic ports, shared": {
        "model.wiring": "dynamic_ports",
        "model.channels": 2,
        "model.sharing": "qkv,depth2",
        **STAGES,
    },
    "no messages, gates, no drive": {
        "model.rule": "none",
        "model.gates": True,
        "model.drive": False,
    },
    "within": {"model.p_intra": 2},
    "alike": {"model.init_rank": 8},
    "shared in a stage": {"model.sharing": "qkv,gate_up", "model.rule": "riemannian"},
    "shared by readers": {"model.sharing": "depth2,readers", "model.rule": "broadcast", **STAGES},
    "dense": {"model.rule": "dense", "model.gates": True, **STAGES},
    "recurrent": CELLS,
    "recurrent tanh": {**CELLS, "model.rule": "tanh", "model.sharing": "gate_up"},
    "recurrent dense": {**CELLS, "model.rule": "dense"},
    "bdh": BDH,
}
PER_NEURON = {"addressed", "metric", "metric_diagonal", "metric_scalar", "within", "block"}


def build(fields):
    config = base()
    config.update_from_flattened_dict({**TINY, **fields})
    model = make_model(config, 20)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return flatten_dict(params), flatten_dict(model.param_info()), model


def documented(path, leaf):
    """Kind, rule, part and side; and which axis, from the end, Muon's matrices sum over."""
    names = [name.partition("_") for name in path]
    part, rule = next(((p, r) for p, _, r in names if p in ("intra", "inter", "dense")), ("", ""))
    side = next((name for name in path if name in ("pre", "post")), "")
    last = path[-1]
    if last in ("hears", "order"):
        return "wiring", rule, part, side, None
    if side:
        if last == "map":
            return "state", rule, part, side, -2
        lead = 3 if rule in PER_NEURON else 2  # stages, the fan, and groups where states are theirs
        matrix = lead - leaf.ndim if last in ("pre", "post", "state") else None
        return "state", rule, part, side, matrix
    if last == "weight":
        return "matrix", rule, part, side, -2
    return "embedding" if last in ("embed", "unembed") else "scale", rule, part, side, None


@pytest.mark.parametrize("name", MODELS)
def test_each_parameter_says_what_it_is(name):
    params, info, _ = build(MODELS[name])
    assert params.keys() == info.keys()
    for path, leaf in params.items():
        one = info[path]
        assert (one.kind, one.rule, one.part, one.side, one.matrix) == documented(path, leaf), path
        assert len(one.axes) == leaf.ndim, path
        assert (one.kind == "wiring") == (not np.issubdtype(leaf.dtype, np.floating)), path
        assert one.weighs == (one.kind in ("state", "matrix")), path


def test_what_is_trained_and_what_is_wiring_part_and_come_together():
    params, _, model = build(MODELS["dynamic ports, shared"])
    tree = jax.eval_shape(model.init, jax.random.key(0))
    trained, fixed = partition(tree, model.param_info())
    assert {path[-1] for path in flatten_dict(fixed)} == {"hears"}
    assert flatten_dict(trained).keys() | flatten_dict(fixed).keys() == params.keys()
    assert combine(trained, fixed) == tree


class Loud(SignalRule):
    """Numbers that every neuron hears, each as loud as the receiving side says."""

    grouped = False
    amplitude = ("loudness",)
    spoken = heard = (None,)

    def init(self, key, groups, n_in, n_out, dim):
        pre, read = normal(key, (n_in, dim), 1), normal(jax.random.split(key)[0], (n_out, dim), 1)
        return pre, self.rescale(pre, {"state": read, "loudness": jnp.ones(dim)})

    def send(self, x, pre):
        return x @ pre

    def receive(self, signal, post):
        return (signal * post["loudness"]) @ post["state"].T

    def weights(self, pre, post):
        return (post["state"] * post["loudness"]) @ pre.T


class Drawn(Rule):
    """Weights that are the neurons' states themselves, under the same name as a rule before it."""

    grouped = False

    def init(self, key, groups, n_in, n_out, dim):
        return normal(key, (n_in, n_out), n_in), jnp.ones((n_out,))

    def weights(self, pre, post):
        return post[:, None] * pre.T


@pytest.mark.parametrize("kind", ["decoder", "recurrent"])
def test_a_rule_of_ones_own_is_read_like_any_other(kind, monkeypatch):
    fields = {"model.kind": kind, "model.rule": "mine", "model.core": 1}
    for rule, states in ((Loud(), {"state", "loudness"}), (Drawn(), {"post"})):
        monkeypatch.setitem(RULES, "mine", rule)
        params, info, _ = build(fields)
        assert params.keys() == info.keys()
        mine = {path: one for path, one in info.items() if one.rule == "mine"}
        assert {path[-1] for path, one in mine.items() if one.side == "post"} == states
        assert {one.kind for one in mine.values()} == {"state"}


def test_signals_of_a_rule_of_ones_own_are_watched_and_silenced(monkeypatch):
    monkeypatch.setitem(RULES, "mine", Loud())
    fields = {**TINY, "model.rule": "mine", "model.core": 0, "model.coda": 1}
    config = base()
    config.update_from_flattened_dict(fields)
    model = make_model(config, 20)
    params = drawn(model)
    batch = Batch(np.random.default_rng(0).integers(0, 20, (2, 16)).astype(np.int32))
    still = silenced_channels(model, params, groups=[1], channels=[])
    apply = jax.jit(lambda params: model.apply(params, batch)[0])
    signals = jax.jit(lambda params: model.reshaped(form="signals").apply(params, batch)[0])
    for weighed in (params, still):
        np.testing.assert_allclose(signals(weighed), apply(weighed), rtol=1e-4, atol=1e-5)
    assert not np.allclose(apply(params), apply(still), atol=1e-3)
    loud = jax.jit(lambda params: traffic(model, params, batch)["coda 1"])
    assert np.all(loud(params) > 0)
    np.testing.assert_array_equal(loud(still)[:, 1], 0)
    states = jax.tree.map(lambda p: p[0, 0], params["coda"]["down"]["inter_mine"])
    bound = gain_bound([("mine", states["pre"], states["post"])])
    norm = np.linalg.norm(Loud().weights(**states), 2)
    assert norm <= bound <= 1.1 * norm
