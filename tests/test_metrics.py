"""Rows on disk: up to the step a run continues from, whole lines only, also for TensorBoard."""

import errno
import io
import json
import math
import os
import sys
import types

import pytest

from ngc_jax.count import peak
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import Clock, Metrics, Progress, amount, duration, read_rows
from ngc_jax.runtime.trackers import TRACKERS, listed


def write(workdir, start, rows, trackers=""):
    metrics = Metrics(workdir, start, trackers=trackers)
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


ROWS = [{"step": s, "train/loss": s / 8} for s in range(1, 7)]
JUNK = {
    "a blank line": b"\n",
    "zeros": b"\0\0\0\n",
    "garbage": b"%$?\n",
    "half a row": b'{"step": 3, "train/lo\n',
    "invalid UTF-8": b'{"step": 3, "\xff": 1}\n',
    "no step": b'{"train/loss": 1.0}\n',
    "no number": b'{"step": 3, "train/loss": "low"}\n',
    "a list": b"[3]\n",
    "brackets": b"[" * 100_000 + b"\n",
    "a step beyond all": b'{"step": 1%s}\n' % (b"0" * 400),
}


def spoil(workdir, line, junk):
    """Puts this before a line of the file, counted from 1."""
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines.insert(line - 1, junk)
    (workdir / "metrics.jsonl").write_bytes(b"".join(lines))


def counted(workdir, start):
    """What a checkpoint of `start` keeps of the rows up to it."""
    metrics = Metrics(workdir, start)
    said = metrics.written()
    metrics.close()
    return said["rows"], said["rows_sha256"]


@pytest.fixture
def six(tmp_path):
    write(tmp_path, 0, ROWS)
    return tmp_path


@pytest.mark.parametrize("kind", JUNK)
def test_what_is_no_row_is_mended_where_no_row_is_lost(six, kind, capsys):
    seal = counted(six, 4)
    write(six, 4, ROWS[4:])
    spoil(six, 3, JUNK[kind])
    assert read_rows(six) == ROWS
    Metrics(six, 4, *seal).close()
    assert read_rows(six) == ROWS[:4]
    assert ("dropped 1 lines that are no rows, from 3 on" in capsys.readouterr().out) == (
        kind not in ("a blank line", "zeros")
    )


@pytest.mark.parametrize("kind", JUNK)
def test_what_is_no_row_is_in_nobodys_way_after_the_checkpoint(six, kind):
    spoil(six, 6, JUNK[kind])
    Metrics(six, 4).close()  # of an old checkpoint, which has not counted its rows
    assert read_rows(six) == ROWS[:4]


def test_zeros_before_a_row_are_mended(six):
    spoil(six, 3, b"\0" * 4096)
    assert read_rows(six) == ROWS


def test_rows_that_are_lost_and_not_made_again_are_refused_and_left_alone(six):
    seal = counted(six, 4)
    path = six / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    for left, said in (
        ([*lines[:1], *lines[2:]], "of the 4 rows up to checkpoint 4, 3 are there, not all"),
        ([lines[0], b"?\n", *lines[2:]], "3 are there, line 2 is no row"),
        ([lines[1], lines[0], *lines[2:]], "not all as they were"),
        ([*lines[:3], lines[3].replace(b"0.5", b"0.6")], "not all as they were"),
        ([], "0 are there"),
    ):
        path.write_bytes(b"".join(left))
        with pytest.raises(UserError, match=said):
            Metrics(six, 4, *seal)
        assert path.read_bytes() == b"".join(left)
    path.write_bytes(b"".join([lines[0], b"?\n", *lines[2:]]))
    with pytest.raises(UserError, match="line 2 is no row, and they cannot be made again"):
        Metrics(six, 4)  # also where the checkpoint has not counted its rows


def test_a_row_after_those_that_a_checkpoint_counted_is_kept(six):
    seal = counted(six, 4)
    late = {"step": 4, "eval/loss": 1.0}  # of an evaluation that was abandoned before the save
    write(six, 4, [late, {"step": 5}])
    Metrics(six, 4, *seal).close()
    assert read_rows(six) == [*ROWS[:4], late]


def test_rows_that_were_moved_away_are_said_to_be_missing(six, capsys):
    seal = counted(six, 4)
    (six / "metrics.jsonl").unlink()
    Metrics(six, 4, *seal).close()
    assert "the 4 rows up to step 4 are missing" in capsys.readouterr().out


def test_a_file_of_rows_that_is_no_file_is_refused_and_links_are_not_followed(six):
    path, other = six / "metrics.jsonl", six / "other"
    path.rename(other)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
        make(path)
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be read"):
            Metrics(six, 4)
        path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
    path.symlink_to(other)
    before = other.read_bytes()
    write(six, 0, ROWS[:1])
    assert other.read_bytes() == before
    assert read_rows(six) == ROWS[:1]


def test_a_lost_terminal_is_no_error(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sys.stdout", Gone())
    progress = Progress(steps=2)
    progress.say("one")
    progress.show(1, 1.0, {"tokens_per_second": 1.0}, 1.0)
    sys.stdout.close()


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

    write(tmp_path, 0, [{"step": s, "train/loss": s / 2} for s in (1, 2, 3)], "tensorboard")
    write(tmp_path, 2, [{"step": 3, "train/loss": 9.0}], "tensorboard")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 9.0),
    ]


class Recorder:
    """What a library of others keeps of a run: every row that it was given since it was opened."""

    def __init__(self, home):
        self.rows = SHOWN[home] = []

    def log(self, row):
        self.rows.append(row)

    def close(self):
        self.rows.append("closed")


SHOWN = {}


def test_a_tracker_of_ones_own_gets_each_row_once_when_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "mine", Recorder)
    write(tmp_path, 0, ROWS, "mine")
    assert SHOWN[tmp_path] == [*ROWS, "closed"]
    again = [{**ROWS[4], "train/loss": math.nan}, ROWS[5]]
    write(tmp_path, 4, again, "mine")  # killed after row 6, goes on from checkpoint 4
    assert SHOWN[tmp_path] == [*ROWS[:4], {"step": 5, "train/loss": None}, ROWS[5], "closed"]
    assert read_rows(tmp_path) == SHOWN[tmp_path][:-1]


@pytest.mark.parametrize("when", ["__init__", "log", "close"])
def test_a_tracker_that_raises_is_said_once_and_ends_nothing(tmp_path, monkeypatch, capsys, when):
    def fail(*_):
        raise RuntimeError("the server\nis gone")

    class Broken(Recorder):
        pass

    setattr(Broken, when, fail)
    monkeypatch.setitem(TRACKERS, "broken", Broken)
    monkeypatch.setitem(TRACKERS, "mine", Recorder)
    write(tmp_path, 0, ROWS, "broken,mine")
    assert SHOWN[tmp_path] == [*ROWS, "closed"]
    assert read_rows(tmp_path) == ROWS
    told = "train.trackers: broken is left out (the server is gone); metrics.jsonl has all rows\n"
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_said_once(tmp_path, monkeypatch, capsys, name):
    for module in ("tensorboard.compat.proto.event_pb2", "trackio", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    write(tmp_path, 0, ROWS, name)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"pip install 'ngc_jax[{name}]'" in said
    assert read_rows(tmp_path) == ROWS


def test_an_unknown_tracker_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"trackers='wandb,tb': 'tb' is none: must be some of"):
        listed("wandb,tb")
    assert listed("") == []


# Of the interfaces of wandb 0.31 and trackio 0.43 what we call; the packages are not required.
STAND_INS = {
    "wandb": """
import json, os, pathlib
Settings = dict
def init(id, dir, mode, resume, **more):
    sent = pathlib.Path(dir) / "server.json"  # what their server has
    run = Run()
    run.kept = json.loads(sent.read_text()) if mode == "online" and sent.exists() else []
    run.step = run.kept[-1][0] + 1 if run.kept else 0
    run.home = sent
    if mode == "offline":
        count = len(list(pathlib.Path(dir).glob("wandb/*")))
        run.home = pathlib.Path(dir) / "wandb" / f"offline-run-{count}-{id}" / "rows.json"
        run.home.parent.mkdir(parents=True)
    return run
class Run:
    def log(self, row, step):
        self.kept.append([step, row])
    def finish(self):
        self.home.write_text(json.dumps(self.kept))
""",
    "trackio": """
kept = {}  # run -> rows
class Old:
    def __init__(self, name): self.name = name
    def delete(self): del kept[self.name]
class Api:
    def runs(self, project):
        if not kept: raise ValueError("no such project")
        return iter([Old(name) for name in kept])
def init(project, name, config, **more):
    assert config == {"seed": 0}
    run = Run()
    run.rows = kept.setdefault(name, [])
    return run
class Run:
    def log(self, row, step): self.rows.append([step, row])
    def finish(self): pass
""",
}


@pytest.mark.parametrize("kind", ["offline", "online", "trackio"])
def test_a_run_that_goes_on_is_one_run_of_its_tracker(tmp_path, monkeypatch, kind):
    name = "trackio" if kind == "trackio" else "wandb"
    monkeypatch.setenv("WANDB_MODE", kind)
    module = types.ModuleType(name)
    exec(STAND_INS[name], module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "config.json").write_text('{"seed": 0}')
    write(tmp_path, 0, [*ROWS, {"step": 6, "eval/loss": 1.0}], name)
    write(tmp_path, 4, [*ROWS[4:], {"step": 6, "eval/loss": 1.0}, {"step": 7, "x": None}], name)
    wanted = [[s, {"train/loss": s / 8}] for s in range(1, 7)] + [[6, {"eval/loss": 1.0}], [7, {}]]
    if name == "trackio":
        (rows,) = module.kept.values()
    else:
        pattern = "server.json" if kind == "online" else "wandb/offline-run-*/rows.json"
        (file,) = tmp_path.glob(pattern)
        rows = json.loads(file.read_text())
    assert rows == wanted


def test_the_clock_leaves_out_what_is_not_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(before=50.0)
    clock.lap(0)
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


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (768, "768 B"), (999.6, "1.0 kB"), (9.37e6, "9.37 MB"), (2.5e12, "2.50 TB")],
)
def test_sizes_are_in_a_unit_that_says_something(count, said):
    assert amount(count, "B") == said
