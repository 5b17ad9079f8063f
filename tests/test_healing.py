"""The study of healing: what its report says of records, and that it makes them."""

import argparse
import json
import sys

import numpy as np
import pytest

from experiments import healing as study


def test_the_report_says_what_is_above_the_copy_with_the_same_aim():
    draw = np.random.default_rng(0)
    made = {"teacher": 1.0, "ngc 0.5": 1.5, "copy text 0.1": 0.9, "copy text 0.2": 0.8}
    made |= {"ngc 0.5 text 0.2": 1.1}
    records = {
        f"{seed} {kind}": {"a": (mean + 0.01 * seed + draw.normal(0, 1e-9, 4)).tolist()}
        for seed in (0, 1)
        for kind, mean in made.items()
        if seed == 0 or kind != "copy text 0.1"  # a rate that only the first seed tries
    }
    args = argparse.Namespace(seeds=[0, 1], rates=["0.1", "0.2"])
    rows = [line.split(" | ") for line in study.report(records, args).splitlines()[2:]]
    found = {row[0].removeprefix("| "): [cell.split(" ")[0] for cell in row[1:]] for row in rows}
    assert found["ngc 0.5"][0] == "0.500"
    assert found["ngc 0.5 text 0.2"] == ["0.100", "0.300"]  # of the copy's better rate
    assert found["copy text 0.2"][0] == "-0.200"


@pytest.mark.slow
def test_a_study_of_healing_has_all_records_and_a_report(tiny, tmp_path, monkeypatch):
    tiny.model.update({"rule": "dense", "prelude": 1, "core": 0, "coda": 0, "groups": 1})
    tiny.train.update({"steps": 4, "warmup_steps": 1})
    tiny.eval.every = tiny.checkpoint.every_steps = 4
    tiny.stability.every = 0
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(study, "named", lambda name: tiny.copy_and_resolve_references())

    def run(name):
        given = ["--teacher=dense", "--aims=text", "--kept=0.5", "--updates=2", "--rates=1e-3"]
        given += ["--tokens=400", "--windows=4", f"--out={tmp_path / name}"]
        monkeypatch.setattr(sys, "argv", ["healing", *given])
        study.main()
        return (tmp_path / name / "report.md").read_text()

    report = run("study")
    records = json.loads((tmp_path / "study" / "records.json").read_text())
    assert {"0 teacher", "0 ngc 0.5", "0 ngc 0.5 text 1e-3", "0 copy text 1e-3"} == {*records}
    assert "ngc 0.5 text 1e-3" in report
    assert np.mean(records["0 ngc 0.5"]["held out"]) > np.mean(records["0 teacher"]["held out"])
