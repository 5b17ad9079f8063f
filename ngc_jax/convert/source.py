"""Pretrained checkpoints as they are published: opened to be read tensor by tensor, and written.

For: `open_source` of a folder of safetensors or a GGUF file, and `write_safetensors`. Files are
data only (docs/trust.md): pickles, which are programs, are refused. Not for: what names and fields
mean to our models (`config_json.py`, `names.py`), or what is inside a GGUF file (`gguf_file.py`).
"""

import dataclasses
import hashlib
import json
import math
import mmap
import os
import pathlib
import re
import stat
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError

Path = pathlib.Path
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPES |= {"I32": np.int32}  # the order of leaders
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
CONFIG_BYTES, HEADER_BYTES, JSON_BYTES = 1 << 20, 1 << 24, 1 << 26  # the most that are read
SHARD_BYTES = 1 << 30
PACKAGES = "pip install 'ngc_jax[convert]'"


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor that is not read yet; `read()` returns it, in this shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Source(NamedTuple):
    """A pretrained checkpoint."""

    path: Path
    config: dict[str, Any]  # in the fields of config.json of transformers
    tensors: Mapping[str, Lazy]  # by their names in safetensors
    tokenizer: str  # the text of a tokenizer.json
    sha256: str  # of all that is read


def open_source(path: str | Path) -> Source:
    """The checkpoint in a folder of *.safetensors or a .gguf file. Raises UserError for another."""
    path = files.expand(os.fspath(path))
    wants = "a folder with config.json, tokenizer.json and *.safetensors, or a .gguf file"
    if not path.exists():
        raise UserError(f"there is no {str(path)!r}: give {wants}")
    if path.suffix in PICKLES and path.is_file():
        raise UserError(_pickle(path))
    if not path.is_dir() and path.suffix != ".gguf":
        raise UserError(f"{path} is no checkpoint: give {wants}")
    try:
        if path.is_dir():
            return _open_folder(path)
        from ngc_jax.convert import gguf_file

        told = gguf_file.open_file(path)
        return Source(path, *told, files.sha256(path))
    except ImportError as error:
        raise UserError(f"{path} needs the {error.name} package: {PACKAGES}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def unwritten(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that take memory as they are written; on a CPU, jax takes them without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE)  # begins at a multiple of 64 bytes
    return np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape)


def few(names: Any) -> str:
    """The first of some names, and how many more there are."""
    first = sorted(names)
    more = f" and {len(first) - 4} more" if len(first) > 4 else ""
    return ", ".join(first[:4]) + more


def _pickle(path: Path) -> str:
    how = "model.save_pretrained(FOLDER, safe_serialization=True)"
    what = "a pickle, which is a program and is not run"
    return f"{path} is {what}: write it as safetensors by {how} of transformers, and give FOLDER"


def _file(path: Path) -> Path:
    """A file, which is no link. Raises UserError."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}: a checkpoint needs it") from error
    if stat.S_ISLNK(mode):
        wants = f"copy the folder by cp -rL {path.parent} FOLDER, and give FOLDER"
        raise UserError(f"{path} is a link, which is not followed: {wants}")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is no file: give one")
    return path


def _text(path: Path, limit: int) -> str:
    try:
        return files.read(_file(path), limit).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError."""
    try:
        told = files.read_json(_file(path), limit)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(told, dict):
        raise UserError(f"{path} holds {told!r:.40}: must be a JSON object")
    return told


def _open_folder(home: Path) -> Source:
    names = sorted(os.listdir(home))
    shards, index = [name for name in names if name.endswith(".safetensors")], None
    if INDEX in names:
        index = _object(home / INDEX, JSON_BYTES).get("weight_map")
        if not isinstance(index, dict) or {*map(type, index.values())} != {str}:
            raise UserError(f"{home / INDEX}: weight_map must name a file for each tensor")
        shards = sorted(set(index.values()))
        strange = [name for name in shards if not re.fullmatch(r"\w[\w.+-]*\.safetensors", name)]
        if strange:
            wants = "must be files of its folder, such as 'model-00001-of-00002.safetensors'"
            raise UserError(f"{home / INDEX}: its shards {strange[:2]!a:.80} {wants}")
        if missing := set(shards) - set(names):
            raise UserError(f"{home} lacks shards that {INDEX} names: {few(missing)}")
    elif WHOLE in names:
        shards = [WHOLE]
    if not shards:
        pickles = [name for name in names if name.endswith(PICKLES)]
        wants = f"{home} has no *.safetensors: give a folder that has them"
        raise UserError(_pickle(home / pickles[0]) if pickles else wants)
    config = _object(home / "config.json", CONFIG_BYTES)
    tokenizer = _text(home / "tokenizer.json", JSON_BYTES)
    tensors, at = dict[str, Lazy](), dict[str, str]()
    for shard in shards:
        for name, tensor in _open_shard(_file(home / shard)).items():
            if name in tensors:
                raise UserError(f"{home}: {name} is in both {at[name]} and {shard}: remove one")
            tensors[name], at[name] = tensor, shard
    if index is not None and index != at:
        wrong = {n for n in {*index, *at} if index.get(n) != at.get(n)}
        raise UserError(f"{home}: its shards do not hold what {INDEX} says of {few(wrong)}")
    read = ["config.json", "tokenizer.json", *([INDEX] if index is not None else []), *shards]
    sums = json.dumps({name: files.sha256(home / name) for name in read})
    return Source(home, config, tensors, tokenizer, hashlib.sha256(sums.encode()).hexdigest())


def _open_shard(path: Path) -> dict[str, Lazy]:
    """The tensors of a safetensors file. Raises UserError for what is damaged."""
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    header = int.from_bytes(read_at(path, 0, min(size, 8)).tobytes(), "little")
    if header > min(size - 8, HEADER_BYTES):  # the library would take more than this
        what = f"its header has {header} bytes, of {size} in the file"
        raise UserError(f"{path} is damaged, or no safetensors file: {what}")
    tensors = {}
    try:
        # The library checks the header. It maps the file, whose pages would count as memory.
        with safe_open(path, framework="numpy") as opened:
            told = json.loads(read_at(path, 8, header).tobytes())
            for name in opened.keys():  # noqa: SIM118 (no dict)
                part = opened.get_slice(name)
                kind, shape = part.get_dtype(), tuple(part.get_shape())
                if kind not in DTYPES:
                    raise UserError(f"{path}: {name} has dtype {kind}: must be one of {[*DTYPES]}")
                at, dtype = 8 + header + told[name]["data_offsets"][0], np.dtype(DTYPES[kind])
                read = partial(_read_tensor, path, at, shape, dtype)
                tensors[name] = Lazy(shape, dtype, read)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return tensors


def _read_tensor(path: Path, at: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return read_at(path, at, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def read_at(path: Path, at: int, size: int) -> np.ndarray:
    """The bytes of a part of a file [size]. Raises UserError where it has become shorter."""
    with open(path, "rb", opener=files.no_follow) as file:
        file.seek(at)
        found = np.frombuffer(file.read(size), np.uint8)
    if len(found) < size:
        raise UserError(f"{path} has changed while it was read: it ends before byte {at + size}")
    return found


def write_safetensors(
    folder: str | Path,
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: str,
    shard_bytes: int = SHARD_BYTES,
    more: Mapping[str, bytes] = types.MappingProxyType({}),
) -> None:
    """Writes a new folder that `open_source`, and transformers, read: whole or not at all.

    tensors: arrays, or `Lazy`, by name. tokenizer: "": there is no such file. more: other files.
    Equal arguments give equal bytes. A file holds at most `shard_bytes` of tensors, or one; no more
    is in memory at once. Raises UserError.
    """
    folder = files.expand(os.fspath(folder))
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise UserError(f"{folder} needs the safetensors package: {PACKAGES}") from error
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists: give a folder that does not, such as '{folder}-2'")
    sizes = {name: math.prod(t.shape) * t.dtype.itemsize for name, t in sorted(tensors.items())}
    parts: list[list[str]] = [[]]
    for name in sizes:
        if parts[-1] and sum(sizes[other] for other in parts[-1]) + sizes[name] > shard_bytes:
            parts.append([])
        parts[-1].append(name)
    shards = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    shards = [WHOLE] if len(parts) == 1 else shards
    with files.build_directory(folder, "the folder") as building:
        for shard, names in zip(shards, parts, strict=True):
            read = {name: tensors[name] for name in names}
            made = {n: t.read() if isinstance(t, Lazy) else np.asarray(t) for n, t in read.items()}
            made = {name: np.asarray(tensor, order="C") for name, tensor in made.items()}
            save_file(made, building / shard, metadata={"format": "pt"})
        if len(parts) > 1:
            homes = {n: shard for shard, names in zip(shards, parts, strict=True) for n in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": homes}
            (building / INDEX).write_text(
                json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )
        text = json.dumps(config, indent=2, sort_keys=True)
        (building / "config.json").write_text(text + "\n", encoding="utf-8")
        texts = {"tokenizer.json": tokenizer.encode()} if tokenizer else {}
        for name, content in (texts | dict(more)).items():
            (building / name).write_bytes(content)
