"""Corpora, tokens and batches: what is read, how it is split and kept, and that a batch is a
function of the step.
"""

import base64
import concurrent.futures
import fcntl
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT, make_text
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from ngc_jax.config import base
from ngc_jax.data import cache, corpora, packing, sources, token_files
from ngc_jax.data.batches import Windows, filled, held_out_batches, train_batches, turn
from ngc_jax.data.byte_pairs import BPE
from ngc_jax.data.corpus import SKIPPED, stdlib_documents
from ngc_jax.data.tokenizer import Bytes, load_tokenizer, save_tokenizer
from ngc_jax.data.tokens import load_data, segmented
from ngc_jax.report import page
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import build_directory


def settings(tmp_path: pathlib.Path, **fields: object) -> ConfigDict:
    data = base().data
    data.update({"context": 8, "cache_dir": str(tmp_path / "cache"), **fields})
    return data


def document_set(tokens: np.ndarray) -> set[bytes]:
    starts = [*np.flatnonzero(np.asarray(tokens) == Bytes.mark), len(tokens)]
    return {Bytes().decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)}


# ---- Corpora -------------------------------------------------------------------------------------


def test_library_source_is_split_by_path_without_tests_or_duplicates():
    documents = stdlib_documents()
    train, validation = dict(documents["train"]), dict(documents["validation"])
    assert not train.keys() & validation.keys()
    assert {"argparse.py", "json/decoder.py"} <= train.keys() | validation.keys()
    assert not any(SKIPPED & set(pathlib.PurePath(name).parts) for name in train | validation)
    texts = [*train.values(), *validation.values()]
    assert len(set(texts)) == len(texts)
    share = sum(map(len, validation.values())) / sum(map(len, texts))
    assert 0.02 < share < 0.12


def split(tmp_path: pathlib.Path, path: object, **fields: object) -> tuple[list[bytes], ...]:
    """The documents trained on and held out, in order, and the summary of a text."""
    data = load_data(settings(tmp_path, **{"path": str(path), "context": 1, **fields}))
    assert isinstance(data.tokenizer, Bytes)
    parts = data.train.tokens, data.validation.tokens
    marks = [[*np.flatnonzero(tokens == Bytes.mark), len(tokens)] for tokens in parts]
    documents = [
        [Bytes().decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(at)]
        for tokens, at in zip(parts, marks, strict=True)
    ]
    return documents[0], documents[1], data.summary


def folder(tmp_path: pathlib.Path, **texts: str | bytes) -> pathlib.Path:
    """A folder of these files; "__" in a name stands for "/"."""
    top = tmp_path / "texts"
    for name, text in texts.items():
        path = top / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return top


def test_a_files_tail_is_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(map(str, range(500))) + "\u00e9" * 100)
    (head,), (tail,), said = split(tmp_path, path, validation_fraction=0.05)
    assert head + tail == path.read_bytes()
    assert len(tail) == pytest.approx(0.05 * len(head + tail), abs=1)
    tail.decode()  # it was cut between characters
    assert re.match(r"text: train 1 document 1\.5 kB, validation 1 document 80 B, finger", said)


def test_a_folder_is_split_by_bytes_without_binaries_hidden_files_or_duplicates(tmp_path):
    chapters = {f"{i}_txt": make_text(8_000, i) for i in range(9)}
    others = {"copy_txt": chapters["3_txt"], "image_bin": b"\0\1\2", "_hidden": "secret"}
    top = folder(tmp_path, README="a short readme, 25 bytes\n", empty="", **chapters, **others)
    train, held_out, said = split(tmp_path, top)
    texts = {text.encode() for text in chapters.values()} | {b"a short readme, 25 bytes\n"}
    assert sum(map(len, train + held_out)) == sum(map(len, texts))
    assert sum(map(len, held_out)) == pytest.approx(0.1 * sum(map(len, texts)), rel=0.02)
    assert all(any(part in text for text in texts) for part in train + held_out)
    left = said.partition("left out: ")[2]
    for told in ("1 hidden (.hidden)", "1 binary (image.bin)", "1 empty (empty)", "1 duplicate ("):
        assert told in left


def test_many_documents_are_held_out_whole(tmp_path):
    texts = [make_text(300, i) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train, held_out, _ = split(tmp_path, tmp_path / "a.jsonl")
    assert sorted(train + held_out) == sorted(text.encode() for text in texts)
    assert 18 <= len(held_out) <= 20


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (["a__train_txt", "a__valid_txt", "a__test_txt"], {0}, {1}),
        (["wiki_train_tokens", "wiki_test_tokens"], {0}, {1}),
        (["train__a", "train__b", "val__c", "test__d"], {0, 1}, {2}),
        (["a_txt", "b_txt", "validation-00000-of-00001_txt"], {0, 1}, {2}),
    ],
)
def test_a_split_that_names_announce_is_respected(tmp_path, names, train, held_out):
    texts = [make_text(100, i) for i in range(len(names))]
    top = folder(tmp_path, **dict(zip(names, texts, strict=True)))
    trained, held, said = split(tmp_path, top)
    assert set(trained) == {texts[i].encode() for i in train}
    assert set(held) == {texts[i].encode() for i in held_out}
    assert "by name" in said
    assert ("of another split" in said) == (len(train | held_out) < len(names))


def test_names_that_announce_no_split_do_not_make_one(tmp_path):
    names = ["train_py", "test_py", "test__a_txt", "my-train-journey_txt"]
    top = folder(tmp_path, **{name: make_text(1000, i) for i, name in enumerate(names)})
    train, held_out, said = split(tmp_path, top)
    assert len(b"".join(held_out)) < 0.12 * len(b"".join(train))
    assert "by name" not in said


def test_a_held_out_text_of_ones_own(tmp_path):
    top = folder(tmp_path, a_txt=make_text(500, 1), val_txt=make_text(500, 2), b_txt=make_text(9))
    (tmp_path / "held.txt").write_text(make_text(300, 3) + "\0")
    where = {"validation_path": str(tmp_path / "held.txt")}
    train, held_out, said = split(tmp_path, top, **where)
    assert train == [make_text(500, 1).encode(), make_text(9).encode()]
    assert held_out == [(tmp_path / "held.txt").read_bytes()]
    assert "1 of another split (val.txt)" in said
    with pytest.raises(UserError, match=r"data.validation_path=.* does not exist"):
        split(tmp_path, top, validation_path="none")
    with pytest.raises(UserError, match=r"data.path=.* holds no text \(1 duplicate"):
        split(tmp_path, tmp_path / "held.txt", **where)


def test_what_a_run_has_written_is_never_its_text(tmp_path):
    top = folder(tmp_path, a_txt=make_text(500, 1), b_txt=make_text(500, 2))
    config = settings(tmp_path, path=str(top), cache_dir=str(top / "kept"))
    before = load_data(config).fingerprint
    (top / "run" / "checkpoints").mkdir(parents=True)
    (top / "run" / "config.json").write_text(base().to_json())
    (top / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    again = load_data(config)
    assert again.fingerprint == before
    assert re.search(r"2 made by a run \((kept|run), (run|kept)\)", again.summary)
    (top / "page").mkdir()
    page.write(top / "page", "index", "a page", [])
    (top / "study" / "records").mkdir(parents=True)
    (top / "study" / "changes.json").write_text("{}")
    (top / "export").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (top / "export" / name).write_text("{}")
    again = load_data(config)
    assert again.fingerprint == before
    assert "5 made by a run" in again.summary


def test_where_a_text_lies_is_free(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(make_text(500))
    monkeypatch.chdir(tmp_path)
    one, other = (
        load_data(settings(tmp_path, path=path)) for path in ("a.txt", str(tmp_path / "a.txt"))
    )
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("cache"))
    third = load_data(settings(tmp_path, path=str(tmp_path / "elsewhere")))
    assert one.fingerprint == other.fingerprint == third.fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "holds no text"),
        (lambda p: p.write_text(""), r"holds no text \(1 empty \(x\)\)"),
        (lambda p: p.write_bytes(b"\0"), r"holds no text \(1 binary \(x\)\)"),
    ],
)
def test_no_text_is_a_clear_error(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=f"data.path=.*{message}"):
        split(tmp_path, tmp_path / "x")


# ---- Kinds of files ------------------------------------------------------------------------------


def parquet(path: pathlib.Path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": texts, "id": [*range(len(texts))]}), path)


def arrow(path: pathlib.Path, texts: list[str]) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file:
        table = pa.table({"text": pa.array(texts)})
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)


def lines(path: pathlib.Path, texts: list[str]) -> None:
    rows = [json.dumps({"text": text, "n": 1}) for text in texts]
    path.write_text("\n".join([rows[0], "", *rows[1:], "{", "[]", '{"text": ""}', '{"t": 1}']))


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", lines), ("b.ndjson", lines), ("a.parquet", parquet), ("a-train.arrow", arrow)],
)
def test_rows_are_documents(tmp_path, name, write):
    texts = [f"row {i}: caf\u00e9 " + make_text(40, i) for i in range(20)]
    write(tmp_path / name, texts)
    train, held_out, said = split(tmp_path, tmp_path / name)
    assert b"".join(sorted(train + held_out)).count(b"row ") == 20
    if write is lines:
        assert "1 rows that are no JSON" in said
        assert "2 rows without data.text_column='text'" in said
        assert "1 empty rows" in said
    with pytest.raises(UserError, match=r"data.text_column='body'"):
        split(tmp_path, tmp_path / name, text_column="body")


def test_a_set_that_was_saved_to_disk_is_read_by_its_splits(tmp_path):
    texts = {"train": ["one text", "two text"], "test": ["three text"]}
    for split_name, rows in texts.items():
        (tmp_path / "set" / split_name).mkdir(parents=True)
        arrow(tmp_path / "set" / split_name / "data-00000-of-00001.arrow", rows)
        for name in ("state.json", "dataset_info.json"):
            (tmp_path / "set" / split_name / name).write_text('{"splits": {}}')
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    train, held_out, said = split(tmp_path, tmp_path / "set")
    assert (train, held_out) == ([b"one text", b"two text"], [b"three text"])
    assert "5 descriptions and caches of a set" in said


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_packed_files_are_read_as_what_is_packed(tmp_path, kind):
    module = pytest.importorskip({"gz": "gzip", "xz": "lzma", "zst": "zstandard"}.get(kind, kind))
    texts = [make_text(2000, i) for i in range(20)]
    rows = "\n".join(json.dumps({"text": text}) for text in texts)
    plain = {"a.jsonl": rows, "b.txt": "plain " + rows}
    for where in ("plain", "packed"):
        (tmp_path / where).mkdir()
    for name, text in plain.items():
        (tmp_path / "plain" / name).write_text(text)
        packed = module.compress(text.encode())
        (tmp_path / "packed" / f"{name}.{kind}").write_bytes(packed)
    one, other = (split(tmp_path, tmp_path / where) for where in ("plain", "packed"))
    assert one == other
    (tmp_path / "packed" / f"a.jsonl.{kind}").write_bytes(
        module.compress(rows.encode())[: len(rows) // 50]
    )
    _, _, said = split(tmp_path, tmp_path / "packed")
    assert "left out: 1 unreadable (a.jsonl" in said


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
def test_a_marked_encoding_is_read_as_text(tmp_path, encoding):
    text = make_text(300_000) + "na\u00efve \U0001f600"
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "a.txt").write_bytes(mark + text.encode(encoding))
    train, held_out, _ = split(tmp_path, tmp_path / "a.txt")
    assert b"".join(train + held_out).decode() == text


def test_a_pipe_is_read_to_its_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    text = make_text(200_000).encode()
    with subprocess.Popen(["sh", "-c", 'cat "$0" > "$1"', "/dev/stdin", tmp_path / "pipe"],
                          stdin=subprocess.PIPE) as writer:  # fmt: skip
        assert writer.stdin is not None
        feed = threading.Thread(target=lambda: (writer.stdin.write(text), writer.stdin.close()))
        feed.start()
        train, held_out, _ = split(tmp_path, tmp_path / "pipe")
        feed.join()
    assert b"".join(train + held_out) == text
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("header", [[], [20240520, 1]])
def test_shards_of_tokens_are_read(tmp_path, header):
    made = np.random.default_rng(0).integers(0, 300, 3000)

    def shard(tokens):
        first = np.zeros(256 * bool(header), "<i4")
        first[: 3 * bool(header)] = [*header, len(tokens)] if header else []
        return first.tobytes() + tokens.astype("<u2").tobytes()

    shards = {"train": made[:2000], "val": made[2000:]}
    top = folder(tmp_path, **{f"x-{n}-000001_bin": shard(t) for n, t in shards.items()})
    (top / "x-train-000002.bin").write_bytes(shard(made)[: -2 if header else -1])
    config = settings(tmp_path, path=str(top), tokenizer="tokens", vocab_size=300)
    data = load_data(config)
    np.testing.assert_array_equal(data.train.tokens, made[:2000])
    np.testing.assert_array_equal(data.validation.tokens, made[2000:])
    assert data.tokenizer.vocab == 300
    assert "left out: 1 cut short (x-train-000002.bin)" in data.summary
    assert data.tokenizer.decode([15, 7]) == b"15 7"
    np.testing.assert_array_equal(data.tokenizer.encode(b"15 7"), [15, 7])
    with pytest.raises(UserError, match=r"data.vocab_size=290: must be more than 29\d, a token of"):
        load_data(settings(tmp_path, path=str(top), tokenizer="tokens", vocab_size=290))
    alone = settings(tmp_path, path=str(top / "x-train-000001.bin"), tokenizer="tokens",
                     vocab_size=300)  # fmt: skip
    cut = load_data(alone)
    whole = np.concatenate([cut.train.tokens, cut.validation.tokens])
    np.testing.assert_array_equal(whole, made[:2000])
    assert len(cut.validation.tokens) == 200


def test_text_shorter_than_a_window_is_a_clear_error(tmp_path):
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(UserError, match=r"fewer than a window of data\.context=8"):
        load_data(settings(tmp_path, path=str(tmp_path / "a.txt")))


# ---- Tokens --------------------------------------------------------------------------------------


def test_documents_come_back_whole_and_the_cache_is_used(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [f"document {i}: " + make_text(100, i) for i in range(10)]
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    config = settings(tmp_path, path=str(folder), validation_fraction=0.2)
    tokens = load_data(config)
    assert document_set(tokens.train.tokens) | document_set(tokens.validation.tokens) == {
        t.encode() for t in texts
    }
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    again = load_data(config)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == made
    np.testing.assert_array_equal(again.train.tokens, tokens.train.tokens)
    (folder / "0.txt").write_text("changed " * 20)
    assert load_data(config).fingerprint != tokens.fingerprint


def test_bpe_gives_the_text_back_and_counts_its_bytes(tmp_path):
    text = make_text(20_000) + "naïve café — 数"
    (tmp_path / "a.txt").write_text(text)
    config = settings(tmp_path, path=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=300)
    tokens = load_data(config)
    tokenizer = tokens.tokenizer
    assert tokenizer.vocab == 300
    assert len(tokens.train.tokens) < 0.8 * len(text)
    sample = "group signal — é 数".encode()
    ids = tokenizer.encode(sample)
    assert tokenizer.decode(ids) == sample
    assert tokenizer.lengths[ids].sum() == len(sample)
    whole = [*tokens.train.tokens.tolist(), *tokens.validation.tokens.tolist()]
    assert tokenizer.decode(whole) == text.encode()
    assert tokenizer.lengths[whole].sum() == len(text.encode())
    spelt_out = b"a mark, <|document|>, in a text is text"
    assert tokenizer.mark not in tokenizer.encode(spelt_out)
    assert tokenizer.decode(tokenizer.encode(spelt_out)) == spelt_out


def test_bpe_wants_utf8_and_says_so(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 100)
    with pytest.raises(UserError, match=r"not UTF-8.*use 'bytes'"):
        load_data(settings(tmp_path, path=str(tmp_path / "latin.txt"), tokenizer="bpe"))


def test_a_shortened_token_cache_is_made_again(tmp_path):
    (tmp_path / "a.txt").write_text(make_text(5_000))
    config = settings(tmp_path, path=str(tmp_path / "a.txt"))
    before = np.array(load_data(config).train.tokens)
    (cached,) = (tmp_path / "cache").glob("tokens-*/train.bin")
    os.truncate(cached, cached.stat().st_size - 100)
    np.testing.assert_array_equal(load_data(config).train.tokens, before)


@pytest.fixture(scope="module")
def poems(tmp_path_factory):
    """The folder of a small TFDS set."""
    import tensorflow_datasets as tfds

    class Poems(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"poem": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(range(8)),
                "test": self._generate_examples(range(8, 10)),
            }

        def _generate_examples(self, numbers):
            for i in numbers:
                yield i, {"poem": f"poem {i} " * 5}

    home = tmp_path_factory.mktemp("tfds")
    Poems(data_dir=str(home), file_format="array_record").download_and_prepare()
    return home


def test_a_prepared_tfds_set_is_read_by_name(poems, tmp_path):
    where = {"tfds_name": "poems", "tfds_data_dir": str(poems), "validation_split": "test"}
    tokens = load_data(settings(tmp_path, **where, text_key="poem"))
    assert document_set(tokens.train.tokens) == {b"poem %d " % i * 5 for i in range(8)}
    assert document_set(tokens.validation.tokens) == {b"poem %d " % i * 5 for i in range(8, 10)}
    with pytest.raises(
        UserError, match=r"data.text_key='text' is no text feature of poems.*\['poem'\]"
    ):
        load_data(settings(tmp_path, **where))
    with pytest.raises(
        UserError, match=r"data.validation_split='validation': poems.* has \['test', 'train'\]"
    ):
        load_data(settings(tmp_path, **{**where, "validation_split": "validation"}))
    for name in ("lm1b", "no_such_set"):
        with pytest.raises(
            UserError, match=f"{name}.*not prepared as ArrayRecord.*there is no {name}"
        ):
            load_data(settings(tmp_path, tfds_name=name, tfds_data_dir=str(poems)))
    where["tfds_name"] = "poems:1.0.0"
    assert load_data(settings(tmp_path, **where, text_key="poem")).fingerprint == tokens.fingerprint


# ---- Building in the cache -----------------------------------------------------------------------


def _load(config: ConfigDict) -> str:
    return load_data(config).fingerprint


def test_many_processes_may_build_at_once(tmp_path):
    (tmp_path / "a.txt").write_text(make_text(5_000))
    config = settings(tmp_path, path=str(tmp_path / "a.txt"))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(_load, [config] * 3))) == 1
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")], (
        "nothing half-built stays"
    )


def test_a_build_that_is_killed_leaves_nothing_that_looks_whole(tmp_path):
    script = (
        "import pathlib, sys, time\n"
        "from ngc_jax.runtime.files import build_directory\n"
        "with build_directory(pathlib.Path(sys.argv[1]) / 'set') as d:\n"
        "    (d / 'part').write_text('half'); print('building', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"building\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "set").exists()
    with build_directory(tmp_path / "set") as directory:
        (directory / "part").write_text("whole")
    assert (tmp_path / "set" / "part").read_text() == "whole"


def test_a_build_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), build_directory(tmp_path / "set"):
        raise RuntimeError
    assert not os.listdir(tmp_path)


# ---- What is kept, and what strangers made -------------------------------------------------------


def test_a_cache_of_the_same_length_but_other_content_is_made_again(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(make_text(5_000))
    config = settings(tmp_path, path=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=300)
    first = load_data(config)
    before = np.array(first.train.tokens)
    for name in ("train.bin", "tokenizer.json", "meta.json", "SEAL.json"):
        (cached,) = (tmp_path / "cache").glob(f"tokens-*/{name}")
        raw = bytearray(cached.read_bytes())
        raw[len(raw) // 2] ^= 1
        cached.write_bytes(raw[:100] if name == "SEAL.json" else raw)
        again = load_data(config)
        np.testing.assert_array_equal(again.train.tokens, before)
        assert again.fingerprint == first.fingerprint
        assert re.search(r"tokens-bpe-\w+-300-\w+ is made again: .*\n", capsys.readouterr().out)
    load_data(config)
    assert capsys.readouterr().out == ""


def test_a_cache_file_is_read_for_its_checksum_once_in_each_state(tmp_path, monkeypatch):
    summed = []

    def sha256(path, found=cache.files.sha256):
        summed.append(path.name)
        return found(path)

    monkeypatch.setattr(cache.files, "sha256", sha256)
    made = lambda: cache.entry(tmp_path, "a", lambda home: (home / "x").write_text("x"))  # noqa: E731
    home = made()
    assert summed == ["x"]
    made()
    assert summed == ["x"]
    os.utime(home / "x", ns=(0, 0))
    made()
    made()
    assert summed == ["x", "x"]


@pytest.mark.parametrize("name", ["x/../../out", "..", ".hidden", "", "a b", "/a"])
def test_an_entry_of_a_cache_has_a_plain_name(tmp_path, name):
    with pytest.raises(UserError, match=r"must be letters and digits"):
        cache.entry(tmp_path / "cache", name, lambda home: None)
    assert not os.listdir(tmp_path)


def test_a_cache_is_private_and_one_that_others_write_to_is_not_used(tmp_path, capsys):
    home = cache.entry(tmp_path / "cache", "a", lambda home: (home / "x").touch())
    for folder in (home, home.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    home.chmod(0o777)
    (home / "theirs").touch()
    cache.entry(tmp_path / "cache", "a", lambda home: (home / "x").touch())
    assert "others may write to" in capsys.readouterr().out
    assert not (home / "theirs").exists()
    home.parent.chmod(0o777)
    with pytest.raises(UserError, match=r"data.cache_dir=.*others may write to .*chmod go-w it"):
        cache.entry(tmp_path / "cache", "a", lambda home: None)
    home.parent.chmod(0o1777)  # as /tmp: of a sticky directory one changes one's own alone
    cache.entry(tmp_path / "cache", "a", lambda home: None)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_cache_of_another_user_is_not_used(tmp_path, capsys):
    home = cache.entry(tmp_path / "cache", "a", lambda home: (home / "x").touch())
    os.chown(home, 12345, 12345)
    cache.entry(tmp_path / "cache", "a", lambda home: (home / "x").touch())
    assert "is made again: " in capsys.readouterr().out
    os.chown(home.parent, 12345, 12345)
    with pytest.raises(UserError, match=r"data.cache_dir=.*belongs to another user, number 12345"):
        cache.entry(tmp_path / "cache", "a", lambda home: None)


def test_a_cache_entry_that_is_a_link_is_replaced(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "keep").touch()
    (tmp_path / "cache").mkdir(0o700)
    (tmp_path / "cache" / "a").symlink_to(tmp_path / "outside")
    home = cache.entry(tmp_path / "cache", "a", lambda home: (home / "x").touch())
    assert not home.is_symlink()
    assert os.listdir(tmp_path / "outside") == ["keep"]


def test_a_deep_folder_is_read_and_a_link_out_of_it_is_refused_by_name(tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    (top / "first").write_text("first text")
    (top / "alias").symlink_to(top / "first")
    (top / "around").symlink_to(top)
    here = os.getcwd()
    os.chdir(top)
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    pathlib.Path("last").write_text("last text")
    os.chdir(here)
    train, held_out, said = split(tmp_path, top)
    assert sorted(b"".join(train + held_out).split(b" text")) == [b"", b"first", b"last"]
    assert "1 linked (around); 1 duplicate" in said
    subprocess.run(["rm", "-r", top / "d"], check=True)  # shutil recurses
    (tmp_path / "secret").write_text("secret")
    (top / "out").symlink_to(tmp_path / "secret")
    (top / "loop").symlink_to("loop")
    os.mkfifo(top / "pipe")
    train, held_out, said = split(tmp_path, top)
    assert b"".join(train + held_out) == b"first text"
    assert re.search(r"3 linked \(\w+, \w+, \w+\)", said)
    assert "1 neither files nor folders (pipe)" in said


@pytest.mark.skipif(os.getuid() == 0, reason="root reads all")
def test_a_file_or_folder_that_cannot_be_read_is_named(tmp_path):
    for name in ("file", "folder"):
        home = tmp_path / name
        home.mkdir()
        (home / "a").write_text("a text")
        locked = home / "locked"
        locked.mkdir() if name == "folder" else locked.write_text("b")
        locked.chmod(0)
        assert "1 unreadable (locked" in split(tmp_path, home)[2]
        locked.chmod(0o700)


@pytest.mark.parametrize(
    "name",
    ["huggingface:poems", "../tfds/poems", "poems/../poems", "mnist:1.0.0", "/poems", "a:b:c"],
)
def test_a_set_is_a_folder_and_no_place_on_the_network(poems, tmp_path, name, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)
    with pytest.raises(UserError, match=rf"data.tfds_name={name!r} is not prepared as ArrayRecord"):
        load_data(settings(tmp_path, tfds_name=name, tfds_data_dir=str(poems), text_key="poem"))


def test_a_set_runs_no_code_and_leads_nowhere_else(poems, tmp_path, monkeypatch):
    home = tmp_path / "tfds"
    shutil.copytree(poems, home)
    (tmp_path / "stranger.py").write_text("open('ran', 'w').close()\n")
    (tmp_path / "secret").write_text("secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = settings(
        tmp_path,
        tfds_name="poems",
        tfds_data_dir=str(home),
        text_key="poem",
        validation_split="test",
    )
    (folder,) = home.glob("poems/*")

    def refused(file, old, new):
        before = (folder / file).read_text()
        assert old in before
        (folder / file).write_text(before.replace(old, new))
        with pytest.raises(UserError) as error:
            load_data(config)
        (folder / file).write_text(before)
        return str(error.value)

    features = "tensorflow_datasets.core.features.text_feature.Text"
    assert "names code to import, 'stranger.X'" in refused("features.json", features, "stranger.X")
    assert not (tmp_path / "ran").exists()
    assert "a file elsewhere" in refused("features.json", '"poem"', '"../poem"')
    assert "a file elsewhere" in refused("dataset_info.json", "{DATASET}-", "../{DATASET}-")
    assert "a file elsewhere" in refused("dataset_info.json", '"train"', '"/../train"')
    assert "nested too deeply" in refused("features.json", "{}", "[" * 10**5)
    assert "not prepared" in refused("features.json", "{", "")
    assert "not prepared" in refused("dataset_info.json", '"splits": [', '"splits": [3,')
    (folder / "linked").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="linked is neither a file nor a directory"):
        load_data(config)
    (folder / "linked").unlink()
    load_data(config)


@pytest.mark.parametrize(
    "change",
    [
        lambda made: "",
        lambda made: "[" * 10**5,
        lambda made: "{}",
        lambda made: made.replace("<|document|>", "mark"),
        lambda made: made.replace('"merges":[', '"merges":["a zz",'),
        lambda made: made.replace('"merges":[', '"merges":[3,'),
        lambda made: made.replace('"!":1,', '"!":1000000000,'),
        lambda made: made.replace('"!":1,', '"\u2603":1,'),
    ],
)
def test_a_tokenizer_that_is_none_is_refused_in_a_line(tmp_path, change):
    made = BPE.train([make_text(2000)], 300)
    (tmp_path / "tokenizer.json").write_text(made)
    config = settings(tmp_path, tokenizer="bpe")
    assert load_tokenizer(tmp_path, config).vocab == 300
    assert change(made) != made
    (tmp_path / "tokenizer.json").write_text(change(made))
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read: "):
        load_tokenizer(tmp_path, config)


def test_of_a_tokenizer_tokens_and_merges_are_taken_and_nothing_else(tmp_path):
    made = json.loads(BPE.train([make_text(2000)], 300))
    theirs = {"type": "Prepend", "prepend": "stolen"}
    changed = BPE(json.dumps({**made, "normalizer": theirs, "post_processor": None}))
    sample = b"group signal <|document|>"
    np.testing.assert_array_equal(changed.encode(sample), BPE(json.dumps(made)).encode(sample))


@pytest.mark.parametrize(
    "kept", ['{"symbols": ["0", "1"]}', '{"symbols": 3}', "3", "[" * 10**5, ""]
)
def test_symbols_that_are_not_the_tasks_are_refused(tmp_path, kept):
    (tmp_path / "tokenizer.json").write_text(kept)
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read: "):
        load_tokenizer(tmp_path, settings(tmp_path, task="parity"))


def test_a_set_is_found_by_name_in_the_cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "sets"))
    texts = [f"row {i}: " + make_text(40, i) for i in range(20)]

    def copy(of, config, version, texts):
        home = tmp_path / "sets" / of / config / version / "0123"
        home.mkdir(parents=True)
        for part, own in (("train", texts[1:]), ("test", texts[:1])):
            arrow(home / f"tiny_tests-{part}.arrow", own)
        arrow(home / "cache-0123.arrow", ["made by a map"])
        (home / "dataset_info.json").write_text("{}")
        os.utime(home / "dataset_info.json", (int(version), int(version)))

    with pytest.raises(UserError, match=r"data.path='hf:org/TinyTests': must be loaded once"):
        split(tmp_path, "hf:org/TinyTests")
    copy("org___tiny_tests", "default", "1", texts)
    copy("org___tiny_tests", "default", "0", ["old", "texts"])
    train, held_out, said = split(tmp_path, "hf:org/TinyTests")
    assert train + held_out == [text.encode() for text in [*texts[1:], texts[0]]]
    assert "by name" in said
    assert "2 descriptions and caches of a set (" in said
    copy("org___tiny_tests", "other", "2", texts)
    with pytest.raises(UserError, match=r"one of \['org/tiny_tests/default', 'org/tiny_tests/oth"):
        split(tmp_path, "hf:org/TinyTests")
    assert split(tmp_path, "hf:org/TinyTests/other")[0] == train


# ---- Tokenizers of others ------------------------------------------------------------------------


def test_a_tokenizer_is_read_from_its_file_also_from_one_of_tiktoken(tmp_path):
    text = make_text(20_000) + " na\u00efve  \n\n x" * 9
    (tmp_path / "a.txt").write_text(text)
    own = BPE(BPE.train([text], 400))
    (tmp_path / "blob").write_text(own.serialised)
    (tmp_path / "tokenizer.json").symlink_to("blob")  # as in a cache of published models
    ranked = sorted(filter(None, own.spelling), key=lambda token: len(token) > 1)  # else as learned
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranked))
    (tmp_path / "r50k_base.tiktoken").write_text("".join(lines))
    for name, vocab in (("tokenizer.json", 400), ("r50k_base.tiktoken", 50257)):
        config = settings(tmp_path, path=str(tmp_path / "a.txt"), tokenizer="given",
                          tokenizer_path=str(tmp_path / name), vocab_size=vocab)  # fmt: skip
        data = load_data(config)
        made = [data.tokenizer.spelling[i] for i in data.tokenizer.encode(text.encode())]
        assert made == [own.spelling[i] for i in own.encode(text.encode())]
        assert data.train.tokens[0] == data.tokenizer.mark
        assert b"".join(made).decode() == text
    config.vocab_size = 399
    with pytest.raises(UserError, match=r"data.tokenizer_path=.* must be .* data.vocab_size=399"):
        load_data(config)
    shutil.copy(tmp_path / "r50k_base.tiktoken", tmp_path / "other.tiktoken")
    config.tokenizer_path = str(tmp_path / "other.tiktoken")
    with pytest.raises(UserError, match=r"must be one of tiktoken's: r50k_base"):
        load_data(config)


def test_special_tokens_are_one_token_where_they_are_spelt_out(tmp_path):
    turn = "<|user|>a group<|end|>"
    (tmp_path / "a.txt").write_text((make_text(2000) + turn) * 9)
    path, named = str(tmp_path / "a.txt"), "<|user|>,<|end|>"
    config = settings(tmp_path, path=path, tokenizer="bpe", vocab_size=300)
    plain = load_data(config)
    config.special_tokens = named
    learned = load_data(config)
    (tmp_path / "tokenizer.json").write_text(plain.tokenizer.serialised)
    file = str(tmp_path / "tokenizer.json")
    given = settings(tmp_path, path=path, tokenizer="given", tokenizer_path=file, vocab_size=301)
    given.special_tokens = "<a>,<b>,<c>"
    with pytest.raises(UserError, match=r"special_tokens=.<a>,<b>,<c>.* data.vocab_size=301"):
        load_data(given)
    given.vocab_size, given.special_tokens = 302, named
    taken = load_data(given)
    assert len({data.fingerprint for data in (plain, learned, taken)}) == 3
    (tmp_path / "kept").mkdir()
    for tokenizer in (learned.tokenizer, taken.tokenizer):
        save_tokenizer(tokenizer, tmp_path / "kept")
        again = load_tokenizer(tmp_path / "kept", config if tokenizer.vocab == 300 else given)
        for one in (tokenizer, again):
            tokens = one.encode(turn.encode()).tolist()
            assert [one.spelling[tokens[i]] for i in (0, -1)] == [b"<|user|>", b"<|end|>"]
            assert one.decode(tokens).decode() == turn
            assert one.lengths[tokens].sum() == len(turn)
    assert taken.tokenizer.encode(turn.encode())[0] >= 300
    assert load_data(given, tokenizer=taken.tokenizer).fingerprint == taken.fingerprint


# ---- Preparing much text -------------------------------------------------------------------------


def test_a_text_is_cut_where_no_word_is_changed():
    # runs of white space, also of other kinds, and characters of several bytes
    bits = ["word", " ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u3000", "\u2003 ", "na\u00efve"]
    bits += ["12", "!?"]
    draw = random.Random(0)
    text = "".join(draw.choice(bits) for _ in range(20_000))
    tokenizer = BPE(BPE.train([text[:5000]], 400))
    pieces = [text.encode()[i : i + 700] for i in range(0, len(text.encode()), 700)]
    cuts = [*sources.cut(pieces, 1000)]
    assert b"".join(cuts).decode() == text
    assert max(map(len, cuts)) <= 1000
    together = np.concatenate(tokenizer.encode_all(cuts))
    np.testing.assert_array_equal(together, tokenizer.encode(text.encode()))
    for none in ("a" * 5000, "\u00e9" * 5000, "line\n" * 1000):  # no such place
        cuts = [*sources.cut([none.encode()], 999)]
        assert "".join(cut.decode() for cut in cuts) == none
        assert max(map(len, cuts)) <= 999


def test_byte_pairs_of_one_long_word_are_learned_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("abcab" * 60_000)
    config = settings(tmp_path, path=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=300)
    data = load_data(config)
    assert max(data.tokenizer.lengths) <= 128
    whole = [*data.train.tokens.tolist(), *data.validation.tokens.tolist()]
    assert data.tokenizer.decode(whole) == b"abcab" * 60_000


def test_one_process_prepares_and_others_wait(tmp_path, capsys):
    built = []

    def build(home):
        built.append(home)
        time.sleep(0.2)
        (home / "x").write_text("x")

    make = lambda: cache.entry(tmp_path / "cache", "a", build)  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # a lock is of a file that is opened
        homes = [future.result() for future in [pool.submit(make) for _ in range(4)]]
    assert (len(built), set(homes)) == (1, {tmp_path / "cache" / "a"})
    assert "waiting for the process that makes" in capsys.readouterr().out
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_folder_that_another_process_removes_before_it_is_opened_is_made_again(
    tmp_path, monkeypatch
):
    made, make = [], cache.files.make_private

    def gone(folder):
        make(folder)
        made.append(folder)
        if made.count(folder) == 1 and folder.name == ".a.part":
            folder.rmdir()

    monkeypatch.setattr(cache.files, "make_private", gone)
    home = cache.entry(tmp_path / "cache", "a", lambda home: (home / "x").write_text("x"))
    assert (home / "x").read_text() == "x"
    assert made.count(tmp_path / "cache" / ".a.part") == 2


def test_nobody_helps_to_make_what_is_made(tmp_path, monkeypatch):
    home, helped = cache.entry(tmp_path, "a", lambda home: (home / "x").write_text("x")), []

    def held(handle, how):
        if how & fcntl.LOCK_NB:  # by one that found the entry made as it began to make it
            raise BlockingIOError

    monkeypatch.setattr(cache.fcntl, "flock", held)
    for expected in ([], [tmp_path / ".a.part"]):
        with cache._alone(tmp_path / ".a.part", home, helped.append):
            assert helped == expected
        cache.files.remove(home)


@pytest.mark.parametrize("damage", [False, True])
def test_a_preparation_that_is_killed_goes_on(tmp_path, monkeypatch, damage, capsys):
    monkeypatch.setattr(token_files, "BATCH", 1000)
    monkeypatch.setattr(token_files, "SAVED", -1)
    monkeypatch.setattr(sources, "PIECE", 500)
    (tmp_path / "a.txt").write_text(make_text(20_000))
    whole = settings(tmp_path, path=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "whole"))
    expected = np.array(load_data(whole).train.tokens)
    encoded, encode = [], Bytes.encode_all

    def killed(self, pieces):
        if len(encoded) == 7:
            raise KeyboardInterrupt
        encoded.append(pieces)
        return encode(self, pieces)

    monkeypatch.setattr(Bytes, "encode_all", killed)
    config = settings(tmp_path, path=str(tmp_path / "a.txt"))
    with pytest.raises(KeyboardInterrupt):
        load_data(config)
    (parts,) = (tmp_path / "cache").glob(".tokens-*.parts")
    bench = parts / "0"
    with open(bench / "train.bin", "ab") as file:
        file.write(b"written after the journal was")
    if damage:
        os.truncate(bench / "train.bin", 100)
    begun, encoded[:] = len(encoded), []
    monkeypatch.setattr(Bytes, "encode_all", lambda *of: encoded.append(1) or encode(*of))
    np.testing.assert_array_equal(load_data(config).train.tokens, expected)
    batches = -(-20_000 // 1000)
    assert 0 <= len(encoded) - (batches if damage else batches - begun) <= 2
    assert ("going on with the tokens" in capsys.readouterr().out) != damage
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("killed", [False, True])
def test_processes_share_a_preparation_and_its_tokens_are_those_of_one(
    tmp_path, monkeypatch, killed
):
    monkeypatch.setattr(token_files, "BATCH", 1000)
    monkeypatch.setattr(token_files, "PART", 2)
    monkeypatch.setattr(sources, "PIECE", 500)
    (tmp_path / "a.txt").write_text(make_text(20_000))
    one = settings(tmp_path, path=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "one"))
    expected, encode, who = np.array(load_data(one).train.tokens), Bytes.encode_all, list[int]()
    given = corpora.open_corpora(one, tmp_path), False, token_files.SPLITS
    batches, dead = len(list(token_files._batches(*given))), list[int]()

    def slowly(self, pieces):
        # The lock of a part is an open file's: threads stand for processes.
        who.append(threading.get_ident())
        if killed and not dead and len({*who}) == 3:
            dead.append(who[-1])
            raise KeyboardInterrupt  # in the middle of a part
        time.sleep(0.05)
        return encode(self, pieces)

    monkeypatch.setattr(Bytes, "encode_all", slowly)
    config = settings(tmp_path, path=str(tmp_path / "a.txt"))
    found = []

    def process():
        try:
            found.append(np.array(load_data(config).train.tokens))
        except KeyboardInterrupt:
            found.append(None)

    threads = [threading.Thread(target=process) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = [tokens for tokens in found if tokens is not None]
    assert len(whole) == 3 - killed
    for tokens in whole:
        np.testing.assert_array_equal(tokens, expected)
    assert len({*who}) == 3
    assert 0 <= len(who) - batches <= 2 * killed  # nobody makes what another one makes
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_process_that_comes_as_the_tokens_are_done_makes_none_of_them(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(make_text(2000))
    mixed = corpora.open_corpora(settings(tmp_path, path=str(tmp_path / "a.txt")), tmp_path)
    (building := tmp_path / ".tokens.part").mkdir()
    writer, helper = (token_files.TokenFiles(mixed, Bytes(), building) for _ in range(2))
    claimed, encode, encoded = token_files._claimed, Bytes.encode_all, []
    monkeypatch.setattr(Bytes, "encode_all", lambda *of: encoded.append(1) or encode(*of))

    def late(home):
        monkeypatch.setattr(token_files, "_claimed", claimed)
        writer.write()
        return claimed(home)

    monkeypatch.setattr(token_files, "_claimed", late)
    helper.help()
    assert len(encoded) == 1
    assert (building / "meta.json").exists()
    assert not helper.parts.exists()


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(make_text(2000))
    write = token_files.TokenFiles.write

    def late(*given):
        (tmp_path / "a.txt").write_text(make_text(2000, 1))
        write(*given)

    monkeypatch.setattr(token_files.TokenFiles, "write", late)
    with pytest.raises(UserError, match=r"a.txt has changed while it was read"):
        load_data(settings(tmp_path, path=str(tmp_path / "a.txt")))
    assert not list((tmp_path / "cache").glob(".*"))


# ---- Mixtures ------------------------------------------------------------------------------------


def mixture(tmp_path, weights="0.7,0.2,0.1", **fields):
    names = "abc"
    for i, name in enumerate(names):
        (tmp_path / f"{name}.txt").write_text(name * (400 + 300 * i))
    parts = zip(names, weights.split(","), strict=True)
    path = ",".join(f"{tmp_path / name}.txt:{weight}" for name, weight in parts)
    return load_data(settings(tmp_path, path=path, **fields))


def test_a_mixture_has_its_shares_in_every_step_and_is_a_function_of_the_step(tmp_path):
    data = mixture(tmp_path)
    options = {"batch_size": 10, "seed": 3, "start": 0, "stop": 30}
    whole = np.stack([b.inputs for b in train_batches(data.train, **options)])
    kinds = whole[:, :, -1]
    for step in range(1, 31):
        counts = [np.sum(kinds[:step] == ord(name)) for name in "abc"]
        np.testing.assert_allclose(counts, np.array([7, 2, 1]) * step, atol=2)
    later = [b.inputs for b in train_batches(data.train, **{**options, "start": 13})]
    np.testing.assert_array_equal(whole[13:], later)
    halves = [
        np.stack([b.inputs for b in train_batches(data.train, rows=rows, **options)])
        for rows in np.split(np.arange(10), 2)
    ]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)
    assert len(data.validation) == sum(map(len, data.validation.parts))
    seen = [b.inputs[real] for b, real in held_out_batches(data.validation, batch_size=4)]
    assert {chr(token) for token in np.unique(np.concatenate(seen)) if token < 256} == {*"abc"}
    assert re.match(r"0.7 of text: .*; 0.2 of text: .*; 0.1 of text: ", data.summary)


def test_a_held_out_text_of_a_mixture_counts_once_and_is_trained_on_in_no_part(tmp_path):
    (tmp_path / "held.txt").write_text("b" * 700)  # equal to one of the parts
    with pytest.raises(UserError, match=r"data.path='.*b.txt' holds no text \(1 duplicate"):
        mixture(tmp_path, validation_path=str(tmp_path / "held.txt"))
    (tmp_path / "held.txt").write_text("d" * 300)
    data = mixture(tmp_path, validation_path=str(tmp_path / "held.txt"))
    assert data.validation.tokens.tolist() == [Bytes.mark, *b"d" * 300]


def test_a_mixture_is_known_by_its_texts_and_shares(tmp_path):
    one, same, other = (
        mixture(tmp_path, weights).fingerprint for weights in ("0.7,0.2,0.1", "7,2,1", "7,2,2")
    )
    assert one == same != other
    with pytest.raises(UserError, match=r"data.path=.*: weights must be above 0"):
        mixture(tmp_path, "1,1,0")


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5), st.integers(0, 10**12))
def test_of_a_mixture_every_example_of_a_part_has_its_turn(weights, start):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    turns = [turn(n, shares) for n in range(start, start + 200)]
    for part, share in enumerate(shares):
        own = [index for of, index in turns if of == part]
        assert own == [*range(own[0], own[0] + len(own))] if own else True
        assert all(abs(i - share * (start + n)) < len(shares)
                   for n, (of, i) in enumerate(turns) if of == part)  # fmt: skip


# ---- Batches -------------------------------------------------------------------------------------


def take(**options):
    """What a run reads, [steps, rows, T]: a window of 8 tokens says where it begins."""
    windows = Windows(np.arange(8 * 37 + 1, dtype=np.uint16), 8)
    options = {"batch_size": 4, "seed": 3, "start": 0, "stop": 20, **options}
    batches = list(train_batches(windows, **options))
    for batch in batches:
        assert batch.segments is None
        np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
    return np.stack([batch.inputs for batch in batches])


def test_a_batch_is_a_function_of_seed_and_step():
    np.testing.assert_array_equal(take()[13:], take(start=13))
    assert not np.array_equal(take(), take(seed=4))


def test_each_epoch_is_another_permutation_of_all_windows():
    rows = take(stop=37)[:, :, 0].reshape(4, 37) // 8
    for epoch in rows:
        assert sorted(epoch) == list(range(37))
    assert not np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_same_global_batch(processes):
    parts = [take(rows=rows) for rows in np.split(np.arange(4), processes)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), take())


def test_windows_overlap_by_their_target_alone():
    windows = Windows(np.arange(25), 8)
    assert len(windows) == 3
    np.testing.assert_array_equal(windows[1].inputs, np.arange(8, 16))
    np.testing.assert_array_equal(windows[1].targets, np.arange(9, 17))


def test_documents_are_numbered_where_a_token_sees_its_own_alone(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(make_text(30, i))
    where = {"path": str(folder), "validation_fraction": 0.2}
    isolated = settings(tmp_path, isolate_documents=True, **where)
    marked = ord("e")  # as under iteration.rounds="marked": no token sees back across one
    for config, mark, boundary in (
        (settings(tmp_path, **where), None, None),
        (isolated, None, Bytes.mark),
        (settings(tmp_path, **where), marked, marked),
    ):
        assert segmented(config, mark) == (boundary is not None)
        data = load_data(config, mark)
        batches = train_batches(data.train, batch_size=4, seed=0, start=0, stop=5)
        held_out, most = held_out_batches(data.validation, batch_size=4), 0
        for batch in (*batches, *(batch for batch, _ in held_out)):
            if boundary is None:
                assert batch.segments is None
                continue
            here = np.cumsum(batch.inputs == boundary, axis=1)
            np.testing.assert_array_equal(batch.segments, here)
            most = max(most, here.max())
        assert (most > 0) == (boundary is not None)


@pytest.mark.parametrize("processes", [1, 2])
def test_held_out_windows_are_each_read_once(processes):
    windows = Windows(np.arange(8 * 10 + 1), 8)
    parts = [
        held_out_batches(windows, batch_size=4, rows=rows)
        for rows in np.split(np.arange(4), processes)
    ]
    seen = [batch.inputs[real, 0] // 8 for part in parts for batch, real in part]
    assert sorted(np.concatenate(seen)) == list(range(10))
    few = held_out_batches(windows, batch_size=4, limit=3)
    few = [batch.inputs[real, 0] // 8 for batch, real in few]
    np.testing.assert_array_equal(np.concatenate(few), [0, 4, 9])


@pytest.mark.parametrize("count", [17, 24, 25, 31])
def test_every_held_out_token_is_a_target_once(count):
    windows = Windows(np.arange(count), 8, boundary=3)
    batches = [*held_out_batches(filled(windows), batch_size=2)]
    targets = np.concatenate([batch.targets[real].ravel() for batch, real in batches])
    assert sorted(targets[targets != -1]) == [*range(1, count)]
    assert len(windows) == (count - 1) // 8  # where whole windows are wanted


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_documents_are_packed_as_one_after_another_where_the_least_room_is_left(lengths):
    room = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, left in enumerate(room) if left >= length]
        at = min(fits, key=room.__getitem__, default=len(room))
        room += [12] * (at == len(room))
        room[at] -= length
    bins = packing.best_fit(np.array(lengths), 12)
    assert sorted(12 - np.bincount(bins, lengths)) == sorted(room)


def test_packed_windows_hold_each_token_once_and_cut_no_document_that_fits(tmp_path):
    texts = [make_text(n, n) for n in (3, 5, 40, 31, 7, 12, 1, 22, 90, 26)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "b.txt").write_text(make_text(50))
    fields = {"path": str(tmp_path / "a.jsonl"), "validation_path": str(tmp_path / "b.txt")}
    config = settings(tmp_path, **fields, packing="best-fit", isolate_documents=True, context=32)
    data = load_data(config)
    documents, targets = [], []
    for i in range(len(data.train)):
        batch = data.train[i]
        for number in range(batch.segments.max() + 1):
            documents.append(batch.inputs[batch.segments == number].tolist())
        asked = batch.targets != -1
        targets += batch.targets[asked].tolist()
        inside = asked[:-1] & (np.diff(batch.segments) == 0)
        np.testing.assert_array_equal(batch.inputs[1:][inside], batch.targets[:-1][inside])
    whole = [[Bytes.mark, *text.encode()] for text in texts]
    cut = [text[i : i + 32] for text in whole for i in range(0, len(text), 32)]
    assert sorted(documents) == sorted(cut)
    assert sorted(targets) == sorted(b"".join(text.encode() for text in texts))
    assert len(data.train) < len(cut)
    assert isinstance(data.validation, Windows)
    config.isolate_documents = False
    assert load_data(config).train[0].segments is None


# ---- Tokens that are made when they are read -----------------------------------------------------


def written(tmp_path, **fields):
    """The data of a folder of three files, one of them with the mark of its encoding."""
    home = tmp_path / "texts"
    if not home.exists():
        home.mkdir()
        for i, size in enumerate((3000, 40, 9000)):
            text = make_text(size, i) + " na\u00efve \u2603\U0001f600" * 9
            mark = b"\xef\xbb\xbf" * (i == 2)
            (home / f"{i}.txt").write_bytes(mark + text.encode())
    return settings(tmp_path, path=str(home), **fields)


def test_unprepared_bytes_are_the_windows_of_the_prepared_text(tmp_path):
    config = written(tmp_path, isolate_documents=True)
    prepared = load_data(config)
    config.prepare = False
    made = load_data(config)
    assert len(made.train) == len(prepared.train) > 100
    for i in range(len(made.train)):
        for name in ("inputs", "targets", "segments"):
            both = [getattr(data.train[i], name) for data in (made, prepared)]
            np.testing.assert_array_equal(*both)
    assert made.fingerprint == prepared.fingerprint
    np.testing.assert_array_equal(made.validation.tokens, prepared.validation.tokens)
    assert not [*(tmp_path / "cache").glob("held-*/train.bin")]
    batches = [
        [*train_batches(made.train, batch_size=8, seed=3, start=0, stop=9, rows=rows)]
        for rows in (None, range(4), range(4, 8))
    ]  # of one process, and of two
    for whole, *parts in zip(*batches, strict=True):
        halves = np.concatenate([part.inputs for part in parts])
        np.testing.assert_array_equal(whole.inputs, halves)


def test_unprepared_byte_pairs_are_those_of_each_part_of_the_text(tmp_path):
    config = written(tmp_path, tokenizer="bpe", vocab_size=300)
    prepared, config.prepare = load_data(config), False
    made, own = load_data(config), prepared.tokenizer
    assert made.fingerprint != prepared.fingerprint
    # A plain reference: all bytes in a row, a document's mark as one of them.
    tokens = prepared.train.tokens
    starts = [*np.flatnonzero(tokens == own.mark), len(tokens)]
    row = []
    for a, b in itertools.pairwise(starts):
        row += [own.mark + 256, *own.decode(tokens[a + 1 : b].tolist())]
    step, kept = made.train.step, 0
    for i in range(len(made.train)):
        wanted, piece = [], []
        for one in [*row[i * step : (i + 1) * step], -1]:
            if one < 0 or one >= 256:
                text = bytes(piece).decode(errors="ignore")  # of characters, whole ones
                wanted += own.encode(text.encode()).tolist() + [own.mark] * (one >= 256)
                piece = []
            else:
                piece.append(one)
        batch, wanted = made.train[i], wanted[: config.context + 1]
        np.testing.assert_array_equal(batch.inputs[: len(wanted) - 1], wanted[:-1])
        asked = np.where(np.array(wanted[1:]) == own.mark, -1, wanted[1:])
        np.testing.assert_array_equal(batch.targets[: len(asked)], asked)
        assert (batch.targets[len(asked) :] == -1).all()
        kept += len(wanted) - 1
    assert kept > 0.85 * len(tokens)


def test_unprepared_text_that_cannot_be_read_in_places_is_refused(tmp_path):
    config = written(tmp_path, prepare=False)
    data = load_data(config)
    file = tmp_path / "texts" / "2.txt"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"2.txt has changed: must stay as it is"):
        [data.train[i] for i in range(len(data.train))]
    for name, raw in (("a.txt", "more text".encode("utf-16")), ("a.jsonl", b'{"text": "a"}\n' * 3)):
        (tmp_path / "texts" / name).write_bytes(raw)
        with pytest.raises(UserError, match=r"data.prepare=False: .*must be"):
            load_data(config)
        (tmp_path / "texts" / name).unlink()
