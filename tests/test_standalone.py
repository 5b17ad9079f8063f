"""A run handed on: the same logits from the folder alone, in NumPy, PyTorch and by jax.export."""

import dataclasses
import importlib.util
import json
import pathlib

import numpy as np
import pytest
from conftest import TINY, drawn, make_text
from jax import export as jax_export
from safetensors.numpy import load_file

import ngc_jax
from ngc_jax.commands import ngc as commands
from ngc_jax.config import base, make_model, validate
from ngc_jax.convert.pretrained import begin, export, import_pretrained
from ngc_jax.convert.standalone import CALLED, export_stablehlo, export_torch
from ngc_jax.data.byte_pairs import BPE
from ngc_jax.data.tokenizer import Bytes, Symbols, open_given
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.load import Trained


def trained(**fields):
    """A run of a tiny model with parameters of ordinary sizes, as `load` would open it."""
    config = base()
    config.update_from_flattened_dict(TINY | {k.replace("__", "."): v for k, v in fields.items()})
    validate(config)
    model = make_model(config, Bytes.vocab)
    return Trained(pathlib.Path("run"), config, model, drawn(model), Bytes(), 7, {})


TOKENS = np.random.default_rng(3).integers(0, 257, (2, 16)).astype(np.int32)
TOKENS[:, [0, 9]] = Bytes.mark  # two documents
DENSE = {"model__rule": "dense", "model__core": 0, "model__prelude": 2}
KINDS = {
    "weights": {
        **{"model__wiring": "ring", "model__channels": 2, "model__drive": False},
        **{"model__exchange_activation": "none", "model__form": "weights"},
    },
    "signals": {"model__form": "signals", "model__coda": 1, "model__prelude": 1},
    "dense": {
        **{"model__rule": "dense", "model__core": 0, "model__prelude": 2, "model__tied": True},
        **{"model__attend": 5, "model__kv_heads": 1, "model__qkv_bias": True},
        "model__rope_scaling": "linear:2",
    },
    "looped": {
        **{"model__rule": "broadcast", "model__core": 2, "model__rounds": 3},
        **{"model__state_activation": "tanh", "model__route": "start", "model__qk_norm": False},
        **{"model__exchange_activation": "gelu", "model__sharing": "qkv,depth2"},
        "data__isolate_documents": True,
    },
}


def in_numpy(folder, tokens):
    """The logits of an exported folder, as docs/handing_on.md says what is in it."""
    c, w = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    at = np.arange(tokens.shape[1])
    far = at[:, None] - at
    sees = (abs(far) < c["context"]) & ((far >= 0) | (not c["causal"]))
    sees = np.broadcast_to(sees, (len(tokens), *sees.shape))
    if c["boundary"] is not None:
        document = np.cumsum(tokens == c["boundary"], axis=1)
        sees = sees & (document[:, :, None] == document[:, None, :])

    def norm(x, name):
        size = np.sqrt((x * x).mean(-1, keepdims=True) + c["norm_epsilon"])
        return x / size * w[name] if name in w else x

    def heads(x, name, home, turned):
        y = x @ w[home + name].T + w.get(f"{home}{name}_bias", 0)
        y = norm(y.reshape(*y.shape[:2], -1, 2 * len(w["frequency"])), f"{home}{name}_norm")
        if turned:
            angle = (at[:, None] * w["frequency"])[:, None]
            a, b = np.split(y, 2, axis=-1)
            cos, sin = np.cos(angle), np.sin(angle)
            y = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return np.repeat(y, c["heads"] // y.shape[2], axis=2)

    def phi(z):
        erf = np.vectorize(__import__("math").erf)
        gates = {"silu": lambda: 1 / (1 + np.exp(-z)), "gelu": lambda: (1 + erf(z / 2**0.5)) / 2}
        return z * gates.get(c["activation"], lambda: 1)()

    def stage(number, x, asked):
        home = f"stages.{number}."
        own, asked = (norm(y, f"{home}attention_norm") for y in (x, asked))
        q, k, v = (
            heads(y, n, home, n != "value")
            for n, y in (("query", asked), ("key", asked), ("value", own))
        )
        score = np.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        score = np.exp(np.where(sees[:, None], score, -np.inf))
        mixed = np.einsum("bhts,bshd->bthd", score / score.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(*x.shape[:2], -1) @ w[f"{home}attention_out"].T
        read = norm(x, f"{home}exchange_norm")
        made = phi(read @ w[f"{home}gate"].T) * (read @ w[f"{home}up"].T)
        return x + made @ w[f"{home}down"].T

    x, first, core = w["embed"][tokens], c["prelude"], c["prelude"] + c["core"]
    for number in range(first):
        x = stage(number, x, x)
    start = x
    for _ in range(c["rounds"] if c["core"] else 0):
        after = x
        for number in range(first, core):
            after = stage(number, after, start if c["route"] == "start" else after)
        x = w["keep"] * x + w["drive"] * start + after - x
        x = np.tanh(x) if c["state_activation"] == "tanh" else x
    for number in range(core, core + c["coda"]):
        x = stage(number, x, x)
    return norm(x, "norm") @ w["embed" if c["tied"] else "unembed"].T


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """An exported folder, and the logits of the run."""
    run, folder = trained(**KINDS[request.param]), tmp_path_factory.mktemp("out") / "folder"
    export_torch(run, str(folder))
    return folder, np.asarray(run.logits(TOKENS))


def test_what_is_exported_has_the_same_logits_in_numpy(exported):
    folder, logits = exported
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(in_numpy(folder, TOKENS), logits, atol=1e-4)


def test_what_is_exported_has_the_same_logits_in_torch(exported):
    torch = pytest.importorskip("torch")
    folder, logits = exported
    spec = importlib.util.spec_from_file_location("exported_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.no_grad():
        found = module.Model(folder)(torch.tensor(TOKENS, dtype=torch.int64)).numpy()
    np.testing.assert_allclose(found, logits, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__kind": "bdh"}, "model.kind='bdh': must be 'decoder' where --form='torch'"),
        ({"model__gates": True}, "model.gates=True: must be False"),
        ({"model__message_activation": "relu"}, "model.message_activation='relu': must be 'none'"),
        ({"iteration__rounds": "marked"}, "iteration.rounds='marked': must be another"),
    ],
)
def test_what_torch_has_not_is_refused_by_name(tmp_path, fields, message):
    if "model__kind" in fields:
        run = trained()
        run.config.model.kind = "bdh"
    else:
        run = trained(**fields)
    with pytest.raises(UserError, match=message):
        export_torch(run, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_compiled_form_has_the_same_logits_for_any_batch(tmp_path):
    run = trained(**KINDS["looped"])
    export_stablehlo(run, str(tmp_path / "out"))
    opened = jax_export.deserialize((tmp_path / "out" / CALLED).read_bytes())
    assert opened.platforms == ("cpu", "cuda", "tpu")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for rows in (2, 1):
        found = opened.call(tensors, TOKENS[:rows])
        np.testing.assert_allclose(found, run.logits(TOKENS)[:rows], atol=1e-5)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_dense_run_is_published_and_read_again_with_its_tokenizer(tmp_path, kind):
    text = make_text(2000).encode() + "é <|document|> \n".encode()
    tokenizer = Bytes() if kind == "bytes" else BPE(BPE.train([text.decode()], 300))
    fields = TINY | {"model.rule": "dense", "model.core": 0, "model.prelude": 2}
    config = base()
    config.update_from_flattened_dict(fields | {"data.tokenizer": kind})
    model = make_model(config, tokenizer.vocab)
    run = Trained(pathlib.Path("run"), config, model, drawn(model), tokenizer, 7, {})
    export(run, str(tmp_path / "out"))
    given = open_given((tmp_path / "out" / "tokenizer.json").read_text(), tokenizer.vocab, "out")
    assert (given.vocab, given.mark) == (tokenizer.vocab, tokenizer.mark)
    np.testing.assert_array_equal(given.encode(text), tokenizer.encode(text))
    if kind == "bpe":
        import_pretrained(str(tmp_path / "out"), tmp_path / "again")
        again = ngc_jax.load(tmp_path / "again")
        np.testing.assert_array_equal(again.logits(TOKENS), run.logits(TOKENS))


def test_the_model_of_a_task_is_not_published_as_one_of_text(tmp_path):
    run = trained(data__task="parity")
    with pytest.raises(UserError, match=r"data.task='parity': must be ''"):
        export(dataclasses.replace(run, tokenizer=Symbols("01=")), str(tmp_path / "out"))


def test_the_command_writes_each_form_and_refuses_what_it_cannot_round(
    tmp_path, monkeypatch, capsys
):
    run = trained()
    begin(tmp_path / "run", run.config, run.tokenizer, run.params, "drawn")

    def give(*words):
        monkeypatch.setattr("sys.argv", ["ngc", "export", f"--workdir={tmp_path / 'run'}", *words])
        commands.main()

    for form in ("torch", "stablehlo"):
        give(f"--to={tmp_path / form}", f"--form={form}")
        with pytest.raises(SystemExit) as ended:
            give(f"--to={tmp_path / 'half'}", f"--form={form}", "--dtype=bfloat16")
        assert ended.value.code == 2
        assert f"must be 'float32' where --form='{form}'" in capsys.readouterr().err
    one, other = ({path.name for path in (tmp_path / f).iterdir()} for f in ("torch", "stablehlo"))
    assert one == {"config.json", "model.safetensors", "model.py"}
    assert other == {"config.json", "model.safetensors", CALLED}
