"""Device code that several kernels share: rows of D columns, cut into a main and a tail part.

A row is D = MAIN + TAIL, two powers of two, so that D = 1152 is 1024 + 128 and not 2048 with 44 % of the lanes
idle; TAIL = 0 where one part suffices. A kernel treats its parts one after the other, which keeps few registers
alive. Grammar: `o_` offsets, `m_` masks. Row offsets are int64 before they are multiplied by a width.
"""

import triton
import triton.language as tl


@triton.jit
def token_rows(pid, T, ROWS: tl.constexpr):
    """Sample index, row offsets (ROWS,) and their mask, of tile `pid` of a (B, T, D) tensor."""
    tiles = tl.cdiv(T, ROWS)
    b = (pid // tiles).to(tl.int64)
    o_t = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    return b, b * T + o_t, o_t < T


@triton.jit
def split_rows(b, split, start, T, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Row offsets (ROWS,) and mask of the tile at `start` of one of SPLITS equal shares of a sample's tokens."""
    o_t = split * split_tokens(T, SPLITS, ROWS) + start + tl.arange(0, ROWS)
    return b * T + o_t, o_t < T


@triton.jit
def split_tokens(T, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Tokens in one share, a multiple of ROWS."""
    return tl.cdiv(tl.cdiv(T, ROWS), SPLITS) * ROWS


@triton.jit
def part(o_rows, m_rows, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """Offsets (ROWS, SIZE) and mask of columns START .. START + SIZE of rows of a contiguous (*, D) tensor."""
    o_columns = START + tl.arange(0, SIZE)[None, :]
    mask = m_rows[:, None]
    if START + SIZE > D:
        mask = mask & (o_columns < D)
    return o_rows[:, None] * D + o_columns, mask


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
    """(ROWS, 1) sums over the columns of two tiles, in one exchange between warps."""
    sum_x, sum_y = tl.split(tl.sum(tl.join(x, y), axis=1))
    return sum_x[:, None], sum_y[:, None]


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
