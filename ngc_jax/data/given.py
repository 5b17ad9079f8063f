"""Tokenizers of pretrained models: a `tokenizer.json`, or a file of tiktoken.

For: `Given`, which takes of such a file what is known to be safe, and special tokens by name. Not
for: finding the file (`tokenizer.py`).
"""

import base64
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ngc_jax.data.byte_pairs import ALPHABET, BPE, added_token

# How a text is cut before pairs merge: the patterns of GPT-2, Llama 3, Qwen2 and GPT-4o. Others
# are refused: a pattern may take a time that is exponential in the text.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = (rf"[{_UPPER}]*[{_LOWER}]+", rf"[{_UPPER}]+[{_LOWER}]*")
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLITS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": rf"{_WORDS}\p{{N}}{{1,3}}{_REST}",
    "qwen2": rf"{_WORDS}\p{{N}}{_REST}",
    "gpt-4o": "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{word}{_SHORT}" for word in _CASED)
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
ENDS = ("<|endoftext|>", "<|end_of_text|>")  # what lies between documents where nothing begins one
MOST = 1 << 20  # tokens of a tokenizer that is given
# Names of tiktoken: how they cut a text, and the number of ENDS[0].
RANKED = {"r50k_base": ("gpt-2", 50256), "p50k_base": ("gpt-2", 50256)}
RANKED |= {"gpt2": ("gpt-2", 50256), "cl100k_base": ("llama-bpe", 100257)}
RANKED |= {"o200k_base": ("gpt-4o", 199999)}


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
        whole = [added_token(token) for content, token in added.items() if content not in special]
        self.model.add_tokens(whole)  # under their numbers in `learned`
        self.model.pre_tokenizer = _cut(told.get("pre_tokenizer"))
        match told.get("normalizer"):
            case None:
                pass
            case {"type": "NFC"}:
                self.model.normalizer = tokenizers.normalizers.NFC()
            case other:
                raise ValueError(f"normalizer={other!r:.80}: must be null or NFC")


def with_special(tokenizer: Given, names: Sequence[str], vocab: int) -> Given:
    """The same, but a name of these that is spelt out in a text is one token.

    Names that it does not have get the numbers after its own. Raises ValueError where `vocab` does
    not hold them.
    """
    told = json.loads(tokenizer.serialised)
    known = {token["content"]: token for token in told.setdefault("added_tokens", [])}
    numbers = [*told["model"]["vocab"].values(), *(token["id"] for token in known.values())]
    for name in names:
        if name not in known:
            numbers.append(told["model"]["vocab"].get(name, max(numbers) + 1))
            known[name] = {"id": numbers[-1], "content": name, "normalized": False}
            told["added_tokens"].append(known[name])
        known[name]["special"] = False
    same = told == json.loads(tokenizer.serialised)
    return tokenizer if same else Given(json.dumps(told), vocab)


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


def of_ranks(name: str, text: str) -> str:
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
