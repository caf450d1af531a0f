"""Somebody else's blocks on the Triton kernels themselves: the reference's layout and diffusers'."""

import pytest
import torch
from torch import Tensor, nn

import dit_fast
from tests.reference_layout import ReferenceDiT, inputs, randomise
from tests.tolerance import assert_close, largest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference() -> nn.Module:
    return ReferenceDiT(depth=1)


def diffusers() -> nn.Module:
    made = pytest.importorskip("diffusers").DiTTransformer2DModel

    return randomise(made(4, 8, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10))


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    x, t, y = (tensor.to(DEVICE) for tensor in inputs())
    out = model(x, t, y)
    out = out if isinstance(out, Tensor) else out.sample
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("make", [reference, diffusers])
def test_outputs_and_gradients_on_the_kernels(make) -> None:
    model = make().to(DEVICE)
    before, slopes = step(model)
    report = dit_fast.accelerate(model, kernels="triton", attention="triton")
    after, again = step(model)
    assert_close(after, before)
    assert again.keys() == slopes.keys()
    for name, slope in slopes.items():
        # A key's bias moves all logits of a query alike: its gradient is the rounding of what cancels.
        cancelling = largest(slopes[name.replace("to_k.bias", "to_q.bias")])
        assert_close(again[name], slope, scale=cancelling, what=name)
    report.undo()
    assert torch.equal(step(model)[0], before)
