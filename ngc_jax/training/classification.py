"""How good a model of images is: accuracy, calibration, and what it takes for what.

For: the measures of `ngc evaluate`, from probabilities and classes, in NumPy. Not for: the loss in
training (`evaluation.py`). Axes: N images, V classes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.data.batches import Examples, held_out_batches
from ngc_jax.training.rounds import Apply
from ngc_jax.training.step import predict

BINS = 15  # of confidence


class Predicted(NamedTuple):
    """What a model says of images, and what they are."""

    probabilities: np.ndarray  # [N, V]
    classes: np.ndarray  # [N]

    @property
    def chosen(self) -> np.ndarray:
        """The likeliest class of each [N]."""
        return np.argmax(self.probabilities, axis=-1)


def predictions(
    apply: Apply, params: Any, examples: Examples, dtype: str, batch_size: int, limit: int = 0
) -> Predicted:
    """What apply(params, batch), computed in a dtype, says of all examples, or `limit` of them."""

    @partial(jax.jit, static_argnums=0)
    def one(apply: Apply, params: Any, batch: Any) -> jax.Array:
        return jax.nn.softmax(predict(apply, params, batch, jnp.dtype(dtype))[0][:, 0])

    found, classes = [], []
    for batch, real in held_out_batches(examples, batch_size=batch_size, limit=limit):
        found.append(np.asarray(one(apply, params, batch))[real])
        classes.append(batch.targets[real, 0])
    return Predicted(np.concatenate(found), np.concatenate(classes))


def negative_log_likelihood(of: Predicted) -> float:
    """Mean nats of the right class."""
    right = np.take_along_axis(of.probabilities, of.classes[:, None], axis=1)
    return float(-np.mean(np.log(np.maximum(right, 1e-38))))


def calibration_error(of: Predicted) -> float:
    """Expected calibration error (arXiv 1706.04599): |accuracy - confidence|, mean over images.

    Both are means over the images of a bin; bins are equally wide in confidence.
    """
    confidence, right = of.probabilities.max(axis=1), of.chosen == of.classes
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    off = np.bincount(bins, right - confidence.astype(np.float64), BINS)
    return float(np.sum(abs(off)) / len(right))


def confusion(of: Predicted) -> np.ndarray:
    """How often each class was taken for each: [V right, V chosen]."""
    size = of.probabilities.shape[1]
    return np.bincount(of.classes * size + of.chosen, minlength=size * size).reshape(size, size)
