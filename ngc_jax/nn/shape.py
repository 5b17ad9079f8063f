"""The shape of a model: its sizes as a frozen, hashable value, checked before anything is
allocated.

For: what a model *is*, and the synapse parts that follow from it. Not for: parameters (`layers.py`)
or training.
"""

import dataclasses
from typing import NamedTuple

from ngc_jax.core.rules import RULES, Rule
from ngc_jax.core.rules.addressed import Addressed, Rewirable
from ngc_jax.core.wiring import WIRINGS
from ngc_jax.nn.sharing import Sharing, parse

DYNAMIC = ("dynamic", "dynamic_ports")  # wirings that change: whole channels, or single ports


class SynapsePart(NamedTuple):
    """One summand of a synapse."""

    place: str  # "intra", "inter", or "dense" for the baseline
    rule: str  # a name of RULES
    groups: int
    dim: int  # numbers of a state (r) or of a port (p)
    activation: str | None
    # `addressed` under a wiring; None: the rule as it is in RULES
    wired: Addressed | Rewirable | None = None
    kinds: int = 0  # in which a group's senders start (`Rule.alike`); 0: each neuron its own

    @property
    def how(self) -> Rule:
        """The rule that the part acts by."""
        return self.wired or RULES[self.rule]


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder or recurrent model: the fields of `config.model`, described there, and
    what the data give.
    """

    vocab: int
    context: int
    causal: bool  # whether a token sees none after it
    rule: str
    width: int
    hidden: int
    groups: int
    heads: int
    p_intra: int
    p_inter: int
    message_activation: str | None
    wiring: str
    channels: int
    wiring_seed: int
    sharing: str
    init_rank: int
    exchange_activation: str | None
    gates: bool
    qk_norm: bool
    qk_gain: float  # where the learned scale of normalised queries starts
    prelude: int
    core: int
    rounds: int
    drive: bool
    route: str
    state_activation: str | None  # of the state after a round
    keep: float  # of the state, from one round to the next, at the start of training
    coda: int
    form: str
    remat: str
    chunk: int

    @property
    def depth(self) -> int:
        """Stages that a token passes through, rounds counted."""
        return self.prelude + self.core * self.rounds + self.coda

    @property
    def stream_axes(self) -> tuple[str | None, ...]:
        """What the axes of the stream [B, T, D] count (`mesh.py`): channels are groups' own, but in
        the dense model.
        """
        return ("window", None, None if self.rule == "dense" else "group")

    @property
    def has_messages(self) -> bool:
        """Whether groups send each other anything."""
        return self.rule not in ("dense", "none")

    @property
    def has_drive(self) -> bool:
        """Whether there is a loop that the external drive pulls back to where it began."""
        return self.core > 0 and self.drive

    @property
    def shared(self) -> Sharing:
        """Which synapses share their send states."""
        return parse(self.sharing, self.prelude + self.core + self.coda)

    @property
    def rewirable(self) -> Rewirable | None:
        """The rule between groups where each synapse has a wiring of its own that changes in
        training.
        """
        if self.wiring not in DYNAMIC:
            return None
        copies = self.p_inter if self.wiring == "dynamic_ports" else 1
        return Rewirable(self.channels * copies, copies)

    @property
    def wired(self) -> Addressed | Rewirable | None:
        """`addressed` under the wiring there is; None where every group hears every one."""
        draw = WIRINGS.get(self.wiring)
        return (
            Addressed(draw(self.groups, self.channels, self.wiring_seed))
            if draw
            else self.rewirable
        )

    @property
    def branch_gain(self) -> float:
        """Scale of what a branch adds to the stream, so that 2 depth branches together add unit
        variance.
        """
        return (2 * self.depth) ** -0.5

    def parts(self, n_in: int, n_out: int) -> tuple[SynapsePart, ...]:
        """The summands of a synapse from n_in to n_out neurons under this shape."""
        if self.rule == "dense":
            return (SynapsePart("dense", "block", 1, 0, None, kinds=self.init_rank),)
        # from here on the states of one side are one-hot: a dense block
        full = min(n_in, n_out) // self.groups
        kinds = self.init_rank // self.groups
        intra, inter = [], []
        if self.p_intra > 0:
            rule = "block" if self.p_intra >= full else "within"
            intra = [SynapsePart("intra", rule, self.groups, self.p_intra, None, kinds=kinds)]
        if self.has_messages:
            dim = 1 if self.wiring == "dynamic_ports" else self.p_inter
            inter = [
                SynapsePart(
                    "inter", self.rule, self.groups, dim, self.message_activation, self.wired, kinds
                )
            ]
        return (*intra, *inter)
