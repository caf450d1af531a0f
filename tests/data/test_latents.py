"""Latent sets as the trainer reads them: what is drawn, what a step sees, and what damaged sets get."""

import functools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_fast.data import (
    ImageSet,
    LatentSet,
    LatentStream,
    Posterior,
    open_data,
    open_latents,
    open_stream,
    rows,
)
from dit_fast.data.encode import encode
from dit_fast.data.latents import ShardSource
from dit_fast.data.shards import read_sealed, write_sealed
from dit_fast.data.stream import BatchStream
from dit_fast.errors import ConfigError, DataError
from dit_fast.training import TrainConfig
from dit_fast.training.run import Trainer
from tests import latent_sets
from tests.latent_sets import SCALE, SHIFT, settings, write_images, write_vae
from tests.tolerance import assert_close


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of seven latents (2, 4, 4) in three shards, labels 0 0 0 0 1 1 1."""
    latent_sets.install(monkeypatch)
    write_images(tmp_path / "images")
    write_vae(tmp_path / "vae")
    encode(settings(tmp_path))
    return tmp_path / "set"


def edit_manifest(folder: Path, **changes) -> None:
    manifest = read_sealed(folder / "manifest.json")
    write_sealed(folder / "manifest.json", {**manifest, **changes})


def poke(folder: Path, shard: int, place: int, value: float) -> None:
    array = np.load(folder / f"shard-{shard:05d}.npy", mmap_mode="r+")
    array[place, 1, 0, 0, 2, 3] = value
    array.flush()


def stored(folder: Path) -> torch.Tensor:
    """All moments, (7, flips, 2, C, H, W)."""
    return torch.from_numpy(np.concatenate([np.load(path) for path in sorted(folder.glob("shard-*.npy"))]))


@pytest.mark.parametrize(
    ("kind", "spread", "deviation"),
    [("logvar", [0.0, 2.0], [1.0, np.e]), ("std", [0.5, 3.0], [0.5, 3.0])],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_posterior_is_sampled_shifted_and_scaled(kind, spread, deviation, dtype):
    posterior = Posterior(kind, (0.5, -1.0), (2.0, 4.0))
    mean, noise = torch.randn(3, 2, 4, 4).to(dtype), torch.randn(3, 2, 4, 4)
    moments = torch.stack([mean, torch.tensor(spread, dtype=dtype).view(2, 1, 1).expand_as(mean)], dim=1)
    before = moments.clone()
    shift, scale, std = (torch.tensor(v).view(2, 1, 1) for v in ([0.5, -1.0], [2.0, 4.0], deviation))
    torch.testing.assert_close(
        posterior.sample(moments, noise), ((mean.float() + std * noise - shift) * scale).float()
    )
    assert_close(posterior.sample(moments), (mean.float() - shift) * scale)
    assert torch.equal(moments, before), "stored moments stay as they are"


def test_a_set_that_was_sampled_before_takes_no_noise():
    posterior = Posterior("sample", (1.0,), (0.5,))
    moments = torch.randn(2, 1, 1, 4, 4)
    assert torch.equal(posterior.sample(moments, torch.randn(2, 1, 4, 4)), (moments[:, 0] - 1) * 0.5)


def test_a_batch_is_the_flip_the_posterior_and_the_noise_of_its_step(folder):
    data = open_data(folder)
    assert isinstance(data, LatentSet)
    stream = open_stream(data, 3, seed=5)
    moments, flips, labels = stream.moments(4)
    indices = stream.indices(4)
    everything = stored(folder)
    assert torch.equal(moments, everything[indices, flips.long()])
    assert labels.tolist() == [int(index >= 4) for index in indices]
    latents, same = stream.batch(4)
    assert (latents.dtype, torch.equal(same, labels)) == (torch.float32, True)
    mean, logvar = moments.float().unbind(1)
    expected = (mean + (logvar / 2).exp() * stream.noise(4) - SHIFT) * SCALE
    assert_close(latents, expected, 16)
    both = torch.cat([stream.moments(step)[1] for step in range(200)])
    assert 0.45 < both.float().mean() < 0.55
    assert not any(open_stream(data, 3, 5, flip=False).moments(step)[1].any() for step in range(20))


def test_draws_depend_on_seed_step_and_sample_alone(folder):
    data = open_data(folder)
    stream = open_stream(data, 6, seed=1)
    halves = [open_stream(data, 3, seed=1).noise(step) for step in (8, 9)]
    assert torch.equal(stream.noise(4), torch.cat(halves)), "the global sample number is the key"
    for step in (0, 7):
        whole = stream.batch(step)
        parts = [stream.batch(step, slice(rank, None, 2)) for rank in (1, 0)]
        for rank, part in zip((1, 0), parts, strict=True):
            assert torch.equal(part[0], whole[0][rank::2])
            assert torch.equal(part[1], whole[1][rank::2])
    noise = torch.stack([stream.noise(step) for step in range(300)])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert len({float(value) for value in noise[:, :, 0, 0, 0].flatten()}) == 1800
    assert not torch.equal(stream.noise(0), open_stream(data, 6, seed=2).noise(0))


def test_no_sample_is_missing_or_doubled_over_three_epochs_with_a_restart(folder):
    data = open_data(folder)
    seen = []
    for first, last in ((0, 3), (3, 7)):  # a run that stops at step 3 and goes on: 7 steps of 3 are 3 epochs
        stream = open_stream(data, 3, seed=9)
        for step, (moments, _) in zip(range(first, last), stream.read(first, last), strict=True):
            assert torch.equal(moments, stream.moments(step)[0])
            seen += stream.indices(step).tolist()
    assert [sorted(seen[epoch : epoch + 7]) for epoch in (0, 7, 14)] == [list(range(7))] * 3


def test_splits_share_no_sample_and_follow_the_file_names(folder):
    data = open_latents(folder, holdout=0.4)
    assert (len(data.train), data.heldout.labels.tolist()) == (4, [0, 0, 1])
    assert sorted([*data.train.members.tolist(), *data.heldout.members.tolist()]) == list(range(7))
    images = open_data(folder.parent / "images", 16, holdout=0.4)
    assert isinstance(images, ImageSet)
    assert data.heldout.members.tolist() == images.heldout.members.tolist()
    mean = data.heldout.batch(torch.arange(3))
    members = data.heldout.members
    assert_close(mean, (stored(folder)[members, 0, 0].float() - SHIFT) * SCALE)


def test_the_trainer_takes_a_latent_set(folder):
    data = open_data(folder)
    config = TrainConfig(
        data=str(folder),
        hidden_size=16,
        depth=1,
        num_heads=2,
        patch_size=2,
        batch_size=4,
        steps=2,
        device="cpu",
    )
    trainer = Trainer(config, data)
    trainer.stream = open_stream(data, config.batch_size, config.seed, config.flip)
    assert trainer.model.x_embedder.img_size == (4, 4)
    assert trainer.model.in_channels == 2
    for latents, labels in trainer.stream.read(0, 2):
        trainer.train_step(latents, labels)
    assert all(np.isfinite(value.loss) for value in trainer.values())
    manifest = json.loads(json.dumps(trainer.manifest()))
    assert (manifest["data"]["image_size"], manifest["data"]["latent_size"]) == (16, 4)
    assert manifest["data"]["scale"] == [SCALE, SCALE]
    assert manifest["data"]["fingerprint"] == open_data(folder).fingerprint


def test_image_folders_stay_images(folder):
    data = open_data(folder.parent / "images", 16)
    assert isinstance(data, ImageSet)
    assert type(open_stream(data, 2, 0)) is BatchStream
    assert type(open_stream(open_data(folder), 2, 0)) is LatentStream
    with pytest.raises(DataError, match="neither a folder nor a built-in set"):
        open_data(folder / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 32}, r"--image-size 32: .* was encoded at 16"),
        ({"channels": 3}, r"--channels 3: .* has latents of 2"),
        ({"num_classes": 3}, r"--num-classes 3 contradicts .*, which has 2 classes"),
        ({"holdout": 1.0}, r"--holdout 1.0: give a number from 0, below 1"),
    ],
)
def test_options_that_contradict_the_set(folder, options, message):
    assert open_data(folder, 16, channels=2, num_classes=2).num_classes == 2
    with pytest.raises(ConfigError, match=message):
        open_data(folder, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_its_shard_and_place(folder, value):
    poke(folder, 1, 2, value)
    split = open_latents(folder).train
    flips = torch.ones(7, dtype=torch.bool)
    assert split.moments(torch.arange(7)).isfinite().all(), "the plain image's moments are whole"
    with pytest.raises(
        DataError, match=r"shard-00001\.npy, image 2: the latent contains NaN or infinity \(1 of the 7"
    ):
        split.moments(torch.arange(7), flips)


@pytest.mark.parametrize("kept", [0, 1, 127, 500, -1])
def test_a_truncated_shard_names_both_sizes(folder, kept):
    path = folder / "shard-00001.npy"
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    expected = rf"shard-00001\.npy has {len(data[:kept])} bytes, expected {len(data)}"
    with pytest.raises(DataError, match=expected):
        open_latents(folder)


def test_a_flipped_bit_is_found_when_asked_for(folder):
    path = folder / "shard-00000.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert len(open_latents(folder).train) == 7
    with pytest.raises(DataError, match=r"shard-00000\.npy was changed or damaged"):
        open_latents(folder, verify=True)


def test_a_missing_shard_and_an_unfinished_set(folder):
    (folder / "shard-00002.npy").rename(folder / "aside.npy")
    with pytest.raises(DataError, match=r"shard-00002\.npy is missing"):
        open_latents(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"not a finished latent set: .*run dit-fast encode"):
        open_data(folder)


@pytest.mark.parametrize("name", ["shard-00000.npy", "labels.npy"])
@pytest.mark.parametrize("fault", ["shape", "dtype", "object"])
def test_arrays_of_another_kind(folder, name, fault):
    """Of the same size, so that only the header tells; an array of objects is never unpickled."""
    array = np.load(folder / name)
    size = (folder / name).stat().st_size
    if fault == "shape":
        array = array.reshape(1, *array.shape)
    elif fault == "dtype":
        array = array.view({2: "<i2", 8: "<f8"}[array.itemsize])
    else:
        array = np.array([{"a": 1}], dtype=object)
    with (folder / name).open("wb") as file:
        np.save(file, array, allow_pickle=fault == "object")
        file.truncate(size)
    with pytest.raises(DataError, match=rf"{name} (holds|cannot be read: Object arrays are not unpickled)"):
        open_latents(folder)


def test_a_changed_manifest(folder):
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"images": 7', '"images": 8'))
    with pytest.raises(DataError, match=r"manifest\.json was changed or damaged"):
        open_latents(folder)
    path.write_text(text[:100])
    with pytest.raises(DataError, match=r"manifest\.json: (damaged|holds|refused)"):
        open_latents(folder)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"manifest\.json: (damaged|holds|refused)"):
        open_latents(folder)


def shards_of(folder: Path, **changes) -> list[dict]:
    shards = read_sealed(folder / "manifest.json")["shards"]
    shards[0] = {**shards[0], **changes}
    return shards


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda f: {"images": 8}, "the shards hold 7 latents for 8 labels"),
        (lambda f: {"sample_shape": [2, 2, 2, 4, 2]}, r"shard-00000\.npy has 896 bytes, expected 512"),
        (lambda f: {"sample_shape": [2, 1, 4, 4, 4]}, r"sample shape \(2, 1, 4, 4, 4\)"),
        (lambda f: {"sample_shape": [2, 2, 3, 4, 4]}, r"with \(2, 2\) shifts and scales"),
        (lambda f: {"shards": shards_of(f, file="../../secret.npy")}, r"the shards are not shard-00000\.npy"),
        (lambda f: {"shards": shards_of(f, images=1), "images": 5}, "of equal length"),
        (lambda f: {"shards": None}, "is not as dit-fast encode writes it: shards is None"),
        (lambda f: {"vae": {}}, "is not as dit-fast encode writes it: .*shift"),
        (lambda f: {"class_names": ["a"]}, "1 class found"),
        (lambda f: {"images": 0, "shards": []}, "holds no latents"),
        (lambda f: {"format": "dit_fast latents 2"}, "has format 'dit_fast latents 2'; this version reads"),
    ],
)
def test_manifests_that_do_not_fit(folder, changes, message):
    edit_manifest(folder, **changes(folder))
    with pytest.raises(DataError, match=message):
        open_latents(folder)


@pytest.mark.parametrize(("value", "message"), [(2, "label 2 of sample 5"), (-1, "label -1 of sample 5")])
def test_labels_out_of_range(folder, value, message):
    labels = np.load(folder / "labels.npy")
    labels[5] = value
    np.save(folder / "labels.npy", labels)
    with pytest.raises(DataError, match=r"labels\.npy was changed or damaged"):
        open_latents(folder)
    from dit_fast.utils.files import file_facts

    edit_manifest(folder, labels=file_facts(folder / "labels.npy", DataError))
    with pytest.raises(
        DataError, match=rf"{message} \(.*shard-00001\.npy, image 2\) is outside 0\.\.1 \(1 such"
    ):
        open_latents(folder)


def test_fewer_labels_than_latents(folder):
    np.save(folder / "labels.npy", np.load(folder / "labels.npy")[:6])
    with pytest.raises(DataError, match=r"labels\.npy has 176 bytes, expected 184"):
        open_latents(folder)


def test_a_batch_larger_than_the_set(folder):
    with pytest.raises(DataError, match="has 7 images, fewer than a batch of 8"):
        open_stream(open_data(folder), 8, 0)


def test_shards_are_not_read_before_they_are_needed(folder, monkeypatch):
    read: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(preadv(*args)) or read[-1])
    latents = open_latents(folder)
    opening = sum(read)
    assert isinstance(latents.train.source, ShardSource)
    assert opening < 4096 * 3
    split = latents.train
    split.moments(torch.tensor([0, 5, 2]))
    assert sum(read) - opening == 3 * split.moments(torch.tensor([0])).nbytes


def test_a_set_of_more_shards_than_stay_open(folder, monkeypatch):
    """Each is opened again when its turn comes, and must be what it was."""
    whole = stored(folder)
    monkeypatch.setattr(rows, "_opened", functools.lru_cache(1)(rows._opened.__wrapped__))
    split = open_latents(folder).train
    for _ in range(2):
        assert torch.equal(split.moments(torch.arange(7)), whole[:, 0])
    shard = folder / "shard-00001.npy"
    os.utime(shard, ns=(0, 0))
    with pytest.raises(DataError, match=r"shard-00001\.npy .* it changed during use"):
        split.moments(torch.arange(7))


def test_a_read_that_ends_early_is_gone_on_with(folder, monkeypatch):
    """As a signal, or a network file system, may end it."""
    whole, preadv = stored(folder), os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, into, at: preadv(fd, [memoryview(into[0]).cast("B")[:7]], at)
    )
    assert torch.equal(open_latents(folder).train.moments(torch.arange(7)), whole[:, 0])


def test_a_set_that_is_open_can_be_pickled(folder):
    split = open_latents(folder).train
    again = pickle.loads(pickle.dumps(split))
    assert torch.equal(again.moments(torch.arange(7)), split.moments(torch.arange(7)))
