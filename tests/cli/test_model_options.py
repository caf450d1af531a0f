"""Models with options of their own, from `dit-fast train` to `dit-fast sample`."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dit_fast.cli import main
from dit_fast.data import open_images
from dit_fast.interop import load_model
from dit_fast.training import read_manifest

TINY = [
    *("--data", "digits", "--hidden-size", "16", "--depth", "1", "--num-heads", "2", "--patch-size", "4"),
    *("--batch-size", "8", "--threads", "1", "--diffusion-steps", "50", "--steps", "2"),
]
SAMPLE = ["--steps", "2", "--num", "3", "--seed", "1"]


def call(command: str, *arguments: str | Path) -> int:
    return main([command, *map(str, arguments)])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.removeprefix("dit-fast: error: ").strip()


@pytest.mark.parametrize(
    "flags",
    [
        ("--positions", "rope", "--norm", "rmsnorm", "--mlp", "swiglu", "--qk-norm"),
        ("--positions", "learned", "--num-classes", "0"),
    ],
    ids=" ".join,
)
def test_train_resume_and_sample(flags: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("train", *TINY, *flags, "--sample-every", 2, "--sample-steps", 2, "--out", run) == 0
    assert (run / "samples" / "step-0000002.png").is_file()
    assert call("train", "--resume", run, "--steps", 4) == 0
    trained, _ = load_model(run)
    others, straight = tmp_path / "straight", [*TINY[:-1], "4"]
    assert call("train", *straight, *flags, "--out", others) == 0
    for (name, one), other in zip(
        trained.state_dict().items(), load_model(others)[0].state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    unconditional = "--num-classes" in flags
    assert call("sample", "--ckpt", run, "--out", tmp_path / "samples", *SAMPLE) == 0
    assert (tmp_path / "samples" / "sample.png").is_file()
    names = read_manifest(run / "checkpoints" / "step-0000004")["class_names"]
    assert len(names) == (0 if unconditional else 10)


def test_what_an_unconditional_model_is_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert call("train", *TINY, "--num-classes", 0, "--out", run) == 0
    capsys.readouterr()
    assert call("sample", "--ckpt", run, "--out", out, *SAMPLE, "--cfg-scale", 4) == 1
    assert "trained without classes: use scale 1" in error_of(capsys)
    assert call("sample", "--ckpt", run, "--out", out, *SAMPLE, "--cfg-scale", 1, "--classes", 3) == 1
    assert error_of(capsys) == "--classes 3: the model is unconditional; leave it out"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--positions", "rope", "--hidden-size", "20"), "a head of 10 is not a multiple of 4"),
        (("--mlp", "swiglu", "--mlp-epilogue", "triton"), "applies a GELU, which mlp='swiglu' has not"),
    ],
)
def test_what_does_not_fit_is_one_line(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", *TINY, *flags, "--out", tmp_path / "run") == 1
    error = error_of(capsys)
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_option_cannot_change_within_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert call("train", *TINY, "--out", run) == 0
    capsys.readouterr()
    assert call("train", "--resume", run, "--norm", "rmsnorm") == 1
    assert "--norm is layernorm there and rmsnorm here" in error_of(capsys)


def test_info_counts_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("info", "DiT-S/2", "--mlp", "swiglu", "--qk-norm", "--depth", 1, "--json") == 0
    assert '"macs"' in capsys.readouterr().out


def test_sampling_at_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert call("train", *TINY, "--positions", "rope", "--out", run) == 0
    wide = ["--image-size", "4x12", "--save-images", "--cfg-scale", "1", "--compare-to"]
    assert call("sample", "--ckpt", run, "--out", out, *SAMPLE, *wide) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert (scores["data"], scores["labels"]["num_samples"]) == ("digits", 3)
    real = open_images("digits", (4, 12))
    assert real.train.sample_shape == (1, 4, 12)
    assert scores["nearest"]["samples_median"] > scores["nearest"]["heldout_median"] > 0
    with Image.open(next((out / "images").glob("*.png"))) as image:
        assert (image.height, image.width) == (4, 12)
    capsys.readouterr()
    assert call("sample", "--ckpt", run, "--out", tmp_path / "odd", *SAMPLE, "--image-size", "4x10") == 1
    assert "4x10 is not a multiple of 4, the pixels of a patch: the nearest is 4x8" in error_of(capsys)
    assert call("sample", "--ckpt", run, "--out", tmp_path / "square", *SAMPLE, "--image-size", 16) == 1
    assert "it makes 8x8 images, --image-size 16 expected" in error_of(capsys)
