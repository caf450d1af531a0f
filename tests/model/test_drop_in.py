"""The reference's training and sampling scripts in small, with nothing but their three imports changed."""

import argparse
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from dit_fast.diffusion import create_diffusion
from dit_fast.download import find_model
from dit_fast.models import DiT_models
from tests.tolerance import assert_close

ARCHITECTURE = dict(input_size=8, num_classes=10, depth=2, hidden_size=48, num_heads=4)


def train(steps: int, path: Path) -> tuple[torch.nn.Module, torch.nn.Module, list[float]]:
    """Train a tiny DiT on one batch as the reference's trainer does, and save its dictionary to `path`."""
    torch.manual_seed(0)
    model = DiT_models["DiT-S/2"](**ARCHITECTURE)
    ema = deepcopy(model)
    for parameter in ema.parameters():
        parameter.requires_grad = False
    diffusion = create_diffusion(timestep_respacing="")
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)

    model.train()
    ema.eval()
    x = torch.randn(4, 4, 8, 8)
    y = torch.randint(0, 10, (4,))
    losses = []
    for _ in range(steps):
        t = torch.randint(0, diffusion.num_timesteps, (x.shape[0],))
        terms = diffusion.training_losses(model, x, t, dict(y=y))
        loss = terms["loss"].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        averaged = OrderedDict(ema.named_parameters())
        with torch.no_grad():
            for name, parameter in OrderedDict(model.named_parameters()).items():
                averaged[name].mul_(0.9).add_(parameter.data, alpha=0.1)
        losses.append(loss.item())

    args = argparse.Namespace(model="DiT-S/2", image_size=256, num_classes=10)
    checkpoint = dict(model=model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), args=args)
    torch.save(checkpoint, path)
    return model, ema, losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("checkpoints") / "0000040.pt"
    return *train(40, path), path


def test_training_learns_and_averages(trained) -> None:
    model, ema, losses, _ = trained
    assert losses[0] > 0.9  # noise of variance 1 against a prediction of 0
    assert sum(losses[-10:]) / 10 < 0.95 * sum(losses[:10]) / 10
    assert not any(p.requires_grad for p in ema.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
    assert_close(ema.pos_embed, model.pos_embed, 4)
    assert not torch.equal(ema.final_layer.linear.weight, model.final_layer.linear.weight)


def test_optimiser_state_has_the_references_indices(trained) -> None:
    model, _, _, path = trained
    with torch.serialization.safe_globals([argparse.Namespace]):
        opt = torch.load(path, weights_only=True)["opt"]
    number = len(list(model.parameters()))
    assert opt["param_groups"][0]["params"] == list(range(number))
    assert list(opt["state"]) == list(range(1, number))  # positions, the first, are not trained


def test_checkpoint_is_sampled_from(trained) -> None:
    _, ema, _, path = trained
    torch.manual_seed(0)
    model = DiT_models["DiT-S/2"](**ARCHITECTURE)
    model.load_state_dict(find_model(str(path)))
    model.eval()
    for name, tensor in ema.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name

    diffusion = create_diffusion("10")
    class_labels = [2, 0, 7]
    n = len(class_labels)
    z = torch.randn(n, 4, 8, 8)
    z = torch.cat([z, z], 0)
    y = torch.cat([torch.tensor(class_labels), torch.tensor([10] * n)], 0)

    def sample(seed: int, cfg_scale: float) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            samples = diffusion.p_sample_loop(
                model.forward_with_cfg, z.shape, z, clip_denoised=False,
                model_kwargs=dict(y=y, cfg_scale=cfg_scale), progress=True, device="cpu",
            )  # fmt: skip
        assert samples.shape == z.shape
        samples, _ = samples.chunk(2, dim=0)
        return samples

    samples = sample(1, 4.0)
    assert samples.shape == (n, 4, 8, 8)
    assert samples.isfinite().all()
    assert torch.equal(samples, sample(1, 4.0))
    assert not torch.equal(samples, sample(2, 4.0))
    assert not torch.equal(samples, sample(1, 1.0))
