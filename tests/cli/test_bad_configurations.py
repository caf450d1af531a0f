"""Combinations that make no sense are refused when they are built: one line, a status other than 0, nothing written."""

from pathlib import Path

import pytest

from dit_fast.cli import main
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError
from dit_fast.model.blocks import CONDITIONING
from dit_fast.models import DiT
from dit_fast.sampling import Guidance, Sampler, SamplerConfig, flow_schedule

SMALL = {
    "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3,
}  # fmt: skip
TRAIN = (
    "--data digits --hidden-size 16 --depth 1 --num-heads 2 --patch-size 4 --batch-size 4 --threads 1 --steps 1 "
    "--device cpu"
)
WITHOUT_NULL = ({"num_classes": 0}, {"class_dropout_prob": 0.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_ratio": float("nan")}, "mlp_ratio nan: give a number above 0, up to 1024"),
        ({"mlp_ratio": 1e30}, r"mlp_ratio 1e\+30: give a number above 0, up to 1024"),
        ({"mlp_ratio": -1.0}, "mlp_ratio -1.0: give"),
        ({"num_heads": 0}, "num_heads 0: give a whole number from 1 to 4096"),
        ({"hidden_size": 0}, "hidden_size 0: give a whole number from 1 to 65536"),
        ({"depth": -1}, "depth -1: give a whole number from 0 to 4096"),
        ({"patch_size": 0}, "patch_size 0: give a whole number from 1"),
        ({"in_channels": 0}, "in_channels 0: give a whole number from 1"),
        ({"num_classes": -1}, "num_classes -1: give a whole number from 0"),
        ({"caption_dim": -1}, "caption_dim -1: give a whole number from 0"),
        ({"class_dropout_prob": 2.0}, "class_dropout_prob 2.0: give a number from 0 to 1"),
        ({"class_dropout_prob": float("nan")}, "class_dropout_prob nan: give"),
        ({"kernels": "fast"}, "kernels='fast': choose one of 'auto', 'triton', 'reference'"),
        ({"positions": "rope", "hidden_size": 18}, "a head of 9 is not a multiple of 4"),
        ({"caption_dim": 4}, "takes one vector and a caption is many tokens"),
    ],
)
def test_no_model_has_such_sizes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiT(**{**SMALL, **options})


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("options", WITHOUT_NULL, ids=["no classes", "no dropout"])
def test_guidance_without_a_null_token_is_refused_by_name(
    conditioning: str, options: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DiT(**{**SMALL, **options}, conditioning=conditioning)
    with pytest.raises(ConfigError, match=r"guidance scale 2.0 needs a model trained with label dropout"):
        Sampler(model, create_diffusion("2"), SamplerConfig(guidance=Guidance(2.0)))
    Sampler(model, create_diffusion("2"), SamplerConfig(guidance=Guidance(1.0)))
    model.save_pretrained(tmp_path / "model")
    for command in ("sample", "explain"):
        out = tmp_path / command
        words = ["--ckpt", str(tmp_path / "model"), "--steps", "2", "--cfg-scale", "2", "--out", str(out)]
        assert main([command, *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("dit-fast: error: guidance scale 2.0 needs a model trained with label dropout")
        assert line.endswith(": use scale 1")
        assert not out.exists()


@pytest.mark.parametrize(
    ("process", "solver", "message"),
    [
        (
            create_diffusion("2"),
            "sde-sigma",
            "solver sde-sigma applies only to flow matching: for a diffusion model use",
        ),
        (flow_schedule(2), "ddpm", "solver ddpm applies only to diffusion models: for flow matching use"),
    ],
)
def test_a_solver_of_the_other_kind_is_refused_when_the_sampler_is_built(process, solver, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampler(DiT(**SMALL), process, SamplerConfig(solver=solver, guidance=Guidance(1.0)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--num-classes 0 --class-dropout-prob 0.5",
            "--class-dropout-prob 0.5: with --num-classes 0 there is no label to drop; leave it out",
        ),
        ("--evaluate-every 1 --evaluate-weights nowhere.pth --evaluate-against nowhere", "nowhere"),
        ("--evaluate-every 1 --evaluate-features classifier --evaluate-against nowhere", "nowhere"),
    ],
)
def test_a_run_that_is_refused_leaves_nothing(
    flags: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dit_fast.evaluation.features.InceptionFeatures", lambda weights, device: None)
    out = tmp_path / "run"
    assert main(["train", *TRAIN.split(), *flags.split(), "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dit-fast: error: ")
    assert message in line
    assert not out.exists()
