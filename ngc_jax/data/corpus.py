"""Where text comes from: this Python's library source, a user's files, or a prepared TFDS set.

For: one corpus of documents by split, whatever it is from; the library's source and TFDS sets. Not
for: a user's files (`texts.py`), tokens or batches.
"""

import hashlib
import os
import pathlib
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from ngc_jax.data import stored
from ngc_jax.data.cache import entry
from ngc_jax.data.unprepared import Span
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import amount

# Tests and `encodings` (tables) are left out: they repeat themselves and would flatter the loss.
SKIPPED = {"test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}
SKIPPED |= {"site-packages", "dist-packages"}

Documents = dict[str, list[tuple[str, bytes]]]  # split -> (name, text)


class Corpus(NamedTuple):
    """Documents by split, read lazily, and what identifies them."""

    fingerprint: str  # sha256, hex: equal fingerprints are equal texts
    read: Callable[[], Iterator[tuple[str, Iterable[bytes]]]]  # ("train", a document's pieces), ...
    size: int  # bytes; 0: not known
    summary: str  # for the log and the card
    spans: Callable[[], list[Span]] | None = None  # to train on, where files are read in places


def library(cache: pathlib.Path) -> Corpus:
    """The source of this Python's library. Raises UserError where there is none."""
    return _keep("python_stdlib", stdlib_documents(), cache)


def stdlib_documents() -> Documents:
    """The source of this Python's library without duplicates, 10 MB; split by hashes of paths."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    documents: Documents = {"train": [], "validation": []}
    every = sorted(root.rglob("*.py"))
    paths = (p for p in every if not SKIPPED & {*p.relative_to(root).parts[:-1]})
    for name, text in _unique(root, paths):
        documents["validation" if _hash(name) % 20 == 0 else "train"].append((name, text))
    if not all(documents.values()):
        none = f"this Python ships no library source under {root}"
        raise UserError(f"{none}: give a text of your own with data.path")
    return documents


def _unique(root: pathlib.Path, paths: Iterable[pathlib.Path]) -> Iterator[tuple[str, bytes]]:
    seen = set()
    for path in paths:
        text = path.read_bytes()
        digest = hashlib.sha256(text).digest()
        if digest not in seen:
            seen.add(digest)
            # A name that is not UTF-8 is spelt with escapes.
            name = os.fsencode(path.relative_to(root).as_posix())
            yield name.decode(errors="backslashreplace"), text


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def _read(
    splits: Mapping[str, Callable[[], Iterable[Any]]], key: str
) -> Iterator[tuple[str, Iterable[bytes]]]:
    """The texts of one feature, by split, in the order in which TFDS stored them."""
    for split, examples in splits.items():
        for example in examples():
            text = example[key]
            yield split, [text.encode() if isinstance(text, str) else text]


def _keep(name: str, documents: Documents, cache: pathlib.Path) -> Corpus:
    """Writes the documents once as a TFDS set of ArrayRecord files, named by fingerprint."""

    def write(home: pathlib.Path) -> None:
        kept = {
            split: [(key, {"name": key, "text": text}) for key, text in texts]
            for split, texts in documents.items()
        }
        stored.write(name, lambda kind: {"name": kind.Text(), "text": kind.Text()}, kept, home)

    digest, sizes, total = hashlib.sha256(), [], 0
    for split, texts in documents.items():
        size = sum(len(text) for _, text in texts)
        sizes.append(f"{split} {len(texts)} files {amount(size, 'B')}")
        total += size
        for key, text in texts:
            digest.update(f"{split}\0{key}\0{hashlib.sha256(text).hexdigest()}\n".encode())
    fingerprint = digest.hexdigest()
    home = entry(cache, f"{name}-{fingerprint[:16]}", write)
    told = f"{name} {platform.python_version()}: {', '.join(sizes)}"
    # opened when they are read: a run whose tokens are cached needs no TFDS
    opened = {split: partial(stored.read, home, split) for split in documents}
    about = f"{told}, fingerprint {fingerprint[:16]}"
    return Corpus(fingerprint, partial(_read, opened, "text"), total, about)


def prepared(config: Any) -> Corpus:
    """A prepared TFDS set by name; splits and the text's key are fields of `config.data`."""
    splits = {split: config[f"{split}_split"] for split in ("train", "validation")}
    try:
        builder = stored.open_set(stored.find_set(config.tfds_name, config.tfds_data_dir))
        info, name, key = builder.info, builder.info.full_name, config.text_key
        for split, wanted in splits.items():
            if re.split(r"[\[+]", wanted)[0] not in info.splits:
                there = sorted(info.splits)
                raise UserError(f"data.{split}_split={wanted!r}: {name} has {there}")
        kinds = {feature: type(of).__name__ for feature, of in info.features.items()}
        if kinds.get(key) != "Text":
            raise UserError(f"data.text_key={key!r} is no text feature of {name}: {sorted(kinds)}")
        counts = {split: len(builder.as_data_source(wanted)) for split, wanted in splits.items()}
    except UserError:
        raise
    except Exception as error:  # whatever TFDS raises for what it reads
        given = f", data_dir={config.tfds_data_dir!r}" if config.tfds_data_dir else ""
        made = f"tfds.builder({config.tfds_name!r}, file_format='array_record'{given})"
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"data.tfds_name={config.tfds_name!r} is not prepared as ArrayRecord, which is read "
            f"without TensorFlow: prepare it once with {made}.download_and_prepare() ({line})"
        ) from error
    parts = sorted(info.splits.items())
    sizes = (f"{part}:{list(of.shard_lengths)}:{of.num_bytes}" for part, of in parts)
    identity = " ".join([name, *splits.values(), key, *sizes])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    documents = ", ".join(f"{split} {count} documents" for split, count in counts.items())
    opened = {split: partial(builder.as_data_source, of) for split, of in splits.items()}
    about = f"{name}: {documents}, fingerprint {fingerprint[:16]}"
    return Corpus(fingerprint, partial(_read, opened, key), 0, about)
