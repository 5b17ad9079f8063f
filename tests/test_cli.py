"""The command line: help, configs by name, and mistakes, each one line that names field, value and
what would work; nothing half-written.
"""

import os
import re
import sys

import pytest
from absl import flags
from conftest import ROOT, launch, python

from ngc_jax.commands.config_flag import read_config
from ngc_jax.config import named
from ngc_jax.data.tasks import TASKS
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.runtime.errors import UserError
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
        ("--config.model.widht=3", 'Did you mean "model.width" instead of "model.widht"?'),
        (
            "--config.train.steps=1e3",
            "train.steps=1e3: must be a whole number, 1 or more, for instance 1000",
        ),
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
        ("--config=configs/nothing.py", "give a file, or one of defaults, dense_base,"),
        ("--config=ngc_tyni", "there is no config 'ngc_tyni': give a file, or one of defaults,"),
        ("--confg=ngc_tiny", "Unknown command line flag 'confg'"),
        ("config.train.steps=3", "unexpected argument 'config.train.steps=3'"),
    ],
)
def test_a_mistake_is_one_line(refused, flag, message):
    assert message in refused(flag)


@pytest.fixture
def read(monkeypatch):
    """What a command reads of these arguments, for a config file and beside flags of its own."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, arguments)])
        own = flags.FlagValues()
        flags.DEFINE_string("workdir", None, "Directory.", flag_values=own)
        return read_config("About.", own)

    return run


@pytest.mark.parametrize("given", ["ngc_tiny", "ngc_tiny.py", ROOT / "configs" / "ngc_tiny.py"])
def test_a_config_is_given_by_name_or_path_from_any_folder(given, read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config, file = read(f"--config={given}", "--config.train.steps=7", "--workdir=x")
    assert file == str(ROOT / "configs" / "ngc_tiny.py")
    expected = named("ngc_tiny")
    expected.train.steps = 7
    assert config.to_dict() == expected.to_dict()
    again, _ = read("--config.train.steps=7", "--config", given)
    assert again.to_dict() == expected.to_dict(), "in any order"


def test_fields_need_no_prefix_and_the_config_no_flag(read, monkeypatch, tmp_path):
    expected = read("--config=ngc_tiny", "--config.train.steps=7", "--config.seed=3")
    for given in (
        ["ngc_tiny", "--train.steps=7", "--seed=3", "--workdir=a.b/c"],
        ["ngc_tiny", "-train.steps", "7", "--config.seed", "3"],
        ["--train.steps=7", "--config", "ngc_tiny", "--seed", "3"],
    ):
        config, file = read(*given)
        assert (config.to_dict(), file) == (expected[0].to_dict(), expected[1])
    for given, message in (
        (["ngc_tiny", "--modle.width=3"], "there is no field 'modle.width'. Did you mean"),
        (["ngc_tyni"], "there is no config 'ngc_tyni'"),
        (["y" * 300], "there is no config 'yyyy"),
        (["ngc_tiny", "train.steps=3"], "unexpected argument 'train.steps=3'"),
    ):
        with pytest.raises(UserError, match=message):
            read(*given)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(FILE.format("int(steps)"))
    assert read("~/mine.py:9")[0].train.steps == 9


FILE = """
from ngc_jax.config import base


def get_config(steps="3"):
    config = base()
    config.train.steps = {}
    return config
"""


def test_a_config_file_may_take_an_argument_and_its_mistakes_have_a_line(read, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(FILE.format("int(steps)"))
    assert read(f"--config={mine}")[0].train.steps == 3
    config, file = read(f"--config={mine}:8")
    assert (config.train.steps, file) == (8, f"{mine}:8")
    mine.write_text(FILE.format("1e3"))
    named = f"{mine}, line 7: train.steps=1e3: must be a whole number, 1 or more, for instance 1000"
    with pytest.raises(UserError, match=named):
        read(f"--config={mine}")
    mine.write_text(FILE.format("unknown"))
    with pytest.raises(NameError):  # with its traceback
        read(f"--config={mine}")


def test_files_that_register_are_run_first(read, tmp_path, monkeypatch):
    mine = tmp_path / "mine.py"
    mine.write_text("from ngc_jax.data.tasks import TASKS\nTASKS['mine'] = TASKS['parity']\n")
    monkeypatch.setitem(TASKS, "mine", None)  # to be taken away in the end
    read(f"--extend={mine}", "--config=ngc_tiny", "--config.data.task=mine")
    assert TASKS["mine"] is TASKS["parity"]
    with pytest.raises(UserError, match=r"--extend=none.py cannot be read"):
        read("--extend=none.py", "--config=ngc_tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing: give a file, or one of defaults, dense_base"),
        (["--config=ngc_tiny", "--config.width=3"], 'Did you mean "model.width"'),
        (["--config=ngc_tiny", "--config.model.gates=maybe"], "must be True or False"),
        (["--config=ngc_tiny", "--config.train.clip_norm=x"], "must be a finite number, above 0"),
        (["--config=ngc_tiny", "--config.train.steps"], "Missing value for flag"),
        (["--config=ngc_tiny", "--config.model=3"], "flag --config.model=3: "),
    ],
)
def test_a_mistake_on_a_command_line_is_named(arguments, message, read):
    with pytest.raises(UserError, match=message):
        read(*arguments)


@pytest.mark.slow
def test_help_lists_flags_and_fields_soon_and_without_a_config(tmp_path):
    script = (
        "import sys, runpy; sys.argv = ['launch.py', '--help']\n"
        "try: runpy.run_path('launch.py', run_name='__main__')\n"
        "finally: print(sorted({'orbax', 'grain', 'flax', 'optax'} & sys.modules.keys()))\n"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    *lines, slow = done.stdout.splitlines()
    assert slow == "[]", "these take seconds to import"
    assert max(map(len, lines)) <= 100
    for flag in ("--config=NAME", "--workdir", "--extend", "--coordinator"):
        assert any(line.startswith(flag) for line in lines), flag
    for section in ("data", "model", "train", "stability"):
        assert any(line.startswith(f"{section}: ") for line in lines), section
    (width,) = (line for line in lines if line.startswith("width "))
    assert width.split()[:6] == ["width", "128", "neurons", "1", "or", "more"]


@pytest.mark.parametrize("late", ["jax", "orbax"])
@pytest.mark.parametrize("command", [["launch.py", "--config=ngc_tiny"], ["-m", "ngc_jax.sample"]])
def test_ctrl_c_during_the_imports_of_a_command_is_one_line(command, late, tmp_path):
    # A module of that name in its place is where the import is when Ctrl-C comes.
    (tmp_path / late).mkdir()
    interrupt = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / late / "__init__.py").write_text(interrupt)
    done = python(*command, f"--workdir={tmp_path / 'run'}", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 130
    assert re.fullmatch(r"error: interrupted.*\n", done.stderr)


def test_ctrl_c_is_as_usual_where_the_package_is_imported():
    script = "import signal; was = signal.getsignal(2); import ngc_jax.commands.sample; "
    done = python("-c", script + "print(signal.getsignal(2) is was)")
    assert done.stdout == "True\n", done.stderr


HELPED = """
import contextlib, io, runpy, sys
for module in sys.argv[1:]:
    sys.argv, said = [module, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            assert not ended.code, module
        else:
            raise AssertionError(f"{module} went on")
    assert len(said.getvalue()) > 40, module
"""


@pytest.mark.slow
def test_every_command_has_help_and_does_nothing_else():
    files = [
        path
        for name in ("ngc_jax", "experiments", "benchmarks")
        for path in (ROOT / name).rglob("*.py")
    ]
    named = [
        path.relative_to(ROOT).with_suffix("") for path in files if "__main__" in path.read_text()
    ]
    modules = [".".join(path.parts).replace(".commands", "") for path in named]
    done = python("-W", "ignore", "-c", HELPED, *modules)
    assert done.returncode == 0, done.stderr


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
    tiny.train.steps = 40
    claim(target, tiny, Bytes())
    before = sorted(target.rglob("*"))
    assert "train.steps: 40 -> 30" in refused(workdir=target)
    assert sorted(target.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sample", "evaluate", "inspect"])
def test_commands_refuse_a_directory_without_a_run(command, tmp_path):
    done = python("-m", f"ngc_jax.{command}", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == f"error: --workdir={tmp_path} holds no run: no config.json in it\n"
