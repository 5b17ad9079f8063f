"""TFDS sets in folders, ours and others': written as ArrayRecord, read without TensorFlow.

For: keeping what was prepared, and opening a folder, which must run no code and lead to no file
outside: not by its name in TFDS, which imports, and may ask the network. Not for: preparing it.
"""

import contextlib
import io
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ngc_jax.runtime.files import expand, inside, read_json

INFO, FEATURES = "dataset_info.json", "features.json"
LARGEST = 1 << 26  # bytes of a description
CLASSES = {"pythonClassName", "python_class_name", "type"}  # fields that name a class to import
PACKAGE = "tensorflow_datasets.core.features."
Splits = Mapping[str, Iterable[tuple[str, Any]]]  # examples (key, {feature: value}) of each


def write(name: str, features: Callable[[Any], Any], splits: Splits, home: pathlib.Path) -> None:
    """Writes a set; features(tfds.features) describes an example. TFDS orders by hash of key."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.dataset_builders.AdhocBuilder

    class Stored(builder, skip_registration=True):  # type: ignore[call-arg]
        def _split_generators(self, dl_manager: Any) -> Any:  # its own would import TensorFlow
            return {split: self._generate_examples_iterator(of) for split, of in splits.items()}

    tfds.disable_progress_bar()
    # two lines on a "download" that there is none of
    with contextlib.redirect_stdout(io.StringIO()):
        kind = tfds.features
        kept = {"features": kind.FeaturesDict(features(kind)), "split_datasets": splits}
        where = {"data_dir": str(home), "file_format": "array_record"}
        Stored(name=name, version="1.0.0", **kept, **where).download_and_prepare()


def read(home: pathlib.Path, split: str) -> Any:
    """A split of the one set in a folder as a sequence of examples, {feature: value} each."""
    (info,) = home.rglob(INFO)
    return open_set(info.parent).as_data_source(split)


def open_set(folder: pathlib.Path) -> Any:
    """The TFDS builder, read only, of a set. Raises OSError or ValueError where it is not sound."""
    import tensorflow_datasets as tfds  # late: a run whose tokens are cached never needs it

    inside(folder)  # raises OSError for a link
    info, features = read_json(folder / INFO, LARGEST), list[dict[str, Any]]()
    read_json(folder / FEATURES, LARGEST, features.append)  # each object in it
    fields = ("name", "version", "filepathTemplate", "filepath_template")
    paths = {str(part[f]) for part in (info, *info.get("splits", ())) for f in fields if f in part}
    for part in features:
        paths |= part.keys()
        for kind in (part[name] for name in CLASSES & part.keys()):
            if isinstance(kind, str) and not kind.startswith(PACKAGE):
                raise ValueError(f"{FEATURES} names code to import, {kind!r}")
    if outside := sorted(path for path in paths if "/" in path or "\0" in path):
        raise ValueError(f"it names a file elsewhere, {outside[0]!r}")
    return tfds.builder_from_directory(str(folder))


def find_set(name: str, home: str) -> pathlib.Path:
    """The folder of a set, HOME/SET[/CONFIG]/VERSION, of the newest. Raises OSError, ValueError."""
    import tensorflow_datasets as tfds

    found = re.fullmatch(r"(\w+(?:/\w[\w.+-]*)?)(?::(\d+\.\d+\.\d+))?", name)
    if not found:
        raise ValueError("a name is that of a folder, as in 'set', 'set/config' or 'set:1.0.0'")
    top = expand(home or tfds.core.constants.DATA_DIR).resolve()
    below = [*(top / found[1]).glob(f"*/{FEATURES}"), *(top / found[1]).glob(f"*/*/{FEATURES}")]
    folders = [path.parent for path in below if found[2] in (None, path.parent.name)]
    configs = {path.parent for path in folders}
    if len(configs) > 1:
        names = ", ".join(sorted(str(path.relative_to(top)) for path in configs))
        raise ValueError(f"it has several configs: give one of {names}")
    if not folders:
        raise FileNotFoundError(f"there is no {name} in {top}")
    folder = max(folders, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    if not folder.resolve().is_relative_to(top):
        raise ValueError(f"{folder} is a link that leads out of {top}")
    return folder
