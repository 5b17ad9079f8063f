"""Mistakes on the command line: one line that names field, value and what would work; nothing
half-written.
"""

import os

import pytest
from conftest import launch, python

from ngc_jax.data.tokens import Bytes
from ngc_jax.training.workdir import claim


@pytest.fixture
def refused(tiny_flags, tmp_path):
    """Run with extra flags; returns the one line of the error."""

    def run(*flags, workdir=None):
        target = workdir or tmp_path / "run"
        before = target.exists()
        done = launch(*tiny_flags, f"--workdir={target}", *flags)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1, "one line"
        assert target.exists() == before, "nothing is written"
        return done.stderr

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.model.widht=3", 'Did you mean "width" instead of "widht"?'),
        ("--config.train.steps=1e3", "invalid literal for int"),
        (
            "--config.model.rule=brodcast",
            "model.rule='brodcast': must be one of 'addressed', 'broadcast'",
        ),
        (
            "--config.model.groups=3",
            "model.width=16: must be a multiple of model.groups=3, for instance 18",
        ),
        ("--config.data.path=/no/such/text", "data.path='/no/such/text' does not exist"),
        ("--config.data.context=100000", "fewer than a window of data.context=100000"),
        ("--config=configs/nothing.py", "No such file"),
    ],
)
def test_a_mistake_is_one_line(refused, flag, message):
    assert message in refused(flag)


@pytest.mark.slow
def test_an_empty_corpus_is_one_line(refused, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert "holds no text" in refused(f"--config.data.path={tmp_path / 'empty.txt'}")


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_is_one_line(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(workdir=tmp_path / "file" / "run")
    if os.getuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "cannot be written" in refused(workdir=tmp_path / "locked" / "run")


@pytest.mark.slow
def test_another_configs_directory_is_one_line(refused, tmp_path, tiny):
    target = tmp_path / "taken"
    tiny.train.steps = 4
    claim(target, tiny, Bytes())
    before = sorted(target.rglob("*"))
    assert "train.steps: 4 -> 30" in refused(workdir=target)
    assert sorted(target.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sample", "evaluate", "inspect"])
def test_commands_refuse_a_directory_without_a_run(command, tmp_path):
    done = python("-m", f"ngc_jax.{command}", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == f"error: --workdir={tmp_path} holds no run: no config.json in it\n"
