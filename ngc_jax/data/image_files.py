"""Images with their classes, read from files into arrays of bytes.

For: `read_images`: .npz, .npy, IDX (as MNIST is kept), CIFAR's binary files, folders of class
folders, TFDS sets, and the digits of scikit-learn. `Fit` brings all to one size, and counts what it
converts or leaves out. Not for: what a model sees (`images.py`). Axes: N images, S pixels a side, C
colours.
"""

import gzip
import importlib.metadata
import math
import pathlib
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ngc_jax.data import stored
from ngc_jax.runtime.errors import UserError, plain
from ngc_jax.runtime.files import expand

# what an array or a folder is called -> its part
PARTS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
PARTS |= {"dev": "validation", "test": "test", "t10k": "test"}
ROLES = {"images": "x images image data", "labels": "y labels label targets"}
IDX = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}  # its code of a type
CIFAR = {  # names of files -> bytes before an image, of which the last is its class; names of those
    r"(data|test)_batch(_\d)?": (1, "batches.meta.txt"),
    r"train|test": (2, "fine_label_names.txt"),
}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # that Pillow may open
NAMED = 3  # files of a fault that are named
Arrays = Mapping[str, np.ndarray]


class Part(NamedTuple):
    """Images and the number of each one's class."""

    pixels: np.ndarray  # uint8 [N, S, S, C]
    labels: np.ndarray  # int32 [N]


class Found(NamedTuple):
    """The parts of a set by name, "" where it has one without a name; the classes' names."""

    parts: dict[str, Part]
    names: tuple[str, ...]


class Fit:
    """Brings images to bytes of one size and so many colours; counts what that took.

    resize: whether an image of another size is scaled and its middle cut out, or refused.
    """

    def __init__(self, size: int, colours: int, resize: bool = False):
        self.size, self.colours, self.resize = size, colours, resize
        self.counts, self.files = Counter[str](), dict[str, list[str]]()

    def note(self, what: str, count: int = 1, file: str = "") -> None:
        """Counts what was done, and keeps the names of the first files."""
        self.counts[what] += count
        self.files.setdefault(what, []).extend([plain(file)] * bool(file))

    @property
    def told(self) -> str:
        """What was counted: "2 damaged, left out (a.png, b.png)"; "" where nothing was."""
        parts = []
        for what, count in self.counts.items():
            files = self.files[what]
            named = ", ".join(files[:NAMED]) + ", ..." * (len(files) > NAMED)
            parts.append(f"{count:,} {what}" + f" ({named})" * bool(files))
        return "; ".join(parts)

    def many(self, images: np.ndarray, of: str) -> np.ndarray:
        """uint8 [N, S, S, C] of images [N, H, W] or [N, H, W, C] of any type. Raises UserError."""
        images = images[..., None] if images.ndim == 3 else images
        if images.ndim != 4 or not images.size or images.shape[-1] not in (1, 3):
            wants = "must be [images, rows, columns] or [images, rows, columns, 1 or 3]"
            raise UserError(f"{of}: shape {[*images.shape]} of its images {wants}")
        images = self._bytes(images, of)
        height, width, colours = images.shape[1:]
        if (height, width) != (self.size, self.size):
            self.refuse(len(images), width, height, of)
            images = np.stack([self._scaled(_pillow().fromarray(_flat(image))) for image in images])
        if colours == self.colours:
            return images
        self.note("in grey made RGB" if colours == 1 else "in RGB made grey", len(images))
        if colours == 1:
            return np.repeat(images, 3, axis=-1)
        return np.round(images @ np.array([[0.299], [0.587], [0.114]])).astype(np.uint8)  # BT.601

    def refuse(self, count: int, width: int, height: int, of: str) -> None:
        """Counts images of another size. Raises UserError unless they may be scaled."""
        if not self.resize:
            wants = f"must be {self.size} x {self.size}, as data.image_size={self.size}"
            side = f"data.image_size={width}, or " if width == height else ""
            mend = f"give {side}data.resize=True, which scales and cuts"
            raise UserError(f"{of}: {count:,} of {width} x {height} pixels {wants}: {mend}")
        self.note(f"scaled to {self.size} x {self.size}", count)

    def file(self, path: pathlib.Path) -> np.ndarray | None:
        """uint8 [S, S, C] of an image file; None, and counted, where it is empty or damaged."""
        if not path.stat().st_size:
            self.note("empty, left out", file=path.name)
            return None
        pillow = _pillow()
        from PIL import ImageOps

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pillow.DecompressionBombWarning)
                with pillow.open(path, formats=FORMATS) as opened:
                    image = ImageOps.exif_transpose(opened)  # as a camera says it was held
            if image.mode.startswith(("I", "F")):
                image = pillow.fromarray(self._bytes(_wide(image), path.name))
        except Exception:  # whatever Pillow raises for what it reads
            self.note("damaged, left out", file=path.name)
            return None
        image = image.convert("L" if self.colours == 1 else "RGB")
        if image.size != (self.size, self.size):
            self.refuse(1, *image.size, str(path))
        return self._scaled(image)

    def _scaled(self, image: Any) -> np.ndarray:
        from PIL import ImageOps

        fitted = ImageOps.fit(image, (self.size, self.size), _pillow().Resampling.BILINEAR)
        return np.asarray(fitted).reshape(self.size, self.size, -1)

    def _bytes(self, images: np.ndarray, of: str) -> np.ndarray:
        """Brightness in bytes: uint16 is 16 bits; others go up to 1 (real ones), 255 or 65,535."""
        if images.dtype == np.uint8:
            return images
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 65_535):
            wants = "must be from 0 to 1, to 255, or to 65,535 (16 bits)"
            raise UserError(f"{of}: brightness from {low:g} to {high:g} {wants}")
        wide = images.dtype == np.uint16 or high > 255
        real = images.dtype.kind in "fb" and high <= 1
        count = len(images) if images.ndim > 2 else 1
        self.note(f"of {'16 bits' if wide else images.dtype.name} made bytes", count)
        scale = 1 / 257 if wide else 255 if real else 1
        return np.round(images * scale).astype(np.uint8)


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        needs = "files of images, and data.resize, need Pillow"
        raise UserError(f"{needs}: pip install 'ngc_jax[vision]'") from error
    return PIL.Image


def _wide(image: Any) -> np.ndarray:
    """Brightness of 16 bits, [H, W]. Raises ValueError for other numbers than whole ones."""
    found = np.asarray(image)
    if found.dtype.kind not in "iu" or found.min() < 0 or found.max() > 65_535:
        raise ValueError("no brightness of 16 bits")
    return found.astype(np.uint16)


def _flat(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.shape[-1] == 1 else image


def read_images(config: Any, path: str, fit: Fit) -> Found:
    """The images at a path; "": those that `config.data` names else. Raises UserError."""
    if not path:
        return _prepared(config, fit) if config.tfds_name else _digits(fit)
    place = expand(path)
    try:
        if place.suffix == ".npz":
            with np.load(place, allow_pickle=False) as held:
                return _of_arrays(dict(held), fit, path)
        inside = sorted(p for p in place.iterdir() if not p.name.startswith("."))
        for wanted, read in READERS.items():
            if files := [file for file in inside if re.fullmatch(wanted, file.name)]:
                found = read(files)
                return _of_arrays(found, fit, path, _names(place, files))
        return _of_folders(place, inside, fit)
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"the images of {path!r} cannot be read: {error}") from error


def _named(arrays: Arrays) -> dict[tuple[str, str], np.ndarray]:
    """Arrays by (part, role), as words of their names say; others are left out."""
    found = {}
    for name, array in arrays.items():
        words = re.split(r"[^a-z0-9]+", name.lower())
        part = next((PARTS[word] for word in words if word in PARTS), "")
        role = next((r for r, all_ in ROLES.items() for word in words if word in all_.split()), "")
        found[part, role] = array
    return found


def _of_arrays(arrays: Arrays, fit: Fit, of: str, names: tuple[str, ...] = ()) -> Found:
    """Parts from arrays such as x_train and y_train, or images and labels."""
    by, parts = _named(arrays), {}
    for part in dict.fromkeys(part for part, role in by if role == "images"):
        labels = np.asarray(by.get((part, "labels"), ()))
        labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
        pixels = fit.many(by[part, "images"], of)
        whole = labels.dtype.kind in "iu" and labels.ndim == 1 and len(labels) == len(pixels)
        if not whole or labels.min() < 0 or labels.max() >= 1 << 16:
            has = f"labels {part}: {labels.dtype} {[*labels.shape]}"
            raise UserError(f"{of}: {has} must be {len(pixels)} whole numbers from 0 on")
        parts[part] = Part(pixels, labels.astype(np.int32))
    if not parts:
        wants = "such as x_train and y_train, or images and labels"
        raise UserError(f"{of}: has arrays {', '.join(arrays)}: must have names {wants}")
    most = max(int(part.labels.max()) for part in parts.values()) + 1
    return Found(parts, names if len(names) >= most else tuple(map(str, range(most))))


def _idx(file: pathlib.Path) -> np.ndarray:
    """An array in IDX, packed by gzip or not."""
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    kind, axes = raw[2:4] if len(raw) > 4 else (0, 0)
    if raw[:2] != b"\0\0" or kind not in IDX or len(raw) < 4 + 4 * axes:
        raise ValueError(f"{file.name} is no IDX file")
    shape, begin = np.frombuffer(raw, ">u4", axes, 4).tolist(), 4 + 4 * axes
    if len(raw) - begin != math.prod(shape) * np.dtype(IDX[kind]).itemsize:
        raise ValueError(f"{file.name} is cut off: it has {len(raw):,} bytes for {shape}")
    return np.frombuffer(raw, IDX[kind], offset=begin).reshape(shape)


def _cifar(files: list[pathlib.Path]) -> Arrays:
    """The records of CIFAR-10 or CIFAR-100, with its 100 classes: classes, then planes of bytes."""
    found: dict[str, list[np.ndarray]] = {}
    for file in files:
        (leading,) = (n for name, (n, _) in CIFAR.items() if re.fullmatch(name, file.stem))
        raw = np.fromfile(file, np.uint8)
        if not len(raw) or len(raw) % (leading + 3072):
            raise ValueError(f"{file.name} is cut off: it has {len(raw):,} bytes")
        rows = raw.reshape(-1, leading + 3072)
        part = "test" if file.stem.startswith("test") else "train"
        planes = rows[:, leading:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        found.setdefault(f"{part}_images", []).append(planes)
        found.setdefault(f"{part}_labels", []).append(rows[:, leading - 1])
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _names(place: pathlib.Path, files: list[pathlib.Path]) -> tuple[str, ...]:
    """The names of CIFAR's classes, where they lie beside it."""
    kept = [name for word, (_, name) in CIFAR.items() if re.fullmatch(word, files[0].stem)]
    there = [place / name for name in kept if (place / name).is_file()]
    return tuple(there[0].read_text("utf-8").split()) if there else ()


# files in a folder -> arrays
READERS: dict[str, Callable[[list[pathlib.Path]], Arrays]] = {
    r".*idx\d.*": lambda files: {file.name: _idx(file) for file in files},
    rf"({'|'.join(CIFAR)})\.bin": _cifar,
    r".*\.npy": lambda files: {f.stem: np.load(f, allow_pickle=False) for f in files},
}


def _of_folders(place: pathlib.Path, inside: Iterable[pathlib.Path], fit: Fit) -> Found:
    """A folder for each class, or such in folders train, test and so on."""
    folders = [path for path in inside if path.is_dir()]
    parts = {PARTS[path.name]: path for path in folders if path.name in PARTS} or {"": place}
    classes = {
        part: sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        for part, path in parts.items()
    }
    names = sorted({path.name for paths in classes.values() for path in paths})
    found = {}
    for part, paths in classes.items():
        pixels, labels = [], []
        for path in paths:
            for file in sorted(p for p in path.iterdir() if not p.name.startswith(".")):
                if not file.resolve().is_relative_to(place.resolve()):
                    fit.note("links that lead out, left out", file=file.name)
                    continue
                image = fit.file(file) if file.is_file() else None
                if image is not None:
                    pixels.append(image)
                    labels.append(names.index(path.name))
        if not pixels:
            left = f" ({fit.told})" * bool(fit.told)
            wants = "must hold a folder of images for each class, or .npy, IDX or CIFAR's files"
            raise UserError(f"{parts[part]}: {wants}; no image was found{left}")
        found[part] = Part(np.stack(pixels), np.array(labels, np.int32))
    return Found(found, tuple(names))


def _prepared(config: Any, fit: Fit) -> Found:
    """A prepared TFDS set with features image and label."""
    name = f"data.tfds_name={config.tfds_name!r}"
    try:
        builder = stored.open_set(stored.find_set(config.tfds_name, config.tfds_data_dir))
        names = tuple(builder.info.features["label"].names)
        parts = {}
        for part in ("train", "validation"):
            rows = builder.as_data_source(config[f"{part}_split"])
            read = [(fit.many(row["image"][None], name)[0], row["label"]) for row in rows]
            parts[part] = Part(
                np.stack([image for image, _ in read]),
                np.array([label for _, label in read], np.int32),
            )
    except UserError:
        raise
    except Exception as error:  # whatever TFDS raises for what it reads
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        wants = "must be a set of images that is prepared as ArrayRecord, with features image and"
        splits = f"data.train_split={config.train_split!r} and data.validation_split"
        wants = f"{wants} label, and {splits}={config.validation_split!r} splits of it"
        raise UserError(f"{name}: {wants} ({line})") from error
    return Found(parts, names)


def _digits(fit: Fit) -> Found:
    """1,797 handwritten digits of 8 x 8 pixels (E. Alpaydin, C. Kaynak, 1998), of scikit-learn."""
    try:
        held = importlib.metadata.distribution("scikit-learn")
        file = pathlib.Path(str(held.locate_file("sklearn/datasets/data/digits.csv.gz")))
        rows = np.loadtxt(file, delimiter=",")  # importing scikit-learn takes a second
    except (ImportError, OSError) as error:
        needs = "data.path='' is the digits of scikit-learn, which is not installed"
        raise UserError(f"{needs}: pip install 'ngc_jax[vision]', or give data.path") from error
    images = np.round(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = rows[:, -1].astype(np.int32)
    return Found({"": Part(fit.many(images, "the digits"), labels)}, tuple("0123456789"))
