"""Where text comes from: this Python's library source, a user's files, or a prepared TFDS set.

For: finding documents, splitting and keeping them (`stored.py`). Not for: tokens or batches.
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
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import expand

# Tests and `encodings` (tables) are left out: they repeat themselves and would flatter the loss.
SKIPPED = {"test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}
SKIPPED |= {"site-packages", "dist-packages"}

Documents = dict[str, list[tuple[str, bytes]]]  # split -> (name, text)


class Corpus(NamedTuple):
    """Documents by split, read lazily, and what identifies them."""

    fingerprint: str  # sha256, hex: equal fingerprints are equal texts
    splits: Mapping[str, Callable[[], Iterable[bytes]]]  # "train", "validation": reads its texts
    summary: str  # one line for the log and the card


def open_corpus(config: Any, cache: pathlib.Path) -> Corpus:
    """The corpus that `config.data` names. Raises UserError if it is missing or unreadable."""
    if config.path and config.tfds_name:
        both = f"data.path={config.path!r} and data.tfds_name={config.tfds_name!r}"
        raise UserError(f"{both} are both set: give one of them")
    if config.tfds_name:
        return _prepared(config)
    if not config.path:
        return _keep("python_stdlib", stdlib_documents(), cache)
    return _keep("text", text_documents(expand(config.path), config.validation_fraction), cache)


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


def text_documents(path: pathlib.Path, validation_fraction: float) -> Documents:
    """A user's text without hidden, binary or double files, a share held out. Raises UserError."""
    asked = f"data.path={str(path)!r}"
    try:
        if not path.exists():
            raise UserError(f"{asked} does not exist: give a text file or a folder of them")
        root = path if path.is_dir() else path.parent
        paths = sorted(_files(path)) if path.is_dir() else [path] if path.is_file() else []
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


def _texts(examples: Callable[[], Iterable[Any]], key: str) -> Iterator[bytes]:
    """The texts of one feature, in the order in which TFDS stored them."""
    for example in examples():
        text = example[key]
        yield text.encode() if isinstance(text, str) else text


def _keep(name: str, documents: Documents, cache: pathlib.Path) -> Corpus:
    """Writes the documents once as a TFDS set of ArrayRecord files, named by fingerprint."""

    def write(home: pathlib.Path) -> None:
        kept = {
            split: [(key, {"name": key, "text": text}) for key, text in texts]
            for split, texts in documents.items()
        }
        stored.write(name, lambda kind: {"name": kind.Text(), "text": kind.Text()}, kept, home)

    digest, sizes = hashlib.sha256(), []
    for split, texts in documents.items():
        size = sum(len(text) for _, text in texts) / 1e6
        sizes.append(f"{split} {len(texts)} files {size:.2f} MB")
        for key, text in texts:
            digest.update(f"{split}\0{key}\0{hashlib.sha256(text).hexdigest()}\n".encode())
    fingerprint = digest.hexdigest()
    home = entry(cache, f"{name}-{fingerprint[:16]}", write)
    version = f" {platform.python_version()}" if name == "python_stdlib" else ""
    about = f"{name}{version}: {', '.join(sizes)}, fingerprint {fingerprint[:16]}"
    # opened when they are read: a run whose tokens are cached needs no TFDS
    opened = {split: partial(stored.read, home, split) for split in documents}
    return Corpus(fingerprint, {s: partial(_texts, of, "text") for s, of in opened.items()}, about)


def _prepared(config: Any) -> Corpus:
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
    texts = {split: partial(_texts, of, key) for split, of in opened.items()}
    return Corpus(fingerprint, texts, f"{name}: {documents}, fingerprint {fingerprint[:16]}")
