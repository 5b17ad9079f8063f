"""Runs as they go: what lies below a folder, read as it grows, and a server for the browser here.

For: `Runs`, and `server`, which changes nothing and answers this machine alone. Not for: how it
looks (`live.html`), or what a run writes (`runtime/metrics.py`).
"""

import array
import contextlib
import http.server
import json
import os
import pathlib
import re
import secrets
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np

from ngc_jax.report.figures import COLOURS
from ngc_jax.report.page import HEAD, STYLE
from ngc_jax.runtime import files, metrics

DEPTH = 5  # folders in folders that are searched
MOST = 500  # runs of a page
POINTS = 600  # of a curve
KEPT = 200  # of the events of a run, and a tenth of its samples
PATIENCE = 1.0  # seconds of reading before an answer; the rest is read for the next one
HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")


class Followed:
    """One run, by its files: curves {name: (steps, values)}, events, samples."""

    def __init__(self, home: pathlib.Path):
        self.home, self._anew, self._config = home, 0, (0.0, dict[str, Any]())
        self._rows = metrics.Growing(home / "metrics.jsonl")
        self._notes = metrics.Growing(home / "events.jsonl", texts=True)
        self.notes, self.whole = list[metrics.Row](), False  # whether all is read that is there
        self._begin()

    def _begin(self) -> None:
        self.curves = dict[str, tuple[Any, Any]]()
        self.events, self._standing = list[metrics.Row](), dict[str, metrics.Row]()
        self.count, self._anew = 0, self._anew + 1

    def refresh(self) -> bool:
        """Reads what is new, some MB at most; whether there was anything."""
        anew, rows = self._rows.new()
        if anew:
            self._begin()
        for row in rows:
            for name, value in row.items():
                if name != "step" and value is not None:
                    curve = self.curves.setdefault(name, (array.array("q"), array.array("d")))
                    curve[0].append(row["step"])
                    curve[1].append(value)
            self._note(row)
        again, notes = self._notes.new()
        self.notes = ([] if again else self.notes) + [note for note in notes if "text" in note]
        samples = [note for note in self.notes if "sample" in note][-KEPT // 10 :]
        told = [note for note in self.notes if "sample" not in note][-KEPT:]
        self.notes, self.events = told + samples, self.events[-KEPT:]
        self.count += len(rows) + len(notes)
        self.whole = self.whole or not (rows or notes)
        return bool(rows or notes)

    def _note(self, row: metrics.Row) -> None:
        """Keeps what a row says of trouble; the same in consecutive rows is one event."""
        if "train/rewinds" in row:
            last = row.get("train/rewound_from") or 0
            told = f"rewound from update {last:g}; other batches follow"
            self.events.append({"step": row["step"], "text": told, "kind": "bad"})
        if "train/loss" not in row:
            return
        change = f"{row.get('stability/relative_update') or 0:.1%}"
        trouble = {
            "update skipped: not finite, or a spike": (row.get("train/bad_in_a_row") or 0) > 0,
            "divergence likely": (row.get("stability/warning") or -1) > 0,
        }
        for text, holds in trouble.items():
            if holds and text not in self._standing:
                self._standing[text] = {"step": row["step"], "text": text, "kind": "bad"}
                self._standing[text] |= {"change": change} if "likely" in text else {}
                self.events.append(self._standing[text])
            if holds:
                self._standing[text]["to"] = row["step"]
            else:
                self._standing.pop(text, None)

    def config(self) -> dict[str, Any]:
        """Sections of the run's config; {} where it cannot be read."""
        path = self.home / "config.json"
        with contextlib.suppress(OSError, ValueError):
            if (changed := os.stat(path).st_mtime) != self._config[0]:
                stored = files.read_json(path, 1 << 20)
                self._config = changed, stored if isinstance(stored, dict) else {}
        return self._config[1]

    def setting(self, section: str, name: str) -> float:
        """A whole number of the config; 0 where there is none."""
        part = self.config().get(section)
        found = part.get(name) if isinstance(part, dict) else 0
        return found if type(found) is int and 0 <= found < 2**53 else 0

    def state(self) -> str:
        """Whether it is running, finished or stopped, as its files say."""
        done, steps = self.curves.get("final/loss", ([0], ()))[0][-1], self.last("step")
        with contextlib.suppress(OSError, ValueError):
            who = files.read(self.home / files.HOLDER, 1000).decode()
            if found := re.fullmatch(r"process (\d{1,9}) on (\S+) since \S+", who):
                if found[2] != socket.gethostname():
                    return f"running on {found[2]}"[:60]
                if pathlib.Path(f"/proc/{found[1]}").exists():
                    return "running"
        if not self.whole:
            return "being read"
        return "finished" if done and done == steps else "stopped" if steps else "not begun"

    def last(self, name: str) -> float:
        """The newest value of a curve; "step": the newest update; 0 where there is none."""
        if name == "step":
            return max((steps[-1] for steps, _ in self.curves.values()), default=0)
        return self.curves[name][1][-1] if name in self.curves else 0

    def summary(self) -> dict[str, Any]:
        """The run in a line of a table."""
        steps, step, state = self.setting("train", "steps"), self.last("step"), self.state()
        pace = max(map(self.last, metrics.SPEEDS)) if state.startswith("running") else 0
        pace = pace if 1e-3 < pace < 1e15 else 0
        held_out = self.curves.get("eval/loss", ((), ()))[1]
        return {
            "version": f"{self._anew}.{self.count}",
            "state": state,
            "step": step,
            "steps": steps,
            "loss": self.last("train/loss") if "train/loss" in self.curves else None,
            "held_out": held_out[-1] if held_out else None,
            "best": min(held_out, default=None),
            "pace": pace,
            "left": self.tokens() * max(0, steps - step) / pace if pace else None,
            "changed": max(self._rows.changed, self._notes.changed),
        }

    def tokens(self) -> float:
        """Tokens, or images, of an update; 0 where that is not known."""
        images = "images_per_second" in self.curves
        each = 1 if images else self.setting("data", "context")
        return self.setting("train", "batch_size") * each

    def detail(self) -> dict[str, Any]:
        """Its curves, thinned, its events and samples, and tokens and FLOPs of an update."""
        flops = [note["flops"] for note in self.notes if isinstance(note.get("flops"), float)]
        return {
            "curves": {name: thinned(*curve) for name, curve in self.curves.items()},
            "events": [*self.events, *(note for note in self.notes if "sample" not in note)],
            "samples": [note for note in self.notes if "sample" in note],
            "tokens": self.tokens(),
            "flops": flops[-1] if flops else None,
        }


def thinned(steps: Any, values: Any) -> tuple[list[int], list[float]]:
    """At most about POINTS of a curve: of each part of equal length the least and the greatest."""
    chosen, per = set(range(len(steps))), -(-2 * len(steps) // POINTS)
    if len(steps) > POINTS:
        parts = np.split(np.asarray(values), range(per, len(values), per))
        ends = [(i * per + p.argmin(), i * per + p.argmax()) for i, p in enumerate(parts)]
        chosen = {0, len(steps) - 1, *(int(at) for both in ends for at in both)}
    kept = sorted(chosen)
    return [steps[i] for i in kept], [values[i] for i in kept]


class Runs:
    """All runs below a folder, found anew now and then, by their places in it."""

    def __init__(self, home: pathlib.Path):
        self.home, self.lock, self.left_out = home, threading.Lock(), 0
        self._runs, self._looked, self._next = dict[str, Followed](), -60.0, 0

    def refresh(self) -> dict[str, Followed]:
        """The runs, each with what could be read of it within PATIENCE, those first that wait."""
        began = time.monotonic()
        if began - self._looked > 10:
            found = sorted(_runs_in(self.home, DEPTH), key=_changed)
            self.left_out = max(0, len(found) - MOST)
            names = {run: os.path.relpath(run, self.home) for run in sorted(found[-MOST:])}
            homes = {name.encode(errors="replace").decode(): run for run, name in names.items()}
            self._runs = {name: self._runs.get(name) or Followed(homes[name]) for name in homes}
            self._looked = time.monotonic()
        waiting = [*self._runs.values()]
        for run in waiting[self._next :] + waiting[: self._next]:
            while run.refresh():
                if time.monotonic() - began > PATIENCE:
                    return self._runs
            self._next = (self._next + 1) % len(waiting)
        return self._runs


def _changed(run: pathlib.Path) -> float:
    with contextlib.suppress(OSError):
        return os.stat(run / "metrics.jsonl").st_mtime
    return 0.0


def _runs_in(folder: pathlib.Path, depth: int) -> Iterator[pathlib.Path]:
    """Folders that hold a run, links not followed; inside of one there is none of its own."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        inside = {entry.name: entry for entry in entries}
        if {"metrics.jsonl", "config.json"} & inside.keys():
            yield folder
        elif depth:
            for name, entry in inside.items():
                if not name.startswith(".") and entry.is_dir(follow_symlinks=False):
                    yield from _runs_in(folder / name, depth - 1)


def page(title: str, key: str) -> bytes:
    """The page, one file without anything from elsewhere; `key` marks what it may run."""
    body = (pathlib.Path(__file__).parent / "live.html").read_text(encoding="utf-8")
    known = json.dumps({"title": title, "colours": COLOURS}).replace("<", "\\u003c")
    head = f'{HEAD}<title>Runs</title>\n<style nonce="{key}">{STYLE}'
    return (head + body.replace("NONCE", key).replace("KNOWN", known)).encode()


def server(home: pathlib.Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of the page of all runs below a folder, for this machine alone. Raises OSError."""
    runs, key = Runs(home), secrets.token_urlsafe(16)
    whole = page(str(home), key)
    policy = f"default-src 'none'; script-src 'nonce-{key}'; style-src 'nonce-{key}'; "
    policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

    class Answer(http.server.BaseHTTPRequestHandler):
        """GET of the page, of all runs in a line each, or of one run."""

        timeout = 20

        def do_GET(self) -> None:
            asked = urllib.parse.urlsplit(self.path)
            if not HERE.fullmatch(self.headers.get("Host", "")):  # as after DNS rebinding
                self._send(403, "text/plain", b"for this machine alone: open http://127.0.0.1\n")
            elif asked.path == "/":
                self._send(200, "text/html; charset=utf-8", whole)
            elif asked.path in ("/runs", "/run"):
                with runs.lock:
                    self._data(asked.path, urllib.parse.parse_qs(asked.query).get("id", [""])[0])
            else:
                self._send(404, "text/plain", b"there is no such page\n")

        def _data(self, path: str, name: str) -> None:
            found = runs.refresh()
            if path == "/run" and name not in found:
                self._send(404, "text/plain", b"there is no such run\n")
                return
            shown: dict[str, Any] = {"left_out": runs.left_out, "now": time.time()}
            shown["runs"] = {name: run.summary() for name, run in found.items()}
            shown = found[name].detail() if path == "/run" else shown
            self._send(200, "application/json", json.dumps(shown).encode())

        def _send(self, code: int, kind: str, content: bytes) -> None:
            self.send_response(code)
            for name, value in {
                "Content-Type": kind,
                "Content-Length": str(len(content)),
                "Content-Security-Policy": policy,
                "X-Content-Type-Options": "nosniff",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-store",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *told: Any) -> None:
            """Prints nothing for each request."""

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Prints nothing where a browser has gone away."""

    return Quiet(("127.0.0.1", port), Answer)
