"""Self-attention on the packed projection: out = softmax(q k^T / sqrt(K)) v.      (Vaswani et al. 2017, equation 1)

Shapes    qkv (B, T, 3 * H * K), rows [q; k; v] of (H, K) each, read in place; bias (3 * H * K,), the projection's,
          still to be added, or None; out (B, T, H * K). K a multiple of 8 up to 128. No mask, no dropout.
Backward  d_qkv comes packed as qkv is, d_bias from the same kernels; kept for it: qkv, bias, out and the
          log2 of each row's sum of exponentials, lse (B, H, T).
Traffic   of U = B * T * H * K elements: forward 4 U; backward 7 U to 12 U, as those files say.
Numerics  products of the inputs' dtype with float32 sums (float64 for float64), never TF32, softmax in float32 by
          powers of two; sums in a fixed order, no atomics. NaN and infinities give what softmax in PyTorch gives.
          For b_q, b_k and b_v see attention_tiles.py: b_k's gradient is 0 up to rounding.

On sm_90 and sm_100, up to 256 tokens of 16-bit dtypes in heads of up to 96 run in attention_short.py, all else in
attention_long.py; attention_backends.py chooses between these kernels and those of PyTorch and flash-attn.
"""

from types import ModuleType
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from dit_fast.kernels import reference, tuned
from dit_fast.kernels.attention import dual as attention_dual
from dit_fast.kernels.attention import long as attention_long
from dit_fast.kernels.attention import short as attention_short
from dit_fast.kernels.attention.backends import (
    choose_backend,
    cudnn_attention,
    flash_attention,
    sdpa_attention,
)
from dit_fast.kernels.launch import capability
from dit_fast.kernels.library import Dual, Run, check_tensors, define_op, uses_triton

MAX_HEAD_DIM = 128

_backends: dict[Any, str] = tuned.plan_cache()
"""What `attention` runs, by all that decides it, so that a call costs one lookup."""


def _path(qkv: Tensor, num_heads: int) -> ModuleType:
    """The kernels for this shape, dtype and device."""
    K = qkv.shape[2] // (3 * num_heads)
    short = attention_short.runs_on(capability(qkv), qkv.dtype, qkv.shape[1], K)
    return attention_short if short else attention_long


def _check(qkv: Tensor, num_heads: int, bias: Tensor | None) -> None:
    K = check_packed("attention", qkv, num_heads, bias)
    if not takes_head_dim(K):
        raise ValueError(f"attention: head_dim {K} of qkv is not a multiple of 8 up to {MAX_HEAD_DIM}")


def _attention(qkv: Tensor, num_heads: int, bias: Tensor | None) -> Run:
    return _path(qkv, num_heads).forward(qkv, num_heads, bias)


def _attention_reference(qkv: Tensor, num_heads: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    lse = reference.attention_probabilities(qkv, num_heads, bias)[-1]
    return reference.attention(qkv, num_heads, bias).contiguous(), lse.contiguous()


def _attention_backward(
    dout: Tensor, qkv: Tensor, num_heads: int, bias: Tensor | None, out: Tensor, lse: Tensor
) -> Run:
    return _path(qkv, num_heads).backward(qkv, num_heads, bias)


def _attention_backward_reference(
    dout: Tensor, qkv: Tensor, num_heads: int, bias: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """d_qkv, d_bias; d_bias is empty without a bias."""
    return reference.attention_backward(dout, qkv, num_heads, bias)


def _attention_flops(qkv: tuple[int, ...], *rest: Any, **kw: Any) -> int:
    """Of q k^T and of the values' sums."""
    batch, tokens, packed = qkv
    return 2 * 2 * batch * tokens**2 * (packed // 3)


def _attention_backward_flops(dout: Any, qkv: tuple[int, ...], *rest: Any, **kw: Any) -> int:
    """Five products for two: the scores are recomputed."""
    return _attention_flops(qkv) * 5 // 2


_attention_backward_op = define_op(
    "attention_backward",
    plan=_attention_backward,
    reference_impl=_attention_backward_reference,
    flops=_attention_backward_flops,
)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, num_heads, bias = inputs
    out, lse = output
    ctx.save_for_backward(qkv, bias, out, lse)
    ctx.num_heads = num_heads
    ctx.mark_non_differentiable(lse)


def _attention_autograd(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, bias, out, lse = ctx.saved_tensors
    dqkv, dbias = _attention_backward_op.in_backward(ctx, None, dout, qkv, ctx.num_heads, bias, out, lse)
    return dqkv, None, None if bias is None else dbias


def _attention_dual(qkv: Tensor, num_heads: int, bias: Tensor | None, *_: Tensor | None) -> Run:
    return attention_dual.plan(qkv, num_heads)


def _attention_dual_reference(
    qkv: Tensor, num_heads: int, bias: Tensor | None, qkv_t: Tensor, bias_t: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    out_t = reference.attention_tangent(qkv, num_heads, bias, qkv_t, bias_t)
    return *_attention_reference(qkv, num_heads, bias), out_t.contiguous()


def _attention_dual_flops(qkv: tuple[int, ...], *rest: Any, **kw: Any) -> int:
    """Six products for two: q k^T, q_t k^T, q k_t^T; P v, P_t v, P v_t."""
    return 3 * _attention_flops(qkv)


_attention_op = define_op(
    "attention",
    plan=_attention,
    reference_impl=_attention_reference,
    check=_check,
    backward=_attention_autograd,
    setup_context=_attention_context,
    flops=_attention_flops,
    dual=Dual(_attention_dual_reference, _attention_dual, _attention_dual_flops),
)


def attention(
    qkv: Tensor, num_heads: int, bias: Tensor | None = None, *, backend: str = "auto", kernels: str = "auto"
) -> Tensor:
    """Non-causal self-attention of every token with all tokens of its sample, heads apart, scale 1 / sqrt(K).

    qkv (B, T, 3 * H * K) as a projection to [q; k; v], each (H, K), gives it; float16, bfloat16, float32 or float64,
    rows contiguous; num_heads H; bias (3 * H * K,), to be added to qkv first, or None. Returns (B, T, H * K) in the
    dtype of `qkv`. backend: "auto", "triton" (these kernels), "sdpa" (PyTorch), "cudnn" (PyTorch with cuDNN first) or
    "flash" (a flash-attn package); see `choose_backend`. kernels: "triton" makes "auto" these kernels, "reference" is
    PyTorch whatever the backend. A qkv with a tangent (forward mode) takes these kernels or PyTorch's products.
    Raises ValueError for arguments that do not fit or an unknown value, ImportError where a package is missing.
    """
    if fwAD.unpack_dual(qkv).tangent is not None:
        # Ours alone has a forward-mode derivative.
        K = check_packed("attention", qkv, num_heads, bias)
        fused = uses_triton(kernels, qkv) and takes_head_dim(K)
        return _attention_op(qkv, num_heads, bias)[0] if fused else sdpa_attention(qkv, num_heads, bias)
    if type(qkv) is not Tensor or torch.compiler.is_compiling():
        chosen = _checked_backend(qkv, num_heads, bias, backend, kernels)
    else:
        like = None if bias is None else (bias.shape, bias.dtype, bias.device)
        key = (qkv.shape, qkv.dtype, qkv.device, num_heads, like, backend, kernels)
        chosen = _backends.get(key) or _checked_backend(qkv, num_heads, bias, backend, kernels)
        _backends[key] = chosen
    if chosen == "triton":
        return _attention_op(qkv, num_heads, bias)[0]
    if chosen == "flash":
        return flash_attention(qkv, num_heads, bias)
    return (cudnn_attention if chosen == "cudnn" else sdpa_attention)(qkv, num_heads, bias)


def _checked_backend(qkv: Tensor, num_heads: int, bias: Tensor | None, backend: str, kernels: str) -> str:
    """`attention_backend` for arguments that fit."""
    return attention_backend(qkv, check_packed("attention", qkv, num_heads, bias), backend, kernels)


def takes_head_dim(K: int) -> bool:
    """Whether the Triton kernels take heads of width K."""
    return K % 8 == 0 and K <= MAX_HEAD_DIM


def attention_backend(x: Tensor, K: int, backend: str = "auto", kernels: str = "auto") -> str:
    """Which of "triton", "sdpa", "cudnn" or "flash" `attention` takes for tokens x (B, T, ...) and heads of width K.

    kernels="triton" makes "auto" the Triton kernels where they take K, kernels="reference" makes all PyTorch's.
    """
    forced = uses_triton(kernels, x) and kernels == "triton" and takes_head_dim(K)
    backend = "triton" if backend == "auto" and forced else backend
    choice = choose_backend(backend, x.device, x.dtype, x.shape[1], K)
    return "sdpa" if kernels == "reference" else choice.name


def check_packed(op: str, qkv: Tensor, num_heads: int, bias: Tensor | None) -> int:
    """The head width K; ValueError naming the first argument that does not fit."""
    check_tensors(op, qkv=qkv, bias=bias)
    if qkv.ndim != 3:
        raise ValueError(f"{op}: qkv is {tuple(qkv.shape)}, expected (batch, tokens, 3 * heads * head_dim)")
    packed = qkv.shape[2]
    if num_heads < 1 or packed == 0 or packed % (3 * num_heads):
        raise ValueError(
            f"{op}: num_heads {num_heads} does not divide qkv's {packed} columns into q, k and v"
        )
    K = packed // (3 * num_heads)
    if qkv.shape[1] * packed >= 2**31:
        raise ValueError(
            f"{op}: a sample of {qkv.shape[1]} x {packed} elements of qkv is beyond 32-bit offsets"
        )
    if bias is not None and tuple(bias.shape) != (packed,):
        raise ValueError(f"{op}: bias is {tuple(bias.shape)}, expected {(packed,)}")
    return K
