"""Text to tokens and back, and `load_data`, which gives a run what it learns from.

For: the tokenizers, and a flat file of tokens for each split. Not for: batches (`batches.py`).
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ngc_jax.data import NOTHING, cache, corpus, problems
from ngc_jax.data.batches import Examples, Windows
from ngc_jax.data.tasks import TASKS, boundary
from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError

MARK = "<|document|>"
LARGEST = 1 << 28  # bytes of a tokenizer
# The printable character that stands for each byte in byte-level BPE, as in GPT-2.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
ALPHABET = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}
NO_TOKENIZERS = "data.tokenizer='bpe' needs the tokenizers package: pip install 'ngc_jax[bpe]'"


class Bytes:
    """Token = byte. 256 of them, and the mark that begins a document."""

    vocab, mark = 257, 256
    lengths = np.array([1] * 256 + [0], np.int32)  # bytes of each token; the mark is no text

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return bytes(token for token in tokens if token < 256)


class BPE:
    """Byte-level byte pair encoding (library `tokenizers`), trained on the train split."""

    def __init__(self, serialised: str):
        """Raises ValueError for what `train` did not make; only tokens and merges are taken."""
        import tokenizers

        self.serialised, learned = serialised, json.loads(serialised)["model"]
        pairs = (m.split(" ") if isinstance(m, str) else m for m in learned["merges"])
        ids = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
        self.vocab, self.mark = len(ids), ids.index(MARK)
        if [*map(repr, map(learned["vocab"].get, ids))] != [*map(repr, range(self.vocab))]:
            raise ValueError("its tokens are not numbered")
        self.spelling = [bytes(ALPHABET[c] for c in t) if t != MARK else b"" for t in ids]
        self.lengths = np.array([len(token) for token in self.spelling], np.int32)
        merges = [(a, b) for a, b in pairs]
        self.model = _byte_level(tokenizers.models.BPE(vocab=learned["vocab"], merges=merges))
        self.model.add_special_tokens([MARK])
        self.model.encode_special_tokens = True  # the mark, spelt out in a text, is text

    @staticmethod
    def train(texts: Iterable[bytes], vocab: int) -> str:
        """Learns `vocab` tokens, the mark among them; returns the serialised tokenizer."""
        import tokenizers

        model, letters = tokenizers.models.BPE(), tokenizers.pre_tokenizers.ByteLevel.alphabet()
        how: Any = {"special_tokens": [MARK], "initial_alphabet": letters, "show_progress": False}
        trainer, model = tokenizers.trainers.BpeTrainer(vocab_size=vocab, **how), _byte_level(model)
        model.train_from_iterator((text.decode() for text in texts), trainer)
        return model.to_str()

    def encode(self, text: bytes) -> np.ndarray:
        return np.array(self.model.encode(text.decode(), add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self.spelling[token] for token in tokens)


def _byte_level(model: Any) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


class Symbols:
    """The alphabet of a task: its problems are tokens, so nothing is encoded."""

    mark, lengths = NOTHING, None

    def __init__(self, symbols: Sequence[str]):
        self.symbols, self.vocab = tuple(symbols), len(symbols)
        self.serialised = json.dumps({"symbols": self.symbols})

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
    """The data of `config.data`; no token sees across the last `mark`. Raises UserError."""
    if not config.task:
        return _text(config, mark)
    held_out = max(1, round(config.validation_fraction * config.problems))
    counts = {"train": config.problems, "validation": held_out}
    given = config.task, config.low, config.high, counts, config.problem_seed
    found = problems.problem_set(*given, cache.cache_directory(config))
    if found.longest > config.context:
        wants = f"{found.longest} or more, the tokens of the longest problem"
        of = f"of data.task={config.task!r} up to data.high={config.high}"
        raise UserError(f"data.context={config.context}: must be {wants} {of}")
    ends = boundary(config.task) if mark is None else mark
    train, held = (problems.Problems(found.home, part, config.context, ends) for part in counts)
    symbols = Symbols(TASKS[config.task].symbols)
    return Data(symbols, train, held, found.fingerprint, found.summary)


def _text(config: Any, mark: int | None) -> Data:
    kept = cache.cache_directory(config)
    text = corpus.open_corpus(config, kept)
    vocab = f"-{config.vocab_size}" if config.tokenizer == "bpe" else ""
    name = f"tokens-{config.tokenizer}{vocab}-{text.fingerprint[:16]}"
    home = cache.entry(kept, name, lambda building: _tokenise(config, text, building))
    meta = json.loads((home / "meta.json").read_text())
    tokenizer = load_tokenizer(home, config)
    ends = mark if mark is not None else (tokenizer.mark if config.isolate_documents else None)

    def windows(split: str) -> Windows:
        count = meta["tokens"][split]
        if count < config.context + 1:
            smaller = f", or data.context of at most {count - 1}" if count > 1 else ""
            wants = f"fewer than a window of data.context={config.context} and its target"
            there = f"the {split} text has {count} tokens"
            raise UserError(f"{there}, {wants}: give more text{smaller}")
        tokens = np.memmap(home / f"{split}.bin", meta["dtype"], mode="r")
        return Windows(tokens, config.context, tokenizer.mark, ends)

    sizes = ", ".join(f"{n / 1e6:.2f} M {split} tokens" for split, n in meta["tokens"].items())
    fingerprint = text.fingerprint
    if isinstance(tokenizer, BPE):
        fingerprint = hashlib.sha256((fingerprint + tokenizer.serialised).encode()).hexdigest()
    parts = windows("train"), windows("validation")
    return Data(tokenizer, *parts, fingerprint, f"{text.summary}; {sizes}")


def load_tokenizer(home: files.Path, config: Any) -> Tokenizer:
    """The tokenizer of `config.data`, as a directory keeps it. Raises UserError for another."""
    if not config.task and config.tokenizer == "bytes":
        return Bytes()
    file = home / "tokenizer.json"
    try:
        if not config.task:
            return BPE(files.read(file, LARGEST).decode())
        symbols = Symbols(TASKS[config.task].symbols)
        if files.read_json(file, LARGEST) != {"symbols": [*symbols.symbols]}:
            raise ValueError(f"its symbols are not those of data.task={config.task!r}")
        return symbols
    except ImportError as error:
        raise UserError(NO_TOKENIZERS) from error
    except Exception as error:  # also what the library raises for merges that do not fit
        raise UserError(f"{file} cannot be read: {str(error) or type(error).__name__}") from error


def save_tokenizer(tokenizer: Tokenizer, home: files.Path) -> None:
    """Keeps what `load_tokenizer` needs; bytes need nothing."""
    if not isinstance(tokenizer, Bytes):
        files.write_durably(home / "tokenizer.json", tokenizer.serialised)


def _tokenise(config: Any, text: corpus.Corpus, directory: pathlib.Path) -> None:
    tokenizer: Bytes | BPE = Bytes()
    try:
        if config.tokenizer == "bpe":
            tokenizer = BPE(BPE.train(text.splits["train"](), config.vocab_size))
        save_tokenizer(tokenizer, directory)
        dtype = np.dtype("uint16" if tokenizer.vocab <= 1 << 16 else "uint32")
        counts = {}
        for split, documents in text.splits.items():
            with open(directory / f"{split}.bin", "wb") as file:
                for document in documents():
                    file.write(np.array([tokenizer.mark], dtype).tobytes())
                    file.write(tokenizer.encode(document).astype(dtype).tobytes())
                counts[split] = file.tell() // dtype.itemsize
    except ImportError as error:
        raise UserError(NO_TOKENIZERS) from error
    except UnicodeDecodeError as error:
        wants = "as data.tokenizer='bpe' wants it: use 'bytes'"
        raise UserError(f"the text is not UTF-8 ({error}), {wants}") from error
    (directory / "meta.json").write_text(json.dumps({"dtype": dtype.name, "tokens": counts}))
