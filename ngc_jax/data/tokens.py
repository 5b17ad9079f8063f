"""`load_data`, which gives a run what it learns from: windows of tokens, problems, or images.

For: which corpora and tokenizer `config.data` asks for. Not for: tokenizers (`tokenizer.py`), how
tokens are made (`token_files.py`), batches (`batches.py`).
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ngc_jax.data import cache, corpora, packing, problems
from ngc_jax.data.batches import Examples, Mixture, Windows
from ngc_jax.data.byte_pairs import BPE
from ngc_jax.data.corpus import Corpus
from ngc_jax.data.given import Given
from ngc_jax.data.images import load_images
from ngc_jax.data.packing import Packed
from ngc_jax.data.settings import special_names
from ngc_jax.data.tasks import TASKS, boundary
from ngc_jax.data.token_files import SPLITS, TokenFiles, name_of
from ngc_jax.data.tokenizer import (
    Bytes,
    Ids,
    Symbols,
    Tokenizer,
    given_at,
    load_tokenizer,
    no_tokenizers,
    save_tokenizer,
    specially,
)
from ngc_jax.data.unprepared import Unprepared
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import amount


class Data(NamedTuple):
    """What a run learns from, and what is held out: text in windows, problems, or images."""

    tokenizer: Tokenizer
    train: Examples
    validation: Examples
    fingerprint: str  # equal fingerprints are equal data
    summary: str


def most_tokens(config: Any) -> int:
    """The vocabulary of `config.data` at most: a BPE learned on little text has fewer tokens.

    Of images, whose classes are known when they are read, ten.
    """
    if config.kind == "images":
        return 10
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
    if config.kind == "images":
        return Data(*load_images(config))
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
    if config.tokenizer_path:
        given = given_at(config)
    if config.tokenizer == "given" and given is None:
        wants = "'bytes' or 'bpe' where no pretrained model and no data.tokenizer_path gives one"
        raise UserError(f"data.tokenizer='given': must be {wants}")
    kept = cache.cache_directory(config)
    mixed = corpora.open_corpora(config, kept)
    of = (fingerprint := mixed.fingerprint)[:16]
    kind: str = config.tokenizer
    given = specially(given, config) if isinstance(given, Given) else given
    tokenizer: Tokenizer = given or Bytes()
    if config.tokenizer == "tokens":
        kind, tokenizer = f"tokens-{config.vocab_size}", Ids(config.vocab_size)
    with _refused(config):
        if config.tokenizer == "bpe" and given is None:

            def learn(to: pathlib.Path) -> None:
                made = BPE.train(corpora.sample(mixed), config.vocab_size, special_names(config))
                save_tokenizer(BPE(made), to)

            named = f"-{_sha256(config.special_tokens)[:8]}" if config.special_tokens else ""
            entry = cache.entry(kept, f"bpe-{config.vocab_size}-{of}{named}", learn)
            tokenizer = load_tokenizer(entry, config)
        if isinstance(tokenizer, BPE):
            kind += f"-{_sha256(tokenizer.serialised)[:16]}-{tokenizer.vocab}"

        wanted = SPLITS if config.prepare else SPLITS[1:]

        def write(to: pathlib.Path) -> None:
            save_tokenizer(tokenizer, to)
            TokenFiles(mixed, tokenizer, to, wanted).write()

        def help_with(to: pathlib.Path) -> None:
            TokenFiles(mixed, tokenizer, to, wanted).help()

        name = "tokens" if config.prepare else "held"
        home = cache.entry(kept, f"{name}-{kind}-{of}", write, help_with)
    meta = json.loads((home / "meta.json").read_text("utf-8"))
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

    def packed(of: Windows, name: str) -> Packed:
        name = f"packed-{name}-{config.context}-{home.name}"
        build = lambda to: packing.write(of.tokens, of.mark, of.context, to)  # noqa: E731
        spans = cache.entry(kept, name, build)
        return Packed(of.tokens, spans, of.context, of.mark, of.boundary is not None)

    def unprepared(part: Corpus) -> Unprepared:
        if part.spans is None:
            wants = "must be True where data.path names no files of plain text"
            raise UserError(f"data.prepare=False: {wants}")
        made = Unprepared(part.spans(), tokenizer, config.context, ends)
        if not len(made):
            wants = f"give more text than data.context={config.context}"
            raise UserError(f"the train text is shorter than a window: {wants}")
        return made

    if isinstance(tokenizer, BPE):
        steps = "" if config.prepare else " unprepared"
        fingerprint = _sha256(fingerprint + tokenizer.serialised + steps)
    splits, sizes = list[Examples](), list[str]()
    for split in ("train", "validation"):
        # A held-out text of the user's own is every part's: it counts once.
        own = split == "validation" and config.validation_path
        names = [name_of(split, i) for i in range(1 if own else len(mixed.parts))]
        if split not in wanted:
            found = [unprepared(part) for part in mixed.parts]
            splits.append(found[0] if len(found) == 1 else Mixture(found, mixed.shares))
            sizes.append(f"{amount(sum(map(len, found)))} {split} windows, made when they are read")
            continue
        made: list[Any] = [windows(name) for name in names]
        sizes.append(f"{amount(sum(len(of.tokens) for of in made))} {split} tokens")
        if split == "train" and config.packing == "best-fit":
            made = [packed(of, name) for of, name in zip(made, names, strict=True)]
        splits.append(made[0] if len(made) == 1 else Mixture(made, mixed.shares))
    if len(mixed.parts) > 1:
        fingerprint = _sha256(" ".join([fingerprint, *map(str, mixed.shares)]))
    told = f"{mixed.summary}; {', '.join(sizes)}"
    return Data(tokenizer, splits[0], splits[1], fingerprint, told)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _refused(config: Any) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(no_tokenizers(config.tokenizer)) from error
    except UnicodeDecodeError as error:
        wants = f"as data.tokenizer={config.tokenizer!r} wants it: use 'bytes'"
        raise UserError(f"the text is not UTF-8 ({error}), {wants}") from error
