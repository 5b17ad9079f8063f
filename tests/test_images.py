"""Images: the same arrays from every kind of file, faults by name, and changes that follow from
seed and step.
"""

import gzip
import importlib.metadata
import io
import json

import numpy as np
import pytest
from PIL import Image

from ngc_jax.config import base, validate
from ngc_jax.data import stored
from ngc_jax.data.batches import Batch, train_batches
from ngc_jax.data.image_files import Part
from ngc_jax.data.images import Images, Variation, Varied, load_images, moments, resampled
from ngc_jax.data.tokenizer import Labels, load_tokenizer, save_tokenizer
from ngc_jax.data.tokens import load_data
from ngc_jax.runtime.errors import UserError

DRAW = np.random.default_rng(0)
PIXELS, CLASSES = DRAW.integers(0, 256, (12, 8, 8), np.uint8), np.arange(12) % 3
COLOURED = DRAW.integers(0, 256, (4, 32, 32, 3), np.uint8)
SPLIT = {"train": slice(0, 8), "test": slice(8, None)}
NAMES = {"train": "train", "test": "t10k"}


def data(path="", **fields):
    config = base().data
    config.kind, config.path = "images", str(path)
    config.update(fields)
    return config


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def as_idx(home, packed=False):
    for part, rows in SPLIT.items():
        for role, array in (("images-idx3", PIXELS), ("labels-idx1", CLASSES)):
            raw, name = idx(array[rows]), f"{NAMES[part]}-{role}-ubyte"
            (home / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)


def as_arrays(home):
    both = {f"x_{part}": PIXELS[rows] for part, rows in SPLIT.items()}
    return both | {f"y_{part}": CLASSES[rows] for part, rows in SPLIT.items()}


def as_npy(home):
    for name, array in as_arrays(home).items():
        np.save(home / f"{name}.npy", array)


def as_folders(home):
    for part, rows in SPLIT.items():
        for number in range(*rows.indices(len(PIXELS))):
            place = home / part / str(CLASSES[number])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS[number]).save(place / f"{number:02}.png")


@pytest.mark.parametrize(
    "write", [as_idx, lambda home: as_idx(home, packed=True), as_npy, as_folders]
)
def test_files_of_all_kinds_hold_the_same_images(write, tmp_path):
    write(tmp_path)
    np.savez(tmp_path.parent / "held.npz", **as_arrays(tmp_path))
    wanted = load_images(data(tmp_path.parent / "held.npz"))
    labels, train, held, _, told = load_images(data(tmp_path))
    assert labels.symbols == ("0", "1", "2")
    assert "train 8, validation 4 images of 8 x 8 x 1 (its part 'test'), 3 classes" in told
    for one, other, rows in ((train, wanted[1], SPLIT["train"]), (held, wanted[2], SPLIT["test"])):
        order = np.lexsort(one.part.pixels.reshape(len(one), -1).T)  # folders go class by class
        same = np.lexsort(other.part.pixels.reshape(len(one), -1).T)
        np.testing.assert_array_equal(one.part.pixels[order], other.part.pixels[same])
        np.testing.assert_array_equal(one.part.labels[order], other.part.labels[same])
        np.testing.assert_array_equal(other.part.pixels[..., 0], PIXELS[rows])
    if write is not as_folders:
        assert load_images(data(tmp_path))[3] == wanted[3], "the fingerprint is of the images"


def test_cifar_has_planes_of_colours_behind_its_classes(tmp_path):
    planes = COLOURED.transpose(0, 3, 1, 2).reshape(4, -1)
    for name, rows in (("data_batch_1", slice(0, 2)), ("test_batch", slice(2, 4))):
        raw = np.hstack([np.array([[1], [0]], np.uint8), planes[rows]])
        (tmp_path / f"{name}.bin").write_bytes(raw.tobytes())
    (tmp_path / "batches.meta.txt").write_text("cat\ndog\n\n")
    labels, train, held, *_ = load_images(data(tmp_path, image_size=32, colours=3))
    assert labels.symbols == ("cat", "dog")
    np.testing.assert_array_equal(np.concatenate([train.part.pixels, held.part.pixels]), COLOURED)
    assert train.part.labels.tolist() == held.part.labels.tolist() == [1, 0]
    (tmp_path / "test_batch.bin").write_bytes(raw.tobytes()[:-1])
    with pytest.raises(UserError, match=r"test_batch.bin is cut off"):
        load_images(data(tmp_path, image_size=32, colours=3))


def test_a_prepared_set_is_read_by_name(tmp_path):
    def features(kind):
        return {
            "image": kind.Image(shape=(8, 8, 1)),
            "label": kind.ClassLabel(names=["a", "b", "c"]),
        }

    def png(pixels):
        Image.fromarray(pixels).save(made := io.BytesIO(), "PNG")
        made.seek(0)
        return made

    def rows(part):
        of = zip(PIXELS[SPLIT[part]], CLASSES[SPLIT[part]], strict=True)
        return [(str(i), {"image": png(x), "label": int(y)}) for i, (x, y) in enumerate(of)]

    stored.write("shapes", features, {part: rows(part) for part in SPLIT}, tmp_path)
    config = data(tfds_name="shapes", tfds_data_dir=str(tmp_path), validation_split="test")
    labels, train, held, *_ = load_images(config)
    assert (labels.symbols, len(train), len(held)) == (("a", "b", "c"), 8, 4)
    kept = {x.tobytes(): y for x, y in zip(PIXELS, CLASSES, strict=True)}
    assert all(kept[x.tobytes()] == y for x, y in zip(*train.part, strict=True))
    config.validation_split = "valid"
    with pytest.raises(UserError, match=r"data.validation_split='valid' splits of it \(.*valid"):
        load_images(config)


def test_faults_are_named_and_counted(tmp_path):
    as_folders(tmp_path)
    home = tmp_path / "train" / "0"
    whole = (home / "00.png").read_bytes()
    (home / "cut.png").write_bytes(whole[: len(whole) // 2])
    (home / "none.png").write_bytes(b"")
    (home / "notes.txt").write_text("no image")
    (home / "out.png").symlink_to(tmp_path.parent / "elsewhere.png")
    Image.fromarray(PIXELS[0].astype(np.uint16) * 257).save(home / "wide.png")
    Image.fromarray(np.repeat(PIXELS[:1, ..., None], 3, -1)[0]).save(home / "colour.png")
    _, train, _, _, told = load_images(data(tmp_path))
    assert "2 damaged, left out (cut.png, notes.txt)" in told
    assert "1 empty, left out (none.png)" in told
    assert "1 of 16 bits made bytes" in told
    assert "1 links that lead out, left out (out.png)" in told
    assert len(train) == 10
    alike = (train.part.pixels[..., 0] == PIXELS[0]).all(axis=(1, 2))
    assert alike.sum() == 3, "as a byte, in 16 bits, and in colours"
    Image.fromarray(np.zeros((6, 9), np.uint8)).save(home / "odd.png")
    with pytest.raises(UserError, match=r"odd.png: 1 of 9 x 6 pixels must be 8 x 8"):
        load_images(data(tmp_path))
    assert "1 scaled to 8 x 8" in load_images(data(tmp_path, resize=True))[4]


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"x": PIXELS}, r"labels : float64 \[0\] must be 12 whole numbers"),
        ({"images": PIXELS, "labels": CLASSES[:3]}, r"int64 \[3\] must be 12 whole numbers"),
        ({"images": PIXELS, "labels": CLASSES - 1}, "must be 12 whole numbers from 0 on"),
        ({"images": PIXELS[:0], "labels": CLASSES[:0]}, r"shape \[0, 8, 8, 1\]"),
        ({"images": PIXELS * -1.0, "labels": CLASSES}, "brightness from -255 to -?0 must be"),
        ({"images": np.full((12, 8, 8), np.nan), "labels": CLASSES}, "brightness from nan to nan"),
        ({"pictures": PIXELS}, "has arrays pictures: must have names such as x_train"),
        ({"x": PIXELS[:, :7, :7], "y": CLASSES}, "give data.image_size=7, or data.resize=True"),
        ({"x_test": PIXELS, "y_test": CLASSES}, "has test alone"),
    ],
)
def test_arrays_that_are_no_images_are_refused(arrays, fault, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=fault):
        load_images(data(tmp_path / "a.npz"))


def test_damaged_files_of_arrays_are_named(tmp_path):
    as_idx(tmp_path, packed=True)
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=CLASSES)
    for name in ("a.npz", "train-images-idx3-ubyte.gz"):
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[:-40])
        place = file if name == "a.npz" else tmp_path
        with pytest.raises(UserError, match=r"the images of '.*' cannot be read: "):
            load_images(data(place))
    with pytest.raises(UserError, match=r"the images of '.*nowhere' cannot be read: .*No such"):
        load_images(data(tmp_path / "nowhere"))


def test_brightness_of_any_type_becomes_bytes(tmp_path):
    types = {"float": PIXELS / 255, "bits": PIXELS.astype(np.uint16) * 257, "ints": PIXELS * 1}
    for name, images in types.items():
        np.savez(tmp_path / f"{name}.npz", images=images, labels=CLASSES)
        _, train, held, *_ = load_images(data(tmp_path / f"{name}.npz"))
        both = {x.tobytes() for one in (train, held) for x in one.part.pixels}
        assert both == {x.tobytes() for x in PIXELS}, name


def test_held_out_by_seed_and_normalised_by_the_rest(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=CLASSES)
    fields = {"path": str(tmp_path / "a.npz"), "validation_fraction": 0.25}
    splits = [load_images(data(**fields, split_seed=seed))[1:3] for seed in (0, 0, 1)]
    first, again, other = ([x.part.pixels.tobytes() for x in split] for split in splits)
    assert first == again != other
    train, held = splits[0]
    assert (len(train), len(held)) == (9, 3)
    inputs = np.stack([train[i].inputs for i in range(9)])
    np.testing.assert_allclose((inputs.mean(), inputs.std()), (0, 1), atol=1e-6)
    levels = np.stack([train.part.pixels]) / 255
    np.testing.assert_allclose(moments(train.part.pixels), [[levels.mean()], [levels.std()]])
    given = data(**fields, validation_path=fields["path"])
    assert len(load_images(given)[2]) == 12


def test_labels_are_kept_with_a_run(tmp_path):
    labels = Labels(["a", "b"], [0.25], [0.5])
    save_tokenizer(labels, tmp_path)
    again = load_tokenizer(tmp_path, data())
    assert (again.symbols, again.serialised) == (("a", "b"), labels.serialised)
    np.testing.assert_array_equal(again.normalise(PIXELS[..., None]).shape, (12, 8, 8, 1))
    told = json.loads(labels.serialised)
    for spoilt in ([], told | {"spread": [0.0]}, told | {"mean": [0, 0]}, told | {"classes": [1]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(spoilt))
        with pytest.raises(UserError, match=r"tokenizer.json cannot be read"):
            load_tokenizer(tmp_path, data())


# ---- What training changes -----------------------------------------------------------------------


def varied(**how):
    return Varied(Part(PIXELS[..., None], CLASSES.astype(np.int32)), LABELS, Variation(**how))


LABELS = Labels("012", [0.5], [0.25])
ALL = {"flip": True, "shift": 2, "crop": 0.7, "cutout": 3, "mixup": 0.4}


def test_a_batch_follows_from_seed_and_step():
    how = {"batch_size": 5, "seed": 3}
    whole = [*train_batches(varied(**ALL), start=0, stop=6, **how)]
    later = [*train_batches(varied(**ALL), start=4, stop=6, **how)]
    rows = [*train_batches(varied(**ALL), start=0, stop=6, rows=[1, 4], **how)]
    for a, b in zip(whole[4:], later, strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
        np.testing.assert_array_equal(a.targets, b.targets)
    for a, b in zip(whole, rows, strict=True):
        np.testing.assert_array_equal(a.inputs[[1, 4]], b.inputs)
    other = next(train_batches(varied(**ALL), start=0, stop=6, **how | {"seed": 4}))
    assert not np.array_equal(whole[0].inputs, other.inputs)
    plain = [*train_batches(varied(shift=1), start=0, stop=24, batch_size=1, seed=3)]
    of = {tuple(PIXELS[i].ravel()): set() for i in range(12)}
    for one in plain:  # an image is another one in the next epoch
        of.setdefault(int(one.targets[0, 0]), set()).add(one.inputs.tobytes())
    assert all(len(of[c]) > 4 for c in range(3))


def test_changes_are_what_they_are_called():
    x = LABELS.normalise(PIXELS[0][..., None])
    black = LABELS.normalise(np.zeros(1, np.uint8))
    moved = resampled(x, np.array([2, -1]), 8, False, black)
    np.testing.assert_allclose(moved[:6, 1:], x[2:, :7], atol=1e-6)
    np.testing.assert_allclose(moved[6:], np.broadcast_to(black, (2, 8, 1)), atol=1e-6)
    np.testing.assert_allclose(resampled(x, np.zeros(2), 8, True, black), x[:, ::-1], atol=1e-6)
    half = resampled(x, np.array([2, 2]), 4, False, black)
    at = np.clip(2 + (np.arange(8) + 0.5) / 2 - 0.5, 0, 7)
    low = np.floor(at).astype(int)
    weights = np.zeros((8, 8))
    np.add.at(weights, (np.arange(8), low), 1 - (at - low))
    np.add.at(weights, (np.arange(8), np.minimum(low + 1, 7)), at - low)
    np.testing.assert_allclose(half[..., 0], weights @ x[..., 0] @ weights.T, atol=1e-5)
    rng = np.random.default_rng(0)
    hole = varied(cutout=4).vary(Batch(x, np.array([0])), rng).inputs
    gone = (hole == 0) & (x != 0)
    assert 4 <= gone.sum() <= 16
    np.testing.assert_array_equal(hole[~gone], x[~gone])


def test_mixup_draws_the_target_by_its_share():
    rng, shares, chosen = np.random.default_rng(0), [], []
    two = Part(
        np.stack([np.zeros((8, 8, 1)), np.full((8, 8, 1), 255)]).astype(np.uint8),
        np.array([0, 1], np.int32),
    )
    black, mixed = Images(two, LABELS)[0], Varied(two, LABELS, Variation(mixup=1.0))
    for _ in range(2000):
        made = mixed.vary(black, rng)
        white = (made.inputs[0, 0, 0] + 2) / 4  # from -2 to 2
        shares.append(white)
        chosen.append(made.targets[0])
    shares, chosen = np.array(shares), np.array(chosen)
    assert np.mean(shares) == pytest.approx(0.25, abs=0.02), "half of the partners are black too"
    for low in (0.2, 0.5, 0.8):
        near = abs(shares - low) < 0.1
        assert np.mean(chosen[near]) == pytest.approx(np.mean(shares[near]), abs=0.1)


def test_refusals():
    for fields, fault in (
        ({"data.colours": 2}, "data.colours=2: must be 1 or 3"),
        ({"data.shift": 8}, "data.shift=8: must be less than data.image_size=8"),
        ({"data.context": 64}, "data.context=64: must be 128 where data.kind='images'"),
        ({"model.patch": 3}, "model.patch=3: must be a divisor of data.image_size=8"),
        ({"model.kind": "decoder"}, "model.kind='decoder': must be 'vision' where data.kind"),
        ({"model.attend": 4}, "model.attend=4: must be 0 where model.kind='vision'"),
        ({"eval.sample": 4}, "eval.sample=4: must be 0 where data.kind='images'"),
        ({"iteration.rounds": "marked"}, "another where data.kind='images' lets tokens attend"),
        ({"data.kind": "text"}, "model.kind='vision': must be 'decoder' or 'recurrent' or 'bdh'"),
    ):
        config = base()
        config.data.kind, config.model.kind = "images", "vision"
        config.update_from_flattened_dict(fields)
        with pytest.raises(UserError, match=fault):
            validate(config)


def test_the_digits():
    try:
        importlib.metadata.distribution("scikit-learn")
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'ngc_jax\[vision\]'"):
            load_data(data())
        return
    found = load_data(data())
    assert (len(found.train), len(found.validation), found.tokenizer.vocab) == (1617, 180, 10)
    assert found.train[0].inputs.shape == (8, 8, 1)
    assert "digits of scikit-learn: train 1,617, validation 180" in found.summary
