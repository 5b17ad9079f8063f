"""What may befall a run while it goes: a full disk, a signal in an evaluation, bad batches, a hang.
(Kills: chaos.)
"""

import contextlib
import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from conftest import ROOT

from experiments.chaos import outcome
from ngc_jax.data import NOTHING
from ngc_jax.runtime.checkpoint import MANIFEST, Checkpoints, SaveFailed
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import write_durably
from ngc_jax.runtime.metrics import Progress, read_rows
from ngc_jax.runtime.preemption import EXIT_CODE as STOPPED
from ngc_jax.runtime.preemption import INTERRUPTED, Preemption
from ngc_jax.runtime.watchdog import EXIT_CODE, Watchdog
from ngc_jax.training import loop as train
from ngc_jax.training import monitors as spikes
from ngc_jax.training import run as run_module
from ngc_jax.training.load import load
from ngc_jax.training.run import Diverged
from ngc_jax.training.workdir import hold, in_use


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
            assert checkpoints.newest_sound() == 1
    finally:
        disk(full=False)
    save(4)
    checkpoints.close()
    assert sorted(os.listdir(tmp_path)) == ["1", "4"]
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.newest_sound() == 4
    checkpoints.close()


def test_a_save_without_its_folder_leaves_no_thread_that_waits(tmp_path, monkeypatch):
    # As without inodes: Orbax's threads would wait five minutes, and the program for them.
    mkdir = os.mkdir

    def fails(path, *args, **kwargs):
        if "state" in os.path.basename(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        mkdir(path, *args, **kwargs)

    def threads():
        return {thread.name for thread in threading.enumerate()}

    state = {"a": jax.random.normal(jax.random.key(0), (64, 64))}
    with Checkpoints(tmp_path) as checkpoints:

        def save(step):
            checkpoints.save(step, state, {})
            checkpoints.wait()

        save(1)
        before = threads()
        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", fails)
            with pytest.raises(SaveFailed, match="No space left"):
                save(2)
        deadline = time.monotonic() + 10
        while threads() - before - {"asyncio_0"} and time.monotonic() < deadline:
            time.sleep(0.05)
        assert threads() - before <= {"asyncio_0"}  # a pool's, which ends with the program


def test_what_a_failed_save_leaves_of_coroutines_is_not_told_when_the_program_ends():
    program = """
        import asyncio
        from ngc_jax.runtime.checkpoint import quiet_failures
        quiet_failures()
        async def orbax_write():
            try:
                await asyncio.sleep(9)
            finally:
                await asyncio.sleep(9)
        async def begin():
            task = asyncio.create_task(orbax_write())
            await asyncio.sleep(0)
            return task
        loop = asyncio.new_event_loop()
        begun = [orbax_write(), loop.run_until_complete(begin()), loop.create_future()]
        begun[2].set_exception(OSError(28, "No space left on device"))
        loop.close()
        del begun[2], begun[0]
        raise SystemExit(3)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (3, "")


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
    warned, losses = load(once).state.monitor
    assert (int(warned.seen), int(losses.seen)) == (19, 19)
    brief.train.profile = "3:4"
    with at(monkeypatch, {13: stop}):
        assert train.run(brief, stopped) is False
    assert len([*stopped.glob("profile/**/*.xplane.pb")]) == 1
    brief.train.profile = ""
    assert train.run(brief, stopped)
    assert outcome(stopped) == outcome(once)


@pytest.fixture
def mounted(tmp_path):
    """A small file system of its own in memory, with these options. Skips where none may be."""
    home = tmp_path / "mounted"
    home.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", home], check=False)
        if done.returncode:
            pytest.skip("this user may not mount a file system")
        return home

    yield mount
    subprocess.run(["umount", "--lazy", home], check=False, stderr=subprocess.DEVNULL)


def ended(*line, seconds=10):
    """Runs launch.py. Returns its exit code, its lines, and fails where it lives on after them."""
    run = subprocess.Popen(
        [sys.executable, "launch.py", *map(str, line)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout
    lines, last = [], time.monotonic()
    for text in run.stdout:
        lines.append(text)
        last = time.monotonic()
    code = run.wait(60)
    assert time.monotonic() - last < seconds, lines[-3:]
    return code, lines


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=20k", "nr_inodes=9"])
def test_a_disk_without_room_is_one_line_and_the_process_ends(options, mounted, tiny_flags):
    # Nine inodes: five are taken by what a run keeps, so that no checkpoint can be made whole.
    code, lines = ended(
        *tiny_flags, "--config.train.steps=20", f"--workdir={mounted(options) / 'run'}"
    )
    assert code == 1, lines
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "No space left on device" in lines[-1]
    usual = (
        r"data: |model: |starting from |step |NOT SAVED: |error: |train.trackers: tensorboard is "
        r"|\w.* \.\.\.$"  # what is waited for
    )
    assert not [line for line in lines if not re.match(usual, line)]


def test_checkpoints_that_are_a_file_are_one_error(brief, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with at(monkeypatch, {7: stop}):
        assert train.run(brief, run) is False
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")
    before = threading.active_count()
    with pytest.raises(OSError, match="File exists"):
        train.run(brief, run)
    assert threading.active_count() <= before


def test_a_second_ctrl_c_interrupts_and_a_hangup_saves(brief, whole, tmp_path, monkeypatch):
    assert train.run(brief, whole)
    run = tmp_path / "run"
    interrupt = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    with at(monkeypatch, {7: lambda: (interrupt(), interrupt())}), pytest.raises(KeyboardInterrupt):
        train.run(brief, run)
    with at(monkeypatch, {12: lambda: signal.raise_signal(signal.SIGHUP)}):
        assert train.run(brief, run) is False
    assert load(run).step == 13
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    with Preemption() as asked:  # as under nohup
        assert signal.SIGHUP not in asked._before
    monkeypatch.undo()
    assert train.run(brief, run)
    assert outcome(run) == outcome(whole)


def test_swapped_checkpoints_and_spoilt_rows_change_no_bit(
    brief, whole, tmp_path, monkeypatch, capsys
):
    assert train.run(brief, whole)
    run = tmp_path / "run"
    with at(monkeypatch, {12: stop}):
        assert train.run(brief, run) is False
    for old, new in (("13", "x"), ("10", "13"), ("x", "10")):
        (run / "checkpoints" / old).rename(run / "checkpoints" / new)
    rows = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([*rows[:3], b"\xff\n\n", *rows[3:]]))
    capsys.readouterr()
    assert train.run(brief, run)
    said = capsys.readouterr().out
    assert "checkpoint 13 is skipped: it is checkpoint 10 under another name; moved to" in said
    assert "checkpoint 10 is skipped: it is checkpoint 13 under another name; moved to" in said
    assert "dropped 1 lines that are no rows" in said
    assert outcome(run) == outcome(whole)


@pytest.mark.slow
def test_ctrl_c_while_compiling_is_one_line(tiny_flags, tmp_path):
    run = subprocess.Popen(
        [sys.executable, "launch.py", *tiny_flags, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout
    run.stdout.readline()  # what the data are
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == INTERRUPTED
    assert said == "error: interrupted: the same command continues from the last checkpoint\n"


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_and_saves(tiny_flags, tmp_path):
    ours, theirs = os.openpty()
    run = subprocess.Popen(
        [
            sys.executable,
            "launch.py",
            *tiny_flags,
            "--config.train.steps=100000",
            f"--workdir={tmp_path / 'run'}",
        ],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    seen = b""
    while b"step 20/" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert run.wait(60) == STOPPED
    assert load(tmp_path / "run").step >= 20


def test_a_lock_says_who_holds_it_and_where_there_is_none_that_is_said(
    tmp_path, monkeypatch, capsys
):
    home = tmp_path / "run"
    named = rf"is in use by process {os.getpid()} on \S+ since 20\d\d-\d\d-\d\dT[^ ]+: wait for it"
    with hold(home):
        with pytest.raises(UserError, match=named), hold(home):
            pass
        assert in_use(home)
    assert not home.exists(), "it was empty but for the lock"
    (tmp_path / ".lock").write_text("process 1 on elsewhere since 2000-01-01T00:00:00+00:00")

    def refuse(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path):
        said = capsys.readouterr().out
    assert "cannot be locked ([Errno 37] No locks available)" in said
    assert "the last one was process 1 on elsewhere" in said


def test_a_link_in_a_work_directory_is_refused_and_none_is_written_through(
    brief, tmp_path, monkeypatch
):
    run, outside = tmp_path / "run", tmp_path / "outside"
    with at(monkeypatch, {7: stop}):
        assert train.run(brief, run) is False
    outside.mkdir()
    for name in ("damaged", "tensorboard", "hang.txt", "card.md"):
        kept = run / f"{name}.kept"
        if (run / name).exists():
            (run / name).rename(kept)
        (run / name).symlink_to(outside)
        with pytest.raises(UserError, match=f"{name} is a link, which a run does not follow"):
            train.run(brief, run)
        (run / name).unlink()
    assert not any(outside.iterdir())


def test_a_temporary_file_cannot_be_foreseen(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(os, "replace", lambda old, new: names.append(os.path.basename(old)))
    for _ in range(2):
        write_durably(tmp_path / "a.json", "1")
    assert names[0] != names[1]
    assert str(os.getpid()) not in names[0].split(".")
    monkeypatch.setattr("secrets.token_hex", lambda size: "known")
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / ".a.json.known").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "a.json", "1")
    assert (tmp_path / "precious").read_text() == "years of work"


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
