"""Checkpoints: what is saved comes back to the bit, and nothing unsound is ever read."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.runtime.checkpoint import MANIFEST, Checkpoints, digest
from ngc_jax.runtime.files import build_directory, write_durably


def state(seed):
    normal = jax.random.normal(jax.random.key(seed), (64, 32))
    return {
        "step": jnp.asarray(seed, jnp.int32),
        "params": {"a": normal, "b": normal.astype(jnp.bfloat16)},
    }


def like(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), tree)


@pytest.fixture
def three(tmp_path):
    """A directory with sound checkpoints 1, 2 and 3."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"seconds": float(step)})
    checkpoints.close()
    return tmp_path / "checkpoints"


def data_file(home):
    return max((p for p in home.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(home):
    path = data_file(home)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(home):
    path = data_file(home)
    os.truncate(path, path.stat().st_size // 2)


def test_what_is_saved_comes_back_to_the_bit(three):
    checkpoints = Checkpoints(three)
    assert checkpoints.steps() == [1, 2, 3]
    assert checkpoints.newest_sound() == (3, {})
    for step in (1, 2, 3):
        read = checkpoints.restore(step, like(state(step)))
        assert digest(read.state) == digest(state(step))
        assert read.meta == {"seconds": float(step)}
    checkpoints.close()


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step, state(step), {})
    checkpoints.wait()
    assert checkpoints.steps() == [4, 5]
    checkpoints.close()


def test_saving_copies_before_the_state_is_donated(tmp_path):
    # The loop gives the state's buffers away right after saving; what is written must be what was
    # handed over.
    spoil = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0 - 1, tree), donate_argnums=0)
    big = {"a": jax.random.normal(jax.random.key(0), (1024, 1024))}
    before = digest(big)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, big, {})
    for _ in range(3):
        big = spoil(big)
    checkpoints.wait()
    assert digest(checkpoints.restore(1, like(big)).state) == before
    checkpoints.close()


DAMAGE = {
    "flipped bit": (flip, "does not match its checksum"),
    "truncated": (truncate, "does not match its checksum"),
    "missing file": (lambda home: data_file(home).unlink(), "is missing"),
    "added file": (lambda home: (home / "extra").write_text("x"), "extra does not match"),
    "never sealed": (lambda home: (home / MANIFEST).unlink(), "not sealed"),
    "broken seal": (lambda home: (home / MANIFEST).write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_passed_over(three, kind):
    damage, message = DAMAGE[kind]
    damage(three / "3")
    checkpoints = Checkpoints(three)
    newest, faults = checkpoints.newest_sound()
    assert newest == 2
    assert list(faults) == [3]
    assert message in faults[3]
    aside = checkpoints.set_aside(3)
    assert aside.is_dir()
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(3, state(30), {})  # the step can be made again
    checkpoints.wait()
    assert checkpoints.newest_sound() == (3, {})
    assert digest(checkpoints.restore(3, like(state(30))).state) == digest(state(30))
    checkpoints.close()


def test_all_damaged_is_none(three):
    for step in (1, 2, 3):
        flip(three / str(step))
    checkpoints = Checkpoints(three)
    newest, faults = checkpoints.newest_sound()
    assert newest is None
    assert set(faults) == {1, 2, 3}
    checkpoints.close()


def test_reading_only_changes_nothing(three):
    flip(three / "3")
    (three / "7.orbax-checkpoint-tmp").mkdir()
    before = sorted(str(p) for p in three.rglob("*"))
    checkpoints = Checkpoints(three, read_only=True)
    assert checkpoints.newest_sound()[0] == 2
    checkpoints.restore(2, like(state(2)))
    checkpoints.close()
    assert sorted(str(p) for p in three.rglob("*")) == before


def test_a_failed_save_is_raised(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def fail(path, text):
        raise OSError("disk full")

    monkeypatch.setattr("ngc_jax.runtime.checkpoint.write_durably", fail)
    checkpoints.save(1, state(1), {})
    with pytest.raises(OSError, match="disk full"):
        checkpoints.wait()
    checkpoints.check()  # and only once
    checkpoints.close()


def test_another_shape_is_refused(three):
    checkpoints = Checkpoints(three)
    wrong = like(
        {**state(3), "params": {"a": jnp.zeros((64, 31)), "b": jnp.zeros((64, 32), jnp.bfloat16)}}
    )
    with pytest.raises(ValueError, match="shape"):
        checkpoints.restore(3, wrong)
    checkpoints.close()


def test_digest_sees_values_types_shapes_and_names():
    tree = {"a": jnp.arange(6.0)}
    others = [
        {"a": jnp.arange(6.0).at[5].add(1e-6)},
        {"a": jnp.arange(6)},
        {"a": jnp.arange(6.0).reshape(2, 3)},
        {"b": jnp.arange(6.0)},
    ]
    assert digest(tree) == digest({"a": np.arange(6, dtype=np.float32)})
    assert len({digest(t) for t in [tree, *others]}) == 5


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "a.json"
    write_durably(path, json.dumps([1]))
    write_durably(path, json.dumps([2]))
    assert json.loads(path.read_text()) == [2]
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.fixture
def syncs(monkeypatch):
    """What is synced, and what exists under `home` then: [(path, names in home), ...]."""
    found, fsync = [], os.fsync

    def noted(handle):
        path = pathlib.Path(os.readlink(f"/proc/self/fd/{handle}"))
        found.append((path, sorted(os.listdir(path)) if path.is_dir() else None))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    return found


def test_a_written_file_has_its_name_on_disk(tmp_path, syncs):
    write_durably(tmp_path / "a.json", "1")
    assert syncs[-1] == (tmp_path, ["a.json"]), "the directory, after the rename"


def test_a_built_directory_has_its_name_on_disk(tmp_path, syncs):
    with build_directory(tmp_path / "built") as building:
        (building / "part").mkdir()
        (building / "part" / "a").write_text("1")
    assert syncs[-1] == (tmp_path, ["built"])
    assert (building / "part", ["a"]) in syncs


def test_a_sealed_checkpoint_has_its_name_on_disk(tmp_path, syncs):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {})
    checkpoints.close()
    assert (tmp_path, ["1"]) in syncs
