"""Studies: what is varied, which runs that makes, what is reported; and that a kill changes nothing
of it.
"""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import matplotlib.figure
import pytest
import scipy.stats
from conftest import ROOT

from experiments import compare, figures, stats
from experiments.compare import study as comparison
from experiments.protocols import PROTOCOLS, Protocol
from experiments.report import report, rows
from experiments.run import main
from experiments.study import (
    LOSS,
    Results,
    Study,
    config_of,
    find,
    groups,
    plan,
    prepared,
    read_records,
)
from experiments.sweeps import Sweep, cases, seeds, vary, zipped
from ngc_jax.config import validate
from ngc_jax.runtime.errors import UserError

MODELS = cases("model", {"NGC": {}, "NGC, p = 1": {"model.p_inter": 1}})


def test_a_sweep_is_made_by_product_chain_and_zip():
    both = MODELS * vary("train.steps", (5, 9)) * seeds(2)
    assert [one.name for one in both][:5] == [
        "NGC-steps5-seed0",
        "NGC-steps5-seed1",
        "NGC-steps9-seed0",
        "NGC-steps9-seed1",
        "NGC-p1-steps5-seed0",
    ]
    assert both[-1].fields == {"model.p_inter": 1, "train.steps": 9, "seed": 1}
    assert [one.name for one in MODELS + cases("model", {"dense": {}})] == [
        "NGC",
        "NGC-p1",
        "dense",
    ]
    assert isinstance(MODELS + MODELS, Sweep)
    pairs = zipped(MODELS, vary("seed", (3, 4)))
    assert [one.fields["seed"] for one in pairs] == [3, 4]
    with pytest.raises(ValueError, match="varied twice"):
        MODELS * MODELS
    with pytest.raises(ValueError, match="longer"):
        zipped(MODELS, seeds(3))


def test_a_study_that_cannot_be_told_apart_or_has_no_seeds_is_refused():
    with pytest.raises(UserError, match="give the study's sweep seeds"):
        groups(Study(MODELS))
    with pytest.raises(UserError, match="two variants of the study have the name a-b-seed0"):
        groups(Study(cases("x", {"a b": {}, "a-b": {"seed": 1}}) * seeds(1)))
    with pytest.raises(UserError, match="no variant has the labels"):
        groups(Study(MODELS * seeds(1), baseline={"model": "dense"}))
    with pytest.raises(UserError, match="a field that does not exist"):
        config_of(Study(MODELS), {"model.widht": 3})
    with pytest.raises(UserError, match="there is no study 'nonsense'"):
        find("nonsense")


STUDIES = [
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if "\nSTUDY = Study(" in path.read_text()
]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_asks_for_models_that_there_are_also_in_its_larger_setting(name):
    _, study, _ = find(name)
    for changes in ({}, study.larger):
        # solving sizes takes its time
        unsized = dataclasses.replace(study, changes={**changes, "model.match": ""})
        for group in groups(unsized):
            validate(config_of(unsized, group.fields))


def test_the_larger_setting_is_asked_for_by_a_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["run", *flags])
        main()

    call("worth_of_a_round", "--larger", "--dry", "--config.data.context=32")
    first = capsys.readouterr().out.splitlines()[1]
    assert "--config.train.steps=5000 " in first
    assert "--config.data.context=32 " in first
    assert f"--workdir={tmp_path}/runs/worth_of_a_round-larger/" in first
    with pytest.raises(UserError, match="--larger: settled has no larger setting"):
        call("settled", "--larger")


def runs_by(study, loss):
    """Carry out a plan in which loss(fields) is what comes of a run; the runs in order."""
    losses, made = {}, []
    while True:
        missing = [run for run in plan(study, groups(study), losses) if run.name not in losses]
        if not missing:
            return made
        losses |= {run.name: loss(run.fields) for run in missing}
        made += missing


def test_a_learning_rate_is_chosen_by_short_runs_and_looked_for_beyond_the_edge():
    study = Study(
        cases("model", {"NGC": {"rate": (0.1, 0.2)}}) * seeds(2),
        common={"train.steps": 100},
        tuning=0.3,
    )
    made = runs_by(study, lambda fields: abs(math.log(fields["train.learning_rate"] / 0.5)))
    assert [run.name for run in made] == [
        f"tune-NGC-{rate}" for rate in ("0.1", "0.2", "0.4", "0.8")
    ] + ["NGC-seed0", "NGC-seed1"]
    assert {run.fields["train.steps"] for run in made[:4]} == {30}
    assert {run.fields["seed"] for run in made[:4]} == {1000}
    assert [run.fields["train.state_learning_rate"] for run in made[4:]] == pytest.approx(
        [0.4, 0.4]
    )
    # Never more than two beyond those given, downwards too, and where everything diverges.
    assert len(runs_by(study, lambda fields: -fields["train.learning_rate"])) == 6
    downwards = runs_by(study, lambda fields: fields["train.learning_rate"])
    assert [run.fields["train.learning_rate"] for run in downwards[2:4]] == pytest.approx(
        [0.05, 0.025]
    )
    assert runs_by(study, lambda fields: math.inf)[2].fields[
        "train.learning_rate"
    ] == pytest.approx(0.05)
    # One between the others is the best: none beyond.
    three = Study(cases("model", {"NGC": {"rate": (0.25, 0.5, 1.0)}}) * seeds(1))
    assert len(runs_by(three, lambda fields: abs(fields["train.learning_rate"] - 0.5))) == 4
    # A single rate is taken, none leaves the config's.
    single = Study(cases("model", {"a": {"rate": 0.3}, "b": {}}) * seeds(1))
    assert [
        run.fields.get("train.learning_rate") for run in runs_by(single, lambda fields: 0.0)
    ] == [0.3, None]


def test_paired_differences_and_holms_correction():
    values, others = {0: 1.0, 1: 2.0, 2: 4.0, 7: 9.0}, {0: 0.5, 1: 1.9, 2: 3.0, 8: 0.0}
    found = stats.paired(values, others)
    assert found.differences == pytest.approx([0.5, 0.1, 1.0])
    assert found.p == pytest.approx(scipy.stats.ttest_rel([1, 2, 4], [0.5, 1.9, 3]).pvalue)
    assert math.isnan(stats.paired({0: 1.0}, others).p)
    assert stats.paired({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).p == 1
    # 0.01 x 3, 0.02 x 2, 0.03 x 1 but not below the one before; 0.5 x 3 is at most 1.
    assert stats.adjusted({"a": 0.02, "b": 0.01, "c": 0.03, "d": math.nan}) == pytest.approx(
        {"a": 0.04, "b": 0.03, "c": 0.04, "d": math.nan}, nan_ok=True
    )
    assert stats.adjusted({"a": 0.5, "b": 0.6}) == {"a": 1, "b": 1}


def made_up(home, study, losses, curves=None):
    """Results of runs that never were; their losses and loss curves by name."""
    study = prepared(study, home)
    records = {
        name: {
            "fields": {
                "train.learning_rate": 0.01,
                "seed": 1000 if name.startswith("tune") else int(name[-1]),
            },
            "command": f"python launch.py --workdir={home / name}",
            "commit": "abc",
            "versions": {"jax": "1"},
            "data": "text",
            "measures": {} if loss is None else {LOSS: loss},
            "curve": (curves or {}).get(name, []),
            "error": "" if loss is not None else "exit code 1: out of memory",
        }
        for name, loss in losses.items()
    }
    return Results(study, home, groups(study), records)


def test_a_studys_folder_names_no_place_and_what_is_no_record_is_named(tmp_path):
    study = find("parity")[1]
    place = "--config.data.path=/etc/passwd"
    prepared(study, tmp_path / "typed", [place])
    assert prepared(study, tmp_path / "typed", [place]).changes == {"data.path": "/etc/passwd"}
    said = r"names places, data.path='/etc/passwd', which are not read"
    with pytest.raises(UserError, match=said):
        prepared(study, tmp_path / "typed")
    for text in ("", "3", "[" * 10**5, '{"a b": 1}', "[1]"):
        (tmp_path / "typed" / "changes.json").write_text(text)
        with pytest.raises(UserError, match=r"changes.json cannot be read"):
            prepared(study, tmp_path / "typed")
    record = {"fields": {}, "measures": {LOSS: 1.0}, "curve": [], "error": ""}
    path = tmp_path / "typed" / "records" / "one.json"
    path.write_text(json.dumps(record))
    assert read_records(tmp_path / "typed") == {"one": record}
    spoilt = [{**record, name: wrong} for name in record for wrong in (None, 3)]
    for wrong in ({}, {**record, "measures": {LOSS: "low"}}, *spoilt, 3):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"one.json cannot be read"):
            read_records(tmp_path / "typed")


def test_a_report_compares_with_the_baseline_and_drops_no_run(tmp_path):
    study = comparison(PROTOCOLS["smoke"], ["NGC"], 4)
    losses = {"NGC-0.25-seed0": 1.5, "NGC-0.25-seed1": 1.7, "NGC-0.25-seed2": None}
    page = report(
        made_up(tmp_path, study, losses), "Title\n\nWords\n<of> it.\n\n    python x\n"
    ).read_text()
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Title\n\nWords \\<of> it.\n\n    python x\n")
    assert "<h1>Title</h1>" in page
    assert "Words &lt;of&gt; it." in page
    assert re.search(r"\| NGC \| 0.25 \| 1.6000 ± 1.2706 \| 2 \| 2\d\d,\d{3} \|", text)
    assert "| NGC-0.25-seed2 | exit code 1: out of memory |" in text
    assert "| NGC-0.25-seed3 | not run yet |" in text
    assert f"python launch.py --workdir={tmp_path}" not in text
    assert "python launch.py --workdir=DIR/NGC-0.25-seed0" in text
    assert (tmp_path / "rows.csv").read_text().splitlines()[:2] == [
        f"run,model,size,seed,learning rate,{LOSS},error",
        "NGC-0.25-seed0,NGC,0.25,0,0.01,1.5,",
    ]

    home = tmp_path / "paired"
    study = Study(MODELS * seeds(2), config="ngc_tiny", baseline={"model": "NGC"})
    report(
        made_up(
            home,
            study,
            {"NGC-seed0": 1.0, "NGC-seed1": 2.0, "NGC-p1-seed0": 1.1, "NGC-p1-seed1": 2.3},
        ),
        "T",
    )
    assert (
        "| NGC, p = 1 | 1.7000 ± 7.6237 | 0.2000 ± 1.2706 | 0.295 |"
        in (home / "report.md").read_text()
    )
    assert (home / "pareto.png").stat().st_size > 5000
    assert not (home / "curves.png").exists()  # of runs that have no rows


def drawn(make, results, monkeypatch):
    """The axes of a figure of a report, after it was drawn."""
    canvases = []

    def figure(name, caption, draw, height=4.0, width=7.0):
        canvases.append(matplotlib.figure.Figure((width, height), layout="constrained"))
        draw(canvases[0])
        return name

    monkeypatch.setattr(figures, "figure", figure)
    assert make(results) == make.__name__
    return canvases[0].axes


def test_a_figure_shows_no_cost_that_does_not_vary(tmp_path):
    def pareto(sweep):
        study = Study(sweep * seeds(1), config="ngc_tiny")
        names = [group.run(0) for group in groups(study)]
        return figures.pareto(made_up(tmp_path / names[0], study, dict.fromkeys(names, 1.0)))

    assert pareto(cases("rate", {"low": {}, "high": {"train.learning_rate": 0.1}})) is None
    found = pareto(cases("size", {"small": {}, "large": {"model.hidden": 192}}))
    assert [*found.files] == ["pareto.png"]
    assert "parameters in matrices (above), FLOPs per token (below)" in found.markdown


@pytest.mark.parametrize(("kinds", "sizes"), [(3, 2), (12, 1)])
def test_a_group_looks_the_same_in_all_figures_of_a_report(tmp_path, monkeypatch, kinds, sizes):
    models = cases("model", {f"m{i}": {"model.hidden": 64 * (i + 1)} for i in range(kinds)})
    study = Study(models * vary("model.p_inter", range(1, sizes + 1), "p") * seeds(2), "ngc_tiny")
    names = [group.run(seed) for group in groups(study) for seed in (0, 1)]
    losses = {name: 1 + place / 10 for place, name in enumerate(names)}
    curves = {name: [[1, 2.0], [2, 1.5], [3, loss]] for name, loss in losses.items()}
    results = made_up(tmp_path, study, losses, curves)
    style = {
        group.title: (look["color"], look["marker"])
        for group, look in zip(results.groups, figures.looks(results).values(), strict=True)
    }
    assert len(set(style.values())) == kinds * sizes
    (axes,) = drawn(figures.curves, results, monkeypatch)
    lines = {line.get_label(): (line.get_color(), line.get_marker()) for line in axes.lines}
    assert lines.items() <= style.items()
    assert len(lines) == min(kinds * sizes, figures.MOST)
    panel = drawn(figures.pareto, results, monkeypatch)[0]
    points = [line for line in panel.lines if len(line.get_xdata()) == 1]
    for group, cost in zip(results.groups, results.costs, strict=True):
        at = cost.matrices, pytest.approx(sum(results.of(group, LOSS).values()) / 2)
        (point,) = [one for one in points if (one.get_xdata()[0], one.get_ydata()[0]) == at]
        assert (point.get_color(), point.get_marker()) == style[group.title]


def test_figures_name_their_axes(tmp_path, monkeypatch):
    models = vary("model.p_inter", (1, 2, 3)) * vary("model.rounds", (1, 2, 3))
    study = Study(models * seeds(1), "ngc_tiny")
    names = [group.run(0) for group in groups(study)]
    curves = {name: [[1, 2.0], [2, 1.0]] for name in names}
    results = made_up(tmp_path, study, dict.fromkeys(names, 1.0), curves)
    of = {
        make.__name__: [
            (axes.get_xlabel(), axes.get_ylabel()) for axes in drawn(make, results, monkeypatch)
        ]
        for make in (figures.curves, figures.pareto, figures.heat_map)
    }
    assert of["curves"] == [("updates", LOSS)]
    assert of["pareto"] == [("parameters in matrices", LOSS), ("FLOPs per token", LOSS)]
    assert of["heat_map"] == [("rounds", "p_inter"), ("", LOSS)]  # the map, the bar of colours


def test_a_small_p_is_not_printed_as_zero():
    assert [stats.p_value(p) for p in (0.2955, 0.001, 0.0004, 0.0, math.nan)] == [
        "0.295",
        "0.001",
        "< 0.001",
        "< 0.001",
        "",
    ]


def test_each_column_of_a_report_is_explained_and_a_phone_shows_that_it_scrolls(tmp_path):
    protocol = dataclasses.replace(PROTOCOLS["smoke"], measured=True)
    study = comparison(protocol, ["NGC", "dense"], 1)
    measured = [{"peak memory (MiB)": "1", "update time (dense_small = 1)": "2"}] * 2
    study = dataclasses.replace(study, costs=lambda configs: measured)
    losses = {"NGC-0.25-seed0": 1.5, "dense-0.25-seed0": 1.7}
    page = report(made_up(tmp_path, study, losses), "Title").read_text()
    lines = (tmp_path / "report.md").read_text().splitlines()
    head = next(line for line in lines if LOSS in line).strip("| ").split(" | ")
    meanings = lines[lines.index("| column | meaning |") :]
    explained = {line.split(" | ")[0].strip("| ") for line in meanings[: meanings.index("")]}
    assert set(head) - explained == {"model", LOSS}
    assert f"Scroll this table sideways: {len(head)} columns." in page


def test_rows_have_factors_seeds_and_learning_rates_of_trials_too(tmp_path):
    study = Study(MODELS * vary("model.rounds", (1, 2)) * seeds(1), "ngc_tiny")
    losses = {"NGC-p1-rounds2-seed0": 1.0, "tune-NGC-rounds1-0.01": 2.0, "other-seed0": 3.0}
    results = made_up(tmp_path, study, losses)
    assert rows(results).splitlines() == [
        f"run,model,rounds,seed,learning rate,{LOSS},error",
        'NGC-p1-rounds2-seed0,"NGC, p = 1",rounds = 2,0,0.01,1.0,',
        "tune-NGC-rounds1-0.01,NGC,rounds = 1,1000,0.01,2.0,",
        "other-seed0,,,0,0.01,3.0,",
    ]


def test_a_comparison_sets_each_model_beside_dense_of_its_share_and_ngc_beside_the_largest(
    tmp_path,
):
    protocol = Protocol({}, shares={"0.25": (), "0.5": ("dense",)}, measured=False)
    study = comparison(protocol, ["NGC", "dense"], 2)
    losses = {
        f"{model}-seed{seed}": 1.0 + seed for model in ("NGC-0.25", "dense-0.5") for seed in (0, 1)
    }
    losses |= {"NGC-0.25-seed1": 2.2, "dense-0.25-seed0": 1.5, "dense-0.25-seed1": 2.5}
    report(made_up(tmp_path, study, losses), "Title")
    text = (tmp_path / "report.md").read_text()
    assert "| NGC | 0.25 | 1.6000 ± 7.6237 | -0.4000 ± 1.2706 | 0.156 | 2 |" in text
    assert "the largest dense model, with 42" in text
    assert re.search(r"\| NGC \| 0.25 \| 2\d\d,\d{3} \| 1.0500 ± 0.6353 \|", text)


def test_a_study_under_way_is_reported_when_asked(tmp_path, monkeypatch, capsys):
    line = [
        "compare",
        "--protocol=smoke",
        "--models=NGC;dense",
        "--report",
        f"--workdir={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", line)
    compare.main()
    assert capsys.readouterr().out.strip() == f"{tmp_path}/report.html"
    assert "| dense-0.25-seed2 | not run yet |" in (tmp_path / "report.md").read_text()


def example():
    """The study that experiments/README.md shows."""
    return re.search(
        r"```python\n(.*?)```", (ROOT / "experiments" / "README.md").read_text(), re.DOTALL
    )[1]


@pytest.mark.slow
def test_a_study_of_ones_own_killed_twice_has_the_report_of_an_unbroken_one(tiny_flags, tmp_path):
    source = example()
    assert len(source.strip().splitlines()) <= 30
    file = tmp_path / "mine.py"
    file.write_text(source)
    changes = [flag for flag in tiny_flags if flag.startswith("--config.")]

    def start(home):
        line = [
            sys.executable,
            "-m",
            "experiments.run",
            str(file),
            f"--workdir={home}",
            "--jobs=1",
            *changes,
        ]
        return subprocess.Popen(
            line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    chance = random.Random(0)
    for kill in (os.kill, os.killpg):  # the first leaves a trainer behind
        process = start(tmp_path / "killed")
        time.sleep(chance.uniform(4, 12))
        kill(process.pid, signal.SIGKILL)
        process.communicate()
    for home in ("unbroken", "killed", "killed"):
        out, _ = (process := start(tmp_path / home)).communicate(timeout=300)
        assert process.returncode == 0, out.decode()
        shutil.rmtree(tmp_path / home / "port2-seed0", ignore_errors=True)  # records are enough
    names = ["report.md", "report.html", "rows.csv", "curves.png", "pareto.png"]
    unbroken, killed = (
        [(tmp_path / home / name).read_bytes() for name in names] for home in ("unbroken", "killed")
    )
    assert unbroken == killed
    record = json.loads((tmp_path / "killed" / "records" / "port2-seed0.json").read_text())
    assert record["commit"]
    assert record["data"].startswith("text: ")
