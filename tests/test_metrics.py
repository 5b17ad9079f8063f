"""Rows on disk: up to the step a run continues from, whole lines only, also for TensorBoard."""

import json
import math

import pytest

from ngc_jax.runtime.metrics import Clock, Metrics, Progress, duration, read_rows
from ngc_jax.training.costs import peak


def write(workdir, start, rows):
    metrics = Metrics(workdir, start)
    for row in rows:
        metrics.write(row)
    metrics.close()


def test_going_on_drops_later_rows_and_doubles_none(tmp_path):
    write(tmp_path, 0, [{"step": s, "train/loss": float(s)} for s in range(1, 8)])
    write(tmp_path, 4, [{"step": s, "train/loss": float(s)} for s in range(5, 8)])
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    write(tmp_path, 0, [{"step": 1}])
    assert read_rows(tmp_path) == [{"step": 1}]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "train/lo')
    assert read_rows(tmp_path) == [{"step": 1}]
    write(tmp_path, 1, [{"step": 2}])
    assert read_rows(tmp_path) == [{"step": 1}, {"step": 2}]


def test_what_is_not_finite_is_null(tmp_path):
    write(tmp_path, 0, [{"step": 1, "train/loss": math.nan, "train/grad_norm": math.inf}])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "train/loss": None,
        "train/grad_norm": None,
    }


def test_tensorboard_shows_the_same_rows(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, [{"step": s, "train/loss": s / 2} for s in (1, 2, 3)])
    write(tmp_path, 2, [{"step": 3, "train/loss": 9.0}])
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 9.0),
    ]


def test_the_clock_leaves_out_what_is_not_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(before=50.0)
    clock.start(0)
    now[0] += 4
    with clock:
        now[0] += 1000
    now[0] += 2
    assert clock.lap(3) == pytest.approx(2)
    assert clock.seconds() == pytest.approx(56)
    now[0] += 1
    assert clock.lap(4) == pytest.approx(1)


def test_plain_lines_where_there_is_no_terminal(capsys):
    speed = {"tokens_per_second": 12345.6}
    Progress(steps=100).show(step=40, loss=1.5, speed=speed, seconds_per_step=2.0)
    assert capsys.readouterr().out == "step 40/100  loss 1.5000  12,346 tokens/s  ETA 2:00\n"
    Progress(steps=100).show(
        step=40, loss=1.5, speed={**speed, "mfu": 0.4321}, seconds_per_step=2.0
    )
    assert (
        capsys.readouterr().out
        == "step 40/100  loss 1.5000  12,346 tokens/s  MFU 43.2%  ETA 2:00\n"
    )


def test_a_peak_is_that_of_the_kind_of_device_and_of_bfloat16():
    known = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "cpu": None,
    }
    assert {kind: peak("bfloat16", kind) for kind in known} == known
    assert peak("float32", "NVIDIA H100 80GB HBM3") is None


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (125, "2:05"), (3725, "1:02:05")])
def test_durations(seconds, shown):
    assert duration(seconds) == shown
