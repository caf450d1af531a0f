"""`dit-fast encode` as a user calls it: exit statuses, one-line errors, ranks of torchrun, Ctrl-C, SIGTERM."""

import multiprocessing
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_fast.cli import encode as encode_command
from dit_fast.cli import main
from dit_fast.data import open_data
from tests import latent_sets
from tests.distributed.ranks import PRELOADED
from tests.latent_sets import contents, write_images, write_vae
from tests.patience import PATIENCE, wait_until

SMALL = ["--size", "16", "--shard-size", "3", "--batch-size", "2", "--device", "cpu"]


def slow_command(words: list[str], variables: dict[str, str], errors: Path, hangs_after: Path | None) -> None:
    """The command with the stand-in for diffusers, as the body of a forked process.

    Each convolution takes a while, so that two processes work side by side; once `hangs_after` is there, it waits for
    a signal.
    """
    os.environ.update(variables)
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    # A shell's background job, and what it starts, ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["diffusers"] = types.SimpleNamespace(AutoencoderKL=latent_sets.StandInVae)
    forward = torch.nn.Conv2d.forward

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(1000 if hangs_after is not None and hangs_after.exists() else 0.1)
        return forward(*arguments)

    torch.nn.Conv2d.forward = slow
    sys.exit(main(["encode", *words]))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    latent_sets.install(monkeypatch)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    write_images(tmp_path / "images")
    write_vae(tmp_path / "vae")
    return tmp_path


def arguments(work: Path, out: str = "set") -> list[str]:
    return ["--data", str(work / "images"), "--vae", str(work / "vae"), "--out", str(work / out), *SMALL]


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr, without its prefix."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dit-fast: error: ")
    return lines[0].removeprefix("dit-fast: error: ")


def test_a_folder_becomes_a_set(work, capsys):
    assert main(["encode", *arguments(work)]) == 0
    answer = capsys.readouterr()
    assert answer.out.splitlines() == [
        f"{work}/set is complete: 7 images; shards: 3 encoded, 0 kept",
    ]
    assert answer.err == "", "no progress bar where there is no terminal"
    assert len(open_data(work / "set", 16).train) == 7
    assert main(["encode", *arguments(work)]) == 0
    assert "shards: 0 encoded, 3 kept" in capsys.readouterr().out


def test_ranks_of_torchrun(work, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["encode", *arguments(work)]) == 0
    assert (
        capsys.readouterr().out == "rank 0/2: shards: 2 encoded, 0 kept, 1 still to come from other ranks\n"
    )
    monkeypatch.setenv("RANK", "1")
    assert main(["encode", *arguments(work)]) == 0
    assert "is complete: 7 images; shards: 1 encoded, 0 kept" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "one")
    assert main(["encode", *arguments(work)]) == 1
    assert error_of(capsys) == "RANK is 'one': torchrun sets a number there"


def test_two_processes_at_once(work):
    assert main(["encode", *arguments(work, "alone")]) == 0
    ranks = [start(work, {"RANK": str(r), "WORLD_SIZE": "2", "LOCAL_RANK": str(r)}) for r in range(2)]
    for rank in ranks:
        rank.join(PATIENCE)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert contents(work / "set") == contents(work / "alone")


def start(
    work: Path, variables: dict[str, str], hangs_after: Path | None = None
) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    settings = (arguments(work), variables, work / "errors", hangs_after)
    process = context.Process(target=slow_command, args=settings, daemon=True)
    process.start()
    return process


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_goes_on(work, sent, capsys):
    shard = work / "set" / "shard-00000.json"
    process = start(work, {}, hangs_after=shard)
    wait_until(lambda: shard.exists() or not process.is_alive(), what="a shard")
    os.kill(process.pid, sent)
    process.join(PATIENCE)
    error = (work / "errors").read_text()
    if sent is signal.SIGINT:
        assert process.exitcode == 130, error
        assert error == (
            f"dit-fast: interrupted; the same command continues from the complete shards in {work}/set\n"
        )
        assert not list((work / "set").glob(".tmp-*"))
    else:
        assert process.exitcode == -sent, error
    assert not (work / "set" / "manifest.json").exists()
    assert main(["encode", *arguments(work)]) == 0
    assert "0 kept" not in capsys.readouterr().out
    assert main(["encode", *arguments(work, "alone")]) == 0
    assert contents(work / "set") == contents(work / "alone")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--vae", "nowhere"], "--vae nowhere: give ema, mse, or a folder with a diffusers AutoencoderKL"),
        (["--size", "18"], "--image-size 18 is not a multiple of 4"),
        (["--device", "cuda"], "--device cuda: this PyTorch sees no CUDA device; give --device cpu or auto"),
        (["--out", "/proc/set"], "cannot write to /proc/set"),
    ],
)
def test_errors_are_one_line(work, capsys, monkeypatch, options, message):
    monkeypatch.setattr(encode_command.torch.cuda, "device_count", lambda: 0)
    assert main(["encode", *arguments(work), *options]) == 1
    assert error_of(capsys).startswith(message)
    assert not (work / "set" / "manifest.json").exists()


def test_unreadable_images_and_a_missing_package(work, capsys, monkeypatch):
    (work / "images" / "a" / "002.png").write_bytes(b"\x89PNG\r\n")
    assert main(["encode", *arguments(work)]) == 1
    assert "1 of 7 images cannot be read: " in (error := error_of(capsys))
    assert "a/002.png" in error
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["encode", *arguments(work)]) == 1
    assert "[vae]'" in error_of(capsys)


def test_usage_errors(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["encode", "--data", "x"])
    assert caught.value.code == 2
    assert "--out" in capsys.readouterr().err
