"""A run whose work directory is a bucket: Google's storage as `gcp-storage-emulator` plays it on
this machine.
"""

import contextlib
import signal
import socket
import sys

import jax
import pytest
from conftest import TINY
from etils import epath

from experiments.chaos import outcome
from ngc_jax.config import base
from ngc_jax.runtime.checkpoint import Checkpoints
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import Log, inside
from ngc_jax.runtime.metrics import Progress, read_rows
from ngc_jax.training import loop as train
from ngc_jax.training.workdir import claim

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = free.getsockname()[1]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # for gcsfs, and for what Orbax writes with
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://127.0.0.1:{PORT}")
        # it would ask what kind of bucket this is
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        from gcp_storage_emulator.exceptions import NotFound
        from gcp_storage_emulator.handlers import objects

        download = objects.download

        def say_generation(request, response, storage, *args, **kwargs):
            """Google says which version of an object one has got, and TensorStore asks for it; the
            emulator forgets.
            """
            with contextlib.suppress(NotFound):
                found = storage.get_file_obj(
                    request.params["bucket_name"], request.params["object_id"]
                )
                response["x-goog-generation"] = found["generation"]
            download(request, response, storage, *args, **kwargs)

        patch.setattr(objects, "download", say_generation)
        from gcp_storage_emulator.server import create_server

        server = create_server("127.0.0.1", PORT, in_memory=True, default_bucket="ngc-runs")
        server.start()
        yield epath.Path("gs://ngc-runs")
        server.stop()


@pytest.fixture
def brief(text, cache):
    config = base()
    fields = {
        "model.rule": "dense",
        "model.core": 0,
        "model.prelude": 1,
        "train.steps": 12,
        "stability.every": 0,
    }
    config.update_from_flattened_dict({**TINY, **fields, "eval.every": 6})
    config.data.path, config.data.cache_dir = str(text), str(cache)
    return config


def test_a_run_in_a_bucket_is_stopped_and_ends_as_on_a_disk(
    bucket, brief, tmp_path, monkeypatch, capsys
):
    assert train.run(brief, tmp_path / "run")
    run, show = bucket / "run", Progress.show
    with monkeypatch.context() as patch:
        patch.setattr(
            Progress,
            "show",
            lambda self, *row: (show(self, *row), signal.raise_signal(signal.SIGTERM)),
        )
        assert train.run(brief, run) is False
    stopped = int(max(path.name for path in (run / "checkpoints").iterdir()))
    assert [row["step"] for row in read_rows(run)] == list(range(1, stopped + 1))

    # A save of step 5 that was killed, by more processes say: its parts must not be taken for parts
    # of the next one.
    stale = run / "checkpoints" / "5" / "state" / "ocdbt.process_7" / "manifest.ocdbt"
    stale.write_text("half")
    assert train.run(brief, run)
    assert outcome(run) == outcome(tmp_path / "run")
    assert not stale.exists()
    assert "NOT SAVED" not in capsys.readouterr().out


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(bucket):
    checkpoints, state = (
        Checkpoints(bucket / "alone" / "checkpoints"),
        {"a": jax.numpy.arange(1000.0)},
    )
    for step in (1, 2):
        checkpoints.save(step, state, {})
    checkpoints.wait()
    largest = max(inside(checkpoints.directory / "2").values(), key=lambda path: path.stat().length)
    largest.write_bytes(bytes(reversed(largest.read_bytes())))
    assert checkpoints.newest_sound() == 1
    assert checkpoints.set_aside(2) == bucket / "alone" / "damaged" / "2"
    assert checkpoints.steps() == [1]
    assert any(inside(bucket / "alone" / "damaged" / "2"))
    checkpoints.close()


def test_rows_in_a_bucket_are_there_after_a_sync(bucket):
    log = Log(bucket / "rows", "1\n")
    log.add("2\n")
    assert (bucket / "rows").read_text() == "1\n"
    log.sync()
    assert (bucket / "rows").read_text() == "1\n2\n"
    log.close()


def test_a_bucket_without_its_package_is_a_clear_error(brief, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"--workdir=s3://somewhere cannot be written \(.*s3fs"):
        claim(epath.Path("s3://somewhere"), brief, None)
