"""Samples in parts: any number of ranks, killed and resumed, none made twice, one archive of the same bytes."""

import argparse
import contextlib
import importlib
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.run import parse_args as torchrun

from dit_fast.cli import main, sample, sample_request
from dit_fast.cli.sample_options import SampleOptions
from dit_fast.cli.sample_request import load_request
from dit_fast.distributed.world import World
from dit_fast.errors import OutputError
from dit_fast.interop import ModelInfo
from dit_fast.models import DiT
from dit_fast.sampling import Sampler
from dit_fast.sampling.shards import SampleShards
from dit_fast.utils.options import read_options
from tests.distributed.ranks import Forked
from tests.patience import wait_until


def parts_of(folder, num=10, batch_size=4, **request) -> SampleShards:
    return SampleShards(folder, {"seed": 0, **request}, num, batch_size, (2, 2, 3), "uint8")


def images(parts: SampleShards, part: int) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), number, dtype=np.uint8) for number in parts.numbers(part)])


def test_only_whole_parts_count_and_what_is_there_is_not_asked_for_again(tmp_path):
    parts = parts_of(tmp_path)
    parts.open()
    parts.write(1, images(parts, 1))
    assert parts.missing() == [0, 2]
    assert parts.finished() == 4
    parts.write(0, images(parts, 0))
    assert np.array_equal(np.load(parts.path(0)), images(parts, 0)), "an ordinary .npy file to others"
    whole = parts.path(0).read_bytes()
    flipped = [bytearray(whole) for _ in range(4)]
    for copy, place in zip(flipped, (3, 60, len(whole) - 40, len(whole) - 1), strict=True):
        copy[place] ^= 1
    for damaged in (b"", whole[:50], whole[:-1], whole + b"x", b"x" * len(whole), *map(bytes, flipped)):
        parts.path(0).write_bytes(damaged)
        assert parts_of(tmp_path).missing() == [0, 2]
    for foreign in (images(parts, 0), images(parts, 0).astype(np.int64)):
        np.save(parts.path(0), foreign)
        assert parts_of(tmp_path).missing() == [0, 2]
    parts.path(0).unlink()
    os.mkfifo(parts.path(0))
    assert parts_of(tmp_path).missing() == [0, 2], "not waited for"
    parts.path(0).unlink()
    np.save(parts.path(0), np.array([{}], dtype=object), allow_pickle=True)
    parts = parts_of(tmp_path)
    assert parts.missing() == [0, 2]
    parts.open()
    with pytest.raises(OutputError, match=r"000000\.npy is missing or damaged; run the command again"):
        list(parts)
    with pytest.raises(ValueError, match=r"shard 2 is uint8 \(4, 2, 2, 3\), expected uint8 \(2, 2, 2, 3\)"):
        parts.write(2, images(parts, 1))


def test_a_part_that_does_not_read_back_is_an_error(tmp_path, monkeypatch):
    """Waited for, it would be for ever."""
    parts = parts_of(tmp_path)
    parts.open()
    monkeypatch.setattr(SampleShards, "_checksum", lambda self, array: os.urandom(32))
    with pytest.raises(OutputError, match=r"000000\.npy does not read back as it was written"):
        parts.write(0, images(parts, 0))


def test_another_request_is_not_mixed_in(tmp_path):
    parts = parts_of(tmp_path)
    parts.open()
    parts.write(0, images(parts, 0))
    with pytest.raises(
        OutputError, match="holds samples of another request: seed 0 there, 1 requested; remove it"
    ):
        parts_of(tmp_path, seed=1).open()
    with pytest.raises(OutputError, match="num 10 there, 11 requested"):
        parts_of(tmp_path, num=11).open()
    # Not even where somebody changes the request: the shard's checksum covers its own.
    assert parts_of(tmp_path, seed=1).read(0) is None
    for damaged in ("{", "[1]", "[" * 10**5, "\0"):
        (tmp_path / "parts" / "request.json").write_text(damaged)
        with pytest.raises(OutputError, match=r"request\.json: (damaged or not JSON|holds a JSON array)"):
            parts_of(tmp_path).open()


def test_a_folder_without_a_shard_blocks_nobody(tmp_path):
    parts_of(tmp_path).open()
    parts = parts_of(tmp_path, seed=1)
    parts.open()
    parts.write(0, images(parts, 0))
    parts.remove_if_empty()
    assert parts.missing() == [1, 2]
    (tmp_path / "parts" / "000000.npy").unlink()
    parts.remove_if_empty()
    assert not (tmp_path / "parts").exists()


def test_archive_is_adm_s_and_equal_samples_are_equal_bytes(tmp_path, monkeypatch):
    parts = parts_of(tmp_path)
    parts.open()
    for part in (2, 0, 1):
        parts.write(part, images(parts, part))
    parts.write_npz(tmp_path / "a.npz")
    # A zip's dates are whole even seconds of the local time.
    local = time.localtime
    monkeypatch.setattr(time, "localtime", lambda seconds=None: local((seconds or time.time()) + 60))
    parts.write_npz(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        array = archive["arr_0"]
    assert (array.dtype, array.shape) == (np.uint8, (10, 2, 2, 3))
    assert array[:, 0, 0, 0].tolist() == list(range(10))
    assert parts.first(6)[:, 0, 0, 0].tolist() == list(range(6))
    parts.remove()
    assert not (tmp_path / "parts").exists()


# The whole path: ranks, kill, resume


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = DiT(8, 4, 3, 32, 1, 2, num_classes=10)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def arguments(checkpoint, out, *more) -> list[str]:
    options = ("--num", 60, "--steps", 6, "--batch-size", 4, "--npz", "--seed", 5, "--device", "cpu")
    return ["sample", "--ckpt", *map(str, (checkpoint, *options, "--out", out, *more))]


def held_rank(hold_after: int, command: list[str]) -> None:
    """A rank that waits to be killed before it writes a shard more than so many; -1 for never."""
    torch.set_num_threads(1)
    write, written = SampleShards.write, []

    def held(self, part, samples):
        if len(written) == hold_after:
            time.sleep(1000)
        written.append(part)
        return write(self, part, samples)

    SampleShards.write = held
    sys.exit(main(command))


def start_ranks(folder: Path, command: list[str], hold_after: tuple[int, ...] = (-1, -1)) -> Forked:
    """A process for each of `hold_after`."""
    return Forked(folder, [(held_rank, (after, command)) for after in hold_after])


def shards(out: Path) -> list[Path]:
    return sorted((out / "parts").glob("[0-9]*.npy"))


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_make_every_sample_once(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert main(arguments(checkpoint, tmp_path / "whole")) == 0
    expected = (tmp_path / "whole" / "samples.npz").read_bytes()
    # Another batch size, one process: sample i is what it was.
    assert main([*arguments(checkpoint, tmp_path / "other"), "--batch-size", "7"]) == 0
    with np.load(tmp_path / "whole" / "samples.npz") as a, np.load(tmp_path / "other" / "samples.npz") as b:
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1

    out = tmp_path / "killed"
    command = arguments(checkpoint, out, "--steps", "100")
    assert main(arguments(checkpoint, tmp_path / "long", "--steps", "100")) == 0
    expected_long = (tmp_path / "long" / "samples.npz").read_bytes()
    each = int(np.random.default_rng(os.getpid()).integers(1, 4))
    with start_ranks(tmp_path / "first", command, hold_after=(each, each)) as ranks:
        wait_until(
            lambda: len(shards(out)) == 2 * each or not ranks.all_alive(), what=f"{each} shards of each"
        )
    left = shards(out)
    assert len(left) == 2 * each, "killed in the middle"
    assert not (out / "samples.npz").exists()

    damaged = bytearray(left[0].read_bytes())
    damaged[200] ^= 1
    left[0].write_bytes(damaged)
    with start_ranks(tmp_path / "second", command) as ranks:
        ended = ranks.wait()
    assert ended.codes == [0, 0], ended.text
    assert f"{4 * (len(left) - 1)} of 60 images are there already: resuming" in ended.outputs[0]
    assert (out / "samples.npz").read_bytes() == expected_long
    assert sorted(path.name for path in out.iterdir()) == ["sample.png", "samples.npz"]

    # Unmarked, two ranks from the beginning: the bytes of one process.
    with start_ranks(tmp_path / "third", arguments(checkpoint, tmp_path / "two")) as ranks:
        ended = ranks.wait()
    assert (tmp_path / "two" / "samples.npz").read_bytes() == expected, ended.text
    assert expected != expected_long


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_other_at_once_and_is_named(checkpoint, tmp_path):
    command = arguments(checkpoint, tmp_path, "--steps", "100")
    with start_ranks(tmp_path / "said", command, hold_after=(-1, 1)) as ranks:
        # The first one draws its 8 and then waits for the second.
        wait_until(lambda: len(shards(tmp_path)) >= 2 or not ranks.all_alive(), what="shards")
        ranks.processes[1].kill()
        ended = ranks.wait(ranks=[0])
    (output,) = ended.outputs
    assert ended.codes == [1], output
    error = output.strip().splitlines()[-1]
    assert error.startswith("dit-fast: error: sampling: rank 1 does not answer"), output
    assert "run the command again" in error
    assert shards(tmp_path), "what was drawn is kept"


def test_a_shard_damaged_by_the_time_all_are_drawn_is_drawn_again(checkpoint, tmp_path, monkeypatch, capsys):
    """Waiting for it would last for ever."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert main(arguments(checkpoint, tmp_path / "whole")) == 0
    wait, drawn = World.wait, []

    def damage(self, meanwhile):
        wait(self, meanwhile)
        shard = tmp_path / "out" / "parts" / "000003.npy"
        shard.write_bytes(shard.read_bytes()[:-1])
        drawn.extend(path.name for path in shard.parent.glob("[0-9]*.npy"))

    monkeypatch.setattr(World, "wait", damage)
    monkeypatch.setattr(SampleShards, "is_whole", lambda self, part: self.read(part) is not None)
    assert main(arguments(checkpoint, tmp_path / "out")) == 0
    assert len(drawn) == 15
    assert (tmp_path / "out" / "samples.npz").read_bytes() == (
        tmp_path / "whole" / "samples.npz"
    ).read_bytes()


@pytest.mark.parametrize("change", ["weights", "heads", "vae scale", "precision", "schedule"])
def test_everything_that_determines_a_pixel_is_part_of_the_request(checkpoint, tmp_path, monkeypatch, change):
    """Plans of two settings that differ in one thing differ in that entry of the request alone."""

    def request(model: DiT, *more, **info) -> dict:
        info = ModelInfo(Path("model"), "only", latent=False, **info)
        monkeypatch.setattr(sample_request, "load_model", lambda *args, **keywords: (model, info))
        parser = argparse.ArgumentParser()
        sample.add_arguments(parser)
        words = [*arguments(checkpoint, tmp_path / str(len(list(tmp_path.iterdir()))))[1:], *more]
        return load_request(read_options(SampleOptions, parser.parse_args(words))).parts.request

    def model(heads: int = 2, channels: int = 3) -> DiT:
        torch.manual_seed(0)
        return DiT(8, 4, channels, 32, 1, heads, num_classes=10).eval()

    if change == "vae scale":
        decoder = SimpleNamespace(sha256="", shift=(0.0,), scale=(1.0,), factor=8)
        monkeypatch.setattr(sample_request, "LatentDecoder", lambda *args: decoder)
        usual, other = (request(model(), "--vae", "x", data={"scale": [s]}) for s in (1.0, 2.0))
    else:
        other_model = model(4) if change == "heads" else model()
        if change == "weights":
            with torch.no_grad():
                other_model.x_embedder.proj.bias[0] += 1e-3
        more = {"precision": ("--precision", "bf16"), "schedule": ("--steps", "5")}.get(change, ())
        usual, other = request(model()), request(other_model, *more)
    entry = {"heads": "model", "vae scale": "vae", "schedule": "noise_schedule"}.get(change, change)
    assert [key for key in usual if usual[key] != other[key]] == [entry]


def test_images_of_the_same_command_do_not_block_its_second_try(checkpoint, tmp_path, monkeypatch, capsys):
    """The archive did not fit after the images were written: the command runs again."""
    command = [*arguments(checkpoint, tmp_path), "--save-images"]
    write_npz = SampleShards.write_npz

    def full(self, path):
        raise OutputError("no space")

    monkeypatch.setattr(SampleShards, "write_npz", full)
    assert main(command) == 1
    assert len(list((tmp_path / "images").iterdir())) == 60
    (tmp_path / ".tmp-images-killed").mkdir()
    monkeypatch.setattr(SampleShards, "write_npz", write_npz)
    assert main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "sample.png", "samples.npz"]
    assert main(command) == 1
    assert "images of an earlier command is there already" in capsys.readouterr().err


def test_a_failure_before_the_first_shard_leaves_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    def no_memory(self, *args, **keywords):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Sampler, "__call__", no_memory)
    assert main(arguments(checkpoint, tmp_path)) == 1
    assert "out of memory" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()


def test_resumed_in_process_after_an_interruption(checkpoint, tmp_path, monkeypatch, capsys):
    """The same command goes on where it was cut off, and refuses to mix another request in."""
    write, written = SampleShards.write, []

    def interrupted(self, part, samples):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, samples)

    monkeypatch.setattr(SampleShards, "write", interrupted)
    assert main(arguments(checkpoint, tmp_path)) == 130
    assert "interrupted" in capsys.readouterr().err
    assert main(arguments(checkpoint, tmp_path, "--cfg-scale", "2")) == 1
    error = capsys.readouterr().err
    assert "parts holds samples of another request: guidance [4.0, 3, 0.0, 1.0, 'constant'] there" in error
    assert error.count("\n") == 1

    monkeypatch.setattr(
        SampleShards, "write", lambda self, part, samples: (written.append(part), write(self, part, samples))
    )
    assert main(arguments(checkpoint, tmp_path)) == 0
    assert "12 of 60 images are there already: resuming" in capsys.readouterr().out
    assert sorted(written) == list(range(15)), "every part once"
    request = {"classes": np.load(tmp_path / "samples.npz")["arr_0"].shape}
    assert request == {"classes": (60, 8, 8, 3)}


@pytest.mark.parametrize("name", ["sample", "train", "encode"])
def test_torchrun_leaves_our_options_alone(name):
    """It reads abbreviations of its own options among ours: each of ours needs a spelling that is none."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"dit_fast.cli.{name}").add_arguments(parser)
    for action in parser._actions:
        passed = []
        for option in action.option_strings:
            words = [name, option, "5"]
            with contextlib.suppress(SystemExit):
                passed.append(
                    torchrun(["--nproc-per-node", "2", "-m", "dit_fast.cli", *words]).training_script_args
                    == words
                )
        assert any(passed) or not action.option_strings, f"torchrun takes {action.option_strings} for its own"


def test_options_of_many_samples(checkpoint, tmp_path, capsys, monkeypatch):
    assert (
        main(["sample", "--ckpt", str(checkpoint), "--npz", "--out", str(tmp_path), "--device", "cpu"]) == 1
    )
    assert "--classes random: say how many images with --num" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(checkpoint, tmp_path, "--compare-to", "digits")) == 1
    assert "--compare-to scores in one process" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    latent = DiT(8, 4, 4, 32, 1, 2, num_classes=10)
    latent.save_pretrained(tmp_path / "latent")
    assert main(arguments(tmp_path / "latent", tmp_path / "o", "--vae", "none")) == 1
    assert (
        "--npz holds images, these are 4 channels of latents: decode them with --vae"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "o" / "parts").exists()
