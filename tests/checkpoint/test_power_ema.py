"""Post-hoc EMA: profiles against quadrature, and averages made of snapshots against the weights of every step."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_fast.checkpoint.folder import read_manifest, step_folder, step_folders
from dit_fast.checkpoint.power_ema import (
    EVERY,
    SIGMAS,
    SNAPSHOTS,
    WIDEST,
    PowerAverages,
    Profile,
    combination,
)
from dit_fast.cli import main
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop import load_model
from dit_fast.models import DiT
from dit_fast.training import TrainConfig, Trainer, resume, train

TINY: dict[str, Any] = dict(
    data="digits", hidden_size=16, depth=1, num_heads=2, patch_size=4, batch_size=8, lr=1e-3, threads=1,
    ema_snapshot_every=10, ckpt_every=50, keep_checkpoints=2, device="cpu",
)  # fmt: skip


def profile_values(profile: Profile, times: np.ndarray) -> np.ndarray:
    """The profile written out, 0 after its end."""
    power = profile.gamma
    values = (power + 1) * times**power / profile.end ** (power + 1)
    return np.where(times <= profile.end, values, 0.0)


def integral(values: np.ndarray, times: np.ndarray) -> float:
    return float(np.trapezoid(values, times))


# Profiles


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_width_is_the_standard_deviation_of_the_profile(sigma_rel):
    times = np.linspace(0, 300.0, 400_001)
    p = profile_values(Profile(sigma_rel, 300.0), times)
    mean = integral(p * times, times)
    assert integral(p, times) == pytest.approx(1.0, rel=1e-6)
    assert integral(p * (times - mean) ** 2, times) ** 0.5 == pytest.approx(sigma_rel * 300.0, rel=1e-5)


@pytest.mark.parametrize(("first", "second"), [((0.05, 100.0), (0.1, 70.0)), ((0.05, 40.0), (0.1, 100.0))])
@pytest.mark.parametrize("same", [False, True])
def test_inner_products_are_the_integrals(first, second, same):
    a = Profile(*first)
    b = a if same else Profile(*second)
    # The shorter profile jumps to 0 at its end: integrated up to there.
    times = np.linspace(0, min(a.end, b.end), 400_001)
    expected = integral(profile_values(a, times) * profile_values(b, times), times)
    assert a.inner(b) == pytest.approx(expected, rel=1e-6)
    assert a.inner(b) == pytest.approx(b.inner(a), rel=1e-12)


def test_combination_is_the_nearest_profile():
    present = [Profile(sigma, end) for end in (25.0, 50.0, 75.0, 100.0) for sigma in SIGMAS.values()]
    wanted = Profile(0.08, 100.0)
    factors, off = combination(present, wanted)
    assert sum(factors) == pytest.approx(1.0, abs=1e-12)
    times = np.linspace(0, 100.0, 200_001)

    def distance(weights: list[float]) -> float:
        made = sum(w * profile_values(p, times) for w, p in zip(weights, present, strict=True))
        error = (made - profile_values(wanted, times)) ** 2
        return (integral(error, times) / integral(profile_values(wanted, times) ** 2, times)) ** 0.5

    assert off == pytest.approx(distance(factors), rel=1e-3)
    assert off < 0.04
    # Shifts that keep the sum lead away from the minimum.
    for i in range(len(present) - 1):
        for shift in (-0.01, 0.01):
            moved = list(factors)
            moved[i] += shift
            moved[i + 1] -= shift
            assert distance(moved) > off


def test_tracked_width_is_its_own_last_snapshot():
    present = [Profile(sigma, end) for end in (50.0, 100.0) for sigma in SIGMAS.values()]
    factors, off = combination(present, Profile(0.05, 100.0))
    assert off < 1e-6
    assert factors == pytest.approx([0, 0, 1, 0], abs=1e-6)


def test_more_snapshots_come_nearer():
    def off(count: int) -> float:
        ends = [100.0 * (i + 1) / count for i in range(count)]
        present = [Profile(sigma, end) for end in ends for sigma in SIGMAS.values()]
        return combination(present, Profile(0.15, 100.0))[1]

    found = [off(count) for count in (4, 8, 16, 32)]
    assert found == sorted(found, reverse=True)
    # Second order in the distance of the snapshots.
    assert found[-1] < found[-2] / 3


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, WIDEST, 0.5, float("nan")])
def test_a_width_of_no_profile_is_refused(sigma_rel):
    with pytest.raises(ConfigError, match=r"give more than 0 and less than 0\.2887"):
        Profile(sigma_rel, 1.0)


# Averages


def test_average_weighs_each_interval_by_its_part_of_the_profile():
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    averages = PowerAverages({"p": parameter})
    seen = []
    for step in range(1, 5 * EVERY + 4):
        with torch.no_grad():
            parameter.copy_(torch.tensor([1.0, step, step**2]))
        averages.update(step)
        if step % EVERY == 0:
            seen.append(parameter.detach().clone())
    assert averages.step == 5 * EVERY
    for part, sigma_rel in SIGMAS.items():
        power = Profile(sigma_rel, 1.0).gamma + 1
        weights = [(k / 5) ** power - ((k - 1) / 5) ** power for k in range(1, 6)]
        expected = sum(w * value for w, value in zip(weights, seen, strict=True))
        found = averages.state({"p": parameter})[part]["p"]
        assert torch.allclose(found, expected, rtol=1e-12)
        assert found[0] == pytest.approx(1.0, abs=1e-12)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[dict[str, Tensor]]]:
    """A run of 120 steps, and its trained weights after every tenth step."""
    seen: list[dict[str, Tensor]] = []
    step = Trainer.train_step

    def watched(self: Trainer, samples: Tensor, labels: Tensor, **flags: Any) -> Any:
        agreed = step(self, samples, labels, **flags)
        if self.step % EVERY == 0:
            seen.append({name: p.detach().double().clone() for name, p in self.trained.items()})
        return agreed

    folder = tmp_path_factory.mktemp("ema") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", watched)
        train(TrainConfig(**TINY, steps=120), folder)
    return folder, seen


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.08, 0.1, 0.15])
def test_reconstruction_is_the_exact_average(run, sigma_rel):
    """Relative to how far the average is from the last weights: within three percent."""
    folder, seen = run
    model, info = load_model(folder, weights=f"ema:{sigma_rel}")
    power = Profile(sigma_rel, 1.0).gamma + 1
    count = len(seen)
    weights = [(k / count) ** power - ((k - 1) / count) ** power for k in range(1, count + 1)]
    error = away = 0.0
    for name, parameter in model.named_parameters():
        if name not in seen[0]:
            continue
        exact = sum(w * state[name] for w, state in zip(weights, seen, strict=True))
        error += (parameter.double() - exact).square().sum().item()
        away += (seen[-1][name] - exact).square().sum().item()
    assert (error / away) ** 0.5 < 0.03
    assert info.step == 120
    assert info.summary().startswith(f"EMA weights of relative width {sigma_rel} at step 120 of ")


def test_what_is_not_trained_comes_out_to_the_bit(run):
    folder, _ = run
    plain, _ = load_model(folder, weights="model")
    averaged, _ = load_model(folder, weights="ema:0.15")
    assert torch.equal(averaged.pos_embed, plain.pos_embed)
    assert not torch.equal(averaged.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)


def test_snapshots_stay_and_checkpoints_do_not(run):
    folder, _ = run
    steps = [int(path.name.removeprefix("step-")) for path in step_folders(folder / SNAPSHOTS)]
    assert steps == list(range(10, 120, 10))
    assert [path.name for path in step_folders(folder)] == ["step-0000100", "step-0000120"]
    path = step_folder(folder / SNAPSHOTS, 60)
    files = {file.name for file in path.iterdir()}
    assert files == {"config.json", "manifest.json", "sigma_050.safetensors", "sigma_100.safetensors"}
    assert read_manifest(path)["power_averages"] == {"step": 60, "sigma_rel": SIGMAS}


def test_an_earlier_checkpoint_takes_no_later_snapshot(run, tmp_path):
    folder, _ = run
    before = tmp_path / "run"
    shutil.copytree(folder, before)
    for step in (100, 110):
        shutil.rmtree(step_folder(before / SNAPSHOTS, step))
    states = [
        load_model(step_folder(place, 100), weights="ema:0.15")[0].state_dict() for place in (folder, before)
    ]
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


def test_a_resumed_run_has_the_same_averages(run, tmp_path):
    whole, _ = run
    part = tmp_path / "run"
    train(TrainConfig(**TINY, steps=65), part)
    # Not of the averages' own rhythm: the state in the checkpoint is of step 60, the weights are of 65.
    assert read_manifest(step_folder(part, 65))["power_averages"]["step"] == 60
    resume(part, {"steps": 120})
    for path in (step_folder(whole, 120), step_folder(whole / SNAPSHOTS, 110)):
        other = part / path.relative_to(whole)
        for name in SIGMAS:
            file = f"{name}.safetensors"
            assert (path / file).read_bytes() == (other / file).read_bytes()


def test_a_damaged_snapshot_is_left_out_and_a_damaged_checkpoint_refused(run, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    file = step_folder(folder / SNAPSHOTS, 70) / "sigma_050.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING):
        _, info = load_model(folder, weights="ema:0.08")
    assert "sigma_050.safetensors does not match its SHA-256; continuing without it" in caplog.text
    assert "the average ema:0.08, reconstructed from snapshots" in info.notes[0]
    own = step_folder(folder, 120) / "sigma_100.safetensors"
    own.write_bytes(own.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"sigma_100\.safetensors does not match"):
        load_model(step_folder(folder, 120), weights="ema:0.08")


# The command line


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_export_and_sample_take_any_width(run, tmp_path, capsys):
    folder, _ = run
    status, said = call(
        capsys, "export", "--ckpt", folder, "--weights", "ema:0.08", "--out", tmp_path / "model"
    )
    assert status == 0
    assert "EMA weights of relative width 0.08 at step 120" in said
    exported = DiT.from_pretrained(tmp_path / "model").state_dict()
    loaded = load_model(folder, weights="ema:0.08")[0].state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in loaded.items())
    out = tmp_path / "samples"
    status, said = call(
        capsys, "sample", "--ckpt", folder, "--weights", "ema:0.08", "--num", 2, "--steps", 2, "--out", out
    )
    assert status == 0, said
    assert "EMA weights of relative width 0.08" in said
    assert json.loads((tmp_path / "model" / "config.json").read_text())["depth"] == 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            "average",
            "weights 'average': choose ema, model, or ema:WIDTH with a relative width between 0 and 0.2887",
        ),
        ("ema:wide", "weights 'ema:wide': choose ema, model, or ema:WIDTH"),
        ("ema:0.3", "weights 'ema:0.3': choose ema, model, or ema:WIDTH"),
        ("ema:0.005", "snapshots give no average of relative width 0.005 (the nearest is"),
    ],
)
def test_bad_weights_get_one_line(run, tmp_path, capsys, weights, message):
    status, said = call(capsys, "export", "--ckpt", run[0], "--weights", weights, "--out", tmp_path / "model")
    assert status == 1
    assert len(said.splitlines()) == 1
    assert message in said
    assert not (tmp_path / "model").exists()


def test_runs_without_averages_and_other_files_are_refused(tmp_path):
    plain = {name: value for name, value in TINY.items() if name != "ema_snapshot_every"}
    train(TrainConfig(**plain, steps=1), tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"written by dit-fast train --ema-snapshot-every N$"):
        load_model(tmp_path / "plain", weights="ema:0.08")
    train(TrainConfig(**TINY, steps=1), tmp_path / "short")
    with pytest.raises(CheckpointError, match="from step 10 on"):
        load_model(tmp_path / "short", weights="ema:0.08")
    load_model(tmp_path / "plain")[0].save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match="is not a run of dit-fast train"):
        load_model(tmp_path / "saved", weights="ema:0.08")
    with pytest.raises(ConfigError, match="--ema-snapshot-every 0: give a whole number from 1"):
        TrainConfig(**{**TINY, "ema_snapshot_every": 0})
    with pytest.raises(CheckpointError, match="--ema-snapshot-every is None there and 10 here"):
        resume(tmp_path / "plain", {"ema_snapshot_every": 10, "steps": 2})
