"""Layers: NGC's dense layer, attention and MLP, for any Flax model, and a decoder's stage.

For: one Flax module for each thing that owns parameters. Not for: loops over stages and rounds
(`decoder.py`), cells (`recurrent.py`), nor mathematics (`core/`).

Axes: B batch, T tokens, D width, G groups, H heads.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ngc_jax.core import attention
from ngc_jax.core.params import ParamInfo
from ngc_jax.core.rules import GATES, activate, rules_between_groups, signal_rule
from ngc_jax.core.rules.base import per_group
from ngc_jax.core.wiring import DYNAMIC, WIRINGS, channel_counts
from ngc_jax.nn.mesh import constrain
from ngc_jax.nn.model import Maybe, Pair
from ngc_jax.nn.params import declare, declare_scale
from ngc_jax.nn.shape import ModelShape
from ngc_jax.nn.synapse import Synapse, members_of

Array = jax.Array
KEPT = ("signal", "synapse", "share", "mixed")  # for a stage's gradient; all else is made again


def rms_normalize(x: Array, least: float = 1e-6) -> Array:
    """x / sqrt(mean square of x + least) over the last axis, in float32 whatever x is."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + least)


class RMSNorm(nn.Module):
    """x / rms(x), times a learned scale per channel (arXiv 1910.07467) that starts at `gain`."""

    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = declare_scale(self, "scale", nn.initializers.constant(self.gain), x.shape[-1])
        return (rms_normalize(x) * scale).astype(x.dtype)


class Gates(nn.Module):
    """How loudly each group speaks, read from the token's stream: read [..., D], said [..., G n].

    Returns `said`, each group's times G a_g, a = softmax(read W) in float32, at start equal. What
    reads it linearly sums what each group says by itself with coefficients that sum to one: our
    reading of structured neuron encapsulation (arXiv 2502.07124; its abstract has no formulas).
    """

    groups: int

    @nn.compact
    def __call__(self, read: Array, said: Array) -> Array:
        info, shape = ParamInfo("matrix", (None, None), matrix=-2), (read.shape[-1], self.groups)
        weight = declare(self, "weight", lambda: info, nn.initializers.zeros, shape)
        share = jax.nn.softmax((read @ weight).astype(jnp.float32), axis=-1)
        share = self.groups * share.astype(said.dtype)
        return (share[..., None] * said.reshape(*share.shape, -1)).reshape(said.shape)


class NGCLayer(nn.Module, kw_only=True):
    """What the NGC layers have in common: how the neurons on their two sides are joined.

    A weight between two neurons of one group is stored (or, by `intra`, made of states); one
    between two groups is made of their neurons' states by a rule.

    groups: groups of neighbouring neurons; must divide the numbers of neurons on both sides.
    rule: between groups, a name of `RULES`; "none": no weights; "dense": an ordinary matrix.
    ports: numbers of a port (rule "addressed") or of a state (all others).
    intra: numbers of a state within its group; 0: no such part; None: a dense block.
    message_activation: of the signal between groups, a name of `GATES`; None: linear.
    wiring: of rule "addressed", which groups a group hears: "others", "complete" (itself as well),
        or a name of `WIRINGS` with `channels` groups, drawn from `wiring_seed`.
    init_rank: rank of the weights at the start, a multiple of groups; 0: as drawn.
    form: "weights" makes each W, then multiplies; "signals", faster where ports are few, does not.
    gain: standard deviation of the result, for unit-variance inputs of its synapse, at the start.
    rewired: whether `ngc_jax.train` is the trainer, the only one for a wiring that changes.

    Raises ValueError, with values that work, where fields do not go together or are unknown.
    """

    groups: int = 8
    rule: str = "addressed"
    ports: int = 2
    intra: int | None = None
    message_activation: str | None = None
    wiring: str | None = None
    channels: int = 4
    wiring_seed: int = 0
    init_rank: int = 0
    form: str = "weights"
    gain: float = 1.0
    rewired: bool = False

    def synapse(self, n_in: int, n_out: int, **more: Any) -> Synapse:
        """Synapses from n_in to n_out neurons."""
        alone = self.rule != "addressed" or self.groups == 1
        wiring = self.wiring or ("complete" if alone else "others")
        self._check(wiring, n_in, n_out)
        intra = max(n_in, n_out) if self.intra is None else self.intra
        given = {"p_intra": intra, "p_inter": self.ports, "wiring": wiring}
        joined = ModelShape(**shared_fields(ModelShape, self) | given)
        return Synapse(joined.parts(n_in, n_out), n_in, n_out, self.form, **more)

    def need(self, field: str, fits: bool, wants: str) -> None:
        """Raises ValueError where a field does not fit."""
        if not fits:
            raise ValueError(f"{field}={getattr(self, field)!r}: must be {wants}")

    def one_of(self, field: str, names: Iterable[Any], more: str = "") -> None:
        """Raises ValueError, with all names, where a field is none of them."""
        known = {name: str(name) for name in names}
        self.need(field, getattr(self, field) in known, f"one of {', '.join(known.values())}{more}")

    def _check(self, wiring: str, n_in: int, n_out: int) -> None:
        self.one_of("rule", rules_between_groups())
        self.one_of("form", ["weights", "signals"])
        if self.rule == "dense":
            return
        per_group(self.groups, n_in, n_out)
        self.need("ports", self.ports >= 1, "1 or more")
        least = 1 if self.rule == "none" else 0  # where groups do not talk
        fits = self.intra is None or self.intra >= least
        self.need("intra", fits, f"{least} or more, or None, with rule={self.rule!r}")
        self.need("init_rank", self.init_rank % self.groups == 0, f"a multiple of {self.groups}")
        if self.message_activation is not None:
            self.one_of("message_activation", GATES)
            if self.rule != "none":
                signal_rule(self.rule)
        if wiring != "complete":
            if self.wiring is not None:
                self.one_of("wiring", ["complete", *WIRINGS, *(DYNAMIC if self.rewired else ())])
            self.need("wiring", self.rule == "addressed", "None where the rule is another")
            self.need("wiring", self.groups > 1, "None where there is one group")
        if wiring not in ("complete", "others"):
            able = channel_counts(wiring, self.groups)
            self.one_of("channels", able, f" with groups={self.groups}")


class NGCDense(NGCLayer):
    """A dense layer whose weights are made of neurons' states: x [..., n_in] -> [..., features].

    In place of `nn.Dense(features)`, with fewer parameters: n_in features / G in blocks inside
    groups, ports (G - 1) (n_in + features) between them, and `features` in the bias. `NGCLayer` has
    the other fields and the errors.

        layer = NGCDense(256, groups=8, rule="addressed", ports=2)
        params = layer.init(key, x)  # x [..., 128]
        y = layer.apply(params, x)  # [..., 256]
    """

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        synapse = self.synapse(x.shape[-1], self.features, gain=self.gain)
        nn.share_scope(self, synapse)
        y = synapse(x)[..., 0, :]
        if self.use_bias:
            y = y + declare_scale(self, "bias", nn.initializers.zeros, self.features)
        return y


class NGCAttention(NGCLayer):
    """Attention across tokens whose projections are synapses: x [B, T, D] -> [B, T, D].

    heads: a divisor of groups; D / heads must be even, since positions are rotary.
    causal: a token sees none after it.
    context: tokens that it looks back on, itself included; None: all.
    qk_norm: queries and keys are normalised in each head (arXiv 2302.05442, section 2).
    qk_gain: the learned scale of normalised queries at the start.
    gates: a token sets how loudly each group speaks to the last synapse.
    senders: for query, key and value, whose send states each has; (0, 0, 0): all the same.

    The collection "intermediates" holds "attention", the weights [B, H, T, S], if asked for.
    `NGCLayer` has the other fields and the errors.

        layer = NGCAttention(heads=4, groups=8)
        params = layer.init(key, x)  # x [B, T, 128]
        y = layer.apply(params, x, segments)  # [B, T, 128]; segments [B, T] or None
    """

    heads: int = 4
    causal: bool = True
    context: int | None = None
    qk_norm: bool = True
    qk_gain: float = 1.0
    gates: bool = False
    senders: tuple[int, ...] = (0, 1, 2)

    def __call__(self, x: Array, segments: Array | None = None) -> Array:
        """segments [B, T], if given, number the documents; a token sees its own."""
        if x.ndim != 3:
            raise ValueError(f"x: shape {[*x.shape]}; must be [batch, tokens, width]")
        return self.attend(x, jnp.arange(x.shape[1]), segments)[0]

    @nn.compact
    def attend(
        self, x: Array, positions: Array, segments: Maybe, cache: Any = None, route: Maybe = None
    ) -> Pair:
        """The layer with a cache, into which keys and values are written from positions[0] on.

        With `route` [B, T, D], queries and keys are read from it in the place of x.
        """
        width = x.shape[-1]
        even = [n for n in range(1, width // 2 + 1) if width % (2 * n) == 0]
        able = [n for n in even if self.rule == "dense" or self.groups % n == 0]
        self.one_of("heads", able, f" for width {width} and groups={self.groups}")
        heads = (*x.shape[:2], self.heads, width // self.heads)
        ask = self.synapse(width, width, senders=self.senders, name="query_key_value")
        if route is None:
            made = members_of(ask(x))
        else:
            made = [*members_of(ask(route, (0, 1))), *members_of(ask(x, (2,)))]
        axes = ("window", None, "group", None)
        query, key, value = (constrain(one.reshape(heads), *axes) for one in made)
        if self.qk_norm:  # bounded logits bear the high learning rates that states want
            query = RMSNorm(self.qk_gain, name="query_norm")(query)
            key = RMSNorm(name="key_norm")(key)
        query, key = attention.rotate(query, positions), attention.rotate(key, positions)
        keys = positions
        if cache is not None:
            cache = attention.update_cache(cache, key, value, positions[0])
            key, value = cache["key"].astype(x.dtype), cache["value"].astype(x.dtype)
            keys = jnp.arange(key.shape[1])
        context = self.context or len(keys)
        all_there = cache is None and segments is None and x.shape[1] <= context
        watched = self.is_mutable_collection("intermediates")
        if all_there and not watched and attention.fused(query):
            mixed = attention.attend_fused(query, key, value, self.causal)
        else:
            mask = attention.attention_mask(positions, keys, context, segments, self.causal)
            share = attention.attention_weights(query, key, mask)
            self.sow("intermediates", "attention", share)
            mixed = checkpoint_name(attention.mix(checkpoint_name(share, "share"), value), "mixed")
        mixed = constrain(mixed, "window", None, "group")
        if self.gates:
            mixed = Gates(self.groups, name="attention_gates")(x, mixed)
        out = self.synapse(width, width, gain=self.gain, split="in", name="attention_out")
        return out(mixed)[..., 0, :], cache


class NGCMLP(NGCLayer):
    """A gated MLP whose matrices are synapses: x [..., D] -> [..., D], down(phi(gate x) * up x).

    hidden: neurons of the hidden layer, a multiple of groups.
    activation: phi(z) = z g(z) with g a name of `GATES`; None: a plain product.
    gates: a token sets how loudly each group speaks to `down`.
    senders: of gate and up, whose send states each has; (0, 0): the same.

    `NGCLayer` has the other fields and the errors.

        layer = NGCMLP(384, groups=8)
        params = layer.init(key, x)  # x [..., 128]
        y = layer.apply(params, x)  # [..., 128]
    """

    hidden: int
    activation: str | None = "silu"
    gates: bool = False
    senders: tuple[int, ...] = (0, 1)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.activation is not None:
            self.one_of("activation", GATES)
        up = self.synapse(x.shape[-1], self.hidden, senders=self.senders, name="gate_up")
        down = self.synapse(self.hidden, x.shape[-1], gain=self.gain, split="in", name="down")
        heard = up(x)
        if heard.ndim == 4:
            heard = constrain(heard, "window", None, None, "group")
        gate, value = members_of(heard)
        said = activate(gate, self.activation) * value
        if self.gates:
            said = Gates(self.groups, name="exchange_gates")(x, said)
        return down(said)[..., 0, :]


class Stage(nn.Module):
    """Attention across tokens, then an MLP across groups, each added to the stream: [B, T, D].

    Pre-norm. Returns (x, cache); see `NGCAttention.attend` for segments, cache and route.
    """

    shape: ModelShape

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array,
        segments: Maybe = None,
        cache: Any = None,
        route: Maybe = None,
    ) -> Pair:
        s = self.shape
        joined = {"ports": s.p_inter, "intra": s.p_intra, "rewired": True}
        joined["gain"] = (2 * s.depth) ** -0.5  # the 2 depth branches together add unit variance
        own = shared_fields(NGCAttention, s) | joined
        attention_layer = NGCAttention(senders=s.shared.of("query_key_value"), **own)
        nn.share_scope(self, attention_layer)  # its parameters are the stage's own
        norm = RMSNorm(name="attention_norm")
        asked = None if route is None else norm(route)
        heard, cache = attention_layer.attend(norm(x), positions, segments, cache, asked)
        x = constrain(x + heard, *s.stream_axes)
        own = shared_fields(NGCMLP, s) | joined
        mlp = NGCMLP(activation=s.exchange_activation, senders=s.shared.of("gate_up"), **own)
        nn.share_scope(self, mlp)
        heard = mlp(RMSNorm(name="exchange_norm")(x))
        return constrain(x + heard, *s.stream_axes), cache


def shared_fields(of: type, source: Any) -> dict[str, Any]:
    """The fields of a dataclass that `source` has too, with the values there."""
    names = [field.name for field in dataclasses.fields(of)]
    return {name: getattr(source, name) for name in names if hasattr(source, name)}
