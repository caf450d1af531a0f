"""K11: 32 training steps of a small DiT on the kernels and on PyTorch alone: the same losses within 1e-5."""

from typing import Any

import pytest
import torch
from triton.runtime.jit import KernelInterface

from dit_fast.diffusion import create_diffusion
from dit_fast.model.blocks import Stream
from dit_fast.models import DiT
from tests.kernels.planted import scale_rows
from tests.kernels.proofs import DEVICE

STEPS = 32


def losses(
    kernels: str, dtype: torch.dtype = torch.float32, steps: int = STEPS, **options: str
) -> list[float]:
    """The losses of a run from a fixed start, noise and times included; autocast to `dtype` unless it is float32."""
    torch.manual_seed(0)
    model = DiT(
        input_size=4, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=4, kernels=kernels, **options
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


@pytest.mark.slow
def test_float32_losses_agree(reference: list[float]) -> None:
    assert len(set(reference)) == STEPS
    assert largest_difference(losses("triton"), reference) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("options", [{"mlp": "swiglu"}, {"norm": "rmsnorm"}], ids=["swiglu", "rmsnorm"])
def test_losses_with_options_agree(options: dict[str, str], recompute: str, reference: list[float]) -> None:
    theirs = losses("reference", steps=4, **options)
    ours = losses("triton", steps=4, recompute=recompute, **options)
    assert largest_difference(ours, theirs) <= 1e-5
    assert largest_difference(theirs, reference[:4]) > 1e-4


@pytest.mark.gpu
def test_bfloat16_losses_agree() -> None:
    theirs = losses("reference", torch.bfloat16)
    assert largest_difference(losses("triton", torch.bfloat16), theirs) <= 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["", "batch", "rows"])
def test_a_planted_fault_parts_the_losses(
    fault: str, reference: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate taken from the first sample, or the last token's branch lost, within four steps; without a fault none."""
    sound = Stream.norm_modulate

    def planted(self: Stream, *args: Any) -> Any:
        if self.branch is not None and self.gate is not None:
            branch = self.branch if self.bias is None else self.branch + self.bias
            branch = scale_rows(branch, self.gate, fault, kernels="triton").nan_to_num()
            self = Stream(self.x, branch, None, torch.ones_like(self.gate))
        return sound(self, *args)

    monkeypatch.setattr(Stream, "norm_modulate", planted)
    difference = largest_difference(losses("triton", steps=4), reference[:4])
    assert difference > 1e-4 if fault else difference <= 1e-5


def test_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs on PyTorch alone would agree as well: a training step on the kernels launches them, the other none."""

    def refuse(self: Any, grid: Any) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(KernelInterface, "__getitem__", refuse)
    with pytest.raises(AssertionError, match="launched"):
        losses("triton", steps=1)
    assert losses("reference", steps=1)
