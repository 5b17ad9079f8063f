"""What the studies compute from their runs, on made-up runs whose answer is known."""

import numpy as np
import pytest
from conftest import ROOT

from experiments import compare, early_warning, rich_or_lazy, rule_pictures, settled, stats
from ngc_jax import RULES, budget


def falling(steps=300):
    return 2 + 3 * np.exp(-np.arange(steps) / 50)


def test_a_run_diverges_when_its_smoothed_loss_has_risen():
    loss = falling()
    assert early_warning.diverges(loss) is None
    assert early_warning.diverges(loss + 0.1 * np.random.default_rng(0).normal(size=300)) is None
    loss[200:] += 1
    assert 200 <= early_warning.diverges(loss) <= 212
    loss[150] = np.nan
    assert early_warning.diverges(loss) == 150


def test_auroc_counts_pairs():
    assert stats.auroc([3, 4], [1, 2]) == 1
    assert stats.auroc([1], [1]) == 0.5
    assert stats.auroc([0, 2], [1]) == 0.5
    assert stats.auroc(np.array([0, 2]), np.array([1])) == 0.5


def test_a_statistic_that_knows_is_told_from_one_that_does_not():
    runs = []
    for i in range(40):
        loss, signal = falling(), np.zeros(300)
        if i % 2:
            loss[200:] += 1
            signal[120:] = 1
        runs.append({"train/loss": loss, "signal": signal, "noise": np.random.default_rng(i).normal(size=300)})
    knows = early_warning.judge(runs, lambda run: run["signal"], 0.5)
    assert knows["auroc"] == 1
    assert knows["false"] == 0
    assert 80 <= knows["lead"] <= 92
    assert early_warning.judge(runs, lambda run: run["noise"], None)["auroc"] < 0.8


def test_the_sums_are_right_and_the_two_sides_share_none():
    train, held_out = settled.sums(2000, settled.TRAINED, 0, False), settled.sums(500, settled.ASKED, 1, True)
    assert not set(train) & set(held_out)
    for line in held_out:
        asked, answer = line.split("=")
        assert sum(map(int, asked)) % settled.MODULUS == int(answer)
        assert len(asked) in settled.ASKED


def test_difficulty_is_held_fixed():
    """Longer sums are wrong more often and less settled; within a length there is nothing to see."""
    noise = np.random.default_rng(0)
    terms = np.repeat([3, 6], 2000)
    right = noise.uniform(size=4000) < np.where(terms == 3, 0.9, 0.1)
    found = {"terms": terms, "right": right, "last step": terms + noise.normal(size=4000)}
    assert stats.auroc(found["last step"][~right], found["last step"][right]) > 0.8
    assert settled.within_difficulty(found, "last step") == pytest.approx(0.5, abs=0.05)


def test_each_rule_has_its_section_and_its_picture(tmp_path):
    text = (ROOT / "docs" / "method.md").read_text()
    for rule in RULES:
        assert f"\n## {rule}\n" in text
        assert f"(rules/{rule}.png)" in text
        assert 10_000 < (ROOT / "docs" / "rules" / f"{rule}.png").stat().st_size < 60_000
    rule_pictures.draw("broadcast", tmp_path / "broadcast.png")
    assert (tmp_path / "broadcast.png").read_bytes()[:4] == b"\x89PNG"


def test_the_comparison_reports_each_model_with_its_cost(tmp_path):
    protocol = compare.PROTOCOLS["smoke"]
    found = compare.entries(protocol, ["NGC", "BDH"])
    for entry in found:
        entry.rate, entry.losses, entry.pace = 0.01, [1.5, 1.7], 2.0
    text = compare.report(tmp_path, "smoke", found, seeds=2)
    assert "| 0.25 | NGC | 1.6000 ± 1.2706 |" in text
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert [row.split(",")[:4] for row in rows[1:3]] == [
        ["NGC", "0.25", "0", "1.500000"],
        ["NGC", "0.25", "1", "1.700000"],
    ]
    assert (tmp_path / "pareto.png").stat().st_size > 5000


def test_a_comparison_solves_the_share_for_each_model():
    (entry,) = compare.entries(compare.PROTOCOLS["smoke"], ["Basis Sharing"])
    assert entry.name == "Basis-Sharing-0.25"
    share = budget.cost(entry.config) / 851_968
    assert share == pytest.approx(0.25, rel=0.01)


def test_rich_or_lazy_reports_each_model_at_each_rank_over_seeds():
    cells = [("addressed", rank) for rank in (4, 16, 0)] + [("dense", rank) for rank in (4, 16, 0)]
    names = {(*cell, seed): rich_or_lazy.folder(*cell, seed) for cell in cells for seed in (0, 1, 2)}
    losses = {name: 2 + rank / 10 + seed for (_, rank, seed), name in names.items()}
    found = {name: {"kernel turned": rank / 100} for (_, rank, _), name in names.items()}
    rows = rich_or_lazy.report(losses, found).splitlines()[2:]
    assert rows[0] == "| model | rank at start | held-out loss | kernel turned |"
    assert rows[2] == "| NGC | 4 | 3.400 ± 2.484 | 0.040 ± 0.000 |"
    assert rows[7] == "| dense | as drawn | 3.000 ± 2.484 | 0.000 ± 0.000 |"
