"""Where text comes from: this Python's library source, a user's files, or a prepared TFDS set.

For: finding documents, splitting and keeping them (`stored.py`). Not for: tokens or batches.
"""

import hashlib
import os
import pathlib
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from ngc_jax.data import stored
from ngc_jax.data.cache import entry
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import expand

# Tests and `encodings` (tables) are left out: they repeat themselves and would flatter the loss.
SKIPPED = {"test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}
SKIPPED |= {"site-packages", "dist-packages"}

Documents = dict[str, list[tuple[str, bytes]]]  # split -> (name, text)


class Corpus(NamedTuple):
    """Documents by split, read lazily, and what identifies them."""

    fingerprint: str  # sha256, hex: equal fingerprints are equal texts
    splits: Mapping[str, Iterable[bytes]]  # "train", "validation"
    summary: str  # one line for the log and the card


def open_corpus(config: Any, cache: pathlib.Path) -> Corpus:
    """The corpus that `config.data` names. Raises UserError if it is missing or unreadable."""
    if config.path and config.tfds_name:
        both = f"data.path={config.path!r} and data.tfds_name={config.tfds_name!r}"
        raise UserError(f"{both} are both set: give one of them")
    if config.tfds_name:
        return _prepared(config)
    if config.path:
        name, documents = "text", text_documents(expand(config.path), config.validation_fraction)
    else:
        name, documents = "python_stdlib", stdlib_documents()
    return _keep(name, documents, cache)


def stdlib_documents() -> Documents:
    """The source of this Python's standard library without duplicates: about 10 MB.

    A file's split follows from the hash of its path (1 in 20 is held out), so it stays in its split
    from one patch release to the next.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    documents: Documents = {"train": [], "validation": []}
    every = sorted(root.rglob("*.py"))
    paths = (p for p in every if not SKIPPED & set(p.relative_to(root).parts[:-1]))
    for name, text in _unique(root, paths):
        documents["validation" if _hash(name) % 20 == 0 else "train"].append((name, text))
    if not all(documents.values()):
        none = f"this Python ships no library source under {root}"
        raise UserError(f"{none}: give a text of your own with data.path")
    return documents


def text_documents(path: pathlib.Path, validation_fraction: float) -> Documents:
    """A user's text: of one file the tail is held out, of a folder a share of its files.

    Files with a NUL byte (not text), hidden files and duplicates are left out. All of it must fit
    in memory; a text of many gigabytes is better given as a TFDS set. Raises UserError.
    """
    asked = f"data.path={str(path)!r}"
    try:
        if not path.exists():
            raise UserError(f"{asked} does not exist: give a text file or a folder of them")
        root, paths = path.parent, [path] if path.is_file() else []
        if path.is_dir():
            root, paths = path, sorted(_files(path))
        found = [(name, text) for name, text in _unique(root, paths) if text and b"\0" not in text]
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UserError(f"{asked} cannot be read: {error}") from error
    if not found:
        raise UserError(f"{asked} holds no text: give a file, or a folder of files, with text")
    if len(found) == 1:
        name, text = found[0]
        cut = round(len(text) * (1 - validation_fraction))
        while cut < len(text) and text[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
            cut += 1
        return {"train": [(name, text[:cut])], "validation": [(name + " (tail)", text[cut:])]}
    # The files with the smallest hashes are held out: a fixed share of them, and at least one.
    ordered = sorted(found, key=lambda document: _hash(document[0]))
    held_out = max(1, round(len(ordered) * validation_fraction))
    return {"train": ordered[held_out:], "validation": ordered[:held_out]}


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files below a folder that are not hidden. Raises OSError for a link that leads out."""
    left, top = [root], root.resolve()
    while left:
        for path in left.pop().iterdir():
            if path.name.startswith("."):
                continue
            if path.is_symlink() and not path.resolve(strict=True).is_relative_to(top):
                raise OSError(f"{path} is a link that leads out of it: give what it leads to")
            if path.is_file():
                yield path
            elif path.is_dir() and not path.is_symlink():
                left.append(path)


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


def _keep(name: str, documents: Documents, cache: pathlib.Path) -> Corpus:
    """Writes the documents once as a TFDS set of ArrayRecord files, named by fingerprint."""
    digest = hashlib.sha256()
    for split, texts in sorted(documents.items()):
        for key, text in texts:
            digest.update(f"{split}\0{key}\0{hashlib.sha256(text).hexdigest()}\n".encode())
    fingerprint = digest.hexdigest()
    home = entry(cache, f"{name}-{fingerprint[:16]}", partial(_write, name, documents))
    summary = ", ".join(
        f"{split} {len(texts)} files {sum(len(text) for _, text in texts) / 1e6:.2f} MB"
        for split, texts in documents.items()
    )
    if name == "python_stdlib":
        name = f"python_stdlib {platform.python_version()}"
    # opened when they are read: a run whose tokens are cached needs no TFDS
    splits = {split: stored.Texts(partial(stored.read, home, split), "text") for split in documents}
    return Corpus(fingerprint, splits, f"{name}: {summary}, fingerprint {fingerprint[:16]}")


def _write(name: str, documents: Documents, home: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    kept = {
        split: [(key, {"name": key, "text": text}) for key, text in texts]
        for split, texts in documents.items()
    }
    stored.write(name, {key: tfds.features.Text() for key in ("name", "text")}, kept, home)


def _prepared(config: Any) -> Corpus:
    """A prepared TFDS set by name; splits and the text's key are fields of `config.data`."""
    asked = f"data.tfds_name={config.tfds_name!r}"
    splits = {split: config[f"{split}_split"] for split in ("train", "validation")}
    try:
        builder = stored.open_set(stored.find_set(config.tfds_name, config.tfds_data_dir))
        info, key = builder.info, config.text_key
        for split, wanted in splits.items():
            if re.split(r"[\[+]", wanted)[0] not in info.splits:
                there = f"{info.full_name} has {sorted(info.splits)}"
                raise UserError(f"data.{split}_split={wanted!r}: {there}")
        kinds = {name: type(feature).__name__ for name, feature in info.features.items()}
        if kinds.get(key) != "Text":
            there = f"{info.full_name}: {sorted(kinds)}"
            raise UserError(f"data.text_key={key!r} is no text feature of {there}")
        source = {name: builder.as_data_source(split) for name, split in splits.items()}
    except UserError:
        raise
    except Exception as error:  # whatever TFDS raises for what it reads
        given = f", data_dir={config.tfds_data_dir!r}" if config.tfds_data_dir else ""
        made = f"tfds.builder({config.tfds_name!r}, file_format='array_record'{given})"
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{asked} is not prepared as ArrayRecord, which is what can be read without "
            f"TensorFlow: prepare it once with {made}.download_and_prepare() ({line})"
        ) from error
    sizes = (
        f"{name}:{list(split.shard_lengths)}:{split.num_bytes}"
        for name, split in sorted(info.splits.items())
    )
    identity = " ".join([info.full_name, *splits.values(), key, *sizes])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    counts = ", ".join(f"{split} {len(of)} documents" for split, of in source.items())
    opened = {name: partial(builder.as_data_source, split) for name, split in splits.items()}
    texts = {name: stored.Texts(of, key) for name, of in opened.items()}
    return Corpus(fingerprint, texts, f"{info.full_name}: {counts}, fingerprint {fingerprint[:16]}")
