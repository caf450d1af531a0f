"""Weights of SiT and LightningDiT: read, sampled as their own programs do, and given back."""

import argparse
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dit_fast.cli import main, sample
from dit_fast.diffusion import FlowMatching
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop import load_model
from dit_fast.interop.lightningdit import state_to_lightningdit
from dit_fast.models import DiT
from dit_fast.sampling import flow_schedule, to_uint8
from dit_fast.sampling.schedule import sampling_schedule
from dit_fast.sampling.shards import SampleShards
from tests import reference_layout
from tests.interop.test_download import StandInVae
from tests.latent_sets import save_vae
from tests.lightningdit_layout import PUBLISHED, LightningDiT, answer
from tests.tolerance import assert_close

VARIANTS: dict[str, dict[str, Any]] = {
    "published": PUBLISHED,
    "qk_norm": {**PUBLISHED, "qk_norm": True},
    "wo_shift": {**PUBLISHED, "wo_shift": True},
    # int(8 / 3 * 80) = 213 is no multiple of 8.
    "odd SwiGLU": {**PUBLISHED, "hidden_size": 80},
    "learn_sigma": {**PUBLISHED, "learn_sigma": True},
    "patches": {**PUBLISHED, "patch_size": 2},
    "rope alone": {"rope": True},
    "RMSNorm alone": {"rmsnorm": True},
}


def read(theirs: nn.Module, path: Path, **options: Any) -> tuple[DiT, Any]:
    torch.save(theirs.state_dict(), path)
    return load_model(path, **options)


def command(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


# LightningDiT's weights


@pytest.mark.parametrize("name", VARIANTS)
def test_lightningdit_s_weights_answer_as_its_own_model(name: str, tmp_path: Path) -> None:
    options = VARIANTS[name]
    theirs = LightningDiT(**options)
    # Without rotary positions nothing tells the heads.
    heads = None if options.get("rope") else 4
    ours, info = read(theirs, tmp_path / "lightningdit.pt", num_heads=heads)
    expected = answer(theirs)
    assert expected.std() > 0.2
    assert_close(answer(ours), expected)
    assert info.diffusion == {"objective": "flow"}
    assert ours.config.get("positions") == ("sincos_rope" if options.get("rope") else None)
    assert ours.config["mlp_ratio"] == 4


@pytest.mark.parametrize("name", ["published", "qk_norm", "odd SwiGLU", "learn_sigma", "rope alone"])
def test_and_back_again(name: str, tmp_path: Path) -> None:
    theirs, again = LightningDiT(**VARIANTS[name]), LightningDiT(**VARIANTS[name])
    ours, _ = read(theirs, tmp_path / "lightningdit.pt")
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    again.load_state_dict(state_to_lightningdit(ours))
    assert_close(answer(again), answer(theirs))


def test_units_of_zeros_stay_so_in_training(tmp_path: Path) -> None:
    """What fills up a SwiGLU gets no gradient, so that a trained model can still be given back."""
    ours, _ = read(LightningDiT(**VARIANTS["odd SwiGLU"]), tmp_path / "lightningdit.pt")
    x, t, y = (part[:2] for part in (torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([1, 2])))
    ours(x, t, y).square().sum().backward()
    mlp = ours.blocks[0].mlp
    assert mlp.w3.weight.shape[1] == 216
    assert all(half[213:].abs().max() == 0 for half in mlp.w12.weight.grad.chunk(2))
    assert mlp.w3.weight.grad[:, 213:].abs().max() == 0 < mlp.w3.weight.grad[:, :213].abs().min()


@pytest.mark.parametrize("width", [64, 80, 1024])
def test_models_of_every_width_go_back_after_training(width: int, tmp_path: Path) -> None:
    """LightningDiT's SwiGLU is int(8 D / 3) wide: the units that round it up are zeros before and after training."""
    recipe = {"learn_sigma": False, "positions": "sincos_rope", "norm": "rmsnorm", "mlp": "swiglu"}
    model = DiT(4, 1, 8, width, 1, width // 16, num_classes=10, **recipe)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    x, t, y = torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([1, 2])
    before = model.blocks[0].mlp.w12.weight.clone()
    for _ in range(3):
        (model(x, t, y) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.blocks[0].mlp.w12.weight, before)
    state = state_to_lightningdit(model.eval())
    assert state["blocks.0.mlp.w3.weight"].shape == (width, int(8 * width / 3))
    torch.save(state, tmp_path / "model.pt")
    again, _ = load_model(tmp_path / "model.pt")
    with torch.no_grad():
        assert_close(again(x, t, y), model(x, t, y), 4 * width)


def test_a_model_of_rope_alone_keeps_its_empty_table(tmp_path: Path) -> None:
    model = DiT(4, 1, 8, 64, 2, 4, num_classes=10, learn_sigma=False, positions="rope", norm="rmsnorm")
    torch.save(state_to_lightningdit(model.eval()), tmp_path / "rope.pt")
    again, _ = load_model(tmp_path / "rope.pt")
    assert again.config == model.config


def test_published_sizes() -> None:
    """docs/log.txt of LightningDiT: XL/1 has 675.26 million parameters, its fixed positions among them."""
    with torch.device("meta"):
        model = DiT(16, 1, 32, learn_sigma=False, positions="sincos_rope", norm="rmsnorm", mlp="swiglu")
    state = state_to_lightningdit(model)
    parameters = sum(tensor.numel() for name, tensor in state.items() if "feat_rope" not in name)
    assert round(parameters / 1e6, 2) == 675.26
    assert state["blocks.27.mlp.w12.weight"].shape == (2 * 3072, 1152)
    assert state["feat_rope.freqs_cos"].shape == (256, 72)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rmsnorm": False, "qk_norm": True}, r"queries and keys have layer norms \(use_qknorm without use_rmsnorm"),
        ({"base": 100.0}, r"feat_rope.freqs_cos \(16, 16\) has rotary positions that a DiT does not have"),
    ],
)  # fmt: skip
def test_what_is_no_dit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(LightningDiT(**{**PUBLISHED, **change}), tmp_path / "other.pt")


def test_damaged_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    state = LightningDiT(**PUBLISHED).state_dict()
    for name, tensor in [
        ("feat_rope.freqs_sin", None),
        ("blocks.1.adaLN_modulation.1.bias", None),
        ("blocks.0.adaLN_modulation.1.weight", torch.zeros(3, 64)),
        ("blocks.0.norm2.weight", torch.zeros(3)),
        ("blocks.0.mlp.w3.weight", torch.zeros(7)),
        ("feat_rope.freqs_cos", torch.zeros(16, 0)),
        ("pos_embed", torch.zeros(16)),
    ]:
        damaged = {**state, name: tensor}
        torch.save({key: value for key, value in damaged.items() if value is not None}, tmp_path / "bad.pt")
        with pytest.raises(CheckpointError) as refusal:
            load_model(tmp_path / "bad.pt")
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "adaln"}, "it has conditioning='adaln'$"),
        ({"num_classes": 0, "mlp_ratio": 2.0}, "it has no classes, mlp_ratio=2$"),
        ({"input_size": (4, 8), "qk_norm": True}, "a grid of 4x8, qk_norm without norm='rmsnorm'$"),
    ],
)  # fmt: skip
def test_what_lightningdit_cannot_be_is_not_exported(options: dict[str, Any], message: str) -> None:
    sizes = {
        "input_size": 4,
        "patch_size": 1,
        "in_channels": 8,
        "hidden_size": 64,
        "depth": 1,
        "num_heads": 4,
    }
    with pytest.raises(ConfigError, match=message):
        state_to_lightningdit(DiT(**{**sizes, "num_classes": 10, **options}))


def test_units_that_lightningdit_does_not_have_are_not_dropped() -> None:
    """Weights of an older run, or from elsewhere, may fill the units that round the width up."""
    model = DiT(4, 1, 8, 80, 1, 4, num_classes=10, mlp="swiglu")
    nn.init.ones_(model.blocks[0].mlp.w3.weight)
    with pytest.raises(ConfigError, match="mlp is 216 wide, LightningDiT's 213, and the rest is not zero"):
        state_to_lightningdit(model)


def test_export_writes_what_lightningdit_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, again = LightningDiT(**PUBLISHED), LightningDiT(**PUBLISHED)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    export = ("export", "--ckpt", tmp_path / "theirs.pt", "--format", "lightningdit", "--out")
    assert command(*export, tmp_path / "again.pt") == 0
    assert "do not record what they predict: sample them with --objective flow\n" in capsys.readouterr().out
    again.load_state_dict(torch.load(tmp_path / "again.pt", weights_only=True))
    assert_close(answer(again), answer(theirs))
    assert command(*export, tmp_path / "again") == 1
    assert "a file of --format lightningdit is named *.pt" in capsys.readouterr().err


# What a file's model predicts


def test_training_files_tell_the_objective(tmp_path: Path) -> None:
    theirs = LightningDiT(**PUBLISHED)
    config = {"model": {"use_rope": True}, "transport": {"path_type": "Linear", "prediction": "velocity"}}
    content = {"model": theirs.state_dict(), "ema": theirs.state_dict(), "opt": {}, "config": config}
    torch.save(content, tmp_path / "0080000.pt")
    model, info = load_model(tmp_path / "0080000.pt")
    assert info.diffusion == {"objective": "flow", "path": "linear", "prediction": "velocity"}
    assert (info.weights, model.config["positions"]) == ("ema", "sincos_rope")

    saved = argparse.Namespace(
        model="SiT-S/2", num_classes=10, path_type="GVP", prediction="noise", cfg_scale=4.0
    )
    weights = reference_layout.SiT().state_dict()
    torch.save({"model": weights, "ema": weights, "opt": {}, "args": saved}, tmp_path / "sit.pt")
    told = {"objective": "flow", "path": "gvp", "prediction": "epsilon"}
    assert load_model(tmp_path / "sit.pt", num_heads=4)[1].diffusion == told
    assert load_model(tmp_path / "sit.pt", num_heads=4, objective="flow")[1].diffusion == told
    with pytest.raises(CheckpointError, match=r"path is gvp in the checkpoint, linear requested; remove it$"):
        load_model(tmp_path / "sit.pt", num_heads=4, objective={"path": "linear"})


def test_of_bare_weights_the_caller_tells_it(tmp_path: Path) -> None:
    torch.save(reference_layout.SiT().state_dict(), tmp_path / "sit.pt")

    def told(objective: Any) -> dict[str, Any]:
        return load_model(tmp_path / "sit.pt", num_heads=4, objective=objective)[1].diffusion

    assert told(None) == {}
    assert told("flow") == {"objective": "flow"}
    assert told({"prediction": "v"}) == {"prediction": "v"}
    full = {"objective": "flow", "path": "vp", "prediction": "score"}
    assert told(full) == full
    assert sampling_schedule(full, 4, "heun", learn_sigma=True).prediction == "score"
    for wrong, message in [
        ("diffuse", "objective 'diffuse': choose diffusion or flow"),
        (
            {"path": "gvp"},
            r"path gvp applies only to flow matching: give objective flow \(--objective flow\) too",
        ),
        ({"objective": "flow", "prediction": "v"}, "prediction 'v' is not of flow matching"),
        ({"schedule": "linear"}, "objective: unknown schedule; choose from objective, prediction, path"),
    ]:
        with pytest.raises(ConfigError, match=message):
            told(wrong)


# SiT's weights


def sit(path: Path) -> reference_layout.SiT:
    """A SiT with as many more channels, which it drops, and its weights in a file."""
    model = reference_layout.SiT(in_channels=4)
    torch.save(model.state_dict(), path)
    return model


def euler(model: nn.Module, noise: Tensor, y: Tensor, times: Tensor, scale: float, channels: int) -> Tensor:
    """Euler's method on the guided velocity, as SiT's fixed steps are."""
    x = noise
    for t, later in itertools.pairwise(times):
        with torch.no_grad():
            told, free = (model(x, t.expand(len(x)), label) for label in (y, torch.full_like(y, 10)))
        velocity = told.clone()
        velocity[:, :channels] = free[:, :channels] + scale * (told[:, :channels] - free[:, :channels])
        x = x + (later - t) * velocity
    return x


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 1.0), (4.0, 1.0), (1.5, 1 / 0.3)])
def test_sit_is_sampled_as_by_its_own_program(scale: float, shift: float, tmp_path: Path) -> None:
    """Its sample.py: noise after manual_seed, equal steps of the ODE, guidance of three of four channels."""
    model = sit(tmp_path / "SiT.pt")
    options = ("--num-heads", 4, "--vae", "none", "--objective", "flow", "--steps", 5, "--device", "cpu")
    drawn = ("--classes", "2,7", "--num", 2, "--seed", 3, "--cfg-scale", scale, "--shift", shift)
    assert command("sample", "--ckpt", tmp_path / "SiT.pt", *options, *drawn, "--out", tmp_path / "out") == 0
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    # LightningDiT's timestep_shift k = 1 / shift: k t / (1 + (k - 1) t).
    t, k = torch.linspace(0, 1, 6), 1 / shift
    expected = euler(model, noise, torch.tensor([2, 7]), k * t / (1 + (k - 1) * t), scale, 3)
    latents = torch.from_numpy(np.load(tmp_path / "out" / "latents.npy"))
    assert_close(latents, expected, terms=4096)


def test_images_are_encoded_to_noise_and_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sit(tmp_path / "SiT.pt")
    noise = torch.randn(2, 4, 8, 8)
    np.save(tmp_path / "x.npy", noise.numpy())
    base = (
        "sample",
        "--ckpt",
        tmp_path / "SiT.pt",
        "--num-heads",
        4,
        "--objective",
        "flow",
        "--device",
        "cpu",
    )
    base = (*base, "--classes", "2,7", "--cfg-scale", 1)
    encoded = ("--reverse", tmp_path / "x.npy", "--out", tmp_path / "noise")
    assert command(*base, *encoded, "--solver", "dopri5", "--rtol", "1e-4") == 0
    found = np.load(tmp_path / "noise" / "latents.npy")
    assert found.shape == noise.shape
    assert np.abs(found - noise.numpy()).max() > 0.1
    np.savez(tmp_path / "x.npz", noise.numpy())
    np.save(tmp_path / "flat.npy", noise.numpy()[0])
    capsys.readouterr()
    for options, message in [
        (("--reverse", tmp_path / "x.npz"), "x.npz holds an archive"),
        (
            ("--reverse", tmp_path / "flat.npy"),
            "flat.npy holds float32 (4, 8, 8), expected floats (M, C, H, W)",
        ),
        (("--reverse", tmp_path / "none.npy"), "none.npy: cannot read it as a .npy file"),
        ((*encoded, "--num", 3), "--num 3: --reverse"),
        ((*encoded, "--npz"), "--npz is for images, and --reverse encodes them to noise: remove it"),
        ((*encoded, "--solver", "sde-sigma"), "reverse True applies only to the solvers in t"),
        (("--solver", "heun", "--atol", 1e-3), "atol 0.001 applies only to dopri5"),
        (("--solver", "dopri5", "--steps", 4), "steps 4 applies only to solvers with fixed steps"),
    ]:
        assert command(*base, "--vae", "none", "--out", tmp_path / "bad", *options) != 0
        error = capsys.readouterr().err
        assert message in error
        assert not (tmp_path / "bad").exists()


def test_times_of_lightningdit_s_sampler() -> None:
    """Its num_sampling_steps are the points of the path, of which 249 are evaluated."""
    t = np.linspace(0, 1, 250)
    assert np.allclose(flow_schedule(249, 1 / 0.3).times, (0.3 * t / (1 - 0.7 * t))[:-1], atol=1e-12)


def test_sampling_refuses_what_the_checkpoint_contradicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sit(tmp_path / "SiT.pt")
    torch.save(LightningDiT(**PUBLISHED).state_dict(), tmp_path / "light.pt")
    bare = ("sample", "--num-heads", 4, "--out", tmp_path / "out", "--ckpt")
    for options, message in [
        ((tmp_path / "light.pt", "--objective", "diffusion"), "is flow in the checkpoint, diffusion requested"),
        ((tmp_path / "light.pt",), "--vae is missing: the model makes latents of 8 channels; give the folder of"),
        ((tmp_path / "SiT.pt", "--vae", "none", "--shift", 3), "shift 3 applies only to flow matching"),
        ((tmp_path / "SiT.pt", "--vae", "none", "--latent-stats", "f.pt"), "SiT.pt is not decoded, with --vae none"),
        ((tmp_path / "SiT.pt", "--latent-stats", "nowhere.pt"), "nowhere.pt is missing"),
    ]:  # fmt: skip
        assert command(*bare, *options) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_samples_of_two_objectives_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sit(tmp_path / "SiT.pt")

    write = SampleShards.write

    def killed(*arguments: object) -> None:
        write(*arguments)
        raise ConfigError("killed")

    monkeypatch.setattr(SampleShards, "write", killed)
    common = ("sample", "--ckpt", tmp_path / "SiT.pt", "--num-heads", 4, "--objective", "flow", "--steps", 2)
    common = (
        *common,
        "--vae",
        "none",
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
        "--num",
        2,
        "--batch-size",
        1,
    )
    for other, differs in [
        ((), "killed"),
        (("--path", "gvp"), "objective {"),
        (("--shift", 2), "noise_schedule"),
    ]:
        assert command(*common, *other) == 1
        assert differs in capsys.readouterr().err


def test_latents_are_decoded_by_lightningdit_s_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=StandInVae))
    save_vae(StandInVae(), tmp_path)
    sit(tmp_path / "SiT.pt")
    mean, deviation = torch.randn(1, 4, 1, 1), torch.rand(1, 4, 1, 1) + 0.5
    torch.save({"mean": mean, "std": deviation}, tmp_path / "latents_stats.pt")
    decoded: list[Tensor] = []
    monkeypatch.setattr(sample, "to_uint8", lambda images: decoded.append(images) or to_uint8(images))
    common = ("sample", "--ckpt", tmp_path / "SiT.pt", "--num-heads", 4, "--objective", "flow", "--steps", 2)
    common = (*common, "--num", 2, "--classes", "1", "--device", "cpu", "--out", tmp_path / "out")
    assert command(*common, "--vae", "none") == 0
    latents = torch.from_numpy(np.load(tmp_path / "out" / "latents.npy"))
    decoded.clear()
    assert command(*common, "--vae", tmp_path, "--latent-stats", tmp_path / "latents_stats.pt") == 0
    assert_close(decoded[0][:, :, ::8, ::8], (latents * deviation + mean)[:, :3], terms=4096)


def test_of_twice_the_channels_the_first_are_the_velocity() -> None:
    model = reference_layout.ReferenceDiT(in_channels=4)
    x, _, y = reference_layout.inputs()
    flow, t = FlowMatching(), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        whole = model(x, t, y)
        assert whole.shape[1] == 8
        assert torch.equal(flow.velocity(model, x, t, {"y": y}), whole[:, :4])
    with pytest.raises(ConfigError, match="as many channels, or twice as many"):
        flow.velocity(lambda x, t: x[:, :3], x, t)
