"""The stability page of a trained run: complete, self-contained, clear about what it leaves out."""

import base64
import re
import shutil
import struct
import sys
import zlib

import jax
import numpy as np
import pytest
from conftest import WHOLE

from ngc_jax.analysis import captions, figures, page
from ngc_jax.analysis.stability import _loop, gain_bounds, headlines, measure, settled
from ngc_jax.commands.arguments import command
from ngc_jax.commands.stability import main
from ngc_jax.config import base, model_shape
from ngc_jax.core.rules import weights
from ngc_jax.data.batches import Batch
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.report.figures import figure
from ngc_jax.training import loop as train
from ngc_jax.training.load import load

SECTIONS = ["numbers", "spectrum", "rounds", "tokens", "drive", "traffic", "paths", "bounds"]
FIGURES = SECTIONS[1:-1]


def tiny_config(**fields):
    config = base()
    config.update_from_flattened_dict({**WHOLE, **fields})
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory, text, cache):
    home = tmp_path_factory.mktemp("runs") / "a<b>"
    assert train.run(
        tiny_config(**{"train.steps": 5, "data.path": str(text), "data.cache_dir": str(cache)}),
        home,
    )
    return home


def call(monkeypatch, *flags):
    """What `python -m ngc_jax.stability` does, in this process."""
    monkeypatch.setattr(sys, "argv", ["stability", "--trust", *map(str, flags)])
    command(main)


@pytest.fixture
def written(run, monkeypatch, capsys):
    """(HTML, what was printed) of the run's page, written once."""
    out = run / "stability"
    if not out.exists():
        call(monkeypatch, f"--workdir={run}", "--sequences=3", "--rounds=4")
        (run / "printed").write_text(capsys.readouterr().out)
    return (out / "index.html").read_text(), (run / "printed").read_text()


def sections(text):
    return dict(re.findall(r'<h2 id="(\w+)">(.*?)(?=<h2|</body>)', text, re.DOTALL))


def pixels(png):
    """The bytes of an image, filtered as they are: enough to tell a drawing from a blank sheet."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, data = 8, b""
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        data += png[at + 8 : at + 8 + size] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += size + 12
    return np.frombuffer(zlib.decompress(data), np.uint8)


@pytest.mark.slow
def test_the_page_has_every_section_and_needs_nothing_but_itself(run, written):
    text, _ = written
    assert list(sections(text)) == SECTIONS
    assert "Left out" not in text
    assert "http" not in text
    assert "<script" not in text
    assert 'name="viewport"' in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == len(FIGURES)
    for name, source in zip(FIGURES, sources, strict=True):
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert png == (run / "stability" / f"{name}.png").read_bytes()
        assert len(np.unique(pixels(png))) > 20, name


@pytest.mark.slow
def test_the_page_says_what_was_measured(written):
    text, printed = written
    assert "Stability of a&lt;b&gt;, step 5" in text
    assert f"48 tokens of held-out text: 3 windows of {WHOLE['data.context']}" in text
    assert "4 groups" in text
    for unit in ("per round", "per stage", "per token", "nats per round"):
        assert f"<td>{unit}</td>" in text
    for what in ("drive off", "messages off", "the 2 rounds of training", "rounds 2 to 4"):
        assert what in text
        assert what in printed
    assert "index.html" in printed.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("spectrum", "per round, per stage or per token"),
        ("rounds", "a factor per round"),
        ("tokens", "per token"),
        ("drive", "a fraction per round"),
        ("traffic", "in units of the signal"),
        ("paths", "in units of the signal"),
        ("bounds", "a factor of lengths"),
    ],
)
def test_captions_name_units_and_limits(written, name, unit):
    said = sections(written[0])[name]
    assert unit in said
    assert "not say" in said or "not show" in said or "only say" in said


def test_bounds_hold_for_the_weights(run):
    trained = load(run)
    params = trained.state.params
    bounds = gain_bounds(trained.model, params)
    assert list(bounds) == ["prelude 1", "core 1", "coda 1"]
    stage = jax.tree.map(lambda p: p[0], params["core"]["stages"])
    for place, name in enumerate(("gate", "up")):
        parts = [
            (part.partition("_")[2], jax.tree.map(lambda p, i=place: p[i], s))
            for part, s in stage["gate_up"].items()
        ]
        formed = sum(weights(rule, states.get("pre", ()), states["post"]) for rule, states in parts)
        norm = float(np.linalg.norm(formed, 2))
        assert norm <= bounds["core 1"][name] <= 3 * norm


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """(directory, measures) of the page of a dense model without a loop."""
    config = tiny_config(
        **{"model.rule": "dense", "model.prelude": 2, "model.core": 0, "model.coda": 0}
    )
    model = Decoder(model_shape(config, Bytes.vocab))
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (2, 16), 0, 256), np.int32)
    measured = measure(model, jax.jit(model.init)(jax.random.key(0)), Batch(tokens), 4)
    out = tmp_path_factory.mktemp("page")
    page.write(out, measured, Bytes(), "dense", page.describe(config))
    return out, measured


def test_a_model_without_loop_and_messages_says_what_is_left_out(flat):
    out, measured = flat
    text = (out / "index.html").read_text()
    found = sections(text)
    assert list(found) == SECTIONS
    without = {name for name, body in found.items() if "Left out: " in body}
    assert without == {"rounds", "drive", "traffic", "paths"}
    assert all(
        "<img" not in found[name] and found[name].count("Left out: ") == 1 for name in without
    )
    assert sorted(path.name for path in out.glob("*.png")) == ["spectrum.png", "tokens.png"]
    assert [row.unit for row in headlines(measured)] == ["per stage", "per token", "per token"]


@pytest.mark.parametrize("activation", ["none", "tanh"])
def test_the_drive_is_told_as_the_loop_records_it(activation):
    config = tiny_config(**{"model.rounds": 3, "model.state_activation": activation})
    model = Decoder(model_shape(config, 40))
    params = jax.jit(model.init)(jax.random.key(0))
    batch = Batch(np.asarray(jax.random.randint(jax.random.key(1), (2, 6), 0, 40)))
    records = jax.jit(lambda params: model.apply(params, batch, record=True)[1])(params)
    loop = _loop(model, params, batch, 4)
    np.testing.assert_allclose(loop.drive_ratio.mean(axis=(0, 2)), records.drive_ratio, rtol=1e-5)


def test_contraction_is_a_geometric_mean_of_what_is_told():
    ratios = np.array([[[0.5, 2.0], [np.nan, 4.0]], [[np.nan, np.nan], [np.nan, np.nan]]])
    np.testing.assert_allclose(settled(ratios), [4 ** (1 / 3), np.nan])


def test_labels_are_plain_text_with_the_token_in_brackets():
    tokens = np.array([256, *"one\ntwø$".encode()], np.int32)
    named = page.labels(tokens, Bytes())
    assert named[1] == "[o]"
    assert named[4] == "one[\\n]"
    assert named[len(tokens) - 1].endswith("[$]")
    assert all(text.isascii() for text in named.values())
    assert page.labels(np.array([65, 66, 256, 67]), Bytes())[2] == "AB[document]"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=/no/such/run"], "--workdir=/no/such/run holds no run"),
        (["--rounds=0"], "--rounds=0: must be 2 or more, for instance 16"),
        (["--sequences=0"], "--sequences=0: must be 2 or more, for instance 16"),
        (["--out=FILE/page"], "page cannot be written"),
        (["--step=3"], "holds no checkpoint 3"),
    ],
)
def test_mistakes_are_one_line(run, monkeypatch, capsys, tmp_path, flags, message):
    (tmp_path / "file").touch()
    flags = [flag.replace("FILE", str(tmp_path / "file")) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, f"--workdir={run}", *flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_another_text_is_refused(run, monkeypatch, capsys, tmp_path, text):
    other = tmp_path / "run"
    other.mkdir()
    shutil.copytree(run / "checkpoints", other / "checkpoints")
    (tmp_path / "words.txt").write_text(text.read_text()[:-100])
    config = (run / "config.json").read_text().replace(str(text), str(tmp_path / "words.txt"))
    (other / "config.json").write_text(config)
    with pytest.raises(SystemExit):
        call(monkeypatch, f"--workdir={other}")
    assert "this is not what" in capsys.readouterr().err


def test_exponents_that_float32_does_not_resolve_are_told_and_lost_ones_not_drawn(flat):
    _, measured = flat
    assert "rounding error" not in captions.spectrum(measured)
    depth = measured.depth.copy()
    depth[:, -2], depth[:, -1] = depth[:, 0] - 11, -np.inf
    small = measured._replace(depth=depth)
    assert f"{2 / depth.shape[1]:.0%} of the exponents" in captions.spectrum(small)
    block = figure("spectrum", "", lambda canvas: figures.spectrum(canvas, small))
    assert len(np.unique(pixels(block.files["spectrum.png"]))) > 20
