"""What the fields of a published config.json mean, of the Llama family: a table, read both ways.

For: `fields_of` and `config_of`. Nothing is passed over: a field is honoured, known to change
nothing, or refused. Not for: tensors (`names.py`), or files (`source.py`).
"""

from collections.abc import Mapping
from typing import Any

from ngc_jax.runtime.errors import UserError

Fields = dict[str, Any]
KINDS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
KINDS |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SIZES = {
    "hidden_size": "model.width",
    "intermediate_size": "model.hidden",
    "num_hidden_layers": "model.prelude",
    "num_attention_heads": "model.heads",
    "vocab_size": "data.vocab_size",
    "max_position_embeddings": "data.context",
}
# Ours that have one value in every model of this family
FIXED = {"model.kind": "decoder", "model.rule": "dense", "model.groups": 1, "model.core": 0}
FIXED |= {"model.coda": 0, "model.exchange_activation": "silu", "model.delays": ""}
# Ours of a converted model, beside its model.rule and model.ranks
CONVERTED = {"model.p_intra": 0, "model.form": "signals", "model.match": ""}
FACTORED = "ngc_"  # before the model_type of a folder that has factors of matrices
# Theirs that must have one value, where they are given; None is as if a field were not given
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_interleaved": False}
ONLY |= {"partial_rotary_factor": 1.0, "is_decoder": False, "is_encoder_decoder": False}
ONLY |= {"add_cross_attention": False, "pretraining_tp": 1, "use_mrope": False}
# Theirs that change no logit: of training, of generation, of the file
IGNORED = {
    "architectures",
    "model_type",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
}
IGNORED |= {
    "initializer_range",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
IGNORED |= {"_name_or_path", "_attn_implementation", "is_llama_config", "transformers.js_config"}
IGNORED |= {
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    "unk_token_id",
}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SCALINGS = {"default": (), "linear": ("factor",), "llama3": LLAMA3}
MOST = 1 << 24  # of a size


class _Told:
    """The fields of a config.json, each taken once and checked. Raises UserError."""

    def __init__(self, config: Mapping[str, Any], where: str = "config.json: "):
        self.left = {name: v for name, v in config.items() if v is not None}
        self.where = where

    def refuse(self, name: str, value: Any, wants: str) -> UserError:
        return UserError(f"{self.where}{name}={value!r:.100}: must be {wants}")

    def take(self, name: str, default: Any = None) -> Any:
        return self.left.pop(name, default)

    def size(self, name: str, default: Any = None, most: int = MOST) -> int:
        value = self.take(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.refuse(name, value, f"a whole number from 1 to {most}, for instance 64")
        return value

    def number(self, name: str, default: Any = None) -> float:
        value = self.take(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:  # an int may be any
            raise self.refuse(name, value, "a number above 0, for instance 1.0")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if type(value) is not bool:
            raise self.refuse(name, value, "true or false")
        return value

    def end(self) -> None:
        for name, value in self.left.items():
            raise self.refuse(ascii(name)[1:-1][:80], value, "left out, since it is not known here")


def fields_of(config: Mapping[str, Any]) -> Fields:
    """Our fields, {"model.width": 576, ...}, of a config.json. Raises UserError for another model.

    "data.context" is the longest text that the model was made for; a run may have a smaller one.
    """
    told = _Told({name: value for name, value in config.items() if name not in IGNORED})
    kind, made = config.get("model_type"), config.get("architectures")
    if isinstance(kind, str) and kind.startswith(FACTORED):
        rule, ranks = (told.take(name) for name in ("ngc_rule", "ngc_ranks"))
        if rule not in ("broadcast", "leaders"):
            raise told.refuse("ngc_rule", rule, "'broadcast' or 'leaders'")
        if not isinstance(ranks, str) or not ranks:
            raise told.refuse("ngc_ranks", ranks, "such as 'query:96,key:64,...', for each layer")
        plain = {n: v for n, v in config.items() if n not in ("ngc_rule", "ngc_ranks")}
        dense = fields_of(plain | {"model_type": kind.removeprefix(FACTORED)})
        return dense | CONVERTED | {"model.rule": rule, "model.ranks": ranks}
    if not isinstance(kind, str) or kind not in KINDS:
        raise told.refuse("model_type", kind, f"one of {', '.join(map(repr, KINDS))}")
    if made is not None and made != [KINDS[kind]]:
        raise told.refuse("architectures", made, f"[{KINDS[kind]!r}]")
    for name, wants in ONLY.items():
        if (value := told.take(name, wants)) != wants:
            raise told.refuse(name, value, repr(wants))
    told.left.setdefault("max_position_embeddings", 2048)
    most = {"num_hidden_layers": 1000}
    sizes = {ours: told.size(name, most=most.get(name, MOST)) for name, ours in SIZES.items()}
    fields: Fields = FIXED | sizes
    width, heads = fields["model.width"], fields["model.heads"]
    if "head_dim" not in told.left and width % heads:
        raise told.refuse("num_attention_heads", heads, f"a divisor of hidden_size={width}")
    head, keys = told.size("head_dim", width // heads), told.size("num_key_value_heads", heads)
    if heads % keys:
        raise told.refuse("num_key_value_heads", keys, f"a divisor of {heads} heads")
    if head % 2:
        raise told.refuse("head_dim", head, "even, since positions turn pairs of channels")
    base, scaling = _rope(told)
    fields |= {
        "model.kv_heads": 0 if keys == heads else keys,
        "model.head_width": 0 if head * heads == width else head,
        "model.rope_base": base,
        "model.rope_scaling": scaling,
        "model.norm_epsilon": told.number("rms_norm_eps", 1e-6),
        "model.tied": told.flag("tie_word_embeddings"),
        "model.qkv_bias": kind == "qwen2",
        "model.qk_norm": kind == "qwen3",
        "model.attend": _window(told, kind, fields["model.prelude"]),
        "data.tokenizer": "given",
    }
    told.end()
    return fields


def _rope(told: _Told) -> tuple[float, str]:
    """The base of the rotary angles, and their scaling as our field has it."""
    given = told.take("rope_parameters") or {}  # since transformers 5; before, two fields
    given = given or told.take("rope_scaling") or {}
    if not isinstance(given, dict):
        raise told.refuse("rope_scaling", given, "null or an object with a rope_type")
    rope = _Told(given, f"{told.where}rope_scaling.")
    old, kind = rope.take("type", "default"), rope.take("rope_type")
    kind = old if kind is None else kind
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise rope.refuse("rope_type", kind, f"one of {', '.join(map(repr, SCALINGS))}")
    inner = rope.take("rope_theta")
    if inner is not None and told.left.setdefault("rope_theta", inner) != inner:
        raise rope.refuse("rope_theta", inner, f"rope_theta={told.left['rope_theta']!r:.40}")
    base = told.number("rope_theta", 10_000.0)
    numbers = ",".join(f"{rope.number(name):.15g}" for name in SCALINGS[kind])
    rope.end()
    return base, f"{kind}:{numbers}" if numbers else ""


def _window(told: _Told, kind: str, layers: int) -> int:
    """The tokens that all layers look back on; 0 = all. Raises UserError where layers differ."""
    if kind == "llama":
        return 0
    if kind == "mistral":
        return told.size("sliding_window") if "sliding_window" in told.left else 0
    used, first = told.flag("use_sliding_window"), told.take("max_window_layers", layers)
    window, types = told.take("sliding_window", 0), told.take("layer_types")
    slides = [used and type(first) is int and i >= first for i in range(layers)]
    if types is not None:
        known = {"full_attention": False, "sliding_attention": True}
        if (
            not isinstance(types, list)
            or len(types) != layers
            or not {*map(str, types)} <= {*known}
        ):
            raise told.refuse("layer_types", types, f"{layers} of {', '.join(map(repr, known))}")
        slides = [known[str(name)] for name in types]
    if len(set(slides)) > 1:
        what = f"layers of which {sum(slides)} of {layers} have a sliding window"
        raise UserError(f"{told.where}layer_types, max_window_layers: {what}: must be all or none")
    if not slides[0]:
        return 0
    told.left["sliding_window"] = window
    return told.size("sliding_window")


def config_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model with fields as `fields_of` returns them. Raises UserError."""
    if fields.get("model.ranks"):
        dense = config_of({**fields, "model.rule": "dense", "model.ranks": ""})
        del dense["architectures"]  # so that nobody opens it as what it is not
        own = {"ngc_rule": fields["model.rule"], "ngc_ranks": fields["model.ranks"]}
        return dense | own | {"model_type": FACTORED + dense["model_type"]}

    def need(holds: bool, field: str, wants: str) -> None:
        if not holds:
            why = "in a model that is written as a published one"
            raise UserError(f"{field}={fields[field]!r}: must be {wants} {why}")

    for field, value in FIXED.items():  # a dense model has no groups, whatever their number
        need(fields[field] == value or field == "model.groups", field, repr(value))
    bias, norm, window = (fields[f"model.{name}"] for name in ("qkv_bias", "qk_norm", "attend"))
    need(not (bias and norm), "model.qkv_bias", "False where model.qk_norm=True")
    kind = "qwen2" if bias else "qwen3" if norm else "mistral" if window else "llama"
    config: Fields = {"architectures": [KINDS[kind]], "model_type": kind, "hidden_act": "silu"}
    config |= {theirs: fields[ours] for theirs, ours in SIZES.items()}
    heads = fields["model.heads"]
    config |= {
        "num_key_value_heads": fields["model.kv_heads"] or heads,
        "head_dim": fields["model.head_width"] or fields["model.width"] // heads,
        "rms_norm_eps": fields["model.norm_epsilon"],
        "rope_theta": fields["model.rope_base"],
        "rope_scaling": _scaling(fields["model.rope_scaling"]),
        "tie_word_embeddings": fields["model.tied"],
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind != "llama":
        config["sliding_window"] = window or None
    if kind in ("qwen2", "qwen3"):
        layers = fields["model.prelude"]
        config |= {"use_sliding_window": window > 0, "max_window_layers": 0 if window else layers}
    return config


def _scaling(text: str) -> dict[str, Any] | None:
    """The object rope_scaling of our field, such as "linear:2"; None for ""."""
    if not text:
        return None
    kind, _, numbers = text.partition(":")
    values: Fields = dict(zip(SCALINGS[kind], map(float, numbers.split(",")), strict=True))
    if "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = int(values["original_max_position_embeddings"])
    return {"rope_type": kind, **values}
