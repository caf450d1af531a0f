"""define_op: the one way an operation reaches PyTorch, and the one switch between kernel and reference."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from dit_fast.kernels.launch import recording

KERNEL_MODES = ("auto", "triton", "reference")

NORMS = ("layernorm", "rmsnorm")
"""What `norm` of the modulated norms may be."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What the kernels compute on."""

MAX_WIDTH = 8192
"""Widest row that a program holds; beyond it registers spill whatever the number of warps."""


def uses_triton(kernels: str, x: Tensor) -> bool:
    """Whether `kernels` ("auto" | "triton" | "reference") means the registered operation for a tensor like `x`.

    "auto" is the Triton kernel on CUDA and the PyTorch reference elsewhere. "triton" is the registered operation
    on any device; on a CPU that runs the reference behind the same registration (Triton's interpreter, when on,
    runs the kernel itself). Raises ValueError for another word.
    """
    if kernels not in KERNEL_MODES:
        raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(map(repr, KERNEL_MODES))}")
    return kernels == "triton" or (kernels == "auto" and x.is_cuda)


def is_centred(norm: str) -> bool:
    """Whether a norm of NORMS subtracts the mean. Raises ValueError for another word."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: choose one of {', '.join(map(repr, NORMS))}")
    return norm == "layernorm"


def define_op(
    name: str,
    *,
    triton_impl: Callable[..., Any],
    reference_impl: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register `torch.ops.dit_fast.<name>` for CUDA (Triton), CPU (reference), fake tensors and autograd.

    The schema is read from the annotations of `triton_impl`; `reference_impl` and `fake` take the same arguments
    and return the same tensors. With Triton's interpreter on (TRITON_INTERPRET=1 when this is imported) the CPU
    runs `triton_impl`, which is how the tests prove the kernels on a machine without a GPU. While launches are
    recorded (`record_launches`), meta tensors go to `triton_impl` as well, forward and backward.
    """
    op = torch.library.custom_op(f"dit_fast::{name}", triton_impl, mutates_args=(), device_types="cuda")
    op.register_kernel("cpu")(triton_impl if triton.knobs.runtime.interpret else reference_impl)

    def on_meta(*args: Any, **kwargs: Any) -> Any:
        meta = any(isinstance(arg, Tensor) and arg.is_meta for arg in (*args, *kwargs.values()))
        return (triton_impl if recording() and meta else fake)(*args, **kwargs)

    op.register_fake(on_meta)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    return op


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """ValueError naming the first tensor that is not of floating point, or not on the first one's device."""
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype}, expected float16, bfloat16, float32 or float64"
            )
        first = first or (name, tensor)
        if tensor.device != first[1].device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first[0]} on {first[1].device}")


def check_shapes(op: str, x: Tensor, **others: tuple[Tensor, tuple[int, ...]]) -> torch.Size:
    """The shape of the (B, T, D) tensor `x`; ValueError naming the first argument that does not fit beside it."""
    check_tensors(op, x=x, **{name: tensor for name, (tensor, _) in others.items()})
    if x.ndim != 3:
        raise ValueError(f"{op}: x is {tuple(x.shape)}, expected (batch, tokens, width)")
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{op}: width {x.shape[-1]} is not in 1..{MAX_WIDTH}; use kernels='reference'")
    if x.shape[1] * x.shape[2] >= 2**31:
        raise ValueError(f"{op}: a sample of {x.shape[1]} x {x.shape[2]} elements is beyond 32-bit offsets")
    for name, (tensor, shape) in others.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, expected {shape}")
    return x.shape
