"""Float8 linear layers for sampling.

Row-wise scaling (Micikevicius et al. 2022, arXiv:2209.05433, format e4m3): each output channel of a weight and each
token has its own scale, which maps its largest magnitude to 448. The result of a token depends on that token alone, so
that a sample does not depend on the rest of its batch.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.model.dit import DiT

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max
# Lower bound on the largest magnitude of a row, so that the scale of a row of zeros does not underflow.
_LEAST = 1e-12
# First compute capability with float8 matrix products (Ada).
_CAPABILITY = (8, 9)
# The hardware needs dimensions that are multiples of this.
_MULTIPLE = 16
_ROWS = F.ScalingType.RowWise


def require_float8_device(device: torch.device) -> None:
    """Raise ConfigError for a device without float8 products. On a CPU they are exact and slow."""
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
    """Raise ConfigError where the device of the model, or every one of its widths, does not support float8."""
    require_float8_device(model.pos_embed.device)
    if not any(takes_float8(module, name) for name, module in model.named_modules()):
        raise ConfigError(
            f"--precision fp8: float8 needs widths that are multiples of {_MULTIPLE}, the model's is "
            f"{model.pos_embed.shape[-1]}; give --precision bf16"
        )


def takes_float8(module: nn.Module, name: str) -> bool:
    """Whether the module `name` of a DiT is a linear layer that is converted to float8.

    These are the layers over tokens in the attention and MLP of each block, where their dimensions are multiples of 16.
    Layers over the batch (modulation, embedders, keys and values of the condition) are too small to gain.
    """
    fits = isinstance(module, nn.Linear) and not (
        module.in_features % _MULTIPLE or module.out_features % _MULTIPLE
    )
    over = name.startswith("blocks.") and name.split(".")[-2] in ("attn", "cross", "mlp")
    return fits and over and not name.endswith("cross.kv")


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row to float8, rounded to nearest.

    Args:
        x: (..., D).

    Returns:
        Values, float8 (..., D), and scales, float32 (..., 1), with x = values * scales up to an error of at most
        2^-4 |x|, or 2^-10 scales where that is more.
    """
    x = x.float()
    scales = x.abs().amax(dim=-1, keepdim=True).clamp(min=_LEAST) / _LARGEST
    return (x / scales).to(FLOAT8), scales


class Float8Linear(nn.Module):
    """Linear layer x W^T + b with float8 weights that quantizes its input; for inference.

    The output (..., out_features) has the dtype of the input (..., in_features), which must be bfloat16 on CUDA.
    Products are accumulated in float32.

    Args:
        linear: The layer that it replaces.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values, scales = quantize(linear.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.bias = linear.bias
        self.scales: Tensor
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        values, scales = quantize(x.flatten(0, -2))
        product = F.scaled_mm(
            values, self.weight.t(), scales, _ROWS, self.scales.t(), _ROWS,
            bias=self.bias, output_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip
        return product.unflatten(0, x.shape[:-1])


def use_float8_linears(model: DiT) -> None:
    """Replace every layer that `takes_float8` by a `Float8Linear`."""
    chosen = [(name, module) for name, module in model.named_modules() if takes_float8(module, name)]
    for name, module in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Float8Linear(cast(nn.Linear, module)))
