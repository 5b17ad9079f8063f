"""Layers that hold parameters: NGC's dense layer, attention and MLP, for any Flax model, and the
stages and cells that our own models are made of.

For: holding parameters, one Flax module for each thing that owns some. Not for: loops over stages,
rounds or cells (`decoder.py`, `recurrent.py`), nor mathematics (`core/`).

Axes: B batch, T tokens, D width, F hidden, G groups, H heads.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ngc_jax.core import attention
from ngc_jax.core.gating import encapsulate
from ngc_jax.core.params import ParamInfo
from ngc_jax.core.recurrence import along_tokens, time_scales
from ngc_jax.core.rules import GATES
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
    """What the NGC layers have in common: how their neurons are joined.

    groups: groups of neurons; must divide the numbers of neurons on both sides. rule: a name of
    `RULES`, "none" (groups do not talk) or "dense" (an ordinary matrix). ports: numbers of a port,
    or of a state. intra: numbers of a state within its group, 0 for no such part; by default a
    dense block. activation: of the signal between groups, a name of `GATES`. wiring: "complete",
    "others", or a name of `WIRINGS` with so many channels a group. form: "weights" (generate each
    W, then multiply) or "signals" (never form W; faster where layers are wide).
    """

    groups: int = 8
    rule: str = "addressed"
    ports: int = 2
    intra: int | None = None
    activation: str | None = None
    wiring: str = "others"
    channels: int = 4
    wiring_seed: int = 0
    init_rank: int = 0
    form: str = "weights"

    def synapse(self, n_in: int, n_out: int, **more: Any) -> Synapse:
        """Synapses from n_in to n_out neurons. Raises ValueError where groups do not divide them."""
        for count in (n_in, n_out):
            if self.rule != "dense" and count % self.groups:
                raise ValueError(
                    f"groups={self.groups}: must divide {count} neurons, for instance "
                    f"groups={next(g for g in range(self.groups, 0, -1) if count % g == 0)}"
                )
        wiring = self.wiring if self.rule == "addressed" else "complete"
        joined = Connectivity(
            rule=self.rule,
            groups=self.groups,
            p_intra=max(n_in, n_out) if self.intra is None else self.intra,
            p_inter=self.ports,
            message_activation=self.activation,
            wiring=wiring if self.groups > 1 else "complete",
            channels=self.channels,
            wiring_seed=self.wiring_seed,
            init_rank=self.init_rank,
        )
        return Synapse(joined.parts(n_in, n_out), n_in, n_out, self.form, **more)


class NGCDense(NGCLayer):
    """A dense layer whose weights are made of neurons' states: x [..., n_in] -> [..., features].

    In place of `nn.Dense(features)`, with fewer parameters: see `NGCLayer` for the fields. At start
    unit-variance x gives y of variance gain^2. Raises ValueError where groups do not divide the
    neurons of a side.
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

    heads: a divisor of groups, since a head is one group or several. causal: a token sees none
    after it. context: tokens that it looks back on, itself included; None: all. Positions are
    rotary; D / heads must be even. Queries and keys are normalised in each head if `qk_norm` (arXiv
    2302.05442, section 2). With `gates`, a token sets how loudly each group speaks to the last
    synapse. `senders`: for query, key and value, whose send states each has. The collection
    "intermediates", where it is asked for, holds "attention", the weights [B, H, T, S].
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

    hidden: neurons of the hidden layer, a multiple of groups. activation_of_gate: phi(z) = z g(z)
    with g a name of `GATES`; None: a plain product. `senders`: of gate and up, whose send states
    each has. In our own models this is what joins groups at each token.
    """

    hidden: int
    activation_of_gate: str | None = "silu"
    gates: bool = False
    gain: float = 1.0
    senders: tuple[int, ...] = (0, 1)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        up = self.synapse(x.shape[-1], self.hidden, senders=self.senders, name="gate_up")
        down = self.synapse(self.hidden, x.shape[-1], gain=self.gain, split="in", name="down")
        heard = up(x)
        if heard.ndim == 4:
            heard = constrain(heard, "window", None, None, "group")
        gate, value = members_of(heard)
        if self.activation_of_gate is not None:
            gate = gate * GATES[self.activation_of_gate](gate)
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
            "activation": s.message_activation,
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
            activation_of_gate=s.exchange_activation,
            senders=s.shared.of("gate_up"),
            **joined,
        )
        nn.share_scope(self, mlp)
        heard = mlp(RMSNorm(name="exchange_norm")(x))
        return constrain(x + heard, *s.stream_axes), cache


class Cell(nn.Module):
    """A state that hears the stream token by token: x [B, T, D], state [B, D] -> (x, state).

    With e the normed stream and n(h) = h / rms(h), a round at a token is

        h <- keep h + pace (drive e + MLP(n(h), e)),   keep = exp(-softplus(leak)),
                                                       pace = sqrt(1 - keep^2)

    where the MLP is that of a `Stage` with two readers: gate and up each sum what the state says
    and what the token says. So the token multiplies the state; without that no linear recurrence
    keeps track of even a parity (arXiv 2404.08819). Neurons forget at time scales of their own;
    pace keeps a state's variance at 1 whatever its scale (LRU, arXiv 2303.06349). What the tokens
    say is one product over all of them, before the loop, and weights are made once. The state is
    float32 whatever x is. first [B, T], bool: where a document, and so a new state, begins.
    """

    shape: ModelShape

    @nn.compact
    def __call__(self, x: Array, state: Array, first: Array | None = None) -> tuple[Array, Array]:
        s = self.shape
        senders, half = s.shared.of("gate_up"), 0.5**0.5  # two readers' sum has unit variance
        reader = partial(
            Synapse, s.parts(s.width, s.hidden), s.width, s.hidden, s.form, senders, half
        )
        back = partial(Synapse, n_out=s.width, form=s.form, split="in")
        e = RMSNorm(name="norm")(x)
        told = reader(name="token")(e)
        listen = reader(name="gate_up").opened()
        down = back(s.parts(s.hidden, s.width), s.hidden, name="down").opened()
        rounds = s.rounds * time_scales(s.width, s.groups, s.context)  # that neurons remember for
        start = jnp.log(jnp.expm1(1 / jnp.asarray(rounds, jnp.float32)))
        leak = declare_scale(self, "leak", lambda _, shape: start.reshape(shape), (s.width,))
        keep = jnp.exp(-jax.nn.softplus(leak.astype(jnp.float32)))
        pace = jnp.sqrt(1 - jnp.square(keep))
        ones = nn.initializers.ones
        drive = declare_scale(self, "drive", ones, (s.width,)) if s.drive else 0.0

        def turn(h: Array, said: tuple[Array, Array]) -> Array:
            e, told = said
            both = told + listen(rms_normalize(h).astype(told.dtype))
            gate, heard = both[:, 0], both[:, 1]
            if s.exchange_activation is not None:
                gate = gate * GATES[s.exchange_activation](gate)
            return keep * h + pace * (drive * e + down(gate * heard)[:, 0])

        remat = s.remat != "none"
        said, first = jax.tree.map(lambda a: a.swapaxes(0, 1), ((e, told), first))
        state, states = along_tokens(turn, state, said, first, rounds=s.rounds, remat=remat)
        out = back(s.parts(s.width, s.width), s.width, gain=s.core**-0.5, name="out")
        return x + out(rms_normalize(states.swapaxes(0, 1)).astype(x.dtype))[..., 0, :], state


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
