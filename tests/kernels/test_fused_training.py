"""K11: 32 training steps of a small DiT on the kernels and on PyTorch alone: the same losses within 1e-5."""

from collections.abc import Callable
from typing import Any

import planted
import pytest
import torch
from interpreter import INTERPRETED
from proofs import DEVICE
from torch import Tensor

from dit_fast import blocks
from dit_fast.diffusion import create_diffusion
from dit_fast.models import DiT

STEPS = 32


def losses(kernels: str, dtype: torch.dtype = torch.float32, steps: int = STEPS) -> list[float]:
    """The losses of a run from a fixed start, noise and times included; autocast to `dtype` unless it is float32."""
    torch.manual_seed(0)
    model = DiT(
        input_size=4, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=4, kernels=kernels
    )  # fmt: skip
    for parameter in model.parameters():  # adaLN-Zero starts as the identity, which would hide the blocks
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    model.to(DEVICE).train()
    diffusion = create_diffusion("")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(1)
    history = []
    for _ in range(steps):
        x, noise = (torch.randn(2, 4, 4, 4, generator=generator).to(DEVICE) for _ in range(2))
        t, y = (torch.randint(0, high, (2,), generator=generator).to(DEVICE) for high in (1000, 4))
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            loss = diffusion.training_losses(model, x, t, {"y": y}, noise=noise)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two runs."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def reference() -> list[float]:
    return losses("reference")


def test_float32_losses_agree(reference: list[float]) -> None:
    assert len(set(reference)) == STEPS
    assert largest_difference(losses("triton"), reference) <= 1e-5


@pytest.mark.gpu
def test_bfloat16_losses_agree() -> None:
    theirs = losses("reference", torch.bfloat16)
    assert largest_difference(losses("triton", torch.bfloat16), theirs) <= 5e-2


@pytest.mark.parametrize("fault", ["batch", "rows"])
def test_a_planted_fault_parts_the_losses(
    fault: str, reference: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate taken from the first sample, or the last token's branch lost, within the first four steps."""
    sound: Callable[..., Any] = blocks.gated_residual_adaln

    def faulty(x: Tensor, branch: Tensor, gate: Tensor, *others: Any, **kwargs: Any) -> Any:
        branch = planted.scale_rows(
            branch, torch.ones_like(gate) * gate, fault, kernels="triton"
        ).nan_to_num()
        return sound(x, branch, torch.ones_like(gate), *others, **kwargs)

    monkeypatch.setattr(blocks, "gated_residual_adaln", faulty)
    assert largest_difference(losses("triton", steps=4), reference[:4]) > 1e-4


def test_the_planted_operation_without_a_fault_changes_nothing(
    reference: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control's own control: gate * branch by the planted operation, its bias scaled with it."""
    sound: Callable[..., Any] = blocks.gated_residual

    def same(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Any:
        branch = branch if bias is None else branch + bias
        scaled = planted.scale_rows(branch, torch.ones_like(gate) * gate, "", kernels="triton")
        return sound(x, scaled, torch.ones_like(gate), None, **kwargs)

    monkeypatch.setattr(blocks, "gated_residual", same)
    assert largest_difference(losses("triton", steps=4), reference[:4]) <= 1e-5


def test_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs on PyTorch alone would agree as well: without a launch the training step fails."""
    from triton.runtime.jit import KernelInterface

    def refuse(self: Any, grid: Any) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(KernelInterface, "__getitem__", refuse)
    assert INTERPRETED or DEVICE == "cuda"
    with pytest.raises(AssertionError, match="launched"):
        losses("triton", steps=1)
    assert losses("reference", steps=1)
