"""`dit-fast scaling`: fits against known laws, what the budget buys, resumption, and bad input."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_fast.cli import main
from dit_fast.data import open_images
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError
from dit_fast.interop import load_model
from dit_fast.model.cost import Counts
from dit_fast.training import TrainResult
from dit_fast.training import scaling_study as scaling
from dit_fast.training.log import read_log
from dit_fast.training.scaling_study import Ladder, Measured, PowerLaw, Rung, Study
from dit_fast.utils import keyed
from tests.tolerance import assert_close

TINY = [
    "--data",
    "digits",
    "--patch-size",
    "4",
    "--batch-size",
    "8",
    "--threads",
    "1",
    "--device",
    "cpu",
    "--lr",
    "1e-3",
]


def call(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> tuple[int, str, str]:
    status = main(["scaling", *TINY, "--out", str(out), *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def study_of(*models: tuple[int, float]) -> Study:
    """Models of so many MACs whose losses follow (training FLOPs)^exponent from 1 at 1000 FLOPs, and end there."""
    measured = []
    for macs, exponent in models:
        flops = [float(6 * macs * step) for step in range(1, 101)]
        losses = [(step, f, (f / 1000) ** exponent) for step, f in enumerate(flops, 1)]
        measured.append(Measured(str(macs), Counts(1, 0, 1, macs), 0.0, losses, losses[-1][2]))
    return Study(100, 1, "none", "loss", measured)


# Fits


def test_power_law_is_found():
    x = [1e6, 3e7, 2e9, 5e9]
    found = PowerLaw.fit(x, [3.0 * value**-0.2 for value in x])
    assert found.exponent == pytest.approx(-0.2, rel=1e-9)
    assert found.factor == pytest.approx(3.0, rel=1e-9)
    assert found.correlation == pytest.approx(-1.0, abs=1e-12)
    assert found(1e8) == pytest.approx(3.0 * 1e8**-0.2, rel=1e-9)
    assert abs(PowerLaw.fit([1, 10, 100], [1.0, 2.0, 1.0]).correlation) < 1e-9


@pytest.mark.parametrize(("x", "y"), [([5, 5], [1.0, 2.0]), ([1, 2], [1.0, 0.0]), ([1, 2], [1.0, -1.0])])
def test_what_has_no_power_law_is_refused(x, y):
    with pytest.raises(ConfigError, match="no power law through"):
        PowerLaw.fit(x, y)


def test_frontier_is_the_smallest_loss_of_any_model():
    """One law for all: the frontier follows it. A model that is worse at every compute changes nothing."""
    study = study_of((10, -0.3), (100, -0.3), (1000, -0.3))
    assert study.over_compute.exponent == pytest.approx(-0.3, rel=0.02)
    assert study.over_model.exponent == pytest.approx(-0.3, rel=1e-9)
    points = study.frontier()
    assert points[0][0] == pytest.approx(600.0)
    assert points[-1][0] == pytest.approx(600_000.0)
    worse = study_of((10, -0.3), (100, -0.3), (1000, -0.3), (1000, -0.1))
    # Above 1000 FLOPs, where the worse one has the greater loss.
    assert [p for p in worse.frontier() if p[0] > 6000] == [p for p in points if p[0] > 6000]


# The ladder


def test_sizes():
    assert Rung.of("96x4").fields == {"hidden_size": 96, "depth": 4, "num_heads": 3}
    assert Rung.of("DiT-S/8").fields == {"model": "DiT-S/8"}
    assert Rung.of("DiT-S/8").folder == "DiT-S-8"
    for bad in ("96", "90x4", "96x0", "0x4", "DiT-S/3", "axb"):
        with pytest.raises(
            ConfigError, match=f"--sizes {bad}: give WIDTHxDEPTH with a width that 32 divides"
        ):
            Rung.of(bad)


def test_a_budget_is_shared_in_equal_steps(tmp_path):
    options: dict[str, Any] = {"data": "digits", "patch_size": 4, "batch_size": 8}
    rungs = [Rung.of("32x1"), Rung.of("64x2")]
    step = sum(6 * counts.macs for counts in Ladder({**options, "steps": 1}, rungs, tmp_path).counts) * 8
    ladder = Ladder(options, rungs, tmp_path, budget=7.9 * step)
    assert ladder.steps == 7
    assert ladder.flops == 7 * step
    assert ladder.options["log_every"] == 1
    assert Ladder({**options, "steps": 900}, rungs, tmp_path).options["log_every"] == 9
    with pytest.raises(ConfigError, match=r"one step of all 2 models takes .* FLOP; give more"):
        Ladder(options, rungs, tmp_path, budget=0.9 * step)


def test_a_study_from_start_to_end(tmp_path, capsys, monkeypatch):
    """Trained, measured, drawn; killed half way and gone on with; longer; and the metric is the loss that it says."""
    monkeypatch.setattr(scaling, "DRAWS", 24)
    sizes = ("--sizes", "32x1", "64x1")
    status, out, _ = call(capsys, tmp_path, *sizes, "--steps", 6)
    assert status == 0
    assert "== 64x1 (2 of 2): " in out
    assert "metric over GMAC: correlation" in out
    written = (tmp_path / "scaling.json").read_text()
    study = json.loads(written)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert [model["name"] for model in study["models"]] == ["32x1", "64x1"]
    assert study["metric"] == "loss of the averaged weights on held-out samples"
    for model in study["models"]:
        assert [step for step, _, _ in model["losses"]] == [1, 2, 3, 4, 5, 6]
        assert model["losses"][-1][1] == 6 * 8 * model["counts"]["training_flops"]
    assert study["metric_over_macs"]["correlation"] == pytest.approx(
        1.0 if study["models"][1]["metric"] > study["models"][0]["metric"] else -1.0
    )

    # The loss of the averaged weights on the held-out digits, by hand.
    model, _ = load_model(tmp_path / "64x1")
    heldout = open_images("digits").heldout
    order = scaling.open_stream(
        scaling.dataclasses.replace(open_images("digits"), train=heldout), 8, 0, flip=False
    )
    losses = []
    for step in range(3):
        index = order.numbers(step)
        t = keyed.integers(keyed.key(0, "timestep"), index, 1000)
        noise = keyed.normal(keyed.key(0, "noise"), index, (1, 8, 8))
        images, labels = order.batch(step)
        with torch.no_grad():
            terms = create_diffusion("", learn_sigma=True, rescale_learned_sigmas=True).training_losses(
                model, images, t, {"y": labels}, noise=noise
            )
        losses.append(terms["loss"])
    assert_close(study["models"][1]["metric"], torch.cat(losses).mean().item())

    # A rung that was killed before its first checkpoint begins anew; the others are not touched.
    before = (tmp_path / "32x1" / "log.jsonl").read_bytes()
    for path in (tmp_path / "64x1" / "checkpoints").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert call(capsys, tmp_path, *sizes, "--steps", 6)[0] == 0
    assert (tmp_path / "32x1" / "log.jsonl").read_bytes() == before
    again = json.loads((tmp_path / "scaling.json").read_text())
    for model in (*study["models"], *again["models"]):
        model.pop("seconds")
    assert again == study

    # More steps go on from where it was, fewer are another study, and so is another recipe.
    assert call(capsys, tmp_path, *sizes, "--steps", 8)[0] == 0
    assert [record["step"] for record in read_log(tmp_path / "32x1" / "log.jsonl")] == [*range(1, 9)]
    status, _, error = call(capsys, tmp_path, *sizes, "--steps", 6)
    assert (status, len(error.splitlines())) == (1, 1)
    assert "is beyond the 6 steps of this study; give another --out" in error
    status, _, error = call(capsys, tmp_path, *sizes, "--steps", 8, "--class-dropout-prob", 0.2)
    assert (status, len(error.splitlines())) == (1, 1)
    assert "--class-dropout-prob is 0.1 there and 0.2 here" in error


def test_a_signal_ends_the_study(tmp_path, capsys, monkeypatch):
    def stopped(self: Ladder, number: int, world: object) -> TrainResult:
        return TrainResult(self.out, 2, self.steps, self.out, signal.SIGTERM)

    monkeypatch.setattr(Ladder, "train", stopped)
    status, out, _ = call(capsys, tmp_path, "--steps", 6)
    assert status == 143
    assert out.count("==") == 1
    assert "SIGTERM: stopped and saved at step 2 of 6; the same command continues there" in out
    assert not (tmp_path / "scaling.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the length is missing: give --budget FLOP, --steps N or --epochs N"),
        (["--budget", "1e12", "--steps", "5"], "sets the length: give neither --steps nor --epochs"),
        (["--budget", "10"], "--budget 10: one step of all 5 models takes"),
        (["--steps", "5", "--sizes", "32x1"], "--sizes 32x1: give at least two, each once"),
        (["--steps", "5", "--sizes", "32x1", "32x1"], "give at least two, each once"),
        (
            ["--steps", "5", "--sizes", "32x1", "33x1"],
            "--sizes 33x1: give WIDTHxDEPTH with a width that 32 divides",
        ),
        (["--steps", "5", "--depth", "2"], "trains one model for each of --sizes: remove --depth"),
        (["--steps", "5", "--data", "nowhere"], "nowhere is neither a folder nor a built-in set"),
        (["--steps", "5", "--patch-size", "3"], "image size 8 is not a multiple of the patch size 3"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, tmp_path, capsys):
    status, _, error = call(capsys, tmp_path / "study", *arguments)
    assert status == 1
    (line,) = error.splitlines()
    assert message in line
    assert not (tmp_path / "study").exists()
