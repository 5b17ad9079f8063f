"""Text to tokens and back, and the token cache: one flat file for each split, read by memory map.

For: the tokenizers (bytes; a byte-level BPE trained on the corpus; the symbols of a task), turning
documents into one stream in which each document begins with a mark, and `load_data`, which gives a
run what it learns from. Not for: batches (`batches.py`).
"""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ngc_jax.data import NOTHING
from ngc_jax.data.batches import Examples, Windows
from ngc_jax.data.corpus import Corpus, open_corpus
from ngc_jax.data.problems import Problems, problem_set
from ngc_jax.data.tasks import TASKS, boundary
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import Path, build_directory, expand, write_durably

MARK = "<|document|>"


class Bytes:
    """Token = byte. 256 of them, and the mark that begins a document."""

    vocab = 257
    mark = 256
    lengths = np.array([1] * 256 + [0], np.int32)  # bytes of each token; the mark is no text

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return bytes(token for token in tokens if token < 256)


class BPE:
    """Byte-level byte pair encoding (library `tokenizers`), trained on the train split."""

    def __init__(self, serialised: str):
        from tokenizers import Tokenizer

        self.serialised = serialised
        self.model = Tokenizer.from_str(serialised)
        self.model.encode_special_tokens = True  # the mark, spelt out in a text, is text
        self.vocab: int = self.model.get_vocab_size()
        ids: dict[str, int] = self.model.get_vocab()
        self.mark = ids.pop(MARK)
        # In the byte-level alphabet one character stands for one byte.
        alphabet = {char: byte for byte, char in _byte_alphabet().items()}
        spelling = {i: bytes(alphabet[char] for char in token) for token, i in ids.items()}
        self.spelling = [spelling.get(i, b"") for i in range(self.vocab)]
        self.lengths = np.array([len(token) for token in self.spelling], np.int32)

    @staticmethod
    def train(texts: Iterable[bytes], vocab: int) -> str:
        """Learn `vocab` tokens, the mark among them; returns the tokenizer in serialised form."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[MARK],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator((text.decode() for text in texts), trainer)
        return model.to_str()

    def encode(self, text: bytes) -> np.ndarray:
        return np.array(self.model.encode(text.decode(), add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self.spelling[token] for token in tokens)


class Symbols:
    """The alphabet of a task: its problems are tokens, so nothing is encoded."""

    mark = NOTHING
    lengths = None

    def __init__(self, symbols: Sequence[str]):
        self.symbols, self.vocab = tuple(symbols), len(symbols)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return " ".join(self.symbols[token] for token in tokens).encode()


Tokenizer = Bytes | BPE | Symbols


class Data(NamedTuple):
    """What a run learns from, and what is held out: text in windows, or problems."""

    tokenizer: Tokenizer
    train: Examples
    validation: Examples
    fingerprint: str  # equal fingerprints are equal data
    summary: str


def most_tokens(config: Any) -> int:
    """The vocabulary of `config.data` at most: a BPE learned on little text has fewer tokens."""
    if config.task:
        return len(TASKS[config.task].symbols)
    return Bytes.vocab if config.tokenizer == "bytes" else int(config.vocab_size)


def segmented(config: Any, mark: int | None = None) -> bool:
    """Whether the batches of `load_data(config, mark)` have segments."""
    return mark is not None or config.isolate_documents or boundary(config.task) is not None


def load_data(config: Any, mark: int | None = None) -> Data:
    """The data that `config.data` asks for, from the cache if they were made before.

    Examples have segments where documents are isolated, where a task is read both ways, and where
    `mark` is given: a token sees nothing across the last mark. Raises UserError.
    """
    return _problems(config, mark) if config.task else _text(config, mark)


def _problems(config: Any, mark: int | None) -> Data:
    held_out = max(1, round(config.validation_fraction * config.problems))
    counts = {"train": config.problems, "validation": held_out}
    cache = cache_directory(config)
    found = problem_set(config.task, config.low, config.high, counts, config.problem_seed, cache)
    if found.longest > config.context:
        raise UserError(
            f"data.context={config.context}: must be {found.longest} or more, the tokens of the "
            f"longest problem of data.task={config.task!r} up to data.high={config.high}"
        )
    ends = boundary(config.task) if mark is None else mark
    train, held = (Problems(found.home, part, config.context, ends) for part in counts)
    symbols = Symbols(TASKS[config.task].symbols)
    return Data(symbols, train, held, found.fingerprint, found.summary)


def _text(config: Any, mark: int | None) -> Data:
    """The fingerprint is the corpus's, with a learned tokenizer's own."""
    cache = cache_directory(config)
    corpus = open_corpus(config, cache)
    vocab = f"-{config.vocab_size}" if config.tokenizer == "bpe" else ""
    home = cache / f"tokens-{config.tokenizer}{vocab}-{corpus.fingerprint[:16]}"
    if not _whole(home):
        shutil.rmtree(home, ignore_errors=True)
        with build_directory(home) as building:
            _tokenise(config, corpus, building)
    meta = json.loads((home / "meta.json").read_text())
    tokenizer = load_tokenizer(home)
    ends = mark if mark is not None else (tokenizer.mark if config.isolate_documents else None)

    def windows(split: str) -> Windows:
        count = meta["tokens"][split]
        if count < config.context + 1:
            smaller = f", or data.context of at most {count - 1}" if count > 1 else ""
            raise UserError(
                f"the {split} text has {count} tokens, fewer than a window of "
                f"data.context={config.context} and its target: give more text{smaller}"
            )
        tokens = np.memmap(home / f"{split}.bin", meta["dtype"], mode="r")
        return Windows(tokens, config.context, tokenizer.mark, ends)

    sizes = ", ".join(f"{n / 1e6:.2f} M {split} tokens" for split, n in meta["tokens"].items())
    fingerprint = corpus.fingerprint
    if isinstance(tokenizer, BPE):
        fingerprint = hashlib.sha256((fingerprint + tokenizer.serialised).encode()).hexdigest()
    summary = f"{corpus.summary}; {sizes}"
    return Data(tokenizer, windows("train"), windows("validation"), fingerprint, summary)


def _whole(home: pathlib.Path) -> bool:
    """Whether a token cache is there and as long as it says."""
    try:
        meta = json.loads((home / "meta.json").read_text())
        size = np.dtype(meta["dtype"]).itemsize
        return all(
            (home / f"{split}.bin").stat().st_size == n * size
            for split, n in meta["tokens"].items()
        )
    except (OSError, ValueError):
        return False


def load_tokenizer(home: Path) -> Tokenizer:
    """The tokenizer in a directory's tokenizer.json, or bytes if there is none."""
    file = home / "tokenizer.json"
    if not file.is_file():
        return Bytes()
    serialised = file.read_text()
    symbols = json.loads(serialised).get("symbols")
    return Symbols(symbols) if symbols else BPE(serialised)


def save_tokenizer(tokenizer: Tokenizer, home: Path) -> None:
    """Keep what `load_tokenizer` needs; bytes need nothing."""
    if isinstance(tokenizer, BPE):
        write_durably(home / "tokenizer.json", tokenizer.serialised)
    if isinstance(tokenizer, Symbols):
        write_durably(home / "tokenizer.json", json.dumps({"symbols": tokenizer.symbols}))


def cache_directory(config: Any) -> pathlib.Path:
    """`data.cache_dir`, or the user's cache."""
    return expand(config.cache_dir or "~/.cache/ngc_jax")


def _tokenise(config: Any, corpus: Corpus, directory: pathlib.Path) -> None:
    tokenizer: Bytes | BPE = Bytes()
    try:
        if config.tokenizer == "bpe":
            tokenizer = BPE(BPE.train(corpus.splits["train"], config.vocab_size))
        save_tokenizer(tokenizer, directory)
        dtype = np.dtype("uint16" if tokenizer.vocab <= 1 << 16 else "uint32")
        counts = {}
        for split, texts in corpus.splits.items():
            with open(directory / f"{split}.bin", "wb") as file:
                for text in texts:
                    file.write(np.array([tokenizer.mark], dtype).tobytes())
                    file.write(tokenizer.encode(text).astype(dtype).tobytes())
                counts[split] = file.tell() // dtype.itemsize
    except ImportError as error:
        raise UserError(
            "data.tokenizer='bpe' needs the tokenizers package: pip install 'ngc_jax[bpe]'"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"the text is not UTF-8 ({error}), as data.tokenizer='bpe' wants it: use 'bytes'"
        ) from error
    (directory / "meta.json").write_text(json.dumps({"dtype": dtype.name, "tokens": counts}))


def _byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character that stands for it in byte-level BPE, as in GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
