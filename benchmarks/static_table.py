"""The Markdown tables of `benchmarks.static_report`: one row for each kernel, dtypes and width, by architecture."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

HEADER = """# What the compiler made of every kernel

`python -m benchmarks.static_report --out benchmarks/results` with Triton {triton}, no GPU involved: these are
properties of machine code, not speeds. B = 256 and T = 256 unless stated; D is the model's width (DiT-S, B, L, XL),
autocast a float32 residual stream with bfloat16 branches. Values for {names} are separated by slashes where they
differ. Spilled and shared memory in bytes, registers a thread; occupancy is what registers, shared memory and warps
allow. Accesses are the global loads and stores in the machine code by width in bits, "tma" bulk copies; the narrow ones
that are not listed as broken move vectors of one row a sample, row statistics and partial sums. MB counts each
tensor of a launch once.
"""

TRAFFIC = """
## Bytes moved against the least possible

Each tensor once, all of an operation's kernels together, partial sums and vectors included; the least is that of the
token tensors alone. A tensor that a kernel reads twice comes from the cache the second time and counts once.
"""


@dataclass(frozen=True)
class Row:
    """One kernel in a setting. Sizes in bytes; `accesses` by `Compiled.machine_accesses`; `bytes`: each tensor once."""

    op: str
    case: str
    direction: str
    kernel: str
    dtypes: str
    width: int
    capability: int
    warps: int
    registers: int
    spills: int
    shared: int
    occupancy: float
    accesses: dict[str, int]
    tensor_core: dict[str, int]
    float64: dict[str, int]
    bytes: int
    broken: tuple[str, ...]


@dataclass(frozen=True)
class Traffic:
    """Bytes that an operation's kernels move in one direction, and the least possible."""

    op: str
    case: str
    direction: str
    dtypes: str
    width: int
    moved: int
    least: int


def markdown(rows: Sequence[Row], traffic: Sequence[Traffic], version: str) -> str:
    """The whole report; `version` is that of Triton."""
    capabilities = sorted({row.capability for row in rows})
    names = ", ".join(f"sm_{capability}" for capability in capabilities)
    broken = [row for row in rows if row.broken]
    lines = [HEADER.format(triton=version, names=names)]
    lines.append(f"{len(rows)} kernels compiled, {len(broken)} break a hard line.\n")
    lines += table(
        ("operation", "pass", "kernel", "dtypes", "D", "warps", "registers", "spilled", "shared", "occupancy",
         "accesses", "tensor cores", "float64", "MB", "broken"),
        kernel_cells(rows),
    )  # fmt: skip
    if traffic:
        lines.append(TRAFFIC)
        lines += table(
            ("operation", "pass", "dtypes", "D", "MB moved", "MB least", "ratio"),
            (
                (
                    named(item), item.direction, item.dtypes, item.width, megabytes(item.moved),
                    megabytes(item.least), f"{item.moved / item.least:.3f}",
                )
                for item in traffic
            ),
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def kernel_cells(rows: Sequence[Row]) -> Iterable[tuple[Any, ...]]:
    """Cells of the first table; the architectures of one kernel, dtypes and width share a row."""

    def identity(row: Row) -> tuple[Any, ...]:
        return named(row), row.direction, row.kernel.strip("_").removesuffix("_kernel"), row.dtypes, row.width

    order = {key: number for number, key in enumerate(dict.fromkeys(map(identity, rows)))}
    for key, group in groupby(sorted(rows, key=lambda row: order[identity(row)]), identity):
        members = sorted(group, key=lambda row: row.capability)
        columns: tuple[Callable[[Row], str], ...] = (
            lambda row: str(row.warps),
            lambda row: str(row.registers),
            lambda row: str(row.spills),
            lambda row: str(row.shared),
            lambda row: f"{row.occupancy:.0%}",
            lambda row: counted(row.accesses),
            lambda row: counted(row.tensor_core),
            lambda row: counted(row.float64),
            lambda row: megabytes(row.bytes),
            lambda row: "; ".join(row.broken) or "-",
        )
        yield *key, *(merged([column(row) for row in members]) for column in columns)


def merged(values: Sequence[str]) -> str:
    """One value where all agree, else one for each architecture."""
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in counts.items()) or "-"


def named(item: Row | Traffic) -> str:
    return f"{item.op} ({item.case})" if item.case else item.op


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def table(header: Sequence[str], cells: Iterable[Sequence[Any]]) -> list[str]:
    rows = [header, ["---"] * len(header), *cells]
    return [f"| {' | '.join(map(str, row))} |" for row in rows]
