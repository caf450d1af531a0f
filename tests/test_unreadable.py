"""Images and latents that cannot be read in the middle of a run: named, and nothing that was trained is lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast import data as data_module
from dit_fast.data.stream import BatchStream
from dit_fast.errors import DataError
from dit_fast.training.checkpoint import latest_checkpoint, load_checkpoint, step_folders
from dit_fast.training.config import TrainConfig
from dit_fast.training.loop import resume, train
from dit_fast.training.prefetch import Readable

TINY: dict[str, Any] = {
    "hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "batch_size": 4, "lr": 1e-2,
    "image_size": 8, "device": "cpu", "log_every": 1, "num_workers": 1, "objective": "flow",
}  # fmt: skip


def write_images(folder: Path, each: int = 8) -> Path:
    """Two classes of `each` JPEG images of noise, all different."""
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
                folder / name / f"{number}.jpg"
            )
    return folder


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images that counts as too large to be decoded before training."""
    monkeypatch.setitem(data_module.open_images.__kwdefaults__, "memory_limit", 0)
    return write_images(tmp_path / "images")


def damage(path: Path) -> bytes:
    """Cut the body of an image: its header stays, and its length."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-300] + b"\0" * 300)
    return whole


def config(images: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, "data": str(images), "steps": 6, **changes})


def weights(run: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(latest_checkpoint(run))
    return {
        f"{part}.{name}": t
        for part in ("model", "ema", "optimizer")
        for name, t in getattr(saved, part).items()
    }


def assert_equal(run: Path, other: Path) -> None:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def first_read_in(images: Path, step: int) -> Path:
    """A file that no step before `step`, counted from 0, reads."""
    data = data_module.open_images(images, 8)
    stream = BatchStream(data.train, 4, 0, True)
    seen = {i for s in range(step) for i in stream.indices(s).tolist()}
    fresh = next(i for i in stream.indices(step).tolist() if i not in seen)
    return data.train.source.paths[fresh]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_unreadable_image_costs_no_steps(tmp_path, images, step):
    train(config(images), tmp_path / "whole")
    bad = first_read_in(images, step)
    kept = damage(bad)
    with pytest.raises(DataError) as caught:
        train(config(images), tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(f"step {step + 1}: {bad} (")
    assert f"step {step} is saved" in message
    assert "--resume" in message
    assert "\n" not in message
    assert load_checkpoint(latest_checkpoint(tmp_path / "run")).step == step
    bad.write_bytes(kept)
    resume(tmp_path / "run", {})
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_a_fault_of_the_program_is_raised_as_it_is_once_the_run_is_saved(tmp_path, images, monkeypatch):
    """Not only the data: whatever the reading thread raises ends the run after its last whole step."""
    batch = BatchStream.batch

    def broken(self, step, rows=slice(None)):
        if step == 2:
            raise RuntimeError("a bug")
        return batch(self, step, rows)

    monkeypatch.setattr(BatchStream, "batch", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train(config(images), tmp_path / "run")
    assert [path.name for path in step_folders(tmp_path / "run")] == ["step-0000002"]


def test_batches_end_before_the_error_and_knows_it_one_batch_ahead():
    def source():
        yield from ((torch.tensor(n), torch.tensor(n)) for n in range(3))
        raise DataError("no more")

    batches = Readable(source())
    assert batches.count(2) == 2
    seen = [(int(batch[0]), batches.at_end) for batch in batches]
    assert seen == [(0, False), (1, False), (2, True)]
    assert str(batches.error) == "no more"
    batches = Readable(iter([(torch.tensor(0), torch.tensor(0))]))
    assert [batches.at_end for _ in batches] == [False]
    assert batches.error is None
