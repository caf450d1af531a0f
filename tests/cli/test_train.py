"""`dit-fast train` as a user calls it: exit statuses, one-line errors, signals and resumption."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dit_fast.checkpoint import folder as checkpoint
from dit_fast.cli import main
from dit_fast.cli import train as train_command
from dit_fast.data import relocate
from dit_fast.training import load_checkpoint, read_manifest
from dit_fast.training.log import read_log
from tests.distributed.ranks import Ranks
from tests.patience import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
TINY = [
    *("--data", "digits", "--hidden-size", "16", "--depth", "1", "--num-heads", "2", "--patch-size", "4"),
    *("--batch-size", "8", "--threads", "1"),
]


def call(*arguments: str | Path) -> int:
    return main(["train", *map(str, arguments)])


PREVIEW_LINE = "training images as the model receives them"


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dit_fast.cli", "train", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr, without its prefix."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dit-fast: error: ")
    return lines[0].removeprefix("dit-fast: error: ")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of coloured images of several sizes."""
    for label, name in enumerate(("day", "night")):
        for index in range(5):
            path = tmp_path / "photos" / name / f"{index}.{'png' if index % 2 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + index, 31 - index), (200 - 150 * label, 40, 20 * index)).save(path)
    return tmp_path / "photos"


def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    run = tmp_path / "run"
    assert call(*TINY, "--steps", 4, "--log-every", 2, "--out", run) == 0
    out = capsys.readouterr().out.splitlines()
    assert (
        out[-1]
        == f"checkpoint {run}/checkpoints/step-0000004, log {run}/log.jsonl, loss curve {run}/loss.png"
    )
    # Before the first step: what is about to happen, and a picture of the training images.
    names = [line.partition(":")[0] for line in out[:7]]
    assert names == ["data", "samples", "model", "training", "machine", "run", PREVIEW_LINE]
    assert out[0] == "data: digits: 1618 images, 10 classes: 157 (8) to 165 (3), 179 held out"
    assert "4 steps of 8 images" in out[3]
    assert Image.open(run / "preview.png").format == "PNG"
    assert re.fullmatch(r"step 2/4  loss [\d.]+  mse [\d.]+  vb [\d.]+  \d+ img/s  \d:\d\d:\d\d left", out[7])
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [2, 4]
    assert (run / "loss.png").stat().st_size > 10_000
    assert load_checkpoint(run / "checkpoints" / "step-0000004").step == 4
    assert call("--resume", run, "--steps", 6) == 0
    assert [path.name for path in checkpoint.step_folders(run)] == ["step-0000004", "step-0000006"]


def test_a_folder_of_photos_in_pixel_space(photos, tmp_path):
    options = [*TINY, "--batch-size", "4", "--steps", "2", "--out", tmp_path / "run"]
    assert call(*options, "--data-path", photos, "--image-size", 16) == 0
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "step-0000002")
    assert manifest["class_names"] == ["day", "night"]
    assert (manifest["data"]["image_size"], manifest["data"]["channels"]) == (16, 3)


def test_the_references_flags(tmp_path):
    reference = ["--data-path", "digits", "--global-batch-size", "599", "--global-seed", "3", "--epochs", "1"]
    for expected in ("000-DiT-S-4", "001-DiT-S-4"):
        size = ["--model", "DiT-S/4", "--depth", "1", "--hidden-size", "12", "--results-dir", str(tmp_path)]
        assert call(*reference, *size, "--ckpt-every", 2, "--log-every", 1, "--num-workers", 1) == 0
        manifest = read_manifest(checkpoint.latest_checkpoint(tmp_path / expected))
        assert (manifest["step"], manifest["seed"], manifest["samples_seen"]) == (3, 3, 1797)


def test_flags_override_a_preset(tmp_path, monkeypatch):
    demo = {"data": "digits", "depth": 1, "steps": 9, "patch_size": 4}
    monkeypatch.setattr(train_command, "PRESETS", {"demo": demo})
    options = ["--preset", "demo", "--hidden-size", "12", "--steps", "1", "--batch-size", "2"]
    assert call(*options, "--out", tmp_path / "run") == 0
    config = read_manifest(checkpoint.latest_checkpoint(tmp_path / "run"))["train_config"]
    assert (config["depth"], config["steps"], config["hidden_size"]) == (1, 1, 12)


def test_a_run_from_the_configuration_of_another_is_the_same_to_the_bit(tmp_path, capsys):
    """Flags replace the file's options, which replace the preset's; `info --config` prints what a run wrote."""
    first, again = tmp_path / "first", tmp_path / "again"
    assert call(*TINY, "--steps", 20, "--lr", "3e-3", "--out", first) == 0
    steps = ("--steps", 20, "--preset", "sit")
    assert call("--config", first / "config.yaml", *steps, "--out", again) == 0
    weights = [load_checkpoint(run / "checkpoints" / "step-0000020").model for run in (first, again)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert call("--config", first / "config.yaml", "--steps", 1, "--out", tmp_path / "short") == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "short"), "--config"]) == 0
    printed = capsys.readouterr().out
    assert "\nsteps: 1\n" in printed
    assert "\nlr: 0.003\n" in printed
    assert (tmp_path / "short" / "config.yaml").read_text().partition("\n")[2] == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is missing"),
        (["--data", "imagenet"], "neither a folder nor a built-in set"),
        ([*TINY, "--model", "DiT-M/2"], "--model DiT-M/2 is unknown; nearest: "),
        ([*TINY, "--patch-size", "3"], "image size 8 is not a multiple of the patch size 3"),
        ([*TINY, "--num-classes", "1000"], "--num-classes 1000 contradicts digits, which has 10 classes"),
        ([*TINY, "--batch-size", "9999"], "fewer than a batch of 9999"),
        ([*TINY, "--resume", "nowhere"], "--resume nowhere: no such run folder"),
        ([*TINY, "--results-dir", "elsewhere"], "both set the run folder: give one"),
        (["--resume", "nowhere", "--preset", "demo"], "--resume continues a run in its folder: remove --"),
    ],
)
def test_bad_input_gets_one_line_and_status_1(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = [] if "--resume" in arguments else ["--out", "run"]
    assert call(*arguments, *place) == 1
    assert message in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_bad_folders_get_one_line(photos, tmp_path, capsys):
    def refused(*more: str | Path) -> str:
        assert call(*TINY, "--data", photos, "--image-size", 16, "--out", tmp_path / "run", *more) == 1
        return error_of(capsys)

    assert "10 images, fewer than a batch of 16" in refused("--batch-size", 16)
    (photos / "day" / "0.jpg").write_bytes(b"\xff\xd8 not much of a photograph")
    assert "1 of 10 images cannot be read" in refused()
    shutil.rmtree(photos / "night")
    assert "has one class, day" in refused()
    shutil.rmtree(photos / "day")
    assert "no sub-folders" in refused()
    assert not (tmp_path / "run").exists()


def test_a_taken_or_blocked_output_path(tmp_path, capsys):
    assert call(*TINY, "--steps", 1, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert call(*TINY, "--steps", 1, "--out", tmp_path / "run") == 1
    assert "already holds a run; continue it with --resume" in error_of(capsys)
    (tmp_path / "file").touch()
    assert call(*TINY, "--steps", 1, "--out", tmp_path / "file" / "run") == 1
    assert "cannot write to" in error_of(capsys)


def test_resuming_from_damage_or_with_another_recipe(tmp_path, capsys):
    run = tmp_path / "run"
    assert call(*TINY, "--steps", 1, "--out", run) == 0
    capsys.readouterr()
    assert call("--resume", run, "--depth", 3, "--steps", 2) == 1
    assert "--depth is 1 there and 3 here" in error_of(capsys)
    weights = run / "checkpoints" / "step-0000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert call("--resume", run, "--steps", 2) == 1
    assert "model.safetensors has 1000 bytes, expected" in error_of(capsys)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--stepz", "--steps"),
        ("--accumulat=4", "--accumulate"),
        ("--lr-shedule", "--lr-schedule"),
        ("--xyzzy", ""),
    ],
)
def test_a_mistyped_option_is_answered_with_the_nearest(typed, meant, capsys):
    with pytest.raises(SystemExit) as left:
        call("--data", "digits", typed)
    assert left.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    expected = f"unrecognized arguments: {typed}" + (f" (did you mean {meant}?)" if meant else "")
    assert error == f"dit-fast: error: {expected}; see dit-fast train --help"


def test_usage_errors_leave_with_status_2(capsys):
    for arguments in (["--stepz", "3"], ["--steps", "many"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as left:
            call(*arguments)
        assert left.value.code == 2
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def interrupted(folder: Path, options: list[Any]) -> str:
    """Ctrl-C for a process of its own; what it printed."""
    process = start(*options)
    try:
        wait_until(lambda: read_log(folder / "log.jsonl"), process, what="a line of the log")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err == ""
    return out


def hung_up(folder: Path, options: list[Any]) -> str:
    """As `interrupted`, of a fork, which begins sooner."""
    with Ranks(folder.parent, 1, options) as ranks:
        wait_until(lambda: read_log(folder / "log.jsonl"), what="a line of the log")
        assert ranks.processes[0].pid is not None
        os.kill(ranks.processes[0].pid, signal.SIGHUP)
        ended = ranks.wait()
    assert ended.codes == [129], ended.text
    return ended.outputs[0]


@pytest.mark.parametrize(("stop", "name"), [(interrupted, "SIGINT"), (hung_up, "SIGHUP")])
def test_a_signal_saves_and_the_run_resumes_exactly(tmp_path, stop, name):
    run = tmp_path / "a run"
    out = stop(run, [*TINY, "--steps", 100_000, "--log-every", 5, "--out", run])
    path = checkpoint.latest_checkpoint(run)
    stopped = load_checkpoint(path).step
    last = out.splitlines()[-1]
    assert last.startswith(f"{name}: stopped and saved at step {stopped} of 100000; continue with: ")
    command = last.partition("continue with: ")[2]
    assert command == f"dit-fast train --resume '{run}'"
    assert (run / "loss.png").exists()

    assert call("--resume", run, "--steps", stopped + 2) == 0
    assert call(*TINY, "--steps", stopped + 2, "--out", tmp_path / "whole") == 0
    resumed, whole = (load_checkpoint(checkpoint.latest_checkpoint(r)) for r in (run, tmp_path / "whole"))
    assert resumed.step == whole.step == stopped + 2
    for part in ("model", "ema", "optimizer"):
        one, other = getattr(resumed, part), getattr(whole, part)
        assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_help_does_not_wait_for_pytorch():
    code = (
        "import sys; from dit_fast.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as left: print(left.code, sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "train a Diffusion Transformer" in done.stdout


def test_train_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        call("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    for field in train_command.TrainConfig.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text, field


def test_a_finished_run_says_so(tmp_path, capsys):
    run = tmp_path / "run"
    assert call(*TINY, "--steps", 2, "--out", run) == 0
    capsys.readouterr()
    assert call("--resume", run) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"{run} is finished already: step 2 of 2, checkpoint {run}/checkpoints/step-0000002; give more --steps to "
        "continue"
    ]
    assert call("--resume", run, "--steps", 3) == 0


def test_relative_data_are_found_from_elsewhere(tmp_path, photos, monkeypatch, capsys):
    """Where they were when the run began; else beside the run, with which they may have been moved."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    photos.rename(here / "photos")
    monkeypatch.chdir(here)
    words = ["--data", "photos", "--image-size", "8", *TINY[2:], "--batch-size", "4"]
    assert call(*words, "--steps", 1, "--out", "runs/a") == 0
    monkeypatch.chdir(there)
    assert call("--resume", here / "runs" / "a", "--steps", 2) == 0
    here.rename(tmp_path / "moved")
    run = tmp_path / "moved" / "runs" / "a"
    # Its last checkpoint has the path of the folder that is gone.
    capsys.readouterr()
    assert call("--resume", run, "--steps", 3) == 0
    (tmp_path / "moved" / "photos").rename(tmp_path / "lost")
    capsys.readouterr()
    assert call("--resume", run, "--steps", 4) == 1
    said = error_of(capsys)
    assert said.endswith(f"the run was trained in {there}: give --data")
    assert call("--resume", run, "--steps", 4, "--data", tmp_path / "lost") == 0


@pytest.mark.parametrize("moved", [False, True], ids=["elsewhere", "moved"])
def test_other_commands_find_the_relative_data_of_a_run(tmp_path, photos, monkeypatch, capsys, moved):
    """`sample --compare-to` and `likelihood` search as `train --resume` does; the holdout shows that it is the set."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    photos.rename(here / "photos")
    monkeypatch.chdir(here)
    words = ["--data", "photos", "--image-size", "8", "--holdout", "0.4", *TINY[2:], "--batch-size", "4"]
    assert call(*words, "--steps", 1, "--out", "runs/a") == 0
    monkeypatch.chdir(there)
    if moved:
        here = here.rename(tmp_path / "moved")
    ckpt = ["--ckpt", str(here / "runs" / "a"), "--out"]
    capsys.readouterr()
    assert main(["likelihood", *ckpt, "bits.json", "--num", "2"]) == 0
    assert json.loads(Path("bits.json").read_text())["split"] == "held-out"
    assert main(["sample", *ckpt, "drawn", "--num", "2", "--steps", "1", "--compare-to"]) == 0
    assert "has changed" not in capsys.readouterr().out
    (here / "photos").rename(tmp_path / "lost")
    assert main(["likelihood", *ckpt, "bits.json", "--num", "2"]) == 1
    assert "photos is neither a folder nor a built-in set" in error_of(capsys)


def test_a_built_in_name_is_never_a_path(tmp_path, monkeypatch):
    for name in ("digits", "ema"):
        (tmp_path / name).mkdir()
    for name in ("digits", "ema", "lost"):
        assert relocate(name, str(tmp_path), tmp_path / "runs" / "a") == name


def test_other_data_in_their_place_are_refused(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--data", "photos", "--image-size", "8", *TINY[2:], "--batch-size", "4"]
    assert call(*words, "--steps", 1, "--out", "run") == 0
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(photos, elsewhere / "photos")
    (elsewhere / "photos" / "day" / "0.jpg").unlink()
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert call("--resume", tmp_path / "run", "--steps", 2) == 1
    assert "trained on other data" in error_of(capsys)


def test_a_working_directory_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert call(*TINY, "--steps", 1, "--out", tmp_path / "run") == 1
    assert error_of(capsys) == "the working directory was removed; change to one that is there"
    assert not (tmp_path / "run").exists()
