"""What a run says: spikes, MFU, trackers, ranges, grids of samples; `dit-fast plot`."""

import dataclasses
import json
import math
import random
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.cli import main
from dit_fast.errors import MissingExtraError
from dit_fast.models import DiT_models
from dit_fast.training import TrainConfig, Trainer, resume, train
from dit_fast.training import log as metrics
from dit_fast.training import run as training_run
from dit_fast.training.log import read_log, smooth
from dit_fast.training.step import LEVELS, StepValues, TrainStep
from dit_fast.utils import keyed
from tests.training.test_step import TINY, image_set, run, trainer


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, **changes})


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "open_set", lambda config: image_set())


def test_the_flop_count_is_the_papers():
    """Peebles & Xie 2023, table 4: 118.64 Gflops (multiply-adds) for XL/2, 29.05 for XL/4, 6.06 for S/2."""
    for name, published in (("DiT-XL/2", 118.64e9), ("DiT-XL/4", 29.05e9), ("DiT-S/2", 6.06e9)):
        with torch.device("meta"):
            model = DiT_models[name](input_size=32)
        assert model.macs() == pytest.approx(published, rel=2e-3)
        assert metrics.training_flops(model) == 6 * model.macs()


def test_the_peak_is_that_of_the_device(monkeypatch):
    assert metrics.peak_flops(torch.device("cpu")) is None
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce GTX 1080", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert metrics.peak_flops(torch.device("cuda")) == peak


def value(loss: float, parts: tuple[int, ...] = (0,) * 8) -> StepValues:
    """A step on samples in these parts of the timesteps, each with the loss `loss` / 2**part."""
    sums, counts = [0.0] * LEVELS, [0.0] * LEVELS
    for part in parts:
        sums[part] += loss / 2**part
        counts[part] += 1
    mean = sum(sums) / len(parts)
    return StepValues(mean, mean, 0.0, 1.0, 1.0, 1.0, (0.0,) * 4, (0.0,) * 4, tuple(sums), tuple(counts))


def spikes_of(values: Iterable[StepValues]) -> list[int]:
    detector = metrics.SpikeDetector()
    return [index for index, each in enumerate(values) if detector.judge(each) is not None]


def test_a_spike_stands_out_from_the_losses_before():
    """Of losses with a standard deviation of 8 %: as a batch of 32 has that is compared at the same timesteps."""
    draw = random.Random(0)
    healthy = [math.exp(draw.gauss(0, 0.08) - step / 500) for step in range(300)]
    assert spikes_of(map(value, healthy)) == []
    doubled = [loss * (2.0 if step == 150 else 1.0) for step, loss in enumerate(healthy)]
    assert spikes_of(map(value, doubled)) == [150]
    # A tenth is no spike however still the losses are, and half as much again is one.
    assert spikes_of(value(1.1 if step == 100 else 1.0) for step in range(120)) == []
    assert spikes_of(value(1.6 if step == 100 else 1.0) for step in range(120)) == [100]
    # A new level is one for as long as most of the last five are of the old one.
    assert spikes_of(value(5.0 if step >= 100 else 1.0) for step in range(300)) == [100, 101, 102]
    # Before there are statistics: ten times the mean so far.
    assert spikes_of(value(each) for each in [1.0, 9.9, 98.0, 98.0]) == [2]


def test_what_the_timesteps_explain_is_no_spike():
    """A batch at little noise has 64 times the loss of one at much."""
    draw = random.Random(0)
    steps = [value(1.0, tuple(draw.choices((0, 6), (1, 5), k=4))) for _ in range(400)]
    losses = [each.loss for each in steps]
    assert max(losses) > 20 * min(losses)
    assert spikes_of(steps) == []
    assert spikes_of([*steps[:200], value(2.0, (6, 6, 6, 6)), *steps[200:]]) == [200]


def test_the_state_of_the_detector_and_the_averages_is_all_of_them():
    """Through JSON, as in a manifest; to the bit."""
    draw = random.Random(0)
    steps = [value(math.exp(draw.gauss(0, 0.5)), (draw.randrange(16),)) for _ in range(300)]
    whole, whole_sums = metrics.SpikeDetector(), metrics.Averages()
    for each in steps[:120]:
        whole.judge(each)
        whole_sums.add(each)
    other, other_sums = metrics.SpikeDetector(), metrics.Averages()
    other.restore(json.loads(json.dumps(whole.state())))
    other_sums.restore(json.loads(json.dumps(whole_sums.state())))
    for each in steps[120:]:
        assert whole.judge(each) == other.judge(each)
        whole_sums.add(each)
        other_sums.add(each)
    assert (whole.state(), whole_sums.means()) == (other.state(), other_sums.means())


def test_a_healthy_run_of_the_default_recipe_has_no_spikes_and_a_doubled_loss_is_one():
    """Losses of 6,000 steps of a small model on the digits, batch 32, default objective and rate, are in the table
    healthy_losses.npz by part of the timesteps. There must be fewer spikes than one per 1,000 steps.
    """
    with np.load(Path(__file__).parents[1] / "golden" / "healthy_losses.npz") as table:
        sums, counts = table["sums"].astype(float), table["counts"].astype(float)

    def steps(doubled: frozenset[int] = frozenset()) -> Iterator[StepValues]:
        for step, (own, number) in enumerate(zip(sums, counts, strict=True)):
            factor = 2.0 if step in doubled else 1.0
            mean = factor * own.sum() / number.sum()
            parts = tuple((factor * own).tolist()), tuple(number.tolist())
            yield StepValues(mean, mean, 0.0, 1.0, 1.0, 1.0, (0.0,) * 4, (0.0,) * 4, *parts)

    assert len(spikes_of(steps())) < len(sums) / 1000
    planted = frozenset(range(200, len(sums), 97))
    found = spikes_of(steps(planted))
    assert len(planted.intersection(found)) >= 0.9 * len(planted)
    assert len(set(found) - planted) < len(sums) / 1000


def test_a_spike_is_noted_with_its_samples_and_left_out_steps_too(tmp_path, monkeypatch, caplog):
    draw = TrainStep.draw

    def planted(self: TrainStep, samples: Any, labels: Any) -> Any:
        samples, t, noise, labels, weights = draw(self, samples, labels)
        step = int(self.state.step)
        return samples, t, noise * {14: 20.0, 16: float("nan")}.get(step, 1.0), labels, weights

    monkeypatch.setattr(TrainStep, "draw", planted)
    train(tiny(steps=18, skip_nonfinite=1, lr=1e-5, log_every=6), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "spikes.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [15, 17]
    assert "times what its timesteps let expect" in lines[0]["reason"]
    assert (lines[1]["reason"], "loss" in lines[1]) == ("not finite, left out", False)
    reference = trainer()
    for line in lines:
        assert line["samples"] == reference.sample_ids(line["step"])
        assert line["timesteps"] == reference.drawn(line["step"])["timesteps"]
    assert "step 15: the loss is" in caplog.text
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["skipped"] for line in log] == [0, 0, 1]
    assert all(math.isfinite(line["loss"]) for line in log)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"timestep_sampling": "logit-normal"},
        {"timestep_sampling": "logit-normal", "objective": "flow"},
        {"timestep_sampling": "importance"},
        {"timestep_sampling": "importance", "accumulate": 2},
    ],
    ids=["uniform", "logit-normal", "flow", "importance", "micro-batches"],
)
def test_the_loss_of_a_spike_can_be_made_again_from_its_record(options, tmp_path, monkeypatch):
    """To the bit, with the weights of the step before: samples and timesteps of the record, draws of (seed, number)."""
    monkeypatch.setattr(metrics.SpikeDetector, "judge", lambda self, loss: "every one")
    if options.get("objective") != "flow":
        # So few that each has its ten losses, after which importance sampling is not uniform any more.
        options = {**options, "diffusion_steps": 3, "noise_schedule": "squaredcos_cap_v2"}
    train(tiny(steps=14, log_every=7, **options), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "spikes.jsonl").read_text().splitlines()]
    record = records[-1]
    assert (len(records), record["step"]) == (14, 14)

    before = trainer(**options)
    run(before, 13)
    split, numbers = before.stream.split, torch.arange(13 * 8, 14 * 8)
    ids = torch.tensor(record["samples"])
    mirrored = keyed.uniform(keyed.key(0, "flip"), numbers) < 0.5
    images, labels = split.batch(ids, mirrored), split.labels[ids]
    labels = torch.where(keyed.uniform(keyed.key(0, "label drop"), numbers) < 0.1, 2, labels)
    noise = keyed.normal(keyed.key(0, "noise"), numbers, (1, 8, 8))
    t, weights = torch.tensor(record["timesteps"]), torch.tensor(record.get("weights", [1.0] * 8))
    assert ("weights" in record) == (len(set(weights.tolist())) > 1) == ("importance" in options.values())
    if options.get("objective") != "flow":
        t = t.long()
    losses = [
        before.objective.training_losses(before.model, *part[:2], {"y": part[2]}, part[3])["loss"]
        for part in zip(
            *(each.chunk(options.get("accumulate", 1)) for each in (images, t, labels, noise)), strict=True
        )
    ]
    assert (torch.cat(losses) * weights).mean().item() == record["loss"]


def test_means_leave_out_steps_that_were_not_made():
    parts = (1.0, 0.0, 3.0, 0.0), (2.0, 0.0, 1.0, 0.0), (0.0,) * LEVELS, (0.0,) * LEVELS
    good = StepValues(1.0, 0.5, 0.5, 2.0, 1.0, 1.0, *parts)
    bad = good._replace(loss=math.nan, mse=math.nan, grad_norm=math.inf, applied=0.0)
    averages = metrics.Averages()
    averages.add(bad)
    assert math.isnan(averages.means()["loss"])
    averages.add(good)
    assert averages.means() == {
        "loss": 1.0, "mse": 0.5, "vb": 0.5, "grad_norm": 2.0, "loss_by_timestep": (0.5, None, 3.0, None),
    }  # fmt: skip


class Writer:
    """What is used of tensorboard's SummaryWriter."""

    written: ClassVar[list[Any]] = []

    def __init__(self, folder: str):
        self.written.append(folder)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written.append((name, value, step))

    def add_image(self, name: str, picture: np.ndarray, step: int, dataformats: str) -> None:
        self.written.append((name, picture.shape, step, dataformats))

    def close(self) -> None:
        self.written.append("closed")


def test_trackers_get_the_log_lines_and_the_pictures(tmp_path, monkeypatch):
    Writer.written.clear()
    seen: list[Any] = []
    session = types.SimpleNamespace(
        id="abc123",
        log=lambda values, step: seen.append((step, values)),
        finish=lambda: seen.append("finished"),
    )
    wandb = types.SimpleNamespace(
        init=lambda **options: (seen.append(options), session)[1], Image=lambda path: f"image {path}"
    )
    tensorboard = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = {"tensorboard": True, "wandb": True, "sample_every": 2, "sample_steps": 2, "log_every": 2}
    train(tiny(steps=4, **options), tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert Writer.written[0] == str(tmp_path / "run" / "tensorboard")
    for line in log:
        assert ("loss", line["loss"], line["step"]) in Writer.written
    pictures = [entry for entry in Writer.written if entry[0] == "samples"]
    assert [(entry[2], entry[3]) for entry in pictures] == [(2, "HWC"), (4, "HWC")]
    assert Writer.written[-1] == "closed"
    assert (seen[0]["id"], seen[0]["name"], seen[0]["config"]["batch_size"]) == (None, "run", 8)
    assert [entry[0] for entry in seen[1:-1]] == [2, 2, 4, 4]
    assert seen[1][1]["grad_norm"] == log[0]["grad_norm"]
    assert seen[-1] == "finished"
    seen.clear()
    resume(tmp_path / "run", {"steps": 5})
    assert (seen[0]["id"], seen[0]["resume"]) == ("abc123", "allow")


@pytest.mark.parametrize(
    ("option", "module", "package"),
    [("tensorboard", "torch.utils.tensorboard", "tensorboard"), ("wandb", "wandb", "wandb")],
)
def test_a_missing_tracker_is_named_before_the_first_step(option, module, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; pip install .*\[track\]'"):
        train(tiny(steps=1, **{option: True}), tmp_path / "run")


def test_sample_grids_come_from_the_averages_and_one_noise(tmp_path):
    """Two grids of one state are the same picture, those of two states are not; training does not notice."""
    with_grids = train(tiny(steps=4, sample_every=2, sample_steps=3), tmp_path / "with")
    without = train(tiny(steps=4), tmp_path / "without")
    files = [(result.checkpoint / "model.safetensors").read_bytes() for result in (with_grids, without)]
    assert files[0] == files[1]
    pictures = sorted((tmp_path / "with" / "samples").iterdir())
    assert [path.name for path in pictures] == ["step-0000002.png", "step-0000004.png"]
    first, second = (np.asarray(Image.open(path)) for path in pictures)
    assert first.shape == second.shape
    assert (first != second).any()
    again = train(tiny(steps=2, sample_every=2, sample_steps=3), tmp_path / "again")
    assert again.step == 2
    assert (np.asarray(Image.open(tmp_path / "again" / "samples" / "step-0000002.png")) == first).all()


def test_runs_are_drawn_over_each_other(tmp_path, capsys):
    for name in ("one", "two"):
        train(tiny(steps=3, log_every=1, seed=len(name)), tmp_path / name)
    capsys.readouterr()
    target = tmp_path / "both.png"
    assert (
        main(["plot", str(tmp_path / "one"), str(tmp_path / "two" / "log.jsonl"), "--out", str(target)]) == 0
    )
    assert capsys.readouterr().out == f"{target}: 2 runs\n"
    assert target.read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(tmp_path / "three")]) == 1
    assert "three: neither a run folder with a log.jsonl" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").touch()
    assert main(["plot", str(tmp_path / "empty")]) == 1
    assert "holds no log line yet" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "one"), "--out", str(tmp_path / "one" / "log.jsonl" / "x.png")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_the_smoothed_curve_does_not_lag():
    """A line stays where it is; a loss, as losses fall, within 3 % (an average of the past: 11 %); noise is a third."""
    assert smooth([3.0 - 0.25 * step for step in range(12)]) == pytest.approx(
        [3.0 - 0.25 * step for step in range(12)]
    )
    falling = 0.1 + np.arange(1, 401) ** -0.5
    noise = 0.02 * np.random.default_rng(0).standard_normal(400)
    assert np.abs(np.array(smooth(list(falling))) / falling - 1)[40:].max() < 0.03
    assert np.std(smooth(list(noise))) < np.std(noise) / 3
    assert smooth([]) == []
    assert smooth([2.0]) == [2.0]


def test_every_option_that_changes_nothing_else_is_in_the_manifest():
    each = Trainer(tiny(), image_set())
    assert each.manifest()["train_config"].keys() == {field.name for field in dataclasses.fields(TrainConfig)}


def test_the_run_folder_is_all_that_is_written(tmp_path):
    train(tiny(steps=2), tmp_path / "run")
    assert {path.name for path in Path(tmp_path / "run").iterdir()} == {
        "checkpoints",
        "config.yaml",
        "log.jsonl",
        "loss.png",
        "preview.png",
    }


def test_what_a_kill_left_of_a_picture_is_removed_by_the_next_run(tmp_path):
    run = tmp_path / "run"
    train(tiny(steps=2), run)
    left = [run / ".tmp-0ed101b86baa-loss.png", run / "samples" / ".tmp-0ed101b86baa-step-0000001.png"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a part")
    resume(run, {"steps": 3})
    assert not any(path.exists() for path in left)
