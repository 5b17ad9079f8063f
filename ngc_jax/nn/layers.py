"""Layers that hold parameters: NGC's dense layer, attention and MLP, for any Flax model, and the
stages that our own models are made of.

For: holding parameters, one Flax module for each thing that owns some. Not for: loops over stages
and rounds (`decoder.py`), cells (`recurrent.py`), nor mathematics (`core/`).

Axes: B batch, T tokens, D width, F hidden, G groups, H heads.
"""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ngc_jax.core import attention
from ngc_jax.core.gating import encapsulate
from ngc_jax.core.params import ParamInfo
from ngc_jax.core.rules import GATES, RULES, signal_rule
from ngc_jax.core.rules.base import per_group
from ngc_jax.core.wiring import DYNAMIC, WIRINGS
from ngc_jax.nn.mesh import constrain, num_shards
from ngc_jax.nn.params import declare, declare_scale
from ngc_jax.nn.shape import Connectivity, ModelShape
from ngc_jax.nn.synapse import Synapse, members_of

Array = jax.Array

# What a stage's gradient keeps; all else is quickly made again.
KEPT = ("signal", "synapse", "share", "mixed")


def rms_normalize(x: Array) -> Array:
    """x / rms(x) over the last axis, in float32 whatever x is."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)


class RMSNorm(nn.Module):
    """x / rms(x), times a learned scale per channel (arXiv 1910.07467) that starts at `gain`."""

    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        start = nn.initializers.constant(self.gain)
        scale = declare_scale(self, "scale", start, (x.shape[-1],))
        return (rms_normalize(x) * scale).astype(x.dtype)


class Gates(nn.Module):
    """How loudly each group speaks, read from the token's stream: read [..., D], said [..., G n].

    Returns `said`, each group's times its gate. Causal, since a token's gates are read from its own
    stream. They start equal, which changes nothing.
    """

    groups: int

    @nn.compact
    def __call__(self, read: Array, said: Array) -> Array:
        info, shape = ParamInfo("matrix", (None, None), matrix=-2), (read.shape[-1], self.groups)
        weight = declare(self, "weight", lambda: info, nn.initializers.zeros, shape)
        return encapsulate(said, read @ weight)


class NGCLayer(nn.Module, kw_only=True):
    """What the NGC layers have in common: how the neurons on their two sides are joined.

    Neurons lie in groups of neighbours. A weight between two neurons of one group is stored (or, by
    `intra`, made of states); one between two groups is made of their neurons' states by a rule.

    groups: groups of neurons; must divide the numbers of neurons on both sides.
    rule: between groups, a name of `RULES`; "none": groups do not talk; "dense": no groups, an
        ordinary matrix.
    ports: numbers of a port (rule "addressed") or of a state (all others).
    intra: numbers of a state within its group; 0: no such part; None: a dense block.
    message_activation: of the signal between groups, a name of `GATES`; None: linear.
    wiring: of rule "addressed", which groups a group hears: "others", "complete" (itself as well),
        or a name of `WIRINGS` with `channels` groups, drawn from `wiring_seed`.
    init_rank: rank of the weights at the start, a multiple of groups; 0: as drawn.
    form: "weights" makes each W, then multiplies; "signals" never forms it. Results are equal to
        rounding; signals are faster where layers are wide and ports few.

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

    def synapse(self, n_in: int, n_out: int, **more: Any) -> Synapse:
        """Synapses from n_in to n_out neurons."""
        wiring = self._wiring()
        self._check(wiring, n_in, n_out)
        joined = Connectivity(
            rule=self.rule,
            groups=self.groups,
            p_intra=max(n_in, n_out) if self.intra is None else self.intra,
            p_inter=self.ports,
            message_activation=self.message_activation,
            wiring=wiring,
            channels=self.channels,
            wiring_seed=self.wiring_seed,
            init_rank=self.init_rank,
        )
        return Synapse(joined.parts(n_in, n_out), n_in, n_out, self.form, **more)

    def _wiring(self) -> str:
        if self.wiring is not None:
            return self.wiring
        return "others" if self.rule == "addressed" and self.groups > 1 else "complete"

    def _check(self, wiring: str, n_in: int, n_out: int) -> None:
        rules = [name for name, rule in RULES.items() if not rule.inside]
        one_of(self, "rule", [*rules, "none", "dense"])
        one_of(self, "form", ["weights", "signals"])
        if self.rule == "dense":
            return
        per_group(self.groups, n_in, n_out)
        need(self, "ports", self.ports >= 1, "1 or more")
        need(self, "intra", self.intra is None or self.intra >= 0, "0 or more, or None")
        silent = self.rule == "none" and self.intra == 0
        need(self, "intra", not silent, "1 or more, or None, where groups do not talk")
        need(self, "init_rank", self.init_rank % self.groups == 0, f"a multiple of {self.groups}")
        if self.message_activation is not None:
            one_of(self, "message_activation", GATES)
            if self.rule != "none":
                signal_rule(self.rule)
        if wiring != "complete":
            if wiring not in DYNAMIC:  # they change in training, by `training/rewiring.py`
                one_of(self, "wiring", ["complete", *WIRINGS], wiring)
            need(self, "wiring", self.rule == "addressed", "None where the rule is another")
            need(self, "wiring", self.groups > 1, "None where there is one group")
        if wiring not in ("complete", "others"):
            islands = [k for k in range(1, self.groups) if self.groups % (k + 1) == 0]
            able = islands if wiring == "block" else range(1, self.groups)
            wants = f"one of {', '.join(map(str, able))} with groups={self.groups}"
            need(self, "channels", self.channels in able, wants)


def need(module: nn.Module, field: str, fits: bool, wants: str) -> None:
    """Raises ValueError where a field of a layer does not fit."""
    if not fits:
        raise ValueError(f"{field}={getattr(module, field)!r}: must be {wants}")


def one_of(module: nn.Module, field: str, names: Iterable[str], value: Any = None) -> None:
    """Raises ValueError, with all names, where a field of a layer is none of them."""
    known = [*names]
    need(module, field, (value or getattr(module, field)) in known, f"one of {', '.join(known)}")


class NGCDense(NGCLayer):
    """A dense layer whose weights are made of neurons' states: x [..., n_in] -> [..., features].

    In place of `nn.Dense(features)`, with fewer parameters: n_in features / G in blocks inside
    groups, ports (G - 1) (n_in + features) between them, and `features` in the bias. At the start
    unit-variance x gives y of variance gain^2. `NGCLayer` has the other fields and the errors.

        layer = NGCDense(256, groups=8, rule="addressed", ports=2)
        params = layer.init(key, x)  # x [..., 128]
        y = layer.apply(params, x)  # [..., 256]
    """

    features: int
    use_bias: bool = True
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        synapse = self.synapse(x.shape[-1], self.features, gain=self.gain)
        nn.share_scope(self, synapse)
        y = synapse(x)[..., 0, :]
        if self.use_bias:
            y = y + declare_scale(self, "bias", nn.initializers.zeros, (self.features,))
        return y


class NGCAttention(NGCLayer):
    """Attention across tokens whose projections are synapses: x [B, T, D] -> [B, T, D].

    heads: a divisor of groups, for a head is one group or several; D / heads must be even, since
        positions are rotary.
    causal: a token sees none after it.
    context: tokens that it looks back on, itself included; None: all.
    qk_norm: queries and keys are normalised in each head (arXiv 2302.05442, section 2); the learned
        scale of queries starts at qk_gain.
    gates: a token sets how loudly each group speaks to the last synapse.
    gain: standard deviation of the result for unit-variance values, at the start.
    senders: for query, key and value, whose send states each has; (0, 0, 0): all the same.

    The collection "intermediates", where it is asked for, holds "attention", the weights [B, H, T,
    S]. `NGCLayer` has the other fields and the errors.

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
    gain: float = 1.0
    senders: tuple[int, ...] = (0, 1, 2)

    def __call__(self, x: Array, segments: Array | None = None) -> Array:
        """segments [B, T], if given, number the documents; a token sees its own."""
        if x.ndim != 3:
            raise ValueError(f"x: shape {[*x.shape]}; must be [batch, tokens, width]")
        return self.attend(x, jnp.arange(x.shape[1]), segments)[0]

    @nn.compact
    def attend(
        self,
        x: Array,
        positions: Array,
        segments: Array | None = None,
        cache: attention.Cache | None = None,
        route: Array | None = None,
    ) -> tuple[Array, attention.Cache | None]:
        """The layer with a cache: keys and values are written into it from positions[0] on.

        With `route` [B, T, D], queries and keys are read from it in the place of x: who looks at
        whom is then a matter of the route, and what is passed on one of x.
        """
        width, context = x.shape[-1], self.context or x.shape[1]
        even = [n for n in range(1, width // 2 + 1) if width % (2 * n) == 0]
        able = [n for n in even if self.rule == "dense" or self.groups % n == 0]
        wants = f"one of {', '.join(map(str, able))} for width {width} and groups={self.groups}"
        need(self, "heads", self.heads in able, wants)
        if self.context is None and cache is not None:
            context = cache["key"].shape[1]
        heads = (*x.shape[:2], self.heads, width // self.heads)
        ask = self.synapse(width, width, senders=self.senders, name="query_key_value")
        if route is None:
            made = members_of(ask(x))
        else:
            made = [*members_of(ask(route, (0, 1))), *members_of(ask(x, (2,)))]
        query, key, value = (
            constrain(one.reshape(heads), "window", None, "group", None) for one in made
        )
        if self.qk_norm:  # bounded logits bear the high learning rates that states want
            query = RMSNorm(self.qk_gain, name="query_norm")(query)
            key = RMSNorm(name="key_norm")(key)
        query, key = attention.rotate(query, positions), attention.rotate(key, positions)
        keys = positions
        if cache is not None:
            cache = attention.update_cache(cache, key, value, positions[0])
            key, value = cache["key"].astype(x.dtype), cache["value"].astype(x.dtype)
            keys = jnp.arange(key.shape[1])
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
    gain: standard deviation of the result for unit-variance hidden neurons, at the start.
    senders: of gate and up, whose send states each has; (0, 0): the same.

    In our own models this is what joins groups at each token. `NGCLayer` has the other fields and
    the errors.

        layer = NGCMLP(384, groups=8)
        params = layer.init(key, x)  # x [..., 128]
        y = layer.apply(params, x)  # [..., 128]
    """

    hidden: int
    activation: str | None = "silu"
    gates: bool = False
    gain: float = 1.0
    senders: tuple[int, ...] = (0, 1)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.activation is not None:
            one_of(self, "activation", GATES)
        up = self.synapse(x.shape[-1], self.hidden, senders=self.senders, name="gate_up")
        down = self.synapse(self.hidden, x.shape[-1], gain=self.gain, split="in", name="down")
        heard = up(x)
        if heard.ndim == 4:
            heard = constrain(heard, "window", None, None, "group")
        gate, value = members_of(heard)
        if self.activation is not None:
            gate = gate * GATES[self.activation](gate)
        said = gate * value
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
        segments: Array | None = None,
        cache: attention.Cache | None = None,
        route: Array | None = None,
    ) -> tuple[Array, attention.Cache | None]:
        s = self.shape
        joined: dict[str, Any] = {
            "groups": s.groups,
            "rule": s.rule,
            "ports": s.p_inter,
            "intra": s.p_intra,
            "message_activation": s.message_activation,
            "wiring": s.wiring,
            "channels": s.channels,
            "wiring_seed": s.wiring_seed,
            "init_rank": s.init_rank,
            "form": s.form,
            "gates": s.gates,
            "gain": s.branch_gain,
        }
        norm = RMSNorm(name="attention_norm")
        attention_layer = NGCAttention(
            heads=s.heads,
            causal=s.causal,
            context=s.context,
            qk_norm=s.qk_norm,
            qk_gain=s.qk_gain,
            senders=s.shared.of("query_key_value"),
            **joined,
        )
        nn.share_scope(self, attention_layer)  # its parameters are the stage's own
        asked = None if route is None else norm(route)
        heard, cache = attention_layer.attend(norm(x), positions, segments, cache, asked)
        x = constrain(x + heard, *s.stream_axes)
        mlp = NGCMLP(
            hidden=s.hidden,
            activation=s.exchange_activation,
            senders=s.shared.of("gate_up"),
            **joined,
        )
        nn.share_scope(self, mlp)
        heard = mlp(RMSNorm(name="exchange_norm")(x))
        return constrain(x + heard, *s.stream_axes), cache


def unembed(x: Array, matrix: Array) -> Array:
    """Logits [B, T, V] in float32 for x [B, T, D] and the matrix [D, V].

    With groups on N devices: if N divides the vocabulary, each has a part of it and gets all of x,
    D numbers a token; else (bytes, a small matrix) each takes a part of the tokens, D / N numbers a
    token, and gets the matrix.
    """
    tokens, vocab = (None, "vocab") if matrix.shape[1] % num_shards("vocab") == 0 else ("row", None)
    rows = constrain(x.reshape(-1, x.shape[-1]), tokens or "window", None)
    logits = constrain(rows @ constrain(matrix, None, vocab), tokens or "window", vocab)
    return logits.reshape(*x.shape[:-1], -1).astype(jnp.float32)
