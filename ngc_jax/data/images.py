"""Images as examples: normalised, held out by seed, and varied in training.

For: `load_images`, `Images`, and `Varied`, whose changes follow from seed, step and row. Not for:
files (`image_files.py`), or patches (`nn/vision.py`). Axes: N images, S pixels a side, C colours.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from ngc_jax.data.batches import Batch
from ngc_jax.data.image_files import Fit, Found, Part, read_images
from ngc_jax.data.tokenizer import Labels
from ngc_jax.runtime.errors import UserError

HELD = ("validation", "test")  # parts that are held out, the first that there is


class Variation(NamedTuple):
    """What training changes in an image; fields of `config.data`."""

    flip: bool = False
    shift: int = 0
    crop: float = 1.0
    cutout: int = 0
    mixup: float = 0.0


class Images:
    """Images as examples: inputs float32 [S, S, C] by the labels' normalisation, targets [1]."""

    def __init__(self, part: Part, labels: Labels):
        self.part, self.labels = part, labels

    def __len__(self) -> int:
        return len(self.part.labels)

    def __getitem__(self, index: int) -> Batch:
        index = int(index)
        return Batch(self.labels.normalise(self.part.pixels[index]), self.part.labels[index, None])


class Varied(Images):
    """Images that differ each time that they are trained on."""

    def __init__(self, part: Part, labels: Labels, how: Variation):
        super().__init__(part, labels)
        self.how = how

    def vary(self, example: Batch, rng: Generator) -> Batch:
        """The example flipped, shifted, cut, with a hole in it, and mixed with another one.

        mixup (arXiv 1710.09412): x = a x + (1 - a) x', a of Beta(mixup, mixup). The target is that
        of x in a share a of draws, else that of x': in the mean this is the mixture of both losses.
        """
        x, target = self._changed(example.inputs, rng), example.targets
        if self.how.mixup:
            share = np.float32(rng.beta(self.how.mixup, self.how.mixup))
            other = self[int(rng.integers(len(self)))]
            x = share * x + (1 - share) * self._changed(other.inputs, rng)
            target = target if rng.random() < share else other.targets
        return Batch(x, target)

    def _changed(self, x: np.ndarray, rng: Generator) -> np.ndarray:
        how, size = self.how, len(x)
        flip = how.flip and rng.random() < 0.5
        if flip or how.shift or how.crop < 1:
            side = size * rng.uniform(how.crop, 1)
            starts = rng.uniform(0, size - side, 2) + rng.integers(-how.shift, how.shift + 1, 2)
            x = resampled(x, starts, side, flip, self.labels.normalise(np.zeros(1, np.uint8)))
        if how.cutout:  # arXiv 1708.04552: a square of the mean, whose middle may be anywhere
            top, left = rng.integers(0, size, 2) - how.cutout // 2
            x = x.copy()
            x[max(0, top) : top + how.cutout, max(0, left) : left + how.cutout] = 0
        return x


def resampled(
    x: np.ndarray, starts: np.ndarray, side: float, flip: bool, outside: np.ndarray
) -> np.ndarray:
    """The square of x [S, S, C] from `starts` on, `side` pixels wide, scaled to S by bilinear
    weights; beyond the edges there is `outside` [C]. Whole shifts copy exactly.
    """
    size = len(x)
    at = np.asarray(starts)[:, None] + (np.arange(size) + 0.5) * (side / size) - 0.5
    near = np.clip(at, 0, size - 1)
    at = np.where(abs(at - near) < 0.5, near, at)  # inside of the outermost pixel
    rows, columns = np.maximum(0, 1 - abs(at[..., None] - np.arange(size))).astype(np.float32)
    columns = columns[::-1] if flip else columns
    moved = (rows @ (x - outside).reshape(size, -1)).reshape(x.shape)
    return columns @ moved + outside


def load_images(config: Any) -> tuple[Labels, Images, Images, str, str]:
    """The labels, training and held-out images, fingerprint and summary of `config.data`."""
    fit = Fit(config.image_size, config.colours, config.resize)
    found = read_images(config, config.path, fit)
    train, held, how = _split(config, found, fit)
    labels = Labels(found.names, *moments(train.pixels))
    digest = hashlib.sha256(repr((found.names, train.pixels.shape, held.pixels.shape)).encode())
    for array in (*train, *held):
        digest.update(np.ascontiguousarray(array).data)
    of = config.path or config.tfds_name or "digits of scikit-learn"
    size = f"{config.image_size} x {config.image_size} x {config.colours}"
    told = f"{of}: train {len(train.labels):,}, validation {len(held.labels):,} images of {size} "
    told += f"({how}), {len(found.names)} classes" + f"; {fit.told}" * bool(fit.told)
    told += f", fingerprint {digest.hexdigest()[:16]}"
    varies = Variation(*(config[name] for name in Variation._fields))
    images = Images(train, labels)
    images = Varied(train, labels, varies) if varies != Variation() else images
    return labels, images, Images(held, labels), digest.hexdigest(), told


def moments(pixels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each colour of pixels [N, S, S, C], 1 where all are equal."""
    counts = [np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(pixels.shape[-1])]
    levels = np.arange(256) / 255
    means = [float(np.average(levels, weights=count)) for count in counts]
    pairs = zip(means, counts, strict=True)
    spreads = [float(np.average((levels - m) ** 2, weights=c)) ** 0.5 or 1.0 for m, c in pairs]
    return tuple(means), tuple(spreads)


def _split(config: Any, found: Found, fit: Fit) -> tuple[Part, Part, str]:
    """The part to train on, that to hold out, and how it was chosen."""
    parts = dict(found.parts)
    train = parts.pop("train", None) or parts.pop("", None)
    if train is None:
        raise UserError(f"data.path={config.path!r}: has {', '.join(parts)} alone: give 'train'")
    if config.validation_path:
        other = read_images(config, config.validation_path, fit)
        if unknown := sorted({*other.names} - {*found.names}):
            of = f"data.validation_path={config.validation_path!r}"
            raise UserError(f"{of}: must have classes of data.path, not {', '.join(unknown[:9])}")
        pixels, labels = next(other.parts[n] for n in (*HELD, "", "train") if n in other.parts)
        numbers = np.array([found.names.index(name) for name in other.names], np.int32)
        return train, Part(pixels, numbers[labels]), "given"
    for name in HELD:
        if name in parts:
            return train, parts[name], f"its part {name!r}"
    count = len(train.labels)
    held = max(1, round(config.validation_fraction * count))
    if held >= count:
        raise UserError(f"data.path={config.path!r}: has {count} image: give 2 or more")
    order = np.random.default_rng(config.split_seed).permutation(count)
    chosen = np.sort(order[:held]), np.sort(order[held:])
    held_out, rest = (Part(train.pixels[i], train.labels[i]) for i in chosen)
    return rest, held_out, f"drawn by seed {config.split_seed}"
