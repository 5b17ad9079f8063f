"""Layers: NGC's dense layer, attention and MLP, for any Flax model, and a decoder's stage.

For: one Flax module for each thing that owns parameters. Not for: loops over stages and rounds
(`decoder.py`), or mathematics (`core/`). Axes: B batch, T tokens, D width, G groups, H heads.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ngc_jax.core import attention
from ngc_jax.core.params import ParamInfo
from ngc_jax.core.rules import GATES, activate, rules_between_groups, rules_with_delays, signal_rule
from ngc_jax.core.rules.base import per_group
from ngc_jax.core.wiring import DYNAMIC, WIRINGS, channel_counts
from ngc_jax.nn.mesh import constrain
from ngc_jax.nn.model import Maybe, Pair
from ngc_jax.nn.params import declare, declare_scale
from ngc_jax.nn.ranks import Joined
from ngc_jax.nn.shape import ModelShape
from ngc_jax.nn.stacks import KEY
from ngc_jax.nn.synapse import Synapse, members_of
from ngc_jax.runtime.fields import refusals

Array = jax.Array
Source = tuple[Array, tuple[str, ...]]
QKV = ("query", "key", "value")
KEPT = ("signal", "synapse", "share", "mixed")  # for a stage's gradient; all else is made again


def rms_normalize(x: Array, least: float = 1e-6) -> Array:
    """x / sqrt(mean square of x + least) over the last axis, in float32 whatever x is."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + least)


class RMSNorm(nn.Module):
    """x / rms(x), times a learned scale per channel (arXiv 1910.07467) that starts at `gain`."""

    gain: float = 1.0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = declare_scale(self, "scale", nn.initializers.constant(self.gain), x.shape[-1])
        return (rms_normalize(x, self.epsilon) * scale).astype(x.dtype)


class Gates(nn.Module):
    """How loudly each group speaks, read from the token's stream: read [..., D], said [..., G n].

    Returns `said`, each group's times G a_g, a = softmax(read W) in float32, at start equal: our
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

    Raises ValueError, with values that work, where fields do not go together or are unknown.
    """

    groups: int = 8  # of neighbouring neurons; divides the numbers of neurons on both sides
    rule: str = "addressed"  # between groups, of `RULES`; "none": no weights; "dense": a matrix
    ports: int = 2  # numbers of a port (rule "addressed") or of a state (all others)
    intra: int | None = None  # of a state inside its group; 0: no such part; None: a dense block
    message_activation: str | None = None  # of signals between groups, of `GATES`; None: linear
    # Of rule "addressed", which groups a group hears: "others", "complete" (itself as well), or a
    # name of `WIRINGS`, with so many channels, drawn from the seed.
    wiring: str | None = None
    channels: int = 4
    wiring_seed: int = 0
    init_rank: int = 0  # of weights at the start, a multiple of groups; 0: as drawn
    delays: str = ""  # in tokens, of ports 0, 1, ... between groups: "0,1" (`core/delays.py`)
    form: str = "weights"  # makes each W; "signals", faster where ports are few, does not
    gain: float = 1.0  # standard deviation of the result at the start, for unit-variance inputs
    rewired: bool = False  # whether `ngc_jax.train` trains: else the wiring may not change
    joined: tuple[Joined, ...] = ()  # a rank for each member of its synapses, in place of `ports`

    def read(
        self,
        sizes: dict[str, int],
        senders: tuple[int, ...],
        segments: Maybe,
        *sources: Source,
        **more: Any,
    ) -> list[Array]:
        """What members of these sizes hear, [..., size] each; a source is x and who reads it.

        Members of one size are the fan of one synapse, unless `joined` says otherwise.
        """
        n_in, heard = sources[0][0].shape[-1], dict[str, Array]()
        for one in (one for one in self.joined if one.members[0] in sizes):
            own = [sizes[name] for name in one.members]
            ask = self.synapse(n_in, sum(own), one, name=one.name, **more)
            y = ask(sources[0][0], None, segments)
            parts = jnp.split(y[..., 0, :], np.cumsum(own)[:-1], axis=-1)
            heard |= dict(zip(one.members, parts, strict=True))
        for _, alike in itertools.groupby(() if heard else sizes, sizes.__getitem__):
            fan = tuple(alike)
            whose = senders if fan == tuple(sizes) else tuple(range(len(fan)))
            how = dict(more, senders=whose, name=Joined(fan, 0).name)
            ask = self.synapse(n_in, sizes[fan[0]], **how)
            for x, names in sources:
                chosen = tuple(i for i, name in enumerate(fan) if name in names)
                if chosen:
                    some = None if len(chosen) == len(fan) else chosen
                    y = ask(x, some, segments)
                    heard |= dict(zip((fan[i] for i in chosen), members_of(y), strict=True))
        return [heard[name] for name in sizes]

    def synapse(self, n_in: int, n_out: int, own: Joined | None = None, **more: Any) -> Synapse:
        """Synapses from n_in to n_out neurons."""
        partners = self.rule == "addressed" and self.groups > 1
        wiring = self.wiring or ("others" if partners else "complete")
        self._check(wiring, n_in, n_out)
        intra = max(n_in, n_out) if self.intra is None else self.intra
        given = {"p_intra": intra, "p_inter": self.ports, "wiring": wiring}
        joined = ModelShape(**shared_fields(ModelShape, self) | given)
        return Synapse(joined.parts(n_in, n_out, own), n_in, n_out, self.form, **more)

    def one_of(self, field: str, names: Sequence[Any], more: str = "") -> None:
        """Raises ValueError, with all names, where a field is none of them."""
        wants = f"one of {', '.join(map(str, names))}{more}"
        refusals(vars(self))(getattr(self, field) in names, field, wants)

    def _check(self, wiring: str, n_in: int, n_out: int) -> None:
        self.one_of("rule", rules_between_groups())
        self.one_of("form", ["weights", "signals"])
        if self.delays:
            self.one_of("rule", rules_with_delays(), f" with delays={self.delays!r}")
        if self.rule == "dense":
            return
        per_group(self.groups, n_in, n_out)
        need = refusals(vars(self))
        need(self.ports >= 1, "ports", "1 or more")
        least = 1 if self.rule == "none" else 0  # where groups do not talk
        fits = self.intra is None or self.intra >= least
        need(fits, "intra", f"{least} or more, or None, with rule={self.rule!r}")
        need(self.init_rank % self.groups == 0, "init_rank", f"a multiple of {self.groups}")
        self.one_of("message_activation", [*GATES, None])
        if self.message_activation is not None and self.rule != "none":
            signal_rule(self.rule)
        if wiring != "complete":
            dynamic = DYNAMIC if self.rewired else ()
            self.one_of("wiring", ["complete", *WIRINGS, *dynamic, None])
            need(self.rule == "addressed", "wiring", "None where the rule is another")
            need(self.groups > 1, "wiring", "None where there is one group")
        if wiring not in ("complete", "others"):
            able = channel_counts(wiring, self.groups)
            self.one_of("channels", able, f" with groups={self.groups}")


class NGCDense(NGCLayer):
    """A dense layer whose weights are made of neurons' states: x [..., n_in] -> [..., features].

    In place of `nn.Dense(features)`, with fewer parameters: n_in features / G in blocks inside
    groups, ports (G - 1) (n_in + features) between them, `features` in the bias. See `NGCLayer`.

        layer = NGCDense(256, groups=8, rule="addressed", ports=2)
        params = layer.init(key, x)  # x [..., 128]
        y = layer.apply(params, x)  # [..., 256]
    """

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array, segments: Maybe = None) -> Array:
        synapse = self.synapse(x.shape[-1], self.features, gain=self.gain)
        nn.share_scope(self, synapse)
        y = synapse(x, None, segments)[..., 0, :]
        if self.use_bias:
            y = y + declare_scale(self, "bias", nn.initializers.zeros, self.features)
        return y


class NGCAttention(NGCLayer):
    """Attention across tokens whose projections are synapses: x [B, T, D] -> [B, T, D].

    As `NGCLayer`. The collection "intermediates" holds "attention", the weights [B, H, T, S], if
    asked for: layer.apply(params, x, segments), segments [B, T] or None.
    """

    heads: int = 4  # a divisor or multiple of groups; D / heads is even: positions are rotary
    causal: bool = True  # a token sees none after it
    context: int | None = None  # tokens that it looks back on, itself included; None: all
    qk_norm: bool = True  # in each head (arXiv 2302.05442, section 2)
    qk_gain: float = 1.0  # the learned scale of normalised queries at the start
    kv_heads: int = 0  # of keys and values, each for several queries (arXiv 2305.13245); 0: heads
    head_width: int = 0  # channels of a head, even; 0: D / heads
    qkv_bias: bool = False  # whether queries, keys and values have biases
    rope_base: float = 10_000.0  # of rotary positions
    rope_scaling: str = ""  # "linear:F", or "llama3:FACTOR,LOW,HIGH,TOKENS" (`attention.rotate`)
    norm_epsilon: float = 1e-6  # of the norms in each head
    gates: bool = False  # a token sets how loudly each group speaks to the last synapse
    senders: tuple[int, ...] = (0, 1, 2)  # whose send states query, key and value have

    def __call__(self, x: Array, segments: Array | None = None) -> Array:
        """segments [B, T], if given, number the documents; a token sees its own."""
        if x.ndim != 3:
            raise ValueError(f"x: shape {[*x.shape]}; must be [batch, tokens, width]")
        return self.attend(x, jnp.arange(x.shape[1]), segments)[0]

    @nn.compact
    def attend(
        self, x: Array, positions: Array, segments: Maybe, cache: Any = None, route: Maybe = None
    ) -> Pair:
        """The layer with a cache, written from positions[0] on; it asks of `route` if not of x."""
        head, heads = self._head(x.shape[-1]), (self.heads, self.kv_heads or self.heads)
        sizes = {"query": heads[0] * head, "key": heads[1] * head, "value": heads[1] * head}
        sources = [(x, QKV)] if route is None else [(route, QKV[:2]), (x, QKV[2:])]
        made = self.read(sizes, self.senders, segments, *sources)
        if self.qkv_bias:
            zero = nn.initializers.zeros
            biased = zip(sizes, made, strict=True)
            made = [y + declare_scale(self, f"{n}_bias", zero, y.shape[-1]) for n, y in biased]
        axes = ("window", None, "group", None)
        query, key, value = (constrain(y.reshape(*y.shape[:2], -1, head), *axes) for y in made)
        if self.qk_norm:  # bounded logits bear the high learning rates that states want
            query = RMSNorm(self.qk_gain, self.norm_epsilon, name="query_norm")(query)
            key = RMSNorm(epsilon=self.norm_epsilon, name="key_norm")(key)
        turn = partial(attention.rotate, base=self.rope_base, scaling=self.rope_scaling)
        query, key = turn(query, positions), turn(key, positions)
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
        out = {"attention out": x.shape[-1]}
        how: Any = {"gain": self.gain, "split": "in"}
        return self.read(out, (0,), segments, (mixed, tuple(out)), **how)[0], cache

    def _head(self, width: int) -> int:
        """The channels of a head; ValueError where they do not go with the groups."""
        free, need = self.rule == "dense" or self.groups == 1, refusals(vars(self))
        most, groups = self.heads if self.head_width else width // 2, 1 if free else self.groups
        able = [n for n in range(1, most + 1) if groups % n == 0 or n % groups == 0]
        if not self.head_width:
            able = [n for n in able if width % (2 * n) == 0]
        need(self.head_width % 2 == 0, "head_width", "even, for instance 64")
        self.one_of("heads", able, f" for width {width} and groups={self.groups}")
        if self.kv_heads:
            able = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            self.one_of("kv_heads", [0, *able], f" with heads={self.heads}")
        return self.head_width or width // self.heads


class NGCMLP(NGCLayer):
    """A gated MLP of synapses, down(phi(gate x) * up x): x [..., D] -> [..., D]; as `NGCLayer`."""

    hidden: int  # neurons between the matrices, a multiple of groups
    activation: str | None = "silu"  # phi(z) = z g(z), g of `GATES`; None: a plain product
    gates: bool = False  # a token sets how loudly each group speaks to `down`
    senders: tuple[int, ...] = (0, 1)  # whose send states gate and up have

    @nn.compact
    def __call__(self, x: Array, segments: Maybe = None) -> Array:
        self.one_of("activation", [*GATES, None])
        sizes = {"gate": self.hidden, "up": self.hidden}
        gate, value = self.read(sizes, self.senders, segments, (x, tuple(sizes)))
        if x.ndim == 3:
            gate, value = (constrain(y, "window", None, "group") for y in (gate, value))
        said = activate(gate, self.activation) * value
        if self.gates:
            said = Gates(self.groups, name="exchange_gates")(x, said)
        down: Any = {"gain": self.gain, "split": "in"}
        return self.read({"down": x.shape[-1]}, (0,), segments, (said, ("down",)), **down)[0]


class Stage(nn.Module):
    """Attention, then an MLP, pre-norm, each added to x [B, T, D]: (x, cache), as in `attend`."""

    shape: ModelShape
    number: int = 0  # among those of `shape.apart`, which differ in shape

    @nn.compact
    def __call__(
        self, x: Array, at: Array, segments: Maybe = None, cache: Any = None, route: Maybe = None
    ) -> Pair:
        s = self.shape
        still = not self.has_rng(KEY)
        some = nn.Dropout(s.dropout, deterministic=still)
        # of an example all that a branch adds (stochastic depth, arXiv 1603.09382)
        whole = nn.Dropout(s.stochastic_depth, broadcast_dims=(1, 2), deterministic=still)
        joined: dict[str, Any] = {"ports": s.p_inter, "intra": s.p_intra, "rewired": True}
        joined["gain"] = (2 * s.depth) ** -0.5  # the 2 depth branches together add unit variance
        joined["joined"] = s.apart[self.number] if s.apart else ()
        own = shared_fields(NGCAttention, s) | joined
        attention_layer = NGCAttention(senders=s.shared.of("query_key_value"), **own)
        nn.share_scope(self, attention_layer)  # its parameters are the stage's own
        norm = RMSNorm(epsilon=s.norm_epsilon, name="attention_norm")
        asked = None if route is None else norm(route)
        heard, cache = attention_layer.attend(norm(x), at, segments, cache, asked)
        x = constrain(x + whole(some(heard)), *s.stream_axes)
        own = shared_fields(NGCMLP, s) | joined
        mlp = NGCMLP(activation=s.exchange_activation, senders=s.shared.of("gate_up"), **own)
        nn.share_scope(self, mlp)
        heard = mlp(RMSNorm(epsilon=s.norm_epsilon, name="exchange_norm")(x), segments)
        return constrain(x + whole(some(heard)), *s.stream_axes), cache


def shared_fields(of: type, source: Any) -> dict[str, Any]:
    """The fields of a dataclass that `source` has too, with the values there."""
    names = [field.name for field in dataclasses.fields(of)]
    return {name: getattr(source, name) for name in names if hasattr(source, name)}
