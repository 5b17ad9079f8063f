"""Corpora, tokens and batches: what is read, how it is split and kept, and that a batch is a
function of the step.
"""

import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_text
from ml_collections import ConfigDict

from ngc_jax.config import base
from ngc_jax.data import cache
from ngc_jax.data.batches import Windows, held_out_batches, train_batches
from ngc_jax.data.corpus import SKIPPED, stdlib_documents, text_documents
from ngc_jax.data.tokens import BPE, Bytes, load_data, load_tokenizer, segmented
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


def test_a_files_tail_is_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(map(str, range(500))))
    documents = text_documents(path, 0.1)
    (_, head), (_, tail) = documents["train"][0], documents["validation"][0]
    assert head + tail == path.read_bytes()
    assert len(tail) == pytest.approx(0.1 * len(head + tail), abs=1)


def test_a_folder_is_split_by_file_without_binaries_hidden_files_or_duplicates(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 10)
    (tmp_path / "copy.txt").write_text("text 3 " * 10)
    (tmp_path / "image.bin").write_bytes(b"\0\1\2")
    (tmp_path / ".hidden").write_text("secret")
    documents = text_documents(tmp_path, 0.1)
    names = [name for texts in documents.values() for name, _ in texts]
    assert len(names) == 20
    assert not {"image.bin", ".hidden"} & set(names)
    assert len(documents["validation"]) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "holds no text"),
        (lambda p: p.write_text(""), "holds no text"),
        (lambda p: p.write_bytes(b"\0"), "holds no text"),
    ],
)
def test_no_text_is_a_clear_error(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=f"data.path=.*{message}"):
        text_documents(tmp_path / "x", 0.1)


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
        assert re.search(r"tokens-bpe-300-\w+ is made again: .*\n", capsys.readouterr().out)
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
    documents = text_documents(top, 0.5)
    names = [name for texts in documents.values() for name, _ in texts]
    assert sorted(names) == ["alias", "d/" * 1500 + "last"]
    subprocess.run(["rm", "-r", top / "d"], check=True)  # shutil recurses
    (tmp_path / "secret").write_text("secret")
    (top / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(
        UserError, match=r"data.path=.* cannot be read: .*/out is a link that leads"
    ):
        text_documents(top, 0.5)
    (top / "out").unlink()
    (top / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"data.path=.* cannot be read: .*/loop"):
        text_documents(top, 0.5)


@pytest.mark.skipif(os.getuid() == 0, reason="root reads all")
def test_a_file_or_folder_that_cannot_be_read_is_named(tmp_path):
    for name in ("file", "folder"):
        home = tmp_path / name
        home.mkdir()
        (home / "a").write_text("a")
        locked = home / "locked"
        locked.mkdir() if name == "folder" else locked.write_text("b")
        locked.chmod(0)
        with pytest.raises(UserError, match=r"data.path=.* cannot be read: .*/locked"):
            text_documents(home, 0.5)
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
    made = BPE.train([make_text(2000).encode()], 300)
    (tmp_path / "tokenizer.json").write_text(made)
    config = settings(tmp_path, tokenizer="bpe")
    assert load_tokenizer(tmp_path, config).vocab == 300
    assert change(made) != made
    (tmp_path / "tokenizer.json").write_text(change(made))
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read: "):
        load_tokenizer(tmp_path, config)


def test_of_a_tokenizer_tokens_and_merges_are_taken_and_nothing_else(tmp_path):
    made = json.loads(BPE.train([make_text(2000).encode()], 300))
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
