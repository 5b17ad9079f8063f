"""Spoils the files that ngc_jax reads, and watches what reading them does.

    python -m experiments.fuzz --inputs=20000 --seed=0 --workdir=runs/fuzz

For: a file in each place where somebody else may have written one (`TARGETS`), spoilt by Hypothesis
from a seed: bytes flipped, cut, put in; values of JSON replaced; other contents; deep nesting. Each
is read as commands read it. What must hold: a result or one line (`UserError`, `OSError`), within
`LIMIT` seconds of work; and, by Python's audit hooks, no file opened, made, moved or removed
outside the folders of this campaign, no module imported that reading a sound file does not import,
no socket, no process. Hypothesis makes an input that breaks this smaller before it shows it. Not
for: what C++ libraries open (they are given paths inside a checkpoint), or files that are swapped
meanwhile.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import os
import pathlib
import shutil
import signal
import site
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import ngc_jax
from experiments import study
from ngc_jax.commands.arguments import command
from ngc_jax.config import base
from ngc_jax.convert.config_json import fields_of
from ngc_jax.convert.source import open_source, write_safetensors
from ngc_jax.data.tokenizer import load_tokenizer, open_given
from ngc_jax.data.tokens import load_data
from ngc_jax.runtime.errors import UserError, plain
from ngc_jax.runtime.files import expand
from ngc_jax.runtime.metrics import Metrics, read_rows
from ngc_jax.training.workdir import claim, hold, read_config

Path = pathlib.Path
LIMIT, WAIT = 10, 60  # seconds that reading one input may take: of the processor, of the clock
NASTY = ["", "..", "../../etc", "/etc/passwd", "file:///etc", "huggingface:x", "os", "\0", "\u202e"]
RELATIVE = {"os.remove", "os.rmdir"}  # by shutil.rmtree, to a folder that is open
WRITES = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.chmod", *RELATIVE}
NEVER = {"socket.connect", "socket.bind", "subprocess.Popen", "os.system", "os.exec", "os.fork"}
NEVER |= {"os.posix_spawn", "pty.spawn", "webbrowser.open", "urllib.Request", "ctypes.dlopen"}
CODE = [sysconfig.get_paths()["stdlib"], *site.getsitepackages(), str(Path(__file__).parents[1])]


class Watch:
    """An audit hook, which nothing takes away again: what is done while `on`, beyond `allowed`."""

    def __init__(self, *allowed: Path):
        self.allowed = [os.path.realpath(place) for place in allowed]
        self.on, self.seen, self.learn = False, list[str](), True
        self.known: set[str] = set()  # modules that reading sound files imports
        sys.addaudithook(self._hook)

    def _inside(self, path: Any, places: list[str]) -> bool:
        if isinstance(path, int) or path is None:
            return True
        real = os.path.realpath(os.fsdecode(path))
        return any(real == place or real.startswith(place + os.sep) for place in places)

    def _hook(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.on = False  # what follows opens files itself
        try:
            if event == "import" and self.learn:
                self.known.add(given[0])
            elif event in NEVER or (event == "import" and given[0] not in self.known):
                self.seen.append(f"{event} {given[0]!r:.200}")
            elif event == "open":
                writes = bool((given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
                places = self.allowed if writes else [*self.allowed, *CODE, "/proc", "/dev/null"]
                if not self._inside(given[0], places):
                    self.seen.append(f"open {given[0]!r:.200} {'to write' * writes}")
            elif event in WRITES:
                folder = next((at for at in given if isinstance(at, int) and at >= 0), None)
                names = [os.fsdecode(path) for path in given[:2] if isinstance(path, str | bytes)]
                if event in RELATIVE and folder is not None:
                    home = os.readlink(f"/proc/self/fd/{folder}")
                    names = [os.path.join(home, name) for name in names]
                if not all(self._inside(name, self.allowed) for name in names):
                    self.seen.append(f"{event} {names!r:.200}")
        finally:
            self.on = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Raises AssertionError at its end for what was seen, or at once after LIMIT seconds."""

        def late(number: int, frame: Any) -> None:
            raise AssertionError(f"not read within {LIMIT} seconds")

        self.seen.clear()
        timers = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
        for (timer, number), most in zip(timers.items(), (LIMIT, WAIT), strict=True):
            signal.signal(number, late)
            signal.setitimer(timer, most)
        self.on = True
        try:
            yield
        finally:
            self.on = False
            for timer in timers:
                signal.setitimer(timer, 0)
        assert not self.seen, "; ".join(self.seen)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*NASTY, 2**64, -1, 1e308, "x" * 10_000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def _paths(tree: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each value of a JSON tree."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        inner = list(tree.items())
    elif isinstance(tree, list):
        inner = list(enumerate(tree[:20]))
    return [here, *(path for key, value in inner for path in _paths(value, (*here, key)))]


@st.composite
def spoilt(draw: Any, sound: bytes) -> bytes:
    """Other bytes in place of these."""
    try:
        tree = json.loads(sound.decode())
    except ValueError:
        tree = None
    kinds = ["edit", "edit", "whole", "deep"] + ["value"] * 4 * (tree is not None)
    match draw(st.sampled_from(kinds)):
        case "value":
            tree = copy.deepcopy(tree)
            for _ in range(draw(st.integers(1, 3))):
                *way, last = draw(st.sampled_from(_paths(tree)[1:] or [("x",)]))
                home = tree
                for key in way:
                    home = home[key]
                how = draw(st.sampled_from(["other", "other", "gone", "more"]))
                if how == "gone":
                    del home[last]
                elif how == "more" and isinstance(home, dict):
                    home[draw(st.text(max_size=8) | st.sampled_from(NASTY))] = draw(JSON)
                else:
                    home[last] = draw(JSON)
                if not isinstance(tree, dict | list) or not tree:
                    break
            return json.dumps(tree).encode()
        case "edit":
            found = bytearray(sound)
            for _ in range(draw(st.integers(1, 4))):
                at = draw(st.integers(0, len(found)))
                size = draw(st.integers(0, 64))
                found[at : at + size] = draw(st.binary(max_size=16))
            return bytes(found)
        case "deep":
            opening = draw(st.sampled_from([b"[", b'{"a":', b"[[{", b"\0", b"\n"]))
            return opening * draw(st.sampled_from([1_000, 100_000, 1_000_000]))
        case _:
            return draw(st.binary(max_size=64) | JSON.map(lambda tree: json.dumps(tree).encode()))


Target = tuple[Path, Callable[[], object], int]  # the file, how it is read, its share of inputs


def make(home: Path) -> dict[str, Target]:
    """Trains a run on bytes and one with a learned tokenizer, and makes a study's folder."""
    text = home / "text"
    text.mkdir(parents=True)
    for i in range(40):
        (text / f"{i}.txt").write_text(
            f"group {i} sends signals to group {i * 7 % 40}. " * 40, "utf-8"
        )
    runs = {}
    for name, fields in {
        "bytes": {},
        "bpe": {"data.tokenizer": "bpe", "data.vocab_size": 300},
    }.items():
        config = base()
        own = {"data.path": str(text), "data.cache_dir": str(home / "cache"), "data.context": 16}
        own |= {"model.width": 16, "model.hidden": 16, "model.groups": 2, "model.heads": 2}
        own |= {"train.steps": 4, "train.batch_size": 2, "train.warmup_steps": 1, "eval.windows": 2}
        own |= {"eval.batch_size": 2, "stability.every": 0, "checkpoint.every_steps": 2}
        config.update_from_flattened_dict(own | fields)
        runs[name] = home / name
        ngc_jax.train(config, home / name)
    plain, bpe = runs["bytes"], runs["bpe"]
    stored = {name: read_config(run) for name, run in runs.items()}
    checkpoint = max((plain / "checkpoints").iterdir(), key=lambda path: int(path.name))
    rows = json.loads((checkpoint / "MANIFEST.json").read_text("utf-8"))["meta"]

    def go_on() -> None:
        copied = home / "copied"
        shutil.copyfile(plain / "metrics.jsonl", copied / "metrics.jsonl")
        Metrics(copied, 4, rows["rows"], rows["rows_sha256"]).close()

    def held() -> None:
        with hold(plain):
            pass

    (home / "copied").mkdir()
    whole = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*")}
    targets: dict[str, Target] = {
        "config.json": (plain / "config.json", lambda: ngc_jax.load(plain), 4),
        "config.json, a run goes on": (
            plain / "config.json",
            lambda: claim(plain, stored["bytes"], load_tokenizer(plain, stored["bytes"].data)),
            4,
        ),
        "metrics.jsonl": (plain / "metrics.jsonl", lambda: read_rows(plain), 8),
        "metrics.jsonl, a run goes on": (plain / "metrics.jsonl", go_on, 8),
        "tokenizer.json": (
            bpe / "tokenizer.json",
            lambda: load_tokenizer(bpe, stored["bpe"].data),
            8,
        ),
        "lock": (next(plain.glob(".lock*"), plain / ".lock"), held, 2),
    }
    for name, path in whole.items():
        if path.is_file():
            share = 3 if name.endswith(("json", "METADATA")) else 1
            targets[f"checkpoints/{name}"] = (path, lambda: ngc_jax.load(plain), share)
    for part in (home / "cache").rglob("*"):
        if part.is_file():
            of = "bpe" if "bpe" in part.parts[-2] else "bytes"
            read = lambda of=of: load_data(stored[of].data)  # noqa: E731
            targets[f"cache/{part.parts[-2]}/{part.name}"] = (part, read, 1)
    targets["a text"] = (text / "0.txt", lambda: load_data(stored["bytes"].data), 2)
    record = {name: kind() for name, kind in study.RECORD.items()} | {"measures": {study.LOSS: 1.5}}
    for name, content in {"records/a.json": record, "changes.json": {"model.width": 16}}.items():
        path = home / "study" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), "utf-8")
    _, studied, _ = study.find("which_rule")
    folder = home / "study"
    targets["records of a study"] = (
        folder / "records/a.json",
        lambda: study.read_records(folder),
        6,
    )
    targets["changes.json"] = (folder / "changes.json", lambda: study.prepared(studied, folder), 6)
    return targets | pretrained(home, (bpe / "tokenizer.json").read_text("utf-8"))


PRETRAINED = {"block_count": 1, "context_length": 64, "embedding_length": 4, "vocab_size": 300}
PRETRAINED |= {"feed_forward_length": 4, "attention.head_count": 2, "attention.head_count_kv": 1}


def pretrained(home: Path, tokenizer: str) -> dict[str, Target]:
    """Writes a checkpoint as a folder of safetensors and as a GGUF file."""
    file, folder, told = home / "a.gguf", home / "folder", json.loads(tokenizer)
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in PRETRAINED.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = sorted(told["model"]["vocab"], key=told["model"]["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in told["model"]["merges"]])
    shapes = {"token_embd": (300, 4), "output_norm": (4,), "blk.0.attn_norm": (4,)}
    shapes |= {"blk.0.attn_q": (4, 4), "blk.0.attn_k": (2, 4), "blk.0.ffn_norm": (4,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_source(file)
    write_safetensors(folder, found.tensors, found.config, tokenizer, 300 * 4 * 4)

    def read(path: Path) -> None:
        source = open_source(path)
        open_given(source.tokenizer, fields_of(source.config)["data.vocab_size"], path)
        for tensor in source.tensors.values():
            assert tensor.read().shape == tensor.shape

    made: dict[str, Target] = {"a.gguf": (file, lambda: read(file), 12)}
    for part in sorted(folder.iterdir()):
        made[f"folder/{part.name}"] = (part, lambda: read(folder), 6)
    return made


def read_quietly(read: Callable[[], object]) -> str:
    """Reads, and says how that ended: a result or one line."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            read()
        except (UserError, OSError) as error:
            if not plain(error):
                raise
            return "refused"
    return "read"


def spoil(
    file: Path,
    read: Callable[[], object],
    inputs: int,
    number: int,
    watch: Watch,
    counts: dict[str, int],
) -> None:
    """Reads so many inputs in place of a file, which is as before afterwards."""
    sound = file.read_bytes()
    everything = list(HealthCheck)  # of Hypothesis, about its own speed

    @seed(number)
    @settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=everything)
    @given(spoilt(sound))
    def reads(content: bytes) -> None:
        file.write_bytes(content)
        counts["inputs"] += 1
        with watch.watching():
            counts[read_quietly(read)] += 1

    try:
        reads()
    finally:
        file.write_bytes(sound)


def campaign(home: Path, inputs: int, number: int) -> dict[str, int]:
    """Reads so many spoilt files; how often that ended how. Raises what must not be."""
    with contextlib.redirect_stdout(io.StringIO()):
        targets = make(home)
    tempfile.tempdir = str(home)  # libraries write there
    watch = Watch(home)
    counts: dict[str, int] = collections.Counter()
    for file, read, _ in targets.values():  # what sound files, and a missing one, import
        sound = file.read_bytes() if file.exists() else b""
        for content in (sound, b"", b"[", b"\xff", None):
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content)
            with watch.watching():
                read_quietly(read)
        file.write_bytes(sound)
    watch.learn = False
    shares = sum(share for *_, share in targets.values())
    for name, (file, read, share) in targets.items():
        began, before = time.monotonic(), counts["inputs"]
        try:
            spoil(file, read, -(-inputs * share // shares), number, watch, counts)
        except BaseException as error:
            error.add_note(f"the file was {name}")
            raise
        took = time.monotonic() - began
        print(f"{name}: {counts['inputs'] - before} inputs in {took:.0f} s", flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=expand, default=Path("runs/fuzz"), help="emptied first")
    args = parser.parse_args()
    home = args.workdir.absolute()
    shutil.rmtree(home, ignore_errors=True)
    counts = campaign(home, args.inputs, args.seed)
    print(
        f"{counts['inputs']} inputs: {counts['read']} read, {counts['refused']} refused in one "
        f"line; no traceback, nothing over {LIMIT} s, no file outside, no import, no socket, no "
        "process"
    )


if __name__ == "__main__":
    command(main, goes_on=True)
