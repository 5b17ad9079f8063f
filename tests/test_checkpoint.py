"""Checkpoints: what is saved comes back to the bit, and nothing unsound is ever read."""

import hashlib
import json
import os
import pathlib
import random
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.runtime import files
from ngc_jax.runtime.checkpoint import MANIFEST, Checkpoints, Foreign, SaveFailed, digest
from ngc_jax.runtime.errors import UserError
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
    assert checkpoints.newest_sound() == 3
    for step in (1, 2, 3):
        read = checkpoints.restore(step, like(state(step)))
        assert digest(read.state) == digest(state(step))
        assert read.meta["seconds"] == float(step)
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
    assert checkpoints.newest_sound() == 2
    assert message in checkpoints.fault(3)
    assert checkpoints.fault(2) is None
    aside = checkpoints.set_aside(3)
    assert aside.is_dir()
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(3, state(3), {})  # the step can be made again
    checkpoints.wait()
    assert checkpoints.newest_sound() == 3
    assert digest(checkpoints.restore(3, like(state(3))).state) == digest(state(3))
    checkpoints.close()


def reseal(home, change):
    """Changes a checkpoint, or what its manifest says, and seals it as if it had been saved so."""
    manifest = json.loads((home / MANIFEST).read_text())
    manifest.pop("sha256", None)  # which one who reseals makes again
    change(home, manifest)
    manifest["files"] = {
        str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in home.rglob("*")
        if path.is_file() and path != home / MANIFEST
    }
    (home / MANIFEST).write_text(json.dumps(manifest))


def write(name, text):
    return lambda home, _: (home / name).write_text(text)


def pipe(home):
    os.mkfifo(home / "pipe")


def replaced(make):
    """The manifest in place of which `make` puts something."""
    return lambda home: ((home / MANIFEST).unlink(), make(home / MANIFEST))


def linked(home):
    home.rename(home.parent.parent / "elsewhere")
    home.symlink_to(home.parent.parent / "elsewhere")


def swapped(home):
    for old, new in (("3", "x"), ("2", "3"), ("x", "2")):
        (home.parent / old).rename(home.parent / new)


def as_step(step):
    """One checkpoint under another's name, whose manifest was made to say so."""

    def change(home):
        shutil.rmtree(home)
        shutil.copytree(home.parent / str(step), home)
        reseal(home, lambda _, manifest: manifest.update(step=3))

    return change


def sparse(home):
    with open(home / "large", "wb") as file:
        file.truncate(1 << 40)


DEEP = "[" * 200_000
CANNOT_COUNT = {
    "a copy of another step": (
        lambda home: (shutil.rmtree(home), shutil.copytree(home.parent / "2", home)),
        "it is checkpoint 2 under another name",
    ),
    "a copy that was sealed anew": (as_step(2), "its state is that after 2 updates"),
    "an old seal of another step": (
        lambda home: (as_step(1)(home), old_seal(home)),
        "its state is that after 1 updates",
    ),
    "an empty manifest": (lambda home: (home / MANIFEST).write_text("{}"), "no manifest"),
    "a list": (lambda home: (home / MANIFEST).write_text("[1]"), "no manifest"),
    "a number for the step": (
        lambda home: reseal(home, lambda _, m: m.update(step="3")),
        "step is '3'",
    ),
    "seconds that are none": (
        lambda home: reseal(home, lambda _, m: m["meta"].update(seconds=[])),
        "seconds is []",
    ),
    "batches beyond all": (
        lambda home: reseal(home, lambda _, m: m["meta"].update(passed=10**30)),
        "out of range",
    ),
    "an old seal with a list for what the run says": (
        lambda home: (
            old_seal(home),
            (home / "meta" / "metadata").write_text("[]"),
            (home / MANIFEST).write_text('{"meta/metadata": "0"}'),
        ),
        "meta is []",
    ),
    "brackets": (lambda home: (home / MANIFEST).write_text(DEEP), "cannot be read"),
    "UTF-16": (lambda home: (home / MANIFEST).write_text("{}", "utf-16"), "cannot be read"),
    "a name of control characters": (
        lambda home: (home / "\x1b[2J\n").write_text(""),
        r"\x1b[2J does not match its checksum",
    ),
    "invalid UTF-8": (lambda home: (home / MANIFEST).write_bytes(b"\xff"), "cannot be read"),
    "bad metadata": (
        lambda home: reseal(home, write("state/_METADATA", "{}")),
        "cannot be restored",
    ),
    "deep metadata": (
        lambda home: reseal(home, write("state/_METADATA", DEEP)),
        "cannot be restored",
    ),
    "bad arrays": (
        lambda home: reseal(home, write("state/manifest.ocdbt", "?")),
        "cannot be restored",
    ),
    "no state": (
        lambda home: reseal(home, lambda home, _: shutil.rmtree(home / "state")),
        "cannot be restored",
    ),
    "a second manifest": (lambda home: (home / "state" / MANIFEST).write_text("{}"), "checksum"),
    "a pipe": (pipe, "pipe is neither a file nor a directory"),
    "a pipe for the manifest": (replaced(os.mkfifo), "neither a file nor a directory"),
    "a device for the manifest": (
        replaced(lambda path: path.symlink_to("/dev/zero")),
        "neither a file nor a directory",
    ),
    "a link for a file": (
        lambda home: (home / "extra").symlink_to("/dev/zero"),
        "neither a file nor a directory",
    ),
    "a pipe in its place": (
        lambda home: (shutil.rmtree(home), os.mkfifo(home)),
        "it cannot be read",
    ),
    "a link": (linked, "it is a link"),
    "a file as large as a disk": (sparse, "it has 10995"),
}


def old_seal(home):
    """The manifest that versions before 0.2 wrote: {file: SHA-256}."""
    (home / "meta").mkdir()
    said = json.loads((home / MANIFEST).read_text())["meta"]
    (home / "meta" / "metadata").write_text(json.dumps(said))
    reseal(home, lambda *_: None)
    sums = json.loads((home / MANIFEST).read_text())["files"]
    (home / MANIFEST).write_text(json.dumps(sums))


@pytest.mark.parametrize("kind", CANNOT_COUNT)
def test_what_is_not_the_checkpoint_it_is_named_is_passed_over_and_set_aside(three, kind):
    change, message = CANNOT_COUNT[kind]
    change(three / "3")
    with Checkpoints(three) as checkpoints:
        read, faults = checkpoints.newest(like(state(3)))
        assert read.step == 2
        assert digest(read.state) == digest(state(2))
        assert message in faults[3]
        checkpoints.set_aside(3)
        assert checkpoints.steps() == [1, 2]


def test_two_that_were_swapped_are_both_refused(three):
    swapped(three / "3")
    with Checkpoints(three, read_only=True) as checkpoints:
        read, faults = checkpoints.newest(like(state(1)))
    assert read.step == 1
    assert faults == {
        3: "it is checkpoint 2 under another name",
        2: "it is checkpoint 3 under another name",
    }


def test_one_renamed_to_a_later_step_is_refused(three):
    (three / "2").rename(three / "400")
    with Checkpoints(three, read_only=True) as checkpoints:
        read, faults = checkpoints.newest(like(state(1)))
    assert (read.step, faults) == (3, {400: "it is checkpoint 2 under another name"})


def test_one_of_another_config_or_tree_is_passed_over_and_never_replaced_by_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, width in ((1, 8), (2, 9)):
            checkpoints.save(step, state(step), {"config": {"width": width, "rule": "dense"}})
            checkpoints.wait()
        read, faults = checkpoints.newest(like(state(1)), {"width": 8, "newer": 1})
        assert (read.step, faults) == (1, {2: "it is of another run: width was 9, is 8"})
        other = like({**state(1), "more": jnp.zeros(3)})
        with pytest.raises(Foreign, match=r"checkpoint 1: more is of shape None, not float32\[3\]"):
            checkpoints.newest(other)
        wider = like({**state(1), "step": jnp.zeros((), jnp.int16)})
        with pytest.raises(Foreign, match=r"step is of shape int32\[\], not int16\[\]"):
            checkpoints.restore(1, wider)


def test_a_manifest_says_what_the_checkpoint_is(three):
    manifest = json.loads((three / "3" / MANIFEST).read_text())
    assert manifest["step"] == 3
    assert manifest["tree"] == {
        "params/a": "float32[64, 32]",
        "params/b": "bfloat16[64, 32]",
        "step": "int32[]",
    }
    held = {str(p.relative_to(three / "3")) for p in (three / "3").rglob("*") if p.is_file()}
    assert manifest["files"].keys() == held - {MANIFEST}


def test_a_seal_that_is_not_read_back_is_a_save_that_failed(tmp_path, monkeypatch):
    state = {"a": jnp.ones(3)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
        checkpoints.wait()
        write = files.write_durably
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_durably", lambda path, text: write(path, text[:-1]))
            checkpoints.save(3, state, {})
            with pytest.raises(SaveFailed, match="checkpoint 3 could not be saved"):
                checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(4, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4]


def test_no_flipped_bit_of_a_manifest_is_accepted(three):
    manifest, chance = three / "3" / MANIFEST, random.Random(0)
    whole = manifest.read_bytes()
    with Checkpoints(three, read_only=True) as checkpoints:
        assert checkpoints.fault(3) is None
        for at in range(len(whole)):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << chance.randrange(8)
            manifest.write_bytes(flipped)
            assert checkpoints.fault(3), (at, bytes(flipped[at - 20 : at + 20]))


def test_a_seal_of_the_time_before_step_and_tree_were_sealed_still_holds(three):
    old_seal(three / "3")
    with Checkpoints(three, read_only=True) as checkpoints:
        read, faults = checkpoints.newest(like(state(3)), {"width": 8})
    assert (read.step, read.meta["seconds"], faults) == (3, 3.0, {})
    assert digest(read.state) == digest(state(3))


def test_no_link_leads_out_of_the_work_directory(three, tmp_path):
    outside = tmp_path / "outside"
    (outside / "3").mkdir(parents=True)
    (outside / "3" / "thesis.tex").write_text("years of work")
    (tmp_path / "damaged").symlink_to(outside)
    checkpoints = Checkpoints(three)
    with pytest.raises(OSError, match="damaged is a link, which is not followed"):
        checkpoints.set_aside(3)
    checkpoints.close()
    assert checkpoints.steps() == [1, 2, 3]
    (tmp_path / "linked").symlink_to(three)
    with pytest.raises(UserError, match="linked is a link, which is not followed"):
        Checkpoints(tmp_path / "linked")
    (tmp_path / "damaged").unlink()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "3").symlink_to(outside)
    Checkpoints(three).set_aside(3)
    assert (outside / "3" / "thesis.tex").exists()


def test_failed_saves_leave_no_thread_and_no_descriptor(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state(1), {})
    checkpoints.wait()
    home, here = tmp_path / "checkpoints", tmp_path / "moved"

    def fail():
        home.rename(here)
        home.write_text("a file where a directory was")
        with pytest.raises(SaveFailed, match="checkpoint 2 could not be saved"):
            checkpoints.save(2, state(2), {})
        home.unlink()
        here.rename(home)

    def held():
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    fail()
    before = held()
    for _ in range(5):
        fail()
    deadline = time.monotonic() + 10  # a thread that has been told to end still counts for a while
    while held()[0] > before[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(now <= then for now, then in zip(held(), before, strict=True))
    checkpoints.save(2, state(2), {})
    checkpoints.close()
    with Checkpoints(home, read_only=True) as again:
        assert again.newest_sound() == 2


def test_all_damaged_is_none(three):
    for step in (1, 2, 3):
        flip(three / str(step))
    checkpoints = Checkpoints(three)
    assert checkpoints.newest_sound() is None
    assert all(map(checkpoints.fault, (1, 2, 3)))
    checkpoints.close()


def test_reading_only_changes_nothing(three):
    flip(three / "3")
    (three / "7.orbax-checkpoint-tmp").mkdir()
    before = sorted(str(p) for p in three.rglob("*"))
    checkpoints = Checkpoints(three, read_only=True)
    assert checkpoints.newest_sound() == 2
    checkpoints.restore(2, like(state(2)))
    checkpoints.close()
    assert sorted(str(p) for p in three.rglob("*")) == before


def test_a_failed_save_is_raised(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def fail(path, text):
        raise OSError("disk full")

    monkeypatch.setattr("ngc_jax.runtime.files.write_durably", fail)
    checkpoints.save(1, state(1), {})
    with pytest.raises(OSError, match="disk full"):
        checkpoints.wait()
    checkpoints.check()  # and only once
    checkpoints.close()


def test_one_that_cannot_be_read_back_takes_no_older_ones_place(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1), {})
    checkpoints.save(2, state(2), {"passed": -1})  # which no checkpoint may say
    with pytest.raises(SaveFailed, match=r"checkpoint 2 could not be saved: .*passed=-1"):
        checkpoints.wait()
    assert checkpoints.newest_sound() == 1
    checkpoints.save(3, state(3), {})
    checkpoints.close()
    assert checkpoints.steps() == [3]


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
