"""Files of latents and embeddings that are cut, replaced or lost in use: an error, never a dead process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_fast.checkpoint.folder import latest_checkpoint, load_checkpoint
from dit_fast.data import LatentStream, open_data, open_images, open_latents
from dit_fast.data.encode import encode
from dit_fast.data.shards import LABELS
from dit_fast.errors import DataError
from dit_fast.training.config import TrainConfig
from dit_fast.training.run import resume, train
from tests import latent_sets
from tests.caption_sets import embeddings, write_captioned
from tests.data.test_caches import lightning  # noqa: F401 (a fixture)
from tests.latent_sets import in_child, settings, write_images, write_vae


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        latent_sets.install(patch)
        write_images(tmp_path / "images")
        write_vae(tmp_path / "vae")
        encode(settings(tmp_path))
    return tmp_path / "set"


def captioned(tmp_path: Path) -> Path:
    """A latent set with captions, in three shards."""
    save_file(embeddings(), tmp_path / "made.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        latent_sets.install(patch)
        write_captioned(tmp_path / "photos")
        write_vae(tmp_path / "vae")
        options = {"data": tmp_path / "photos", "text_encoder": str(tmp_path / "made.safetensors")}
        encode(settings(tmp_path, **options))
    return tmp_path / "set"


def embedded(tmp_path: Path, suffix: str) -> Path:
    folder = write_captioned(tmp_path / "photos")
    if suffix == ".npz":
        wide = embeddings(width=4096)  # more than the buffer of an open file
        np.savez(folder / "embeddings.npz", **{name: array.numpy() for name, array in wide.items()})
    else:
        save_file(embeddings(), folder / "embeddings.safetensors")
    return folder


def opened(kind: str, request: Any, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    """The file that is read, and a read of all of it."""
    everything = torch.arange(7)
    if kind == "shard":
        split = open_latents(request.getfixturevalue("encoded")).train
        return tmp_path / "set" / "shard-00002.npy", lambda: split.moments(everything, everything > -1)
    if kind == "captions":
        split = open_latents(captioned(tmp_path)).train
        return tmp_path / "set" / "captions-00002.npy", lambda: split.conditioning(everything)
    if kind == "lightning":
        folder, _ = request.getfixturevalue("lightning")
        split = open_data(folder).train
        path = folder / "latents_rank00_shard001.safetensors"
        return path, lambda: split.moments(torch.arange(12), torch.ones(12, dtype=torch.bool))
    folder = embedded(tmp_path, kind)
    images = open_images(folder, 8).train
    return folder / f"embeddings{kind}", lambda: images.conditioning(everything)


@pytest.mark.parametrize("kind", ["shard", "captions", "lightning", ".safetensors", ".npz"])
@pytest.mark.parametrize("kept", [0, 0.5, "one byte"])
def test_a_file_that_is_cut_while_it_is_in_use_is_an_error(tmp_path, request, kind, kept):
    path, read = opened(kind, request, tmp_path)
    read()
    size = path.stat().st_size
    # Of a zip archive the last bytes are a listing that was read before.
    last = size // 4 if kind == ".npz" else size - 1
    os.truncate(path, last if kept == "one byte" else int(size * kept))

    def check() -> None:
        with pytest.raises(DataError) as caught:
            read()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        if kind != ".npz":
            assert f"{path.stat().st_size} bytes, {size} when it was opened" in str(caught.value)

    # In a process of its own: where pages are mapped, this is SIGBUS.
    assert in_child(check) == 0


@pytest.mark.parametrize("kind", ["shard", "captions", "lightning", ".safetensors", ".npz"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_is_removed_or_replaced_is_read_as_it_was(tmp_path, request, kind, how):
    path, read = opened(kind, request, tmp_path)
    before = read()
    if how == "replaced":
        (tmp_path / "other").write_bytes(b"something else")
        (tmp_path / "other").replace(path)
    else:
        path.unlink()
    assert torch.equal(read(), before)


def test_a_run_whose_shard_is_cut_is_saved_and_goes_on_to_the_bit(tmp_path, encoded, monkeypatch):
    config = TrainConfig(
        data=str(encoded), steps=6, batch_size=4, hidden_size=16, depth=1, num_heads=2, patch_size=2,
        device="cpu", log_every=1, objective="flow",
    )  # fmt: skip
    train(config, tmp_path / "whole")
    path = encoded / "shard-00000.npy"
    kept, changed = path.read_bytes(), path.stat().st_mtime_ns
    moments = LatentStream.moments

    def cut(self, step, rows=slice(None)):
        if step == 3:
            os.truncate(path, 200)
        return moments(self, step, rows)

    with monkeypatch.context() as patch:
        patch.setattr(LatentStream, "moments", cut)
        with pytest.raises(DataError, match=r"^step 4: .*shard-00000\.npy has 200 bytes.*step 3 is saved"):
            train(config, tmp_path / "run")
    assert load_checkpoint(latest_checkpoint(tmp_path / "run")).step == 3
    path.write_bytes(kept)
    assert path.stat().st_mtime_ns != changed
    resume(tmp_path / "run", {})
    ends = [load_checkpoint(latest_checkpoint(tmp_path / run)).model for run in ("whole", "run")]
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


def test_labels_are_read_once(encoded):
    latents = open_latents(encoded)
    os.truncate(encoded / LABELS, 0)
    assert latents.train.labels.tolist() == [0] * 4 + [1] * 3
