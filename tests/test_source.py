"""Pretrained checkpoints: formats, names and tokenizers, against published code and libraries."""

import json
import os
import pathlib
import shutil
import struct
from functools import partial

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from conftest import ROOT, make_text
from flax.traverse_util import flatten_dict, unflatten_dict
from llama_reference import forward
from safetensors.numpy import save_file

from ngc_jax.config import base
from ngc_jax.convert import config_json, gguf_file, names
from ngc_jax.convert.source import Lazy, Source, open_source, write_safetensors
from ngc_jax.data.byte_pairs import ALPHABET
from ngc_jax.data.given import SPLITS, Given
from ngc_jax.data.tokenizer import load_tokenizer, save_tokenizer
from ngc_jax.data.tokens import load_data
from ngc_jax.runtime.errors import UserError

GOLDEN = ("llama", "llama3", "qwen2", "qwen3", "mistral")
TEXT = "The year 2024's end:\n\n  it’s  ÅNGSTRÖM 12345 x_1 <|endoftext|> e\u0301 \t\r\n "
TEXT += "I'LL 日本語 \U0001f600"


def golden(name):
    """The config, the tensors, tokens [B, T] and logits [B, T, V] of a published model's code."""
    with np.load(ROOT / "tests" / "golden" / f"pretrained_{name}.npz") as file:
        held = dict(file)
    config, tokens, logits = (held.pop(key) for key in ("config", "tokens", "logits"))
    tensors = {key: tensor.astype(np.float32) for key, tensor in held.items()}
    return json.loads(str(config)), tensors, tokens, logits


def lazy(tensors):
    return {name: Lazy(t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()}


def source(config, tensors):
    return Source(pathlib.Path("there"), config, lazy(tensors), "{}", "")


def abstract(fields):
    """The tree of shapes of a dense decoder with these fields."""
    m = {name.removeprefix("model."): value for name, value in fields.items()}
    head = m["head_width"] or m["width"] // m["heads"]
    q, kv = m["heads"] * head, (m["kv_heads"] or m["heads"]) * head
    d, hidden, vocab, n = m["width"], m["hidden"], m["data.vocab_size"], m["prelude"]
    tree = {"embed": (vocab, d), "norm/scale": (d,)} | (
        {} if m["tied"] else {"unembed": (d, vocab)}
    )
    stage = {"attention_norm/scale": (d,), "exchange_norm/scale": (d,)}
    fans = {"attention_out": (1, d, q), "gate_up": (2, hidden, d), "down": (1, d, hidden)}
    apart = {"query": (1, q, d), "key_value": (2, kv, d)}
    fans |= apart if m["kv_heads"] else {"query_key_value": (3, q, d)}
    stage |= {f"{fan}/dense_block/weight": (k, 1, o, i) for fan, (k, o, i) in fans.items()}
    if m["qkv_bias"]:
        stage |= {"query_bias": (q,), "key_bias": (kv,), "value_bias": (kv,)}
    if m["qk_norm"]:
        stage |= {"query_norm/scale": (head,), "key_norm/scale": (head,)}
    tree |= {f"prelude/{path}": (n, *shape) for path, shape in stage.items()}
    made = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in tree.items()}
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in made.items()})


def byte_pairs(pre, specials=("<|endoftext|>",), first=None, **more):
    """The text of a tokenizer.json of a kind, learned on a little text."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(**more))
    made = gguf_file.PRE_TOKENIZERS[pre]
    model.add_special_tokens([*specials])
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    how = {"special_tokens": [*specials], "initial_alphabet": letters, "show_progress": False}
    told = json.loads(model.to_str()) | {"pre_tokenizer": made}
    if pre == "qwen2":
        told["normalizer"] = {"type": "NFC"}
    model = tokenizers.Tokenizer.from_str(json.dumps(told))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=340, **how)
    model.train_from_iterator([make_text(4000), TEXT.replace("<|", "")], trainer)
    if first:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, model.token_to_id(first))]
        )
    return model.to_str()


def write_folder(home, tensors, config=None, tokenizer=None, shard=None):
    config = config or golden("llama")[0]
    write_safetensors(
        home, tensors, config, tokenizer or "{}", **({"shard_bytes": shard} if shard else {})
    )
    return home


# ---- The second reference ------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_numpy_reference_gives_the_published_logits(name):
    config, tensors, tokens, logits = golden(name)
    np.testing.assert_allclose(forward(config, tensors, tokens), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rope_parameters": {"rope_theta": 10_000.0}}),
        ("llama", {"rms_norm_eps": 1e-2}),
        ("llama3", {"rope_parameters": {"rope_theta": 500.0}}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_golden_logits_depend_on_the_fields_that_they_are_to_test(name, change):
    config, tensors, tokens, logits = golden(name)
    assert abs(forward(config | change, tensors, tokens) - logits).max() > 1e-2


# ---- Names and fields ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_parameters_are_read_and_written_to_the_bit(name):
    config, tensors, *_ = golden(name)
    fields = config_json.fields_of(config)
    tree = abstract(fields)
    params = names.read_params(source(config, tensors), tree)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )
    back = names.tensors_of(params)
    assert {*back} == {*tensors}
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)
    assert config_json.fields_of(config_json.config_of(fields)) == fields


def test_parameters_lie_where_the_decoder_has_them():
    config, tensors, *_ = golden("llama3")
    params = names.read_params(source(config, tensors), abstract(config_json.fields_of(config)))
    at = "model.layers.1.self_attn"
    fan = params["prelude"]["query_key_value"]["dense_block"]["weight"]
    for i, which in enumerate("qkv"):
        np.testing.assert_array_equal(fan[1, i, 0], tensors[f"{at}.{which}_proj.weight"])
    np.testing.assert_array_equal(params["unembed"], tensors["lm_head.weight"].T)
    gate = params["prelude"]["gate_up"]["dense_block"]["weight"][0, 0, 0]
    np.testing.assert_array_equal(gate, tensors["model.layers.0.mlp.gate_proj.weight"])


def test_fields_of_published_configs():
    fields = {name: config_json.fields_of(golden(name)[0]) for name in GOLDEN}
    assert fields["llama"] == {
        **{"model.kind": "decoder", "model.rule": "dense", "model.groups": 1, "model.core": 0},
        **{"model.coda": 0, "model.exchange_activation": "silu", "model.width": 16},
        **{"model.hidden": 24, "model.prelude": 2, "model.heads": 4, "model.kv_heads": 2},
        **{"model.head_width": 0, "model.rope_base": 100_000.0, "model.rope_scaling": ""},
        **{"model.norm_epsilon": 1e-5, "model.tied": True, "model.qkv_bias": False},
        **{"model.qk_norm": False, "model.attend": 0, "data.tokenizer": "given"},
        **{"data.vocab_size": 64, "data.context": 128, "model.delays": ""},
    }
    assert fields["llama3"]["model.rope_scaling"] == "llama3:4,1,4,64"
    assert fields["llama3"]["model.kv_heads"] == 0
    assert fields["qwen2"]["model.qkv_bias"]
    assert (fields["qwen3"]["model.head_width"], fields["qwen3"]["model.qk_norm"]) == (12, True)
    assert fields["mistral"]["model.attend"] == 7


def test_fields_of_the_form_before_transformers_5():
    old = golden("llama3")[0]
    scaling = old.pop("rope_parameters")
    old |= {
        "rope_theta": scaling.pop("rope_theta"),
        "rope_scaling": scaling,
        "torch_dtype": "float16",
    }
    scaling["type"] = scaling.pop("rope_type")
    assert config_json.fields_of(old) == config_json.fields_of(golden("llama3")[0])
    linear = old | {"rope_scaling": {"type": "linear", "factor": 2.5}}
    fields = config_json.fields_of(linear)
    assert fields["model.rope_scaling"] == "linear:2.5"
    assert config_json.fields_of(config_json.config_of(fields)) == fields


def test_a_window_in_all_layers_of_a_qwen_is_honoured_and_in_some_refused():
    config = golden("qwen3")[0]
    some = config | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
    assert config_json.fields_of(some | {"layer_types": None})["model.attend"] == 9
    fields = config_json.fields_of(some | {"layer_types": ["sliding_attention"] * 2})
    assert fields["model.attend"] == 9
    assert config_json.fields_of(config_json.config_of(fields)) == fields
    assert config_json.fields_of(config | {"sliding_window": 9})["model.attend"] == 0
    with pytest.raises(UserError, match="1 of 2 have a sliding window: must be all or none"):
        config_json.fields_of(some | {"layer_types": ["full_attention", "sliding_attention"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': must be one of 'llama'"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures=.*LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': must be 'silu'"),
        ({"attention_bias": True}, "attention_bias=True: must be False"),
        ({"mlp_bias": True}, "mlp_bias=True: must be False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*not known"),
        ({"logit_scale": 2.0}, "logit_scale=2.0: must be left out"),
        ({"hidden_size": -1}, "hidden_size=-1: must be a whole number from 1"),
        ({"hidden_size": None}, "hidden_size=None: must be a whole number"),
        ({"hidden_size": True}, "hidden_size=True: must be"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be .* to 1000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: must be a divisor of 4 heads"),
        ({"head_dim": 5}, "head_dim=5: must be even"),
        ({"head_dim": None, "num_attention_heads": 5}, "num_attention_heads=5: must be a divisor"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: must be a number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no': must be true or false"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn': must be one of"),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "rope_scaling.factor=None: must be a number",
        ),
        ({"rope_parameters": {"beta": 1}}, "rope_scaling.beta=1: must be left out"),
        ({"rope_parameters": [1]}, r"rope_scaling=\[1\]: must be null or an object"),
        ({"rope_theta": 7.0}, "rope_theta=100000.0: must be rope_theta=7.0"),
    ],
)
def test_a_config_that_is_not_ours_is_refused_by_field(change, message):
    with pytest.raises(
        UserError, match=f"config.json: {message}|config.json: rope_scaling.{message}"
    ):
        config_json.fields_of(golden("llama")[0] | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.rule": "addressed"}, "model.rule='addressed': must be 'dense' in a model"),
        ({"model.core": 1}, "model.core=1: must be 0"),
        ({"model.qkv_bias": True, "model.qk_norm": True}, "model.qkv_bias=True: must be False"),
    ],
)
def test_a_model_that_no_published_one_is_like_is_not_written(change, message):
    fields = config_json.fields_of(golden("llama")[0])
    with pytest.raises(UserError, match=message):
        config_json.config_of(fields | change)


def test_every_parameter_and_every_tensor_is_used_once():
    config, tensors, *_ = golden("llama")
    tree = abstract(config_json.fields_of(config))

    def read(**changes):
        given = {k: t for k, t in (tensors | changes).items() if t is not None}
        return names.read_params(source(config, given), tree)

    norm, extra = "model.norm.weight", np.zeros(3, np.float32)
    with pytest.raises(
        UserError, match=r"1 tensors are missing: model.norm.weight; 5 are left over.*"
    ):
        read(**{norm: None, **{f"x{i}": extra for i in range(5)}})
    with pytest.raises(UserError, match=r"model.norm.weight has shape \[3\]: must be \[16\]"):
        read(**{norm: extra})
    with pytest.raises(UserError, match=r"model.norm.weight has numbers that are not finite"):
        read(**{norm: np.full(16, np.nan, np.float32)})
    table = tensors["model.embed_tokens.weight"]
    read(**{"lm_head.weight": table, "model.layers.0.self_attn.rotary_emb.inv_freq": extra})
    with pytest.raises(UserError, match=r"lm_head.weight is not the table of embeddings"):
        read(**{"lm_head.weight": table + 1})
    strange = {**tree, "prelude": tree["prelude"] | {"leak": tree["norm"]["scale"]}}
    with pytest.raises(UserError, match="parameters prelude/leak have no published name"):
        names.read_params(source(config, tensors), strange)
    with pytest.raises(UserError, match="no published name: must be those of a dense decoder"):
        names.tensors_of({"core": {"leak": extra}})


# ---- Folders of safetensors ----------------------------------------------------------------------


@pytest.mark.parametrize("shard", [None, 8000])
def test_what_is_written_is_read_to_the_bit_and_bytes_do_not_change(tmp_path, shard):
    config, tensors, *_ = golden("llama")
    tensors = {k: np.array(t, order="F") for k, t in tensors.items()}  # parameters are views
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
    one = write_folder(tmp_path / "one", tensors, config, "{ }", shard)
    two = write_folder(tmp_path / "two", lazy(tensors), config, "{ }", shard)
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert files == {path.name: path.read_bytes() for path in two.iterdir()}
    assert ("model.safetensors.index.json" in files) == (shard is not None)
    assert len(files) == (3 if shard is None else 6)
    assert sum(map(len, files.values())) < 60_000
    found = open_source(one)
    assert (found.config, found.tokenizer, found.path) == (config, "{ }", one)
    assert (
        found.sha256
        == open_source(two).sha256
        != open_source(write_folder(tmp_path / "other", tensors, config, "{}", shard)).sha256
    )
    assert {*found.tensors} == {*tensors}
    for name, tensor in tensors.items():
        read = found.tensors[name].read()
        assert (found.tensors[name].shape, found.tensors[name].dtype) == (read.shape, read.dtype)
        assert read.dtype == tensor.dtype
        assert read.tobytes() == np.ascontiguousarray(tensor).tobytes()
    with pytest.raises(
        UserError, match=r"one exists: give a folder that does not, such as .*one-2"
    ):
        write_folder(one, tensors)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def broken():
        raise OSError("the disk is gone")

    tensors = {"a": Lazy((2,), np.dtype(np.float32), broken)}
    with pytest.raises(UserError, match="the disk is gone"):
        write_folder(tmp_path / "one", tensors)
    assert not [*tmp_path.iterdir()]


def damage(home, case):
    """Spoils a sharded folder."""
    shard, index = home / "model-00002-of-00003.safetensors", home / "model.safetensors.index.json"
    whole, told = shard.read_bytes(), json.loads(index.read_text())
    match case:
        case "no config":
            (home / "config.json").unlink()
        case "no tokenizer":
            (home / "tokenizer.json").unlink()
        case "list":
            (home / "config.json").write_text("[]")
        case "deep":
            (home / "config.json").write_text("[" * 100_000)
        case "large":
            (home / "config.json").write_bytes(b" " * (1 << 20) + b"{}")
        case "latin":
            (home / "tokenizer.json").write_bytes(b"\xff")
        case "lacks":
            shard.unlink()
        case "link":
            shard.rename(home.parent / "elsewhere")
            shard.symlink_to(home.parent / "elsewhere")
        case "pipe":
            (home / "tokenizer.json").unlink()
            os.mkfifo(home / "tokenizer.json")
        case "cut":
            shard.write_bytes(whole[:-1])
        case "empty":
            shard.write_bytes(b"")
        case "header":
            shard.write_bytes(struct.pack("<Q", 1 << 40) + whole[8:])
        case "no json":
            shard.write_bytes(struct.pack("<Q", 100) + b"[" * 1000)
        case "kind":
            save_file({"a": np.zeros(2, np.int8)}, shard)
        case "twice":
            index.unlink()
            shutil.copy(shard, home / "more.safetensors")
        case "moved":
            told["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
            index.write_text(json.dumps(told))
        case "left out":
            del told["weight_map"]["model.norm.weight"]
            index.write_text(json.dumps(told))
        case "leads out":
            told["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
            index.write_text(json.dumps(told))
        case "no map":
            index.write_text('{"weight_map": {"a": 1}}')
        case "pickle":
            for path in home.glob("*.safetensors*"):
                path.unlink()
            (home / "pytorch_model.bin").write_bytes(b"")
        case "nothing":
            for path in home.iterdir():
                path.unlink()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no config", "has no config.json: a checkpoint needs it"),
        ("no tokenizer", "has no tokenizer.json: a checkpoint needs it"),
        ("list", r"config.json holds \[\]: must be a JSON object"),
        ("deep", "config.json cannot be read: .* nested too deeply"),
        ("large", "config.json cannot be read: .* more than the 1048576 allowed"),
        ("latin", "tokenizer.json cannot be read: 'utf-8'"),
        ("lacks", "lacks shards that .*index.json names: model-00002-of-00003.safetensors"),
        ("link", "is a link, which is not followed: copy the folder by cp -rL"),
        ("pipe", "tokenizer.json is no file"),
        ("cut", "model-00002-of-00003.safetensors is damaged: .*not fully covered"),
        ("empty", "is damaged, or no safetensors file: its header has 0 bytes, of 0 in the file"),
        ("header", "its header has 1099511627776 bytes"),
        ("no json", "is damaged: .*invalid JSON"),
        ("kind", "a has dtype I8: must be one of"),
        ("twice", "is in both model-00002-of-00003.safetensors and more.safetensors: remove one"),
        ("moved", "its shards do not hold what .* says of model.norm.weight"),
        ("left out", "its shards do not hold what .* says of model.norm.weight"),
        ("leads out", "its shards .*elsewhere.* must be files of its folder"),
        ("no map", "weight_map must name a file for each tensor"),
        ("pickle", r"pytorch_model.bin is a pickle, .*safe_serialization=True"),
        ("nothing", "has no \\*.safetensors: give a folder that has them"),
    ],
)
def test_a_folder_that_is_wrong_is_refused_in_one_line(tmp_path, case, message):
    home = write_folder(tmp_path / "one", golden("llama")[1], shard=8000)
    damage(home, case)
    with pytest.raises(UserError, match=message) as caught:
        open_source(home)
    assert "\n" not in str(caught.value)


def test_other_paths_are_refused(tmp_path):
    for name in ("a.pt", "b.pth", "c.ckpt", "d.bin"):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(UserError, match=f"{name} is a pickle, which is a program"):
            open_source(tmp_path / name)
    (tmp_path / "e.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"e.onnx is no checkpoint: give a folder"):
        open_source(tmp_path / "e.onnx")
    with pytest.raises(UserError, match=r"there is no '.*nowhere': give a folder with config.json"):
        open_source(tmp_path / "nowhere")


# ---- GGUF ----------------------------------------------------------------------------------------

KINDS = {"F32": None, "F16": None, "Q4_1": (20, "<e<e"), "Q8_0": (34, "<e")}


def by_hand(raw, kind, shape):
    """Weights from the bytes of their blocks of 32, as the format's description has them."""
    if kind in ("F32", "F16"):
        return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[kind]).reshape(shape).astype("f4")
    out = []
    for at in range(0, len(raw), KINDS[kind][0]):
        block = raw[at : at + KINDS[kind][0]]
        scale = np.frombuffer(block[:2], "<f2").astype("f4")
        if kind == "Q8_0":
            out.append(scale * np.frombuffer(block[2:], np.int8))
        else:
            packed = np.frombuffer(block[4:], np.uint8)
            quants = np.concatenate([packed & 15, packed >> 4])  # low nibbles first
            out.append(scale * quants + np.frombuffer(block[2:4], "<f2").astype("f4"))
    return np.concatenate(out).reshape(shape).astype("f4")


def permuted(weight, heads):
    """Rows of q or k as the converter of llama.cpp writes them."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, kind="llama", tensor_kind="F32", tied=True, pre="smollm", **more):
    """A model of one layer; returns its tensors as published, and what was written of each."""
    draw = np.random.RandomState(0)
    heads, keys, head, width, hidden, vocab = 4, 2, 16, 64, 96, 64
    shapes = {"token_embd": (vocab, width), "blk.0.attn_q": (64, width)}
    shapes |= {"blk.0.attn_k": (32, width), "blk.0.attn_v": (32, width)}
    shapes |= {"blk.0.attn_output": (width, 64), "blk.0.ffn_gate": (hidden, width)}
    shapes |= {"blk.0.ffn_up": (hidden, width), "blk.0.ffn_down": (width, hidden)}
    shapes |= {} if tied else {"output": (vocab, width)}
    norms = {"output_norm": (width,), "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
    if kind == "qwen3":
        norms |= {"blk.0.attn_q_norm": (head,), "blk.0.attn_k_norm": (head,)}
    writer = gguf.GGUFWriter(path, kind)
    sizes = {"block_count": 1, "context_length": 128, "embedding_length": width}
    sizes |= {"feed_forward_length": hidden, "attention.head_count": heads, "vocab_size": vocab}
    sizes |= {"attention.head_count_kv": keys, "rope.dimension_count": head}
    for name, value in sizes.items():
        writer.add_uint32(f"{kind}.{name}", value)
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{kind}.rope.freq_base", 100_000.0)
    tokens = ["<|endoftext|>", "<|im_start|>", *list(ALPHABET)[:60], "ab", "[PAD63]"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 61, 5])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    for name, value in more.items():
        name = name.replace("__", ".")
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        (writer.add_bool if isinstance(value, bool) else add[type(value)])(name, value)
    of, published = gguf.GGMLQuantizationType[tensor_kind], {}
    for name, shape in (shapes | norms).items():
        one = draw.standard_normal(shape).astype("f4")
        raw_kind = "F32" if name in norms else tensor_kind
        raw = one.astype("f4") if raw_kind == "F32" else gguf.quants.quantize(one, of)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType[raw_kind])
        published[name] = by_hand(raw.tobytes(), raw_kind, shape)
    if kind == "qwen2":
        for name, size in (("q", 64), ("k", 32), ("v", 32)):
            published[f"{name}.bias"] = draw.standard_normal(size).astype("f4")
            writer.add_tensor(f"blk.0.attn_{name}.bias", published[f"{name}.bias"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return published


@pytest.mark.parametrize("tensor_kind", KINDS)
@pytest.mark.parametrize(("kind", "pre"), [("llama", "smollm"), ("qwen2", "qwen2")])
def test_a_gguf_file_is_read_as_what_it_was_made_from(tmp_path, tensor_kind, kind, pre):
    path = tmp_path / "a.gguf"
    written = write_gguf(path, kind, tensor_kind, tied=kind == "llama", pre=pre)
    found = open_source(path)
    fields = config_json.fields_of(found.config)
    assert (fields["model.kv_heads"], fields["model.width"], fields["model.hidden"]) == (2, 64, 96)
    assert (fields["model.norm_epsilon"], fields["model.rope_base"]) == (1e-5, 100_000.0)
    assert (fields["model.tied"], fields["model.qkv_bias"]) == (kind == "llama", kind != "llama")
    params = names.read_params(found, abstract(fields))  # all names are there
    read = {name: tensor.read() for name, tensor in found.tensors.items()}
    np.testing.assert_array_equal(params["embed"], written["token_embd"])
    at = "model.layers.0"
    np.testing.assert_array_equal(read[f"{at}.mlp.down_proj.weight"], written["blk.0.ffn_down"])
    np.testing.assert_array_equal(read[f"{at}.input_layernorm.weight"], written["blk.0.attn_norm"])
    for name, heads in (("q", 4), ("k", 2)):
        there = read[f"{at}.self_attn.{name}_proj.weight"]
        there = permuted(there, heads) if kind == "llama" else there
        np.testing.assert_array_equal(there, written[f"blk.0.attn_{name}"])
    if kind == "qwen2":
        np.testing.assert_array_equal(read[f"{at}.self_attn.k_proj.bias"], written["k.bias"])
    assert {tensor.dtype for tensor in found.tensors.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", gguf_file.KINDS)
def test_all_kinds_of_weights_that_are_told_of_are_read(kind, tmp_path):
    of = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[of]
    rows, columns = 3, 2 * block
    raw = np.random.RandomState(0).randint(0, 60, rows * 2 * size).astype(np.uint8)
    held = np.concatenate([np.zeros(8, np.uint8), raw])
    held.tofile(tmp_path / "held")
    header = partial(gguf_file._Header, tmp_path / "held")
    tensor = header(held).tensor("a", 0, (rows, columns), of.value, 8)
    read = tensor.read()
    assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype) == ((rows, columns), np.float32)
    by_rows = [gguf.dequantize(row, of).ravel() for row in raw.reshape(rows, -1)]
    np.testing.assert_array_equal(read, np.stack(by_rows))
    with pytest.raises(ValueError, match="does not fit into it"):
        header(held[:-1]).tensor("a", 0, (rows, columns), of.value, 8)


def test_unpermuting_undoes_the_converter():
    weight = np.arange(24 * 3.0).reshape(24, 3)
    tensor = Lazy((24, 3), weight.dtype, lambda: permuted(weight, 2))
    np.testing.assert_array_equal(gguf_file._unpermuted(tensor, 2).read(), weight)
    assert not np.array_equal(permuted(weight, 2), weight)


def test_a_qwen3_gguf_has_wide_heads_and_norms(tmp_path):
    sizes = {"qwen3__attention__key_length": 16, "qwen3__attention__value_length": 16}
    write_gguf(tmp_path / "a.gguf", "qwen3", pre="qwen2", **sizes)
    found = open_source(tmp_path / "a.gguf")
    names.read_params(found, abstract(config_json.fields_of(found.config)))
    assert found.config["head_dim"] == 16


def test_frequencies_of_llama_3_are_recognised():
    import llama_reference

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    plain, made = (
        llama_reference.frequencies({"rope_theta": 5e5, "rope_scaling": how}, 64)
        for how in (None, scaling)
    )
    assert gguf_file._scaling((plain / made).astype("f4"), 5e5, 64) == scaling
    with pytest.raises(UserError, match=r"rope_freqs.weight: must be that of Llama"):
        gguf_file._scaling(np.full(32, 3.0), 5e5, 64)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"kind": "gemma"}, "general.architecture='gemma': must be one of"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre='deepseek-llm': must be one of"),
        ({"llama__expert_count": 8}, "llama.expert_count=8: must be 0"),
        ({"llama__rope__scaling__type": "yarn"}, "scaling.type='yarn': must be 'none' or 'linear'"),
        ({"llama__attention__key_length": 8}, "llama.rope.dimension_count=16: must be 8"),
        ({"llama__logit_scale": 2.0}, "llama.logit_scale=2.0: is not known"),
        ({"general__alignment": 0}, "general.alignment=0: must be 32"),
    ],
)
def test_a_gguf_of_another_model_is_refused_by_name(tmp_path, how, message):
    write_gguf(tmp_path / "a.gguf", **how)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "a.gguf")


def test_a_damaged_gguf_is_refused_in_one_line_wherever_it_ends(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    weights = sum(t.n_bytes for t in gguf.GGUFReader(path).tensors)
    for size in [*range(0, len(whole) - weights, 97), len(whole) - weights, len(whole) - 32]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is damaged, or no GGUF file") as caught:
            open_source(path)
        assert "\n" not in str(caught.value)
    for at in (8, 16):  # the counts of tensors and of entries
        path.write_bytes(whole[:at] + struct.pack("<Q", 1 << 60) + whole[at + 8 :])
        with pytest.raises(UserError, match="it counts 1152921504606846976 values at byte"):
            open_source(path)


# ---- Tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", gguf_file.PRE_TOKENIZERS)
def test_a_given_tokenizer_is_that_of_the_library(pre):
    text = byte_pairs(pre, ignore_merges=pre == "llama-bpe")
    ours, theirs = Given(text), tokenizers.Tokenizer.from_str(text)
    theirs.encode_special_tokens = True  # spelt out in a text, they are text
    tokens = ours.encode(TEXT.encode())
    assert tokens.tolist() == theirs.encode(TEXT, add_special_tokens=False).ids
    plain = TEXT.replace("e\u0301", "é") if pre == "qwen2" else TEXT  # NFC
    assert ours.decode(tokens.tolist()).decode() == plain
    assert ours.lengths[tokens].sum() == len(plain.encode())
    assert ours.vocab == theirs.get_vocab_size() == len(ours.spelling) == len(ours.lengths)
    assert (ours.mark, ours.lengths[ours.mark]) == (0, 0)
    assert ours.mark not in tokens
    assert ours.serialised == text


def test_added_tokens_that_are_not_special_are_one_token_and_others_text():
    told = json.loads(byte_pairs("qwen2"))
    about = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    names = {"<think>": {}, "</think>": {"rstrip": True}, "<|end|>": {"special": True}}
    names |= {"one": {"single_word": True, "normalized": True}}
    added = [{"id": 340 + i, "content": n, **about, **m} for i, (n, m) in enumerate(names.items())]
    told["added_tokens"] += [{"special": False} | token for token in added]
    ours, theirs = Given(json.dumps(told)), tokenizers.Tokenizer.from_str(json.dumps(told))
    theirs.encode_special_tokens = True
    text = "a<think> one none</think>  b <|end|> <|endoftext|>"
    tokens = ours.encode(text.encode()).tolist()
    assert tokens == theirs.encode(text, add_special_tokens=False).ids
    assert {340, 341, 343} <= {*tokens}
    assert not {0, 342} & {*tokens}
    assert ours.decode(tokens).decode() == text.replace("</think>  b", "</think>b")


def test_the_splits_differ():
    """So that a wrong one would be seen above."""
    assert len({tuple(Given(byte_pairs(pre)).encode(TEXT.encode())) for pre in SPLITS}) == 4


def test_the_mark_is_what_begins_a_text_else_what_ends_one():
    both = ("<|im_start|>", "<|begin|>", "<|endoftext|>")
    assert Given(byte_pairs("smollm", both)).mark == 2
    assert Given(byte_pairs("llama-bpe", both, first="<|begin|>")).mark == 1
    assert Given(byte_pairs("llama-bpe", ("<|x|>", "<|end_of_text|>"))).mark == 1
    assert Given(byte_pairs("gpt-2", ("<|x|>",))).mark == 0


def test_a_padded_vocabulary_has_tokens_without_text():
    text = byte_pairs("smollm")
    padded = Given(text, 512)
    assert (padded.vocab, len(padded.lengths), padded.decode([511, 0])) == (512, 512, b"")
    with pytest.raises(ValueError, match=r"numbered up to 339: must be .* data.vocab_size=300"):
        Given(text, 300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}}}, "normalizer={'type'"),
        ({"pre_tokenizer": None}, "pre_tokenizer=None: must be ByteLevel"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer={'type': 'Metaspace'}: must be"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "without add_prefix"),
        ({"pre_tokenizer": {"type": "Digits"}}, "pre_tokenizer: must end with ByteLevel"),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "(a+)+$"},
                    "behavior": "Isolated",
                }
            },
            "Split of a known kind",
        ),
        ({"model": {"type": "Unigram", "vocab": []}}, "model.type='Unigram': must be 'BPE'"),
        ({"model": {"byte_fallback": True}}, "model.byte_fallback=True: must be none"),
        ({"added_tokens": [{"id": 1 << 40, "content": "<|x|>"}]}, "numbered up to 1099511627776"),
        ({"added_tokens": [{"id": 5, "content": "<|x|>"}]}, "its tokens are not numbered"),
        ({"added_tokens": [{"id": -5, "content": "<|x|>"}]}, "numbered up to 339: must be"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_by_name(tmp_path, change, message):
    told = json.loads(byte_pairs("smollm"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(told | change))
    data = base().data
    data.tokenizer, data.vocab_size = "given", 340
    with pytest.raises(UserError, match=f"tokenizer.json cannot be read: .*{message}"):
        load_tokenizer(tmp_path, data)


def test_data_of_a_given_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text(make_text(4000))
    data = base().data
    data.update({"path": str(tmp_path / "a.txt"), "cache_dir": str(tmp_path / "cache")})
    data.update({"context": 8, "tokenizer": "given", "vocab_size": 512})
    one = Given(byte_pairs("smollm"), 512)
    other = Given(byte_pairs("gpt-2"), 512)
    made = [load_data(data, tokenizer=tokenizer) for tokenizer in (one, other, one)]
    assert made[0].fingerprint == made[2].fingerprint != made[1].fingerprint
    assert made[0].tokenizer is one
    text = made[0].train.tokens
    assert text[0] == one.mark == 0
    assert make_text(4000).encode().startswith(one.decode(text.tolist()))
    assert len({path.name for path in (tmp_path / "cache").glob("tokens-given-*")}) == 2
    with pytest.raises(UserError, match=r"data.tokenizer='given': must be 'bytes' or 'bpe' where"):
        load_data(data)
    home = tmp_path / "run"
    home.mkdir()
    save_tokenizer(one, home)
    again = load_tokenizer(home, data)
    assert (again.vocab, again.serialised) == (512, one.serialised)


# ---- The real one --------------------------------------------------------------------------------

SMOLLM2 = os.environ.get("NGC_SMOLLM2", "")
needs_smollm2 = pytest.mark.skipif(not SMOLLM2, reason="NGC_SMOLLM2 names no GGUF file of SmolLM2")


@needs_smollm2
def test_the_published_model_continues_a_text():
    found = open_source(SMOLLM2)
    fields = config_json.fields_of(found.config)
    sizes = (fields["model.width"], fields["model.kv_heads"], fields["model.rope_base"])
    assert sizes == (576, 3, 100_000.0)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract(fields)).items()}
    assert sum(map(np.prod, shapes.values())) == 134_515_008
    tokenizer = Given(found.tokenizer, fields["data.vocab_size"])
    assert (tokenizer.vocab, tokenizer.mark) == (49_152, 0)
    tokens = tokenizer.encode(b"The capital of France is")
    tensors = Reading(found.tensors)
    logits = forward(found.config, tensors, tokens[None], np.float32)
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == b" Paris"


class Reading(dict):
    """Tensors that are read when they are asked for."""

    def __getitem__(self, name):
        return super().__getitem__(name).read()
