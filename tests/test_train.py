"""The loop as a user meets it: a whole run, going on, being asked to stop, breaking down, killed at
any instant.
"""

import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import QUICK, ROOT, launch

from ngc_jax.runtime.checkpoint import Checkpoints, digest
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import TIMES, Progress, read_rows
from ngc_jax.runtime.preemption import EXIT_CODE
from ngc_jax.training import loop as train
from ngc_jax.training.load import load
from ngc_jax.training.run import Diverged


def rows_but_for_times(workdir):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(workdir)]


def final_digest(workdir):
    return digest(load(workdir).state)


def stop_when_shown(monkeypatch, *steps):
    """Ask this process to stop when these updates are reported, which is while the ones after them
    run.
    """
    show, left = Progress.show, set(steps)

    def shown(self, step, *args):
        show(self, step, *args)
        if step in left:
            left.remove(step)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Progress, "show", shown)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where the unbroken run of `tiny` is kept once it has been made."""
    return tmp_path_factory.mktemp("runs") / "whole"


@pytest.fixture
def unbroken(whole, tiny):
    if not (whole / "card.md").exists():
        assert train.run(tiny, whole)
    return whole


def test_a_run_leaves_what_the_contract_says(unbroken, tiny):
    assert json.loads((unbroken / "config.json").read_text()) == tiny.to_dict()
    rows = read_rows(unbroken)
    updates = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in updates] == list(range(1, 31))
    assert {"train/grad_norm", "train/learning_rate", "tokens_per_second", "seconds"} <= updates[
        0
    ].keys()
    assert updates[-1]["train/loss"] < updates[0]["train/loss"] - 1
    evaluated = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluated] == [10, 20, 30]
    assert "eval/bits_per_byte" in evaluated[0]
    watched = [row for row in rows if "stability/contraction_per_round" in row]
    assert [row["step"] for row in watched] == [10, 20, 30]
    assert {
        "stability/drive_ratio",
        "stability/departure_messages",
        "stability/exponent_per_round",
    } <= watched[0].keys()
    assert [row["step"] for row in rows if "final/loss" in row] == [30]
    assert any((unbroken / "tensorboard").iterdir())
    card = (unbroken / "card.md").read_text()
    final = rows[-1]
    assert f"{final['final/loss']:.4f}" in card
    assert "fingerprint" in card
    checkpoints = Checkpoints(unbroken / "checkpoints", read_only=True)
    assert checkpoints.steps() == [20, 25, 30]
    assert checkpoints.newest_sound() == 30
    checkpoints.close()
    assert int(load(unbroken, 25).state.step) == 25


def test_a_finished_run_is_left_as_it_is(unbroken, tiny, capsys):
    before, state = rows_but_for_times(unbroken), final_digest(unbroken)
    assert train.run(tiny, unbroken)
    assert (rows_but_for_times(unbroken), final_digest(unbroken)) == (before, state)


def test_asked_to_stop_saves_and_goes_on_to_the_bit_and_samples_change_none(
    unbroken, tiny, tmp_path, monkeypatch, capsys
):
    stop_when_shown(monkeypatch, 12)
    assert train.run(tiny, tmp_path / "run") is False
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    assert checkpoints.steps() == [5, 10, 13]
    checkpoints.close()
    monkeypatch.undo()
    tiny.eval.sample, tiny.eval.prompt = 6, "group "
    assert train.run(tiny, tmp_path / "run") is True
    assert rows_but_for_times(tmp_path / "run") == rows_but_for_times(unbroken)
    assert final_digest(tmp_path / "run") == final_digest(unbroken)
    text = (tmp_path / "run" / "events.jsonl").read_text()
    told = {note["text"].partition(":")[0]: note for note in map(json.loads, text.splitlines())}
    assert [*told][:4] == [
        "starting from step 0",
        "asked to stop",
        "continuing from checkpoint 13 of 30",
        "sample",
    ]
    sample = load(tmp_path / "run").generate("group ", tokens=6)
    assert (told["sample"]["step"], told["sample"]["sample"]) == (30, sample)
    assert "step 30: sample\n  | group " in capsys.readouterr().out


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    unbroken, tiny, tmp_path, monkeypatch, capsys
):
    stop_when_shown(monkeypatch, 23)
    assert train.run(tiny, tmp_path / "run") is False
    monkeypatch.undo()
    home = tmp_path / "run" / "checkpoints"
    newest = 24
    data = max(
        (p for p in (home / str(newest)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 4
    data.write_bytes(flipped)
    capsys.readouterr()
    assert train.run(tiny, tmp_path / "run") is True
    said = capsys.readouterr().out
    assert f"checkpoint {newest} is skipped" in said
    assert "does not match its checksum" in said
    assert "continuing from checkpoint 20" in said
    assert rows_but_for_times(tmp_path / "run") == rows_but_for_times(unbroken)
    assert final_digest(tmp_path / "run") == final_digest(unbroken)


def test_breaking_down_stops_and_says_what_to_try(tiny, tmp_path):
    tiny.train.learning_rate = tiny.train.state_learning_rate = 1e30
    tiny.train.max_bad_steps = 4
    with pytest.raises(
        Diverged, match=r"4 updates in a row .*; rewound 0 times; .* None; .*; try a smaller"
    ):
        train.run(tiny, tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run") if row.get("train/bad_in_a_row")]
    assert [row["train/bad_in_a_row"] for row in rows] == [1, 2, 3, 4]


def test_a_passing_trouble_is_skipped_and_checkpoints_stay_those_from_before(
    tiny, tmp_path, monkeypatch
):
    make = train.make_train_step

    def troubled(*args):
        step = make(*args)

        def poisoned(state, tokens):
            unembed = jnp.where(
                (state.step >= 9) & (state.step < 12), jnp.nan, state.params["unembed"]
            )
            after, scalars = step(
                state.replace(params={**state.params, "unembed": unembed}), tokens
            )
            bad = scalars["train/bad_in_a_row"] > 0
            params = jax.tree.map(
                lambda new, old: jnp.where(bad, old, new), after.params, state.params
            )
            return after.replace(params=params), scalars

        return poisoned

    monkeypatch.setattr(train, "make_train_step", troubled)
    tiny.train.steps, tiny.checkpoint.keep = 15, 9
    assert train.run(tiny, tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows if row.get("train/bad_in_a_row")] == [10, 11, 12]
    assert rows[-1]["final/loss"] > 0
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    assert checkpoints.steps() == [5, 15], "10 fell into the trouble"
    checkpoints.close()


def test_another_configs_directory_is_refused_and_says_what_differs(unbroken, tiny):
    tiny.model.p_inter = 5
    tiny.train.learning_rate = 0.5
    with pytest.raises(UserError, match=r"model.p_inter: 3 -> 5; train.learning_rate: 0.01 -> 0.5"):
        train.run(tiny, unbroken)


def test_how_often_a_run_is_saved_or_evaluated_may_change(unbroken, tiny):
    tiny.eval.every, tiny.checkpoint.every_steps, tiny.train.log_every = 7, 9, 3
    assert train.run(tiny, unbroken)


def test_changed_text_is_refused(unbroken, tiny, tmp_path):
    original = (unbroken / "config.json").read_text()
    (tmp_path / "other.txt").write_text("other words " * 1000)
    tiny.data.path = str(tmp_path / "other.txt")
    with pytest.raises(UserError, match="text has changed since checkpoint 30"):
        train.run(tiny, unbroken)
    assert (unbroken / "config.json").read_text() == original


def test_where_its_text_lies_may_change(unbroken, tiny, tmp_path, monkeypatch):
    original = (unbroken / "config.json").read_text()
    shutil.copy(tiny.data.path, tmp_path / "moved.txt")
    monkeypatch.chdir(tmp_path)
    tiny.data.path = "moved.txt"
    try:
        assert train.run(tiny, unbroken)
        assert json.loads((unbroken / "config.json").read_text())["data"]["path"] == "moved.txt"
    finally:
        (unbroken / "config.json").write_text(original)


def test_a_directory_that_is_no_runs_is_refused(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no run"):
        train.run(tiny, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_early_is_no_obstacle(tiny, tmp_path):
    (tmp_path / ".config.json.4711").write_text("{")
    assert train.run(tiny, tmp_path)


def test_saving_by_time(tiny, tmp_path, monkeypatch):
    tiny.checkpoint.every_steps, tiny.checkpoint.every_minutes, tiny.checkpoint.keep = (
        1000,
        1e-9,
        50,
    )
    tiny.train.steps = 6
    assert train.run(tiny, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    assert checkpoints.steps() == list(range(1, 7))
    checkpoints.close()


def test_document_isolation_accumulation_and_bfloat16_in_one_run(tiny, tmp_path):
    tiny.data.isolate_documents, tiny.train.accumulation, tiny.train.compute_dtype = (
        True,
        2,
        "bfloat16",
    )
    tiny.train.optimizer, tiny.train.schedule, tiny.stability.every = "muon", "wsd", 0
    assert train.run(tiny, tmp_path / "run")
    losses = [row["train/loss"] for row in read_rows(tmp_path / "run") if "train/loss" in row]
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_its_own_code(tiny_flags, tmp_path):
    run = subprocess.Popen(
        [
            sys.executable,
            "launch.py",
            *tiny_flags,
            "--config.train.steps=100000",
            f"--workdir={tmp_path / 'run'}",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout
    for line in run.stdout:
        if line.startswith("step 20/"):
            run.send_signal(signal.SIGTERM)
            break
    rest = run.stdout.read()
    assert run.wait(60) == EXIT_CODE
    assert "is saved; the same command continues from there" in rest
    trained = load(tmp_path / "run")
    assert trained.step >= 20
    assert read_rows(tmp_path / "run")[-1]["step"] == trained.step


@pytest.mark.slow
def test_killed_at_random_ends_where_an_unbroken_run_ends(tiny_flags, tmp_path):
    """A short form of `python -m experiments.chaos`."""
    from experiments.chaos import campaign

    flags = [*tiny_flags, "--config.model.delays=taps:2"]
    assert campaign(tmp_path, flags, 1, ("kill",), 0) == {"kill": 1}


@pytest.mark.slow
def test_a_run_on_eight_devices_is_the_run_on_one(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--config.train.steps=50", "--config.checkpoint.every_steps=50"]
    flags += ["--config.eval.every=50"]
    devices = {1: "", 8: "--xla_force_host_platform_device_count=8"}
    for count, setting in devices.items():
        done = launch(*flags, f"--workdir={tmp_path / str(count)}", XLA_FLAGS=f"{setting} {QUICK}")
        assert done.returncode == 0, done.stderr
        assert f"on {count} x cpu" in done.stdout
    one, eight = (rows_but_for_times(tmp_path / str(count)) for count in devices)
    assert len(one) == len(eight) > 50
    for a, b in zip(one, eight, strict=True):
        assert a.keys() == b.keys()
        for name in ("train/loss", "eval/loss", "final/loss"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-5)
