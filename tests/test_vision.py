"""Models of images: patches, what order says, and a run from its start to its end."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK, TINY, drawn, launch
from PIL import Image

from ngc_jax.commands import evaluate, export, lens, predict
from ngc_jax.commands.arguments import command
from ngc_jax.config import base, make_model, named
from ngc_jax.data.batches import Batch, abstract_batch
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.vision import patches
from ngc_jax.runtime.checkpoint import digest
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import TIMES, read_rows
from ngc_jax.training import loop
from ngc_jax.training.classification import (
    Predicted,
    calibration_error,
    confusion,
    negative_log_likelihood,
)
from ngc_jax.training.load import load
from ngc_jax.training.match_size import cost, prepare
from ngc_jax.training.traffic import compile_update

DRAW = np.random.default_rng(1)
AUGMENTED = {"data.flip": True, "data.shift": 1, "data.crop": 0.8, "data.cutout": 2}
AUGMENTED |= {"data.mixup": 0.3, "model.dropout": 0.1, "model.stochastic_depth": 0.1}
FIELDS = {name: value for name, value in TINY.items() if name != "data.context"}
FIELDS |= {"data.kind": "images", "model.kind": "vision", "train.steps": 20}
FIELDS |= {"stability.every": 0, "checkpoint.every_steps": 5}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three kinds of squares: dark, bright, and bright on the left."""
    path, classes = tmp_path_factory.mktemp("images") / "squares.npz", np.arange(90) % 3
    bright = np.array([[0, 0], [1, 1], [1, 0]])[classes].repeat(4, axis=1)[:, None]
    pixels = 60 + 120 * bright + DRAW.integers(-50, 50, (90, 8, 8))
    np.savez(path, images=pixels.astype(np.uint8), labels=classes)
    return path


def settings(path="", **fields):
    config = base()
    config.update_from_flattened_dict({**FIELDS, "data.path": str(path), **fields})
    return config


def pixels(count=2):
    return DRAW.standard_normal((count, 8, 8, 1)).astype(np.float32)


def test_patches_are_squares_row_by_row():
    x = DRAW.standard_normal((2, 6, 6, 3))
    cut = [x[:, i : i + 2, j : j + 2].reshape(2, 12) for i in (0, 2, 4) for j in (0, 2, 4)]
    np.testing.assert_array_equal(patches(jnp.asarray(x), 2), np.stack(cut, 1).astype(np.float32))


@pytest.mark.parametrize("readout", ["mean", "class"])
def test_patches_may_stand_in_any_order_with_their_positions(readout):
    config = settings(**{"model.readout": readout, "model.route": "start"})
    model = make_model(config, 3)
    params, x = drawn(model), pixels()
    embed, apply = params["embed"], jax.jit(model.apply)
    logits = apply(params, Batch(x))[0]
    assert logits.shape == (2, 1, 3)
    order = DRAW.permutation(16)
    moved = x.reshape(2, 4, 2, 4, 2).swapaxes(2, 3).reshape(2, 16, 2, 2)[:, order]
    moved = moved.reshape(2, 4, 4, 2, 2).swapaxes(2, 3).reshape(2, 8, 8, 1)
    first = readout == "class"
    where = embed["position"].at[first:].set(embed["position"][first:][order])
    alike = apply(params | {"embed": embed | {"position": where}}, Batch(moved))[0]
    np.testing.assert_allclose(logits, alike, atol=1e-5)
    assert np.abs(logits - apply(params, Batch(moved))[0]).max() > 1e-3, "positions matter"


def test_stochastic_depth_leaves_out_whole_branches_of_an_example():
    config = settings(**{"model.stochastic_depth": 0.5, "model.core": 0, "model.prelude": 1})
    model = make_model(config, 3)
    params, x = drawn(model), pixels(1).repeat(64, 0)
    inner = lambda key: model.stream(  # noqa: E731
        model.dropped(params, key), model.embed(params, Batch(x))
    )[0]
    found = np.asarray(jax.jit(inner)(jax.random.key(0)))
    kinds = np.unique(found.round(4), axis=0)
    # neither branch, either one, or both; what is kept is twice as loud
    assert len(kinds) == 4
    still = np.asarray(model.embed(params, Batch(x[:1])))
    assert np.isclose(kinds, still, atol=1e-3).all(axis=(1, 2)).sum() == 1


def test_sizes_are_matched_as_for_text():
    config = settings(**{"model.match": "ngc_tiny:0.2", "model.match_by": "hidden"})
    prepare(config)
    assert cost(config) / cost(named("ngc_tiny")) == pytest.approx(0.2, rel=0.01)
    patches_alone = 2 * 16 * 4 * config.model.width
    assert cost(config, "flops") > patches_alone


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run with all that training changes, on one device."""
    home = tmp_path_factory.mktemp("run") / "whole"
    assert loop.run(settings(images, **AUGMENTED), home)
    return home


def test_a_run_that_is_stopped_ends_to_the_bit_where_another_ends(
    images, whole, tmp_path, monkeypatch
):
    config, stops = settings(images, **AUGMENTED), iter([False] * 7 + [True] * 99)
    with monkeypatch.context() as stopped:
        stopped.setattr(loop.Run, "wishes", lambda run: (next(stops), False))
        assert not loop.run(config, tmp_path / "run")
    assert loop.run(config, tmp_path / "run")
    homes = whole, tmp_path / "run"
    rows, again = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(home)]
        for home in homes
    )
    assert rows == again
    assert digest(load(homes[0]).state) == digest(load(homes[1]).state)


def test_a_run_counts_images_and_learns_them(whole):
    rows = read_rows(whole)
    assert rows[-1].keys() == {"step", "final/loss", "final/accuracy"}
    assert rows[-1]["final/accuracy"] > 0.6
    assert all(row["images_per_second"] > 0 for row in rows if "train/loss" in row)
    card = (whole / "card.md").read_text()
    assert "160 images, adamw" in card
    assert "accuracy, all held-out images" in card
    told = json.loads((whole / "tokenizer.json").read_text())
    assert told["classes"] == ["0", "1", "2"]


@pytest.mark.slow
def test_a_run_on_eight_devices_is_the_run_on_one(images, whole, tmp_path):
    fields = {**FIELDS, **AUGMENTED, "data.path": images, "mesh.fsdp": 2, "mesh.group": 2}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    setting = f"--xla_force_host_platform_device_count=8 {QUICK}"
    home = tmp_path / "run"
    done = launch("--config=defaults", *flags, f"--workdir={home}", XLA_FLAGS=setting)
    assert done.returncode == 0, done.stderr
    assert "on 8 x cpu" in done.stdout
    named = ("train/loss", "eval/loss", "final/loss")
    both = [[row[n] for row in read_rows(at) for n in named if n in row] for at in (whole, home)]
    assert len(both[0]) == 23
    np.testing.assert_allclose(*both, rtol=1e-5)


def test_rounds_until_it_settles_are_those_of_an_image():
    config = settings()
    model = make_model(config, 3)
    params, x = drawn(model), Batch(pixels())
    logits, rounds = jax.jit(lambda p: model.settle(p, x, tolerance=1e-3, cap=5))(params)
    assert (logits.shape, rounds.shape) == ((2, 1, 3), (2, 1))
    assert np.all((rounds >= 1) & (rounds <= 5))


def test_the_shapes_of_a_batch_are_known_before_there_are_images(images):
    from ngc_jax.data.batches import batch_like
    from ngc_jax.data.tokens import load_data

    config = settings(images)
    assert abstract_batch(config.data, 4) == batch_like(load_data(config.data).train, 4)
    assert dataclasses.replace(make_model(config, 3).shape, rounds=3).tokens == 16


# ---- Commands ------------------------------------------------------------------------------------


def test_measures_of_classification_are_those_of_their_formulas():
    shares = DRAW.dirichlet(np.ones(4) / 2, 500).astype(np.float32)
    found = Predicted(shares, DRAW.integers(0, 4, 500).astype(np.int32))
    right = [row.argmax() == of for row, of in zip(shares, found.classes, strict=True)]
    off = 0.0
    for low in np.arange(15) / 15:
        inside = [i for i, row in enumerate(shares) if low < row.max() <= low + 1 / 15]
        if inside:
            gaps = np.mean([right[i] for i in inside]), np.mean([shares[i].max() for i in inside])
            off += len(inside) / 500 * abs(gaps[0] - gaps[1])
    assert calibration_error(found) == pytest.approx(off, abs=1e-5)
    nats = [-np.log(row[of]) for row, of in zip(shares, found.classes, strict=True)]
    assert negative_log_likelihood(found) == pytest.approx(np.mean(nats), rel=1e-5)
    table = np.zeros((4, 4), int)
    for row, of in zip(shares, found.classes, strict=True):
        table[of, row.argmax()] += 1
    np.testing.assert_array_equal(confusion(found), table)


def run_command(monkeypatch, capsys, module, *argv):
    monkeypatch.setattr("sys.argv", ["command", *map(str, argv)])
    command(module.main)
    return capsys.readouterr().out


def test_evaluation_tells_what_is_taken_for_what(whole, images, monkeypatch, capsys):
    flags = f"--workdir={whole}", f"--data_path={images}"
    said = run_command(monkeypatch, capsys, evaluate, *flags)
    accuracy = read_rows(whole)[-1]["final/accuracy"]
    assert f"accuracy                                 {accuracy:.6f}" in said
    assert f"accuracy {accuracy:.2%}, " in said
    assert "(95%, Wilson), " in said
    loss = float(re.search(r"^loss +(\S+)", said, re.M)[1])
    assert float(re.search(r"log-likelihood (\S+)", said)[1]) == pytest.approx(loss, abs=1e-4)
    rows = said[said.index("is, said to be") :].splitlines()[1:4]
    table = np.array([[int(n) for n in row.split()[1:]] for row in rows])
    assert table.sum() == 9
    assert np.trace(table) / 9 == pytest.approx(accuracy)


def test_files_of_any_size_are_named(whole, tmp_path, monkeypatch, capsys):
    bright = np.full((50, 90, 3), 180, np.uint8)
    Image.fromarray(bright).save(tmp_path / "bright.jpg")
    Image.fromarray(bright // 3).save(tmp_path / "dark.png")
    files = [tmp_path / "bright.jpg", tmp_path / "dark.png"]
    said = run_command(monkeypatch, capsys, predict, f"--workdir={whole}", "--top=2", *files)
    assert re.fullmatch(r".*bright.jpg: 1 .*%, \d .*%\n.*dark.png: 0 .*%, \d .*%\n", said)
    said = run_command(monkeypatch, capsys, predict, f"--workdir={whole}", "--json", *files)
    told = [json.loads(line) for line in said.splitlines()]
    assert [max(one["classes"], key=one["classes"].get) for one in told] == ["1", "0"]
    assert sum(told[0]["classes"].values()) == pytest.approx(1, abs=1e-5)
    (tmp_path / "none.png").write_text("none")
    with pytest.raises(SystemExit):
        run_command(monkeypatch, capsys, predict, f"--workdir={whole}", tmp_path / "none.png")
    assert "none.png: must be an image" in capsys.readouterr().err


def test_what_is_for_text_says_so(whole, monkeypatch, capsys):
    for ask in (load(whole).encode, load(whole).generate):
        with pytest.raises(UserError, match="holds a model of images: encode is for models of"):
            ask("text")
    for module in (export, lens):
        with pytest.raises(SystemExit):
            run_command(
                monkeypatch,
                capsys,
                module,
                f"--workdir={whole}",
                *["--to=/nowhere"] * (module is export),
            )
        assert "is for models of text" in capsys.readouterr().err


@pytest.mark.slow
def test_the_large_config_compiles():
    config = named("vision_base")
    config.model.prelude = config.model.coda = 1  # stages of a stack are compiled once
    config.mesh.data = 1
    prepare(config)
    memory = compile_update(config, meshes.single_device()).memory_analysis()
    assert memory.argument_size_in_bytes > 4 * 3 * 32 * 32 * 512
