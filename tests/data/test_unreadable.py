"""Images and latents that cannot be read in the middle of a run: named, and nothing that was trained is lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dit_fast import data as data_module
from dit_fast.checkpoint.folder import latest_checkpoint, load_checkpoint, step_folders
from dit_fast.data.stream import BatchStream
from dit_fast.errors import CheckpointError, DataError
from dit_fast.training.config import TrainConfig
from dit_fast.training.log import read_log
from dit_fast.training.run import Readable, resume, train
from tests.caption_sets import embeddings, padded, write_captioned
from tests.distributed.ranks import train as ranks_train
from tests.tolerance import SUM, assert_close

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


# --skip-unreadable ----------------------------------------------------------------------------------------------------


def break_header(path: Path) -> None:
    path.write_bytes(b"no image at all")


@pytest.mark.parametrize("spoil", [damage, break_header])
@pytest.mark.parametrize("buckets", [(), ((8, 8), (8, 16))])
def test_the_next_of_its_class_is_read_in_its_place(tmp_path, spoil, buckets):
    """In memory and from files alike, each time that the sample comes up; all else stays as it was."""
    folder = write_images(tmp_path / "images")
    size = {} if buckets else {"image_size": 8}
    whole = data_module.open_images(folder, buckets=buckets, **size)
    spoil(folder / "cat" / "7.jpg")
    spoil(folder / "dog" / "1.jpg")
    sets = [
        data_module.open_images(folder, buckets=buckets, skip_unreadable=2, memory_limit=limit, **size)
        for limit in (1 << 30, 0)
    ]
    assert [data.train.lazy for data in sets] == [False, True]
    # The last cat's next is the first; the second dog's is the third.
    instead = {7: 0, 9: 10}
    streams = [BatchStream(data.train, 4, 0, True) for data in (whole, *sets)]
    for step in range(8):
        indices = streams[0].indices(step)
        flip = streams[0].mirrored(step)
        expected = whole.train.batch(torch.tensor([instead.get(i, i) for i in indices.tolist()]), flip)
        for stream in streams[1:]:
            samples, labels = stream.batch(step)
            assert torch.equal(samples, expected)
            assert torch.equal(labels, whole.train.labels[indices])
    assert all(set(data.unreadable.known) == {"cat/7.jpg", "dog/1.jpg"} for data in sets)
    for data in sets:  # what asks for samples by number is not given others
        with pytest.raises(DataError, match=r"cat/7\.jpg .*cannot be read"):
            data.train.batch(torch.tensor([7]))


def test_a_run_goes_on_without_unreadable_files_and_resumes_to_the_bit(tmp_path, images, caplog):
    bad = images / "cat" / "3.jpg"
    damage(bad)
    result = train(config(images, skip_unreadable=1), tmp_path / "whole")
    assert list(result.unreadable) == ["cat/3.jpg"]
    assert f"{bad} (" in caplog.text
    assert "skipped, 1 of --skip-unreadable 1" in caplog.text
    for stop in (1, 4):
        run = tmp_path / f"run{stop}"
        train(config(images, skip_unreadable=1, steps=stop), run)
        again = resume(run, {"steps": 6})
        assert_equal(run, tmp_path / "whole")
        assert list(again.unreadable) == ["cat/3.jpg"]


def test_one_more_than_allowed_ends_the_run_saved(tmp_path, images):
    for name in ("cat/3.jpg", "dog/5.jpg"):
        damage(images / name)
    with pytest.raises(
        DataError, match=r"replace it, or skip it with --skip-unreadable 2 \(2 files so far\)"
    ):
        train(config(images, skip_unreadable=1, steps=40), tmp_path / "run")
    saved = load_checkpoint(latest_checkpoint(tmp_path / "run"))
    assert sorted(saved.manifest["unreadable"]["files"]) == ["cat/3.jpg", "dog/5.jpg"]
    assert resume(tmp_path / "run", {"skip_unreadable": 2}).step == 40


def test_a_replaced_file_may_have_another_length(tmp_path, images):
    """The usual accident is a file that was cut: its replacement is longer, and the run continues all the same."""
    train(config(images), tmp_path / "whole")
    bad = first_read_in(images, 3)
    kept = bad.read_bytes()
    bad.write_bytes(kept[:-60])
    with pytest.raises(DataError, match="step 4: "):
        train(config(images), tmp_path / "run")
    bad.write_bytes(kept)
    other = next(path for path in images.rglob("*.jpg") if path != bad)
    other.write_bytes(other.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="trained on other data: fingerprint"):
        resume(tmp_path / "run", {})
    other.write_bytes(other.read_bytes()[:-1])
    resume(tmp_path / "run", {})
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_a_class_without_a_readable_image_is_named(tmp_path, images):
    for number in range(8):
        damage(images / "dog" / f"{number}.jpg")
    with pytest.raises(
        DataError, match=r"dog/\d\.jpg cannot be read, and no other image of its class and shape can"
    ):
        train(config(images, skip_unreadable=8, steps=40), tmp_path / "run")


def test_a_set_that_is_read_at_once_says_what_to_give(tmp_path):
    folder = write_images(tmp_path / "images")
    damage(folder / "cat" / "3.jpg")
    with pytest.raises(
        DataError, match=r"1 of 16 images cannot be read: .*or skip them with --skip-unreadable 1"
    ):
        data_module.open_images(folder, 8)
    assert list(data_module.open_images(folder, 8, skip_unreadable=1).unreadable.known) == ["cat/3.jpg"]


def test_a_caption_goes_with_the_image_that_is_read(tmp_path):
    folder = write_captioned(tmp_path / "images")
    save_file(embeddings(), folder / "embeddings.safetensors")
    damage_png(folder / "4.png")
    data = data_module.open_images(folder, 8, skip_unreadable=1, memory_limit=0)
    samples, told = data.train.take(torch.tensor([4, 6]), data.train.batch)
    assert torch.equal(told, padded()[[5, 6]])
    assert torch.equal(samples, data.train.batch(torch.tensor([5, 6])))


def damage_png(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of fast-DiT's: six latents of two classes."""
    draw = np.random.default_rng(0)
    for part in ("features", "labels"):
        (tmp_path / "cache" / f"set_{part}").mkdir(parents=True)
    for number in range(6):
        np.save(
            tmp_path / "cache" / "set_features" / f"{number}.npy", draw.random((1, 4, 8, 8), dtype=np.float32)
        )
        np.save(tmp_path / "cache" / "set_labels" / f"{number}.npy", np.array([number % 2]))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x93NUMPY\x01\0\x76\0{'descr': ", b"PK\x03\x04 an archive", b"\x93NUMPY" + b"\xff" * 200,
        b"\x93NUMPY\x01\0\x46\0{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }   \n",
    ],
)  # fmt: skip
def test_a_damaged_entry_of_a_cache_is_named_and_can_be_left_out(cache, content):
    bad = cache / "set_features" / "4.npy"
    whole = data_module.open_data(cache)
    expected = whole.train.moments(torch.tensor([0, 3]))
    bad.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{bad} "):
        whole.train.batch(torch.tensor([3, 4]))
    data = data_module.open_data(cache, skip_unreadable=1)
    moments, labels = data.train.take(torch.tensor([4, 3]), data.train.moments)
    assert torch.equal(moments, expected)
    assert labels.tolist() == [0, 1]


def test_a_latent_that_is_not_finite_is_left_out(cache):
    bad = cache / "set_features" / "1.npy"
    np.save(bad, np.full((1, 4, 8, 8), np.nan, np.float32))
    data = data_module.open_data(cache, skip_unreadable=1)
    stream = data_module.open_stream(data, 6, 0)
    _, labels = stream.batch(0)
    assert sorted(labels.tolist()) == [0] * 3 + [1] * 3
    assert list(data.unreadable.known) == [str(bad)]


def test_an_image_that_is_encoded_as_it_is_read_is_named(tmp_path, images):
    class Encoder:
        name, image_channels, latent_channels, factor, shift, scale = "stub", 3, 1, 4, (0.0,), (1.0,)

        def __call__(self, pixels):
            mean = pixels.mean((1, 2, 3)).view(-1, 1, 1, 1, 1).expand(-1, 2, 1, 2, 2)
            return mean.clone()

        def identity(self):
            return {"name": "stub", "source": "stub", "sha256": "0"}

    damage(images / "cat" / "2.jpg")
    data = data_module.open_data(images, 8, encoder=Encoder())
    with pytest.raises(DataError, match=r"cat/2\.jpg \("):
        data.train.moments(torch.tensor([1, 2]))
    data = data_module.open_data(images, 8, encoder=Encoder(), skip_unreadable=1)
    moments, _ = data.train.take(torch.tensor([2, 4]), data.train.moments)
    assert torch.equal(moments, data.train.moments(torch.tensor([3, 4])))
    assert data.train.source.where(2) == "cat/2.jpg"


def test_ranks_leave_out_the_same_files(tmp_path):
    """Two ranks and one read the same samples; both end well, and the checkpoint names what either found."""
    folder = write_images(tmp_path / "images")
    names = ["cat/3.jpg", "dog/6.jpg"]
    for name in names:
        damage(folder / name)
    words = [
        *(
            "--data",
            folder,
            "--image-size",
            "8",
            "--skip-unreadable",
            "2",
            "--hidden-size",
            "16",
            "--depth",
            "1",
        ),
        *(
            "--num-heads",
            "2",
            "--patch-size",
            "4",
            "--batch-size",
            "8",
            "--steps",
            "4",
            "--objective",
            "flow",
        ),
        *("--threads", "1", "--num-workers", "1", "--lr", "1e-2", "--ckpt-every", "2"),
    ]
    losses = []
    for size in (1, 2):
        ended = ranks_train(
            tmp_path / str(size), size, [*words, "--log-every", "1", "--out", tmp_path / f"run{size}"]
        )
        assert ended.codes == [0] * size, ended.text
        assert "left out, because they could not be read: 2 files: cat/3.jpg (" in ended.outputs[0]
        saved = load_checkpoint(latest_checkpoint(tmp_path / f"run{size}"))
        assert sorted(saved.manifest["unreadable"]["files"]) == names
        losses.append([line["loss"] for line in read_log(tmp_path / f"run{size}" / "log.jsonl")])
    assert_close(losses[1], losses[0], 4 * SUM)
