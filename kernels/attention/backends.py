"""Which implementation `attention` runs: these kernels, PyTorch's, or a flash-attn package's.

"sdpa" is `torch.nn.functional.scaled_dot_product_attention`, which chooses between flash-attn 2 and cuDNN itself;
"cudnn" is the same with cuDNN's attention first; "flash" is flash-attn 4 (`flash_attn.cute`), 3
(`flash_attn_interface`) or 2 (`flash_attn`), the first that the device can run and that imports.
All of them read the packed projection through views and have a gradient for the bias, since it is added first.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_fast.kernels import tuned
from dit_fast.kernels.attention import long as attention_long
from dit_fast.kernels.attention import short as attention_short
from dit_fast.kernels.launch import device_capability
from dit_fast.kernels.library import define_op

AttentionBackend = Literal["auto", "triton", "sdpa", "cudnn", "flash"]
BACKENDS = get_args(AttentionBackend)
# In this order; PyTorch leaves out what it cannot run on a device or for a shape.
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_MODULES = {
    2: ("flash_attn", "flash_attn_qkvpacked_func"),
    3: ("flash_attn_interface", "flash_attn_qkvpacked_func"),
    4: ("flash_attn.cute", "flash_attn_func"),
}


_TORCH_PREFERS_CUDNN = torch.torch_version.TorchVersion(torch.__version__) >= "2.11"


@dataclass(frozen=True)
class Choice:
    """What runs, as the option names it ("triton", "sdpa", "flash", ...), and why, in words."""

    name: str
    reason: str


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int
) -> Choice:
    """What `attention(..., backend=backend)` runs for qkv of `dtype` on `device`; nothing is launched.

    "auto" is PyTorch's until this device's tuned table, measured by `benchmarks.ops.tune`, says otherwise: cuDNN's on
    Hopper and Blackwell, by PyTorch's own choice since 2.11, by ours before. Raises ValueError for an unknown name or
    for what flash-attn does not take, ImportError where no flash-attn imports.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend={backend!r}: choose one of {', '.join(map(repr, BACKENDS))}")
    if backend == "flash":
        if device.type != "cuda" or dtype not in FLASH_DTYPES:
            raise ValueError(
                f"attention: backend='flash' takes float16 or bfloat16 on CUDA, qkv is {dtype} on {device.type}"
            )
        return Choice("flash", f"asked for; flash-attn {flash_version(_index(device))} is installed")
    if backend != "auto":
        return Choice(backend, "asked for")
    if device.type != "cuda":
        return Choice("sdpa", f"auto on {device.type}: PyTorch's kernels are the ones made for it")
    bucket = next((bound for bound in (256, 1024, 4096) if tokens <= bound), 0)
    measured = _tuned_backend(dtype, head_dim, bucket, _index(device))
    if measured == "":
        cudnn = (
            device_capability(_index(device)) // 10 in (9, 10) and dtype in FLASH_DTYPES and head_dim % 8 == 0
        )
        if cudnn and not _TORCH_PREFERS_CUDNN:
            return Choice(
                "cudnn", "auto: the fastest of PyTorch's here; no tuned table has measured this shape"
            )
        return Choice("sdpa", "auto: no tuned table of this device has measured this shape")
    if measured == "flash" and not tuned.require(
        dtype in FLASH_DTYPES and _installed(_index(device)), "flash-attn"
    ):
        return Choice("sdpa", "auto: the tuned table says flash, which is not installed (extra 'flash')")
    return Choice(measured, "auto: fastest in this device's tuned table")


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@torch.compiler.assume_constant_result
def _tuned_backend(dtype: torch.dtype, head_dim: int, bucket: int, index: int) -> str:
    """The tuned table's word for at most `bucket` tokens (0: more), "" without one."""
    return _measured_backend(dtype, head_dim, bucket, device_capability(index))


@tuned.per_launch
def _measured_backend(dtype: torch.dtype, head_dim: int, bucket: int, capability: int) -> str:
    kernels = (
        attention_short._attention_short_fwd_kernel,
        attention_short._attention_short_bwd_kernel,
        attention_long._attention_long_fwd_kernel,
        attention_long._attention_long_bwd_queries_kernel,
        attention_long._attention_long_bwd_keys_kernel,
    )
    key = f"{dtype}-K{head_dim}-T{bucket or 'more'}"
    return tuned.choice(
        "attention", key, "", options=("sdpa", "cudnn", "triton", "flash"), kernels=kernels,
        capability=capability,
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _installed(index: int) -> bool:
    try:
        flash_version(index)
    except ImportError:
        return False
    return True


@torch.compiler.assume_constant_result
def flash_version(index: int) -> int:
    """The flash-attn (4, 3 or 2) that CUDA device `index` runs; ImportError in one line where none imports."""
    capability = device_capability(index)
    fit = {9: (3, 4, 2), 10: (4, 2), 11: (4, 2)}.get(capability // 10, (2,))
    found = {version: _flash_function(version) for version in fit}
    for version, function in found.items():
        if callable(function):
            return version
    tried = "; ".join(f"{FLASH_MODULES[version][0]}: {error}" for version, error in found.items())
    raise ImportError(f"attention: backend='flash' needs flash-attn, extra 'flash' of dit-fast ({tried})")


@functools.cache
def _flash_function(version: int) -> Callable[..., Any] | str:
    """The public function of a flash-attn package, or what is wrong with the package."""
    module, name = FLASH_MODULES[version]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError) as error:
        return " ".join(str(error).split())


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention; where one of its arguments has a tangent, which it has no rule for, the
    same step by step.
    """
    if all(fwAD.unpack_dual(x).tangent is None for x in (q, k, v)):
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v


def sdpa_attention(qkv: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """`attention` by torch.nn.functional.scaled_dot_product_attention."""
    if bias is not None:
        qkv = qkv + bias.to(qkv.dtype)
    B, T, packed = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, num_heads, packed // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return scaled_dot_product(q, k, v).transpose(1, 2).reshape(B, T, packed // 3)


def cudnn_attention(qkv: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """`sdpa_attention` by cuDNN where it runs, else by what PyTorch would have taken."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return sdpa_attention(qkv, num_heads, bias)


def flash_attention(qkv: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """`attention` by a flash-attn package, deterministic."""
    if bias is not None:
        qkv = qkv + bias.to(qkv.dtype)
    B, T, packed = qkv.shape
    qkv = qkv.reshape(B, T, 3, num_heads, packed // (3 * num_heads))
    version = flash_version(_index(qkv.device))
    if version == 4:
        out, _ = _flash4_op(qkv)
    else:
        out = call_qkvpacked(version)(qkv, softmax_scale=qkv.shape[-1] ** -0.5, deterministic=True)
        out = out[0] if isinstance(out, tuple) else out
    return out.reshape(B, T, packed // 3)


@torch.compiler.assume_constant_result
def call_qkvpacked(version: int) -> Callable[..., Any]:
    """flash-attn 2's or 3's function of packed (B, T, 3, H, K), found to import by `flash_version`."""
    function = _flash_function(version)
    assert callable(function)
    return function


# flash-attn 4 compiles its kernels from Python, which torch.compile cannot trace: it stands behind a registered
# operation, forward and backward. Its fakes are written by hand: there is no reference of its two outputs here.


def _flash4(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, T, H, K) and log-sum-exp (B, H, T) of packed qkv (B, T, 3, H, K)."""
    interface = importlib.import_module("flash_attn.cute.interface")
    q, k, v = qkv.unbind(2)
    out, lse = interface._flash_attn_fwd(q, k, v, softmax_scale=q.shape[-1] ** -0.5, return_lse=True)[:2]
    return out, lse


def _flash4_fake(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, T, _, H, K = qkv.shape
    return qkv.new_empty(B, T, H, K), qkv.new_empty(B, H, T, dtype=torch.float32)


def _flash4_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    interface = importlib.import_module("flash_attn.cute.interface")
    q, k, v = qkv.unbind(2)
    grads = interface._flash_attn_bwd(
        q, k, v, out, dout.contiguous(), lse, softmax_scale=q.shape[-1] ** -0.5, deterministic=True
    )
    return torch.stack(grads[:3], 2)


def _flash4_backward_fake(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _flash4_flops(qkv: tuple[int, ...], *rest: Any, **kw: Any) -> int:
    B, T, _, H, K = qkv
    return 2 * 2 * B * T**2 * H * K


def _flash4_backward_flops(dout: Any, qkv: tuple[int, ...], *rest: Any, **kw: Any) -> int:
    return _flash4_flops(qkv) * 5 // 2


_flash4_backward_op = define_op(
    "attention_flash4_backward", triton_impl=_flash4_backward, reference_impl=_flash4_backward,
    fake=_flash4_backward_fake, flops=_flash4_backward_flops,
)  # fmt: skip


def _flash4_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _flash4_autograd(ctx: Any, dout: Tensor, _: Tensor | None) -> Tensor:
    return _flash4_backward_op(dout, *ctx.saved_tensors)


_flash4_op = define_op(
    "attention_flash4", triton_impl=_flash4, reference_impl=_flash4, fake=_flash4_fake,
    backward=_flash4_autograd, setup_context=_flash4_context, flops=_flash4_flops,
)  # fmt: skip
