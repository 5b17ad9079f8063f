"""What a command meets around it: pipes that break, closed streams, other letters, names that are
patterns, settings of the environment, a Ctrl-C while something long is compiled.
"""

import argparse
import ast
import configparser
import io
import os
import pty
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, python

from ngc_jax.commands import arguments, plot, sample
from ngc_jax.runtime import errors, files, output
from ngc_jax.runtime.checkpoint import Checkpoints, SaveFailed
from ngc_jax.runtime.errors import UserError
from ngc_jax.training import card, load, workdir

STATE = {"x": jnp.arange(4), "step": jnp.int32(3)}
BEGIN = "import os, sys; from ngc_jax.runtime import output; output.begin({goes_on}); "


def shell(line, **environment):
    """What a shell makes of a line, in which $py is this Python."""
    env = {**os.environ, "py": sys.executable, **environment}
    how = {"cwd": ROOT, "env": env, "capture_output": True, "timeout": 60}
    return subprocess.run(["bash", "-c", line], **how)


@pytest.mark.parametrize("name", ["run[1]", "a*b?", "$x {1}", "a\\b", os.fsdecode(b"\xfc")])
def test_any_name_will_do(name, tmp_path):
    with Checkpoints(tmp_path / name / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, STATE | {"step": jnp.int32(step)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3], "older ones and begun ones are removed"
    with Checkpoints(tmp_path / name / "checkpoints", read_only=True) as checkpoints:
        found, faults = checkpoints.newest(STATE)
    assert (found.step, faults, found.state["x"].tolist()) == (3, {}, [0, 1, 2, 3])


def test_what_cannot_be_opened_again_is_no_checkpoint(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "run[1]") as checkpoints:  # as Orbax saves under such a name
        monkeypatch.setattr(checkpoints, "_plainly", lambda: checkpoints.directory)
        checkpoints.save(3, STATE, {})
        with pytest.raises(SaveFailed, match="checkpoint 3 could not be saved: NOT_FOUND"):
            checkpoints.wait()
        assert checkpoints.newest_sound() is None


@pytest.mark.parametrize("to", ["| head -c 1", ">&-", "> /dev/full", "| true", ">&- 2>&-"])
def test_output_that_fails_ends_no_work(to, tmp_path):
    work = "[print('line', flush=True) for _ in range(9999)]; open('{0}', 'w').write('done')"
    script = BEGIN.format(goes_on=True) + work.format(tmp_path / "made")
    done = shell(f'set -o pipefail; $py -c "{script}" {to}')
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "made").read_text() == "done"


def test_what_a_program_of_ones_own_cannot_print_ends_no_training(monkeypatch):
    kept = io.TextIOWrapper(io.BytesIO(), "latin-1")
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), "utf-8")
    closed = io.StringIO()
    closed.close()
    for stream in (kept, full, closed, None):
        monkeypatch.setattr("sys.stdout", stream)
        with output.tolerated():
            print("\xfc \u20ac", flush=True)
        assert sys.stdout is stream
    assert kept.buffer.getvalue() == b"\xfc " + rb"\u20ac" + b"\n"
    with pytest.raises(OSError, match="No space left"):
        print("else", file=full, flush=True)


@pytest.mark.parametrize("to", ["2> /dev/full", "2>&-"])
def test_what_is_told_beside_a_result_may_fail(to):
    script = BEGIN.format(goes_on=False) + "print('told', file=sys.stderr); print('result')"
    done = shell(f'$py -c "{script}" {to}')
    assert (done.returncode, done.stdout) == (0, b"result\n")


def test_a_closed_stream_is_not_the_next_file_that_is_opened():
    script = BEGIN.format(goes_on=False) + "sys.exit(os.open('setup.cfg', os.O_RDONLY) < 3)"
    assert shell(f'$py -c "{script}" <&- >&- 2>&-').returncode == 0
    caught = "from ngc_jax.runtime.preemption import end_at_ctrl_c; end_at_ctrl_c(); "  # its pipe
    script = BEGIN.format(goes_on=False) + "print(1)"
    assert shell(f'$py -c "{caught}{script}" >&-').returncode == 0


@pytest.mark.parametrize(("to", "said"), [("> /dev/full", 1), ("| true", 0), (">&-", 0)])
def test_help_that_nobody_reads_is_one_line_at_most(to, said):
    done = shell(f"$py -m ngc_jax.sample --help {to}")
    assert done.stderr.count(b"\n") == said


def test_a_command_whose_output_is_all_ends_with_its_reader():
    script = "from ngc_jax.commands.arguments import command; command(lambda: print('x' * 10**6))"
    done = shell(f'$py -c "{script}" | true; exit ${{PIPESTATUS[0]}}')
    assert (done.returncode, done.stderr) == (1, b"")
    full = shell(f'$py -c "{script}" > /dev/full')
    assert (full.returncode, full.stderr.count(b"\n")) == (1, 1)
    assert b"No space left" in full.stderr


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, rb"\xfc \u20ac \udcfc"),
        ({"PYTHONIOENCODING": "latin-1"}, b"\xfc " + rb"\u20ac \udcfc"),
        ({"PYTHONIOENCODING": "utf-8"}, "ü € ".encode() + rb"\udcfc"),
    ],
)
def test_letters_that_a_terminal_lacks_are_escaped(environment, printed):
    script = BEGIN.format(goes_on=False) + r"print('\xfc \u20ac \udcfc')"
    assert shell(f'$py -c "{script}"', **environment).stdout == printed + b"\n"


def test_files_are_text_in_utf_8_and_paths_are_expanded_wherever_they_are():
    for path in [*(ROOT / "ngc_jax").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]:
        for call in (n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.Call)):
            method = isinstance(call.func, ast.Attribute)
            name = call.func.attr if method else getattr(call.func, "id", "")
            if (name, method) in {("write_text", True), ("read_text", True), ("open", False)}:
                told = ast.unparse(call)  # of text, or of bytes
                assert "utf-8" in told or "b'" in told, f"{path}, line {call.lineno}"
            if name == "add_argument":  # a path is as `files.expand` makes it
                told = ast.unparse(call).partition("type=")[2]
                assert not re.match(r"(pathlib\.|lambda \w+: )?Path\b(?!.*expand)", told), path


@pytest.mark.parametrize("name", [b"a b", b"it's", b"a\n\\'\xfc\xc3\xbc", b"$x `y`", b"\x1b[1m"])
def test_the_commands_of_a_card_name_any_path_on_one_line(name):
    told = card.quoted(os.fsdecode(name))
    assert told.isprintable()
    assert shell(f"printf %s {told}").stdout == name


def test_what_is_not_utf_8_in_a_name_is_escaped_in_a_text(tmp_path):
    files.write_durably(tmp_path / "card.md", os.fsdecode(b"# run\xfc"))
    assert (tmp_path / "card.md").read_bytes() == rb"# run\udcfc"


def test_a_users_path_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.fspath(files.place("~/run")) == str(tmp_path / "run")
    assert os.fspath(files.place("gs://bucket/~/run")) == "gs://bucket/~/run"
    with pytest.raises(UserError, match="is not a path here"):
        files.place("~nobody-of-this-name/run")
    monkeypatch.setattr("sys.argv", ["sample", "--workdir=~/none"])
    with pytest.raises(UserError, match=f"--workdir={tmp_path}/none holds no run"):
        sample.main()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "--temperature=nan",
            "--temperature=nan: must be a finite number, 0 or more, for instance",
        ),
        (
            "--tokens=1e5",
            "argument --tokens: '1e5': must be a whole number, 1 or more, for instanc",
        ),
        (f"--tokens={10**20}", "--tokens=1.*: must be below 2,147,483,648, for instance 200"),
        ("--workdir", "argument --workdir: expected one argument"),
    ],
)
def test_numbers_that_are_none_are_one_line(given, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sample", "--workdir=x", given])
    monkeypatch.setattr("argparse.ArgumentParser.error", argparse.ArgumentParser.error)
    with pytest.raises(SystemExit):
        arguments.command(sample.main)
    assert re.fullmatch(f"error: {told}.*\n", capsys.readouterr().err)


def test_the_environment_changes_no_dtypes():
    environment = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_DTYPE_BITS": "64", "JAX_DISABLE_JIT": "1"}
    environment |= {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    environment |= {"JAX_TRANSFER_GUARD": "disallow"}
    script = BEGIN.format(goes_on=True) + "import jax, jax.numpy as n; "
    script += "jax.config.update('jax_enable_x64', True); output.begin(); "  # as imported before
    script += "print((n.ones((1, 2)) * n.arange(2) + n.arange(2.0)).dtype)"
    done = python("-c", script, **environment)
    # "loading ..." before it, where that takes long
    assert done.stdout.splitlines()[-1:] == ["float32"], done.stderr


def test_nor_does_the_program_that_trains(monkeypatch, tmp_path, tiny):
    seen = []
    monkeypatch.setattr(load.loop, "run", lambda *_: seen.append(jnp.arange(2.0).dtype))
    with jax.enable_x64(True), pytest.raises(KeyboardInterrupt):
        load.train(tiny, tmp_path / "run")
    assert seen == [jnp.float32]


def test_what_can_change_bits_is_kept(monkeypatch):
    before = workdir.surroundings()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    with jax.default_matmul_precision("bfloat16"):
        after = workdir.surroundings()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"XLA_FLAGS", "jax_default_matmul_precision"}
    assert {"jax", "devices", "cores", "jax_default_prng_impl"} <= before.keys()


def test_devices_that_are_not_here_are_one_line():
    script = "from ngc_jax.commands.arguments import command; import jax; command(jax.devices)"
    done = python("-c", script, JAX_PLATFORMS="cuda")
    assert done.returncode == 2
    assert re.fullmatch(r"error: JAX_PLATFORMS=cuda: must name devices .*cpu.*\n", done.stderr)
    assert errors.of_machine(RuntimeError("another")) == ""


def test_a_setting_that_jax_refuses_is_one_line():
    told = r'error: the environment: Invalid value "x" for JAX flag jax_default_matmul_precision\n'
    done = python("-m", "ngc_jax.commands.ngc", "train", JAX_DEFAULT_MATMUL_PRECISION="x")
    assert done.returncode == 2
    assert re.fullmatch(told, done.stderr)


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError])
def test_memory_that_is_not_here_is_one_line(kind, capsys):
    def work():
        raise kind("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand a table")

    with pytest.raises(SystemExit):
        arguments.command(work)
    assert re.fullmatch(
        r"error: out of memory: ask for less.* 9 bytes\.\)\n", capsys.readouterr().err
    )


def test_ctrl_c_ends_what_is_not_python():
    # as XLA compiles: in C, without the lock of Python
    long = "import hashlib; print('on', flush=True); hashlib.pbkdf2_hmac('sha512', b'', b'', 10**8)"
    script = "from ngc_jax.runtime.preemption import end_at_ctrl_c; end_at_ctrl_c('told'); " + long
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", script], **pipes)
    assert process.stdout.readline() == b"on\n"
    time.sleep(0.1)
    process.send_signal(2)
    assert process.communicate(timeout=20)[1] == b"error: told\n"
    assert process.returncode == 130


def test_a_terminal_is_told_what_a_wait_is_for_and_the_log_of_a_run_once():
    command = BEGIN.format(goes_on=False).replace(
        "output.begin", "output.SILENT = 0.3; output.begin"
    )
    command += "import time\nwith output.doing('compiling'):\n    time.sleep(0.7)\n"
    command += "    output.come(1, 4)\n    time.sleep(0.7)\nprint('done')"
    script = command.replace("begin(False)", "begin(True)")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=theirs, stderr=theirs
    )
    assert process.wait(timeout=60) == 0
    shown = os.read(ours, 10_000).decode()
    assert re.search(r"\r\x1b\[Kcompiling \.\.\. [01] s", shown)
    assert re.search(r"\r\x1b\[Kcompiling \[#####-{15}\] 25% \.\.\. 1 s, [2-6] s left", shown)
    assert shown.endswith("\r\x1b[Kdone\r\n"), "what was shown is taken away"
    for one, told in ((script, "compiling ...\ndone\n"), (command, "done\n")):
        found = python("-c", one)
        assert (found.stdout, found.stderr) == (told, "")


def test_names_of_runs_are_no_mathematics(tmp_path):
    homes = [tmp_path / name for name in ("a$b$c", r"$\frac{$", "_hidden", os.fsdecode(b"\xfc"))]
    for home in homes:
        home.mkdir()
        rows = '{"step": 1, "train/loss": 2.0, "eval/loss": 2.0}\n'
        (home / "metrics.jsonl").write_text(rows, encoding="utf-8")
    plot.draw(homes, tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text("utf-8")
    for home in homes:
        name = home.name.replace("\udcfc", r"\xfc")
        assert f"<!-- held out 2.000: {name} -->" in drawn


HELPED = """
import contextlib, io, sys
from ngc_jax.commands import ngc
for name in sorted({*ngc.COMMANDS} - {"train", "collectives", "settings"}):
    sys.argv, said = ["ngc", name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        ngc.main()
    told = said.getvalue()
    assert name in ("export", "inspect") or "default: " in told, name
print(sorted({"jax", "orbax", "flax", "scipy.stats", "matplotlib.figure"} & sys.modules.keys()))
"""


def test_help_shows_defaults_and_waits_for_no_library():
    done = python("-c", HELPED)
    assert done.stdout == "[]\n", done.stderr + done.stdout


def test_a_command_without_docstrings_has_its_help():  # as under python -OO
    assert "--tokens" in arguments.parser(None, *sample.OPTIONS).format_help()


def test_a_wheel_has_every_package_configs_and_studies():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = setup["options"]["packages"].split()
    ours = {path.parent for path in (ROOT / "ngc_jax").rglob("*.py")}
    packages = {".".join(path.relative_to(ROOT).parts) for path in ours}
    shipped = {f"ngc_jax.shipped{part}" for part in ("", ".configs", ".experiments")}
    assert {*listed} == packages | shipped
    assert len(listed) == len({*listed})
