"""AdamW, moving average and low-precision copy of all parameters in one pass.         (Loshchilov & Hutter 2019)

Update    g' = clip * g, m <- m + (1 - b1) (g' - m), v <- b2 v + (1 - b2) g'^2,
          p <- (1 - lr * weight_decay) p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)       (algorithm 2)
          ema <- ema + (1 - d) (p - ema), copy <- p rounded,
          clip = min(1, max_norm / (||g|| + 1e-6)) over all gradients (Pascanu et al. 2013, algorithm 1).
Tensors   any number, of any sizes (0 as well), by a table of their addresses: p, m, v float32 or float64, g also
          in half precision, ema in the dtype of p, copy in half precision. lr and t are read on the device.
Launches  sum of squares (if clipped), one scalar kernel, the update: 2 or 3, whatever the number of tensors.
Traffic   with float32 gradients 28 bytes per parameter, 36 with ema, 38 with the copy; the sum of squares reads the
          gradients once more.
Numerics  float32 (float64 for float64), correctly rounded root and quotient, bias corrections and norm in float64;
          an element's result does not depend on where it stands, so shards give the bits of the whole.

Not registered with torch.library: nothing differentiates or traces an optimizer step, and the dispatcher would
handle every tensor of the model at each step, which costs the host more than the three launches.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.adamw_tensors import AdamWSettings, AdamWTensors, Gradients
from dit_fast.kernels.launch import accumulator, cdiv, launch, recording
from dit_fast.kernels.library import uses_triton

DTYPES = {
    torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip

# Columns of a row of the table, 64 bytes, and of the scalars of a tensor.
P, M, V, EMA, COPY, STEP, NUMEL, FIRST = (tl.constexpr(column) for column in range(8))
STEP_SIZE, ROOT, DECAY, CLIP, EMA_WEIGHT, SKIP = (tl.constexpr(column) for column in range(6))
COLUMNS = tl.constexpr(8)


@triton.jit
def address(table_ptr, row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """A pointer of the table."""
    return tl.load(table_ptr + row * COLUMNS + COLUMN).to(tl.pointer_type(DTYPE))


@triton.jit
def is_wide(bits, elements, BLOCK: tl.constexpr):
    """Whether a whole block is left and every address, or-ed into `bits`, is a multiple of 16 bytes."""
    return (bits % 16 == 0) & (elements >= BLOCK)


@triton.jit
def root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def quotient(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def update(
    p_ptr, g_ptr, m_ptr, v_ptr, ema_ptr, copy_ptr, scalars_ptr, offsets, mask,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, HAS_EMA: tl.constexpr, HAS_COPY: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One block of one tensor; mask None means that all of it is there."""
    g = tl.load(g_ptr + offsets, mask=mask).to(ACC) * tl.load(scalars_ptr + CLIP)
    m = tl.load(m_ptr + offsets, mask=mask)
    m += (1 - BETA1) * (g - m)
    tl.store(m_ptr + offsets, m, mask=mask)
    v = tl.load(v_ptr + offsets, mask=mask) * BETA2 + (1 - BETA2) * g * g
    tl.store(v_ptr + offsets, v, mask=mask)
    p = tl.load(p_ptr + offsets, mask=mask) * tl.load(scalars_ptr + DECAY)
    scale = quotient(root(v), tl.load(scalars_ptr + ROOT)) + EPS
    p -= tl.load(scalars_ptr + STEP_SIZE) * quotient(m, scale)
    tl.store(p_ptr + offsets, p, mask=mask)
    if HAS_EMA:
        ema = tl.load(ema_ptr + offsets, mask=mask)
        tl.store(ema_ptr + offsets, ema + tl.load(scalars_ptr + EMA_WEIGHT) * (p - ema), mask=mask)
    if HAS_COPY:
        tl.store(copy_ptr + offsets, p.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _square_sum_kernel(
    # pointers
    table_ptr,  # (tensors, COLUMNS) int64: addresses of each tensor's states, its size and its first block
    grads_ptr,  # (tensors,) int64: addresses of gradients
    blocks_ptr,  # (blocks,) int32: the table's row of each block
    sums_ptr,  # partial sums of squares of the gradients, in ACC
    # sizes
    BLOCKS,  # blocks of all tensors
    # meta
    BLOCK: tl.constexpr,  # elements of a block
    G_DTYPE: tl.constexpr,  # dtype of the gradients
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    offsets = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], ACC)
    for index in range(tl.program_id(0), BLOCKS, tl.num_programs(0)):
        row = tl.load(blocks_ptr + index).to(tl.int64)
        start = (index - tl.load(table_ptr + row * COLUMNS + FIRST)) * BLOCK
        elements = tl.load(table_ptr + row * COLUMNS + NUMEL) - start
        bits = tl.load(grads_ptr + row)
        g_ptr = bits.to(tl.pointer_type(G_DTYPE))
        if is_wide(bits, elements, BLOCK):
            g = tl.load(tl.multiple_of(g_ptr + start, 16) + offsets).to(ACC)
        else:
            g = tl.load(g_ptr + start + offsets, mask=offsets < elements, other=0.0).to(ACC)
        squares += g * g
    tl.store(sums_ptr + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit
def _adamw_scalars_kernel(
    # pointers
    table_ptr,  # (tensors, COLUMNS) int64: addresses of each tensor's states, its size and its first block
    sums_ptr,  # partial sums of squares of the gradients, in ACC
    lr_ptr,  # learning rate, one element
    found_inf_ptr,  # one element, not 0: change nothing; or None
    scalars_ptr,  # (tensors, 8): what is the same for all elements of a tensor
    # sizes
    TENSORS,  # rows of the table
    SUMS,  # partial sums, 0 without clipping
    # meta
    LOG_BETA1: tl.constexpr,  # log2 of beta1
    LOG_BETA2: tl.constexpr,  # log2 of beta2
    WEIGHT_DECAY: tl.constexpr,  # decoupled, times the learning rate
    EMA_DECAY: tl.constexpr,  # factor of the average
    EMA_WARMUP: tl.constexpr,  # whether the average begins faster
    MAX_NORM: tl.constexpr,  # norm to clip to, or None
    BLOCK: tl.constexpr,  # elements of a block
):
    """Advance the step of every tensor, and derive from it what the update needs; BLOCK tensors a program."""
    o_block = tl.arange(0, BLOCK)
    clip = tl.full([], 1.0, tl.float64)
    if sums_ptr is not None:
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, SUMS, BLOCK):
            total += tl.load(sums_ptr + start + o_block, mask=start + o_block < SUMS, other=0.0).to(
                tl.float64
            )
        clip = MAX_NORM / (tl.sqrt(tl.sum(total, axis=0)) + 1e-6)
        # Not tl.minimum, which would turn a clip factor that is NaN into 1.
        clip = tl.where(clip > 1.0, 1.0, clip)
    skip = tl.full([], 0.0, tl.float64)
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr).to(tl.float64)

    rows = tl.program_id(0).to(tl.int64) * BLOCK + o_block
    mask = rows < TENSORS
    step_ptr = tl.load(table_ptr + rows * COLUMNS + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=mask, other=0.0) + tl.where(skip != 0, 0.0, 1.0).to(tl.float32)
    tl.store(step_ptr, step, mask=mask)
    t = step.to(tl.float64)
    lr = tl.load(lr_ptr).to(tl.float64)
    decay = tl.full([BLOCK], EMA_DECAY, tl.float64)
    if EMA_WARMUP:
        decay = tl.minimum(decay, (1 + t) / (10 + t))
    scalars_ptr += rows * COLUMNS
    dtype = scalars_ptr.dtype.element_ty
    tl.store(scalars_ptr + STEP_SIZE, (lr / (1 - tl.exp2(t * LOG_BETA1))).to(dtype), mask=mask)
    tl.store(scalars_ptr + ROOT, tl.sqrt(1 - tl.exp2(t * LOG_BETA2)).to(dtype), mask=mask)
    tl.store(scalars_ptr + DECAY, tl.zeros([BLOCK], dtype) + (1 - lr * WEIGHT_DECAY).to(dtype), mask=mask)
    tl.store(scalars_ptr + CLIP, tl.zeros([BLOCK], dtype) + clip.to(dtype), mask=mask)
    tl.store(scalars_ptr + EMA_WEIGHT, (1 - decay).to(dtype), mask=mask)
    tl.store(scalars_ptr + SKIP, tl.zeros([BLOCK], dtype) + skip.to(dtype), mask=mask)


@triton.jit
def _adamw_ema_kernel(
    # pointers
    table_ptr,  # (tensors, COLUMNS) int64: addresses of each tensor's states, its size and its first block
    grads_ptr,  # (tensors,) int64: addresses of gradients
    blocks_ptr,  # (blocks,) int32: the table's row of each block
    scalars_ptr,  # (tensors, 8): what is the same for all elements of a tensor
    # meta
    BETA1: tl.constexpr,  # decay of the first moment
    BETA2: tl.constexpr,  # decay of the second moment
    EPS: tl.constexpr,  # added to the root of the second moment
    HAS_EMA: tl.constexpr,  # whether there are averages
    HAS_COPY: tl.constexpr,  # whether there are copies
    G_DTYPE: tl.constexpr,  # dtype of the gradients
    COPY_DTYPE: tl.constexpr,  # dtype of the copies
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
    BLOCK: tl.constexpr,  # elements of a block
    PART: tl.constexpr,  # elements at a time in blocks that are not aligned or not full
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(blocks_ptr + index).to(tl.int64)
    scalars_ptr += row * COLUMNS
    if tl.load(scalars_ptr + SKIP) == 0:
        start = (index - tl.load(table_ptr + row * COLUMNS + FIRST)) * BLOCK
        elements = tl.load(table_ptr + row * COLUMNS + NUMEL) - start
        p_ptr = address(table_ptr, row, P, ACC)
        m_ptr = address(table_ptr, row, M, ACC)
        v_ptr = address(table_ptr, row, V, ACC)
        ema_ptr = address(table_ptr, row, EMA, ACC)
        copy_ptr = address(table_ptr, row, COPY, COPY_DTYPE)
        bits = tl.load(grads_ptr + row)
        g_ptr = bits.to(tl.pointer_type(G_DTYPE))
        for column in tl.static_range(5):
            bits |= tl.load(table_ptr + row * COLUMNS + column)
        offsets = tl.arange(0, BLOCK)
        # The hint marks the sum it is given, so each branch adds for itself, and only one promises alignment.
        if is_wide(bits, elements, BLOCK):
            update(
                tl.multiple_of(p_ptr + start, 16), tl.multiple_of(g_ptr + start, 16),
                tl.multiple_of(m_ptr + start, 16), tl.multiple_of(v_ptr + start, 16),
                tl.multiple_of(ema_ptr + start, 16), tl.multiple_of(copy_ptr + start, 16),
                scalars_ptr, offsets, None, BETA1, BETA2, EPS, HAS_EMA, HAS_COPY, ACC,
            )  # fmt: skip
        else:
            # One element a thread at a time, so that this branch takes no more registers than the other.
            o_part = tl.arange(0, PART)
            for done in range(0, tl.minimum(elements, BLOCK), PART):
                base = start + done
                update(
                    p_ptr + base, g_ptr + base, m_ptr + base, v_ptr + base, ema_ptr + base, copy_ptr + base,
                    scalars_ptr, o_part, o_part < elements - done, BETA1, BETA2, EPS, HAS_EMA, HAS_COPY, ACC,
                )  # fmt: skip


def runs_kernel(kernels: str, on: Tensor) -> bool:
    """Whether the Triton kernel runs: as for registered operations, a CPU has it only in the interpreter."""
    return uses_triton(kernels, on) and (on.is_cuda or recording() or triton.knobs.runtime.interpret)


def grad_square_sum(
    tensors: AdamWTensors, grads: Sequence[Tensor] | Gradients, *, kernels: str = "auto"
) -> Tensor:
    """Partial sums of squares of all gradients, (n,) in float32 or float64; their sum is the squared norm.

    The sums of several groups are concatenated, and those of a model's shards added over ranks, element by element
    (n does not depend on the number of elements), before `adamw_ema` takes them. Deterministic.
    """
    grads = tensors.accept(grads).tensors
    p = tensors.params[0]
    if not runs_kernel(kernels, p):
        return reference.grad_square_sum(grads)
    tensors.point_to(grads)
    sums = torch.empty(tensors.config.norm_programs, dtype=p.dtype, device=p.device)
    launch(
        _square_sum_kernel, (tensors.config.norm_programs,), on=p, num_warps=tensors.config.num_warps,
        table_ptr=tensors.table, grads_ptr=tensors.grads, blocks_ptr=tensors.blocks, sums_ptr=sums,
        BLOCKS=tensors.blocks.numel(),
        BLOCK=tensors.config.block, G_DTYPE=DTYPES[grads[0].dtype], ACC=accumulator(p),
    )  # fmt: skip
    return sums


def adamw_ema(
    tensors: AdamWTensors,
    grads: Sequence[Tensor] | Gradients,
    lr: Tensor,
    settings: AdamWSettings,
    *,
    square_sum: Tensor | None = None,
    found_inf: Tensor | None = None,
    kernels: str = "auto",
) -> None:
    """One AdamW step on every tensor, in place, with its average and its copy; no host synchronisation.

    grads: one for each parameter, of one floating dtype, left as they are; lr: one element on the device, which a
    CUDA graph reads anew; square_sum: partial sums of `grad_square_sum`, needed if `settings.max_norm` is set;
    found_inf: one element on the device, if not zero nothing changes, steps included. Raises ValueError.
    """
    grads = tensors.accept(grads).tensors
    p = tensors.params[0]
    if (square_sum is None) != (settings.max_norm is None):
        raise ValueError("adamw_ema: square_sum and settings.max_norm are given together or not at all")
    for name, scalar in {"lr": lr, "found_inf": found_inf}.items():
        if scalar is not None and (scalar.numel() != 1 or scalar.device != p.device):
            raise ValueError(
                f"adamw_ema: {name} is {tuple(scalar.shape)} on {scalar.device}, expected one element on {p.device}"
            )
    if not runs_kernel(kernels, p):
        reference.adamw_ema(tensors, grads, lr, settings, square_sum, found_inf)
        return
    tensors.point_to(grads)
    beta1, beta2 = settings.betas
    launch(
        _adamw_scalars_kernel, (cdiv(len(grads), 256),), on=p, num_warps=4,
        table_ptr=tensors.table, sums_ptr=square_sum, lr_ptr=lr, found_inf_ptr=found_inf, scalars_ptr=tensors.scalars,
        TENSORS=len(grads), SUMS=0 if square_sum is None else square_sum.numel(),
        LOG_BETA1=math.log2(max(beta1, 1e-300)), LOG_BETA2=math.log2(max(beta2, 1e-300)),
        WEIGHT_DECAY=settings.weight_decay, EMA_DECAY=settings.ema_decay, EMA_WARMUP=settings.ema_warmup,
        MAX_NORM=settings.max_norm, BLOCK=256,
    )  # fmt: skip
    launch(
        _adamw_ema_kernel, (tensors.blocks.numel(),), on=p, num_warps=tensors.config.num_warps,
        table_ptr=tensors.table, grads_ptr=tensors.grads, blocks_ptr=tensors.blocks, scalars_ptr=tensors.scalars,
        BETA1=beta1, BETA2=beta2, EPS=settings.eps,
        HAS_EMA=tensors.averages is not None, HAS_COPY=tensors.copies is not None,
        G_DTYPE=DTYPES[grads[0].dtype], COPY_DTYPE=DTYPES[(tensors.copies or grads)[0].dtype],
        ACC=accumulator(p), BLOCK=tensors.config.block, PART=32 * tensors.config.num_warps,
    )  # fmt: skip
    # Autograd then refuses a backward pass through values that are gone, as after any in-place operation.
    torch.autograd.graph.increment_version(tensors.params)
