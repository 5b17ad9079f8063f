"""Models of others as ours: the same logits, and the same bits when written back."""

import json
import os
import pathlib
import re
import runpy
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import QUICK, ROOT, make_text, python
from flax.traverse_util import flatten_dict
from test_source import byte_pairs

import ngc_jax
from experiments.chaos import outcome
from ngc_jax import count
from ngc_jax.analysis import probes
from ngc_jax.analysis.stability import of_synapses
from ngc_jax.commands import ngc as commands
from ngc_jax.commands.convert_model import examples
from ngc_jax.config import base, make_model, reset_unread, validate
from ngc_jax.convert.calibrate import FILE, calibrate
from ngc_jax.convert.config_json import fields_of
from ngc_jax.convert.convert import convert, fit, formed, reconstructed
from ngc_jax.convert.flow import shifted_problems
from ngc_jax.convert.forms import INDEX, fit_form
from ngc_jax.convert.methods import METHODS
from ngc_jax.convert.names import read_params, tensors_of
from ngc_jax.convert.pretrained import _begun, export, import_pretrained
from ngc_jax.convert.rotation import rotated
from ngc_jax.convert.source import Lazy, Source, open_source, unwritten, write_safetensors
from ngc_jax.data.batches import Batch, next_token_targets
from ngc_jax.runtime.checkpoint import Checkpoints, digest
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import read_rows
from ngc_jax.training.begin import check_teacher
from ngc_jax.training.step import init_state

GOLDEN = sorted((ROOT / "tests" / "golden").glob("pretrained_*.npz"))


def golden(path):
    """Config, tensors, tokens [B, T] and logits [B, T, V] of a tiny model, made by its authors."""
    held = dict(np.load(path))
    config = json.loads(str(held.pop("config")))
    tokens, logits = held.pop("tokens"), held.pop("logits")
    return config, held, tokens, logits


def modelled_config(fields):
    """Our config with these fields. Raises UserError."""
    ours = base()
    for name, value in fields.items():
        section, _, field = name.partition(".")
        ours[section][field] = value
    reset_unread(ours)
    validate(ours)
    return ours


def modelled(config, tensors):
    """Our model of a checkpoint, and its parameters."""
    ours = modelled_config(fields_of(config))
    model = make_model(ours, ours.data.vocab_size)
    lazy = {n: Lazy(t.shape, t.dtype, lambda t=t: t) for n, t in tensors.items()}
    source = Source(pathlib.Path("golden"), config, lazy, "", "")
    return model, read_params(source, jax.eval_shape(model.init, jax.random.key(0)))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem.partition("_")[2])
def test_logits_are_those_of_the_authors(path):
    config, tensors, tokens, logits = golden(path)
    model, params = modelled(config, tensors)
    found = jax.jit(lambda p, x: model.apply(p, Batch(x))[0])(params, tokens)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    half = tokens.shape[1] // 2
    cache = model.init_cache(len(tokens), tokens.shape[1])
    decode = jax.jit(model.decode)
    first, cache = decode(params, tokens[:, :half], cache, np.int32(0))
    second, cache = decode(params, tokens[:, half:], cache, np.int32(half))
    np.testing.assert_allclose(np.concatenate([first, second], 1), logits, atol=1e-5)


# ---- Work directories ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as it is published: a tiny model with random weights, and a tokenizer."""
    home = tmp_path_factory.mktemp("published") / "tiny"
    tokenizer = byte_pairs("smollm")
    config, tensors, *_ = golden(ROOT / "tests" / "golden" / "pretrained_llama.npz")
    vocab = len(json.loads(tokenizer)["model"]["vocab"])
    table = np.random.default_rng(0).normal(size=(vocab, config["hidden_size"]))
    tensors["model.embed_tokens.weight"] = np.float32(table)
    write_safetensors(home, tensors, {**config, "vocab_size": vocab}, tokenizer)
    return home


@pytest.fixture(scope="module")
def teacher(published, tmp_path_factory):
    home = tmp_path_factory.mktemp("teacher") / "run"
    import_pretrained(str(published), home, context=16)
    return ngc_jax.load(home)


def test_import_and_export_give_the_same_bits(published, teacher, tmp_path):
    export(teacher, str(tmp_path / "out"))
    found, made = open_source(published), open_source(tmp_path / "out")
    assert made.tensors.keys() == found.tensors.keys()
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(made.tensors[name].read(), tensor.read())
    assert fields_of(made.config) == {**fields_of(found.config), "data.context": 16}
    import_pretrained(str(tmp_path / "out"), tmp_path / "again")
    again = ngc_jax.load(tmp_path / "again")
    for one, other in zip(*map(jax.tree.leaves, (teacher.params, again.params)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "SHA-256" in teacher.meta["origin"]


def test_a_pretrained_model_is_asked_like_any_other(teacher, tmp_path):
    assert isinstance(teacher.generate("a b", tokens=3, seed=1), str)
    (tmp_path / "text.txt").write_text(make_text(3000))
    told = ngc_jax.load(teacher.workdir, data_path=str(tmp_path / "text.txt"))
    assert told.data().tokenizer.serialised == teacher.tokenizer.serialised
    assert [*teacher.activations("a b")] == ["embedding", "prelude 1", "prelude 2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': must be one of"),
        ({"hidden_act": "relu"}, "hidden_act='relu': must be 'silu'"),
        ({"num_hidden_layers": 3}, "9 tensors are missing"),
        ({"num_hidden_layers": 1}, "9 are left over"),
        ({"intermediate_size": 20}, "must be"),
    ],
)
def test_what_is_not_read_exactly_is_refused_in_one_line(published, tmp_path, change, message):
    source = open_source(published)
    write_safetensors(tmp_path / "bad", source.tensors, source.config | change, source.tokenizer)
    with pytest.raises(UserError, match=message) as refused:
        import_pretrained(str(tmp_path / "bad"), tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_import_takes_a_new_directory_and_a_context_that_fits(published, teacher, tmp_path):
    with pytest.raises(UserError, match="holds a run"):
        import_pretrained(str(published), teacher.workdir)
    with pytest.raises(UserError, match="context=4096: must be from 1 to 128"):
        import_pretrained(str(published), tmp_path / "run", context=4096)


# ---- Calibration and conversion ------------------------------------------------------------------


def tokens_of_text(teacher):
    encoded = np.asarray(teacher.tokenizer.encode(make_text(4000).encode()), np.int32)
    return encoded[: len(encoded) // 16 * 16].reshape(-1, 16)[:24]


def batch_of_text(teacher):
    tokens = tokens_of_text(teacher)
    return Batch(tokens, next_token_targets(np.pad(tokens, ((0, 0), (0, 1)))))


@pytest.fixture(scope="module")
def tokens(teacher):
    return tokens_of_text(teacher)


@pytest.fixture(scope="module")
def batch(teacher):
    return batch_of_text(teacher)


@pytest.fixture(scope="module")
def means(teacher, batch, tmp_path_factory):
    return calibrate(teacher, batch, tmp_path_factory.mktemp("calibration"), rows=4, say=quiet)


def quiet(*_, **__):
    pass


def test_calibration_goes_on_after_a_kill(teacher, batch, means, tmp_path, monkeypatch):
    told = []

    def killed(text, **_):
        told.append(text)
        if len(told) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("ngc_jax.convert.calibrate.SAVED_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        calibrate(teacher, batch, tmp_path, rows=4, say=killed)
    found = calibrate(teacher, batch, tmp_path, rows=4, say=quiet)
    jax.tree.map(np.testing.assert_array_equal, found, means)


def test_calibration_follows_no_link_out_of_its_folder(teacher, batch, means, tmp_path):
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.write_bytes(b"of another")
    (home / FILE).symlink_to(outside)
    found = calibrate(teacher, batch, home, rows=4, say=quiet)
    jax.tree.map(np.testing.assert_array_equal, found, means)
    assert outside.read_bytes() == b"of another"
    assert [path.name for path in home.iterdir()] == [FILE]
    (tmp_path / "link").symlink_to(home)
    with pytest.raises(UserError, match="is a link, which is not followed"):
        calibrate(teacher, batch, tmp_path / "link", rows=4, say=quiet)


def test_grams_are_those_of_inputs_and_of_gradients(teacher, tokens, means):
    """Against one window at a time, and gradients by finite steps of the weights."""
    streams = teacher.activations(tokens)
    scale = np.asarray(teacher.params["prelude"]["attention_norm"]["scale"])
    for number, name in enumerate(["embedding", "prelude 1"]):
        x = np.asarray(streams[name], np.float64).reshape(-1, scale.shape[1])
        x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-5) * scale[number]
        np.testing.assert_allclose(means["inputs"]["query"][number], x.T @ x / len(x), atol=1e-4)
        np.testing.assert_allclose(means["magnitudes"]["query"][number], abs(x).mean(0), atol=1e-4)
    for member, gram in means["grads"].items():
        assert np.linalg.eigvalsh(gram).min() > -1e-6 * np.trace(gram[0]), member


@pytest.mark.parametrize("method", METHODS)
def test_a_converted_model_is_a_run_with_the_outputs_of_its_factors(
    method, teacher, tokens, batch, means, tmp_path
):
    found = fit(teacher, means, method, 0.7, batch=batch)
    convert(teacher, found, tmp_path / "run", "test")
    made = ngc_jax.load(tmp_path / "run")
    dense = teacher.model.apply(reconstructed(teacher, found), Batch(tokens))[0]
    np.testing.assert_allclose(made.logits(tokens), dense, atol=2e-4)
    counted = count.parameters(made.params, made.model.param_info()).matrices
    gains = sum(one.joined.rank > 0 for stage in found.stages for one in stage)
    if found.counted == "led":
        assert counted - gains == found.numbers["led"] <= 0.7 * found.numbers["dense"]
    elif method != "basis_sharing":  # whose bases are kept by each stage
        assert counted == found.numbers["factored"] <= 0.7 * found.numbers["dense"]
    assert isinstance(made.generate("a b", tokens=2), str)


def test_members_may_share_a_signal_where_the_price_says_so(teacher, tokens, means, tmp_path):
    found = fit(teacher, means, "ngc", 0.5, share=True)
    convert(teacher, found, tmp_path / "run")
    made = ngc_jax.load(tmp_path / "run")
    dense = teacher.model.apply(reconstructed(teacher, found), Batch(tokens))[0]
    np.testing.assert_allclose(made.logits(tokens), dense, atol=2e-4)
    export(made, str(tmp_path / "factors"))
    back = imported(tmp_path / "factors", tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.params, made.params)
    assert found.predicted <= fit(teacher, means, "ngc", 0.5).predicted * 1.02


@pytest.mark.parametrize("method", ["svd_llm", "ngc"])
def test_a_matrix_has_a_signal_at_any_share(method, teacher, tokens, means, tmp_path):
    found = fit(teacher, means, method, 0.01)
    assert min(one.joined.rank for stage in found.stages for one in stage) == 1
    convert(teacher, found, tmp_path / "run")
    dense = teacher.model.apply(reconstructed(teacher, found), Batch(tokens))[0]
    np.testing.assert_allclose(ngc_jax.load(tmp_path / "run").logits(tokens), dense, atol=2e-4)


def test_a_rotated_model_is_the_same_function(teacher, tokens, batch, means, tmp_path):
    turned, grams = rotated(teacher, means, 2)
    np.testing.assert_allclose(turned.logits(tokens), teacher.logits(tokens), atol=1e-4)
    again = calibrate(turned, batch, tmp_path, rows=4, say=quiet)
    for kind, of in grams.items():
        for name, gram in of.items():
            np.testing.assert_allclose(again[kind][name], gram, atol=2e-3 * np.abs(gram).max())


@pytest.mark.parametrize(("form", "kept"), [("ports", 0.7), ("blocks", 0.9), ("synapses", 0.6)])
def test_a_form_is_a_run_with_the_outputs_of_its_matrices(
    form, kept, teacher, tokens, means, tmp_path
):
    groups = 0 if form == "synapses" else 2
    base, found = fit_form(teacher, means, form, kept, groups)
    convert(base, found, tmp_path / "run", "test")
    made = ngc_jax.load(tmp_path / "run")
    dense = base.model.apply(reconstructed(base, found), Batch(tokens))[0]
    np.testing.assert_allclose(made.logits(tokens), dense, atol=2e-4)
    np.testing.assert_allclose(formed(made).logits(tokens), dense, atol=2e-4)
    # What is said to be kept is what is stored: two numbers for three single synapses.
    counted = count.parameters(made.params, made.model.param_info()).matrices
    places = sum(one.joined.singles for stage in found.stages for one in stage)
    ranked = sum(one.joined.rank > 0 for stage in found.stages for one in stage)
    gains = 0 if form == "ports" else ranked
    assert abs(counted - gains + INDEX * places - found.numbers["led"]) < 1
    assert found.numbers["led"] <= kept * found.numbers["dense"]
    assert (places > 0) == (form == "synapses")
    if form == "ports":  # a rotated stream is not compared with the teacher's
        made.config.train.imitate = "stages"
        with pytest.raises(UserError, match=r"must be 'outputs' where .* basis"):
            check_teacher(teacher, teacher.tokenizer, made.config, made)
    # Bounds see all parts of a matrix.
    sizes = of_synapses(made.decoder, made.params, lambda parts: jnp.sum(_formed(parts) ** 2))
    for number, stage in enumerate(found.stages, 1):
        for one in stage:
            seen = sizes[f"prelude {number}"]["+".join(one.joined.members)]
            np.testing.assert_allclose(seen, np.sum(one.made**2), rtol=1e-4)


def _formed(parts):
    return sum(rule.weights(pre, post) for rule, pre, post in parts)


@pytest.mark.slow
def test_single_synapses_are_trained_in_their_places(tiny, tmp_path):
    ranks = "query:4,key+value:4,attention out:4,gate:4,up:0,down:4+20"
    tiny.model.update({"rule": "leaders", "groups": 1, "p_intra": 0, "ranks": ranks})
    tiny.model.update({"prelude": 1, "core": 0, "coda": 0})
    tiny.train.update({"steps": 2, "warmup_steps": 1})
    tiny.stability.every, tiny.checkpoint.every_steps = 0, 1
    reset_unread(tiny)
    ngc_jax.train(tiny, tmp_path / "run")
    runs = [ngc_jax.load(tmp_path / "run", step) for step in (1, 2)]
    first, last = (run.params["prelude"]["0"]["down"]["single_synapses"]["post"] for run in runs)
    np.testing.assert_array_equal(first["at"], last["at"])
    assert np.all(first["state"] != last["state"])
    loud = probes.traffic(runs[1].decoder, runs[1].params, Batch(np.zeros((1, 8), np.int32)))
    assert loud["prelude 1"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"form": "magic"}, "form='magic': must be one of ports, blocks, synapses"),
        ({"groups": 3}, "groups=3: must be one of 2, 4"),
        ({"kept": 0.2, "groups": 2}, "kept=0.2: must be below 1, and 0.38 or more where groups=2"),
        ({"form": "synapses", "share": 1.0}, "share=1.0: must be above 0"),
        ({"form": "synapses", "kept": 2.0}, "kept=2.0: must be above 0"),
    ],
)
def test_impossible_forms_are_refused(teacher, means, given, message):
    with pytest.raises(UserError, match=message):
        fit_form(teacher, means, **{"form": "ports", "kept": 0.5, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "magic"}, "method='magic': must be one of svd, "),
        ({"kept": 1.5}, "kept=1.5: must be above 0 and below 1"),
        ({"kept": 0.0}, "kept=0.0: must be above 0"),
        ({"method": "svd", "share": True}, "share=True: must be False"),
    ],
)
def test_impossible_conversions_are_refused(teacher, means, given, message):
    with pytest.raises(UserError, match=message):
        fit(teacher, means, **{"method": "ngc", "kept": 0.5, **given})


# ---- Memory, dtypes, factors, devices ------------------------------------------------------------


def imported(folder, home, **more):
    import_pretrained(str(folder), home, context=16, **more)
    return ngc_jax.load(home)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_start_is_that_of_training_and_its_moments_take_no_memory(optimizer, teacher):
    config = teacher.config.copy_and_resolve_references()
    config.train.optimizer = optimizer
    made = _begun(teacher.model, config, teacher.params)
    whole = init_state(teacher.model, config.train, config.seed, teacher.params)
    jax.tree.map(np.testing.assert_array_equal, made, whole)


def resident():
    """Bytes of memory of this process that are no file's."""
    told = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", told)[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_zeros_that_nobody_writes_take_no_memory():
    before, size = resident(), 1 << 26
    array = unwritten((size // 4,), np.float32)
    held = jax.device_put(array)
    assert resident() < before + size // 4
    array[:] = 1  # jax has these very bytes
    assert resident() > before + size // 2
    assert float(held[-1]) == 1
    assert unwritten((0, 3), np.int32).shape == (0, 3)


def test_a_run_is_opened_without_what_its_optimizer_remembers(teacher, monkeypatch):
    read = []
    restore = Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda *given: read.append(restore(*given)) or read[-1]
    )
    again = ngc_jax.load(teacher.workdir)
    assert {*map(type, jax.tree.leaves(read[0].state.optimizer))} == {type(...)}
    assert digest(again.state.params) == digest(again.params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again.state.optimizer))


def test_bfloat16_is_read_written_and_computed_in(published, tokens, batch, means, tmp_path):
    source = open_source(published)
    rounded = {n: t.read().astype(ml_dtypes.bfloat16) for n, t in source.tensors.items()}
    write_safetensors(tmp_path / "in", rounded, source.config, source.tokenizer)
    run = imported(tmp_path / "in", tmp_path / "run", compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {np.dtype(np.float32)}
    export(run, str(tmp_path / "out"), "bfloat16")
    out = open_source(tmp_path / "out")
    assert out.config["torch_dtype"] == "bfloat16"
    for name, tensor in rounded.items():
        assert out.tensors[name].read().tobytes() == tensor.tobytes(), name
    back = imported(tmp_path / "out", tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.params, run.params)
    # Computed in it, and summed in float32: near what float32 gives, and not the same
    calibrate(back, batch, tmp_path, rows=4, say=quiet)  # of the same parameters, in float32
    found = calibrate(run, batch, tmp_path, rows=4, say=quiet)["inputs"]["down"]
    error = abs(found - means["inputs"]["down"]).max() / abs(means["inputs"]["down"]).max()
    assert found.dtype == np.float32
    assert 1e-5 < error < 0.1
    assert isinstance(run.generate("a b", tokens=3), str)
    assert 1e-5 < abs(run.loss(make_text(200))[0] - back.loss(make_text(200))[0]) < 0.1


@pytest.mark.parametrize("method", ["ngc", "svd_llm"])
def test_factors_are_written_and_read_to_the_bit(method, teacher, means, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    convert(teacher, fit(teacher, means, method, 0.6), run)
    made = ngc_jax.load(run)
    export(made, str(out))
    back = imported(out, tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.params, made.params)
    assert back.config.model.to_dict() == made.config.model.to_dict()
    source, dense = open_source(out), tensors_of(formed(made).params)
    for name, weight in dense.items():
        if "_proj.weight" in name:
            made = as_documented(source, name.removesuffix(".weight"))
            np.testing.assert_allclose(made, weight, atol=1e-5)
    config = source.config
    for change, message in (
        ({"ngc_rule": "dense"}, "ngc_rule='dense': must be 'broadcast' or 'leaders'"),
        ({"ngc_ranks": 7}, "ngc_ranks=7: must be such as 'query:96"),
        ({"ngc_ranks": "query:1"}, "model.ranks=query:1...: stage 1"),
        ({"ngc_ranks": config["ngc_ranks"].replace("gate:", "gate:9")}, "must be at most|at most"),
        ({"model_type": "llama"}, "ngc_r(ule|anks)=.*: must be left out"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            modelled_config(fields_of(config | change))
        assert "\n" not in str(refused.value)


def as_documented(source, name):
    """The weight [m, n] of a matrix, by the lines of docs/pretrained.md."""
    text = (ROOT / "docs" / "pretrained.md").read_text()
    (code,) = re.findall(r"```python\n(def weight.*?)```", text, re.DOTALL)
    space = {"np": np}
    exec(code, space)
    return space["weight"]({n: t.read() for n, t in source.tensors.items()}, name)


def test_factors_that_are_damaged_are_refused(teacher, means, tmp_path):
    convert(teacher, fit(teacher, means, "ngc", 0.6), tmp_path / "run")
    export(ngc_jax.load(tmp_path / "run"), str(tmp_path / "out"))
    source = open_source(tmp_path / "out")
    order = next(name for name in source.tensors if name.endswith(".order"))
    for number, (tensor, message) in enumerate(
        (
            (np.zeros_like(source.tensors[order].read()), "order is no order of"),
            (np.float32(source.tensors[order].read()), "order is of float32: not int32"),
        )
    ):
        tensors, home = {**source.tensors, order: tensor}, tmp_path / str(number)
        write_safetensors(home, tensors, source.config, source.tokenizer)
        with pytest.raises(UserError, match=message):
            import_pretrained(str(home), tmp_path / "back")


@pytest.mark.slow
def test_calibration_on_many_devices_is_that_on_one(teacher, means, tmp_path):
    """And each device has its part of the model alone."""
    done = python("-c", f"""
import sys; sys.path.insert(0, "tests")
import jax, numpy as np, ngc_jax, test_pretrained as t
from ngc_jax.commands.arguments import mesh_of
from etils import epath
mesh = mesh_of("data:2,fsdp:2")
run = ngc_jax.load({str(teacher.workdir)!r}, mesh=mesh)
leaf = run.params["embed"]
assert leaf.addressable_shards[0].data.size == leaf.size / 2, leaf.sharding
assert len(leaf.sharding.device_set) == 4
batch = t.batch_of_text(run)
found = t.calibrate(run, batch, epath.Path({str(tmp_path)!r}), 4, t.quiet, mesh)
np.savez({str(tmp_path)!r} + "/found.npz", **t.flatten_dict(found, sep="/"))
odd = jax.tree.map(lambda a: a[:6], batch)  # of its second part, 2 windows on 4 devices
t.calibrate(run, odd, epath.Path({str(tmp_path)!r}), 4, t.quiet, mesh)
""", XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(np.load(tmp_path / "found.npz"))
    expected = flatten_dict(means, sep="/")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        scale = abs(array).max()
        np.testing.assert_allclose(found[name] / scale, array / scale, atol=1e-5, err_msg=name)


def test_the_commands_import_convert_and_export(published, tmp_path, monkeypatch, capsys):
    def ngc(*words):
        monkeypatch.setattr("sys.argv", ["ngc", *map(str, words)])
        try:
            commands.main()
        except SystemExit as ended:
            return ended.code, capsys.readouterr()
        return 0, capsys.readouterr()

    monkeypatch.setattr(commands, "end_at_ctrl_c", lambda: None)  # of the tests' own process
    run, small, out, text = (tmp_path / name for name in ("run", "small", "out", "text.txt"))
    text.write_text(make_text(4000))
    code, said = ngc("import", f"--from={published}", f"--workdir={run}", "--context=16")
    assert (code, said.err) == (0, "")
    assert "2 layers of width 16, from tiny, SHA-256" in said.out
    tokens = ["--tokens=16", f"--text={text}"]
    code, said = ngc("convert", f"--workdir={run}", f"--to={small}", *tokens, "--kept=0.7")
    assert (code, said.err) == (0, "")
    assert "predicted by ngc: " in said.out
    assert "warning: 16 tokens are fewer than the 24 inputs of a matrix" in said.out
    assert ngc_jax.load(small).config.model.rule == "leaders"
    code, said = ngc("export", f"--workdir={run}", f"--to={out}")
    assert (code, said.err) == (0, "")
    assert open_source(out).config["hidden_size"] == 16
    code, said = ngc("export", f"--workdir={small}", f"--to={out}2", "--dtype=float32")
    assert (code, said.err) == (0, "")
    code, said = ngc("export", f"--workdir={small}", f"--to={out}3", "--form=factored")
    assert (code, said.err) == (0, "")
    assert open_source(f"{out}3").config["model_type"] == "ngc_llama"
    import_pretrained(f"{out}2", tmp_path / "back", context=16)
    ported = [f"--to={small}4", "--form=ports", "--groups=2", "--kept=0.7"]
    code, said = ngc("convert", f"--workdir={run}", *ported, *tokens)
    assert (code, said.err) == (0, "")
    assert "predicted by form=ports: " in said.out
    assert ngc_jax.load(f"{small}4").config.model.rule == "addressed"
    windows = np.arange(32).reshape(2, 16)
    back, made = (ngc_jax.load(home).logits(windows) for home in (tmp_path / "back", small))
    np.testing.assert_allclose(back, made, atol=1e-4)
    for words, wants in (
        (["export", f"--workdir={run}"], "--to is missing"),
        (["convert", f"--workdir={run}", f"--text={text}"], "--to is missing"),
        (["convert", f"--workdir={run}", f"--to={small}3", "--text=none.txt"], "cannot be read"),
        (["convert", f"--workdir={run}", f"--to={small}3", "--kept=1.5"], "--kept=1.5: must be"),
        (["convert", f"--workdir={run}", f"--to={small}3", "--mesh=data:99"], "devices at most"),
        (["export", f"--workdir={run}", f"--to={out}4", "--form=factored"], "must be 'formed'"),
        (["export", f"--workdir={run}", f"--to={out}4", "--dtype=float16"], "--dtype=float16"),
        (["import", "--from=nowhere", f"--workdir={run}2"], "there is no 'nowhere'"),
        (["import", f"--from={published}", f"--workdir={run}2", "--compute_dtype=int8"], "int8"),
        (["imprt"], "Did you mean 'import'?"),
        (
            ["convert", f"--workdir={run}", f"--to={small}3", *tokens, "--form=ports"],
            "groups=0: must be one of 2, 4 where form='ports'",
        ),
    ):
        code, said = ngc(*words)
        assert code == 2, words
        assert wants in said.err
        assert said.err.count("\n") == 1


# ---- Healing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("imitate", ["outputs", "stages"])
def test_a_converted_model_is_healed_by_its_teacher_and_resumes_to_the_bit(
    imitate, teacher, means, tmp_path
):
    small, text = tmp_path / "small", tmp_path / "text.txt"
    convert(teacher, fit(teacher, means, "ngc", 0.5), small)
    text.write_text(make_text(20_000))
    config = runpy.run_path(str(ROOT / "configs" / "stored.py"))["get_config"](str(small))
    config.data.path = str(text)
    config.train.update({"init_from": str(small), "teacher": str(teacher.workdir)})
    config.train.imitate = imitate
    config.train.update({"steps": 12, "warmup_steps": 1, "log_every": 1, "batch_size": 8})
    config.train.update({"learning_rate": 0.0, "state_learning_rate": 3e-3})
    config.stability.every, config.checkpoint.every_steps, config.eval.windows = 0, 4, 8
    healed, began = ngc_jax.train(config, tmp_path / "healed"), ngc_jax.load(small)
    rows = read_rows(tmp_path / "healed")
    distances = [row["train/distance"] for row in rows if "train/distance" in row]
    assert distances[-1] < 0.9 * distances[0]
    before, after = (flatten_dict(run.params, sep="/") for run in (began, healed))
    for name in before:  # a learning rate of 0 keeps all but states
        same = np.array_equal(before[name], after[name])
        assert same == ("inter_leaders" not in name or name.endswith("order")), name
    if imitate == "outputs":
        return
    shutil.copytree(tmp_path / "healed", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "12")
    ngc_jax.train(config, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "healed")


def test_what_does_not_fit_a_teacher_or_a_start_is_refused(teacher, means, tmp_path):
    config = runpy.run_path(str(ROOT / "configs" / "stored.py"))["get_config"](teacher.workdir)
    (tmp_path / "text.txt").write_text(make_text(20_000))
    config.data.path = str(tmp_path / "text.txt")
    config.train.init_from = str(teacher.workdir)
    for change, message in (
        ({"train.teacher": "nowhere"}, "train.teacher='nowhere': .*no config.json"),
        ({"model.hidden": 48}, r"down/dense_block/weight \[[^]]*\] -> \[[^]]*16, 48\]"),
        ({"data.tokenizer": "bytes"}, "must read the same tokens"),
        (
            {"train.init_from": "", "model.prelude": 3, "train.imitate": "stream"},
            "train.teacher=.*: must have .* = .16, 3, 0. in config.model, not .16, 2, 0.",
        ),
    ):
        changed = config.copy_and_resolve_references()
        changed.train.teacher = str(teacher.workdir)
        for path, value in change.items():
            section, _, name = path.partition(".")
            changed[section][name] = value
        with pytest.raises(UserError, match=message):
            ngc_jax.train(changed, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_the_flow_through_compressed_stages_is_that_of_the_compressed_model(
    teacher, tokens, batch, means
):
    flow = shifted_problems(teacher, means, batch)
    first, weights, replace = next(flow)
    for problem in first.values():  # before anything is compressed
        np.testing.assert_allclose(problem.shifted, problem.inputs, atol=1e-4)
        np.testing.assert_allclose(problem.cross, problem.inputs, atol=1e-4)
    halved = jax.tree.map(lambda a: a / 2, weights)
    replace(halved)
    second, _, _ = next(flow)
    changed = jax.tree.map(jnp.array, teacher.params)
    changed["prelude"] = jax.tree.map(lambda a, b: a.at[0].set(b), changed["prelude"], halved)
    x = np.asarray(probes.activations(teacher.decoder, changed, Batch(tokens))["prelude 1"])
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    scale = np.asarray(changed["prelude"]["attention_norm"]["scale"][1])
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(second["query"].shifted, x.T @ x / len(x), atol=1e-4)


@pytest.mark.parametrize("task", ["parity", "sudoku4_in_place"])
def test_our_own_dense_model_of_a_task_is_converted_on_its_problems(task, tiny, tmp_path):
    config, length = tiny, 24 if task == "parity" else 33
    config.data.update({"task": task, "path": "", "context": length, "problems": 200, "high": 6})
    config.model.update({"rule": "dense", "prelude": 1, "core": 0, "coda": 1})
    config.train.update({"steps": 4, "warmup_steps": 1})
    config.eval.every, config.stability.every = 4, 0
    reset_unread(config)
    dense = ngc_jax.train(config, tmp_path / "dense")
    batch = examples(dense, [], 20 * length)
    means = calibrate(dense, batch, tmp_path, rows=4, say=quiet)
    padding = np.arange(length) > [[np.flatnonzero(row >= 0)[-1]] for row in batch.targets]
    others = batch.replace(inputs=np.where(padding, 1, batch.inputs))
    for kind, of in calibrate(dense, others, tmp_path, rows=4, say=quiet).items():
        for name, sums in of.items():  # what stands in the padding counts for nothing
            np.testing.assert_allclose(sums, means[kind][name], atol=1e-6)
    found = fit(dense, means, "mpifa", 0.6, batch=batch)
    convert(dense, found, tmp_path / "small")
    small = ngc_jax.load(tmp_path / "small", trust=True)
    expected = dense.model.apply(reconstructed(dense, found), batch)[0]
    np.testing.assert_allclose(small.model.apply(small.params, batch)[0], expected, atol=2e-4)
    assert small.data().fingerprint == dense.meta["data"]
