"""Corpora, tokens and batches: what is read, how it is split and kept, and that a batch is a
function of the step.
"""

import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_text
from ml_collections import ConfigDict

from ngc_jax.config import base
from ngc_jax.data.batches import Windows, held_out_batches, train_batches
from ngc_jax.data.corpus import SKIPPED, stdlib_documents, text_documents
from ngc_jax.data.tokens import Bytes, load_data, segmented
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


def test_a_prepared_tfds_set_is_read_by_name(tmp_path):
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

    Poems(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    where = {
        "tfds_name": "poems",
        "tfds_data_dir": str(tmp_path / "tfds"),
        "validation_split": "test",
    }
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
    with pytest.raises(UserError, match="ArrayRecord"):
        load_data(settings(tmp_path, tfds_name="lm1b", tfds_data_dir=str(tmp_path / "tfds")))
    with pytest.raises(UserError, match=r"no_such_set.*not a TFDS set"):
        load_data(settings(tmp_path, tfds_name="no_such_set"))


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
