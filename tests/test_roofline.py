"""The roofline against the arithmetic of the published anchors: FLOPs, bytes and limits of DiT-XL/2."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.roofline import (
    Part,
    Rates,
    Step,
    assumed_rates,
    main,
    sampling_limit,
    training_limit,
    training_parts,
)
from dit_fast.models import DiT_models

XL = {"depth": 28, "width": 1152, "patch": 2}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (
            256,
            {"qkv": 57.08, "proj": 19.03, "fc1": 76.10, "fc2": 76.10, "attention": 8.46, "modulation": 0.45},
        ),
        (
            512,
            {"qkv": 228.3, "proj": 76.1, "fc1": 304.4, "fc2": 304.4, "attention": 135.3, "modulation": 0.45},
        ),
    ],
)
def test_forward_flops_of_an_image(size: int, expected: dict[str, float]) -> None:
    parts = training_parts(Step(**XL, image_size=size, batch=1))
    forward = {part.name: part.flops[0] / 1e9 for part in parts}
    assert {name: forward[name] for name in expected} == pytest.approx(expected, rel=0.02)
    assert sum(forward.values()) == pytest.approx({256: 237.24, 512: 1049.08}[size], rel=1e-3)


@pytest.mark.parametrize("name", ["DiT-XL/2", "DiT-S/4"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = DiT_models[name]()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = Step(model.config["depth"], model.config["hidden_size"], int(name[-1]), 256, 1)
    assert step.parameters == trained


@pytest.mark.parametrize(
    ("device", "size", "batch", "images"),
    [("h100", 256, 256, 903), ("h200", 256, 256, 934), ("h100", 512, 64, 188)],
)
def test_training_limit(device: str, size: int, batch: int, images: float) -> None:
    step = Step(**XL, image_size=size, batch=batch)
    rates = assumed_rates(device, step.tokens)
    assert batch / training_limit(step, rates) == pytest.approx(images, rel=0.02)


@pytest.mark.parametrize(
    ("device", "forwards", "milliseconds"),
    [
        ("h100", 1, 0.343),
        ("h100", 2, 0.681),
        ("h100", 16, 5.45),
        ("h200", 2, 166 / 250),
        ("h200", 64, 5300 / 250),
    ],
)
def test_sampling_limit(device: str, forwards: int, milliseconds: float) -> None:
    """Milliseconds of a denoising step, modulation hoisted."""
    step = Step(**XL, image_size=256, batch=forwards)
    found = sampling_limit(step, assumed_rates(device, step.tokens))
    assert 1e3 * found == pytest.approx(milliseconds, rel=0.02)


def test_modulation_weights_cost_where_they_are_read() -> None:
    """About 0.15 ms a step on an H100: 451.6 MB."""
    step = Step(**XL, image_size=256, batch=1)
    rates = assumed_rates("h100", 256)
    added = sampling_limit(step, rates, hoisted=False) - sampling_limit(step, rates)
    assert 1e3 * added == pytest.approx(0.151, rel=0.02)


def test_a_part_is_bound_by_the_slower_of_both() -> None:
    rates = Rates(10.0, 5.0, 2.0, 1.0)
    assert Part("x", flops=(20, 40), bytes=(1, 9)).limit(rates) == 2 + 9
    assert Part("x", flops=(20, 40), attention=True).limit(rates) == 4 + 20


def test_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "--model DiT-S/8 --image-size 64 --batch 2 --device here --measure --out"
    assert main([*command.split(), str(tmp_path)]) == 0
    data = json.loads((tmp_path / "roofline.json").read_text())
    assert set(data["measured_seconds"]) <= set(data["limit_seconds"])
    assert all(time > 0 for time in data["measured_seconds"].values())
    assert data["whole_seconds"] == pytest.approx(sum(data["limit_seconds"].values()))
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    assert "images a second at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model DiT-M/2", "give DiT-"),
        ("--image-size 250", "not a multiple"),
        ("--batch -1", "at least 1"),
        ("--measure", "--device here"),
    ],
)
def test_bad_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err
