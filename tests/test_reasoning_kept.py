"""The study of what conversion leaves of reasoning: what it computes, and that a kill changes none
of it.
"""

import json
import sys

import numpy as np
import pytest
import scipy.stats

from experiments import reasoning_kept as study
from experiments import reasoning_kept_report as reported
from ngc_jax.runtime.errors import UserError

FIELDS = {
    "data.low": 1,
    "data.high": 4,
    "data.context": 8,
    "data.problems": 200,
    "train.steps": 4,
    "train.warmup_steps": 1,
    "train.batch_size": 8,
    "eval.every": 4,
    "eval.windows": 16,
    "stability.every": 0,
}
SMALL = {"model.width": 16, "model.hidden": 32, "model.heads": 2, "model.prelude": 1}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the study on one task in a folder of this name, and returns the folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(study, "TASKS", {"modular": (FIELDS, (2, 4))})
    monkeypatch.setattr(study, "COMMON", SMALL)
    monkeypatch.setattr(study, "COPIES", {"copy, answers": False})

    def call(name, *more):
        given = ["--seeds=0", "--methods=ngc", "--kept=0.5", "--heal=2", "--problems=20"]
        flags = [f"--out={tmp_path / name}", "--tokens=240", *given, *more]
        monkeypatch.setattr(sys, "argv", ["reasoning_kept", *flags])
        study.main()
        return tmp_path / name

    return call


@pytest.mark.slow
def test_a_study_that_was_killed_anywhere_reports_the_same(run, monkeypatch, capsys):
    whole = run("whole")
    capsys.readouterr()

    def killed(*given):
        if len(given) == 4:  # in the middle of a conversion
            given[2].mkdir()
        raise KeyboardInterrupt

    for name in ("convert", "formed"):  # the latter: healed, and not yet measured
        with monkeypatch.context() as patched:
            patched.setattr(study, name, killed)
            with pytest.raises(KeyboardInterrupt):
                run("killed")
    broken = run("killed")
    made = [
        line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "ETA" in line
    ]
    assert made.count("modular 0 teacher") == 1  # what was done is not done again
    assert (broken / "report.md").read_text() == (whole / "report.md").read_text()
    records = json.loads((whole / "records.json").read_text())
    assert set(records["modular 0 ngc 0.5"]["healed"]["exact"]) == {"2", "4"}
    assert set(records["modular 0 copy, answers"]) == {"healed"}
    assert not {"converted", "healed"} & {path.name for path in broken.iterdir()}
    with pytest.raises(UserError, match=r"was made with .*'heal': 2"):
        run("whole", "--heal=3")


def test_what_a_study_does_not_know_is_refused(run):
    for given, message in (
        ("--tasks=chess", "--tasks=chess: must be some of modular"),
        ("--methods=ngc,x", "--methods=ngc,x: must be some of svd"),
        ("--kept=1.0", "--kept=1.0: must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            run("none", given)


def test_rank_correlations_are_scipys_and_may_be_of_equal_cells_alone():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 40))
    cells = [str(i % 4) for i in range(40)]
    expected = scipy.stats.spearmanr(x, y).statistic
    assert reported.rank_correlation(x, y) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(reported.rank_correlation(x, np.ones(40)))
    far = 100 * np.array([int(cell) for cell in cells])  # what the cells alone explain
    assert reported.rank_correlation(x + far, y + far) > 0.8
    assert abs(reported.rank_correlation(x + far, y + far, cells)) < 0.5
