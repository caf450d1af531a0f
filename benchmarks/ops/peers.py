"""Who else can compute an operation of the registry: PyTorch, its compiler, and the libraries of the field.

A provider is a function of the operation's inputs, or the reason why it is not there. What a library computes is put
together from its public functions with PyTorch around them, as a user of it would.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ops.registry import OpSpec
from dit_fast.kernels import attention

Function = Callable[..., Any]


class Missing(Exception):
    """Why a provider cannot run here, in one line."""


def ours(spec: OpSpec) -> Function:
    return partial(spec.op, kernels="auto")


def eager(spec: OpSpec) -> Function:
    return spec.reference


def compiled(spec: OpSpec) -> Function:
    torch._dynamo.reset()
    return torch.compile(spec.reference, fullgraph=True, dynamic=False)


def _sdpa(backend: SDPBackend, spec: OpSpec) -> Function:
    _needs_cuda(f"SDPA's {backend.name.lower()}")

    def run(qkv: Tensor, heads: int, bias: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attention(qkv, heads, bias, backend="sdpa")

    return run


def _flash(module: str, spec: OpSpec) -> Function:
    _needs_cuda(module)
    package = _load(module)

    def run(qkv: Tensor, heads: int, bias: Tensor) -> Tensor:
        B, T, packed = qkv.shape
        q, k, v = (qkv + bias.to(qkv.dtype)).view(B, T, 3, heads, packed // (3 * heads)).unbind(2)
        out = package.flash_attn_func(q, k, v)
        return (out[0] if isinstance(out, tuple) else out).flatten(2)

    return run


def _modulated(norm: Callable[[Tensor], Tensor]) -> Function:
    def run(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm(x).to(scale.dtype) * (1 + scale[:, None]) + shift[:, None]

    return run


def _apex(spec: OpSpec) -> Function:
    """NVIDIA's apex; PyPI's package of that name is another one and has no such function."""
    _needs_cuda("apex")
    norm = _load("apex.normalization.fused_layer_norm").fused_layer_norm
    return _modulated(lambda x: norm(x, x.shape[-1:], 1e-6))


def _liger(spec: OpSpec) -> Function:
    _needs_cuda("liger")
    norm = _load("liger_kernel.ops.layer_norm").LigerLayerNormFunction

    def run(x: Tensor) -> Tensor:
        return norm.apply(x, x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1]), 1e-6)

    return _modulated(run)


def _liger_swiglu(spec: OpSpec) -> Function:
    """Liger's SwiGLU, which takes gate and value as tensors of their own."""
    _needs_cuda("liger")
    multiply = _load("liger_kernel.ops.swiglu").LigerSiLUMulFunction

    def run(pre: Tensor, bias: Tensor) -> Tensor:
        return multiply.apply(*(pre + bias).to(pre.dtype).chunk(2, dim=-1))

    return run


def _torch_norm(spec: OpSpec) -> Function:
    """PyTorch's fused layer norm and two elementwise passes, what the reference DiT runs in eager mode."""
    return _modulated(lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6))


def _torch_rms_norm(spec: OpSpec) -> Function:
    return _modulated(lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6))


def _apex_mlp(spec: OpSpec) -> Function:
    """NVIDIA apex's two products with GELU in cuBLASLt's epilogues."""
    _needs_cuda("apex")
    dense = _load("apex.fused_dense.fused_dense").fused_dense_gelu_dense_function

    def run(x: Tensor, fc1: Tensor, bias: Tensor, fc2: Tensor) -> Tensor:
        weights = [weight.to(x.dtype) for weight in (fc1, bias, fc2)]
        return dense(x.flatten(0, 1), *weights, x.new_zeros(len(fc2))).unflatten(0, x.shape[:2])

    return run


def _quack_mlp(spec: OpSpec) -> Function:
    """quack's products with GELU in their epilogues, tuned by itself at the first call."""
    _needs_cuda("quack")
    function = _load("quack.mlp").mlp_func

    def run(x: Tensor, fc1: Tensor, bias: Tensor, fc2: Tensor) -> Tensor:
        weights = fc1.to(x.dtype), fc2.to(x.dtype)
        return function(x, *weights, activation="gelu_tanh_approx", bias1=bias)

    return run


PROVIDERS: dict[str, Callable[[OpSpec], Function]] = {"ours": ours, "eager": eager, "compiled": compiled}

PEERS: dict[str, dict[str, Callable[[OpSpec], Function]]] = {
    "adaln_modulate": {"layer_norm": _torch_norm, "apex": _apex, "liger": _liger},
    "adaln_modulate-rmsnorm": {"rms_norm": _torch_rms_norm},
    "attention": {
        "sdpa-flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "sdpa-efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "flash-attn-2": partial(_flash, "flash_attn"),
        "flash-attn-3": partial(_flash, "flash_attn_interface"),
        "flash-attn-4": partial(_flash, "flash_attn.cute"),
    },
    "mlp": {"apex": _apex_mlp, "quack": _quack_mlp},
    "swiglu": {"liger": _liger_swiglu},
}


def providers_of(name: str) -> dict[str, Callable[[OpSpec], Function]]:
    """Builders by name; calling one may raise Missing."""
    return {**PROVIDERS, **PEERS.get(name, {})}


def _needs_cuda(what: str) -> None:
    if not torch.cuda.is_available():
        raise Missing(f"{what} needs a CUDA device")


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{module} is not installed: {error}") from None
