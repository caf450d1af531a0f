"""Patches to tokens and back: `patch_embed` (patchify, projection, bias, position) and `unpatchify`.
                                                                  (Peebles & Xie 2023, section 3.2 and figure 4)

Shapes    x (B, C, H, W), weight (D, C, P, P), bias (D,), pos (1, T, D) -> tokens (B, T, D), T = H * W / P^2;
          unpatchify (B, T, P * P * C) -> (B, C, H, W).
Backward  with X (B * T, C * P * P) the patches: d_weight = d_tokens^T X, d_bias = sum(d_tokens),
          d_x = d_tokens weight, put back at its pixels; unpatchify's is the inverse permutation.
Tangents  tokens_t = X_t weight^T + X weight_t^T + bias_t + pos_t in one pass with tokens; of images, the permutation.
Traffic   patch_embed writes B * T * D and reads little: the product has only C * P * P terms. Its backward reads
          d_tokens once for d_weight and d_bias, once more for d_x when the image needs a gradient.
Numerics  products and sums in float32 (float64 for float64), never TF32, one rounding at the store; tokens have
          the promoted dtype of weight and pos. d_weight and d_bias come from partial sums in a fixed order.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference, tuned
from dit_fast.kernels.launch import (
    Products,
    TileLaunch,
    accumulator,
    as_bias,
    capability,
    cdiv,
    next_power_of_2,
    prepare,
)
from dit_fast.kernels.library import Dual, check_tensors, define_op, uses_triton


@triton.jit
def pixel_offsets(o_n, o_k, T, C, W, P: tl.constexpr):
    """Offsets (tokens, patch elements) into a contiguous (B, C, H, W) image; element k is (channel, row, column)."""
    columns = W // P
    b, t = (o_n // T).to(tl.int64), o_n % T
    row = (t // columns * P)[:, None] + (o_k % (P * P) // P)[None, :]
    column = (t % columns * P)[:, None] + (o_k % P)[None, :]
    height = T // columns * P
    return ((b * C)[:, None] + (o_k // (P * P))[None, :]) * height * W + row * W + column


@triton.jit
def _patch_embed_fwd_kernel(
    # pointers
    x_ptr,  # (B, C, height, W) image
    weight_ptr,  # (D, K) projection
    bias_ptr,  # (D,)
    pos_ptr,  # (T, D) positions
    tokens_ptr,  # (B, T, D) output
    # sizes
    N,  # tokens of all samples
    T,  # tokens of a sample
    C,  # channels
    W,  # pixels of an image's row
    # meta
    D: tl.constexpr,  # columns of a row
    K: tl.constexpr,  # elements of a patch, C * P * P
    P: tl.constexpr,  # pixels of a patch's side
    BLOCK_N: tl.constexpr,  # tokens of a tile
    BLOCK_D: tl.constexpr,  # columns of a tile
    BLOCK_K: tl.constexpr,  # elements of a patch in a tile
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, o_d < D
    dtype = weight_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for start in tl.static_range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        x = tl.load(x_ptr + pixel_offsets(o_n, o_k, T, C, W, P), mask=m_n[:, None] & m_k[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + o_d[None, :] * K + o_k[:, None], mask=m_k[:, None] & m_d[None, :], other=0.0
        )
        total = tl.dot(x.to(dtype), weight, total, input_precision="ieee", out_dtype=ACC)
    total += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
    mask = m_n[:, None] & m_d[None, :]
    total += tl.load(pos_ptr + (o_n % T)[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(tokens_ptr + o_n[:, None] * D + o_d[None, :], total.to(tokens_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _patch_embed_dual_kernel(
    # pointers
    x_ptr,  # (B, C, height, W) image
    x_t_ptr,  # (B, C, height, W) its tangent
    weight_ptr,  # (D, K) projection
    weight_t_ptr,  # (D, K), or None
    bias_ptr,  # (D,)
    bias_t_ptr,  # (D,), or None
    pos_ptr,  # (T, D) positions
    pos_t_ptr,  # (T, D), or None
    tokens_ptr,  # (B, T, D) output
    tokens_t_ptr,  # (B, T, D) its tangent
    # sizes
    N,  # tokens of all samples
    T,  # tokens of a sample
    C,  # channels
    W,  # pixels of an image's row
    # meta
    D: tl.constexpr,  # columns of a row
    K: tl.constexpr,  # elements of a patch, C * P * P
    P: tl.constexpr,  # pixels of a patch's side
    BLOCK_N: tl.constexpr,  # tokens of a tile
    BLOCK_D: tl.constexpr,  # columns of a tile
    BLOCK_K: tl.constexpr,  # elements of a patch in a tile
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, o_d < D
    dtype = weight_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    total_t = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for start in tl.static_range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        o_x, m_x = pixel_offsets(o_n, o_k, T, C, W, P), m_n[:, None] & m_k[None, :]
        o_weight, m_weight = o_d[None, :] * K + o_k[:, None], m_k[:, None] & m_d[None, :]
        x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(dtype)
        x_t = tl.load(x_t_ptr + o_x, mask=m_x, other=0.0).to(dtype)
        weight = tl.load(weight_ptr + o_weight, mask=m_weight, other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee", out_dtype=ACC)
        total_t = tl.dot(x_t, weight, total_t, input_precision="ieee", out_dtype=ACC)
        if weight_t_ptr is not None:
            weight_t = tl.load(weight_t_ptr + o_weight, mask=m_weight, other=0.0)
            total_t = tl.dot(x, weight_t, total_t, input_precision="ieee", out_dtype=ACC)
    o_pos, o_token = (o_n % T)[:, None] * D + o_d[None, :], o_n[:, None] * D + o_d[None, :]
    mask = m_n[:, None] & m_d[None, :]
    total += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
    total += tl.load(pos_ptr + o_pos, mask=mask, other=0.0).to(ACC)
    if bias_t_ptr is not None:
        total_t += tl.load(bias_t_ptr + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
    if pos_t_ptr is not None:
        total_t += tl.load(pos_t_ptr + o_pos, mask=mask, other=0.0).to(ACC)
    tl.store(tokens_ptr + o_token, total.to(tokens_ptr.dtype.element_ty), mask=mask)
    tl.store(tokens_t_ptr + o_token, total_t.to(tokens_t_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _patch_embed_bwd_weight_kernel(
    # pointers
    dtokens_ptr,  # (B, T, D) gradient of the tokens
    x_ptr,  # (B, C, height, W) image
    dweight_ptr,  # (SPLITS, D, K) in ACC: terms of d_weight
    dbias_ptr,  # (SPLITS, D) in ACC: terms of d_bias
    # sizes
    N,  # tokens of all samples
    T,  # tokens of a sample
    C,  # channels
    W,  # pixels of an image's row
    # meta
    SPLITS: tl.constexpr,  # programs that share all tokens
    D: tl.constexpr,  # columns of a row
    K: tl.constexpr,  # elements of a patch, C * P * P
    P: tl.constexpr,  # pixels of a patch's side
    BLOCK_N: tl.constexpr,  # tokens of a tile
    BLOCK_D: tl.constexpr,  # columns of a tile
    BLOCK_K: tl.constexpr,  # elements of a patch in a tile
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    split = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_d, m_k = o_d < D, o_k < K
    dtype = dtokens_ptr.dtype.element_ty
    dweight = tl.zeros([BLOCK_D, BLOCK_K], ACC)
    dbias = tl.zeros([BLOCK_D], ACC)
    share = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS) * BLOCK_N
    for start in range(0, share, BLOCK_N):
        o_n = split * share + start + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        dtokens = tl.load(
            dtokens_ptr + o_n[:, None] * D + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0
        )
        x = tl.load(x_ptr + pixel_offsets(o_n, o_k, T, C, W, P), mask=m_n[:, None] & m_k[None, :], other=0.0)
        dweight = tl.dot(tl.trans(dtokens), x.to(dtype), dweight, input_precision="ieee", out_dtype=ACC)
        dbias += tl.sum(dtokens.to(ACC), axis=0)
    o_weight = (split * D + o_d)[:, None] * K + o_k[None, :]
    tl.store(dweight_ptr + o_weight, dweight, mask=m_d[:, None] & m_k[None, :])
    if tl.program_id(2) == 0:
        tl.store(dbias_ptr + split * D + o_d, dbias, mask=m_d)


@triton.jit
def _patch_embed_bwd_image_kernel(
    # pointers
    dtokens_ptr,  # (B, T, D) gradient of the tokens
    weight_ptr,  # (D, K) projection
    dx_ptr,  # (B, C, height, W) gradient of the image
    # sizes
    N,  # tokens of all samples
    T,  # tokens of a sample
    C,  # channels
    W,  # pixels of an image's row
    # meta
    D: tl.constexpr,  # columns of a row
    K: tl.constexpr,  # elements of a patch, C * P * P
    P: tl.constexpr,  # pixels of a patch's side
    BLOCK_N: tl.constexpr,  # tokens of a tile
    BLOCK_D: tl.constexpr,  # columns of a tile
    BLOCK_K: tl.constexpr,  # elements of a patch in a tile
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n, m_k = o_n < N, o_k < K
    dtype = dtokens_ptr.dtype.element_ty
    dx = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        dtokens = tl.load(
            dtokens_ptr + o_n[:, None] * D + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr + o_d[:, None] * K + o_k[None, :], mask=m_d[:, None] & m_k[None, :], other=0.0
        )
        dx = tl.dot(dtokens, weight.to(dtype), dx, input_precision="ieee", out_dtype=ACC)
    mask = m_n[:, None] & m_k[None, :]
    tl.store(dx_ptr + pixel_offsets(o_n, o_k, T, C, W, P), dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _permute_kernel(
    # pointers
    source_ptr,  # tokens (B, T, P * P * C), or images (B, C, height, W)
    target_ptr,  # the other one
    # sizes
    total,  # elements
    T,  # tokens of a sample
    C,  # channels
    W,  # pixels of an image's row
    # meta
    P: tl.constexpr,  # pixels of a patch's side
    TO_IMAGE: tl.constexpr,  # whether the source are tokens
    BLOCK: tl.constexpr,  # elements that a program writes
):
    """Tokens (B, T, P * P * C) to images (B, C, H, W), or back; each program writes BLOCK contiguous values."""
    o_target = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = W // P
    height = T // columns * P
    if TO_IMAGE:
        w, h = o_target % W, o_target // W % height
        b, c = o_target // (W * height) // C, o_target // (W * height) % C
        t = h // P * columns + w // P
        o_source = ((b * T + t) * P * P + h % P * P + w % P) * C + c
    else:
        c, p = o_target % C, o_target // C % (P * P)
        b, t = o_target // (C * P * P) // T, o_target // (C * P * P) % T
        o_source = ((b * C + c) * height + t // columns * P + p // P) * W + t % columns * P + p % P
    mask = o_target < total
    tl.store(target_ptr + o_target, tl.load(source_ptr + o_source, mask=mask), mask=mask)


@tuned.per_launch
def tile_launch(
    kernel: Any, dtype: torch.dtype, capability: int, width: int, terms: int, itemsize: int
) -> TileLaunch:
    """The tuned table's tiles, else 64 wide for tensor cores; 32 for float32, whose exact products run without them.

    Images of `dtype`, products of `terms` terms of `itemsize` bytes, `width` columns.
    """
    size = 64 if itemsize < 4 else 32
    heuristic = TileLaunch(
        block_n=size,
        block_d=min(size, max(16, next_power_of_2(width))),
        block_k=min(size, max(16, next_power_of_2(terms))),
        num_warps=4,
    )
    key = f"D={width} K={terms} {str(dtype).removeprefix('torch.')},{8 * itemsize} bits"
    return tuned.config(kernel, key, heuristic, capability)


def _embed(x: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    B, C, H, W = x.shape
    D, _, P, _ = weight.shape
    x, weight, bias, pos = x.contiguous(), weight.contiguous(), bias.contiguous(), pos.contiguous()
    T, K = (H // P) * (W // P), C * P * P
    tokens = x.new_empty(B, T, D, dtype=torch.promote_types(weight.dtype, pos.dtype))
    cfg = tile_launch(_patch_embed_fwd_kernel, x.dtype, capability(x), D, K, weight.itemsize)
    prepare(
        _patch_embed_fwd_kernel,
        (cdiv(B * T, cfg.block_n), cdiv(D, cfg.block_d)), on=x, num_warps=cfg.num_warps,
        products=Products(2 * B * T * D * K, weight.dtype),
        x_ptr=x, weight_ptr=weight, bias_ptr=bias, pos_ptr=pos, tokens_ptr=tokens,
        N=B * T, T=T, C=C, W=W,
        D=D, K=K, P=P, **cfg.meta, ACC=accumulator(weight),
    )()  # fmt: skip
    return tokens


def _embed_dual(
    x: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, x_t: Tensor, weight_t: Tensor | None,
    bias_t: Tensor | None, pos_t: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, C, H, W = x.shape
    D, _, P, _ = weight.shape
    x, x_t, weight, bias, pos = (part.contiguous() for part in (x, x_t, weight, bias, pos))
    T, K = (H // P) * (W // P), C * P * P
    tokens = x.new_empty(B, T, D, dtype=torch.promote_types(weight.dtype, pos.dtype))
    tokens_t = torch.empty_like(tokens)
    cfg = tile_launch(_patch_embed_dual_kernel, x.dtype, capability(x), D, K, weight.itemsize)
    prepare(
        _patch_embed_dual_kernel,
        (cdiv(B * T, cfg.block_n), cdiv(D, cfg.block_d)), on=x, num_warps=cfg.num_warps,
        products=Products((4 if weight_t is None else 6) * B * T * D * K, weight.dtype),
        x_ptr=x, x_t_ptr=x_t, weight_ptr=weight, weight_t_ptr=as_bias(weight_t), bias_ptr=bias,
        bias_t_ptr=as_bias(bias_t), pos_ptr=pos, pos_t_ptr=as_bias(pos_t), tokens_ptr=tokens, tokens_t_ptr=tokens_t,
        N=B * T, T=T, C=C, W=W,
        D=D, K=K, P=P, **cfg.meta, ACC=accumulator(weight),
    )()  # fmt: skip
    return tokens, tokens_t


def _embed_dual_reference(
    x: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, x_t: Tensor, weight_t: Tensor | None,
    bias_t: Tensor | None, pos_t: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens = reference.patch_embed(x, weight, bias, pos)
    return tokens, reference.patch_embed_tangent(x, weight, x_t, weight_t, bias_t, pos_t).to(tokens.dtype)


def _embed_backward(dtokens: Tensor, x: Tensor, weight: Tensor, image: bool) -> tuple[Tensor, Tensor, Tensor]:
    """d_x (empty unless `image`), d_weight, d_bias."""
    B, C, _, W = x.shape
    D, _, P, _ = weight.shape
    dtokens, x, weight = dtokens.contiguous(), x.contiguous(), weight.contiguous()
    T, K = dtokens.shape[1], C * P * P
    cfg, acc = (
        tile_launch(_patch_embed_bwd_weight_kernel, x.dtype, capability(x), D, K, dtokens.itemsize),
        reference.accumulator(dtokens),
    )
    sizes: dict[str, Any] = {"N": B * T, "T": T, "C": C, "W": W}
    meta = {
        "D": D,
        "K": K,
        "P": P,
        "ACC": accumulator(dtokens),
        "products": Products(2 * B * T * D * K, dtokens.dtype),
    }
    # Enough programs for a GPU from width alone would read the tokens again for each block of terms.
    splits = min(32, max(1, cdiv(B * T, 64)))
    dweight, dbias = x.new_empty(splits, D, K, dtype=acc), x.new_empty(splits, D, dtype=acc)
    prepare(
        _patch_embed_bwd_weight_kernel,
        (splits, cdiv(D, cfg.block_d), cdiv(K, cfg.block_k)), on=x, num_warps=cfg.num_warps,
        dtokens_ptr=dtokens, x_ptr=x, dweight_ptr=dweight, dbias_ptr=dbias, **sizes, SPLITS=splits, **cfg.meta, **meta,
    )()  # fmt: skip
    dx = torch.empty_like(x) if image else x.new_empty(0)
    if image:
        cfg = tile_launch(_patch_embed_bwd_image_kernel, x.dtype, capability(x), D, K, dtokens.itemsize)
        prepare(
            _patch_embed_bwd_image_kernel,
            (cdiv(B * T, cfg.block_n), cdiv(K, cfg.block_k)), on=x, num_warps=cfg.num_warps,
            dtokens_ptr=dtokens, weight_ptr=weight, dx_ptr=dx, **sizes, **cfg.meta, **meta,
        )()  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype).view(weight.shape), dbias.sum(0).to(weight.dtype)


def _embed_backward_reference(
    dtokens: Tensor, x: Tensor, weight: Tensor, image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = reference.patch_embed_backward(dtokens, x, weight)
    return dx.contiguous() if image else x.new_empty(0), dweight.contiguous(), dbias


def _embed_flops(x: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **kw: Any) -> int:
    """Each element of the image is multiplied by a column of the projection."""
    return 2 * math.prod(x) * weight[0]


def _embed_dual_flops(x: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **kw: Any) -> int:
    """Of values and of tangents, those of the weight aside."""
    return 2 * _embed_flops(x, weight)


def _embed_backward_flops(
    dtokens: Any, x: tuple[int, ...], weight: tuple[int, ...], image: bool, **kw: Any
) -> int:
    return (1 + image) * _embed_flops(x, weight)


_embed_backward_op = define_op(
    "patch_embed_backward",
    triton_impl=_embed_backward,
    reference_impl=_embed_backward_reference,
    flops=_embed_backward_flops,
)


def _embed_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, pos = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype, ctx.pos_dtype = bias.dtype, pos.dtype


def _embed_autograd(ctx: Any, dtokens: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    image, _, _, position, *_ = ctx.needs_input_grad
    dx, dweight, dbias = _embed_backward_op.in_backward(ctx, image, dtokens, x, weight, image)
    dpos = dtokens.sum(0, keepdim=True).to(ctx.pos_dtype) if position else None
    return dx if image else None, dweight, dbias.to(ctx.bias_dtype), dpos


_embed_op = define_op(
    "patch_embed",
    triton_impl=_embed,
    reference_impl=reference.patch_embed,
    backward=_embed_autograd,
    setup_context=_embed_context,
    flops=_embed_flops,
    dual=Dual(_embed_dual_reference, lambda *_: _embed_dual, _embed_dual_flops),
)


def _permute(source: Tensor, target: Tensor, patch: int, to_image: bool) -> Tensor:
    _, C, H, W = (target if to_image else source).shape
    prepare(
        _permute_kernel, (cdiv(target.numel(), 1024),), on=source, num_warps=4,
        source_ptr=source.contiguous(), target_ptr=target,
        total=target.numel(), T=(H // patch) * (W // patch), C=C, W=W,
        P=patch, TO_IMAGE=to_image, BLOCK=1024,
    )()  # fmt: skip
    return target


def _unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    channels = tokens.shape[2] // (patch * patch)
    images = tokens.new_empty(tokens.shape[0], channels, height * patch, width * patch)
    return _permute(tokens, images, patch, to_image=True)


def _unpatchify_reference(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    return reference.unpatchify(tokens, patch, height, width).clone()


def _unpatchify_dual(
    tokens: Tensor, patch: int, height: int, width: int, tokens_t: Tensor
) -> tuple[Tensor, Tensor]:
    return _unpatchify(tokens, patch, height, width), _unpatchify(tokens_t, patch, height, width)


def _unpatchify_dual_reference(
    tokens: Tensor, patch: int, height: int, width: int, tokens_t: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        _unpatchify_reference(tokens, patch, height, width),
        _unpatchify_reference(tokens_t, patch, height, width),
    )


def _patchify(images: Tensor, patch: int) -> Tensor:
    B, C, H, W = images.shape
    tokens = images.new_empty(B, (H // patch) * (W // patch), patch * patch * C)
    return _permute(images, tokens, patch, to_image=False)


def _patchify_reference(images: Tensor, patch: int) -> Tensor:
    return reference.patchify(images, patch).clone()


_patchify_op = define_op(
    "unpatchify_backward",
    triton_impl=_patchify,
    reference_impl=_patchify_reference,
)


def _unpatchify_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.patch = inputs[1]


def _unpatchify_autograd(ctx: Any, dimages: Tensor) -> tuple[Tensor | None, ...]:
    return _patchify_op(dimages, ctx.patch), None, None, None


_unpatchify_op = define_op(
    "unpatchify",
    triton_impl=_unpatchify,
    reference_impl=_unpatchify_reference,
    backward=_unpatchify_autograd,
    setup_context=_unpatchify_context,
    dual=Dual(_unpatchify_dual_reference, lambda *_: _unpatchify_dual),
)


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, *, kernels: str = "auto") -> Tensor:
    """Tokens of the P x P patches of an image: projection plus bias plus position.

    x (B, C, H, W), weight (D, C, P, P), bias (D,), pos (1, T, D) -> (B, T, D) in the promoted dtype of weight and
    pos. `kernels`: "auto", "triton" or "reference". Raises ValueError for shapes that do not fit.
    """
    if not uses_triton(kernels, x):
        return reference.patch_embed(x, weight, bias, pos)
    check_tensors("patch_embed", x=x, weight=weight, bias=bias, pos=pos)
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"patch_embed: weight is {tuple(weight.shape)}, expected (width, channels, P, P)")
    D, C, P, _ = weight.shape
    if x.ndim != 4 or x.shape[1] != C or x.shape[2] % P or x.shape[3] % P:
        raise ValueError(
            f"patch_embed: x is {tuple(x.shape)}, expected (batch, {C}, height, width), multiples of {P}"
        )
    tokens = (x.shape[2] // P) * (x.shape[3] // P)
    if tuple(pos.shape) != (1, tokens, D) or tuple(bias.shape) != (D,):
        raise ValueError(
            f"patch_embed: pos is {tuple(pos.shape)}, bias {tuple(bias.shape)}, expected {(1, tokens, D)} and {(D,)}"
        )
    return _embed_op(x, weight, bias, pos)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int, *, kernels: str = "auto") -> Tensor:
    """(B, height * width, P * P * C) tokens to (B, C, height * P, width * P) images.

    `height`, `width`: the grid in patches. `kernels` as in `patch_embed`. Raises ValueError for shapes that do not fit.
    """
    if not uses_triton(kernels, tokens):
        return reference.unpatchify(tokens, patch, height, width)
    check_tensors("unpatchify", tokens=tokens)
    if tokens.ndim != 3 or tokens.shape[1] != height * width or tokens.shape[2] % (patch * patch):
        raise ValueError(
            f"unpatchify: tokens are {tuple(tokens.shape)}, expected (batch, {height * width}, "
            f"a multiple of {patch * patch})"
        )
    return _unpatchify_op(tokens, patch, height, width)
