"""Byte pairs: a vocabulary learned on a text, and tokens of it.

For: `BPE`, and the spelling of bytes that all such tokenizers share. Not for: those of pretrained
models (`given.py`), or which one a run has (`tokenizer.py`).
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MARK = "<|document|>"
LONGEST = 128  # bytes of a token that is learned, at most
# The printable character that stands for each byte in byte-level BPE, as in GPT-2.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
ALPHABET = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


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
        added = [token["content"] for token in json.loads(serialised).get("added_tokens") or ()]
        named = [token for token in added if token in learned["vocab"] and token != MARK]
        spelt = {MARK: b""} | {token: token.encode() for token in named}
        self.spelling = [spelt.get(t) or bytes(ALPHABET[c] for c in t if t != MARK) for t in ids]
        self.lengths = np.array([len(token) for token in self.spelling], np.int32)
        merges = [(a, b) for a, b in pairs]
        self.model = byte_level(tokenizers.models.BPE(vocab=learned["vocab"], merges=merges))
        self.model.add_special_tokens([MARK])
        self.model.encode_special_tokens = True  # the mark, spelt out in a text, is text
        told = [{"content": token, "normalized": False} for token in named]
        self.model.add_tokens([*map(added_token, told)])

    @staticmethod
    def train(texts: Iterable[str], vocab: int, named: Sequence[str] = ()) -> str:
        """Learns `vocab` tokens, with the mark and those `named`; returns what says so."""
        import tokenizers

        model, letters = tokenizers.models.BPE(), tokenizers.pre_tokenizers.ByteLevel.alphabet()
        how: Any = {"special_tokens": [MARK, *named], "initial_alphabet": letters}
        how["show_progress"] = False
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


def added_token(token: dict[str, Any]) -> Any:
    """One token of `tokenizers` that a text may spell out, as a `tokenizer.json` tells of it."""
    import tokenizers

    how = {name: token.get(name) is True for name in ("single_word", "lstrip", "rstrip")}
    normalized = token.get("normalized", True) is True
    return tokenizers.AddedToken(token["content"], normalized=normalized, **how)
