"""The operations of adaln.py on values and tangents: one kernel, of which each takes a part.

          out = x + gate * (branch + bias), out_t = x_t + gate * (branch_t + bias_t) + gate_t * (branch + bias)
          h = (out - mean) * rstd, h_t = rstd * (c - h * mean_D(h * c)), c = out_t - mean_D(out_t)
          y = h * (1 + scale) + shift, y_t = h_t * (1 + scale) + h * scale_t + shift_t
          (forward-mode derivatives; `_t` is a tangent. h_t is linear in out_t by the matrix that the backward pass
          applies to a gradient, which is symmetric.)

Shapes    as in adaln.py; a tangent has those of its value. Tangents of vectors may be None: they are 0.
Traffic   in token tensors: adaln_modulate 4, gated_residual 6, gated_residual_adaln 8, twice those of values alone.
Numerics  as in adaln.py; y, y_t and the moments are made from out and out_t as they are stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.device import (
    deviation,
    first_token,
    load_part,
    load_vector,
    main_part,
    moments,
    of_rows,
    row_mean,
    store_part,
    store_rows,
    tail_part,
)
from dit_fast.kernels.launch import accumulator, as_bias, as_vectors, cdiv, prepare, tuned_rows
from dit_fast.kernels.library import Run


@triton.jit
def _stream_part(
    x_ptr, x_t_ptr, branch_ptr, branch_t_ptr, gate_ptr, gate_t_ptr, bias_ptr, bias_t_ptr, out_ptr, out_t_ptr, left,
    P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One part of the residual stream and of its tangent, with the branch added and stored where there is one."""
    x, x_t = load_part(x_ptr, left, P, ACC), load_part(x_t_ptr, left, P, ACC)
    if branch_ptr is not None:
        branch, branch_t = load_part(branch_ptr, left, P, ACC), load_part(branch_t_ptr, left, P, ACC)
        if bias_ptr is not None:
            branch += load_vector(bias_ptr, P, ACC)
        if bias_t_ptr is not None:
            branch_t += load_vector(bias_t_ptr, P, ACC)
        gate = load_vector(gate_ptr, P, ACC)
        x, x_t = x + gate * branch, x_t + gate * branch_t
        if gate_t_ptr is not None:
            x_t += load_vector(gate_t_ptr, P, ACC) * branch
        store_part(out_ptr, x, left, P)
        store_part(out_t_ptr, x_t, left, P)
        x, x_t = x.to(out_ptr.dtype.element_ty).to(ACC), x_t.to(out_t_ptr.dtype.element_ty).to(ACC)
    return x, x_t


@triton.jit
def _along(x, x_t, mean, mean_t, rstd, P: tl.constexpr):
    """h * (x_t - mean_t) of one part, 0 beyond the last column."""
    return deviation(x, mean, P) * of_rows(rstd, P) * (x_t - of_rows(mean_t, P))


@triton.jit
def _store_modulated(
    x, x_t, mean, rstd, mean_t, mean_ht, shift_ptr, scale_ptr, shift_t_ptr, scale_t_ptr, y_ptr, y_t_ptr, left,
    P: tl.constexpr,
):  # fmt: skip
    """Store y and y_t of one part."""
    rstd = of_rows(rstd, P)
    h = (x - of_rows(mean, P)) * rstd
    h_t = (x_t - of_rows(mean_t, P) - h * of_rows(mean_ht, P)) * rstd
    scale = 1 + load_vector(scale_ptr, P, x.dtype)
    y_t = h_t * scale
    if scale_t_ptr is not None:
        y_t += h * load_vector(scale_t_ptr, P, x.dtype)
    if shift_t_ptr is not None:
        y_t += load_vector(shift_t_ptr, P, x.dtype)
    store_part(y_ptr, h * scale + load_vector(shift_ptr, P, x.dtype), left, P)
    store_part(y_t_ptr, y_t, left, P)


@triton.jit
def _adaln_dual_kernel(
    # pointers
    x_ptr,  # (B, T, D) residual stream
    x_t_ptr,  # (B, T, D) its tangent
    branch_ptr,  # (B, T, D) output of attention or of the MLP, or None: nothing is added
    branch_t_ptr,  # (B, T, D)
    gate_ptr,  # (B, D)
    gate_t_ptr,  # (B, D), or None
    bias_ptr,  # (D,) of the branch, or None
    bias_t_ptr,  # (D,), or None
    out_ptr,  # (B, T, D) new residual stream, dtype of x; None without a branch
    out_t_ptr,  # (B, T, D)
    shift_ptr,  # (B, D)
    shift_t_ptr,  # (B, D), or None
    scale_ptr,  # (B, D)
    scale_t_ptr,  # (B, D), or None
    y_ptr,  # (B, T, D) modulated norm, dtype of scale, or None: no norm
    y_t_ptr,  # (B, T, D)
    mean_ptr,  # (B, T) in ACC, of out
    rstd_ptr,  # (B, T) in ACC: 1 / deviation of out
    # sizes, strides
    T,  # tokens of a sample
    stride_gate,  # elements between the gates of two samples
    stride_gate_t,  # the same of the tangents
    stride_shift,  # elements between the shifts of two samples
    stride_shift_t,  # the same of the tangents
    stride_scale,  # elements between the scales of two samples
    stride_scale_t,  # the same of the tangents
    # meta
    EPS: tl.constexpr,  # added to the variance
    CENTRED: tl.constexpr,  # whether the mean is subtracted: a layer norm, else an RMSNorm
    D: tl.constexpr,  # columns of a row
    ROWS: tl.constexpr,  # rows of a tile
    WARPS: tl.constexpr,  # num_warps, which share the columns of a row
    EVEN: tl.constexpr,  # whether no tile reaches beyond the last token, so that no row is masked
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    MAIN: tl.constexpr = main_part(D, ROWS, WARPS, EVEN)
    TAIL: tl.constexpr = tail_part(D, ROWS, WARPS, EVEN)
    b, start = first_token(tl.program_id(0), T, ROWS)
    left = T - start
    first = (b * T + start) * D
    x_ptr += first
    x_t_ptr += first
    if branch_ptr is not None:
        branch_ptr += first
        branch_t_ptr += first
        out_ptr += first
        out_t_ptr += first
        gate_ptr += b * stride_gate
        if gate_t_ptr is not None:
            gate_t_ptr += b * stride_gate_t
    main, main_t = _stream_part(
        x_ptr, x_t_ptr, branch_ptr, branch_t_ptr, gate_ptr, gate_t_ptr, bias_ptr, bias_t_ptr, out_ptr, out_t_ptr, left,
        MAIN, ACC,
    )  # fmt: skip
    tail, tail_t = main, main_t
    if TAIL.size > 0:
        tail, tail_t = _stream_part(
            x_ptr, x_t_ptr, branch_ptr, branch_t_ptr, gate_ptr, gate_t_ptr, bias_ptr, bias_t_ptr, out_ptr, out_t_ptr,
            left, TAIL, ACC,
        )  # fmt: skip
    if y_ptr is not None:
        y_ptr += first
        y_t_ptr += first
        shift_ptr += b * stride_shift
        scale_ptr += b * stride_scale
        if shift_t_ptr is not None:
            shift_t_ptr += b * stride_shift_t
        if scale_t_ptr is not None:
            scale_t_ptr += b * stride_scale_t
        mean, rstd = moments(main, tail, MAIN, TAIL, EPS, CENTRED)
        mean_t = tl.full([ROWS], 0.0, ACC)
        if CENTRED:
            mean_t = row_mean(main_t, tail_t, MAIN, TAIL)
        along = _along(main, main_t, mean, mean_t, rstd, MAIN)
        tail_along = along
        if TAIL.size > 0:
            tail_along = _along(tail, tail_t, mean, mean_t, rstd, TAIL)
        # Of deviations, not of x_t: the terms of a row with a large mean would cancel.
        mean_ht = row_mean(along, tail_along, MAIN, TAIL)
        _store_modulated(
            main, main_t, mean, rstd, mean_t, mean_ht, shift_ptr, scale_ptr, shift_t_ptr, scale_t_ptr, y_ptr, y_t_ptr,
            left, MAIN,
        )  # fmt: skip
        if TAIL.size > 0:
            _store_modulated(
                tail, tail_t, mean, rstd, mean_t, mean_ht, shift_ptr, scale_ptr, shift_t_ptr, scale_t_ptr, y_ptr,
                y_t_ptr, left, TAIL,
            )  # fmt: skip
        store_rows(mean_ptr + b * T + start, mean, left, MAIN)
        store_rows(rstd_ptr + b * T + start, rstd, left, MAIN)


_VECTORS = ("gate", "gate_t", "shift", "shift_t", "scale", "scale_t")
_POINTERS = tuple(name for name in _adaln_dual_kernel.arg_names if name.endswith("_ptr"))


def _plan(x: Tensor, *dtypes: torch.dtype, eps: float = 0.0, centred: bool = False) -> Run:
    """run(tokens, vectors) launches on the pointers `tokens`, contiguous, and `vectors`, (B, D) or None, by name."""
    B, T, _ = x.shape
    cfg = tuned_rows(_adaln_dual_kernel, x, *dtypes, tensors=2)
    start = prepare(
        _adaln_dual_kernel, (B * cdiv(T, cfg.rows),), on=x, num_warps=cfg.num_warps,
        T=T, EPS=eps, CENTRED=centred, **cfg.meta, ACC=accumulator(x),
    )  # fmt: skip
    nothing = dict.fromkeys(_POINTERS)

    def run(tokens: dict[str, Tensor | None], vectors: dict[str, Tensor | None]) -> None:
        rows = {name: None if value is None else as_vectors(value) for name, value in vectors.items()}
        strides = {name: 0 if value is None else value.stride(0) for name, value in rows.items()}
        start(
            **nothing | {f"{name}_ptr": value for name, value in (tokens | rows).items()},
            **{f"stride_{name}": strides.get(name, 0) for name in _VECTORS},
        )  # fmt: skip

    return run


def plan_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, centred: bool, *_: Any) -> Run:
    """adaln_modulate: run(x, shift, scale, eps, centred, x_t, shift_t, scale_t) -> y, mean, rstd, y_t."""
    start, dtype = _plan(x, scale.dtype, eps=eps, centred=centred), scale.dtype

    def run(
        x: Tensor, shift: Tensor, scale: Tensor, eps: float, centred: bool, x_t: Tensor, shift_t: Tensor | None,
        scale_t: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x, y = x.contiguous(), torch.empty(x.shape, dtype=dtype, device=x.device)
        y_t, (mean, rstd) = torch.empty_like(y), moments_like(x)
        start(
            {"x": x, "x_t": x_t.contiguous(), "y": y, "y_t": y_t, "mean": mean, "rstd": rstd},
            {"shift": shift, "shift_t": shift_t, "scale": scale, "scale_t": scale_t},
        )
        return y, mean, rstd, y_t

    return run


def moments_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the mean and 1 / deviation of the rows of x (B, T, D) go."""
    mean = x.new_empty(x.shape[:-1], dtype=reference.accumulator(x))
    return mean, torch.empty_like(mean)


def plan_residual(x: Tensor, branch: Tensor, *_: Any) -> Run:
    """gated_residual: run(x, branch, gate, bias, x_t, branch_t, gate_t, bias_t) -> out, out_t."""
    start = _plan(x, branch.dtype)

    def run(
        x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None, x_t: Tensor, branch_t: Tensor,
        gate_t: Tensor | None, bias_t: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        out_t = torch.empty_like(out)
        start(_residual(x, branch, bias, out, x_t, branch_t, bias_t, out_t), {"gate": gate, "gate_t": gate_t})
        return out, out_t

    return run


def _residual(
    x: Tensor, branch: Tensor, bias: Tensor | None, out: Tensor, x_t: Tensor, branch_t: Tensor,
    bias_t: Tensor | None, out_t: Tensor,
) -> dict[str, Tensor | None]:  # fmt: skip
    """The pointers of the residual stream by name."""
    return {
        "x": x.contiguous(), "branch": branch.contiguous(), "bias": as_bias(bias), "out": out,
        "x_t": x_t.contiguous(), "branch_t": branch_t.contiguous(), "bias_t": as_bias(bias_t), "out_t": out_t,
    }  # fmt: skip


def plan_residual_norm(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, eps: float,
    centred: bool, *_: Any,
) -> Run:  # fmt: skip
    """gated_residual_adaln: run(its arguments, x_t, branch_t, gate_t, shift_t, scale_t, bias_t) -> (out, y, mean, rstd,
    out_t, y_t).
    """
    start, dtype = _plan(x, branch.dtype, scale.dtype, eps=eps, centred=centred), scale.dtype

    def run(
        x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, eps: float,
        centred: bool, x_t: Tensor, branch_t: Tensor, gate_t: Tensor | None, shift_t: Tensor | None,
        scale_t: Tensor | None, bias_t: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        out_t, y = torch.empty_like(out), torch.empty_like(out, dtype=dtype)
        y_t, (mean, rstd) = torch.empty_like(y), moments_like(out)
        start(
            _residual(x, branch, bias, out, x_t, branch_t, bias_t, out_t)
            | {"y": y, "y_t": y_t, "mean": mean, "rstd": rstd},
            {
                "gate": gate, "gate_t": gate_t, "shift": shift, "shift_t": shift_t, "scale": scale,
                "scale_t": scale_t,
            },
        )  # fmt: skip
        return out, y, mean, rstd, out_t, y_t

    return run
