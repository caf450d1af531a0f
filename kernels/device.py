"""Device code that several kernels share: rows of D columns, cut into a main and a tail part.

A row is D = MAIN + TAIL, two powers of two, so that D = 1152 is 1024 + 128 and not 2048 with 44 % of the lanes
idle; TAIL = 0 where one part suffices. A kernel treats its parts one after the other, which keeps few registers
alive. Grammar: `o_` offsets, `m_` masks. Pointers move to their sample in int64; offsets within a sample are int32,
since 64-bit addresses for each row of each tensor would take the registers that the rows need.
"""

import triton
import triton.language as tl


@triton.jit
def token_rows(pid, T, ROWS: tl.constexpr):
    """Sample index (int64), token offsets (ROWS,) and their mask, of tile `pid` of a (B, T, D) tensor."""
    tiles = tl.cdiv(T, ROWS)
    b = (pid // tiles).to(tl.int64)
    o_t = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    return b, o_t, o_t < T


@triton.jit
def split_tokens(T, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Tokens in one of SPLITS shares of a sample, a multiple of ROWS."""
    return tl.cdiv(tl.cdiv(T, ROWS), SPLITS) * ROWS


@triton.jit
def part(o_t, m_t, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """Offsets (ROWS, SIZE) and mask of columns START .. START + SIZE of tokens `o_t` of a sample (T, D)."""
    o_columns = START + tl.arange(0, SIZE)[None, :]
    mask = m_t[:, None]
    if START + SIZE > D:
        mask = mask & (o_columns < D)
    return o_t[:, None] * D + o_columns, mask


@triton.jit
def load_vector(ptr, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """Columns START .. START + SIZE of one contiguous row of D values, (1, SIZE) in ACC."""
    o_columns = START + tl.arange(0, SIZE)[None, :]
    return tl.load(ptr + o_columns, mask=o_columns < D, other=0.0).to(ACC)


@triton.jit
def store_vector(ptr, value, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """Store (1, SIZE) to columns START .. START + SIZE of one contiguous row of D values."""
    o_columns = START + tl.arange(0, SIZE)[None, :]
    tl.store(ptr + o_columns, value.to(ptr.dtype.element_ty), mask=o_columns < D)


@triton.jit
def row_sum(x):
    """(ROWS, 1) sums over the columns of a tile."""
    return tl.sum(x, axis=1)[:, None]


@triton.jit
def row_sums(x, y):
    """(ROWS,) sums over the columns of two tiles, in one exchange between warps."""
    return tl.split(tl.sum(tl.join(x, y), axis=1))


@triton.jit
def interleave(even, odd):
    """(ROWS,) values of all rows from those of the even and of the odd rows."""
    return tl.reshape(tl.join(even, odd), [2 * even.shape[0]])


@triton.jit
def every_other(x, first):
    """(ROWS / 2, 1) values of the even (first = 0) or odd (1) rows."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
    return tl.where(first == 0, even, odd)[:, None]


@triton.jit
def column_sum(x):
    """(1, SIZE) sums over the rows of a tile."""
    return tl.sum(x, axis=0)[None, :]


@triton.jit
def squared_deviation(x, mean, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """(ROWS, 1) sums of (x - mean)^2 over the columns below D: a second pass over registers, no cancellation."""
    deviation = x - mean
    if START + SIZE > D:
        deviation = tl.where(START + tl.arange(0, SIZE)[None, :] < D, deviation, 0.0)
    return row_sum(deviation * deviation)
