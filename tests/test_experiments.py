"""What the studies compute from their runs, on made-up runs whose answer is known."""

import hashlib

import numpy as np
import pytest
from conftest import ROOT, python

from experiments import (
    domains,
    early_warning,
    method_drawing,
    protocols,
    results_page,
    rule_pictures,
    settled,
    stats,
    sums,
)
from experiments import text_measures as measures
from ngc_jax import RULES
from ngc_jax.report.blocks import table
from ngc_jax.training import match_size as budget


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
        runs.append(
            {
                "train/loss": loss,
                "signal": signal,
                "noise": np.random.default_rng(i).normal(size=300),
            }
        )
    knows = early_warning.judge(runs, lambda run: run["signal"], 0.5)
    assert knows["auroc"] == 1
    assert knows["false"] == 0
    assert 80 <= knows["lead"] <= 92
    assert early_warning.judge(runs, lambda run: run["noise"], None)["auroc"] < 0.8


def test_the_sums_are_right_and_the_two_sides_share_none():
    train, held_out = (
        sums.sums(2000, settled.TRAINED, 0, False),
        sums.sums(500, settled.ASKED, 1, True),
    )
    assert not set(train) & set(held_out)
    for line in held_out:
        asked, answer = line.split("=")
        assert sum(map(int, asked)) % sums.MODULUS == int(answer)
        assert len(asked) in settled.ASKED


def test_the_same_sum_in_another_order_is_found():
    assert sums.reordered(["310=4", "12=3", "301=4", "310=4", "21=3", "4=4"]) == [
        ["310=4", "301=4"],
        ["12=3", "21=3"],
    ]


def test_how_varied_a_text_is():
    one, other = measures.words("a = b(a) # b"), measures.words("a = b")
    assert one == ["a", "=", "b", "(", "a", ")", "#", "b"]
    assert measures.distinct([one, other], 1) == 6 / 11
    assert measures.distinct([one, other], 2) == 7 / 9  # "a =" and "= b" stand in both
    assert np.isnan(measures.distinct([other], 4))
    assert measures.type_token_ratio(one) == 6 / 8
    assert measures.repetition(list("xyxyxy"), 2) == pytest.approx(3 / 5)
    assert measures.repetition(list("abcdef"), 2) == 0


def test_how_often_answers_agree():
    assert measures.agreement([[3, 3, 1]]) == pytest.approx(1 / 3)
    assert measures.agreement([[3, 3], [1, 0], np.array([2, 2, 2])]) == pytest.approx(2 / 3)


def test_divergence_is_jensen_and_shannons():
    assert measures.divergence(np.array([0.5, 0.5, 0]), np.array([0, 0, 1.0])) == 1
    p, q = np.array([0.5, 0.5]), np.array([1.0, 0])
    by_hand = 0.5 * (0.5 * np.log2(0.5 / 0.75) + 0.5 * np.log2(0.5 / 0.25)) + 0.5 * np.log2(
        1 / 0.75
    )
    np.testing.assert_allclose(
        measures.divergence(np.stack([p, q, p]), np.stack([q, p, p])), [by_hand, by_hand, 0]
    )
    # Two heads, two tokens: in one stage they look at different tokens, in the next both at both.
    first = np.array([[[[1, 0], [1, 0]], [[1, 0], [0, 1]]]])
    second = np.array([[[[1, 0], [0.5, 0.5]], [[1, 0], [0.5, 0.5]]]])
    third = np.array([[[[1, 0], [1, 0]], [[1, 0], [1, 0]]]])
    assert measures.attention_divergence([first, second]) == 0
    assert measures.attention_divergence([first, second, third]) == pytest.approx(by_hand / 2)


def test_difficulty_is_held_fixed():
    """Longer sums are wrong more often; within a length nothing separates right from wrong."""
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


def test_the_method_is_drawn_as_readme_shows_it(tmp_path):
    assert "(docs/method.png)" in (ROOT / "README.md").read_text()
    method_drawing.draw(tmp_path / "method.png")
    size = slice(16, 24)  # width and height in a PNG's header
    drawn, shown = (home / "method.png" for home in (tmp_path, ROOT / "docs"))
    assert drawn.read_bytes()[size] == shown.read_bytes()[size]


def test_a_comparison_solves_the_share_for_each_model():
    (of,) = protocols.sized(protocols.PROTOCOLS["smoke"], ["Basis Sharing"])
    share = budget.cost(of.config) / 851_968
    assert share == pytest.approx(0.25, rel=0.01)


def test_the_results_page_has_the_committed_results_and_their_picture():
    report = results_page.REPORT.read_text()
    said = results_page.PAGE.read_text()
    assert results_page.renewed(said, report) == said
    assert results_page.drawing(report)[:4] == results_page.PICTURE.read_bytes()[:4] == b"\x89PNG"


def test_the_results_table_has_the_largest_first_and_the_better_before_the_worse():
    columns = list(results_page.COLUMNS)
    head = ["model", "size", results_page.LOSS, *columns[2:4], *columns[5:]]
    rows = [
        ["NGC", "0.12", "1.5 ± 0.1", "12", "13", "-0.1", "0.7"],
        ["dense", "0.32", "1.45 ± 0.1", "32", "33", "", "0.6"],
        ["NGC", "0.32", "1.4 ± 0.1", "32", "34", "-0.05", "1.4"],
        ["BDH", "0.32", "1.6 ± 0.1", "32", "33", "0.15", "9"],
        ["BDH", "1:flops", "1.6 ± 0.1", "90", "99", "0.15", "9"],
        ["dense", "1:flops", "-", "99", "99", "", "1"],
    ]
    tables = (
        table(["factor", "values"], [["size", "all"]]),
        table(head, rows),
        table(["model"], [["NGC"]]),
    )
    lines = results_page.table("\n\n".join(each.markdown for each in tables)).splitlines()
    assert lines[0].startswith(
        "| model | size | parameters in matrices | all parameters | loss (nats per byte) | "
    )
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| BDH",
        "| NGC",
        "| dense",
        "| BDH",
        "| NGC",
    ]
    assert lines[3] == "| NGC | 32% of the parameters | 32 | 34 | 1.4 ± 0.1 | -0.05 | 1.4 |"


def test_what_reading_a_spoilt_file_does_is_seen(tmp_path):
    # In a process of its own: an audit hook stays for ever.
    script = f"""
import pathlib, socket, subprocess
from experiments.fuzz import Watch, read_quietly
own, outside = pathlib.Path({str(tmp_path / "own")!r}), pathlib.Path({str(tmp_path / "else")!r})
own.mkdir(), outside.write_text("theirs")
watch = Watch(own)
watch.learn = False

def imports():
    import antigravity

def runs():
    subprocess.run(["true"])

def connects():
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 9))

def fails():
    raise KeyError("a traceback")

for does in (outside.read_text, lambda: outside.write_text(""), imports, runs, connects, fails):
    try:
        with watch.watching():
            read_quietly(does)
    except (AssertionError, KeyError) as error:
        print(type(error).__name__, str(error))
    else:
        print("unseen")
with watch.watching():
    print(read_quietly(lambda: (own / "a").write_text("ours")))
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    seen = done.stdout.splitlines()
    assert seen[0].startswith("AssertionError open")
    assert seen[1].startswith("AssertionError open")
    assert "import 'antigravity'" in seen[2]
    assert "subprocess.Popen" in seen[3]
    assert "socket.connect" in seen[4]
    assert seen[5:] == ["KeyError 'a traceback'", "read"]


def test_texts_of_domains_share_no_line_between_calibration_and_test(tmp_path, monkeypatch, capsys):
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "B").write_text("second\n")
    (tmp_path / "law" / "A").write_text("first\n")
    (tmp_path / "law" / "C").symlink_to(tmp_path / "law" / "A")
    (tmp_path / "verse.txt").write_text("".join(f"line {i}\n" for i in range(30)))
    line = ["domains", f"--verse={tmp_path / 'verse.txt'}", f"--law={tmp_path / 'law'}"]
    monkeypatch.setattr("sys.argv", [*line, f"--out={tmp_path / 'texts'}"])
    domains.main()
    made = {path.name: path.read_bytes() for path in (tmp_path / "texts").iterdir()}
    assert made["law2.txt"] == b"first\nsecond\n"
    assert made["verse.txt"] + made["verse2.txt"] == (tmp_path / "verse.txt").read_bytes()
    assert made["verse2.txt"] == b"line 27\nline 28\nline 29\n"
    assert len(made["code.txt"]) > 10 * len(made["code2.txt"]) > 10**6
    said = capsys.readouterr().out
    assert all(hashlib.sha256(text).hexdigest() in said for text in made.values())
    monkeypatch.setattr("sys.argv", [*line[:2], f"--law={tmp_path / 'texts' / 'none'}"])
    with pytest.raises(OSError, match="none"):
        domains.main()
