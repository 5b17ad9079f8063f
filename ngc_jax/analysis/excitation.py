"""What excites a unit: the tokens of a text that do so most, and the classes of tokens it selects.

For: one pass over any number of windows, in memory that does not grow with them. Not for: what
units write, or what they are for (`lens.py`). Axes: U units, B sequences, T tokens, C classes.
"""

import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # scipy.stats is imported where it is used

from ngc_jax.analysis.lens import Unit, activity
from ngc_jax.data.batches import Batch
from ngc_jax.data.tokenizer import Tokenizer
from ngc_jax.nn.decoder import Decoder

Array = jax.Array
Params = dict[str, Any]
BEFORE, AFTER = 24, 8  # tokens that are kept around one that excites a unit
BINS = 256  # of a unit's activity, of equal count in the first batch
CLASSES = ["small letter", "capital", "digit", "blank", "line end", "bracket", "quote"]
CLASSES += ["other sign", "beyond ASCII", "no text"]


class Excitation(NamedTuple):
    """What was found of each unit, in the order in which units were given."""

    top: np.ndarray  # [U, K] the greatest activities, descending
    context: np.ndarray  # [U, K, BEFORE + 1 + AFTER] those and tokens around; -1: none
    auroc: np.ndarray  # [U, C] chance that a token of the class excites it more than another one
    error: np.ndarray  # [U, C] standard error of that (Hanley and McNeil 1982)
    counts: np.ndarray  # [C] tokens of each class

    def selected(self, level: float = 0.05) -> np.ndarray:
        """Whether a class is told from chance, corrected for all units and classes: [U, C] bool."""
        z = scipy.stats.norm.isf(level / 2 / max(1, self.auroc.size))
        return np.abs(self.auroc - 0.5) > z * self.error


def class_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The class, by its number in CLASSES, of each token as text; of words, of their first letter.

    Blanks in front of a word do not count.
    """

    def of(raw: bytes) -> str:
        text = raw.decode(errors="replace")
        bare = text.strip()
        if not raw:
            return "no text"
        if not bare:
            return "line end" if "\n" in text else "blank"
        first = bare[0]
        if not first.isascii():
            return "beyond ASCII"
        kinds = {"capital": first.isupper(), "small letter": first.islower() or first == "_"}
        kinds |= {
            "digit": first.isdigit(),
            "bracket": first in "()[]{}<>",
            "quote": first in "\"'`",
        }
        return next((name for name, there in kinds.items() if there), "other sign")

    spelt = (tokenizer.decode([token]) for token in range(tokenizer.vocab))
    return np.array([CLASSES.index(of(raw)) for raw in spelt])


def loudness(model: Decoder, params: Params, units: list[Unit], batch: Batch) -> Array:
    """How active each unit is: a neuron's activity, or several's root mean square: [U, B, T]."""
    found, made = activity(model, params, batch), []
    for (place, site, count), of in itertools.groupby(units, lambda u: (u.place, u.site, u.size)):
        firsts = np.array([unit.first for unit in of])
        own = found[place, site][..., firsts[:, None] + np.arange(count)]  # [B, T, units, count]
        root = jnp.sqrt(jnp.mean(jnp.square(own), axis=-1))
        made.append(jnp.moveaxis(own[..., 0] if count == 1 else root, -1, 0))
    return jnp.concatenate(made).astype(jnp.float32)


def excitation(
    model: Decoder,
    params: Params,
    units: list[Unit],
    batches: Iterable[tuple[Batch, np.ndarray]],
    classes: np.ndarray,
    most: int = 8,
) -> Excitation:
    """Of batches and whether each of their windows counts: the `most` exciting tokens, and AUROCs.

    classes [V]: that of each token, by number. Areas are of activities in BINS bins, ties half.
    """
    loud = jax.jit(partial(loudness, model, units=units))
    place = jax.jit(jax.vmap(partial(jnp.searchsorted, side="right")))
    number, edges = int(classes.max()) + 1, None
    top = np.full((len(units), most), -np.inf, np.float32)
    context = np.full((len(units), most, BEFORE + 1 + AFTER), -1, np.int32)
    counts = np.zeros((len(units), BINS, number), np.int64)
    for batch, real in batches:
        tokens = np.asarray(batch.inputs)
        read = np.repeat(np.asarray(real, bool), tokens.shape[1])
        values = np.asarray(loud(params=params, batch=batch)).reshape(len(units), -1)[:, read]
        if edges is None:
            shares = np.linspace(0, 1, BINS + 1)[1:-1]
            edges = np.quantile(values, shares, axis=1).T.astype(np.float32)
        bins = np.asarray(place(edges, values))
        kind = classes[tokens.reshape(-1)[read]]
        for unit, own in enumerate(bins):
            found = np.bincount(own * number + kind, minlength=BINS * number)
            counts[unit] += found.reshape(BINS, number)
        both = np.concatenate([top, values], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :most]
        wide = np.pad(tokens, ((0, 0), (BEFORE, AFTER)), constant_values=-1)
        around = np.lib.stride_tricks.sliding_window_view(wide, BEFORE + 1 + AFTER, axis=1)
        at = np.flatnonzero(read)[np.maximum(order - most, 0)]
        new = around[at // tokens.shape[1], at % tokens.shape[1]]
        old = np.take_along_axis(context, np.minimum(order, most - 1)[..., None], axis=1)
        context = np.where((order < most)[..., None], old, new)
        top = np.take_along_axis(both, order, axis=1)
    auroc, error = _areas(counts)
    return Excitation(top, context, auroc, error, counts[0].sum(0))


def _areas(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas under the curves of classes, of counts [U, bins, C], and their standard errors."""
    own = counts.astype(np.float64)
    other = own.sum(-1, keepdims=True) - own
    below = np.cumsum(other, axis=1) - other / 2
    n, m = own.sum(1), other.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (own * below).sum(1) / (n * m)
        one, two = area / (2 - area), 2 * area**2 / (1 + area)
        squares = area * (1 - area) + (n - 1) * (one - area**2) + (m - 1) * (two - area**2)
        error = np.sqrt(squares / (n * m))
    none = (n == 0) | (m == 0)  # a class without tokens, or of all
    return np.where(none, 0.5, area), np.where(none, np.inf, error)
