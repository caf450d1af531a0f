"""A linear layer that makes its input again: same numbers, and the input is not kept."""

import pytest
import torch
import torch.nn.functional as F

from dit_fast.kernels import NORMS
from dit_fast.kernels.adaln import adaln_with_moments
from dit_fast.kernels.recompute import NormRecipe, adaln_from_moments, linear
from tests.tolerance import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(dtype: torch.dtype, shape=(2, 9, 72), outputs: int = 40):
    B, T, D = shape
    make = lambda *size: torch.randn(size, dtype=torch.float64, device=DEVICE).to(dtype)  # noqa: E731
    shift, scale, _ = make(B, 3 * D).chunk(3, 1)
    return [make(B, T, D), shift, scale, make(outputs, D), make(outputs)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(2, 9, 72), (1, 5, 1000), (3, 16, 1152), (0, 4, 72), (2, 0, 72)])
def test_norm_from_its_moments_is_the_norm(shape, norm) -> None:
    x, shift, scale, _, _ = inputs(torch.float64, shape)
    y, mean, rstd = adaln_with_moments(x, shift, scale, 1e-6, norm == "layernorm")
    assert mean.any() == (norm == "layernorm" and x.numel() > 0)
    assert_close(adaln_from_moments(x, mean, rstd, shift, scale), y, x.shape[-1])


def test_norm_from_moments_is_a_proper_operation() -> None:
    x, shift, scale, _, _ = inputs(torch.float32)
    _, mean, rstd = adaln_with_moments(x, shift, scale, 1e-6, True)
    checks = torch.library.opcheck(
        torch.ops.dit_fast.adaln_from_moments.default, (x, mean, rstd, shift, scale)
    )
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_and_what_is_kept(recompute) -> None:
    """Equal gradients; y (B, T, D) is among the saved tensors only without recomputation."""
    leaves = [value.detach().requires_grad_() for value in inputs(torch.float64)]
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    def loss() -> tuple[torch.Tensor, int]:
        x, shift, scale, weight, bias = leaves
        y, mean, rstd = adaln_with_moments(x, shift, scale, 1e-6, True)
        recipe = NormRecipe(x, mean, rstd, shift, scale) if recompute else None
        return linear(y, weight, bias, recipe).square().sum(), y.untyped_storage().data_ptr()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value, address = loss()
    assert (address in kept) is not recompute
    grads = torch.autograd.grad(value, leaves)
    x, shift, scale, weight, bias = leaves
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    expected = torch.autograd.grad(F.linear(y, weight, bias).square().sum(), leaves)
    for got, want in zip(grads, expected, strict=True):
        assert_close(got, want)


def test_frozen_weight_recomputes_nothing() -> None:
    x, shift, scale, weight, bias = (value.detach() for value in inputs(torch.float32))
    x.requires_grad_()
    y, mean, rstd = adaln_with_moments(x, shift, scale, 1e-6, True)
    out = linear(y, weight, bias, NormRecipe(x, mean, rstd.fill_(float("nan")), shift, scale))
    assert torch.autograd.grad(out.sum(), y)[0].isfinite().all()


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_weight_in_float32_as_under_autocast(low) -> None:
    """The product is in the dtype of y, the weight's gradient in the weight's."""
    x, shift, scale, weight, bias = inputs(torch.float32)
    shift, scale, weight = shift.to(low), scale.to(low), weight.requires_grad_()
    y, mean, rstd = adaln_with_moments(x, shift, scale, 1e-6, True)
    out = linear(y, weight, bias, NormRecipe(x, mean, rstd, shift, scale))
    expected = F.linear(y, weight.to(low), bias.to(low))
    assert out.dtype == low
    assert torch.equal(out, expected)
    ours, plain = (torch.autograd.grad(value.float().sum(), weight)[0] for value in (out, expected))
    assert ours.dtype == torch.float32
    assert (ours - plain).abs().max() <= 2**-7 * plain.abs().max()
