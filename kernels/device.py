"""Device code that several kernels share: rows of D columns, and how a program holds a tile of them.

How a tile lies on warps. Each warp owns D / WARPS neighboring columns of every row of the tile, as a main and a tail
part, two powers of two: 1152 columns on 4 warps are 4 x (256 + 32), no lane is idle and every access has 128 bits.
A part is a tensor (A, WARPS, L, SIZE), row a * L + l. In memory it is the matrix (A * WARPS * L, SIZE), whose
contiguous columns Triton gives to lanes first and then, from the lowest bit of the row on, lanes, warps and registers.
So the shape says who has what: SIZE fills the lanes of a warp, together with L rows where it is narrower than one
access of the warp, and A is left to the registers of a thread. (Of more axes the order of those that are not
contiguous is a choice of Triton's that differs between versions: 3.6 takes the first axis where 3.7 takes the last.)
Hence

- a column belongs to one thread, or to L lanes of one warp: a sum over tokens stays in registers up to the end;
- a sum over the columns of a row is one exchange between lanes and then between warps, of which a single warp has
  none. `row_lanes` brings each part to (ROWS, WARPS * 32), what each lane has of each row, for both parts to be summed
  at once; `of_rows` brings a value of each row back. Neither moves anything between threads.

Pointers move to their sample in int64; offsets within a sample are int32, since 64-bit addresses for each row of
each tensor would take the registers that the rows need. Grammar: `o_` offsets, `m_` masks; MAIN, TAIL, P parts.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Part(NamedTuple):
    """Columns `start` to `start` + `size` of the `own` columns of each warp, in a tile of `rows` rows.

    The rows have `width` columns. `even`: no tile reaches beyond the last token.
    """

    rows: int
    warps: int
    width: int
    even: bool
    own: int
    start: int
    size: int

    @property
    def lane_rows(self) -> int:
        """L, the neighboring rows that lie on the lanes of one warp."""
        return max(1, self.access // self.size)

    @property
    def steps(self) -> int:
        """A, the rows that lie in the registers of a thread."""
        return self.rows // self.lane_rows

    @property
    def vector(self) -> int:
        """Neighboring columns of a thread: 128 bits of 16-bit elements."""
        return 8

    @property
    def access(self) -> int:
        """Columns of a warp's 32 threads."""
        return 256

    @property
    def exact(self) -> bool:
        """Whether no warp owns columns beyond the last."""
        return self.warps * self.own == self.width


# The default cache modifier of a load. Triton 3.6 takes no string for the default of a constexpr argument.
PLAIN = tl.constexpr("")


@triton.constexpr_function
def parts_of(width, rows, warps):
    """Sizes of the main and the tail part of a warp's columns, the tail's 0 where one part suffices.

    Neither is too narrow for `rows` rows of it to fill the lanes of a warp.
    """
    own, least = -(-width // warps), 256 // min(rows, 32)
    main = max(1 << (own.bit_length() - 1), least)
    tail = max(triton.next_power_of_2(own - main), least) if own > main else 0
    return (2 * main, 0) if tail == main else (main, tail)


@triton.constexpr_function
def main_part(D, ROWS, WARPS, EVEN):
    """The first part, which there always is."""
    main, tail = parts_of(D, ROWS, WARPS)
    return Part(ROWS, WARPS, D, EVEN, main + tail, 0, main)


@triton.constexpr_function
def tail_part(D, ROWS, WARPS, EVEN):
    """The part behind the main one, of size 0 where there is none."""
    main, tail = parts_of(D, ROWS, WARPS)
    return Part(ROWS, WARPS, D, EVEN, main + tail, main, tail)


@triton.constexpr_function
def halves(P, ptr):
    """2 for 32-bit elements, of which a thread's neighboring columns take two accesses, else 1."""
    return 2 if P.vector * ptr.dtype.element_ty.primitive_bitwidth == 256 else 1


@triton.jit
def first_token(pid, T, ROWS: tl.constexpr):
    """Sample index (int64) and first token of tile `pid` of a (B, T, D) tensor."""
    tiles = tl.cdiv(T, ROWS)
    return tl.cast(pid // tiles, tl.int64), (pid % tiles) * ROWS


@triton.jit
def split_tokens(T, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Tokens in one of SPLITS parts of a sample, a multiple of ROWS."""
    return tl.cdiv(tl.cdiv(T, ROWS), SPLITS) * ROWS


@triton.jit
def masked_load(ptr, mask, MODIFIER: tl.constexpr):
    """Load, 0 where not `mask`; None: everywhere."""
    if mask is None:
        x = tl.load(ptr, cache_modifier=MODIFIER)
    else:
        x = tl.load(ptr, mask=mask, other=0.0, cache_modifier=MODIFIER)
    return x


@triton.jit
def inside(o_t, o_c, left, P: tl.constexpr):
    """Which of rows `o_t` and columns `o_c` there are, `left` rows from the tile's first on; None: all."""
    if P.even:
        mask = None if P.exact else o_c < P.width
    else:
        mask = o_t < left
        if not P.exact:
            mask = mask & (o_c < P.width)
    return mask


@triton.jit
def rows_of(P: tl.constexpr):
    """Offsets (A, 1, L, 1) of the rows of a tile."""
    o_a = tl.arange(0, P.steps)[:, None, None, None] * P.lane_rows
    return o_a + tl.arange(0, P.lane_rows)[None, None, :, None]


@triton.jit
def lines_of(STEPS: tl.constexpr, WARPS: tl.constexpr, L: tl.constexpr):
    """Step, warp and row of L, (STEPS * WARPS * L, 1) each, of the rows of the matrix that a tile is in memory."""
    o_line = tl.arange(0, STEPS * WARPS * L)[:, None]
    return o_line // (WARPS * L), o_line // L % WARPS, o_line % L


@triton.jit
def load_columns(
    ptr, STEPS: tl.constexpr, STRIDE: tl.constexpr, left, P: tl.constexpr, MODIFIER: tl.constexpr
):
    """Part P of STEPS * L rows that lie STRIDE apart, (STEPS, WARPS, L, SIZE).

    A thread takes two accesses for its neighboring columns of a float32 tensor, so that it lies on the threads as a
    bfloat16 tensor does.
    """
    HALVES: tl.constexpr = halves(P, ptr)
    # A line is a thread's columns of a float32 tensor, all columns of a row otherwise.
    LINES: tl.constexpr = P.size // P.vector if HALVES == 2 else 1
    WIDTH: tl.constexpr = P.vector // 2 if HALVES == 2 else P.size
    o_a, o_warp, o_l = lines_of(STEPS, P.warps, P.lane_rows * LINES)
    o_t = o_a * P.lane_rows + o_l // LINES
    o_c = o_warp * P.own + P.start + o_l % LINES * P.vector + tl.arange(0, WIDTH)[None, :]
    x = masked_load(ptr + (o_t * STRIDE + o_c), inside(o_t, o_c, left, P), MODIFIER)
    if HALVES == 2:
        o_c += WIDTH
        high = masked_load(ptr + (o_t * STRIDE + o_c), inside(o_t, o_c, left, P), MODIFIER)
        x = tl.permute(tl.join(x, high), (0, 2, 1))
    return tl.reshape(x, [STEPS, P.warps, P.lane_rows, P.size])


@triton.jit
def widened(x, ACC: tl.constexpr):
    """x in ACC. A bfloat16 is the upper half of a float32: said so, two of them take two instructions, not three."""
    if x.dtype == tl.bfloat16 and tl.float32 == ACC:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(ACC)


@triton.jit
def load_part(ptr, left, P: tl.constexpr, ACC: tl.constexpr, MODIFIER: tl.constexpr = PLAIN):
    """Part P of a tile of tokens in ACC; `left` tokens from the tile's first on, 0 beyond."""
    return widened(load_columns(ptr, P.steps, P.width, left, P, MODIFIER), ACC)


@triton.jit
def store_part(ptr, x, left, P: tl.constexpr):
    """Store part P of a tile of tokens.

    Of 32-bit elements each of two accesses covers neighboring columns, to which lanes pass on what they have. What the
    second one stores, half of the columns or of the rows, comes before the warps: it stays in its warp.
    """
    TWO: tl.constexpr = halves(P, ptr)
    ROWS_FIRST: tl.constexpr = TWO if P.lane_rows > 1 else 1
    COLUMNS_FIRST: tl.constexpr = P.size * TWO // P.access if ROWS_FIRST < TWO else 1
    L: tl.constexpr = P.lane_rows // ROWS_FIRST
    SIZE: tl.constexpr = P.size // COLUMNS_FIRST
    x = tl.reshape(x.to(ptr.dtype.element_ty), [P.steps, P.warps, ROWS_FIRST, L, COLUMNS_FIRST, SIZE])
    STEPS: tl.constexpr = P.steps * ROWS_FIRST * COLUMNS_FIRST
    x = tl.reshape(tl.permute(x, (0, 2, 4, 1, 3, 5)), [STEPS * P.warps * L, SIZE])
    o_a, o_warp, o_l = lines_of(STEPS, P.warps, L)
    o_t = o_a // COLUMNS_FIRST * L + o_l
    o_c = o_a % COLUMNS_FIRST * SIZE + P.start + o_warp * P.own + tl.arange(0, SIZE)[None, :]
    tl.store(ptr + (o_t * P.width + o_c), x, mask=inside(o_t, o_c, left, P))


@triton.jit
def load_vector(ptr, P: tl.constexpr, ACC: tl.constexpr):
    """Part P of one row of D values, (1, WARPS, L, SIZE) in ACC: the L lanes of a column all have it."""
    return widened(load_columns(ptr, 1, 0, P.rows, P, ""), ACC)


@triton.jit
def load_rows(ptr, left, P: tl.constexpr):
    """(A, 1, L, 1) values of the rows of a tile, 0 beyond the last."""
    return masked_load(ptr + rows_of(P), None if P.even else rows_of(P) < left, "")


@triton.jit
def store_rows(ptr, value, left, P: tl.constexpr):
    """Store (ROWS,) values."""
    o_t = tl.arange(0, P.rows)
    tl.store(ptr + o_t, value, mask=o_t < left)


@triton.jit
def row_lanes(x, P: tl.constexpr):
    """(ROWS, WARPS * 32): what each lane has of the sum of each row of part P, to be summed over axis 1."""
    L: tl.constexpr = P.lane_rows
    x = tl.reshape(x, [P.steps, P.warps, L, P.size * L // P.access, 32 // L, P.vector])
    x = tl.reshape(tl.sum(tl.sum(x, 5), 3), [P.steps, 1, P.warps, 32])
    if L > 1:
        x = tl.where(has_row(P), x, 0.0)
    return tl.reshape(x, [P.rows, P.warps * 32])


@triton.jit
def of_rows(value, P: tl.constexpr):
    """(ROWS,) values as a part: (A, WARPS, L, SIZE), each column the value of its row."""
    L: tl.constexpr = P.lane_rows
    value = tl.reshape(tl.broadcast_to(value[:, None], [P.rows, P.warps * 32]), [P.steps, L, P.warps, 32])
    if L > 1:
        value = tl.where(has_row(P), value, 0.0)
    value = tl.reshape(tl.sum(value, 1), [P.steps, P.warps, L, 1, 32 // L, 1])
    value = tl.broadcast_to(value, [P.steps, P.warps, L, P.size * L // P.access, 32 // L, P.vector])
    return tl.reshape(value, [P.steps, P.warps, L, P.size])


@triton.jit
def has_row(P: tl.constexpr):
    """(1, L, 1, 32): which of L neighboring rows each lane has."""
    o_l = tl.arange(0, P.lane_rows)[None, :, None, None]
    return tl.arange(0, 32)[None, None, None, :] // (32 // P.lane_rows) == o_l


@triton.jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def row_sums(x, y):
    """(ROWS,) sums of two (ROWS, WARPS * 32) in one exchange."""
    return tl.reduce((x, y), 1, add_pairs)


@triton.jit
def row_mean(main, tail, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """(ROWS,) means of the rows of a tile, which is 0 beyond the last column."""
    total = row_lanes(main, MAIN)
    if TAIL.size > 0:
        total += row_lanes(tail, TAIL)
    return tl.sum(total, axis=1) / MAIN.width


@triton.jit
def moments(main, tail, MAIN: tl.constexpr, TAIL: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr):
    """Mean and 1 / deviation (ROWS,) of the rows of a tile; not CENTRED: 0, and the deviation is that from 0.

    The variance is a second pass over registers: no cancellation.
    """
    mean = tl.full([MAIN.rows], 0.0, main.dtype)
    if CENTRED:
        mean = row_mean(main, tail, MAIN, TAIL)
    square = row_lanes(squared_deviation(main, mean, MAIN), MAIN)
    if TAIL.size > 0:
        square += row_lanes(squared_deviation(tail, mean, TAIL), TAIL)
    return mean, 1 / tl.sqrt(tl.sum(square, axis=1) / MAIN.width + EPS)


@triton.jit
def deviation(x, mean, P: tl.constexpr):
    """x - mean, 0 beyond the last column."""
    x -= of_rows(mean, P)
    if not P.exact:
        o_c = tl.arange(0, P.warps)[None, :, None, None] * P.own + P.start
        x = tl.where(o_c + tl.arange(0, P.size)[None, None, None, :] < P.width, x, 0.0)
    return x


@triton.jit
def squared_deviation(x, mean, P: tl.constexpr):
    """(x - mean)^2, 0 beyond the last column."""
    away = deviation(x, mean, P)
    return away * away


@triton.jit
def no_sum(P: tl.constexpr, ACC: tl.constexpr):
    """A sum over tokens of part P before the first of them: (1, WARPS, L, SIZE), what each thread has added."""
    return tl.full([1, P.warps, P.lane_rows, P.size], 0.0, ACC)


@triton.jit
def column_sum(x):
    """What a tile adds to a sum over tokens, (1, WARPS, L, SIZE)."""
    return tl.sum(x, axis=0)[None, :, :, :]


@triton.jit
def store_sum(ptr, value, P: tl.constexpr):
    """Store a sum over tokens of part P to one row of D values."""
    o_c = tl.arange(0, P.warps)[:, None] * P.own + P.start + tl.arange(0, P.size)[None, :]
    value = tl.reshape(tl.sum(value, 2), [P.warps, P.size])
    tl.store(ptr + o_c, value.to(ptr.dtype.element_ty), mask=o_c < P.width)


@triton.jit
def part(o_t, m_t, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """Offsets (ROWS, SIZE) and mask of columns START .. START + SIZE of rows `o_t` of D columns."""
    o_columns = START + tl.arange(0, SIZE)[None, :]
    mask = m_t[:, None]
    if START + SIZE > D:
        mask = mask & (o_columns < D)
    return o_t[:, None] * D + o_columns, mask


@triton.jit
def row_sum(x):
    """(ROWS, 1) sums over the columns of a tile."""
    return tl.sum(x, axis=1)[:, None]
