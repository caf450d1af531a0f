"""The roofline against the arithmetic of the published anchors: FLOPs, bytes and limits of DiT-XL/2."""

from pathlib import Path

import pytest
import torch

from benchmarks.analysis.roofline import (
    Part,
    Rates,
    Step,
    assumed_rates,
    main,
    measured_in,
    sampling_limit,
    training_limit,
    training_parts,
)
from benchmarks.ops.rows import Recorder, Results, Row, read_results
from dit_fast.errors import DataError
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


@pytest.mark.parametrize(
    ("device", "products", "attention", "passes", "optimizer"),
    [("h100", 0.856, 0.092, 0.127, 0.033), ("h200", 0.867, 0.092, 0.088, 0.023)],
)
def test_parts_of_a_training_step(
    device: str, products: float, attention: float, passes: float, optimizer: float
) -> None:
    """Milliseconds an image at batch 256."""
    step = Step(**XL, image_size=256, batch=256)
    limits = {part.name: 1e3 * part.limit(assumed_rates(device, 256)) / 256 for part in training_parts(step)}
    found = sum(limits[name] for name in ("qkv", "proj", "fc1", "fc2"))
    assert found == pytest.approx(products, rel=0.02)
    assert limits["attention"] == pytest.approx(attention, rel=0.02)
    assert limits["passes of the blocks"] == pytest.approx(passes, rel=0.02)
    assert limits["optimizer and average"] == pytest.approx(optimizer, rel=0.02)


CASE = "--model DiT-S/8 --image-size 64 --batch 2"


def test_measured_times_stand_beside_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts that are measured here go to a result file; from there they are read, with the ladder's whole step."""
    plot = tmp_path / "plots" / "here.png"
    assert main([*CASE.split(), "--measure", "--results", str(tmp_path), "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    assert "images a second at most" in said
    assert plot.stat().st_size > 1000
    (path,) = tmp_path.glob("*/*.json")
    rows = read_results(path).rows
    step = Step(12, 384, 8, 64, 2)
    assert {row.direction for row in rows} < {part.name for part in training_parts(step)}
    assert {row.key[:3] for row in rows} == {("roofline", "DiT-S/8", (2, 64))}

    place = ("train", "DiT-S/8", (2, 64), "fp32")
    slow, fast = (
        Row.timed(*place, name, "step", [time]) for name, time in (("ours, eager", 0.5), ("ours", 0.25))
    )
    Recorder(tmp_path).add(slow, fast, Row.timed(*place, "plain fp32", "step", [0.1]))
    assert main([*CASE.split(), "--measured", str(path), "--plot", str(plot)]) == 0
    found = capsys.readouterr().out.splitlines()
    assert found[0].startswith("DiT-S/8, 64 px, batch 2, train; ")
    assert "(CPU)" in found[0]
    qkv = next(row.median for row in rows if row.direction == "qkv")
    assert f"{1e3 * qkv:13.3f}" in next(line for line in found if line.startswith("qkv"))
    assert "250.000" in next(line for line in found if line.startswith("whole step"))


@pytest.mark.parametrize(
    ("mode", "direction", "batch"), [("sample", "step", 2), ("sample", "guided step", 1)]
)
def test_sampled_steps_are_of_their_forwards(mode: str, direction: str, batch: int) -> None:
    metrics = {"copy GB/s": 10.0, "product TFLOP/s": 2.0}
    part = Row.timed("roofline", "DiT-S/8", (2, 64), "float32", "ours", "qkv", [0.1], metrics)
    rows = (part, Row.timed("sample", "DiT-S/8", (batch, 64), "fp32", "ours", direction, [0.5]))
    results = Results("cpu", "2026-11-21", "0123abc", {"cpu": "cpu"}, rows)
    found, rates = measured_in(results, "DiT-S/8", Step(12, 384, 8, 64, 2), mode)
    assert found == {"whole step": 0.5}
    assert rates == Rates(2e12, 2e12, 2e12, 10e9)
    with pytest.raises(DataError, match="hold no parts of DiT-S/8, 64 px, batch 4"):
        measured_in(results, "DiT-S/8", Step(12, 384, 8, 64, 4), mode)


def test_a_file_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{")
    assert main(["--measured", str(tmp_path / "x.json")]) == 1
    assert f"roofline: {tmp_path / 'x.json'} is no result file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model DiT-M/2", "give DiT-"),
        ("--image-size 250", "not a multiple"),
        ("--batch -1", "at least 1"),
        ("--measure --device h100", "--device here"),
        ("--measure --mode sample", "--device here"),
        ("--results x", "give both"),
    ],
)
def test_bad_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err
