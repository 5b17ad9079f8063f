"""The sentences of the stability page: the meaning of each headline number, and the captions.

For: what is drawn, the axes with units, how to read it, and what it does not show. Not for: the
order of the page (`page.py`).
"""

import math

import numpy as np

from ngc_jax.analysis.stability import RESOLVED, Headline, Measured
from ngc_jax.dynamics.lyapunov import unresolved

BAND = "The band is the 95% interval of the mean over sequences (bootstrap)."
POSITION = "Horizontal axis: position in the window, in tokens."


def meaning(row: Headline) -> str:
    """What a headline number means, in one or two sentences."""
    if not math.isfinite(row.mean):
        return "Not finite: the state, or its direction, became infinite or undefined."
    unclear = row.low <= 0 <= row.high  # whether a logarithm may be 0
    match row.kind:
        case "exponent":
            factor = math.exp(row.mean)
            growth = f"is {factor:.3f}: the change {'grows' if row.mean > 0 else 'shrinks'}"
            if unclear:
                growth = f"is not significantly different from 1 (factor {factor:.3f})"
            whose = f"A small change of all states is multiplied {row.unit}. The factor"
            if row.unit == "per token":
                whose = (
                    "A small change of the first token changes later tokens. The factor of that "
                    "effect from one token to the next"
                )
            return f"{whose} {growth}."
        case "contraction":
            grows = "steps grow" if row.low > 1 else "no significant change"
            shrinks = "steps shrink" if row.high < 1 else grows
            than = "times as far as the previous round"
            return f"Each round moves a token's state {row.mean:.3f} {than}: {shrinks}."
        case "drive ratio":
            share = f"{row.mean:.0%} of what a round adds to the state, by length"
            return f"{share}, is the drive (the loop's input). The rest comes from the groups."
        case "boundedness":
            times = f"{row.mean:.2f} times its initial length"
            return f"The largest length of a token's state is {times}."
        case "departure":
            other = f"Without {row.where.split()[0]}, the last stage has another state."
            return f"{other} The distance is {row.mean:.2f} times the length of that state."
        case "token contraction":
            change = f"changes by {math.expm1(row.mean):+.2%}"
            change = "does not change significantly" if unclear else change
            return f"The distance between states of neighbouring tokens {change} with each token."
        case "Kaplan-Yorke dimension":
            if row.mean >= int("".join(filter(str.isdigit, row.unit))) - 0.01:
                return "The measured directions together do not shrink: this or more."
            return "The directions in which a cloud of close states keeps its size; 0: a point."
        case "entropy rate":
            rate = "the information that the loop itself would create, at most, at this rate"
            return f"The sum of the measured positive exponents: {rate}."
    raise KeyError(row.kind)


NUMBERS = (
    "Means over sequences, each with its 95% interval below (bootstrap over sequences): for other "
    "text of this kind and this one trained model. Other seeds of training may differ by more."
)
BOUNDS = (
    "The largest factor by which each synapse of each stage can multiply the difference of two "
    "inputs, a factor of lengths: an upper bound of the spectral norm of the weights, for every "
    "input. A stage of the loop uses the same synapses in each round. A small number excludes "
    "large growth; a large one can only say that growth is possible. Normalization and attention "
    "around a synapse are not included."
)


def spectrum(measured: Measured) -> str:
    loop, along, later = measured.loop, "depth (all stages, rounds included) and along tokens", ""
    if loop is not None:
        along = f"rounds, along {along}"
        later = (
            f" The loop is followed to round {loop.followed}; the second series leaves out the "
            f"first {loop.dropped}, in which changes turn to the directions of largest growth."
        )
    found = np.concatenate([measured.depth] + ([loop.start, loop.exponents] if loop else []))
    small = float(np.mean(unresolved(found) | np.isinf(found)))
    if small:
        later += (
            f" {small:.0%} of the exponents along rounds and depth are rounding error: float32 "
            "resolves none that is more than 10 nats below the largest. Those of minus infinity, "
            "of directions that are lost, are not drawn."
        )
    return (
        f"The {measured.depth.shape[1]} largest Lyapunov exponents along {along}. Vertical axis: "
        "natural logarithm of the factor by which a small change grows per round, per stage or "
        "per token. Horizontal axis: index of the exponent. Bars: 95% intervals over sequences "
        f"(bootstrap).{later} Above 0 changes grow, below 0 they decay, each exponent in a "
        "direction of its own. The figure does not say that growth is harmful: a model must "
        "separate its inputs. It does not describe large changes. Over few steps changes have not "
        "yet turned to the direction of largest growth, so these rates are no limits."
    )


def rounds(measured: Measured) -> str:
    assert measured.loop is not None
    lost = float(np.mean(np.isnan(measured.loop.contraction)))
    left_out = f" {lost:.0%} of the ratios are left out: a step below {RESOLVED:g} of the state."
    return (
        "Contraction of a token's state by round. Vertical axis: length of a round's step over "
        "the length of the previous step, a factor per round. Horizontal axis: round. The line is "
        "the median over tokens, the band holds 90% of them. Below the dotted line at 1 steps "
        "shrink, above it they grow. The dashed line is the last round of training, "
        f"{measured.loop.trained}.{left_out if lost else ''} The figure does not say where the "
        "state converges, or that a converged state predicts better."
    )


def tokens(measured: Measured) -> str:
    same = float(np.mean(np.isnan(measured.moves)))
    repeats = f" {same:.1%} of the positions are left out: repeated tokens, whose distance is 0."
    return (
        "Distance of the last stage's state between neighbouring tokens. Vertical axis: natural "
        "logarithm of the distance, relative to the mean length of a state (no unit). "
        f"{POSITION} {BAND} The dashed line is the least-squares fit. Its slope, per token, is the "
        "token contraction: below 0 states of neighbours approach each other, above 0 they "
        "separate. The figure does not say that a change decays: the exponent along tokens does. "
        f"Text that becomes harder also moves the curve.{repeats if same else ''}"
    )


def drive(measured: Measured) -> str:
    ratio = (
        "Drive ratio: length of the drive over the sum of its length and the length of the "
        "groups' update, a fraction per round. At 0 only the groups act, at 1 only the input. "
    )
    parts = (
        "Departure: distance of the last stage's state from that of the same model with "
        f"{' or '.join(measured.departures)} off, over the length of the latter; 0: no effect. "
    )
    said = ratio * (measured.loop is not None) + parts * bool(measured.departures)
    return (
        f"{said}{POSITION} {BAND} The figure does not say how much worse the model would predict, "
        "or what training without that part would give."
    )


def traffic(_: Measured) -> str:
    return (
        "Messages between groups: one map for each stage, all on one colour scale. Row: the "
        "receiving group. Column: the sending group. Colour: root mean square of what arrives by "
        "messages, over tokens, the receiver's neurons and all synapses of the stage, in units of "
        "the signal. The diagonal is what a group sends itself by messages; direct connections "
        "inside a group are not drawn. The figure does not say that a large message is useful."
    )


def paths(measured: Measured) -> str:
    assert measured.loop is not None
    return (
        "States of a few tokens of the first sequence over rounds, in the plane of the two "
        "directions in which they differ most. Both axes are in units of the signal and name their "
        "fraction of the variance. Hollow mark: before the loop. Filled mark: after the last round "
        f"of training, {measured.loop.trained}. Dots: each round up to {measured.loop.followed}; "
        "where they come together they have converged. The figure does not show the other "
        "directions: paths that cross here need not meet."
    )
