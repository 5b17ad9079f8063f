"""The synapse: what joins neurons to neurons, in place of a dense layer's matrix.

For: its summands, parameters, and two forms, weights and signals. Not for: how a rule makes weights
(`core/rules/`). Axes: n_in, n_out neurons; the fan counts synapses that read the same input.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ngc_jax.core.delays import Delays, late
from ngc_jax.core.params import ParamInfo
from ngc_jax.core.rules import RULES, Rule, SignalRule, activation_gain, emit, weights
from ngc_jax.core.rules.addressed import Addressed, Rewirable
from ngc_jax.core.rules.generated import Singles
from ngc_jax.core.rules.signal import FEW
from ngc_jax.nn.mesh import constrain, num_shards
from ngc_jax.nn.params import declare, stacked
from ngc_jax.nn.sharing import leaders, spread, take

Array = jax.Array
PAST = "past"  # the collection of what synapses said at the last tokens, for decoding


class SynapsePart(NamedTuple):
    """One summand of a synapse."""

    place: str  # "intra", "inter", or "dense" for the baseline
    rule: str  # a name of RULES
    groups: int
    dim: int  # numbers of a state (r) or of a port (p)
    activation: str | None
    # `addressed` under a wiring, or single synapses between so many neurons; None: RULES[rule]
    wired: Addressed | Rewirable | Singles | None = None
    kinds: int = 0  # of senders in a group at the start (`Rule.alike`); 0: as drawn
    delays: Delays = Delays(())  # of its signal; of a dense part's input

    @property
    def how(self) -> Rule:
        """The rule that the part acts by."""
        return self.wired or RULES[self.rule]

    @property
    def formed(self) -> bool:
        """Whether its weights may be formed in place of its signal, which nothing then changes."""
        return self.activation is None and (self.place == "dense" or not self.delays.tokens)

    @property
    def name(self) -> str:
        """Of its parameters: "inter_addressed"."""
        return f"{self.place}_{self.rule}"

    @property
    def taps(self) -> str:
        """Of its learned kernel of delays."""
        return f"{self.name}_taps"


class Synapse(nn.Module):
    """Synapses that read the same x: [..., n_in] -> [..., fan, n_out], in one wide product.

    The sum of its parts, scaled so that unit-variance x gives y of variance gain^2 at start. Under
    form="weights" the linear parts' weights are generated, summed and multiplied once; under
    "signals", or where groups are on different devices, a signal rule's are never formed; those of
    a part with delays never are, since the signal is what is late. x is then [..., T, n_in], and
    segments [..., T] number documents. Where the collection `PAST` is mutable, it holds the signals
    of the last tokens, and those that it is given come before the first token.
    """

    parts: tuple[SynapsePart, ...]
    n_in: int
    n_out: int
    form: str
    senders: tuple[int, ...] = (0,)  # whose send states each member of the fan has; (0, 0): shared
    gain: float = 1.0
    split: str = "out"  # or "in": the side of a dense synapse that is split over devices

    @property
    def longest(self) -> int:
        """The longest delay of a signal, in tokens."""
        return max((d for part in self.parts for d in part.delays.tokens), default=0)

    def __call__(
        self, x: Array, members: tuple[int, ...] | None = None, segments: Array | None = None
    ) -> Array:
        """y of these members of the fan; None: of all. Raises ValueError for x without tokens."""
        return self.opened(members)(x, segments)

    @nn.compact
    def opened(self, members: tuple[int, ...] | None = None) -> Callable[..., Array]:
        """The synapse as a function of x, its weights made: a loop would make them in each step."""
        signals, generated, kernels = [], [], dict[str, Any]()
        # Drawn once: of kinds that differ between parts, the sum would have a higher rank.
        drawn = self.parts[0].kinds and self.is_initializing()
        who = self.make_rng("params") if drawn else jax.random.key(0)
        forms = self.form == "weights" and num_shards("group") == 1
        fan = self.senders if members is None else tuple(self.senders[i] for i in members)
        for part in self.parts:
            scale = self.gain * len(self.parts) ** -0.5 * activation_gain(part.activation)
            info = partial(self._info, part)
            states = declare(self, part.name, info, self._init_part, part, scale, who)
            pre, post = states.get("pre", ()), states["weight" if part.place == "dense" else "post"]
            how, senders = part.how, fan
            if part.delays.tokens:
                kernels[part.place] = self._kernel(part)
            if members is not None:
                sets = sorted(set(fan))
                pre, post = take(pre, np.array(sets)), take(post, np.array(members))
                senders = tuple(sets.index(number) for number in fan)
            if not isinstance(how, SignalRule) or (forms and part.formed):
                generated.append(jax.vmap(partial(weights, how))(spread(senders, pre), post))
                continue
            if isinstance(part.wired, Addressed | Rewirable) and num_shards("group") > 1:
                pre, post = jax.vmap(part.wired.to_speakers)(spread(senders, pre), post)
                how, senders = Addressed(), tuple(range(len(senders)))
            signals.append((part, how, senders, pre, post))
        named = lambda place: "_".join(map(str, (place, *(members or ()))))  # noqa: E731
        together = reduce(jnp.add, generated).reshape(-1, self.n_in).T if generated else None

        def act(x: Array, segments: Array | None = None) -> Array:
            if kernels and x.ndim < 2:
                raise ValueError(f"x: shape {[*x.shape]}; must be [..., tokens, {self.n_in}]")
            if "dense" in kernels:
                given = x.reshape(1, -1, self.n_in), kernels["dense"], segments
                x = self._later(named("dense"), x.shape[-2], *given).reshape(x.shape)
            # A weight's gradient then sums over one axis, which XLA:CPU does twice as fast.
            tokens, outputs = x.reshape(-1, self.n_in), []
            # A few tokens are handed to each member: one wide product would gather all states.
            axis = 0 if len(tokens) < FEW else None

            def handed(count: int) -> Array:
                return tokens if axis is None else jnp.broadcast_to(tokens, (count, *tokens.shape))

            for part, how, senders, pre, post in signals:
                sent, sent_axis = handed(len(senders)), axis  # of a one-hot state: x as it is
                if part.rule != "block":
                    speak = partial(emit, how, activation=part.activation)
                    said = jax.vmap(speak, in_axes=(axis, 0))(handed(len(set(senders))), pre)
                    said = constrain(said, None, "window", *how.spoken)
                    said = constrain(said, None, "window", *how.heard)  # here signals cross
                    said = checkpoint_name(said, "signal")
                    if part.place in kernels:
                        given = said, kernels[part.place], segments
                        said = self._later(named(part.place), x.shape[-2], *given)
                    sent, sent_axis = spread(senders, said), 0
                receive = jax.vmap(how.receive, in_axes=(sent_axis, 0), out_axes=-2)
                outputs.append(receive(sent, post))
            if together is not None:
                outputs.append((tokens @ together).reshape(-1, len(fan), self.n_out))
            heard = checkpoint_name(reduce(jnp.add, outputs), "synapse")
            return heard.reshape(*x.shape[:-1], len(fan), self.n_out)

        return act

    def _kernel(self, part: SynapsePart) -> Any:
        """The shares of delays, [K, numbers of the signal]: constants, or one that is learned."""
        fixed = part.delays.kernel(self.n_in if part.place == "dense" else part.dim)
        if not part.delays.learned:
            return fixed
        info = ParamInfo("scale", (None, None))
        return declare(self, part.taps, lambda: info, lambda _: jnp.asarray(fixed))

    def _later(
        self, name: str, tokens: int, said: Array, kernel: Any, segments: Array | None
    ) -> Array:
        """`late` of what each of several says at so many tokens a sequence, [F, B T, ...]."""
        by_token = said.reshape(len(said), -1, tokens, *said.shape[2:])
        rows = None if segments is None else segments.reshape(-1, tokens)
        past: Any = self.get_variable(PAST, name)
        each = jax.vmap(lambda signal, past: late(signal, kernel, rows, past))
        heard, last = each(by_token, past)
        if self.is_mutable_collection(PAST):
            self.put_variable(PAST, name, last)
        return heard.reshape(said.shape)

    def _init_part(self, key: Array, part: SynapsePart, scale: float, who: Array) -> dict[str, Any]:
        pre, post = jax.vmap(self._drawn(part))(jax.random.split(key, len(self.senders)))
        if part.kinds:
            kind = jax.random.permutation(who, jnp.arange(self.n_in // part.groups) % part.kinds)
            pre, post = jax.vmap(partial(part.how.alike, kind=kind))(pre, post)
        return self._named(part, take(pre, leaders(self.senders)), part.how.scaled(post, scale))

    def _info(self, part: SynapsePart) -> dict[str, Any]:
        pre, post = part.how.info(*jax.eval_shape(self._drawn(part), jax.random.key(0)))
        if part.place == "dense":
            sides = ("channel", None) if self.split == "out" else (None, "channel")
            post = ParamInfo("matrix", (None, *sides), matrix=-2)
        owned = partial(dataclasses.replace, rule=part.rule, part=part.place)
        return stacked(jax.tree.map(owned, self._named(part, pre, post)), "fan")

    def _drawn(self, part: SynapsePart) -> Callable[[Array], Any]:
        """part.how.init, for a key."""
        sizes = (part.groups, self.n_in, self.n_out, part.dim)
        return lambda key: part.how.init(key, *sizes)

    @staticmethod
    def _named(part: SynapsePart, pre: Any, post: Any) -> dict[str, Any]:
        """States by name: a dense matrix, whose learning rate is another, is called "weight"."""
        named = {"weight" if part.place == "dense" else "post": post}
        return named if isinstance(pre, tuple) else named | {"pre": pre}


def members_of(y: Array) -> list[Array]:
    """What a synapse gives, [..., fan, n], by member: [..., n] each."""
    # A split's gradient is one concatenation; that of slices is a sum of padded arrays.
    return [one[..., 0, :] for one in jnp.split(y, y.shape[-2], axis=-2)]


class Heard(NamedTuple):
    """One call of a synapse, as `intercept` passes it on."""

    synapse: Synapse
    members: tuple[int, ...]  # of the fan
    x: Array  # [..., n_in]
    y: Array  # [..., members, n_out]
    segments: Array | None = None  # the documents of its tokens, [...]


@contextmanager
def intercept(listener: Callable[[Heard], Any]) -> Iterator[None]:
    """While it lasts, `listener` gets what synapses read and give, and may return another y."""

    def listen(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        if isinstance(context.module, Synapse) and context.method_name == "__call__":
            x, members, segments = (*args, None, None)[:3]
            chosen = members or tuple(range(len(context.module.senders)))
            changed = listener(Heard(context.module, chosen, x, result, segments))
            return result if changed is None else changed
        return result

    with nn.intercept_methods(listen):
        yield
