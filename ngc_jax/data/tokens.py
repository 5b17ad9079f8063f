"""Text to tokens and back, and `load_data`, which gives a run what it learns from.

For: the tokenizers, and a flat file of tokens for each split. Not for: batches (`batches.py`).
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
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
        self.model = byte_level(tokenizers.models.BPE(vocab=learned["vocab"], merges=merges))
        self.model.add_special_tokens([MARK])
        self.model.encode_special_tokens = True  # the mark, spelt out in a text, is text

    @staticmethod
    def train(texts: Iterable[bytes], vocab: int) -> str:
        """Learns `vocab` tokens, the mark among them; returns the serialised tokenizer."""
        import tokenizers

        model, letters = tokenizers.models.BPE(), tokenizers.pre_tokenizers.ByteLevel.alphabet()
        how: Any = {"special_tokens": [MARK], "initial_alphabet": letters, "show_progress": False}
        trainer, model = tokenizers.trainers.BpeTrainer(vocab_size=vocab, **how), byte_level(model)
        model.train_from_iterator((text.decode() for text in texts), trainer)
        return model.to_str()

    def encode(self, text: bytes) -> np.ndarray:
        return np.array(self.model.encode(text.decode(), add_special_tokens=False).ids, np.int32)

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


class Symbols:
    """The alphabet of a task: its problems are tokens, so nothing is encoded."""

    mark, lengths = NOTHING, None

    def __init__(self, symbols: Sequence[str]):
        self.symbols, self.vocab = tuple(symbols), len(symbols)
        self.serialised = json.dumps({"symbols": self.symbols})

    def decode(self, tokens: Iterable[int]) -> bytes:
        return " ".join(self.symbols[token] for token in tokens).encode()


Tokenizer = Bytes | BPE | Symbols  # `Given` is a BPE


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


def load_data(config: Any, mark: int | None = None, tokenizer: BPE | None = None) -> Data:
    """The data of `config.data`; no token sees across the last `mark`. Raises UserError.

    tokenizer: the one to use in place of a new one; needed where data.tokenizer='given'.
    """
    if not config.task:
        return _text(config, mark, tokenizer)
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


def _text(config: Any, mark: int | None, given: BPE | None) -> Data:
    if config.tokenizer == "given" and given is None:
        wants = "'bytes' or 'bpe' where no pretrained model gives a tokenizer"
        raise UserError(f"data.tokenizer='given': must be {wants}")
    kept = cache.cache_directory(config)
    text = corpus.open_corpus(config, kept)
    kind = f"bpe-{config.vocab_size}" if config.tokenizer == "bpe" else config.tokenizer
    if given is not None:
        kind = f"given-{hashlib.sha256(given.serialised.encode()).hexdigest()[:16]}-{given.vocab}"
    name = f"tokens-{kind}-{text.fingerprint[:16]}"
    home = cache.entry(kept, name, lambda building: _tokenise(config, text, building, given))
    meta = json.loads((home / "meta.json").read_text("utf-8"))
    tokenizer = given or load_tokenizer(home, config)
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
    with _refusing(file, config.tokenizer):
        if config.task:
            symbols = Symbols(TASKS[config.task].symbols)
            if files.read_json(file, LARGEST) != {"symbols": [*symbols.symbols]}:
                raise ValueError(f"its symbols are not those of data.task={config.task!r}")
            return symbols
        text = files.read(file, LARGEST).decode()
        return BPE(text) if config.tokenizer == "bpe" else Given(text, config.vocab_size)


def given_in(home: files.Path, config: Any) -> Given | None:
    """The tokenizer of a pretrained model that a work directory keeps; None: of another kind."""
    found = load_tokenizer(home, config.data) if config.data.tokenizer == "given" else None
    return found if isinstance(found, Given) else None


def open_given(serialised: str, vocab: int, of: object) -> Given:
    """The tokenizer of a pretrained model, as `Given`. Raises UserError, which names its file."""
    with _refusing(of, "given"):
        return Given(serialised, vocab)


@contextlib.contextmanager
def _refusing(file: object, kind: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(_no_tokenizers(kind)) from error
    except Exception as error:  # also what the library raises for merges that do not fit
        raise UserError(f"{file} cannot be read: {str(error) or type(error).__name__}") from error


def published(tokenizer: Tokenizer, task: str) -> tuple[str, dict[str, bytes]]:
    """The text of a tokenizer.json, and other files, by which transformers cuts texts as ours does.

    It puts our mark before a text. A given one is as it was given. Raises UserError for a task's.
    """
    if isinstance(tokenizer, Given):
        return tokenizer.serialised, {}
    if isinstance(tokenizer, Symbols):
        raise UserError(
            f"data.task={task!r}: must be '' in a model that is written as a published one"
        )
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
    """Keeps what `load_tokenizer` needs; bytes need nothing."""
    if not isinstance(tokenizer, Bytes):
        files.write_durably(home / "tokenizer.json", tokenizer.serialised)


def _no_tokenizers(kind: str) -> str:
    return f"data.tokenizer={kind!r} needs the tokenizers package: pip install 'ngc_jax[bpe]'"


def _tokenise(config: Any, text: corpus.Corpus, directory: pathlib.Path, given: BPE | None) -> None:
    tokenizer: Bytes | BPE = given or Bytes()
    try:
        if config.tokenizer == "bpe" and given is None:
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
        raise UserError(_no_tokenizers(config.tokenizer)) from error
    except UnicodeDecodeError as error:
        wants = f"as data.tokenizer={config.tokenizer!r} wants it: use 'bytes'"
        raise UserError(f"the text is not UTF-8 ({error}), {wants}") from error
    told = json.dumps({"dtype": dtype.name, "tokens": counts})
    (directory / "meta.json").write_text(told, encoding="utf-8")
