"""The tokenizer of a run: which one its config asks for, and the file that keeps it.

For: bytes, tokens of others, symbols of tasks, and the way to any. Not for: byte pairs
(`byte_pairs.py`), those of pretrained models (`given.py`), or windows of tokens (`tokens.py`).
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ngc_jax.data import NOTHING
from ngc_jax.data.byte_pairs import ALPHABET, BPE, MARK, byte_level
from ngc_jax.data.given import Given, of_ranks, with_special
from ngc_jax.data.settings import special_names
from ngc_jax.data.tasks import TASKS
from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError

LARGEST = 1 << 28  # bytes of a tokenizer


class Bytes:
    """Token = byte. 256 of them, and the mark that begins a document."""

    vocab, mark, cuts = 257, 256, False  # cuts: whether pieces must end where words do
    lengths = np.array([1] * 256 + [0], np.int32)  # bytes of each token; the mark is no text

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def encode_all(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(piece) for piece in pieces]

    def decode(self, tokens: Iterable[int]) -> bytes:
        return bytes(token for token in tokens if token < 256)


class Ids:
    """Tokens of others, of which the number alone is known; as text they are spelt in digits."""

    mark, cuts, serialised = NOTHING, False, ""

    def __init__(self, vocab: int):
        self.vocab, self.lengths = vocab, np.zeros(vocab, np.int32)

    def encode(self, text: bytes) -> np.ndarray:
        """Raises UserError for what are no tokens."""
        spelt = text.split()
        if not all(token.isdigit() and int(token) < self.vocab for token in spelt):
            wants = f"numbers below data.vocab_size={self.vocab}, such as '15 7'"
            raise UserError(f"text={text!r:.80}: must be {wants}, where data.tokenizer='tokens'")
        return np.array([int(token) for token in spelt], np.int32)

    def encode_all(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        """Of shards (`sources.py`)."""
        return [np.frombuffer(piece, "<u4") for piece in pieces]

    def decode(self, tokens: Iterable[int]) -> bytes:
        return " ".join(map(str, tokens)).encode()


class Symbols:
    """The alphabet of a task: its problems are tokens, so nothing is encoded."""

    mark, lengths, score = NOTHING, None, "exact"  # what the share of examples solved is called

    def __init__(self, symbols: Sequence[str]):
        self.symbols, self.vocab = tuple(symbols), len(symbols)
        self.serialised = json.dumps({"symbols": self.symbols})

    def decode(self, tokens: Iterable[int]) -> bytes:
        return " ".join(self.symbols[token] for token in tokens).encode()


class Labels(Symbols):
    """The classes of images, and how these are normalised, by the images that were trained on."""

    score = "accuracy"

    def __init__(self, names: Sequence[str], mean: Sequence[float], spread: Sequence[float]):
        super().__init__(names)
        self.mean, self.spread = (np.array(of, np.float32) for of in (mean, spread))
        told = {"classes": self.symbols, "mean": [*mean], "spread": [*spread]}
        self.serialised = json.dumps(told)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Bytes [..., C] as float32 of mean 0 and standard deviation 1 in training."""
        return (pixels.astype(np.float32) / 255 - self.mean) / self.spread


Tokenizer = Bytes | BPE | Ids | Symbols  # `Given` is a BPE


def load_tokenizer(home: files.Path, config: Any) -> Tokenizer:
    """The tokenizer of `config.data`, as a directory keeps it. Raises UserError for another."""
    images = config.kind == "images"
    if not (config.task or images) and config.tokenizer in ("bytes", "tokens"):
        return Bytes() if config.tokenizer == "bytes" else Ids(config.vocab_size)
    file = home / "tokenizer.json"
    with _refusing(file, config.tokenizer):
        if images:
            told = files.read_json(file, LARGEST)
            names, moments = told["classes"], [told["mean"], told["spread"]]
            fits = all(len(of) == config.colours and all(map(math.isfinite, of)) for of in moments)
            if not (
                fits and min(moments[1]) > 0 and names and all(isinstance(n, str) for n in names)
            ):
                raise ValueError(f"its classes are not those of data.colours={config.colours}")
            return Labels(names, *moments)
        if config.task:
            symbols = Symbols(TASKS[config.task].symbols)
            if files.read_json(file, LARGEST) != {"symbols": [*symbols.symbols]}:
                raise ValueError(f"its symbols are not those of data.task={config.task!r}")
            return symbols
        text = files.read(file, LARGEST).decode()
        return BPE(text) if config.tokenizer == "bpe" else Given(text, config.vocab_size)


def given_in(home: files.Path, config: Any) -> Given | None:
    """The tokenizer of a pretrained model that a work directory keeps.

    None: of another kind, of a run that is to begin, or of `data.tokenizer_path` (`given_at`).
    """
    kept = config.data.tokenizer == "given" and not config.data.tokenizer_path
    kept = kept and (home / "config.json").exists()
    found = load_tokenizer(home, config.data) if kept else None
    return found if isinstance(found, Given) else None


def given_at(config: Any) -> Given:
    """The tokenizer in the file `data.tokenizer_path`. Raises UserError."""
    with _refusing(f"data.tokenizer_path={config.tokenizer_path!r}", "given"):
        file = files.expand(config.tokenizer_path).resolve()
        text = files.read(file, LARGEST).decode()
        text = of_ranks(file.stem, text) if file.suffix == ".tiktoken" else text
        return Given(text, config.vocab_size)


def open_given(serialised: str, vocab: int, of: object) -> Given:
    """The tokenizer of a pretrained model, as `Given`. Raises UserError, which names its file."""
    with _refusing(of, "given"):
        return Given(serialised, vocab)


def specially(tokenizer: Given, config: Any) -> Given:
    """A tokenizer, but `data.special_tokens` are one token each. Raises UserError for no room."""
    with _refusing(f"data.special_tokens={config.special_tokens!r}", "given"):
        return with_special(tokenizer, special_names(config), config.vocab_size)


@contextlib.contextmanager
def _refusing(file: object, kind: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(no_tokenizers(kind)) from error
    except Exception as error:  # also what the library raises for merges that do not fit
        raise UserError(f"{file} cannot be read: {str(error) or type(error).__name__}") from error


def published(tokenizer: Tokenizer, task: str) -> tuple[str, dict[str, bytes]]:
    """The text of a tokenizer.json, and other files, by which transformers cuts texts as ours does.

    It puts our mark before a text. A given one is as it was given. Raises UserError for a task's.
    """
    if isinstance(tokenizer, Given):
        return tokenizer.serialised, {}
    if isinstance(tokenizer, Symbols | Ids):
        other = "data.tokenizer='tokens': must be another"
        other = f"data.task={task!r}: must be ''" if task else other
        raise UserError(f"{other} in a model that is written as a published one")
    import tokenizers

    if isinstance(tokenizer, BPE):
        made = tokenizers.Tokenizer.from_str(tokenizer.serialised)
    else:
        made = byte_level(tokenizers.models.BPE(vocab=ALPHABET, merges=[]))
        made.add_special_tokens([MARK])
    begins = {"single": f"{MARK} $A", "special_tokens": [(MARK, tokenizer.mark)]}
    made.post_processor = tokenizers.processors.TemplateProcessing(**begins)
    # else transformers makes another one, as the kind of model has it
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": MARK}
    return made.to_str(), {"tokenizer_config.json": json.dumps(kind).encode()}


def save_tokenizer(tokenizer: Tokenizer, home: files.Path) -> None:
    """Keeps what `load_tokenizer` needs; bytes and tokens of others need nothing."""
    if not isinstance(tokenizer, Bytes | Ids):
        files.write_durably(home / "tokenizer.json", tokenizer.serialised)


def no_tokenizers(kind: str) -> str:
    return f"data.tokenizer={kind!r} needs the tokenizers package: pip install 'ngc_jax[bpe]'"
