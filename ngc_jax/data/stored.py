"""TFDS datasets of our own: written once as ArrayRecord files, read without TensorFlow.

For: keeping what was prepared. Not for: preparing it (`corpus.py`, `problems.py`), or sets that
others prepared.
"""

import contextlib
import io
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any


def write(
    name: str,
    features: Mapping[str, Any],
    splits: Mapping[str, Iterable[tuple[str, Any]]],
    home: pathlib.Path,
) -> None:
    """Writes examples (key, {feature: value}) of each split; TFDS orders them by key hash."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():  # one process may keep several sets

        class Stored(tfds.core.GeneratorBasedBuilder):
            """Examples that were prepared before."""

            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(dict(features))
                )

            def _split_generators(self, dl_manager: Any) -> Any:
                return {
                    split: self._generate_examples(examples) for split, examples in splits.items()
                }

            def _generate_examples(self, examples: Iterable[tuple[str, Any]]) -> Any:
                yield from examples

    Stored.name = name
    tfds.disable_progress_bar()
    # two lines on a "download" that there is none of
    with contextlib.redirect_stdout(io.StringIO()):
        Stored(data_dir=str(home), file_format="array_record").download_and_prepare()


def read(home: pathlib.Path, split: str) -> Any:
    """A split as a sequence of examples, {feature: value} each."""
    import tensorflow_datasets as tfds  # late: a run whose tokens are cached never needs it

    (info,) = home.rglob("dataset_info.json")
    return tfds.builder_from_directory(str(info.parent)).as_data_source(split)
