"""Guidance and hoisted modulation: what is applied, where, and which branches and weights a step really runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dit_fast.data import open_images
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError
from dit_fast.models import DiT
from dit_fast.sampling import (
    Guidance,
    Sampler,
    SamplerConfig,
    classifier_cond_fn,
    diffusion_schedule,
    flow_schedule,
)
from dit_fast.sampling.guidance import guide
from dit_fast.sampling.trajectory import ModulationTable, loop_parameters, modulation_width
from dit_fast.training import TrainConfig
from tests.checkpoints import save_checkpoint
from tests.golden import golden_model, seeded
from tests.tolerance import assert_close, largest


def batches(monkeypatch) -> list[int]:
    """The batch size of every evaluation from here on."""
    seen = []
    forward = DiT.forward_modulated

    def spy(self, x, modulations):
        seen.append(len(x))
        return forward(self, x, modulations)

    monkeypatch.setattr(DiT, "forward_modulated", spy)
    return seen


def test_guide_is_null_plus_scale_times_the_difference():
    answer = seeded("answer", 4, 8, 2, 2)
    guided = guide(answer, 3.0, 3)
    expected = answer[2:, :3] + 3 * (answer[:2, :3] - answer[2:, :3])
    assert torch.equal(guided[:, :3], expected)
    assert torch.equal(guided[:, 3:], answer[:2, 3:])
    assert_close(guide(answer, 1.0, 8), answer[:2], 4, scale=largest(answer))


@pytest.mark.parametrize(
    ("guidance", "branches"),
    [
        (Guidance(4.0), [2] * 10),
        (Guidance(1.0), [1] * 10),
        (Guidance(4.0, interval=(0.3, 0.7)), [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]),
        (Guidance(4.0, interval=(0.0, 0.0)), [1] * 10),
        (Guidance(4.0, schedule="linear"), [1] + [2] * 9),
    ],
)
def test_the_null_branch_is_run_only_where_it_counts(monkeypatch, guidance, branches):
    """Levels of 10 steps of 1000 lie at 1, 0.889, ... 0.001; every number is evaluations a sample."""
    seen = batches(monkeypatch)
    sampler = Sampler(golden_model(), create_diffusion("10"), SamplerConfig(guidance=guidance))
    sampler([1, 2, 3])
    assert seen == [3 * branch for branch in branches]


def test_scales_follow_interval_and_schedule():
    schedule = flow_schedule(4)
    assert schedule.levels.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert Guidance(3.0, interval=(0.3, 0.8)).scales(schedule.levels).tolist() == [1.0, 3.0, 3.0, 1.0]
    assert Guidance(3.0, schedule="linear").scales(schedule.levels).tolist() == [1.0, 1.5, 2.0, 2.5]
    cosine = 1 + 2 * (1 - np.cos(np.pi * np.array([0, 0.25, 0.5, 0.75]))) / 2
    np.testing.assert_allclose(Guidance(3.0, schedule="cosine").scales(schedule.levels), cosine)
    rising = Guidance(3.0, schedule="power-cosine").scales(schedule.levels)
    assert rising[0] == 1.0
    assert (np.diff(rising) > 0).all()


@torch.no_grad()
def test_an_interval_changes_nothing_outside_it():
    """Guided in (0.5, 1] only: the first half of the trajectory is the guided one."""
    model, schedule = golden_model(), diffusion_schedule(create_diffusion("10"))

    def states(guidance):
        seen = []
        config = SamplerConfig(solver="ddim", guidance=guidance)
        Sampler(model, schedule, config)([1, 2], on_step=lambda step: seen.append(step.state))
        return seen

    cut, full = states(Guidance(4.0, interval=(0.5, 1.0))), states(Guidance(4.0))
    assert all(torch.equal(a, b) for a, b in zip(cut[:5], full[:5], strict=True))
    assert (cut[5] - full[5]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"interval": (0.2, 1.5)},
            r"guidance interval \(0\.2, 1\.5\): give two noise levels between 0 \(data\) and 1",
        ),
        ({"interval": (0.7, 0.2)}, r"guidance interval \(0\.7, 0\.2\)"),
        ({"interval": (float("nan"), 1.0)}, r"guidance interval \(nan, 1\.0\)"),
        ({"scale": float("inf")}, "guidance scale inf"),
        ({"channels": 0}, "guidance channels 0: give a whole number from 1"),
        (
            {"schedule": "square"},
            "guidance schedule 'square': give one of constant, linear, cosine, power-cosine",
        ),
    ],
)
def test_impossible_guidance_is_refused(options, line):
    with pytest.raises(ConfigError, match=line):
        Guidance(**options)


# Classifier guidance


class NoisyClassifier(nn.Module):
    """Logits (N, 2) of noisy data (N, C, H, W) at timesteps (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(17, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x, t):
        return self.net(torch.cat([x.flatten(1), t[:, None] / 1000], dim=1).float())


@pytest.fixture(scope="module")
def classifier() -> NoisyClassifier:
    """Tells apart data around -0.5 and +0.5 at every noise level, after a second of training."""
    torch.manual_seed(0)
    classifier, diffusion = NoisyClassifier(), create_diffusion("")
    optimiser = torch.optim.Adam(classifier.parameters(), lr=1e-2)
    for _ in range(300):
        y = torch.randint(2, (128,))
        data = (y.float() - 0.5).view(-1, 1, 1, 1) + 0.3 * torch.randn(128, 1, 4, 4)
        t = torch.randint(1000, (128,))
        loss = nn.functional.cross_entropy(classifier(diffusion.q_sample(data, t), t), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return classifier.eval().requires_grad_(False)


class MixtureDenoiser(nn.Module):
    """In a DiT's place: the exact noise prediction for an even mixture of N(-1/2, s^2) and N(+1/2, s^2) images."""

    def __init__(self, bars) -> None:
        super().__init__()
        self.bars = torch.tensor(bars, dtype=torch.float32)

    def forward(self, x, t):
        bar = self.bars[t].view(-1, 1, 1, 1)
        spread = bar * 0.09 + 1 - bar
        logit = (x * bar.sqrt() / spread).sum(dim=(1, 2, 3), keepdim=True)
        mean = 0.5 * torch.tanh(logit / 2)
        data = mean + bar.sqrt() * 0.09 / spread * (x - bar.sqrt() * mean)
        return (x - bar.sqrt() * data) / (1 - bar).sqrt()


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++2m"])
def test_a_noisy_classifier_leads_an_unconditional_model_to_its_class(monkeypatch, classifier, solver):
    """Unguided, half of the samples are of each class; guided towards class 1, nearly all are."""
    mixture = MixtureDenoiser(create_diffusion("").alphas_cumprod)
    cond_fn = classifier_cond_fn(classifier, scale=3.0)
    model = DiT(4, 2, 1, 16, 1, 2, num_classes=2, learn_sigma=False)
    respaced = create_diffusion("50", learn_sigma=False)
    config = SamplerConfig(solver=solver, guidance=Guidance(1.0))
    plain, guided = Sampler(model, respaced, config), Sampler(model, respaced, config, cond_fn=cond_fn)
    step = {"i": 0}

    def exact(self, x, modulations):
        t = int(plain.schedule.times[step["i"] % 50])
        step["i"] += 1
        return mixture(x, torch.full((len(x),), t))

    monkeypatch.setattr(DiT, "forward_modulated", exact)
    labels = [1] * 256
    shares = [
        (sampler(labels, batch_size=256).mean(dim=(1, 2, 3)) > 0).float().mean().item()
        for sampler in (plain, guided)
    ]
    assert 0.35 < shares[0] < 0.65
    assert shares[1] > 0.9


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_cond_fn_is_the_reference_s(solver):
    """The same gradient moves both: ADM's algorithm 1 for DDPM, algorithm 2 for DDIM."""
    model, diffusion = golden_model(), create_diffusion("8")
    seen = []

    def cond_fn(x, t, y):
        seen.append((t.tolist(), y.tolist()))
        return torch.cos(x) * 0.3

    config = SamplerConfig(solver=solver, mode="reference", guidance=Guidance(1.0))
    drawn = Sampler(model, diffusion, config, cond_fn=cond_fn)([1, 2], seed=3)
    torch.manual_seed(3)
    loop = diffusion.p_sample_loop if solver == "ddpm" else diffusion.ddim_sample_loop
    ours, seen[:] = list(seen), []
    expected = loop(
        model, (2, 4, 8, 8), clip_denoised=False, cond_fn=cond_fn, model_kwargs={"y": torch.tensor([1, 2])}
    )
    assert_close(drawn, expected)
    assert ours == seen


def test_the_documented_example_guides(tmp_path, monkeypatch):
    """docs/sampling.md as it stands, with a tenth of its steps, on a run of the digits with an untrained model."""
    model = DiT(8, 4, 1, 32, 1, 2, num_classes=10)
    manifest = {
        "step": 1,
        "data": open_images("digits").describe(),
        "diffusion": TrainConfig("digits", diffusion_steps=100).objective_arguments(),
    }
    zeros = {f"exp_avg.{name}": torch.zeros_like(p) for name, p in model.named_parameters()}
    save_checkpoint(tmp_path / "demo" / "run", model, model.state_dict(), zeros, manifest)
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    (code,) = (text.partition("```")[0] for text in page.split("```python\n") if "NoisyClassifier" in text)
    code = code.replace("range(500)", "range(100)")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    made: dict = {}
    exec(compile(code, "docs/sampling.md", "exec"), made)
    assert made["loss"] < 1.8, "log 10 is 2.3"
    classifier, labels = made["classifier"], made["labels"]
    drawn = [torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1 for _, images in made["rows"]]
    clean = torch.zeros(len(labels), dtype=torch.int64)
    losses = [nn.functional.cross_entropy(classifier(images, clean), labels).item() for images in drawn]
    assert losses[0] > losses[1] > losses[2], losses
    assert losses[2] < 0.5 * losses[0], losses
    assert (tmp_path / "classifier.png").exists()


# Hoisted modulation


@torch.no_grad()
def test_precomputed_modulation_is_the_plain_path():
    """Every step's and label's vectors at once, against `forward` itself: 1e-6, in float32."""
    model = golden_model()
    times, labels = torch.tensor([999, 500, 17, 0]), torch.tensor([0, 3, 10])
    table = ModulationTable(model, 4, 3)
    table.fill(times, labels)
    x = seeded("ax", 3, 4, 8, 8)
    for i, t in enumerate(times):
        plain = model(x, t.expand(3), labels)
        hoisted = model.forward_modulated(x, table.values[i])
        assert_close(plain, hoisted)
        assert_close(model.modulations(t.expand(3), labels), table.values[i])
    assert table.values.shape == (4, 3, modulation_width(model)) == (4, 3, (6 * 2 + 2) * 64)


def test_the_loop_reads_no_embedding_and_no_adaln_weights(monkeypatch):
    """After the table is made, labels and timesteps are not looked at: spoilt weights change nothing."""
    model = golden_model()
    sampler = Sampler(model, create_diffusion("6"), SamplerConfig())
    expected = sampler([1, 2])
    hoisted = [p for p in model.parameters() if all(p is not q for q in loop_parameters(model))]
    assert sum(p.numel() for p in hoisted) / sum(p.numel() for p in model.parameters()) > 0.3
    fill = ModulationTable.fill

    def spoil(self, *args):
        fill(self, *args)
        for parameter in hoisted:
            parameter.fill_(float("nan"))

    monkeypatch.setattr(ModulationTable, "fill", spoil)
    assert torch.equal(sampler([1, 2]), expected)


def test_offloaded_weights_give_the_same_samples():
    model = golden_model()
    sampler = Sampler(model, create_diffusion("4"))
    expected = sampler([1, 2])
    sampler.config = replace(sampler.config, offload=True)
    assert torch.equal(sampler([1, 2]), expected)
    assert {p.device.type for p in model.blocks[0].adaLN_modulation.parameters()} == {"cpu"}


@pytest.mark.slow
def test_compiled_evaluation_is_the_eager_one():
    model = golden_model()
    del model.blocks[1:]
    config = SamplerConfig(solver="ddim", guidance=Guidance(3.0, interval=(0.2, 0.8)))
    eager, compiled = (
        Sampler(model, create_diffusion("ddim10"), replace(config, compile=flag)) for flag in (False, True)
    )
    a, b = eager([1, 2]), compiled([1, 2])
    assert_close(a, b)
