"""A rank for each synapse of each stage: what `model.ranks` says, as conversion gives it.

For: reading and writing the text "query:96,key+value:64,attention out:80+500,...;query:..." in
which stages stand between semicolons, members that are read together between plus signs, and single
synapses after a plus sign. Rank 0 is a dense matrix. Not for: which rank is good
(`convert/ranks.py`).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from ngc_jax.nn.sharing import FANS

MEMBERS = {member: synapse for synapse, fan in FANS.items() for member in fan}


class Joined(NamedTuple):
    """Members of one synapse that read the same input by one set of states."""

    members: tuple[str, ...]  # of `FANS`
    rank: int  # 0: a dense matrix; of rule "addressed" the numbers of a port
    singles: int = 0  # single synapses beside it

    @property
    def name(self) -> str:
        """Of the parameters: "key_value"."""
        return "_".join(self.members).replace(" ", "_")


Ranks = tuple[tuple[Joined, ...], ...]  # by stage


@functools.cache
def parse(text: str) -> Ranks:
    """What a text says; () for "". Raises ValueError for what is no rank of every synapse once."""
    return tuple(_stage(i, part) for i, part in enumerate(text.split(";"), 1)) if text else ()


def _stage(number: int, text: str) -> tuple[Joined, ...]:
    found = []
    for item in text.split(","):
        names, _, told = item.partition(":")
        rank, _, singles = told.partition("+")
        members = tuple(name.strip() for name in names.split("+"))
        one = len({MEMBERS.get(name, name) for name in members}) == 1
        if not (one and rank.isdecimal() and (singles or "0").isdecimal()):
            raise ValueError(
                f"stage {number}: {item!r} must be members of one synapse and a rank, such as "
                "'key+value:64', or 'down:64+500' with single synapses"
            )
        found.append(Joined(members, int(rank), int(singles or 0)))
    named = sorted(name for one in found for name in one.members)
    if named != sorted(MEMBERS):
        wants = f"must name each of {', '.join(MEMBERS)} once"
        raise ValueError(f"stage {number}: {text!r} {wants}")
    return tuple(found)


def write(ranks: Sequence[Sequence[Joined]]) -> str:
    """The text that `parse` reads as these ranks."""

    def told(one: Joined) -> str:
        return f"{'+'.join(one.members)}:{one.rank}" + (f"+{one.singles}" if one.singles else "")

    return ";".join(",".join(map(told, stage)) for stage in ranks)
