"""Precision in which the model computes in a training step; weights, optimizer states and averages stay float32."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_fast.errors import MissingExtraError
from dit_fast.model.dit import DiT
from dit_fast.sampling.float8 import require_float8_device, takes_float8
from dit_fast.training.optimizer import AdamWEma

TrainPrecision = Literal["auto", "bf16", "fp16", "fp32", "tf32", "fp8"]
ResidualDtype = Literal["fp32", "bf16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: TrainPrecision, device: torch.device) -> TrainPrecision:
    """`name`, "auto" resolved: bf16 on a CUDA device whose hardware has it, fp32 elsewhere.

    Raises ConfigError for fp8 on a device without float8 arithmetic.
    """
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"
    if name == "fp8":
        require_float8_device(device)
    return name


def keep_residual_in_bf16(model: DiT) -> None:
    """Round the tokens that enter the blocks to bfloat16; the residual stream then has that dtype in all blocks."""

    def narrow(module: nn.Module, arguments: tuple[Any, ...], tokens: Tensor) -> Tensor:
        return tokens.to(torch.bfloat16)

    model.x_embedder.register_forward_hook(narrow)


def on_copies(model: DiT, optimizer: AdamWEma) -> DiT:
    """The model as it runs in bfloat16: its matrices are the optimizer's low-precision copies.

    Autocast casts every matrix in every step and casts its gradient back; here `adamw_ema` writes the copies when it
    updates the weights, the products read them, and the optimizer takes the gradients as the products wrote them. The
    values are those of autocast, to the bit. All other parameters (embedding tables, biases, norms, and the patch
    projection, which the kernels read in float32) are those of `model`, which holds the weights in float32 and is not
    run.

    Args:
        model: The model with the weights, on its device.
        optimizer: Optimizer of its parameters, with `low_precision_copy`.

    Returns:
        A model that shares everything with `model` but the weights of its linear layers.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            shared[id(module.weight)] = optimizer.copy(module.weight).requires_grad_()
    # Where the memo has an entry for an object, deepcopy takes that instead of copying the object.
    return copy.deepcopy(model, shared)


def use_float8(model: DiT, device: torch.device) -> None:
    """Replace the linear layers that `takes_float8` by torchao's float8 training layers (tensor-wise dynamic scales).

    Parameters keep their names. Call it before the model is sharded. Weights are gathered in bfloat16, because the
    optimizer's kernel cannot address the tensors of torchao's float8 all-gather. A CPU emulates the arithmetic. Raises
    MissingExtraError without torchao.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise MissingExtraError(
            "--precision fp8: torchao is not installed; pip install 'dit-fast[fp8]'"
        ) from error

    config = Float8LinearConfig(emulate=device.type != "cuda")
    convert_to_float8_training(model, module_filter_fn=takes_float8, config=config)


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2) that the host never waits for.

    As `torch.amp.GradScaler`: the scale is halved after a gradient overflow, doubled after 2000 steps without one.
    """

    GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000

    def __init__(self, device: torch.device, scale: float = 2.0**16):
        self.scale = torch.full((1,), scale, device=device)
        self.growth = torch.zeros(1, dtype=torch.int32, device=device)
        self.found_inf = torch.zeros(1, device=device)

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide the gradients by the scale, in place; `found_inf` is then 1 if one overflowed."""
        self.found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(
            list(gradients), self.found_inf, self.scale.double().reciprocal().float()
        )

    def update(self) -> None:
        """Adapt the scale to whether the last gradients overflowed."""
        torch._amp_update_scale_(
            self.scale, self.growth, self.found_inf, self.GROWTH, self.BACKOFF, self.INTERVAL
        )

    def state(self) -> dict[str, float]:
        """For a checkpoint; waits for the device."""
        return {"scale": self.scale.item(), "growth": self.growth.item()}

    def restore(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["scale"])
        self.growth.fill_(int(state["growth"]))
