"""Tokenizers: text to tokens and back.

For: bytes, learned byte pairs, those of pretrained models, tokens of others, symbols of tasks; and
the file that keeps one. Not for: texts, or windows of tokens (`tokens.py`).
"""

import base64
import contextlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ngc_jax.data import NOTHING
from ngc_jax.data.tasks import TASKS
from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError

MARK = "<|document|>"
LARGEST = 1 << 28  # bytes of a tokenizer
LONGEST = 128  # bytes of a token that is learned, at most
# The printable character that stands for each byte in byte-level BPE, as in GPT-2.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
ALPHABET = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}
# How a text is cut before pairs merge: the patterns of GPT-2, Llama 3 and Qwen2. Others are
# refused: a pattern may take a time that is exponential in the text.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": rf"{_WORDS}\p{{N}}{{1,3}}{_REST}",
    "qwen2": rf"{_WORDS}\p{{N}}{_REST}",
}
ENDS = ("<|endoftext|>", "<|end_of_text|>")  # what lies between documents where nothing begins one
MOST = 1 << 20  # tokens of a tokenizer that is given
# Names of tiktoken: how they cut a text, and the number of ENDS[0].
RANKED = {"r50k_base": ("gpt-2", 50256), "p50k_base": ("gpt-2", 50256)}
RANKED |= {"gpt2": ("gpt-2", 50256), "cl100k_base": ("llama-bpe", 100257)}


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


class BPE:
    """Byte-level byte pair encoding (library `tokenizers`), trained on the train split."""

    cuts = True

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
        self.model = byte_level(tokenizers.models.BPE(vocab=learned["vocab"], merges=merges))
        self.model.add_special_tokens([MARK])
        self.model.encode_special_tokens = True  # the mark, spelt out in a text, is text

    @staticmethod
    def train(texts: Iterable[str], vocab: int) -> str:
        """Learns `vocab` tokens, the mark among them; returns the serialised tokenizer."""
        import tokenizers

        model, letters = tokenizers.models.BPE(), tokenizers.pre_tokenizers.ByteLevel.alphabet()
        how: Any = {"special_tokens": [MARK], "initial_alphabet": letters, "show_progress": False}
        how["max_token_length"] = LONGEST
        trainer, model = tokenizers.trainers.BpeTrainer(vocab_size=vocab, **how), byte_level(model)
        model.train_from_iterator(texts, trainer)
        return model.to_str()

    def encode(self, text: bytes) -> np.ndarray:
        return self.encode_all([text])[0]

    def encode_all(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        """The tokens of each text, encoded on all cores."""
        texts = [piece.decode() for piece in pieces]
        made = self.model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(tokens.ids, np.int32) for tokens in made]

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self.spelling[token] for token in tokens)


def byte_level(model: Any) -> Any:
    """A tokenizer of the bytes of a text, spelt in ALPHABET, by a model of `tokenizers`."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


class Given(BPE):
    """The tokenizer of a pretrained model: a `tokenizer.json` of SmolLM2, Llama 3, Qwen2 or Qwen3.

    `mark` is the token that the tokenizer puts before a text, else the end of a text, else 0. Only
    tokens, merges, NFC and known splits are taken. Special tokens, spelt out in a text, are text;
    added ones that are not special, such as Qwen3's <think>, are one token.
    """

    def __init__(self, serialised: str, vocab: int = 0):
        """vocab: rows of the model's embedding, where these are more. Raises ValueError."""
        import tokenizers

        self.serialised, told = serialised, json.loads(serialised)
        model, added = told["model"], {t["content"]: t for t in told.get("added_tokens") or ()}
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
            if model.get(name):
                raise ValueError(f"model.{name}={model[name]!r:.40}: must be none")
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"model.type={model['type']!r:.40}: must be 'BPE', of bytes")
        ids = model["vocab"] | {content: token["id"] for content, token in added.items()}
        numbers = set(ids.values())
        if not ids or {*map(type, numbers)} != {int} or len(numbers) < len(ids):
            raise ValueError("its tokens are not numbered")
        least = max(numbers) + 1
        self.vocab = vocab or least
        if not 0 <= min(numbers) <= least <= min(self.vocab, MOST):
            most = f"fewer than {MOST} and data.vocab_size={self.vocab}"
            raise ValueError(f"its tokens are numbered up to {least - 1}: must be {most}")
        special = {content for content, token in added.items() if token.get("special")}
        self.spelling = [b""] * self.vocab
        for token, number in ids.items():
            if token not in special:
                plain = token in added
                spelt = token.encode() if plain else bytes(ALPHABET[letter] for letter in token)
                self.spelling[number] = spelt
        self.lengths = np.array([len(token) for token in self.spelling], np.int32)
        self.mark = ids.get(_begins(told, added), 0)
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        merges, words = [(a, b) for a, b in pairs], model.get("ignore_merges") is True
        learned = {token: i for token, i in ids.items() if token not in special}
        made = tokenizers.models.BPE(vocab=learned, merges=merges, ignore_merges=words)
        self.model = tokenizers.Tokenizer(made)
        whole = [_added(token) for content, token in added.items() if content not in special]
        self.model.add_tokens(whole)  # under their numbers in `learned`
        self.model.pre_tokenizer = _cut(told.get("pre_tokenizer"))
        match told.get("normalizer"):
            case None:
                pass
            case {"type": "NFC"}:
                self.model.normalizer = tokenizers.normalizers.NFC()
            case other:
                raise ValueError(f"normalizer={other!r:.80}: must be null or NFC")


def _added(token: dict[str, Any]) -> Any:
    import tokenizers

    how = {name: token.get(name) is True for name in ("single_word", "lstrip", "rstrip")}
    normalized = token.get("normalized", True) is True
    return tokenizers.AddedToken(token["content"], normalized=normalized, **how)


def _begins(told: Any, added: dict[str, Any]) -> str | None:
    """The token before each document: of the template, else one of `added` that ends a text."""
    after = told.get("post_processor") or {}
    for part in after.get("processors") or [after]:
        match part:
            case {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": str(token)}}, *_],
            }:
                return token
    return next((token for token in ENDS if token in added), None)


def _cut(told: Any) -> Any:
    """The pre-tokenizer that a `tokenizer.json` tells of. Raises ValueError for an unknown one."""
    from tokenizers import Regex, pre_tokenizers

    made: list[Any] = []
    parts = told["pretokenizers"] if told and told.get("type") == "Sequence" else [told]
    for part in parts:
        match part:
            case {"type": "ByteLevel"} if not part.get("add_prefix_space"):
                words = part.get("use_regex", True) is True
                made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words))
            case {"type": "Digits"}:
                made.append(pre_tokenizers.Digits(part.get("individual_digits") is True))
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} if (
                pattern in SPLITS.values() and not part.get("invert")
            ):
                made.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
            case _:
                able = "ByteLevel without add_prefix_space, Digits, or a Split of a known kind"
                raise ValueError(f"pre_tokenizer={part!r:.200}: must be {able}")
    if not isinstance(made[-1], pre_tokenizers.ByteLevel):
        raise ValueError("pre_tokenizer: must end with ByteLevel")
    return pre_tokenizers.Sequence(made)


def _of_ranks(name: str, text: str) -> str:
    """The `tokenizer.json` of a file of tiktoken: on each line a token, in Base64, and its rank.

    Raises ValueError for a name that is not in RANKED, and for what is no such file.
    """
    if name not in RANKED:
        raise ValueError(f"its name must be one of tiktoken's: {', '.join(RANKED)}")
    split, end = RANKED[name]
    letters = {byte: letter for letter, byte in ALPHABET.items()}
    lines = (line.split() for line in text.splitlines())
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    vocab = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # as the text of this token merges; the last merge makes it
            pairs = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append([vocab[part] for part in parts])
    cut = {"type": "Split", "pattern": {"Regex": SPLITS[split]}, "behavior": "Isolated"}
    spelt = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    numbered = {vocab[token]: rank for token, rank in ranks.items()}
    model = {"type": "BPE", "vocab": numbered, "merges": merges, "ignore_merges": True}
    ends = [{"id": end, "content": ENDS[0], "special": True}]
    cuts = {"type": "Sequence", "pretokenizers": [cut, spelt]}
    return json.dumps({"model": model, "pre_tokenizer": cuts, "added_tokens": ends})


class Symbols:
    """The alphabet of a task: its problems are tokens, so nothing is encoded."""

    mark, lengths = NOTHING, None

    def __init__(self, symbols: Sequence[str]):
        self.symbols, self.vocab = tuple(symbols), len(symbols)
        self.serialised = json.dumps({"symbols": self.symbols})

    def decode(self, tokens: Iterable[int]) -> bytes:
        return " ".join(self.symbols[token] for token in tokens).encode()


Tokenizer = Bytes | BPE | Ids | Symbols  # `Given` is a BPE


def load_tokenizer(home: files.Path, config: Any) -> Tokenizer:
    """The tokenizer of `config.data`, as a directory keeps it. Raises UserError for another."""
    if not config.task and config.tokenizer in ("bytes", "tokens"):
        return Bytes() if config.tokenizer == "bytes" else Ids(config.vocab_size)
    file = home / "tokenizer.json"
    with _refusing(file, config.tokenizer):
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
        text = _of_ranks(file.stem, text) if file.suffix == ".tiktoken" else text
        return Given(text, config.vocab_size)


def open_given(serialised: str, vocab: int, of: object) -> Given:
    """The tokenizer of a pretrained model, as `Given`. Raises UserError, which names its file."""
    with _refusing(of, "given"):
        return Given(serialised, vocab)


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
