"""GGUF files, of llama.cpp, read as if they were the safetensors that they were made from.

For: `open_file`: fields and tensors under their published names, and a tokenizer.json. The header
is read here, since every count in it must be checked before it is believed; the library `gguf`
computes the weights from their quantised blocks. Not for: writing such a file.
"""

import json
import math
import pathlib
import re
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import gguf
import numpy as np

from ngc_jax.convert.source import Lazy, few, read_at
from ngc_jax.data.given import SPLITS
from ngc_jax.runtime.errors import UserError

# The most that a header may hold, which bounds the memory that reading it takes.
HEADER_BYTES, VALUES = 1 << 28, 1 << 22
SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9  # kinds of values, beside the SCALARS
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
KINDS += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
ARCHITECTURES |= {"qwen3": "Qwen3ForCausalLM"}
ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
ENDS |= {"output.weight": "lm_head.weight"}
LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
LAYER |= {f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"} | {"attn_output": "self_attn.o_proj"}
LAYER |= {f"attn_{n}_norm": f"self_attn.{n}_norm" for n in "qk"}
LAYER |= {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
# Metadata "ARCHITECTURE.name" -> the field of config.json; see also `_config`
FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
    "attention.sliding_window": "sliding_window",
}
SCALED = [
    (8.0, 1.0, 4.0, 8192),
    (32.0, 1.0, 4.0, 8192),
]  # Llama 3.1, 3.2: the file has factors only
NORMAL, CONTROL, DEFINED = 1, 3, 4  # types of tokens
_LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split(name: str) -> dict[str, Any]:
    how = {"behavior": "Isolated", "invert": False}
    split = {"type": "Split", "pattern": {"Regex": SPLITS[name]}, **how}
    return {"type": "Sequence", "pretokenizers": [split, _LETTERS | {"use_regex": False}]}


_DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _LETTERS | {"use_regex": True},
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _LETTERS | {"use_regex": True}]},
    "qwen2": _split("qwen2"),
    "llama-bpe": _split("llama-bpe"),
    "gpt-4o": _split("gpt-4o"),
}


def open_file(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Lazy], str]:
    """The config, the tensors and the tokenizer of a GGUF file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give a .gguf file")
    try:
        held = np.memmap(path, np.uint8, "r")
        told, tensors = _Header(path, held).read()
        config, tokenizer = _config(told, tensors), _tokenizer(told)
        tensors = _published(config, tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, LookupError, TypeError, ArithmeticError, struct.error) as error:
        raise UserError(f"{path} is damaged, or no GGUF file: {error}") from error
    return config, tensors, tokenizer


class _Header:
    """What stands before the weights, read from the front; ValueError for more than is there."""

    def __init__(self, path: pathlib.Path, held: np.ndarray):
        self.path, self.held, self.at, self.left = path, held, 0, VALUES
        self.end = min(len(held), HEADER_BYTES)

    def take(self, size: int) -> bytes:
        if size > self.end - self.at:
            raise ValueError(f"it ends before the {size} bytes that its byte {self.at} asks for")
        self.at += size
        return self.held[self.at - size : self.at].tobytes()

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, size: int) -> int:
        """A number of things of at least so many bytes, each of which takes memory."""
        found = int(self.number("Q"))
        if found * size > self.end - self.at or found > self.left:
            raise ValueError(f"it counts {found} values at byte {self.at}, more than there can be")
        self.left -= found
        return found

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"a value of kind {kind}, at byte {self.at}, is not known")
        of = self.number("I")
        if of == STRING:
            return [self.string() for _ in range(self.count(8))]
        if of not in SCALARS:
            raise ValueError(f"an array of kind {of}, at byte {self.at}, is not known")
        size = struct.calcsize(f"<{SCALARS[of]}")
        count = self.count(size)
        return [*struct.unpack(f"<{count}{SCALARS[of]}", self.take(count * size))]

    def read(self) -> tuple[dict[str, Any], dict[str, Lazy]]:
        """The metadata, and the tensors under the names of GGUF."""
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self.number("I")) not in (2, 3):
            raise ValueError(f"its version is {version}: must be 2 or 3")
        rows, entries = self.count(32), self.count(13)
        told: dict[str, Any] = {}
        for _ in range(entries):
            name = self.string()
            if name in told:
                raise ValueError(f"it has {name!r:.80} twice")
            told[name] = self.value(self.number("I"))
        infos = {}
        for _ in range(rows):
            name, axes = self.string(), self.number("I")
            if name in infos or not 1 <= axes <= 4:
                raise ValueError(f"it has {name!r:.80} twice, or of {axes} axes")
            shape = tuple(reversed(struct.unpack(f"<{axes}Q", self.take(8 * axes))))
            infos[name] = shape, self.number("I"), self.number("Q")
        align = told.get("general.alignment", 32)
        if type(align) is not int or not 1 <= align <= 1 << 20:
            raise ValueError(f"general.alignment={align!r:.40}: must be 32")
        start = -(-self.at // align) * align
        return told, {name: self.tensor(name, start, *info) for name, info in infos.items()}

    def tensor(self, name: str, start: int, shape: tuple[int, ...], kind: int, at: int) -> Lazy:
        """A tensor whose bytes lie within the file. Raises UserError for an unknown kind."""
        known = {gguf.GGMLQuantizationType[one].value: one for one in KINDS}
        if kind not in known:
            names = {one.value: one.name for one in gguf.GGMLQuantizationType}
            wants = f"must be one of {', '.join(KINDS)}"
            raise UserError(f"{name!r:.80} has kind {names.get(kind, kind)}: {wants}")
        of = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[of]
        bytes_ = math.prod(shape) // block * size
        if shape[-1] % block or not bytes_ or start + at + bytes_ > len(self.held):
            raise ValueError(f"{name!r:.80} of shape {[*shape]} does not fit into it")

        def read() -> np.ndarray:
            raw = read_at(self.path, start + at, bytes_).reshape(-1, shape[-1] // block * size)
            return gguf.dequantize(raw, of).reshape(shape).astype(np.float32, copy=False)

        return Lazy(shape, np.dtype(np.float32), read)


def _config(told: dict[str, Any], tensors: dict[str, Lazy]) -> dict[str, Any]:
    """The fields of config.json. Raises UserError for metadata that must not be passed over."""
    kind = told.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(f"general.architecture={kind!r:.80}: must be one of {[*ARCHITECTURES]}")
    own = {name: v for name, v in told.items() if name.startswith(f"{kind}.")}
    own = {name.removeprefix(f"{kind}."): value for name, value in own.items()}
    config = {field: own.pop(name) for name, field in FIELDS.items() if name in own}
    if type(heads := config.get("num_attention_heads")) is not int or not heads:
        raise UserError(f"{kind}.attention.head_count={heads!r:.40}: must be a number, such as 9")
    head = config.get("head_dim") or config["hidden_size"] // heads
    scaling = own.pop("rope.scaling.type", "none"), own.pop("rope.scaling.factor", 1.0)
    if scaling[0] not in ("none", "linear"):
        raise UserError(f"{kind}.rope.scaling.type={scaling[0]!r:.40}: must be 'none' or 'linear'")
    config["rope_scaling"] = None
    if scaling[0] == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": scaling[1]}
    factors = tensors.pop("rope_freqs.weight", None)
    if factors is not None:
        config["rope_scaling"] = _scaling(factors.read().ravel(), config["rope_theta"], head)
    if config.pop("sliding_window", 0):
        raise UserError(f"{kind}.attention.sliding_window: must be 0, or read it from safetensors")
    embedding = tensors["token_embd.weight"].shape
    own.pop("rope.scaling.original_context_length", None)  # of kinds of scaling that are refused
    # Beside what is read: what must have one value
    fixed = {"rope.dimension_count": head, "attention.value_length": head, "expert_count": 0}
    fixed |= {"vocab_size": embedding[0]}
    for name, value in own.items():
        if fixed.get(name) != value:
            wants = f"must be {fixed[name]}" if name in fixed else "is not known"
            raise UserError(f"{kind}.{name}={value!r:.80}: {wants}, so that the model would differ")
    tied = "output.weight" not in tensors
    made = {"architectures": [ARCHITECTURES[kind]], "model_type": kind, "hidden_act": "silu"}
    if kind == "qwen3" or head * heads != config["hidden_size"]:
        config["head_dim"] = head
    # The file has it in float32: 1e-5 is stored as 0.00000999999974738.
    for field in ("rms_norm_eps", "rope_theta"):
        if type(value := config.get(field)) is float:
            config[field] = float(f"{value:.7g}")
    return made | config | {"vocab_size": embedding[0], "tie_word_embeddings": tied}


def _scaling(factors: np.ndarray, base: float, head: int) -> dict[str, Any]:
    """The scaling of Llama 3 that divides each frequency by these factors [head / 2]."""
    for factor, low, high, original in SCALED if 2 * len(factors) == head else ():
        rounds = original * base ** (-np.arange(0, head, 2) / head) / (2 * math.pi)
        keep = np.clip((rounds - low) / (high - low), 0, 1)
        expected = 1 / (keep + (1 - keep) / factor)
        if np.allclose(expected, factors, rtol=1e-4):
            named = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low}
            return named | {"high_freq_factor": high, "original_max_position_embeddings": original}
    raise UserError("rope_freqs.weight: must be that of Llama 3.1 or 3.2, or read safetensors")


def _published(config: dict[str, Any], tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """The tensors under their names in safetensors, as they were there."""
    made, unknown = dict[str, Lazy](), []
    heads = config["num_attention_heads"]
    turned = {"attn_q": heads, "attn_k": config.get("num_key_value_heads", heads)}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)", name)
        if name in ENDS:
            made[ENDS[name]] = tensor
        elif found and found[2] in LAYER:
            if config["model_type"] == "llama" and found[2] in turned:
                tensor = _unpermuted(tensor, turned[found[2]])
            made[f"model.layers.{found[1]}.{LAYER[found[2]]}.{found[3]}"] = tensor
        else:
            unknown.append(ascii(name)[1:-1][:80])
    if unknown or len(made) < len(tensors):
        raise UserError(f"it has tensors that are not known or there twice: {few(unknown)}")
    return made


def _unpermuted(tensor: Lazy, heads: Any) -> Lazy:
    """Rows of q or k as published: rotary pairs half a head apart; there they are neighbours."""
    rows, *rest = tensor.shape
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise UserError(f"{rows} rows of a query or key: must be a multiple of 2 x {heads!r} heads")
    pairs = (heads, rows // heads // 2, 2, *rest)
    read: Callable[[], np.ndarray] = partial(_swap, tensor.read, pairs, tensor.shape)
    return Lazy(tensor.shape, tensor.dtype, read)


def _swap(read: Any, pairs: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    return read().reshape(pairs).swapaxes(1, 2).reshape(shape)


def _tokenizer(told: dict[str, Any]) -> str:
    """The text of a tokenizer.json. Raises UserError for a kind that is not of byte pairs."""
    kind, pre = told.get("tokenizer.ggml.model"), told.get("tokenizer.ggml.pre", "")
    if kind != "gpt2":
        raise UserError(f"tokenizer.ggml.model={kind!r:.40}: must be 'gpt2', byte pairs")
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"tokenizer.ggml.pre={pre!r:.40}: must be one of {[*PRE_TOKENIZERS]}")
    tokens, merges = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.merges"]
    kinds = told.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or not {*map(type, [*tokens, *merges])} <= {str}:
        raise ValueError("its tokens are not texts, each of a type")
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] == NORMAL}
    about = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **about, "special": kinds[i] == CONTROL}
        for i, token in enumerate(tokens)
        if kinds[i] in (CONTROL, DEFINED)
    ]
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
    }
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"ignore_merges": pre == "llama-bpe", "vocab": vocab, "merges": merges}
    post = None
    if told.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        post = _template(tokens[told["tokenizer.ggml.bos_token_id"]], told)
    made: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
    }
    made |= {"normalizer": {"type": "NFC"} if pre == "qwen2" else None}
    made |= {"pre_tokenizer": PRE_TOKENIZERS[pre], "post_processor": post}
    made |= {"decoder": _LETTERS | {"use_regex": True}, "model": model}
    return json.dumps(made, ensure_ascii=False)


def _template(token: str, told: dict[str, Any]) -> dict[str, Any]:
    """The post-processor that puts a token before each text."""
    first, number = (
        {"SpecialToken": {"id": token, "type_id": 0}},
        told["tokenizer.ggml.bos_token_id"],
    )
    texts = [{"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB")]
    named = {token: {"id": token, "ids": [number], "tokens": [token]}}
    single, pair = [first, texts[0]], [first, texts[0], first, texts[1]]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}
