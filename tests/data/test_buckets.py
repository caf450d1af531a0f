"""Images of many aspect ratios: nearest buckets, batches of one shape, every sample once an epoch, runs that resume."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.cli import main
from dit_fast.data import center_crop, open_images, open_stream, parse_buckets
from dit_fast.data.buckets import BucketOrder, nearest_bucket
from dit_fast.data.stream import generator
from dit_fast.errors import ConfigError
from dit_fast.interop import load_model
from dit_fast.training import TrainConfig, Trainer
from dit_fast.training.config import open_set
from tests.latent_sets import install, write_vae

BUCKETS = ((16, 16), (8, 24), (24, 8))
# Files of each class, (height, width): 6 squares, 5 wide and 3 tall ones.
SHAPES = ((20, 20), (33, 31), (16, 16), (40, 37), (18, 20), (16, 17))
WIDE, TALL = ((10, 30), (12, 33), (8, 24), (20, 61), (16, 40)), ((60, 20), (24, 8), (31, 10))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every image has a grey level of its own, so that it is known in any crop."""
    level = 0
    for name in ("day", "night"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for height, width in (*SHAPES, *WIDE, *TALL):
            level += 8
            Image.new("RGB", (width, height), (level, level, level)).save(
                tmp_path / "images" / name / f"{level:03d}.png"
            )
    return tmp_path / "images"


def order_of(sizes: list[int], batch: int) -> tuple[BucketOrder, torch.Tensor]:
    bucket_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    mixed = bucket_of[torch.randperm(len(bucket_of), generator=torch.Generator().manual_seed(1))]
    return BucketOrder(
        mixed, batch, lambda epoch: torch.randperm(len(mixed), generator=generator(3, "order", epoch))
    ), mixed


# The order


@pytest.mark.parametrize(("sizes", "batch"), [([30], 8), ([17, 9, 22], 4), ([3, 50, 1], 8), ([5, 0, 6], 5)])
def test_every_sample_comes_once_an_epoch_in_batches_of_one_bucket(sizes: list[int], batch: int) -> None:
    order, bucket_of = order_of(sizes, batch)
    queues: dict[int, list[int]] = {bucket: [] for bucket in range(len(sizes))}
    epochs = 9
    steps = sum(epochs * size // batch for size in sizes)
    for step in range(steps):
        taken = order.indices(step)
        assert taken.shape == (batch,)
        (bucket,) = bucket_of[taken].unique().tolist()
        queues[bucket] += taken.tolist()
    for bucket, size in enumerate(sizes):
        # All but what waits for the next epoch.
        assert epochs * size - batch < len(queues[bucket]) <= epochs * size
        for first in range(0, len(queues[bucket]), max(size, 1)):
            epoch = queues[bucket][first : first + size]
            assert len(set(epoch)) == len(epoch)
            if len(epoch) == size:
                assert set(epoch) == set((bucket_of == bucket).nonzero().flatten().tolist())


def test_a_batch_needs_none_before_it() -> None:
    steps = [order_of([17, 9, 22], 4)[0].indices(step) for step in (29, 3, 11, 0)]
    order = order_of([17, 9, 22], 4)[0]
    straight = [order.indices(step) for step in range(30)]
    for step, alone in zip((29, 3, 11, 0), steps, strict=True):
        assert torch.equal(straight[step], alone)


def test_one_bucket_is_plain_shuffling() -> None:
    order, _ = order_of([30], 8)
    row = torch.cat([order.order(epoch) for epoch in range(4)])
    for step in range(12):
        assert torch.equal(order.indices(step), row[8 * step : 8 * step + 8])


def test_buckets_come_mixed_and_in_proportion() -> None:
    order, bucket_of = order_of([40, 120], 4)
    buckets = [int(bucket_of[order.indices(step)[0]]) for step in range(40)]
    assert Counter(buckets) == {0: 10, 1: 30}
    assert buckets != sorted(buckets)


# The images


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((100, 100), 0), ((100, 140), 0), ((100, 200), 1), ((10, 300), 1), ((300, 10), 2), ((512, 171), 2)],
)
def test_the_nearest_bucket_is_the_nearest_ratio(size: tuple[int, int], bucket: int) -> None:
    assert nearest_bucket(size, BUCKETS) == bucket


def test_of_equal_ratios_the_nearest_area_is_taken() -> None:
    sizes = ((16, 16), (32, 32), (96, 160), (192, 320))
    assert [nearest_bucket(size, sizes) for size in ((18, 18), (30, 30), (90, 150), (400, 700))] == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(("source", "size"), [((20, 61), (8, 24)), ((100, 40), (24, 8)), ((5, 9), (16, 32))])
def test_a_rectangle_is_the_centre_of_what_covers_it(source: tuple[int, int], size: tuple[int, int]) -> None:
    """A ramp along each axis stays centred: the mean of the crop is that of the image."""
    ramp = np.add.outer(np.linspace(0, 120, source[0]), np.linspace(0, 120, source[1])).astype(np.uint8)
    cropped = np.asarray(center_crop(Image.fromarray(ramp), size)).astype(float)
    assert cropped.shape == size
    assert cropped.mean() == pytest.approx(ramp.mean(), abs=3)


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_a_folder_in_buckets(folder: Path, memory_limit: int) -> None:
    images = open_images(folder, buckets=BUCKETS, memory_limit=memory_limit, num_workers=1)
    assert images.train.lazy == (memory_limit == 0)
    assert images.train.buckets.bincount().tolist() == [12, 10, 6]
    stream = open_stream(images, 4, seed=5)
    seen: Counter[int] = Counter()
    for step in range(3 * 28 // 4):
        samples, labels = stream.batch(step)
        bucket = images.train.buckets[stream.indices(step)]
        assert samples.shape == (4, 3, *BUCKETS[int(bucket[0])])
        levels = ((samples[:, 0, 0, 0] + 1) * 127.5).round().int()
        assert ((levels > 14 * 8).int() == labels).all()
        seen.update(levels.tolist())
    # Three epochs' worth, but for what waits in the queues.
    assert len(seen) == 28
    assert set(seen.values()) <= {2, 3, 4}
    assert images.describe()["buckets"] == [[16, 16], [8, 24], [24, 8]]


def test_a_square_set_describes_itself_as_before(folder: Path) -> None:
    assert "buckets" not in open_images(folder, 16, num_workers=1).describe()


# Runs


def config(folder: Path, **options: object) -> TrainConfig:
    small = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "batch_size": 4, "device": "cpu"}
    usual = {"buckets": "16x16,8x24,24x8", "num_workers": 1, "steps": 4, "log_every": 1, "threads": 1}
    return TrainConfig(**{"data": str(folder), **small, **usual, **options})


def test_a_run_trains_on_images_of_every_shape(folder: Path) -> None:
    made = open_set(config(folder))
    trainer = Trainer(config(folder), made)
    assert trainer.model.x_embedder.img_size == (16, 16)
    shapes = set()
    for step in range(6):
        samples, labels = trainer.stream.stored(step)
        shapes.add(tuple(samples.shape[2:]))
        trainer.train_step(samples, labels)
    assert shapes == set(BUCKETS)
    assert all(np.isfinite(value.loss) for value in trainer.values())


def test_a_run_resumes_to_the_bit(folder: Path, tmp_path: Path) -> None:
    sizes = "--buckets 16x16,8x24,24x8 --hidden-size 16 --depth 1 --num-heads 2 --patch-size 4 --batch-size 4"
    flags = ["--data", folder, *sizes.split(), "--threads", 1, "--num-workers", 1, "--positions", "rope"]

    def train(*more: object) -> int:
        return main(["train", *map(str, more)])

    assert train(*flags, "--steps", 7, "--out", tmp_path / "whole") == 0
    assert train(*flags, "--steps", 3, "--out", tmp_path / "run") == 0
    assert train("--resume", tmp_path / "run", "--steps", 7) == 0
    whole, resumed = (load_model(tmp_path / name)[0] for name in ("whole", "run"))
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for size in BUCKETS:
        t, y = torch.tensor([3]), torch.tensor([1])
        assert whole(torch.zeros(1, 3, *size), t, y).shape == (1, 6, *size)


def test_latents_of_buckets(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    write_vae(tmp_path / "vae")
    options = config(folder, vae=str(tmp_path / "vae"), patch_size=2)
    made = open_set(options)
    assert made.buckets == ((4, 4), (2, 6), (6, 2))
    trainer = Trainer(options, made)
    shapes = set()
    for step in range(6):
        samples, labels = trainer.stream.stored(step)
        assert trainer.stream.batch(step)[0].shape == (4, *samples.shape[2:])
        shapes.add(tuple(samples.shape[3:]))
        trainer.train_step(samples, labels)
    assert shapes == set(made.buckets)


# What is refused


@pytest.mark.parametrize("text", ["", "16", "16x", "0x16", "16x16;8x8", "16x16,16x16", "axb"])
def test_no_list_of_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--buckets .*(not HEIGHTxWIDTH|given twice)"):
        parse_buckets(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": "16x16,8x22"}, "8x22 is not a multiple of the patch size 4; the nearest is 8x24"),
        ({"image_size": 16}, "--image-size 16 and --buckets both set the images' size"),
        ({"data": "digits"}, "--buckets: the images of digits are squares of one size"),
        ({"compile": True, "buckets": ",".join(f"{4 * i}x4" for i in range(1, 10))}, "9 --buckets, and each"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(asked := config(folder, **options), open_set(asked))


def test_an_autoencoder_that_does_not_divide_a_bucket(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    write_vae(tmp_path / "vae")
    with pytest.raises(
        ConfigError,
        match=r"--buckets 6x16 is not a multiple of 4, the downsampling factor of --vae .*: give 8x16",
    ):
        open_set(config(folder, vae=str(tmp_path / "vae"), buckets="16x16,6x16"))
