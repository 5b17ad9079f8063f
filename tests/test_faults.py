"""What may befall a run while it goes: a full disk, a signal in an evaluation, bad batches, a hang.
(Kills: chaos.)
"""

import contextlib
import os
import re
import resource
import signal
import time

import jax
import numpy as np
import pytest

from experiments.chaos import outcome
from ngc_jax.data import NOTHING
from ngc_jax.runtime.checkpoint import MANIFEST, Checkpoints, SaveFailed
from ngc_jax.runtime.metrics import Progress, read_rows
from ngc_jax.runtime.watchdog import EXIT_CODE, Watchdog
from ngc_jax.training import loop as train
from ngc_jax.training import loss_spikes as spikes
from ngc_jax.training import run as run_module
from ngc_jax.training.run import Diverged


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "whole"


@pytest.fixture
def brief(tiny):
    tiny.train.steps, tiny.stability.every = 20, 0
    return tiny


def disk(full: bool) -> None:
    """No file of this process can grow, as on a full disk; or files can grow again."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 if full else -1, -1))


@contextlib.contextmanager
def at(monkeypatch, actions):
    """Do these things, each once, when the updates that they stand under are reported: {step:
    action}.
    """
    show, left = Progress.show, dict(actions)

    def shown(self, step, *args):
        show(self, step, *args)
        left.pop(step, lambda: None)()

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "show", shown)
        yield
    assert not left


def stop() -> None:
    signal.raise_signal(signal.SIGTERM)


# TensorBoard's own thread
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_on_a_full_disk_training_goes_on_and_says_so(brief, whole, tmp_path, monkeypatch, capsys):
    assert train.run(brief, whole)
    run = tmp_path / "run"
    capsys.readouterr()

    def fill(after):
        while not (run / "checkpoints" / str(after) / MANIFEST).exists():
            time.sleep(0.01)
        disk(full=True)

    actions = {7: lambda: fill(after=5), 12: lambda: disk(full=False), 18: lambda: fill(after=15)}
    try:
        with (
            at(monkeypatch, actions),
            pytest.raises(OSError, match="checkpoint, 15, is kept; make room"),
        ):
            train.run(brief, run)
    finally:
        disk(full=False)
    said = capsys.readouterr().out
    assert said.count("NOT SAVED") == 1
    kept = "the last sound checkpoint, 5, is kept; next try after step 15"
    assert f"File too large; training continues; {kept}" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["15", "5"]
    assert train.run(brief, run)
    assert outcome(run) == outcome(whole)


@pytest.mark.parametrize("most", [1, 1000, 60_000])
def test_a_save_that_fails_is_in_nobodys_way(most, tmp_path, capsys):
    # Orbax writes small files and large ones in different ways, which fail in different ways.
    state = {"a": jax.random.normal(jax.random.key(0), (64, 512))}
    checkpoints = Checkpoints(tmp_path)

    def save(step):
        checkpoints.save(step, state, {})
        checkpoints.wait()

    save(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, -1))
    try:
        for step in (2, 3):
            with pytest.raises(
                SaveFailed, match=f"checkpoint {step} could not be saved: .*File too large"
            ):
                save(step)
            assert checkpoints.newest_sound() == (1, {})
    finally:
        disk(full=False)
    save(4)
    checkpoints.close()
    assert sorted(os.listdir(tmp_path)) == ["1", "4"]
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.newest_sound() == (4, {})
    checkpoints.close()


def test_an_evaluation_is_abandoned_for_a_signal_and_made_after_going_on(
    brief, whole, tmp_path, monkeypatch
):
    assert train.run(brief, whole)
    run, compile_eval, seen = tmp_path / "run", train.compile_eval, []
    brief.train.hang_minutes = 0.3 / 60

    def compiled(*args):
        step = compile_eval(*args)

        def slow(params, tokens, real):
            seen.append(len(seen))
            # the first batch of the evaluation after update 10, the third of the last one
            if seen[-1] in (0, 7):
                stop()
                time.sleep(0.7)
            return step(params, tokens, real)

        return slow

    monkeypatch.setattr(train, "compile_eval", compiled)
    for step in (10, 20):
        assert train.run(brief, run) is False
        last = read_rows(run)[-1]
        assert last["step"] == step
        assert "final/loss" not in last
        assert "test_faults.py" in (run / "hang.txt").read_text(), (
            "the sleep is a hang, and where it was is told"
        )
        (run / "hang.txt").unlink()
    assert train.run(brief, run) is True
    assert train.run(brief, run) is True
    assert outcome(run) == outcome(whole)


def test_trouble_is_rewound_and_its_batches_passed_over(brief, tmp_path, monkeypatch, capsys):
    """Batches that ask nothing have no finite loss."""
    batches, bad = run_module.train_batches, {11, 12, 13, 19, 20, 21}

    def troubled(examples, *, start, **options):
        for i, batch in enumerate(batches(examples, start=start, **options), start):
            nothing = np.full_like(batch.targets, NOTHING)
            yield batch.replace(targets=nothing) if i in bad else batch

    monkeypatch.setattr(run_module, "train_batches", troubled)
    brief.train.max_bad_steps = 3
    once, stopped = tmp_path / "once", tmp_path / "stopped"
    assert train.run(brief, once)
    said = capsys.readouterr().out
    for rewound in (
        "step 14: rewound to checkpoint 10, 1 of at most 2 times; the 4 batches since",
        "step 18: rewound to checkpoint 15, 2 of at most 2 times; the 3 batches since",
    ):
        assert f"{rewound} then are skipped" in said
    rows = read_rows(once)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 21))
    assert [row["train/passed"] for row in rows if "train/passed" in row] == [4, 7]
    assert [row["step"] for row in rows if "eval/loss" in row] == [10, 20]
    assert not any(row.get("train/skipped") for row in rows)
    # in the trouble; then after rewinding, before the next checkpoint
    for step, action in ((12, stop), (13, stop)):
        with at(monkeypatch, {step: action}):
            assert train.run(brief, stopped) is False
    assert train.run(brief, stopped)
    assert outcome(stopped) == outcome(once)
    brief.train.max_rewinds = 1
    with pytest.raises(Diverged, match="rewound 1 times; last sound checkpoint: 15"):
        train.run(brief, tmp_path / "twice")


def test_spikes_are_skipped_rewound_and_not_learnt_from_also_if_stopped(
    brief, tmp_path, monkeypatch, capsys
):
    """Batches that ask for a byte which the text has not; the warm-up is shortened. A trace changes
    nothing.
    """
    batches, bad = run_module.train_batches, {8, 11, 12, 13}

    def troubled(examples, *, start, **options):
        for i, batch in enumerate(batches(examples, start=start, **options), start):
            absent = np.full_like(batch.targets, 255)
            yield batch.replace(targets=absent) if i in bad else batch

    monkeypatch.setattr(run_module, "train_batches", troubled)
    monkeypatch.setattr(spikes, "WARMUP", 5)
    brief.train.spike, brief.train.max_bad_steps = 1.0, 3
    once, stopped = tmp_path / "once", tmp_path / "stopped"
    assert train.run(brief, once)
    said = capsys.readouterr().out
    assert re.search(
        r"step 9: loss \d+\.\d+, gradient norm \d+\.\d+, a spike: update skipped", said
    )
    assert "step 14: rewound to checkpoint 10, 1 of at most 2 times; the 4 batches since" in said
    skipped = [row for row in read_rows(once) if row.get("train/bad_in_a_row")]
    changes = [(row["step"], row["stability/relative_update"]) for row in skipped]
    assert changes == [(9, 0.0)], "the parameters are unchanged; rows of what was rewound are gone"
    warned, losses = (
        Checkpoints(once / "checkpoints", read_only=True).restore(20, None).state["monitor"]
    )
    assert (int(warned["seen"]), int(losses["seen"])) == (19, 19)
    brief.train.profile = "3:4"
    with at(monkeypatch, {13: stop}):
        assert train.run(brief, stopped) is False
    assert len([*stopped.glob("profile/**/*.xplane.pb")]) == 1
    brief.train.profile = ""
    assert train.run(brief, stopped)
    assert outcome(stopped) == outcome(once)


def test_a_hang_is_told_once_and_ends_the_process_if_so_told(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    report = tmp_path / "hang.txt"
    with Watchdog(0.2 / 60, True, report) as watchdog:
        for _ in range(10):
            time.sleep(0.04)
            watchdog.beat()
        assert not report.exists()
        time.sleep(0.6)
    assert codes == [EXIT_CODE]
    assert report.read_text().count("where every thread stands") == 1
    assert "test_a_hang_is_told_once" in report.read_text()
    with Watchdog(0.0, True, report):
        time.sleep(0.05)
    assert codes == [EXIT_CODE]
