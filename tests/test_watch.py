"""The live page: rows are read as they grow, nothing is written, only this machine is answered."""

import http.client
import json
import os
import re
import socket
import threading

import pytest

from ngc_jax.commands import watch
from ngc_jax.report import live
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import HOLDER
from ngc_jax.runtime.metrics import Growing, note


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def loss(step, value=1.0, **more):
    return {"step": step, "train/loss": value, "tokens_per_second": 64.0, **more}


@pytest.fixture
def folder(tmp_path):
    """A finished run in a folder of a study, and one that is at work."""
    for name, text in {
        "study/done": lines(loss(1), loss(2, 0.5), {"step": 2, "final/loss": 0.6}),
        "live": lines(loss(1)),
    }.items():
        home = tmp_path / name
        home.mkdir(parents=True)
        (home / "metrics.jsonl").write_text(text)
        config = {"train": {"steps": 2, "batch_size": 4}, "data": {"context": 8}}
        (home / "config.json").write_text(json.dumps(config))
    who = f"process {os.getpid()} on {socket.gethostname()} since now"
    (tmp_path / "live" / HOLDER).write_text(who)
    return tmp_path


@pytest.fixture
def ask(folder):
    """(path, method, host) -> status, headers and content of an answer."""
    with live.server(folder, 0) as serving:
        assert serving.server_address[0] == "127.0.0.1"
        threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()

        def ask(path, method="GET", host="127.0.0.1"):
            one = http.client.HTTPConnection("127.0.0.1", serving.server_port, timeout=20)
            one.request(method, path, headers={"Host": host})
            answer = one.getresponse()
            return answer.status, answer.headers, answer.read()

        yield ask
        serving.shutdown()


def test_rows_are_read_once_as_they_grow_and_anew_where_a_run_went_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    growing = Growing(path)
    assert growing.new() == (False, [])
    path.write_text(lines(loss(1)) + "\n" + '{"step": 2, "tra')
    assert growing.new() == (False, [loss(1)])
    assert growing.new() == (False, [])
    path.write_text(lines(loss(1)) + "\n" + lines(loss(2)) + "%$?\n" + lines(loss(3)))
    assert growing.new() == (False, [loss(2), loss(3)])
    path.write_text(lines(loss(1), loss(2, 2.0), loss(3, 2.0), loss(4), loss(5)))  # went on from 1
    assert growing.new() == (True, [loss(1), loss(2, 2.0), loss(3, 2.0), loss(4), loss(5)])
    path.write_text(lines(loss(1)))
    assert growing.new() == (True, [loss(1)])
    path.unlink()
    assert growing.new() == (True, [])
    path.symlink_to("/dev/zero")
    assert growing.new() == (False, [])


def test_a_long_file_is_read_in_bites(tmp_path, monkeypatch):
    monkeypatch.setattr("ngc_jax.runtime.metrics.BITE", 100)
    (tmp_path / "metrics.jsonl").write_text("?" * 250 + "\n" + lines(*map(loss, range(9))))
    growing, found = Growing(tmp_path / "metrics.jsonl"), []
    while len(found) < 9:
        found += growing.new()[1]
    assert found == [*map(loss, range(9))]


def test_the_page_tells_of_every_run_and_follows_it(folder, ask):
    found = json.loads(ask("/runs")[2])["runs"]
    assert {name: one["state"] for name, one in found.items()} == {
        "live": "running",
        "study/done": "finished",
    }
    assert (found["live"]["step"], found["live"]["left"]) == (1, 0.5)  # 32 tokens at 64 a second
    detail = json.loads(ask("/run?id=live")[2])
    assert detail["curves"]["train/loss"] == [[1], [1.0]]
    assert (detail["tokens"], detail["flops"]) == (32, None)
    with (folder / "live" / "metrics.jsonl").open("a") as file:
        file.write(lines(loss(2, 0.25)))
    note(folder / "live", 2, "continuing from checkpoint 1", flops=2.0)
    note(folder / "live", 2, "", prompt="a", sample="<b>")
    again = json.loads(ask("/runs")[2])["runs"]
    assert again["live"]["version"] != found["live"]["version"]
    assert again["study/done"] == found["study/done"]
    detail = json.loads(ask("/run?id=live")[2])
    assert detail["curves"]["train/loss"] == [[1, 2], [1.0, 0.25]]
    assert [event["text"] for event in detail["events"]] == ["continuing from checkpoint 1"]
    assert (detail["samples"][0]["sample"], detail["flops"]) == ("<b>", 2.0)
    (folder / "live" / HOLDER).write_text("process 999999999 on " + socket.gethostname() + " since")
    assert json.loads(ask("/runs")[2])["runs"]["live"]["state"] == "stopped"


def test_trouble_in_rows_is_an_event_once(folder):
    bad = [loss(step, None, **{"train/bad_in_a_row": step - 1}) for step in (2, 3)]
    warned = [loss(4, **{"stability/warning": 1.0, "stability/relative_update": 0.25})]
    back = [{"step": 3, "train/rewinds": 1, "train/rewound_from": 4}, loss(5), *warned]
    with (folder / "live" / "metrics.jsonl").open("a") as file:
        file.write(lines(*bad, {"step": 3, "eval/loss": 1.0}, *warned, *back))
    run = live.Followed(folder / "live")
    run.refresh()
    told = [(event["step"], event.get("to"), event["text"].split()[0]) for event in run.events]
    assert told == [
        (2, 3, "update"), (4, 4, "divergence"), (3, None, "rewound"), (4, 4, "divergence")
    ]  # fmt: skip
    assert run.events[1]["change"] == "25.0%"


def test_a_long_curve_keeps_its_ends_and_its_extremes():
    values = [1.0] * 100_000
    values[31_234], values[77_777] = 9.0, -9.0
    steps, kept = live.thinned(range(100_000), values)
    assert len(kept) <= live.POINTS + 4
    assert (steps[0], steps[-1], min(kept), max(kept)) == (0, 99_999, -9.0, 9.0)
    assert steps == sorted(steps)


def test_nothing_is_written_and_links_and_what_others_wrote_do_no_harm(folder, ask):
    wrong = {
        "link": None,
        "junk": ("[" * 10_000, "%$?\n\0\0"),
        "types": (
            '{"train": [], "data": {"context": 1e999}}',
            '{"step": 1, "mfu": 1e999}\n{"step": 1, "train/rewinds": 1}\n'
            '{"step": 1, "train/rewinds": 1, "train/rewound_from": null}\n'
            '{"step": 2, "tokens_per_second": 1e-300, "train/loss": null}\n',
        ),
    }
    for name, texts in wrong.items():
        if texts is None:
            (folder / name).symlink_to("/")
            continue
        (folder / name).mkdir()
        for file, text in zip(("config.json", "metrics.jsonl"), texts, strict=True):
            (folder / name / file).write_text(text)
    (folder / "junk" / "events.jsonl").symlink_to("/dev/zero")
    (folder / "\udcff").mkdir()  # no UTF-8
    (folder / "\udcff" / "config.json").write_text("{}")
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    found = json.loads(ask("/runs")[2])["runs"]
    assert [*found] == ["junk", "live", "study/done", "types", "?"]
    for name in found:
        assert ask(f"/run?id={name.replace('?', '%3F')}")[0] == 200
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


def test_only_this_machine_is_answered_and_only_what_is_asked_for(ask):
    code, headers, content = ask("/")
    assert (code, headers["X-Content-Type-Options"]) == (200, "nosniff")
    nonce = re.search(r"script-src 'nonce-(\S+)'", headers["Content-Security-Policy"])[1]
    page = content.decode()
    assert page.count(f'nonce="{nonce}"') == 2
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    outside = re.findall(r"""(?:src|href)\s*=|url\((?!#)|@import|https?://[^\s"']+""", page)
    assert outside == ["http://www.w3.org/2000/svg"], "a name, and nothing that is loaded"
    for host in ("localhost:9", "[::1]:8686", "127.0.0.1"):
        assert ask("/runs", host=host)[0] == 200
    for host in ("evil.example", "evil.example:8686", "127.0.0.1.evil.example", "10.0.0.1", ""):
        assert ask("/runs", host=host)[0] == 403
    for path in (
        "/run",
        "/run?id=..",
        "/run?id=../x",
        "/run?id=%2Fetc",
        "/live/config.json",
        "//x",
    ):
        assert ask(path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert ask("/runs", method=method)[0] == 501


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["nowhere"], r"nowhere is no folder: give one with runs in it"),
        ([".", "--port=70000"], r"--port=70000 cannot be used .*: give another, or 0"),
        ([".", "--port=-1"], r"--port=-1 cannot be used"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, flags, told):
    monkeypatch.setattr("sys.argv", ["watch", *flags])
    with pytest.raises(UserError, match=told):
        watch.main()
