"""A file's documents: of plain text, JSONL, Parquet, Arrow or tokens, also packed (.gz and others).

For: reading them in pieces, so that none is in memory as a whole. Not for: which files are read, or
which documents are held out (`corpus.py`).
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from ngc_jax.runtime.errors import UserError

PIECE = 1 << 18  # bytes of a document that are read at once
ROW = 1 << 28  # bytes of a line of JSONL at most
# Bytes that no text has, but by chance: a file of which they are a larger share is no text.
CONTROLS, BINARY = bytes([*range(9), *range(14, 27), *range(28, 32), 127]), 0.01
ROWS, TABLES = {".jsonl", ".ndjson"}, {".parquet", ".arrow"}
PACKED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le"}
MARKS[codecs.BOM_UTF16_BE] = "utf-16-be"
# Headers of llm.c, 256 int32: magic, version, number of tokens. -> The type of the tokens.
SHARDS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}

Document = Iterator[bytes]  # its pieces, to be read before the next document is asked for


class Skipped(Exception):
    """Why a file has no documents."""


def faults() -> tuple[type[BaseException], ...]:
    """What reading a damaged file raises; pyarrow's errors are values or of the system."""
    packed = getattr(sys.modules.get("zstandard"), "ZstdError", Skipped)
    return (Skipped, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, LookupError, packed)


def suffixes(path: str) -> tuple[str, str]:
    """The kind of a file, and how it is packed: ("a.jsonl.gz") -> (".jsonl", ".gz")."""
    stem, kind = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], kind) if kind in PACKED else (kind, "")


def documents(path: str, column: str, vocab: int = 0) -> Iterator[Document | str]:
    """The documents of a file in its order; in the place of one that is skipped, why.

    column: of rows, the one that holds the text. vocab: if given, files are shards of tokens below
    it, and a document is their bytes, uint32. Raises Skipped, other `faults()`, and UserError.
    """
    kind, packed = suffixes(path)
    if vocab and kind != ".bin":
        raise Skipped("no .bin, for data.tokenizer='tokens'")
    if kind in TABLES and not packed:
        yield from _table(path, kind, column)
        return
    with _opened(path, packed) as file:
        if kind in ROWS:
            yield from _rows(file, path, column)
        elif vocab:
            yield _tokens(file, path, vocab)
        else:
            first = _first(file)
            marked = first.startswith(tuple(MARKS))
            controls = len(first) - len(first.translate(None, CONTROLS))
            if not marked and controls > BINARY * len(first):
                raise Skipped("binary")
            yield _plain(first, file)


@contextlib.contextmanager
def _opened(path: str, packed: str) -> Iterator[Any]:
    if packed != ".zst":
        with PACKED.get(packed, open)(path, "rb") as file:
            yield file
        return
    try:
        import zstandard
    except ImportError as error:
        raise UserError(_needs(path, "zstandard")) from error
    with open(path, "rb") as file:
        yield io.BufferedReader(_Frames(file, zstandard.ZstdDecompressor().decompressobj))


class _Frames(io.RawIOBase):
    """What frames of zstd hold; the package itself is silent where the last one is cut short."""

    def __init__(self, file: BinaryIO, begin: Callable[[], Any]):
        self.file, self.begin, self.packed, self.ready = file, begin, b"", b""
        self.frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            packed = self.packed or self.file.read(1 << 13)
            if not packed and self.frame and not self.frame.eof:
                raise EOFError("it ends inside a frame")
            if not packed:
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.begin()
            self.ready = self.frame.decompress(packed)
            self.packed = self.frame.unused_data
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def _needs(path: str, package: str) -> str:
    return f"data.path: {path} needs the {package} package: pip install 'ngc_jax[data]'"


def _first(file: BinaryIO) -> bytes:
    """The first piece, whole: a packed file gives less at a time."""
    return b"".join(_read(file, PIECE))


def _read(file: BinaryIO, most: int = sys.maxsize) -> Iterator[bytes]:
    while most > 0 and (piece := file.read(min(PIECE, most))):
        most -= len(piece)
        yield piece


def _plain(first: bytes, file: BinaryIO) -> Document:
    """Text as UTF-8 without the mark of its encoding; without a mark, its bytes as they are."""
    mark = next((mark for mark in MARKS if first.startswith(mark)), b"")
    pieces = _chain(first[len(mark) :], file)
    if not mark or MARKS[mark] == "utf-8":
        yield from filter(None, pieces)
        return
    decoder = codecs.getincrementaldecoder(MARKS[mark])()
    for piece in pieces:
        yield decoder.decode(piece).encode()
    decoder.decode(b"", final=True)


def _chain(first: bytes, file: BinaryIO) -> Iterator[bytes]:
    yield first
    yield from _read(file)


def _tokens(file: BinaryIO, path: str, vocab: int) -> Document:
    """The tokens of a shard of nanoGPT (no header) or llm.c, as bytes of uint32."""
    first = _first(file)
    magic, version, told = np.frombuffer(first[:12].ljust(12, b"\0"), "<i4").tolist()
    headed, seen = (magic, version) in SHARDS, 0
    kind = np.dtype(SHARDS.get((magic, version), "<u2" if vocab <= 1 << 16 else "<u4"))
    left = first[1024 * headed :]
    for piece in _chain(b"", file):
        left += piece
        whole = len(left) // kind.itemsize * kind.itemsize
        tokens, left = np.frombuffer(left[:whole], kind), left[whole:]
        seen += len(tokens)
        if len(tokens) and tokens.max() >= vocab:
            wants = f"more than {tokens.max()}, a token of {path}"
            raise UserError(f"data.vocab_size={vocab}: must be {wants}")
        yield tokens.astype("<u4").tobytes()
    if left or (headed and seen != told):
        raise Skipped("cut short")


def _rows(file: BinaryIO, path: str, column: str) -> Iterator[Document | str]:
    for line in iter(lambda: file.readline(ROW), b""):
        if len(line) == ROW:
            raise Skipped(f"a line of more than {ROW >> 20} MiB")
        try:
            row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode()) if line.strip() else {}
        except (ValueError, RecursionError):
            yield "rows that are no JSON"
            continue
        if line.strip():
            yield _text(row.get(column) if isinstance(row, dict) else None, column)


def _text(text: Any, column: str) -> Document | str:
    if not isinstance(text, str):
        return f"rows without data.text_column={column!r}"
    try:
        return iter([text.encode()]) if text else "empty rows"
    except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can spell
        return iter([text.encode(errors="replace")])


def _table(path: str, kind: str, column: str) -> Iterator[Document | str]:
    """The rows of a Parquet file, or of an Arrow file as Hugging Face's `datasets` writes it."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(_needs(path, "pyarrow")) from error
    with pa.OSFile(path, "rb") as file:
        made: Any = pq.ParquetFile(file) if kind == ".parquet" else _arrow(pa, file)
        names = (made.schema_arrow if kind == ".parquet" else made.schema).names
        if column not in names:
            raise UserError(f"data.text_column={column!r}: must be of {path}, one of {names}")
        if kind == ".parquet":
            batches: Iterable[Any] = made.iter_batches(1024, columns=[column])
        elif hasattr(made, "num_record_batches"):
            batches = (made.get_batch(i) for i in range(made.num_record_batches))
        else:
            batches = made
        for batch in batches:
            for value in batch.column(column):
                yield _text(value.as_py(), column)


def _arrow(pa: Any, file: Any) -> Any:
    try:
        return pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_file(file)


# A cut before a space that follows no white space (also not that of Unicode, in UTF-8) changes no
# word of the patterns in `tokenizer.SPLITS`.
_WIDE = rb"\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"
_CUT = re.compile(rb".*[!-~\x80-\xff](?<!\xc2[\x85\xa0])(?<!" + _WIDE + rb")(?= )", re.DOTALL)


def cut(pieces: Iterable[bytes], most: int = PIECE) -> Iterator[bytes]:
    """The same text in pieces of at most `most` bytes, which encode as the whole does.

    Where there is no space to cut at, at the end of a line, else of a character.
    """
    left, begun = b"", False
    for piece in pieces:
        left += piece
        while len(left) > most:
            begun = True
            found = _CUT.match(left, 0, most)
            at = found.end() if found else left.rfind(b"\n", 0, most) + 1 or character(left, most)
            yield left[:at]
            left = left[at:]
    if left or not begun:
        yield left


def character(text: bytes, at: int) -> int:
    """The nearest place from `at` backwards that is not inside a UTF-8 character."""
    back = at
    while back > max(0, at - 3) and text[back] & 0xC0 == 0x80:
        back -= 1
    return back if text[back] & 0xC0 != 0x80 and back else at


def head_and_tail(pieces: Iterable[bytes], at: int, unit: int = 0) -> tuple[Document, Document]:
    """A document cut in two near byte `at`: not inside a UTF-8 character, or token of `unit` bytes.

    The first is to be read before the second, which passes over what is left of it.
    """
    rest: list[bytes] = []
    source = iter(pieces)

    def head() -> Document:
        begun = 0
        for piece in source:
            here = min(max(0, at // (unit or 1) * (unit or 1) - begun), len(piece))
            while not unit and here < len(piece) and piece[here] & 0xC0 == 0x80:
                here += 1
            begun += len(piece)
            yield piece[:here]
            if here < len(piece):
                rest.append(piece[here:])
                return

    def tail(first: Document) -> Document:
        for _ in first:
            pass
        yield from rest
        yield from source

    return (first := head()), tail(first)
