"""The maths of every operation in plain PyTorch: specification, CPU path and oracle of the tests.

`B` batch, `T` tokens, `D` width, `C` channels, `P` patch. The forward functions are differentiable and work in
the dtype of their inputs; the `_backward` functions are the closed forms that the kernels compute, accumulated in
float32 (float64 for float64 input) and rounded once. Equations: Peebles & Xie 2023, section 3.2 and figure 3.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dit_fast.kernels.adamw_tensors import AdamWSettings, AdamWTensors


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, centred: bool = True
) -> Tensor:
    """norm(x) * (1 + scale) + shift, in the dtype of `scale`.

    norm without affine parameters: a layer norm or, not `centred`, an RMSNorm (Zhang & Sennrich 2019, equation 4).
    """
    y = (
        F.layer_norm(x, x.shape[-1:], eps=eps)
        if centred
        else F.rms_norm(x.to(accumulator(x)), x.shape[-1:], eps=eps)
    )
    return torch.addcmul(shift[:, None], y, 1 + scale[:, None]).to(scale.dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + gate * (branch + bias), in the dtype of `x`."""
    if bias is not None:
        branch = branch + bias
    return torch.addcmul(x, gate[:, None], branch).to(x.dtype)


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    centred: bool = True,
) -> tuple[Tensor, Tensor]:
    """The new residual stream x + gate * (branch + bias) and its modulated norm."""
    x = gated_residual(x, branch, gate, bias)
    return x, adaln_modulate(x, shift, scale, eps, centred)


def gelu(pre: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU(pre + bias), tanh form (Hendrycks & Gimpel 2016, section 2), in the dtype of `pre`."""
    if bias is not None:
        pre, low = pre + bias, pre.dtype
        return F.gelu(pre, approximate="tanh").to(low)
    return F.gelu(pre, approximate="tanh")


def swiglu(pre: Tensor, bias: Tensor | None = None) -> Tensor:
    """SiLU(g) * v of [g; v] = pre + bias (Shazeer 2020, equation 5), in the dtype of `pre`."""
    gate, value = (pre if bias is None else pre + bias).chunk(2, dim=-1)
    return (F.silu(gate) * value).to(pre.dtype)


def mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, activation: str = "gelu"
) -> Tensor:
    """fc2(activation(fc1(x))) without fc2's bias, the weights cast to the dtype of `x`; "gelu" or "swiglu"."""
    act = ACTIVATIONS[activation](F.linear(x, fc1_weight.to(x.dtype), fc1_bias.to(x.dtype)))
    return F.linear(act, fc2_weight.to(x.dtype))


ACTIVATIONS = {"gelu": gelu, "swiglu": swiglu}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 at least; in the dtype of `x`."""
    return (F.rms_norm(x.to(accumulator(x)), x.shape[-1:], eps=eps) * weight).to(x.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Neighboring pairs of x (B, T, H, K) turned (Su et al. 2021, equation 34), in the dtype of x.

    rotation (B or 1, T, K / 2, 2): cosine and sine of each pair's angle.
    """
    cos, sin = rotation[:, :, None].unbind(-1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def qk_norm_rope(
    qkv: Tensor,
    num_heads: int,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    rotation: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """qkv + bias, (B, T, 3 * H * K) read as (3, H, K), queries and keys normalized and turned where given."""
    if bias is not None:
        qkv = qkv + bias.to(qkv.dtype)
    qk, v = qkv.unflatten(2, (3 * num_heads, -1)).split((2 * num_heads, num_heads), dim=2)
    if weight is not None:
        qk = rms_norm(qk, weight.repeat_interleave(num_heads, 0), eps)
    if rotation is not None:
        qk = rotate(qk, rotation.detach())
    return torch.cat([qk, v], dim=2).flatten(2)


def attention(qkv: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v of packed qkv + bias, (B, T, 3 * H * K) read as (3, H, K); returns (B, T, H * K).

    Step by step: on a CPU, PyTorch's fused float32 attention loses NaN in a query.
    """
    if bias is not None:
        qkv = qkv + bias.to(qkv.dtype)
    B, T, packed = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, num_heads, packed // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    out = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return out.transpose(1, 2).reshape(B, T, packed // 3)


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    """Tokens of the P x P patches of `x` (B, C, H, W) through `weight` (D, C, P, P), plus bias and position."""
    tokens = F.conv2d(x.to(weight.dtype), weight, bias, stride=weight.shape[-1])
    # In the convolution's order (B, D, T) the residual stream would keep it, and every pass over it would stride.
    return tokens.flatten(2).transpose(1, 2).contiguous() + pos


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """(B, height * width, P * P * C) -> (B, C, height * P, width * P); a token holds its patch as (P, P, C)."""
    B, _, values = tokens.shape
    tokens = tokens.reshape(B, height, width, patch, patch, values // patch**2)
    return tokens.permute(0, 5, 1, 3, 2, 4).reshape(B, values // patch**2, height * patch, width * patch)


def patchify(images: Tensor, patch: int) -> Tensor:
    """The inverse and the transpose of `unpatchify`: (B, C, H, W) -> (B, T, P * P * C)."""
    B, C, H, W = images.shape
    images = images.reshape(B, C, H // patch, patch, W // patch, patch)
    return images.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // patch) * (W // patch), patch * patch * C)


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64 input, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def moments(x: Tensor, eps: float, centred: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each row of `x`, (B, T), in the accumulator's dtype.

    Not `centred`: zero in place of the mean, and mean(x^2) in that of the variance.
    """
    x = x.to(accumulator(x))
    if centred:
        var, mean = torch.var_mean(x, dim=-1, correction=0)
    else:
        var, mean = x.square().mean(-1), x.new_zeros(x.shape[:-1])
    return mean, torch.rsqrt(var + eps)


def adaln_from_moments(x: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(x - mean) * rstd * (1 + scale) + shift: `adaln_modulate` again, from the moments of its rows."""
    acc = accumulator(x)
    y = (x.to(acc) - mean[..., None]) * rstd[..., None]
    return torch.addcmul(shift.to(acc)[:, None], y, 1 + scale.to(acc)[:, None]).to(scale.dtype)


def adaln_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """d_x, d_shift, d_scale of `adaln_modulate`.

    With h = (x - mean) * rstd and g = dy * (1 + scale): d_x = rstd * (g - mean_D(g) - h * mean_D(g * h)), without
    mean_D(g) where the norm is not `centred`, d_shift = sum_T(dy), d_scale = sum_T(dy * h).
    """
    acc = accumulator(x)
    dy = dy.to(acc)
    h = (x.to(acc) - mean[..., None]) * rstd[..., None]
    g = dy * (1 + scale.to(acc)[:, None])
    from_mean = g.mean(-1, keepdim=True) if centred else 0
    dx = rstd[..., None] * (g - from_mean - h * (g * h).mean(-1, keepdim=True))
    return dx.to(x.dtype), dy.sum(1).to(scale.dtype), (dy * h).sum(1).to(scale.dtype)


def gated_residual_backward(
    dx: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """d_branch = gate * dx, d_gate = sum_T(dx * (branch + bias)), d_bias = sum_BT(d_branch) (empty without bias)."""
    acc = accumulator(dx)
    dx = dx.to(acc)
    biased = branch.to(acc) if bias is None else branch.to(acc) + bias.to(acc)
    dbranch = dx * gate.to(acc)[:, None]
    dbias = gate.new_empty(0) if bias is None else dbranch.sum((0, 1)).to(bias.dtype)
    return dbranch.to(branch.dtype), (dx * biased).sum(1).to(gate.dtype), dbias


def gated_residual_adaln_backward(
    dout: Tensor,
    dy: Tensor,
    out: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: Tensor | None,
    centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d_x, d_branch, d_gate, d_shift, d_scale, d_bias from the gradients of both outputs (`out` is the new stream)."""
    acc = accumulator(out)
    dnorm, dshift, dscale = adaln_modulate_backward(dy.to(acc), out.to(acc), scale, mean, rstd, centred)
    dx = dout.to(acc) + dnorm
    dbranch, dgate, dbias = gated_residual_backward(dx, branch, gate, bias)
    return dx.to(out.dtype), dbranch, dgate, dshift, dscale, dbias


def sum_rows(x: Tensor) -> Tensor:
    """The sum (F,) of all rows of x (..., F)."""
    return x.reshape(-1, x.shape[-1]).sum(0)


def gelu_backward(dact: Tensor, pre: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """d_pre, the activation, and d_bias in the dtype of `bias` (of `pre` without one).

    With v = pre + bias, u = sqrt(2 / pi) (v + 0.044715 v^3) and s = sigmoid(2 u): act = v s and
    d_pre = dact (s + 2 v s (1 - s) sqrt(2 / pi) (1 + 0.134145 v^2)).
    """
    acc, like = accumulator(pre), pre if bias is None else bias
    v = pre.to(acc) if bias is None else pre.to(acc) + bias.to(acc)
    root = (2 / torch.pi) ** 0.5
    gate = torch.sigmoid(2 * root * v * (1 + 0.044715 * v * v))
    dpre = dact.to(acc) * (gate + v * gate * (1 - gate) * (2 * root) * (1 + 0.134145 * v * v))
    return dpre.to(pre.dtype), (v * gate).to(pre.dtype), sum_rows(dpre).to(like.dtype)


def swiglu_backward(dact: Tensor, pre: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """d_pre, the activation, and d_bias in the dtype of `bias` (of `pre` without one).

    With [g; v] = pre + bias and s = sigmoid(g): act = g s v, d_g = dact v (s + g s (1 - s)) and d_v = dact g s.
    """
    acc, like = accumulator(pre), pre if bias is None else bias
    gate, value = (pre.to(acc) if bias is None else pre.to(acc) + bias.to(acc)).chunk(2, dim=-1)
    s, dact = torch.sigmoid(gate), dact.to(acc)
    dpre = torch.cat([dact * value * (s + gate * s * (1 - s)), dact * gate * s], dim=-1)
    return dpre.to(pre.dtype), (gate * s * value).to(pre.dtype), sum_rows(dpre).to(like.dtype)


ACTIVATION_BACKWARDS = {"gelu": gelu_backward, "swiglu": swiglu_backward}


def attention_probabilities(
    qkv: Tensor, num_heads: int, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, H, T, K), softmax (B, H, T, T) and log2(sum(exp(scores))) (B, H, T), in the accumulator's dtype."""
    acc = accumulator(qkv)
    qkv = qkv.to(acc) if bias is None else qkv.to(acc) + bias.to(acc)
    B, T, packed = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, num_heads, packed // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return q, k, v, scores.softmax(-1), scores.logsumexp(-1) * math.log2(math.e)


def attention_backward(
    dout: Tensor, qkv: Tensor, num_heads: int, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """d_qkv, packed as `qkv`, and d_bias (empty without a bias) of `attention`.

    With P the softmax: d_v = P^T d_out, d_P = d_out v^T, d_S = P * (d_P - sum(P * d_P)), d_q = d_S k / sqrt(K),
    d_k = d_S^T q / sqrt(K).
    """
    q, k, v, p, _ = attention_probabilities(qkv, num_heads, bias)
    B, H, T, K = q.shape
    dout = dout.to(q.dtype).reshape(B, T, H, K).transpose(1, 2)
    dp = dout @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * K**-0.5
    dqkv = torch.stack((ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout))
    dqkv = dqkv.permute(1, 3, 0, 2, 4).reshape(qkv.shape)
    dbias = qkv.new_empty(0) if bias is None else dqkv.sum((0, 1)).to(bias.dtype)
    return dqkv.to(qkv.dtype), dbias


def qk_norm_rope_backward(
    dout: Tensor,
    qkv: Tensor | None,
    num_heads: int,
    bias: Tensor | None,
    weight: Tensor | None,
    rotation: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_qkv, d_bias, d_weight of `qk_norm_rope`, empty for what is None; qkv is read with a weight.

    With h = x * rstd and d = R^T d_out, pairs turned back: d_weight = sum_BTH(d * h), g = d * weight,
    d_x = rstd * (g - h * mean_K(g * h)), d_bias = sum_BT(d_x).
    """
    acc, dweight = accumulator(dout), dout.new_empty(0)
    sizes = (2 * num_heads, num_heads)
    dqk, dv = dout.to(acc).unflatten(2, (3 * num_heads, -1)).split(sizes, dim=2)
    if rotation is not None:
        cos, sin = rotation.to(acc).unbind(-1)
        dqk = rotate(dqk, torch.stack([cos, -sin], dim=-1))
    if weight is not None and qkv is not None:
        x = qkv.to(acc) if bias is None else qkv.to(acc) + bias.to(acc)
        x = x.unflatten(2, (3 * num_heads, -1))[:, :, : sizes[0]]
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        h, g = x * rstd, dqk * weight.to(acc).repeat_interleave(num_heads, 0)
        dweight = (dqk * h).sum((0, 1)).unflatten(0, (2, num_heads)).sum(1).to(weight.dtype)
        dqk = rstd * (g - h * (g * h).mean(-1, keepdim=True))
    dqkv = torch.cat([dqk, dv], dim=2).flatten(2)
    dbias = dout.new_empty(0) if bias is None else dqkv.sum((0, 1)).to(bias.dtype)
    return dqkv.to(dout.dtype), dbias, dweight


def patch_embed_backward(dtokens: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d_x, d_weight, d_bias of `patch_embed` (d_pos is dtokens summed over the batch)."""
    acc, P = accumulator(dtokens), weight.shape[-1]
    B, C, H, W = x.shape
    dtokens = dtokens.to(acc)
    patches = (
        x.to(acc).reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)
    )
    dpatches = (dtokens @ weight.to(acc).flatten(1)).reshape(B, H // P, W // P, C, P, P)
    dx = dpatches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    dweight = torch.einsum("btd,btk->dk", dtokens, patches).reshape(weight.shape)
    return dx.to(x.dtype), dweight.to(weight.dtype), dtokens.sum((0, 1)).to(weight.dtype)


def total(*terms: Tensor | None) -> Tensor:
    """The sum of the terms that are not None."""
    first, *rest = [term for term in terms if term is not None]
    return sum(rest, first)


def times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a * b, None for None."""
    return None if a is None or b is None else a * b


def norm_tangent(x: Tensor, x_t: Tensor, mean: Tensor, rstd: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """h = (x - mean) * rstd and its tangent rstd * (c - h * mean_D(h * c)), c = x_t - mean_D(x_t); see `moments`."""
    x_t, mean, rstd = x_t.to(accumulator(x)), mean[..., None], rstd[..., None]
    h = (x.to(accumulator(x)) - mean) * rstd
    if centred:
        x_t = x_t - x_t.mean(-1, keepdim=True)
    return h, rstd * (x_t - h * (h * x_t).mean(-1, keepdim=True))


def modulated_tangent(
    x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool, x_t: Tensor, shift_t: Tensor | None,
    scale_t: Tensor | None,
) -> Tensor:  # fmt: skip
    """The tangent of `adaln_modulate`: h_t * (1 + scale) + h * scale_t + shift_t, in the dtype of `scale`."""
    acc = accumulator(x)
    h, h_t = norm_tangent(x, x_t, mean, rstd, centred)
    scale_t, shift_t = (None if v is None else v.to(acc)[:, None] for v in (scale_t, shift_t))
    return total(h_t * (1 + scale.to(acc)[:, None]), times(h, scale_t), shift_t).to(scale.dtype)


def gated_residual_tangent(
    branch: Tensor, gate: Tensor, bias: Tensor | None, x_t: Tensor, branch_t: Tensor, gate_t: Tensor | None,
    bias_t: Tensor | None,
) -> Tensor:  # fmt: skip
    """x_t + gate * (branch_t + bias_t) + gate_t * (branch + bias), in the dtype of `x_t`."""
    acc = accumulator(x_t)
    biased, biased_t = total(branch.to(acc), bias), total(branch_t.to(acc), bias_t)
    turned = times(None if gate_t is None else gate_t.to(acc)[:, None], biased)
    return total(x_t.to(acc), gate.to(acc)[:, None] * biased_t, turned).to(x_t.dtype)


def gelu_tangent(pre: Tensor, bias: Tensor | None, pre_t: Tensor, bias_t: Tensor | None) -> Tensor:
    """The slope of `gelu` at pre + bias times pre_t + bias_t."""
    acc = accumulator(pre)
    return gelu_backward(total(pre_t.to(acc), bias_t), total(pre.to(acc), bias), None)[0].to(pre.dtype)


def swiglu_tangent(pre: Tensor, bias: Tensor | None, pre_t: Tensor, bias_t: Tensor | None) -> Tensor:
    """(s + g s (1 - s)) g_t v + g s v_t with [g; v] = pre + bias, [g_t; v_t] = pre_t + bias_t and s = sigmoid(g)."""
    acc = accumulator(pre)
    gate, value = total(pre.to(acc), bias).chunk(2, dim=-1)
    gate_t, value_t = total(pre_t.to(acc), bias_t).chunk(2, dim=-1)
    s = torch.sigmoid(gate)
    return ((s + gate * s * (1 - s)) * gate_t * value + gate * s * value_t).to(pre.dtype)


ACTIVATION_TANGENTS = {"gelu": gelu_tangent, "swiglu": swiglu_tangent}


def linear_tangent(
    x: Tensor, weight: Tensor, x_t: Tensor, weight_t: Tensor | None, bias_t: Tensor | None = None
) -> Tensor:
    """The tangent of x weight^T + bias."""
    tangent = F.linear(x_t, weight, bias_t)
    return tangent if weight_t is None else tangent + F.linear(x, weight_t)


def attention_tangent(
    qkv: Tensor, num_heads: int, bias: Tensor | None, qkv_t: Tensor, bias_t: Tensor | None
) -> Tensor:
    """The tangent of `attention`, P_t v + P v_t.

    S_t = (q_t k^T + q k_t^T) / sqrt(K), P_t = P (S_t - sum(P S_t)).
    """
    q, k, v, p, _ = attention_probabilities(qkv, num_heads, bias)
    B, H, T, K = q.shape
    packed = total(qkv_t.to(q.dtype), bias_t).reshape(B, T, 3, H, K)
    q_t, k_t, v_t = packed.permute(2, 0, 3, 1, 4).unbind(0)
    s_t = (q_t @ k.transpose(-1, -2) + q @ k_t.transpose(-1, -2)) * K**-0.5
    p_t = p * (s_t - (p * s_t).sum(-1, keepdim=True))
    return (p_t @ v + p @ v_t).transpose(1, 2).reshape(B, T, H * K).to(qkv.dtype)


def qk_norm_rope_tangent(
    qkv: Tensor, num_heads: int, bias: Tensor | None, weight: Tensor | None, rotation: Tensor | None, eps: float,
    qkv_t: Tensor, bias_t: Tensor | None, weight_t: Tensor | None,
) -> Tensor:  # fmt: skip
    """The tangent of `qk_norm_rope`: as that of an RMSNorm, turned; the rotation is a constant."""
    acc = accumulator(qkv)
    heads, sizes = (3 * num_heads, -1), (2 * num_heads, num_heads)
    qk_t, v_t = total(qkv_t.to(acc), bias_t).unflatten(2, heads).split(sizes, dim=2)
    if weight is not None:
        x = total(qkv.to(acc), bias).unflatten(2, heads)[:, :, : sizes[0]]
        h, h_t = norm_tangent(x, qk_t, *moments(x, eps, False), centred=False)
        weight, weight_t = (
            None if w is None else w.to(acc).repeat_interleave(num_heads, 0) for w in (weight, weight_t)
        )
        qk_t = total(times(h_t, weight), times(h, weight_t))
    if rotation is not None:
        qk_t = rotate(qk_t, rotation.to(acc))
    return torch.cat([qk_t, v_t], dim=2).flatten(2).to(qkv.dtype)


def patch_embed_tangent(
    x: Tensor, weight: Tensor, x_t: Tensor, weight_t: Tensor | None, bias_t: Tensor | None,
    pos_t: Tensor | None,
) -> Tensor:  # fmt: skip
    """The tangent of `patch_embed`, in the dtype of the product of image and weight, or a wider one of `pos_t`."""
    stride = weight.shape[-1]
    tokens = F.conv2d(x_t.to(weight.dtype), weight, bias_t, stride=stride)
    if weight_t is not None:
        tokens = tokens + F.conv2d(x.to(weight.dtype), weight_t, stride=stride)
    return total(tokens.flatten(2).transpose(1, 2).contiguous(), pos_t)


def grad_square_sum(grads: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all gradients, (1,), from their norms as `clip_grad_norm_` takes them."""
    norms = torch._foreach_norm(list(grads), 2, dtype=accumulator(grads[0]))
    return torch.stack(norms).double().square().sum()[None]


def adamw_ema(
    tensors: "AdamWTensors",
    grads: Sequence[Tensor],
    lr: Tensor,
    settings: "AdamWSettings",
    square_sum: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """AdamW on the clipped gradients, in PyTorch's own fused form, then average and copy, all in place."""
    p, steps, beta = tensors.params[0], tensors.steps, settings.betas
    clip = None
    if square_sum is not None and settings.max_norm is not None:
        clip = (settings.max_norm / (square_sum.double().sum().sqrt() + 1e-6)).clamp(max=1.0).to(p.dtype)
    done = None if found_inf is None else (found_inf == 0).float().reshape(())
    torch._foreach_add_(steps, 1) if done is None else torch._foreach_add_(steps, done)
    step = functools.partial(
        torch._fused_adamw_,
        lr=lr.reshape(()), beta1=beta[0], beta2=beta[1], weight_decay=settings.weight_decay, eps=settings.eps,
        amsgrad=False, maximize=False, found_inf=None if done is None else 1 - done,
    )  # fmt: skip
    # On a CPU the factor can be looked at without waiting, and most steps need none.
    if clip is None or (p.is_cpu and clip == 1):
        step(
            tensors.params,
            [grad.to(p.dtype) for grad in grads],
            tensors.exp_avgs,
            tensors.exp_avg_sqs,
            [],
            steps,
        )
    else:
        # One at a time, so that the clipped gradients take the memory of one.
        states = zip(tensors.params, grads, tensors.exp_avgs, tensors.exp_avg_sqs, steps, strict=True)
        for weight, grad, exp_avg, exp_avg_sq, count in states:
            step([weight], [grad.to(p.dtype) * clip], [exp_avg], [exp_avg_sq], [], [count])
    if tensors.averages is not None:
        t = torch.stack(steps).double()
        warmup = (1 + t) / (10 + t) if settings.ema_warmup else torch.ones_like(t)
        weights = (1 - warmup.clamp(max=settings.ema_decay)) * (1 if done is None else done)
        torch._foreach_lerp_(tensors.averages, tensors.params, list(weights.to(p.dtype).unbind()))
    if tensors.copies is not None:
        torch._foreach_copy_(tensors.copies, tensors.params)
