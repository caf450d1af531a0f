"""`dit-fast encode` as a user calls it: exit statuses, one-line errors, ranks of torchrun, Ctrl-C, SIGTERM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import latent_sets
import pytest
from latent_sets import contents, write_images, write_vae
from patience import PATIENCE, wait_until

from dit_fast.cli import encode as encode_command
from dit_fast.cli import main
from dit_fast.data import open_data

ROOT = Path(__file__).parents[1]
SMALL = ["--size", "16", "--shard-size", "3", "--batch-size", "2", "--device", "cpu"]
# The command with the stand-in for diffusers. "hang": after its first shard it waits for a signal; "run": it does not,
# but each convolution takes a while, so that two processes work side by side.
SLOW_COMMAND = """
import pathlib, sys, time, types
sys.path.insert(0, sys.argv[1])
import latent_sets, torch
sys.modules["diffusers"] = types.SimpleNamespace(AutoencoderKL=latent_sets.StandInVae)
forward, first = torch.nn.Conv2d.forward, pathlib.Path(sys.argv[3])
def slow(*args):
    time.sleep(1000 if sys.argv[2] == "hang" and first.exists() else 0.1)
    return forward(*args)
torch.nn.Conv2d.forward = slow
from dit_fast.cli import main
sys.exit(main(["encode", *sys.argv[4:]]))
"""


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
    ranks = []
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        ranks.append(start(work, environment))
    assert [rank.wait(PATIENCE) for rank in ranks] == [0, 0]
    assert contents(work / "set") == contents(work / "alone")


def start(
    work: Path, environment: dict[str, str] | None = None, after_a_shard: str = "run"
) -> subprocess.Popen[str]:
    words = [str(ROOT / "tests"), after_a_shard, str(work / "set" / "shard-00000.json"), *arguments(work)]
    command = [sys.executable, "-c", SLOW_COMMAND, *words]
    # A shell's background job, and what it starts, ignores Ctrl-C.
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stderr=subprocess.PIPE, env=environment, preexec_fn=listen
    )


def listen() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_goes_on(work, sent, capsys):
    process = start(work, after_a_shard="hang")
    wait_until((work / "set" / "shard-00000.json").exists, process, what="a shard")
    process.send_signal(sent)
    error = process.communicate(timeout=PATIENCE)[1]
    if sent is signal.SIGINT:
        assert process.returncode == 130
        assert error == (
            f"dit-fast: interrupted; the same command goes on from the whole shards in {work}/set\n"
        )
        assert not list((work / "set").glob(".tmp-*"))
    else:
        assert process.returncode == -sent
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
        (["--size", "18"], "--size 18 is not a multiple of 4"),
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
    assert "pip install 'dit-fast[vae]'" in error_of(capsys)


def test_usage_errors(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["encode", "--data", "x"])
    assert caught.value.code == 2
    assert "--out" in capsys.readouterr().err
