"""Rules of the house that a reader relies on."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT, python

PACKAGE = sorted((ROOT / "ngc_jax").rglob("*.py"))


@pytest.mark.slow
def test_tensorflow_is_never_imported(tiny_flags, tmp_path):
    # A module of that name that fails stands in its place, so that an installed TensorFlow could
    # not hide an import.
    (tmp_path / "tensorflow.py").write_text("raise SystemError('tensorflow was imported')\n")
    script = (
        "import sys; sys.argv = ['launch.py', *sys.argv[1:]]\n"
        "import runpy, atexit\n"
        "atexit.register(lambda: print('tensorflow' in sys.modules))\n"
        "runpy.run_path('launch.py', run_name='__main__')\n"
    )
    flags = [
        *tiny_flags,
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = python("-c", script, *flags, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_flax_is_imported_where_parameters_are_held_only():
    users = {p.relative_to(ROOT).as_posix() for p in PACKAGE if "flax.linen" in p.read_text()}
    assert users == {"ngc_jax/nn/layers.py"}


def test_the_mathematics_knows_nothing_of_the_rest():
    for path in (ROOT / "ngc_jax" / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith("ngc_jax")
            ):
                assert node.module.startswith("ngc_jax.core"), path


def test_files_can_be_read_in_one_sitting():
    for path in [*PACKAGE, *(ROOT / "experiments").glob("*.py")]:
        text = path.read_text()
        assert text.startswith('"""'), f"{path}: says first what it is for"
        assert len(text.splitlines()) <= 350, path
    assert len((ROOT / "launch.py").read_text().splitlines()) <= 60


def test_importing_the_package_is_quiet():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import ngc_jax, ngc_jax.training.loop"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
