"""Which files a user's path has, the split that their names announce, and what is left out of it.

For: a file, a folder, a pipe. Not for: what is in a file (`sources.py`), or its documents
(`texts.py`).
"""

import os
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from ngc_jax.data import cache, sources
from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError

TRAIN, VALIDATION, OUT = range(3)  # parts that a document may be in
NAMES = {"train": "train", "training": "train", "test": "test"}
NAMES |= dict.fromkeys(("valid", "validation", "val", "dev"), "validation")
WORD = rf"({'|'.join(NAMES)})"
NUMBERED = re.compile(rf"{WORD}(?:[-_]?\d+(?:[-_]of[-_]\d+)?)?")  # a part of a name, between dots
# Of a name whose kind is data alone: the last such word.
WITHIN = re.compile(rf".*(?<![a-z0-9]){WORD}(?![a-z])")
HUB = "hf:"  # begins the name of a set in the cache of Hugging Face's `datasets`
PLAIN = {"", ".txt", ".text", ".raw", ".tokens"}  # kinds of text whose names may announce a split
DESCRIPTIONS = {"dataset_dict.json", "dataset_info.json", "state.json"}  # beside Arrow files
Skips = dict[str, list[Any]]  # why -> [how many, some of them by name]


def announced(names: Sequence[str]) -> list[int]:
    """The part of each file: as folders and names say, where they say both; else all are TRAIN.

    "test" is held out where no name says "validation", and is left out else.
    """
    told = [_split(name) for name in names]
    held = "validation" if "validation" in told else "test"
    if held not in told or set(told) == {held} or (held == "test" and "train" not in told):
        return [TRAIN] * len(names)
    parts = {"": TRAIN, "train": TRAIN, "validation": VALIDATION}
    return [VALIDATION if split == held else parts.get(split, OUT) for split in told]


def _split(name: str) -> str:
    """The split that a name announces: "wiki.train.txt", "val/a.txt", "x-test-00000.parquet"."""
    *folders, file = name.lower().split("/")
    for folder in folders:
        if folder in NAMES:
            return NAMES[folder]
    kind, packed = sources.suffixes(file)
    stem = file.removesuffix(packed)
    found = None
    if kind in PLAIN or kind in ("." + word for word in NAMES):
        found = next(filter(None, map(NUMBERED.fullmatch, stem.split("."))), None)
    elif kind in sources.ROWS | sources.TABLES | {".bin"}:
        found = WITHIN.match(stem.removesuffix(kind))
    return NAMES[found[1]] if found else ""


def note(skips: Skips, why: str, *names: str, count: int = 1) -> None:
    noted = skips.setdefault(why, [0, []])
    noted[0] += count
    spelt = [name.encode(errors="backslashreplace").decode() for name in names]
    noted[1] = list(dict.fromkeys([*noted[1], *spelt]))[:3]


def listed(
    asked: str, given: str, home: pathlib.Path, skips: Skips, pipes: list[Any]
) -> tuple[str, list[str]]:
    """The folder that a user names and its files, in order; of a file or pipe, that alone."""
    path = files.expand(given)
    if given.startswith(HUB) and not os.path.lexists(path):
        path = _set_of(asked, given.removeprefix(HUB))
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return str(path), sorted(_walk(path, home, skips))
        if stat.S_ISREG(mode):
            return str(path.parent), [path.name]
        if stat.S_ISFIFO(mode):
            files.make_private(home)
            pipe = tempfile.NamedTemporaryFile(prefix=".pipe-", dir=home)  # noqa: SIM115
            print(f"{asked} is a pipe: reading it to its end", flush=True)
            with open(path, "rb") as file:
                shutil.copyfileobj(file, pipe)
            pipe.flush()
            pipes.append(pipe)  # until the corpus is dropped
            return str(home), [os.path.basename(pipe.name)]
    except FileNotFoundError as error:
        none = f"{asked} does not exist: give a text, a folder of texts, or a mixture 'A:0.7,B:0.3'"
        raise UserError(none) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in a path
        raise UserError(f"{asked} cannot be read: {error}") from error
    raise UserError(f"{asked} holds no text: give a file, a folder of files, or a pipe")


def _set_of(asked: str, name: str) -> pathlib.Path:
    """The newest copy of a set, ORG/NAME or ORG/NAME/CONFIG, in the cache of `datasets`."""
    given = os.environ.get("HF_DATASETS_CACHE"), os.environ.get("HF_HOME", "~/.cache/huggingface")
    home = files.expand(given[0] or os.path.join(given[1], "datasets"))
    found = dict[str, list[pathlib.Path]]()
    for told in home.glob("*/*/*/*/dataset_info.json"):
        of, config = told.relative_to(home).parts[:2]
        found.setdefault(f"{of.replace('___', '/')}/{config}", []).append(told)
    # `datasets` writes ORG/TinyStories as ORG___tiny_stories
    plain = {full: full.lower().replace("_", "") for full in found}
    asks = name.lower().replace("_", "")
    own = [full for full, spelt in plain.items() if asks in (spelt, spelt.rpartition("/")[0])]
    if len(own) != 1:
        wants = f"must be one of {sorted(own or found)}" if found else "must be loaded once"
        raise UserError(f"{asked}: {wants}, by Hugging Face's datasets.load_dataset into {home}")
    return max(found[own[0]], key=lambda told: told.stat().st_mtime_ns).parent


def _walk(root: pathlib.Path, home: pathlib.Path, skips: Skips) -> Iterator[str]:
    """The files below a folder, by their names in it; notes others. No link leads out of it."""
    top, left = root.resolve(), [""]
    while left:
        folder = left.pop()
        try:
            items = list(os.scandir(path := os.path.join(root, folder)))
        except OSError:
            if not folder:
                raise
            note(skips, "unreadable", folder)
            continue
        if folder and _own(path, {item.name for item in items}, home):
            note(skips, "made by a run", folder)
            continue
        of_a_set = any(i.name.endswith(".arrow") or i.name == "dataset_dict.json" for i in items)
        for item in items:
            name = os.path.join(folder, item.name)
            if item.name.startswith("."):
                note(skips, "hidden", name)
            elif of_a_set and (item.name in DESCRIPTIONS or item.name.startswith("cache-")):
                note(skips, "descriptions and caches of a set", name)
            elif item.is_symlink():
                if _leads_inside(item.path, top):
                    yield name
                else:
                    note(skips, "linked", name)
            elif item.is_dir(follow_symlinks=False):
                left.append(name)
            elif item.is_file(follow_symlinks=False):
                yield name
            else:
                note(skips, "neither files nor folders", name)


def _leads_inside(path: str, top: pathlib.Path) -> bool:
    """Whether a link leads to a file below `top`. A folder there is found without it."""
    try:
        to = pathlib.Path(path).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        return False
    return to.is_relative_to(top) and to.is_file()


def _own(folder: str, there: set[str], home: pathlib.Path) -> bool:
    """Whether a folder is what a run, a command or a cache has written, which is never its text."""
    if home.exists() and os.path.samefile(folder, home):
        return True
    if cache.SEAL in there or {"changes.json", "records"} <= there:
        return True
    if "config.json" in there and any(name.endswith(".safetensors") for name in there):
        return True  # an exported model
    try:
        if "index.html" in there and b'content="ngc_jax"' in _begins(folder, "index.html"):
            return True  # a page
        told = files.read_json(pathlib.Path(folder, "config.json"), 1 << 20)
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and {"data", "model", "train", "checkpoint"} <= told.keys()


def _begins(folder: str, name: str) -> bytes:
    with open(os.path.join(folder, name), "rb", opener=files.no_follow) as file:
        return file.read(300)
