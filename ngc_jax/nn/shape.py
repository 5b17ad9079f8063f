"""The shape of a model: its sizes as a frozen, hashable value.

For: sizes and the parts of a synapse. Not for: parameters (`layers.py`), refusals (`settings.py`).
"""

import dataclasses

import jax
import jax.numpy as jnp

from ngc_jax.core.delays import parse as parse_delays
from ngc_jax.core.rules.addressed import Addressed, Rewirable
from ngc_jax.core.rules.generated import Singles
from ngc_jax.core.wiring import DYNAMIC, WIRINGS
from ngc_jax.nn.ranks import Joined, Ranks
from ngc_jax.nn.ranks import parse as parse_ranks
from ngc_jax.nn.sharing import FANS, Sharing, parse
from ngc_jax.nn.synapse import SynapsePart


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder or recurrent model: `config.model` (docs/settings.md), and of the data."""

    vocab: int = 257
    context: int = 128  # tokens that attention looks back on
    causal: bool = True  # whether a token sees none after it
    width: int = 128
    hidden: int = 384
    heads: int = 4
    kv_heads: int = 0  # 0: as heads
    head_width: int = 0  # 0: width / heads
    rule: str = "addressed"
    groups: int = 8
    p_intra: int = 128
    p_inter: int = 3
    message_activation: str | None = None
    wiring: str = "complete"
    channels: int = 4
    wiring_seed: int = 0
    init_rank: int = 0
    delays: str = ""
    sharing: str = "none"
    exchange_activation: str | None = "silu"
    gates: bool = False
    qk_norm: bool = True
    qk_gain: float = 1.0
    qkv_bias: bool = False
    rope_base: float = 10_000.0
    rope_scaling: str = ""
    norm_epsilon: float = 1e-6
    tied: bool = False
    prelude: int = 1
    core: int = 1
    rounds: int = 2
    drive: bool = True
    route: str = "state"
    state_activation: str | None = None
    keep: float = 0.9
    coda: int = 1
    form: str = "weights"
    remat: str = "rounds"
    chunk: int = 0
    dropout: float = 0.0
    state_dropout: float = 0.0
    stochastic_depth: float = 0.0
    ranks: str = ""

    @property
    def has_messages(self) -> bool:
        """Whether groups send each other anything."""
        return self.rule not in ("dense", "none")

    @property
    def rewirable(self) -> Rewirable | None:
        """The rule between groups where each synapse has a wiring that changes in training."""
        if self.wiring not in DYNAMIC:
            return None
        copies = self.p_inter if self.wiring == "dynamic_ports" else 1
        return Rewirable(self.channels * copies, copies)

    @property
    def wired(self) -> Addressed | Rewirable | None:
        """`addressed` under the wiring there is; None where every group hears every one."""
        if self.wiring not in WIRINGS:
            return self.rewirable
        return Addressed(WIRINGS[self.wiring](self.groups, self.channels, self.wiring_seed))

    def parts(self, n_in: int, n_out: int, own: Joined | None = None) -> tuple[SynapsePart, ...]:
        """The summands of a synapse from n_in to n_out neurons; `own`: as `model.ranks` says."""
        rank, singles = (own.rank, own.singles) if own else (None, 0)
        if self.rule == "dense" or rank == 0:
            late = parse_delays(self.delays)
            return (SynapsePart("dense", "block", 1, 0, None, None, self.init_rank, late),)
        parts, kinds = [], self.init_rank // self.groups
        if self.p_intra > 0:
            # From this size on the states of one side are one-hot: a dense block.
            rule = "block" if self.p_intra >= min(n_in, n_out) // self.groups else "within"
            parts.append(SynapsePart("intra", rule, self.groups, self.p_intra, None, None, kinds))
        if self.has_messages:
            dim = 1 if self.wiring == "dynamic_ports" else rank or self.p_inter
            late = parse_delays(self.delays)
            how = (dim, self.message_activation, self.wired, kinds, late)
            parts.append(SynapsePart("inter", self.rule, self.groups, *how))
        if singles:
            places = Singles(n_in, n_out)
            parts.append(SynapsePart("single", "synapses", 1, singles, None, places))
        return tuple(parts)

    def summands(self, number: int = 0) -> dict[str, tuple[SynapsePart, ...]]:
        """The parts of each synapse of a stage, counted from 0."""
        own, sizes = {one.name: one for one in self.apart[number]} if self.apart else {}, self.sizes
        return {
            name: self.parts(
                sizes[fan[0]][1], sum(sizes[m][0] for m in (fan if own else fan[:1])), own.get(name)
            )
            for name, fan in self.fans(number).items()
        }

    def positions(self, tokens: int) -> jax.Array:
        """Where so many tokens are, for rotary positions and the reach of attention: [T]."""
        return jnp.arange(tokens)

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_width or self.width // self.heads

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(n_out, n_in) of each member of a stage's synapses."""
        width, heads = self.width, self.heads * self.head_size
        keys = (self.kv_heads or self.heads) * self.head_size
        sizes = {"query": (heads, width), "key": (keys, width), "value": (keys, width)}
        sizes |= {"attention out": (width, heads), "down": (width, self.hidden)}
        return sizes | dict.fromkeys(("gate", "up"), (self.hidden, width))

    @property
    def apart(self) -> Ranks:
        """The ranks of each stage, where stages differ in shape and are kept apart; else ()."""
        return parse_ranks(self.ranks)

    def fans(self, number: int = 0) -> dict[str, tuple[str, ...]]:
        """The synapses of a stage, counted from 0, and the members of each."""
        if self.apart:
            return {one.name: one.members for one in self.apart[number]}
        if self.kv_heads in (0, self.heads):
            return FANS
        return {"query": ("query",), "key_value": ("key", "value")} | {
            name: fan for name, fan in FANS.items() if name != "query_key_value"
        }

    @property
    def depth(self) -> int:
        """Stages that a token passes through, rounds counted."""
        return self.prelude + self.core * self.rounds + self.coda

    @property
    def stream_axes(self) -> tuple[str | None, ...]:
        """What the axes of the stream [B, T, D] count; a dense model's channels are no groups'."""
        return ("window", None, None if self.rule == "dense" else "group")

    @property
    def shared(self) -> Sharing:
        """Which synapses share their send states."""
        return parse(self.sharing, self.prelude + self.core + self.coda)
