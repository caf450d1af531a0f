"""`Backends`: how a model computes, one validated object that all its modules share."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from dit_fast import kernels
from dit_fast.errors import ConfigError

Recompute = Literal["none", "cheap", "blocks"]
RECOMPUTE = get_args(Recompute)
"""Recomputed in the backward pass: nothing; norm outputs and activations; every block from its input."""

_CHOICES = {
    "kernels": kernels.KERNEL_MODES,
    "attention": kernels.BACKENDS,
    "mlp_epilogue": kernels.EPILOGUES,
    "recompute": RECOMPUTE,
}


@dataclass
class Backends:
    """How a model computes; no choice changes its results beyond rounding.

    A `DiT` and its modules hold the same object, so that an assignment changes the whole model.

    Attributes:
        kernels: "auto" (Triton on CUDA, PyTorch elsewhere), "triton" or "reference".
        attention: "auto", "triton", "sdpa", "cudnn" or "flash", see `dit_fast.kernels.attention`.
        mlp_epilogue: Where the GELU is applied: "auto" (by the device's tuned table), "separate", "triton" or
            "cublaslt", see `dit_fast.kernels.mlp`.
        recompute: Recomputed in the backward pass: "none", "cheap" (norm outputs and activations, where the kernels
            run: a third less memory for no matrix product) or "blocks" (every block from its input).

    Raises:
        ConfigError: Another value, at construction or in an assignment.
    """

    kernels: str = "auto"
    attention: str = "auto"
    mlp_epilogue: str = "auto"
    recompute: str = "none"

    def __setattr__(self, name: str, value: str) -> None:
        super().__setattr__(name, one_of(name, value, _CHOICES[name]))


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """`value`; ConfigError where it is none of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")
    return value
