"""The Markdown tables of `benchmarks.compile.static_report`: one row per kernel, dtypes and width, by architecture."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

HEADER = """# What the compiler made of every kernel

`python -m benchmarks.compile.static_report --out benchmarks/results` with Triton {triton}, no GPU involved: these are
properties of machine code, not speeds. B = 256 and T = 256 unless stated; D is the model's width (DiT-S, B, L, XL),
autocast a float32 residual stream with bfloat16 branches. Values for {names} are separated by slashes where they
differ. Spilled and shared memory in bytes, registers a thread; occupancy is what registers, shared memory and warps
allow.

The hard lines: no spills, but for 64 bytes a thread in the backward pass of two row kernels on sm_80 and sm_100, whose
tiles are those of sm_90; no float64 (the AdamW scalars, in one thread, may); shared memory that a block has, 163 KiB
on sm_80, 227 KiB on sm_90 and sm_100; a block that fits a multiprocessor; memory-bound kernels move token tensors 128
bits at a time (unpatchify's permutation gathers single pixels, AdamW's tails go by single elements); 16-bit products
on tensor cores: HMMA on sm_80, HGMMA (wgmma) on sm_90, UTCHMMA (tcgen05) or HMMA on sm_100.

{count} kernels compiled, {broken} break a hard line.

## In short

Extremes over all dtypes, widths and cases; tensor cores in the order of the architectures.
"""

DETAILS = """
## Every kernel

Accesses are the global loads and stores in the machine code by width in bits, "tma" bulk copies; the narrow ones that
are not listed as broken move vectors of one row a sample, row statistics and partial sums. MB counts each tensor of a
launch once, "-" where a kernel finds its tensors by a table of addresses.
"""

ISSUED = """
## What bounds a pass over memory besides its bytes

Kernels without products, whose tiles are rows. Barriers and 128-bit loads in flight (issued before a result is
used) are those of a tile: of the main loop where a program walks several tiles. Instructions are those of all warps for
one row of the largest tensor, a nested loop counted once. On sm_90, t_issue is the time to issue them all on
an H200, 132 multiprocessors x 4 schedulers x 1.755 GHz x 0.6, and t_memory that of the kernel's bytes at 4.3 TB/s:
above 0.7 a kernel is likely not bound by memory.
"""

TRAFFIC = """
## Bytes moved against the least possible

Each tensor once, all of an operation's kernels together, partial sums and vectors included; the least is that of the
token tensors alone. A tensor that a kernel reads twice comes from the cache the second time and counts once.
"""


@dataclass(frozen=True)
class Row:
    """One kernel in a setting. Sizes in bytes; `accesses` by `Compiled.machine_accesses`; `bytes`: each tensor once.

    `barriers` and 128-bit loads `in_flight` of a tile, `instructions` of all warps for a row, on sm_90 `issue`,
    t_issue / t_memory. None where a tile is not made of rows.
    """

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
    barriers: int | None = None
    in_flight: int | None = None
    instructions: int | None = None
    issue: float | None = None


@dataclass(frozen=True)
class Traffic:
    """Bytes that an operation's kernels move in one direction, and the least possible."""

    op: str
    case: str
    direction: str
    dtypes: str
    width: int
    capability: int
    moved: int
    least: int


def markdown(rows: Sequence[Row], traffic: Sequence[Traffic], version: str) -> str:
    """The whole report; `version` is that of Triton."""
    capabilities = sorted({row.capability for row in rows})
    names = ", ".join(f"sm_{capability}" for capability in capabilities)
    broken = [row for row in rows if row.broken]
    lines = [HEADER.format(triton=version, names=names, count=len(rows), broken=len(broken))]
    lines += table(
        ("operation", "pass", "kernel", "compiled", "warps", "registers", "spilled", "shared", "occupancy",
         "tensor cores", "float64", "broken"),
        summary_cells(rows),
    )  # fmt: skip
    lines.append(DETAILS)
    lines += table(
        ("operation", "pass", "kernel", "dtypes", "D", "warps", "registers", "spilled", "shared", "occupancy",
         "accesses", "tensor cores", "float64", "MB", "broken"),
        kernel_cells(rows),
    )  # fmt: skip
    counted_rows = [row for row in rows if row.instructions is not None]
    if counted_rows:
        lines.append(ISSUED)
        lines += table(
            ("operation", "pass", "kernel", "dtypes", "D", "warps", "registers", "occupancy", "barriers a tile",
             "instructions a row", "loads in flight", "t_issue / t_memory"),
            issued_cells(counted_rows),
        )  # fmt: skip
    if traffic:
        lines.append(TRAFFIC)
        lines += table(
            ("operation", "pass", "dtypes", "D", "MB moved", "MB least", "ratio"),
            traffic_cells(traffic),
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def summary_cells(rows: Sequence[Row]) -> Iterable[tuple[Any, ...]]:
    """Cells of the first table: one row for each kernel of an operation, extremes over all that was compiled."""

    def identity(row: Row) -> tuple[str, ...]:
        return row.op, row.direction, short_name(row)

    order = {key: number for number, key in enumerate(dict.fromkeys(map(identity, rows)))}
    for key, group in groupby(sorted(rows, key=lambda row: order[identity(row)]), identity):
        members = list(group)
        cores = [
            "+".join(sorted({name for row in members if row.capability == sm for name in row.tensor_core}))
            or "-"
            for sm in sorted({row.capability for row in members})
        ]
        yield (
            *key, len(members), span(row.warps for row in members), span(row.registers for row in members),
            max(row.spills for row in members), max(row.shared for row in members),
            f"{min(row.occupancy for row in members):.0%}", merged(cores),
            "yes" if any(row.float64 for row in members) else "-",
            sum(bool(row.broken) for row in members) or "-",
        )  # fmt: skip


def by_architecture(
    rows: Sequence[Row], columns: Sequence[Callable[[Row], str]]
) -> Iterable[tuple[Any, ...]]:
    """Cells of one row for each kernel, dtypes and width: their names, then `columns`, merged over architectures."""

    def identity(row: Row) -> tuple[Any, ...]:
        return named(row), row.direction, short_name(row), row.dtypes, row.width

    order = {key: number for number, key in enumerate(dict.fromkeys(map(identity, rows)))}
    for key, group in groupby(sorted(rows, key=lambda row: order[identity(row)]), identity):
        members = sorted(group, key=lambda row: row.capability)
        yield *key, *(merged([column(row) for row in members]) for column in columns)


def kernel_cells(rows: Sequence[Row]) -> Iterable[tuple[Any, ...]]:
    """Cells of the second table."""
    return by_architecture(
        rows,
        (
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
        ),
    )


def issued_cells(rows: Sequence[Row]) -> Iterable[tuple[Any, ...]]:
    """Cells of the table of what bounds a pass over memory."""
    for *key, issue in by_architecture(
        rows,
        (
            lambda row: str(row.warps),
            lambda row: str(row.registers),
            lambda row: f"{row.occupancy:.0%}",
            lambda row: str(row.barriers),
            lambda row: str(row.instructions),
            lambda row: str(row.in_flight),
            lambda row: "" if row.issue is None else f"{row.issue:.2f}",
        ),
    ):
        yield *key, issue.strip(" /") or "-"


def traffic_cells(traffic: Sequence[Traffic]) -> Iterable[tuple[Any, ...]]:
    """Cells of the last table; the architectures of one operation, direction, dtypes and width share a row."""

    def identity(item: Traffic) -> tuple[Any, ...]:
        return named(item), item.direction, item.dtypes, item.width

    order = {key: number for number, key in enumerate(dict.fromkeys(map(identity, traffic)))}
    for key, group in groupby(sorted(traffic, key=lambda item: order[identity(item)]), identity):
        members = sorted(group, key=lambda item: item.capability)
        columns: tuple[Callable[[Traffic], str], ...] = (
            lambda item: megabytes(item.moved),
            lambda item: megabytes(item.least),
            lambda item: f"{item.moved / item.least:.3f}",
        )
        yield *key, *(merged([column(item) for item in members]) for column in columns)


def span(values: Iterable[int]) -> str:
    """One value, or the least and the most."""
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def short_name(row: Row) -> str:
    return row.kernel.strip("_").removesuffix("_kernel")


def merged(values: Sequence[str]) -> str:
    """One value where all agree, else one for each architecture."""
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in counts.items()) or "-"


def named(item: Row | Traffic) -> str:
    return f"{item.op} ({item.case})" if item.case else item.op


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size else "-"


def table(header: Sequence[str], cells: Iterable[Sequence[Any]]) -> list[str]:
    rows = [header, ["---"] * len(header), *cells]
    return [f"| {' | '.join(map(str, row))} |" for row in rows]
