"""What the stability page says: the meaning of each headline number, and a caption for each figure
and table.

For: plain sentences, with units, that need no more than the README. Not for: the page's shape
(`page.py`), or which question to ask of which number (docs/stability.md).
"""

import math
from collections.abc import Callable

import numpy as np

from ngc_jax.analysis.stability import RESOLVED, Headline, Measured

BAND = "The band is the 95% interval of the mean over sequences (bootstrap)."


def meaning(row: Headline) -> str:
    """One sentence about a headline number."""
    if not math.isfinite(row.mean):
        return "Not finite: the state, or a direction of it, was lost while it was followed."
    return {
        "exponent": _exponent,
        "contraction": _contraction,
        "drive ratio": lambda row: (
            f"Of what a round adds to the state, {row.mean:.0%} by length is the drive back to "
            "the input, and the rest is what the groups made of it."
        ),
        "boundedness": lambda row: (
            f"At its longest, a token's state is {row.mean:.2f} times as long as at the start."
        ),
        "departure": _departure,
        "token contraction": _token_contraction,
        "Kaplan-Yorke dimension": _dimension,
        "entropy rate": lambda row: (
            "The sum of the positive exponents that were measured: information that the loop "
            "itself would make, at most, if it went on so."
        ),
    }[row.kind](row)


def _verdict(row: Headline) -> str:
    factor = math.exp(row.mean)
    if row.low <= 0 <= row.high:
        return f"neither grows nor shrinks as far as these sequences can tell (factor {factor:.3f})"
    return (
        f"grows by a factor of {factor:.3f}"
        if row.mean > 0
        else f"shrinks to {factor:.3f} of its size"
    )


def _exponent(row: Headline) -> str:
    if row.unit == "per token":
        return f"The trace that a change of the first token leaves in later ones {_verdict(row)} with each token."
    return (
        f"A small change of a sequence's states {_verdict(row)} {row.unit.replace('per', 'each')}."
    )


def _contraction(row: Headline) -> str:
    tells = (
        "its steps shrink"
        if row.high < 1
        else "its steps grow"
        if row.low > 1
        else "to these sequences, no change"
    )
    return f"Each round moves a token's state {row.mean:.3f} times as far as the round before: {tells}."


def _departure(row: Headline) -> str:
    what = (
        "no group hears another"
        if row.where.startswith("messages")
        else "nothing pulls the loop back to its input"
    )
    return f"If {what}, the last stage's state is another one: the distance is {row.mean:.2f} times that state's length."


def _token_contraction(row: Headline) -> str:
    percent = math.expm1(row.mean)
    tells = (
        "by no amount that these sequences can tell from 0"
        if row.low <= 0 <= row.high
        else f"by {percent:+.2%}"
    )
    return f"The distance between the states of two neighbouring tokens changes {tells} with each token read."


def _dimension(row: Headline) -> str:
    measured = int("".join(filter(str.isdigit, row.unit)))
    if row.mean >= measured - 0.01:
        return "All directions that were measured together do not shrink: the dimension is this or more."
    return "About so many directions keep a cloud of close states from shrinking to a point; 0 says that it does."


def caption(name: str, measured: Measured) -> str:
    """What figure or table `name` shows: what is drawn, the axes, how to read it, what it does not
    say.
    """
    return CAPTIONS[name](measured)


def _spectrum(measured: Measured) -> str:
    loop = measured.loop
    ways = "depth (every stage that a token passes, rounds counted) and tokens"
    drop = ""
    if loop is not None:
        ways = "rounds, " + ways
        drop = (
            f" The loop is followed to round {loop.followed}; its first {loop.dropped} rounds, in which changes turn "
            "to the directions that grow most, are left out of the second series."
        )
    return (
        f"The {measured.depth.shape[1]} largest Lyapunov exponents along {ways}. Up: natural logarithm of the factor "
        "by which a small change grows in one step, per round, per stage or per token; right: number of the exponent. "
        f"Bars are 95% intervals over sequences (bootstrap).{drop} Above 0 changes grow, below 0 they fade; several "
        "above 0 mean several independent ways to grow. It does not say that growth is bad (a model must tell inputs "
        "apart), nor what happens to large changes. Over a few steps the changes have not yet turned to the direction "
        "that grows most, so these are rates of those steps, not limits."
    )


def _rounds(measured: Measured) -> str:
    assert measured.loop is not None
    loop = measured.loop
    lost = float(np.mean(np.isnan(loop.contraction)))
    left_out = f" {lost:.0%} of the ratios are left out: their step is below {RESOLVED:g} of the state, rounding error."
    return (
        "How the steps of a token's state shrink or grow from round to round. Up: length of a round's step over that "
        "of the round before, a factor per round; right: round. The line is the median over tokens, the band holds 90% "
        "of them. Below the dotted line at 1 the loop settles, above it the steps grow. The dashed line stands at the "
        f"last round of training, {loop.trained}: what is right of it the model was never trained to do."
        f"{left_out if lost else ''} It does not say where the state settles, nor that a settled state predicts better."
    )


def _tokens(measured: Measured) -> str:
    same = float(np.mean(np.isnan(measured.moves)))
    repeats = (
        f" At {same:.1%} of the positions the distance is 0 to rounding, as where a window starts with one token over "
        "and over: they are left out."
    )
    return (
        "How far the last stage's state moves from each token to the next. Up: natural logarithm of the distance "
        "between neighbouring tokens' states over the mean length of a state (no unit); right: position in the window, "
        f"in tokens. {BAND} The dashed line is the least-squares fit, and its slope, per token, the token contraction: "
        "falling, a sequence settles as it is read; rising, it becomes more restless. It does not say that a change "
        "fades (that is the exponent along tokens), and text that becomes harder moves the curve too."
        f"{repeats if same else ''}"
    )


def _drive(measured: Measured) -> str:
    said = []
    if measured.loop is not None:
        said.append(
            "Drive ratio: length of the drive over the sum of its length and that of the groups' update, a share per "
            "round from 0 (only the groups speak) to 1 (only the input does)."
        )
    if measured.departures:
        said.append(
            "Departure: distance of the last stage's state from that of the same model with its "
            f"{' or its '.join(measured.departures)} off, in lengths of the latter: 0 says that nothing hangs on it."
        )
    return (
        f"{' '.join(said)} Right: position in the window, in tokens. {BAND} It does not say how much worse the model "
        "would predict, or how it would do if it had been trained that way."
    )


def _traffic(measured: Measured) -> str:
    return (
        "Who talks to whom, how loudly, one map a stage, all on one colour scale. Row: the group that listens; column: "
        "the group that speaks. Colour: root mean square, over tokens and the listener's neurons, of what arrives by "
        "messages through all synapses of the stage, in units of the signal. The diagonal is what a group sends itself "
        "by messages; what its neurons say to each other directly is not drawn. A bright column is a group that many "
        "hear, a bright row one that hears much. It does not say that what is loud is of use."
    )


def _paths(measured: Measured) -> str:
    assert measured.loop is not None
    loop = measured.loop
    return (
        "Where the states of a few tokens of the first sequence go over rounds, in the plane of the two directions in "
        "which these states differ most; both axes in units of the signal, with the share of variance that each shows. "
        f"Hollow: before the loop; filled: after the last round of training, {loop.trained}; dots: each round up to "
        f"{loop.followed}. Dots that come together have settled; paths that run on have not. It does not show "
        "the other directions: paths that cross here need not meet."
    )


def _bounds(measured: Measured) -> str:
    return (
        "The most that each synapse of each stage can stretch the difference of two signals that it is given, a factor "
        "of lengths: an upper bound of the spectral norm of its weights, from the neurons' states alone, true for "
        "every input. A stage of the loop acts with the same synapses in each round. Small numbers cannot blow a "
        "difference up. Large ones only say that they might: real signals need not lie that way, and the norm and the "
        "attention around a synapse are not in the number."
    )


CAPTIONS: dict[str, Callable[[Measured], str]] = {
    "spectrum": _spectrum,
    "rounds": _rounds,
    "tokens": _tokens,
    "drive": _drive,
    "traffic": _traffic,
    "paths": _paths,
    "bounds": _bounds,
}
