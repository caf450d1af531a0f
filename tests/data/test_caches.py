"""Latent caches of fast-DiT, REPA and LightningDiT, as their layouts are documented, and damaged ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_fast.data import LatentSet, open_cache, open_data, open_stream
from dit_fast.data.caches import recognize
from dit_fast.errors import ConfigError, DataError
from tests.tolerance import assert_close

LABELS = [0, 2, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]


@pytest.fixture
def fast_dit(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """imagenet256_features/N.npy (1, 4, 8, 8) and imagenet256_labels/N.npy (1,), N from 0 to 11."""
    latents = np.random.randn(12, 4, 8, 8).astype(np.float32)
    for index, label in enumerate(LABELS):
        for part, array in (("features", latents[index][None]), ("labels", np.array([label]))):
            path = tmp_path / "cache" / f"imagenet256_{part}" / f"{index}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
    return tmp_path / "cache", latents


@pytest.fixture
def repa(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """images/ beside vae-sd/0000K/img-mean-std-N.npy (8, 8, 8) and vae-sd/dataset.json, in another order."""
    moments = np.random.rand(12, 8, 8, 8).astype(np.float32)
    root, entries = tmp_path / "cache" / "vae-sd", []
    (tmp_path / "cache" / "images").mkdir(parents=True)
    for index, label in enumerate(LABELS):
        name = f"{index // 5:05d}/img-mean-std-{index:08d}.npy"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, moments[index])
        entries.append([name, label])
    (root / "dataset.json").write_text(json.dumps({"labels": entries[::-1]}))
    return tmp_path / "cache", moments


@pytest.fixture
def lightning(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Two shards of 7 and 5 latents (32, 4, 4), mirrored ones beside them, and the statistics."""
    both = torch.randn(2, 12, 32, 4, 4)
    folder = tmp_path / "cache"
    folder.mkdir()
    for shard, rows in enumerate((slice(0, 7), slice(7, 12))):
        tensors = {
            "latents": both[0, rows].contiguous(),
            "latents_flip": both[1, rows].contiguous(),
            "labels": torch.tensor(LABELS[rows]),
        }
        save_file(tensors, folder / f"latents_rank00_shard{shard:03d}.safetensors")
    statistics = {"mean": torch.arange(32.0).view(1, 32, 1, 1), "std": torch.full((1, 32, 1, 1), 4.0)}
    torch.save(statistics, folder / "latents_stats.pt")
    return folder, both


def test_fast_dit(fast_dit):
    folder, latents = fast_dit
    assert recognize(folder) == "fast-DiT"
    data = open_data(folder)
    assert isinstance(data, LatentSet)
    assert (data.num_classes, data.image_size, data.channels, data.pixel_size) == (3, 8, 4, 64)
    assert data.train.labels.tolist() == LABELS, "10 comes after 9, not after 1"
    stream = open_stream(data, 5, seed=3)
    batch, labels = stream.batch(1)
    indices = stream.indices(1)
    assert torch.equal(batch, torch.from_numpy(latents)[indices]), "scaled and drawn when it was made"
    assert labels.tolist() == [LABELS[index] for index in indices]
    assert open_cache(folder, num_classes=1000).num_classes == 1000
    with pytest.raises(ConfigError, match=r"--flip: .* has no latents of mirrored images"):
        open_data(folder, flip=True)


def test_repa(repa):
    folder, moments = repa
    assert (recognize(folder), recognize(folder / "vae-sd")) == ("REPA", "REPA")
    data = open_data(folder)
    assert (data.num_classes, data.image_size, data.channels, data.pixel_size) == (3, 8, 4, 64)
    assert data.train.labels.tolist() == LABELS
    assert open_data(folder / "vae-sd").fingerprint == data.fingerprint
    stream = open_stream(data, 5, seed=3)
    mean, std = torch.from_numpy(moments)[stream.indices(2)].chunk(2, dim=1)
    expected = (mean + std * stream.noise(2)) * 0.18215
    assert_close(stream.batch(2)[0], expected, 16)


def test_lightning(lightning):
    folder, both = lightning
    assert recognize(folder) == "LightningDiT"
    data = open_data(folder)
    assert (data.num_classes, data.image_size, data.channels, data.pixel_size) == (3, 4, 32, None)
    assert (data.flip, data.train.labels.tolist()) == (True, LABELS)
    stream = open_stream(data, 6, seed=3)
    moments, flips, _ = stream.moments(1)
    assert 0 < flips.sum() < 6
    expected = both[flips.long(), stream.indices(1)]
    assert torch.equal(moments[:, 0], expected)
    assert_close(stream.batch(1)[0], (expected - torch.arange(32.0).view(32, 1, 1)) / 4)


def test_bfloat16_shards_and_holdout(lightning):
    folder, both = lightning
    for path in folder.glob("*.safetensors"):
        rows = slice(0, 7) if "shard000" in path.name else slice(7, 12)
        tensors = {name: both[i, rows].bfloat16() for i, name in enumerate(("latents", "latents_flip"))}
        save_file({**tensors, "labels": torch.tensor(LABELS[rows])}, path)
    data = open_cache(folder, holdout=0.25)
    assert (len(data.train), len(data.heldout)) == (9, 3)
    latents = data.train.moments(torch.arange(9))
    assert torch.equal(latents[:, 0], both[0, data.train.members].bfloat16())


@pytest.mark.parametrize("kind", ["fast_dit", "repa", "lightning"])
def test_no_sample_is_missing_or_doubled(kind, request):
    folder, _ = request.getfixturevalue(kind)
    stream = open_stream(open_data(folder), 4, seed=1)
    assert sorted(torch.cat([stream.indices(step) for step in range(3)]).tolist()) == list(range(12))


@pytest.mark.parametrize("kind", ["fast_dit", "repa", "lightning"])
def test_labels_beyond_the_classes(kind, request):
    folder, _ = request.getfixturevalue(kind)
    with pytest.raises(DataError, match=r"label 2 of sample 1 \(.*\) is outside 0\.\.1 \(4 such labels"):
        open_cache(folder, num_classes=2)


def unpickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("features/3.npy", Path.unlink, r"11 latents and 12 labels; without a partner: 3$"),
        ("labels/3.npy", Path.unlink, r"12 latents and 11 labels; without a partner: 3$"),
        (
            "labels/3.npy",
            lambda p: np.save(p, np.array([1.5])),
            r"3\.npy holds float64 \(1,\); a label is one",
        ),
        (
            "labels/3.npy",
            lambda p: np.save(p, np.array([-1])),
            r"label -1 of sample 3 \(.*3\.npy\) is outside",
        ),
        ("labels/3.npy", lambda p: p.write_bytes(b""), r"3\.npy cannot be read \(0 bytes\)"),
        ("labels/3.npy", unpickled, r"3\.npy cannot be read .*Object arrays"),
        (
            "features/0.npy",
            lambda p: np.save(p, np.zeros((2, 2))),
            r"0\.npy holds float64 \(2, 2\); expected",
        ),
        ("features/0.npy", unpickled, r"0\.npy cannot be read .*Object arrays"),
    ],
)
def test_damaged_fast_dit(fast_dit, name, damage, message):
    folder, _ = fast_dit
    damage(folder / f"imagenet256_{name}")
    with pytest.raises(DataError, match=message):
        open_cache(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: np.save(p, np.zeros((1, 4, 8, 4), "f4")),
            r"7\.npy holds float32 \(1, 4, 8, 4\), the first",
        ),
        (lambda p: np.save(p, np.full((1, 4, 8, 8), np.nan, "f4")), r"7\.npy: the latent contains NaN"),
        (lambda p: p.write_bytes(p.read_bytes()[:200]), r"7\.npy cannot be read \(200 bytes\)"),
        (Path.unlink, r"7\.npy: no such file"),
    ],
)
def test_latents_that_are_bad_when_they_are_read(fast_dit, damage, message):
    folder, _ = fast_dit
    data = open_cache(folder)
    damage(folder / "imagenet256_features" / "7.npy")
    with pytest.raises(DataError, match=message):
        data.train.moments(torch.arange(12))


def relabel(path: Path, change) -> None:
    index = path / "vae-sd" / "dataset.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["labels"].pop(),
            r"12 latents and 11 labels; without a partner: 00000/img-mean-std-00000000",
        ),
        (lambda c: c["labels"].append(["x.npy", 0]), r"12 latents and 13 labels; without a partner: x\.npy"),
        (lambda c: c["labels"][0].__setitem__(1, 1.5), r"is 1\.5; a label is one integer"),
        (lambda c: c["labels"][0].__setitem__(1, True), "is True; a label is one integer"),
        (lambda c: c["labels"][0].__setitem__(1, 1 << 80), "a label is one integer"),
        (lambda c: c.update(labels=None), "dataset.json is not"),
        (lambda c: c.clear(), "dataset.json is not .*KeyError"),
    ],
)
def test_damaged_repa(repa, change, message):
    folder, _ = repa
    relabel(folder, change)
    with pytest.raises(DataError, match=message):
        open_cache(folder)


def test_repa_with_an_odd_number_of_channels(repa):
    folder, _ = repa
    np.save(folder / "vae-sd" / "00000" / "img-mean-std-00000000.npy", np.zeros((7, 8, 8), "f4"))
    with pytest.raises(DataError, match=r"holds float32 \(7, 8, 8\); .*\(2 C, H, W\)"):
        open_cache(folder)


def shard(**changes) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros(5, 32, 4, 4) for name in ("latents", "latents_flip")}
    tensors = {**tensors, "labels": torch.zeros(5, dtype=torch.int64), **changes}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": None}, "has no latents "),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"latents is .* \(5, 32, 4, 4\) for 4 labels"),
        ({"labels": torch.zeros(5)}, r"labels are torch\.float32 \(5,\)"),
        ({"latents_flip": torch.zeros(5, 16, 4, 4)}, r"latents_flip is torch\.float32 \(5, 16, 4, 4\)"),
        ({"latents": torch.zeros(5, 32, 4, 4).half()}, r"latents is torch\.float16"),
        (
            {"labels": torch.tensor([0, 0, -3, 0, 0])},
            r"label -3 of sample 9 .*shard001\.safetensors, latent 2",
        ),
    ],
)
def test_damaged_lightning(lightning, changes, message):
    folder, _ = lightning
    save_file(shard(**changes), folder / "latents_rank00_shard001.safetensors")
    with pytest.raises(DataError, match=message):
        open_cache(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_safetensors_shard(lightning, kept):
    folder, _ = lightning
    path = folder / "latents_rank00_shard001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    sizes = rf"\({len(data) - 1} bytes, expected {len(data)}\)" if kept == -1 else ""
    with pytest.raises(DataError, match=rf"shard001\.safetensors cannot be read: .*{sizes}"):
        open_cache(folder)


def test_nan_in_a_safetensors_shard(lightning):
    folder, _ = lightning
    latents = torch.zeros(5, 32, 4, 4)
    latents[3, 0, 0, 0] = float("nan")
    save_file(shard(latents_flip=latents), folder / "latents_rank00_shard001.safetensors")
    split = open_cache(folder).train
    with pytest.raises(DataError, match=r"shard001\.safetensors, latent 3: the latent contains NaN"):
        split.moments(torch.arange(12), torch.ones(12, dtype=torch.bool))


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (None, r"latents_stats\.pt is missing"),
        ({"mean": torch.zeros(1, 32, 1, 1)}, "not a file with tensors mean and std: 'std'"),
        ({"mean": torch.zeros(4), "std": torch.ones(4)}, "4 means and 4 deviations for 32 channels"),
        ({"mean": torch.zeros(32), "std": torch.zeros(32)}, "not finite and positive"),
        ("evil", "not a file with tensors mean and std"),
    ],
)
def test_bad_statistics(lightning, tmp_path, statistics, message):
    folder, _ = lightning
    (folder / "latents_stats.pt").unlink()
    canary = tmp_path / "canary"
    if statistics is not None:
        content = {"mean": Evil(canary), "std": 1} if statistics == "evil" else statistics
        torch.save(content, folder / "latents_stats.pt")
    with pytest.raises(DataError, match=message):
        open_cache(folder)
    assert not canary.exists()


def test_other_folders_are_no_cache(tmp_path):
    (tmp_path / "a").mkdir()
    assert recognize(tmp_path) is None
    with pytest.raises(DataError, match="is not a latent cache of fast-DiT, REPA, LightningDiT"):
        open_cache(tmp_path)
    for name in ("x_features", "x_labels"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="holds no latents"):
        open_cache(tmp_path)
