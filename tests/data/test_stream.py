"""Draws that depend on their key alone, and batches that depend on seed and step alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.data import from_arrays, generator, open_images
from dit_fast.data.images import Split
from dit_fast.data.stream import BatchStream
from dit_fast.errors import DataError
from tests.tolerance import FEW, rounding


def numbered_split(count: int) -> Split:
    """Images that carry their own number in every pixel but the first column."""
    images = np.repeat(np.arange(count, dtype=np.uint8), 16).reshape(count, 4, 4)
    images[:, :, 0] = 255
    return from_arrays("set", images, np.arange(count) % 2, ["a", "b"]).train


def test_draws_depend_on_the_whole_key():
    def draw(*key) -> list[float]:
        return torch.rand(3, generator=generator(*key)).tolist()

    assert draw(0, "noise", 5) == draw(0, "noise", 5)
    keys = [(0, "noise", 5), (1, "noise", 5), (0, "flip", 5), (0, "noise", 6), (0, "noise", 55)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    # A change of the key's definition would break the resumption of every older checkpoint.
    np.testing.assert_allclose(
        draw(0, "noise", 0), [0.7814168334, 0.9824644923, 0.5355366468], rtol=rounding(FEW)
    )


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 7), (9, 2), (200, 3)])
def test_an_epoch_has_every_sample_once(count, batch):
    stream = BatchStream(numbered_split(count), batch, seed=3, flip=False)
    epochs = 3
    steps = -(-epochs * count // batch)
    seen = torch.cat([stream.indices(step) for step in range(steps)])[: epochs * count]
    orders = seen.view(epochs, count)
    assert all(sorted(order.tolist()) == list(range(count)) for order in orders)
    assert not torch.equal(orders[0], orders[1])


def test_a_batch_does_not_depend_on_those_before_it():
    split = numbered_split(11)
    running = list(BatchStream(split, 4, seed=1, flip=True).read(0, 9))
    resumed = list(BatchStream(split, 4, seed=1, flip=True).read(6, 9))
    assert len(resumed) == 3
    for (images, labels), (other_images, other_labels) in zip(running[6:], resumed, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
    fourth = BatchStream(split, 4, seed=1, flip=True).batch(4)
    assert torch.equal(fourth[0], running[4][0])
    other_seed = BatchStream(split, 4, seed=2, flip=True).batch(4)
    assert not torch.equal(fourth[0], other_seed[0])


def test_half_of_the_samples_are_mirrored_only_where_asked():
    split = numbered_split(100)
    batches = list(BatchStream(split, 50, seed=0, flip=True).read(0, 20))
    # Column 0 is white in an image as it is, column 3 in its mirror image.
    mirrored = torch.cat([images[:, 0, 0, 3] == 1.0 for images, _ in batches])
    assert 0.45 < mirrored.float().mean() < 0.55
    plain = torch.cat(
        [images[:, 0, 0, 3] == 1.0 for images, _ in BatchStream(split, 50, 0, False).read(0, 4)]
    )
    assert not plain.any()


def test_labels_belong_to_their_images():
    for images, labels in BatchStream(numbered_split(30), 8, seed=0, flip=False).read(0, 8):
        numbers = ((images[:, 0, 0, 1] + 1) * 127.5).round().long()
        assert torch.equal(numbers % 2, labels)


def test_a_set_smaller_than_a_batch_is_refused():
    with pytest.raises(DataError, match="6 images, fewer than a batch of 8; give --batch-size 6 or less"):
        BatchStream(numbered_split(6), 8, seed=0, flip=False)


def test_reading_ahead_gives_the_same_batches_and_its_error(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for index in range(4):
            Image.new("L", (4, 4), 10 * index + ord(label)).save(tmp_path / label / f"{index}.png")
    eager = BatchStream(open_images(tmp_path).train, 3, seed=0, flip=True)
    lazy = BatchStream(open_images(tmp_path, memory_limit=0, num_workers=2).train, 3, seed=0, flip=True)
    pairs = list(zip(eager.read(2, 9), lazy.read(2, 9), strict=True))
    assert len(pairs) == 7
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)
    (tmp_path / "a" / "2.png").write_bytes(b"damaged since")
    with pytest.raises(DataError, match=r"a/2\.png"):
        list(lazy.read(0, 4))
