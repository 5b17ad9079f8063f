"""The layers of a stage and of a recurrent cell: synapses, norm, attention across tokens, exchange
across groups.

For: holding parameters, one Flax module for each thing that owns some. Not for: loops over stages,
rounds or cells (`decoder.py`, `recurrent.py`), nor mathematics (`core/`).

Axes: B batch, T tokens, D width, F hidden, G groups, H heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ngc_jax.core import attention
from ngc_jax.core.gating import encapsulate
from ngc_jax.core.recurrence import along_tokens, time_scales
from ngc_jax.core.rules import GATES, activation_gain, emit, weights
from ngc_jax.core.rules.addressed import Addressed
from ngc_jax.core.rules.signal import FEW, SignalRule
from ngc_jax.nn.mesh import constrain, num_shards
from ngc_jax.nn.shape import ModelShape, SynapsePart
from ngc_jax.nn.sharing import leaders, spread

Array = jax.Array

# what a stage's gradient keeps; all else is quickly made again
KEPT = ("signal", "synapse", "share", "mixed")


class Synapse(nn.Module):
    """Synapses that read the same x: [..., n_in] -> [..., fan, n_out], in one wide product.

    `senders` names, for each member of the fan, whose send states it has: (0, 1, 2) each its own,
    (0, 0, 0) all the same, and then the signal is computed once. A synapse is the sum of the parts
    its shape names (inside a group, between groups), scaled so that unit-variance x gives y of
    variance gain^2 at start. Under form="weights" the linear parts' weights are generated, summed
    and multiplied once, for the dense layer's FLOPs but none of its parameters; under
    form="signals" a signal rule's weights are never formed. Where groups are on different devices
    they never are under either, so that only signals cross.
    """

    parts: tuple[SynapsePart, ...]
    n_in: int
    n_out: int
    form: str
    senders: tuple[int, ...] = (0,)
    gain: float = 1.0

    def __call__(self, x: Array) -> Array:
        return self.opened()(x)

    @nn.compact
    def opened(self) -> Callable[[Array], Array]:
        """The synapse as a function of x, its weights made: for a loop, which would else make them
        in each step.
        """
        signals, generated = [], []
        # Drawn once, for who is of which kind at start must be the same in all parts, or their sum
        # has a higher rank.
        who = (
            self.make_rng("params")
            if self.parts[0].kinds and self.is_initializing()
            else jax.random.key(0)
        )
        forms = self.form == "weights" and num_shards("group") == 1
        for part in self.parts:
            scale = self.gain * len(self.parts) ** -0.5 * activation_gain(part.activation)
            states = self.param(f"{part.place}_{part.rule}", self._init_part, part, scale, who)
            pre, post = states.get("pre", ()), states["weight" if part.place == "dense" else "post"]
            if not isinstance(part.how, SignalRule) or (forms and part.activation is None):
                generated.append(
                    jax.vmap(partial(weights, part.how))(spread(self.senders, pre), post)
                )
                continue
            how, senders = part.how, self.senders
            # speakers hold their states, not listeners
            if part.wired is not None and num_shards("group") > 1:
                pre, post = jax.vmap(part.wired.complete)(spread(senders, pre), post)
                how, senders = Addressed(), tuple(range(len(senders)))
            signals.append((part, how, senders, pre, post))
        together = reduce(jnp.add, generated).reshape(-1, self.n_in).T if generated else None

        def act(x: Array) -> Array:
            # a weight's gradient sums over one axis, which XLA:CPU does 2x faster
            tokens = x.reshape(-1, self.n_in)
            outputs = []
            # Members that read one x make one wide product, for which their states are brought
            # together: too much work for a few tokens, of which each member gets its own.
            axis = 0 if len(tokens) < FEW else None

            def handed(members: int) -> Array:
                return (
                    tokens if axis is None else jnp.broadcast_to(tokens, (members, *tokens.shape))
                )

            for part, how, senders, pre, post in signals:
                # where a send state is one-hot: all read x as it is
                sent, sent_axis = handed(len(senders)), axis
                if part.rule != "block":
                    speak = jax.vmap(
                        partial(emit, how, activation=part.activation), in_axes=(axis, 0)
                    )
                    said = speak(handed(len(set(senders))), pre)
                    # here signals cross
                    said = constrain(
                        constrain(said, None, "window", *how.spoken), None, "window", *how.heard
                    )
                    sent, sent_axis = spread(senders, checkpoint_name(said, "signal")), 0
                outputs.append(
                    jax.vmap(how.receive, in_axes=(sent_axis, 0), out_axes=-2)(sent, post)
                )
            if together is not None:
                outputs.append((tokens @ together).reshape(-1, len(self.senders), self.n_out))
            heard = checkpoint_name(reduce(jnp.add, outputs), "synapse")
            return heard.reshape(*x.shape[:-1], len(self.senders), self.n_out)

        return act

    def _init_part(
        self, key: Array, part: SynapsePart, scale: float, who: Array
    ) -> dict[str, Array]:
        init = partial(
            part.how.init, groups=part.groups, n_in=self.n_in, n_out=self.n_out, dim=part.dim
        )
        pre, post = jax.vmap(init)(jax.random.split(key, len(self.senders)))
        if part.kinds:
            kind = jax.random.permutation(who, jnp.arange(self.n_in // part.groups) % part.kinds)
            pre, post = jax.vmap(partial(part.how.alike, kind=kind))(pre, post)
        pre = jax.tree.map(lambda a: a[leaders(self.senders)], pre)
        # A dense weight is no neuron state and must not be trained at the states' learning rate:
        # the name says so.
        states = {"weight" if part.place == "dense" else "post": part.how.scaled(post, scale)}
        return states if part.rule == "block" else states | {"pre": pre}


def members(y: Array) -> list[Array]:
    """What a synapse gives, [..., fan, n], by member: [..., n] each.

    A split, for its gradient is one concatenation, and that of slices a sum of arrays padded with
    zeros.
    """
    return [one[..., 0, :] for one in jnp.split(y, y.shape[-2], axis=-2)]


@contextmanager
def intercept(listener: Callable[[Synapse, Array, Array], None]) -> Iterator[None]:
    """While it lasts, `listener(synapse, x, y)` is called with what each synapse reads and gives."""

    def listen(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        if isinstance(context.module, Synapse) and context.method_name == "__call__":
            listener(context.module, args[0], result)
        return result

    with nn.intercept_methods(listen):
        yield


def rms_normalize(x: Array) -> Array:
    """x / rms(x) over the last axis, in float32 whatever x is."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)


class RMSNorm(nn.Module):
    """x / rms(x), times a learned scale per channel (arXiv 1910.07467) that starts at `gain`, in
    float32.
    """

    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.constant(self.gain), (x.shape[-1],))
        return (rms_normalize(x) * scale).astype(x.dtype)


class Gates(nn.Module):
    """How loudly each group speaks, read from the token's stream: read [..., D], said [..., G n] ->
    said.

    Causal, for a token's shares are its own stream's. They start equal, which changes nothing.
    """

    groups: int

    @nn.compact
    def __call__(self, read: Array, said: Array) -> Array:
        weight = self.param("weight", nn.initializers.zeros, (read.shape[-1], self.groups))
        return encapsulate(said, read @ weight)


class Stage(nn.Module):
    """Attention across tokens, then gated exchange across groups, each added to the stream: x [B,
    T, D] -> x.

    Queries and keys are normalised in each head if `qk_norm` (arXiv 2302.05442, section 2). A head
    is made of whole groups, so a group's signals stay together. With `gates`, what groups say to
    the last synapse of each branch is encapsulated. With a cache, keys and values of these tokens
    are written from positions[0] on, and attention runs over the whole cache. With `route`, a
    stream like x, queries and keys are read from it in the place of x: who heeds whom is then a
    matter of the route, and what is said one of x. Returns (x, cache); where the collection
    "intermediates" is asked for, "attention" in it is how much each token heeds each other [B, H,
    T, S].
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
        square = partial(Synapse, s.parts(s.width, s.width), s.width, s.width, s.form)
        senders = s.shared.of
        heads = (*x.shape[:2], s.heads, s.width // s.heads)

        def gated(name: str, read: Array, said: Array) -> Array:
            return Gates(s.groups, name=name)(read, said) if s.gates else said

        norm, ask = (
            RMSNorm(name="attention_norm"),
            square(senders("query_key_value"), name="query_key_value"),
        )
        routed = [] if route is None else members(ask(norm(route)))[:2]
        read = norm(x)
        made = [*routed, *members(ask(read))[len(routed) :]]
        query, key, value = (
            constrain(one.reshape(heads), "window", None, "group", None) for one in made
        )
        # each head's query and key at unit rms: bounded logits bear the high rates that states want
        if s.qk_norm:
            query, key = RMSNorm(s.qk_gain, name="query_norm")(query), RMSNorm(name="key_norm")(key)
        query, key = attention.rotate(query, positions), attention.rotate(key, positions)
        keys = positions
        if cache is not None:
            cache = attention.update_cache(cache, key, value, positions[0])
            key, value = cache["key"].astype(x.dtype), cache["value"].astype(x.dtype)
            keys = jnp.arange(key.shape[1])
        all_there = cache is None and segments is None and x.shape[1] <= s.context
        if all_there and not self.is_mutable_collection("intermediates") and attention.fused(query):
            mixed = attention.attend_fused(query, key, value, s.causal)
        else:
            share = attention.attention_weights(
                query, key, attention.attention_mask(positions, keys, s.context, segments, s.causal)
            )
            self.sow("intermediates", "attention", share)
            mixed = checkpoint_name(attention.mix(checkpoint_name(share, "share"), value), "mixed")
        mixed = gated("attention_gates", read, constrain(mixed, "window", None, "group"))
        x = constrain(
            x + square(gain=s.branch_gain, name="attention_out")(mixed)[..., 0, :], *s.stream_axes
        )

        up = Synapse(
            s.parts(s.width, s.hidden),
            s.width,
            s.hidden,
            s.form,
            senders("gate_up"),
            name="gate_up",
        )
        down = Synapse(
            s.parts(s.hidden, s.width), s.hidden, s.width, s.form, gain=s.branch_gain, name="down"
        )
        read = RMSNorm(name="exchange_norm")(x)
        gate, heard = members(constrain(up(read), "window", None, None, "group"))
        if s.exchange_activation is not None:
            gate = gate * GATES[s.exchange_activation](gate)
        said = gated("exchange_gates", read, gate * heard)
        return constrain(x + down(said)[..., 0, :], *s.stream_axes), cache


class Cell(nn.Module):
    """A state that hears the stream token by token: x [B, T, D], state [B, D] -> (x, state).

    With e the normed stream and n(h) = h / rms(h), a round at a token is

        h <- keep h + pace (drive e + exchange(n(h), e)),    keep = exp(-softplus(leak)),  pace = sqrt(1 - keep^2)

    where the exchange is that of a `Stage` with two readers: gate and up each sum what the state
    says and what the token says. So the token multiplies the state, without which no linear
    recurrence keeps track of even a parity (arXiv 2404.08819). Neurons forget at time scales of
    their own; pace keeps a state's variance at 1 whatever its scale (LRU, arXiv 2303.06349). What
    the tokens say is one product over all of them, before the loop, and weights are made once. The
    state is float32 whatever x is. first [B, T], bool: where a document, and so a new state,
    begins.
    """

    shape: ModelShape

    @nn.compact
    def __call__(self, x: Array, state: Array, first: Array | None = None) -> tuple[Array, Array]:
        s = self.shape
        senders, half = s.shared.of("gate_up"), 0.5**0.5  # two readers' sum has unit variance
        reader = partial(
            Synapse, s.parts(s.width, s.hidden), s.width, s.hidden, s.form, senders, half
        )
        e = RMSNorm(name="norm")(x)
        told = reader(name="token")(e)
        listen = reader(name="gate_up").opened()
        down = Synapse(s.parts(s.hidden, s.width), s.hidden, s.width, s.form, name="down").opened()
        rounds = s.rounds * time_scales(s.width, s.groups, s.context)  # that neurons remember for
        leak = self.param(
            "leak", lambda _: jnp.log(jnp.expm1(1 / jnp.asarray(rounds, jnp.float32)))
        )
        keep = jnp.exp(-jax.nn.softplus(leak.astype(jnp.float32)))
        pace = jnp.sqrt(1 - jnp.square(keep))
        drive = self.param("drive", nn.initializers.ones, (s.width,)) if s.drive else 0.0

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
        out = Synapse(
            s.parts(s.width, s.width), s.width, s.width, s.form, gain=s.core**-0.5, name="out"
        )
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
