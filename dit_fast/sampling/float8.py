"""Float8 arithmetic in a model's blocks: which linears take it, on which devices, and the linear that samples with it.

Row-wise scaling (Micikevicius et al. 2022, arXiv:2209.05433, format e4m3): each output channel of a weight and each
token has a scale of its own, which takes its largest magnitude to 448. A token's result then depends on that token
alone, so that a sample does not depend on the batch that it is drawn in.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.model.dit import DiT

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max
# Of a row that is all but zero: its scale must not underflow.
_LEAST = 1e-12
_CAPABILITY = (8, 9)
_MULTIPLE = 16
_ROWS = F.ScalingType.RowWise


def require_float8_device(device: torch.device) -> None:
    """ConfigError for a device without float8 products. A CPU has them, exact and slow."""
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < _CAPABILITY:
            raise ConfigError(
                f"--precision fp8: the device has compute capability {found[0]}.{found[1]}, float8 needs "
                f"{_CAPABILITY[0]}.{_CAPABILITY[1]}; give --precision bf16"
            )
    elif device.type != "cpu":
        raise ConfigError(f"--precision fp8: {device.type} has no float8 products; give --precision bf16")


def require_float8(model: DiT) -> None:
    """ConfigError for a model that is on no device for float8, or has no linear for it."""
    require_float8_device(model.pos_embed.device)
    if not any(takes_float8(module, name) for name, module in model.named_modules()):
        raise ConfigError(
            f"--precision fp8: float8 needs widths that are multiples of {_MULTIPLE}, the model's is "
            f"{model.pos_embed.shape[-1]}; give --precision bf16"
        )


def takes_float8(module: nn.Module, name: str) -> bool:
    """Whether a module of a DiT, called `name` in it, is a linear over tokens that float8 products fit.

    Those of attention and MLP of each block. Linears over the batch (modulation, embedders, keys of the condition) are
    too small to gain, and the hardware takes dimensions that are multiples of 16.
    """
    fits = isinstance(module, nn.Linear) and not (
        module.in_features % _MULTIPLE or module.out_features % _MULTIPLE
    )
    over = name.startswith("blocks.") and name.split(".")[-2] in ("attn", "cross", "mlp")
    return fits and over and not name.endswith("cross.kv")


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) as (values in float8, scales float32 (..., 1)) with x = values * scales, rounded to nearest.

    |values * scales - x| is at most 2^-4 |x|, or 2^-10 scales where that is more.
    """
    x = x.float()
    scales = x.abs().amax(dim=-1, keepdim=True).clamp(min=_LEAST) / _LARGEST
    return (x / scales).to(FLOAT8), scales


class Float8Linear(nn.Module):
    """x W^T + b of a linear layer with float8 weights, and tokens (..., in_features) made float8 as they come.

    The result has the dtype of x, which CUDA wants to be bfloat16; products are summed in float32. Without gradients.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values, scales = quantise(linear.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.bias = linear.bias
        self.scales: Tensor
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        values, scales = quantise(x.flatten(0, -2))
        product = F.scaled_mm(
            values, self.weight.t(), scales, _ROWS, self.scales.t(), _ROWS,
            bias=self.bias, output_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip
        return product.unflatten(0, x.shape[:-1])


def use_float8_linears(model: DiT) -> None:
    """Put a `Float8Linear` in the place of every linear that `takes_float8`."""
    chosen = [(name, module) for name, module in model.named_modules() if takes_float8(module, name)]
    for name, module in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Float8Linear(cast(nn.Linear, module)))
