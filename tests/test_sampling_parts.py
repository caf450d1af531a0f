"""Samples in parts: any number of ranks, killed and resumed, none made twice, one archive of the same bytes."""

import argparse
import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.distributed.run import parse_args as torchrun

from dit_fast.cli import main
from dit_fast.errors import OutputError
from dit_fast.models import DiT
from dit_fast.sampling.parts import Parts


def parts_of(folder, num=10, batch_size=4, **request) -> Parts:
    return Parts(folder, {"seed": 0, **request}, num, batch_size, (2, 2, 3), "uint8")


def images(parts: Parts, part: int) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), number, dtype=np.uint8) for number in parts.numbers(part)])


def test_parts_share_every_sample_once_among_any_ranks(tmp_path):
    parts = parts_of(tmp_path, 50, 4)
    parts.open()
    for world in (1, 2, 3, 7, 20):
        shares = [parts.missing(rank, world) for rank in range(world)]
        numbers = sorted(n for share in shares for part in share for n in parts.numbers(part))
        assert numbers == list(range(50))


def test_only_whole_parts_count_and_what_is_there_is_not_asked_for_again(tmp_path):
    parts = parts_of(tmp_path)
    parts.open()
    parts.write(1, images(parts, 1))
    assert parts.missing() == [0, 2]
    assert parts.finished() == 4
    parts.write(0, images(parts, 0))
    whole = parts.path(0).read_bytes()
    for damaged in (b"", whole[:50], whole[:-1], b"x" * len(whole)):
        parts.path(0).write_bytes(damaged)
        assert parts.missing() == [0, 2]
    np.save(parts.path(0), images(parts, 0).astype(np.int64))
    assert parts.missing() == [0, 2]
    np.save(parts.path(0), np.array([{}], dtype=object), allow_pickle=True)
    assert parts.missing() == [0, 2]
    parts_of(tmp_path).open()
    with pytest.raises(OutputError, match=r"000000\.npy is missing or damaged; run the command again"):
        list(parts)
    with pytest.raises(ValueError, match=r"part 2 is uint8 \(4, 2, 2, 3\), expected uint8 \(2, 2, 2, 3\)"):
        parts.write(2, images(parts, 1))


def test_a_part_that_does_not_read_back_is_an_error(tmp_path, monkeypatch):
    """Waited for, it would be for ever."""
    parts = parts_of(tmp_path)
    parts.open()
    monkeypatch.setattr(np, "save", lambda file, array: file.write(b"cut"))
    with pytest.raises(OutputError, match=r"000000\.npy does not read back as it was written"):
        parts.write(0, images(parts, 0))


def test_another_request_is_not_mixed_in(tmp_path):
    parts_of(tmp_path).open()
    with pytest.raises(
        OutputError, match="holds samples of another request: seed 0 there, 1 asked for; remove it"
    ):
        parts_of(tmp_path, seed=1).open()
    with pytest.raises(OutputError, match="num 10 there, 11 asked for"):
        parts_of(tmp_path, num=11).open()
    (tmp_path / "parts" / "request.json").write_text("{")
    with pytest.raises(
        OutputError, match=r"request\.json cannot be read .*; remove .*parts or choose another --out"
    ):
        parts_of(tmp_path).open()


def test_archive_is_adm_s_and_equal_samples_are_equal_bytes(tmp_path):
    parts = parts_of(tmp_path)
    parts.open()
    for part in (2, 0, 1):
        parts.write(part, images(parts, part))
    parts.write_npz(tmp_path / "a.npz")
    time.sleep(2)  # the resolution of a zip's dates
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


def start_ranks(command: list[str], world: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "dit_fast.cli", *command],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


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
    ranks = start_ranks(command, 2)
    wanted = 1 + np.random.default_rng(os.getpid()).integers(6)
    deadline = time.monotonic() + 120
    while len(list((out / "parts").glob("[0-9]*.npy"))) < wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
        rank.communicate()
    left = sorted((out / "parts").glob("[0-9]*.npy"))
    assert wanted <= len(left) < 15, "killed in the middle"
    assert not (out / "samples.npz").exists()

    # What was there is marked: it must come through the resumed run untouched.
    marked = np.load(left[0])
    original = marked.copy()
    marked[0, 0, 0] = 255 - marked[0, 0, 0]
    np.save(left[0], marked)
    ranks = start_ranks(command, 2)
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert f"{4 * len(left)} of 60 images are there already: going on" in outputs[0]
    first = 4 * int(left[0].stem)
    with np.load(out / "samples.npz") as archive:
        array = archive["arr_0"].copy()
    assert np.array_equal(array[first : first + 4], marked)
    with np.load(tmp_path / "long" / "samples.npz") as archive:
        array[first : first + 4] = original
        assert np.array_equal(array, archive["arr_0"])
    assert sorted(path.name for path in out.iterdir()) == ["sample.png", "samples.npz"]

    # Unmarked, two ranks from the beginning: the bytes of one process.
    ranks = start_ranks(arguments(checkpoint, tmp_path / "two"), 2)
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert (tmp_path / "two" / "samples.npz").read_bytes() == expected, outputs
    assert expected != expected_long


def test_resumed_in_process_after_an_interruption(checkpoint, tmp_path, monkeypatch, capsys):
    """The same command goes on where it was cut off, and refuses to mix another request in."""
    write, written = Parts.write, []

    def interrupted(self, part, samples):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, samples)

    monkeypatch.setattr(Parts, "write", interrupted)
    assert main(arguments(checkpoint, tmp_path)) == 130
    assert "interrupted" in capsys.readouterr().err
    assert main(arguments(checkpoint, tmp_path, "--cfg-scale", "2")) == 1
    error = capsys.readouterr().err
    assert "parts holds samples of another request: guidance [4.0, 3, 0.0, 1.0, 'constant'] there" in error
    assert error.count("\n") == 1

    monkeypatch.setattr(
        Parts, "write", lambda self, part, samples: (written.append(part), write(self, part, samples))
    )
    assert main(arguments(checkpoint, tmp_path)) == 0
    assert "12 of 60 images are there already: going on" in capsys.readouterr().out
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
