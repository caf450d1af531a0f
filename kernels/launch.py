"""How launches are configured, prepared and executed: configurations, layouts, and recording without a device."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_fast.kernels import tuned


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. On the host Triton's own costs 2 microseconds a call, as it unwraps constants."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n > 0; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def require_powers_of_two(**ranges: tuple[int, int, int]) -> None:
    """ValueError naming the first of `name=(value, least, most)` that is not a power of two from least to most."""
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most or value & (value - 1):
            raise ValueError(f"{name} is {value}, expected a power of two from {least} to {most}")


@dataclass(frozen=True)
class RowLaunch:
    """One tile of a row kernel: `rows` rows of `width` columns on `num_warps` warps, of `tokens` tokens per sample.

    `splits` programs share the tokens of one sample in kernels that reduce over tokens. Raises ValueError for sizes
    that the kernels cannot run.
    """

    rows: int
    num_warps: int
    width: int
    tokens: int
    splits: int

    # Not `splits`: how a sum over tokens is cut stays a function of the shape.
    tunable: ClassVar = ("rows", "num_warps")

    def __post_init__(self) -> None:
        require_powers_of_two(rows=(self.rows, 2, 64), num_warps=(self.num_warps, 1, 16))

    @property
    def meta(self) -> dict[str, int]:
        """A row kernel's meta parameters; EVEN: no tile reaches beyond the last token, nothing is masked."""
        return {
            "D": self.width,
            "ROWS": self.rows,
            "WARPS": self.num_warps,
            "EVEN": self.tokens % self.rows == 0,
        }

    def candidates(self) -> Iterator["RowLaunch"]:
        """What a search tries: other rows and warps that give a thread 4 to 144 values of a tile."""
        for rows in (2, 4, 8, 16):
            for num_warps in (1, 2, 4, 8):
                if 4 <= rows * self.width // (32 * num_warps) <= 144:
                    yield replace(self, rows=rows, num_warps=num_warps)


@dataclass(frozen=True)
class TileLaunch:
    """Tiles of a product of few terms: `block_n` tokens, `block_d` columns and `block_k` terms on `num_warps` warps."""

    block_n: int
    block_d: int
    block_k: int
    num_warps: int

    # Not `block_k`: how a product's terms are grouped stays a function of the shape.
    tunable: ClassVar = ("block_n", "block_d", "num_warps")

    def __post_init__(self) -> None:
        blocks = {"block_n": self.block_n, "block_d": self.block_d, "block_k": self.block_k}
        # A product on tensor cores takes 16 values of each dimension at least.
        sizes = {name: (size, 16, 256) for name, size in blocks.items()}
        require_powers_of_two(**sizes, num_warps=(self.num_warps, 1, 16))

    @property
    def meta(self) -> dict[str, int]:
        return {"BLOCK_N": self.block_n, "BLOCK_D": self.block_d, "BLOCK_K": self.block_k}

    def candidates(self) -> Iterator["TileLaunch"]:
        """What a search tries: tiles of the same terms with other tokens, columns and warps."""
        for block_n in (32, 64, 128):
            for block_d in (32, 64, 128):
                for num_warps in (4, 8):
                    yield replace(self, block_n=block_n, block_d=block_d, num_warps=num_warps)


@dataclass(frozen=True)
class ElementwiseLaunch:
    """Tiles of `rows` x `columns` values on `num_warps` warps; `splits` programs share the rows of a column block."""

    rows: int
    columns: int
    num_warps: int
    splits: int

    @property
    def meta(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BLOCK_F": self.columns}


@tuned.per_launch
def elementwise_launch(rows: int, width: int, tile_rows: int) -> ElementwiseLaunch:
    """The launch of tiles of `tile_rows` rows over (rows, width) tensors whose rows have nothing to do with each other.

    A function of the shape alone, as is then the order of every sum.
    """
    # A warp covers 256 columns with 8 values a thread; 512 divide 1536, 3072, 4096 and 4608, so no lane is idle.
    columns = min(512, max(16, next_power_of_2(width)))
    tile_rows = min(tile_rows, next_power_of_2(max(rows, 1)))
    # About 8 programs for each of 132 multiprocessors; the partial sums stay below 1 % of the tensors' bytes.
    blocks = cdiv(width, columns)
    splits = min(max(1056 // max(blocks, 1), 1), max(cdiv(rows, tile_rows), 1))
    return ElementwiseLaunch(tile_rows, columns, 4, splits)


@functools.cache
def row_parts(width: int) -> tuple[int, int]:
    """A row of `width` columns as a main and a tail part, two powers of two, the tail 0 where one suffices."""
    main = 1 << (width.bit_length() - 1)
    tail = next_power_of_2(width - main) if width > main else 0
    return (2 * main, 0) if tail == main else (main, tail)


def row_launch(
    batch: int, tokens: int, width: int, itemsize: int = 2, sums: int = 0, tensors: int = 1
) -> RowLaunch:
    """The launch for (batch, tokens, width) token tensors whose narrowest dtype has `itemsize` bytes.

    `sums`: how many sums over tokens the kernel makes; `tensors`: how many a thread keeps its share of a row of, for
    sums over columns. A function of shape and dtypes alone, so that the order of
    every sum, hence every bit, is the same on any device. sm_80, sm_90 and sm_100 agree in what it rests on: 64 Ki
    registers and 64 warps a multiprocessor, 128-bit accesses.
    """
    if sums:
        # Few columns a thread: their sums stay in its registers.
        num_warps = min(power_of_two_below(width // 256), 16)
    else:
        # One warp: a sum over the columns of a row needs no barrier.
        num_warps = 1 if width * tensors <= 1536 else min(power_of_two_below(width // 256), 16)
    # 72 values a thread of each tensor; half of them for whatever takes registers beside a sum: two more sums, masks,
    # tensors that are all wide.
    values = 72
    if sums:
        values >>= (sums > 2) + (sums > 4) + (tokens % 8 > 0) + (itemsize > 2)
    rows = min(
        power_of_two_below(32 * values * num_warps // (width * tensors)), 8, next_power_of_2(max(tokens, 1))
    )
    rows = max(rows, 2)
    # About 4 programs for each of 132 multiprocessors, 8 of a single warp; partial sums stay a few percent of the
    # tokens' bytes.
    programs = 1024 if num_warps == 1 else 512
    splits = min(cdiv(programs, max(batch, 1)), max(cdiv(tokens, rows), 1)) if sums else 1
    return RowLaunch(rows, num_warps, width, tokens, splits)


def power_of_two_below(value: int) -> int:
    """The greatest power of two up to `value`, 1 at least."""
    return 1 << max(value.bit_length() - 1, 0)


def tuned_rows(kernel: Any, x: Tensor, *others: torch.dtype, sums: int = 0, tensors: int = 1) -> RowLaunch:
    """The launch of row kernel `kernel` over x (B, T, D) and tensors of its shape of the dtypes `others`.

    The tuned table's, else `row_launch`'s. It formats text: call it when a launch is prepared, not at each launch.
    """
    B, T, D = x.shape
    dtypes = (x.dtype, *others)
    heuristic = row_launch(B, T, D, min(dtype.itemsize for dtype in dtypes), sums, tensors)
    names = ",".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return tuned.config(kernel, f"D={D} {names}", heuristic, capability(x))


def accumulator(x: Tensor) -> tl.dtype:
    """Triton's name of the dtype that sums are kept in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`; without a call of PyTorch's, a microsecond of the host, where nothing changes."""
    return x if x.dtype == dtype else x.to(dtype)


def nothing_like(x: Tensor) -> Tensor:
    """An empty tensor for an output that was not asked for: it has no memory, so that one serves all launches."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=x.dtype, device=x.device)


def as_vectors(x: Tensor) -> Tensor:
    """(B, D) or (D,) with contiguous rows; the views that `chunk` makes pass as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_bias(bias: Tensor | None) -> Tensor | None:
    """The contiguous (D,) bias, or None."""
    return None if bias is None else bias.contiguous()


def max_registers(num_warps: int) -> int:
    """The hardware's limit, given to the assembler: left to itself it aims lower for some kernels, and spills.

    255 a thread, and 64 Ki for all threads of a program.
    """
    return min(255, 2**16 // (32 * num_warps))


class Products(NamedTuple):
    """Work of a kernel on tensor cores: multiplications and additions, and the dtype of the factors."""

    flops: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of executed. `options` are the compiler's: num_warps, num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]
    products: Products | None = None

    @property
    def num_warps(self) -> int:
        return self.options["num_warps"]


@dataclass(frozen=True)
class Recording:
    """Where launches go instead of to a device, and the compute capability that launchers then see."""

    launches: list[Launch]
    capability: int


_recording: Recording | None = None


@contextmanager
def record_launches(capability: int = 90) -> Iterator[list[Launch]]:
    """Collect launches for sm_<capability> instead of carrying them out; tensors may be on the meta device.

    Registered operations on meta tensors launch too, forward and backward, whatever autograd calls.
    """
    global _recording
    previous, _recording = _recording, Recording([], capability)
    tuned.drop_plans()
    try:
        yield _recording.launches
    finally:
        _recording = previous
        tuned.drop_plans()


def recording() -> bool:
    """Whether launches are being recorded."""
    return _recording is not None


def capability(on: Tensor) -> int:
    """Compute capability (80, 90, 100, ...) that a launch on the device of `on` runs on.

    That of the recording where launches are recorded, 0 for a CPU tensor (Triton's interpreter).
    """
    if _recording is not None:
        return _recording.capability
    return device_capability(on.get_device()) if on.is_cuda else 0


@functools.cache
def device_capability(index: int) -> int:
    """Compute capability of CUDA device `index`."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


_products: ContextVar[Products | None] = ContextVar("products", default=None)


def tensor_arguments(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among a kernel's arguments by name, those behind descriptors included."""
    values = {
        name: value.base if isinstance(value, TensorDescriptor) else value
        for name, value in arguments.items()
    }
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def describe(grid: tuple[int, ...], metadata: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a profiler (Triton's proton) shows of a launch: name with shape and dtypes, bytes, flops8 | 16 | 32 | 64.

    `bytes` counts each tensor of the arguments once: what has to go to or come from memory.
    """
    tensors = list(tensor_arguments(arguments).values())
    name = metadata.name.strip("_").removesuffix("_kernel")
    shape = "x".join(map(str, tensors[0].shape)) if tensors else "x".join(map(str, grid))
    dtypes = ",".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in tensors))
    found: dict[str, Any] = {
        "name": f"{name}[{shape} {dtypes}]",
        "bytes": sum(x.numel() * x.itemsize for x in tensors),
    }
    if (products := _products.get()) is not None:
        found[f"flops{8 * products.dtype.itemsize}"] = products.flops
    return found


def prepare(
    kernel: Any,
    grid: tuple[int, ...],
    on: Tensor,
    num_warps: int,
    *,
    num_stages: int | None = None,
    products: Any = None,
    **constants: Any,
) -> Callable[..., None]:
    """A function of the pointers, by keyword, that launches `kernel` with these and with `constants`.

    An empty grid launches nothing. `num_stages` None: the compiler's own choice. `products`: work of a kernel with
    matrix products, for profilers. The launch is on the current device; while launches are recorded it is recorded.
    """
    if 0 in grid:
        return _no_launch
    options = _options(num_warps, num_stages)
    if _recording is not None:
        return functools.partial(
            _record, _recording, Launch(kernel, grid, constants, dict(options), products)
        )
    kernel.launch_metadata = describe
    # C code merges the arguments: no frame of Python's between the caller and Triton.
    run = functools.partial(kernel[grid], **constants, **options)
    return run if products is None else functools.partial(_with_products, products, run)


def _no_launch(**pointers: Any) -> None:
    pass


def _record(to: Recording, prepared: Launch, **pointers: Any) -> None:
    to.launches.append(replace(prepared, arguments=pointers | prepared.arguments))


def _with_products(products: Products, run: Callable[..., None], **pointers: Any) -> None:
    token = _products.set(products)
    try:
        run(**pointers)
    finally:
        _products.reset(token)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    on: Tensor,
    num_warps: int,
    *,
    num_stages: int | None = None,
    products: Any = None,
    **arguments: Any,
) -> None:
    """Run `kernel` once on the device of `on`, with all of its arguments; see `prepare`."""
    run = prepare(kernel, grid, on, num_warps, num_stages=num_stages, products=products, **arguments)
    if not on.is_cuda or on.get_device() == torch.cuda.current_device():
        run()
    else:
        with torch.cuda.device_of(on):
            run()


@functools.cache
def _options(num_warps: int, num_stages: int | None) -> dict[str, int]:
    """What the compiler is given with a launch."""
    options = {"num_warps": num_warps, "maxnreg": max_registers(num_warps)}
    return options if num_stages is None else {**options, "num_stages": num_stages}
