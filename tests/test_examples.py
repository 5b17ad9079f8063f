"""What docs/ tells a user to write, done in an empty folder outside the repository."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLES = ROOT / "docs" / "examples"
TASK = ["--config.data.task=larger", "--config.data.low=1", "--config.data.high=3"]
RUN = [  # a run of four updates
    "--config=ngc_tiny",
    "--config.data.context=12",
    "--config.data.problems=200",
    "--config.data.cache_dir=cache",
    "--config.model.prelude=0",
    "--config.model.coda=0",
    "--config.train.steps=4",
    "--config.train.warmup_steps=1",
    "--config.eval.windows=8",
    "--config.eval.batch_size=8",
    "--config.checkpoint.every_steps=4",
    "--workdir=run",
]


def done(folder, *args):
    """The output of Python in a folder; it must end well."""
    ended = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def example(name, folder, lines):
    """A copy of docs/examples/NAME, which is short."""
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) <= lines
    (folder / name).write_text(text)


def blocks():
    """The Python of docs/architecture.md by the last word of its heading: {"rule": ...}."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    found = re.findall(r"^## How do I add a (\w+)\?\n(.*?)\n```python\n(.*?)```", text, re.M | re.S)
    assert all(len(code.strip().splitlines()) <= 16 for _, _, code in found)
    return {what: code for what, _, code in found}


@pytest.mark.slow
def test_a_rule_and_a_task_of_ones_own(tmp_path):
    example("own_rule.py", tmp_path, lines=20)
    example("own_task.py", tmp_path, lines=20)
    own = ["--extend=own_rule.py", "--extend=own_task.py"]
    flags = [*TASK, *own, "--config.model.rule=mine", "--config.stability.every=0"]
    assert "exact" in done(tmp_path, ROOT / "launch.py", *RUN, *flags)
    # Others read the run with both.
    solve = ["-m", "ngc_jax.solve", "--workdir=run", "--difficulties=2", "--examples=20", "--trust"]
    assert "digits of each number" in done(tmp_path, *solve, *own)


@pytest.mark.slow
def test_a_rule_a_task_a_model_and_a_probe_as_the_architecture_page_adds_them(tmp_path):
    code = blocks()
    assert set(code) == {"rule", "task", "model", "probe", "page"}
    flags = ["--config.model.rule=directions", "--config.model.kind=scaled", *TASK]
    flags += ["--config.stability.measures=size", "--config.stability.every=4"]
    for what in ("rule", "task", "model", "probe"):
        (tmp_path / f"{what}.py").write_text(code[what])
        flags.append(f"--extend={what}.py")
    assert "larger of 1 to 3 digits" in done(tmp_path, ROOT / "launch.py", *RUN, *flags)
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    # The last stream of a loop of stages with embeddings of mean square 1 is of order one.
    (size,) = [r["stability/stream_rms"] for r in rows if "stability/stream_rms" in r]
    assert 0.1 < size < 100


def test_a_page_as_the_architecture_page_adds_it(tmp_path):
    (tmp_path / "page.py").write_text(blocks()["page"])
    done(tmp_path, "page.py")
    assert "| NGC | 1.39 |" in (tmp_path / "losses.md").read_text()
    assert (tmp_path / "losses.png").exists()
    assert "<h1>A page of my own</h1>" in (tmp_path / "losses.html").read_text()


@pytest.mark.slow
def test_a_classifier_of_flax_learns_with_our_layer(tmp_path):
    example("classifier.py", tmp_path, lines=30)
    said = done(tmp_path, "classifier.py")
    # Two numbers of equal sign are no linear function of them: without a hidden layer it is 0.5.
    assert float(said.removeprefix("accuracy ")) > 0.9


@pytest.mark.parametrize(
    ("page", "shapes"),
    [
        ("README.md", {"y": (32, 16)}),
        ("docs/method.md", {"W": (384, 128), "y": (384,)}),
        ("docs/stability.md", {"blocks": (40, 2), "low": (2,)}),
    ],
)
def test_the_first_code_of_a_page_runs(page, shapes):
    code = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]
    found = {}
    exec(code, found)
    assert {name: found[name].shape for name in shapes} == shapes


@pytest.mark.slow
def test_the_notebook_is_executed_and_its_code_runs(tmp_path):
    cells = json.loads((ROOT / "docs" / "first_look.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code)
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}  # no error
    begin = 'from ngc_jax.config import named\nshort = named("ngc_tiny")\nshort.train.steps = 4\n'
    begin += "short.train.warmup_steps = short.eval.windows = 1\n"
    begin += "short.model.prelude = short.model.coda = 0\nshort.model.rounds = 1\n"
    whole = "\n".join(["".join(cell["source"]) for cell in code])
    assert whole.count('"ngc_tiny"') == 1
    (tmp_path / "notebook.py").write_text(begin + whole.replace('"ngc_tiny"', "short"))
    said = done(tmp_path, "notebook.py")
    assert "a closed channel adds" in said
    assert said.count("without group") == 4
