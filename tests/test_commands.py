"""What a person does with a finished run: sample, evaluate, inspect, plot."""

import io
import os
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import python

from ngc_jax.commands import evaluate, sample, stability
from ngc_jax.commands.inspect import parameter_table
from ngc_jax.count import Parameters
from ngc_jax.data.batches import Batch
from ngc_jax.nn.sampling import Sampling, choose, generate
from ngc_jax.runtime.checkpoint import digest
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import read_rows
from ngc_jax.training import card, evaluation
from ngc_jax.training import loop as train
from ngc_jax.training.load import load


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.fixture
def run(home, tiny):
    if not (home / "card.md").exists():
        assert train.run(tiny, home)
    return home


def test_greedy_sampling_is_the_likeliest_token_of_the_full_forward(run):
    trained = load(run)
    prompt = jnp.array([[256, 103, 114], [256, 115, 105]])
    new = generate(
        trained.model, trained.state.params, prompt, 20, jax.random.key(0), Sampling(0.0)
    )
    logits = jax.jit(trained.model.apply)(
        trained.state.params, Batch(jnp.concatenate([prompt, new], axis=1))
    )[0]
    np.testing.assert_array_equal(new, jnp.argmax(logits[:, 2:-1], axis=-1))


def test_sampling_follows_its_seed(run):
    trained = load(run)
    prompt = jnp.array([[256, 103]])
    draw = [
        generate(trained.model, trained.state.params, prompt, 30, jax.random.key(k), Sampling(1.0))
        for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])


def test_top_p_keeps_the_smallest_likely_set_and_temperature_sharpens():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(temperature, top_p):
        drawn = jax.vmap(lambda key: choose(logits, key, Sampling(temperature, top_p))[0])(keys)
        return np.bincount(drawn, minlength=4) / len(keys)

    np.testing.assert_allclose(shares(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.6), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 1e-6), [1, 0, 0, 0])
    squared = np.square([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(shares(0.5, 1.0), squared / squared.sum(), atol=0.03)
    np.testing.assert_allclose(shares(0.0, 1.0), [1, 0, 0, 0])


def test_what_may_be_drawn_is_that_of_a_plain_reference():
    draw = np.random.default_rng(0)
    for case in range(40):
        logits, seen = draw.normal(0, 2, 9).astype(np.float32), draw.random(9) < 0.3
        how = Sampling(0.5, *draw.choice([0.3, 0.7, 1.0], 1), int(draw.integers(0, 5)))
        how = how._replace(min_p=float(draw.choice([0, 0.1])), repetition_penalty=1.3)
        less = np.where(seen, np.where(logits > 0, logits / 1.3, logits * 1.3), logits) / 0.5
        order = np.argsort(-less)[: how.top_k or None]
        share = np.exp(less[order] - less[order[0]])
        share /= share.sum()
        kept = (np.cumsum(share) - share < how.top_p) & (share >= how.min_p * share[0])
        keys = jax.random.split(jax.random.key(case), 400)
        row = logits[None], how, seen[None]
        pick = jax.vmap(lambda key, row=row: choose(row[0], key, *row[1:])[0])
        drawn = np.bincount(pick(keys), minlength=9)
        assert {*np.flatnonzero(drawn)} <= {*order[kept].tolist()}
        likely = order[kept][share[kept] / share[kept].sum() > 0.05]
        assert (drawn[likely] > 0).all()
        best = choose(logits[None], keys[0], how._replace(temperature=0.0), seen[None])
        assert best[0] == np.argmax(less)


def test_a_line_that_is_typed_is_continued_and_samples_differ(run, monkeypatch, capsys):
    flags = ["--prompt=group ", "--tokens=8", "--samples=2"]
    monkeypatch.setattr("sys.argv", ["sample", f"--workdir={run}", *flags])
    sample.main()
    said = capsys.readouterr().out
    trained = load(run)
    for seed in (0, 1):
        assert f"seed {seed}:\ngroup {trained.generate('group ', tokens=8, seed=seed)}\n" in said
    monkeypatch.setattr("sys.argv", ["sample", f"--workdir={run}", "--interactive", "--tokens=5"])
    monkeypatch.setattr("sys.stdin", io.StringIO("a group\n\n"))
    sample.main()
    first = trained.generate("a group\n", tokens=5)
    assert capsys.readouterr().out.startswith(first + "\n")


def test_the_parameter_table_adds_up(run):
    trained = load(run)
    table = parameter_table(trained.state.params, trained.model).splitlines()
    total = sum(leaf.size for leaf in jax.tree.leaves(trained.state.params))
    assert table[-1].split() == ["total", f"{total:,}", f"{2 * (4 * 16 * 16 + 3 * 16 * 32):,}"]
    assert len(table) == len(jax.tree.leaves(trained.state.params)) + 2


@pytest.mark.slow
def test_the_commands_print_what_was_trained(run, tmp_path):
    final = read_rows(run)[-1]
    evaluated = python("-m", "ngc_jax.evaluate", f"--workdir={run}", "--trust")
    assert evaluated.returncode == 0, evaluated.stderr
    shown = dict(line.split() for line in evaluated.stdout.splitlines()[1:])
    assert float(shown["bits_per_byte"]) == pytest.approx(final["final/bits_per_byte"], abs=1e-4)

    sampled = python("-m", "ngc_jax.sample", f"--workdir={run}", "--prompt=group ", "--tokens=40")
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith("group ")
    assert len(sampled.stdout) > 30

    inspected = python("-m", "ngc_jax.inspect", f"--workdir={run}", "--step=25")
    assert inspected.returncode == 0, inspected.stderr
    assert "checkpoint 30: sound" in inspected.stdout
    assert f"state at step 25, sha256 {digest(load(run, 25).state)}" in inspected.stdout

    picture = tmp_path / "curve.png"
    plotted = python("-m", "ngc_jax.plot", f"--out={picture}", run)
    assert plotted.returncode == 0, plotted.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_loop_is_evaluated_for_other_rounds_and_until_it_settles(run, monkeypatch, capsys):
    def printed(command, *flags):
        monkeypatch.setattr("sys.argv", ["command", f"--workdir={run}", *flags])
        command()
        return dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])

    # most of what would be compiled
    monkeypatch.setattr(evaluation, "compile_watch", lambda *_: lambda _: {})
    four = float(printed(evaluate.main, "--trust", "--rounds=4")["loss"])
    # that no round stays below
    settled = printed(evaluate.main, "--trust", "--rounds=settled", "--tolerance=1e-9", "--cap=4")
    assert (float(settled["loss"]), float(settled["rounds"])) == (pytest.approx(four, abs=1e-5), 4)
    assert four != pytest.approx(read_rows(run)[-1]["final/loss"], abs=1e-3)  # of two rounds
    for command, flag, message in (
        (evaluate.main, "--rounds=0", "must be 1 or more"),
        (evaluate.main, "--cap=0", "must be 1 or more"),
        (sample.main, "--rounds=settled", "a cache keeps what each round made"),
    ):
        with pytest.raises(UserError, match=message):
            printed(command, flag)


@pytest.mark.parametrize("command", [evaluate.main, stability.main])
def test_commands_name_the_text_that_only_the_directory_names(run, text, command, monkeypatch):
    monkeypatch.setattr("sys.argv", ["command", f"--workdir={run}"])
    with pytest.raises(UserError, match=rf"data.path='{text}', which is not read unless you say"):
        command()
    monkeypatch.setattr("sys.argv", ["command", f"--workdir={run}", "--tfds_dir=/a"])
    with pytest.raises(UserError, match="tfds_dir='/a': must not be given"):
        command()


def test_the_card_prints_commands_that_say_where_the_text_is(run, text):
    said = (run / "card.md").read_text()
    assert f"python -m ngc_jax.evaluate --workdir={run} --data_path={text}\n" in said


def test_a_page_is_not_written_through_a_link(run, tmp_path, monkeypatch):
    (run / "stability").symlink_to(tmp_path)
    monkeypatch.setattr("sys.argv", ["stability", f"--workdir={run}", "--trust"])
    with pytest.raises(UserError, match="stability is a link, which is not followed"):
        stability.main()
    (run / "stability").unlink()
    assert not os.listdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("sample", ["--tokens=0"], "tokens=0: must be 1 or more"),
        ("sample", ["--top_p=2"], "top_p=2.0: must be above 0 and at most 1"),
        ("inspect", ["--step=7"], "holds no checkpoint 7; there are: [20, 25, 30]"),
    ],
)
def test_mistakes_are_one_line(run, command, flags, message):
    done = python("-m", f"ngc_jax.{command}", f"--workdir={run}", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_card_shows_names_as_they_are_and_commands_that_work(run, tiny, tmp_path):
    odd = tmp_path / "a`b $(x) <i> | '"
    odd.mkdir()
    (odd / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    stored = Parameters(3, 2, 1)
    card.write(odd, tiny, "of `x`\n# <script>", stored, 5)
    text = (odd / "card.md").read_text()
    assert text.startswith("# a\\`b \\$(x) \\<i> | '\n")
    assert "**Data.** of `x`\n\\# \\<script>." in text
    commands = re.findall(r"^    (python .*)$", text, re.MULTILINE)
    assert [shlex.split(line)[3] for line in commands] == [f"--workdir={odd}"] * 3
    assert f"    run = ngc_jax.load({str(odd)!r})\n" in text
