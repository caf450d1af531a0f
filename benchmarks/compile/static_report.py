"""What the compiler made of every kernel: `python -m benchmarks.compile.static_report [--check] [--out DIR]`.

Records what each operation launches, forward and backward, at the sizes of DiT-S, B, L and XL, and compiles it for
each architecture: registers, spills, shared memory, occupancy, accesses to memory, tensor-core and
float64 instructions in the machine code, what bounds a pass over memory besides its bytes (barriers, instructions,
loads in flight), and the bytes moved against the least possible. Compiled binaries stay in
Triton's cache, by the hash of their source. `--check` exits with 1 and names each hard line that is broken.
`--matrix` compiles every kernel for all that Triton specializes a launch on (benchmarks/compile/specializations.py).
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from benchmarks.compile.aot import MAX_SHARED, Compiled, compile_launch
from benchmarks.compile.specializations import (
    compile_matrix,
    meta,
    record_adamw,
    record_recomputed_norm,
    swiglu_mlp_inputs,
)
from benchmarks.compile.static_table import Row, Traffic, markdown
from benchmarks.ops.registry import DUALS, EVERY, OpSpec
from dit_fast.kernels.launch import Launch, record_launches, tensor_arguments
from dit_fast.model.layers import swiglu_width

BATCH = 256
WIDTHS = (384, 768, 1024, 1152)
CAPABILITIES = (80, 90, 100)
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
}


@dataclass(frozen=True)
class Case:
    """How an operation is called: `tokens`, its `width` given the model's, and keywords.

    `whole` is False where PyTorch executes a part, so that the kernels' bytes are not the operation's. `head_dim`
    is that of attention, with as many heads as the width holds, in place of the model's; such a case is examined for
    one width, in bfloat16. `make_inputs` stands in place of the `OpSpec`'s.
    """

    label: str = ""
    tokens: int = 256
    width: Callable[[int], int] = lambda D: D
    keywords: dict[str, Any] = field(default_factory=dict)
    whole: bool = True
    head_dim: int = 0
    make_inputs: Callable[..., tuple[Any, ...]] | None = None


HEAD_CASES = tuple(
    Case(f"K = {K}, T = {T}", tokens=T, head_dim=K, whole=False)
    for K in (32, 64, 72, 80, 96, 128)
    for T in (64, 256, 1024)
    if K != 72 or T == 64
)
"""Other heads than DiT's and fewer tokens; 4096 tokens are the machine code of 1024."""


CASES = {
    "attention": (Case(), Case("T = 1024", tokens=1024), *HEAD_CASES),
    "gelu": (Case(width=lambda D: 4 * D),),
    "swiglu": (Case(width=lambda D: swiglu_width(4 * D)),),
    "mlp": (
        Case("separate", keywords={"epilogue": "separate"}, whole=False),
        Case("triton", keywords={"epilogue": "triton"}, whole=False),
        Case("swiglu", keywords={"activation": "swiglu"}, whole=False, make_inputs=swiglu_mlp_inputs),
    ),
}
CASES |= {
    "attention-dual": CASES["attention"][:2],
    "gelu-dual": CASES["gelu"],
    "swiglu-dual": CASES["swiglu"],
    "mlp-dual": CASES["mlp"][:1],
}
"""Operations that are called otherwise than once with 256 tokens."""

TABLED = "finds tensors by a table of addresses; tails and unaligned ones go by single elements"
HEAD_TAIL = "a head of 72 columns is 64 + 8: in 16 bits the last 16 bytes of a row go by two threads"
NARROW = {
    "_qk_norm_rope_fwd_kernel": HEAD_TAIL,
    "_qk_norm_rope_bwd_kernel": HEAD_TAIL,
    "_qk_norm_rope_dual_kernel": HEAD_TAIL,
    "_permute_kernel": "gathers single pixels: the neighbours of one are P * P * C values apart",
    "_square_sum_kernel": TABLED,
    "_adamw_ema_kernel": TABLED,
    "_adamw_scalars_kernel": "reads scalars",
}
"""Memory-bound kernels that may move tensors in less than 128 bits, with the reason."""

FLOAT64 = {
    "_adamw_scalars_kernel": "the few scalars of a step, in one thread: powers of the betas, clip factor"
}
"""Kernels that may compute in float64 on other inputs than float64, with the reason."""

SPILLS = {"_adaln_bwd_kernel": 64, "_gated_residual_adaln_bwd_kernel": 64}
"""Bytes a thread that kernels may spill on other GPUs than sm_90, whose tiles they share.

A tile of half the rows takes a fifth more instructions. All devices have the same tiles, so that sums have one order.
"""

ISSUE_SLOTS = 132 * 4 * 1.755e9 * 0.6
"""Warp instructions a second of an H200: multiprocessors, schedulers, clock, and what schedulers reach of it."""

COPY_BANDWIDTH = 4.3e12
"""Bytes a second that a copy reads and writes on an H200."""

TENSOR_CORE = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA", "HMMA")}
"""What a product of 16-bit factors has to become."""


@dataclass(frozen=True)
class Setting:
    """One cell of the report."""

    op: str
    case: int
    dtypes: str
    width: int
    capability: int

    def describe(self, case: Case) -> str:
        label = f" ({case.label})" if case.label else ""
        return f"{self.op}{label} {self.dtypes} D={self.width} sm_{self.capability}"


def record(case: Case, setting: Setting) -> dict[str, list[Launch]]:
    """What the operation launches in each direction, every floating-point input wanting a gradient."""
    if setting.op in STEPS:
        with record_launches(setting.capability) as launches:
            STEPS[setting.op](setting)
        return {"step": launches}
    spec = EVERY[setting.op]
    shape = (BATCH, case.tokens, case.width(setting.width))
    inputs = (
        attention_inputs(case, setting)
        if case.head_dim
        else (case.make_inputs or spec.make_inputs)(shape, *DTYPES[setting.dtypes], meta)
    )
    inputs = tuple(
        value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    )
    with record_launches(setting.capability) as launches:
        result = spec.op(*inputs, **case.keywords, kernels="triton")
        forward = list(launches)
        if setting.op in DUALS:
            # The backward pass is that of the operation itself.
            return {"forward": forward}
        outputs = [out for out in (result if isinstance(result, tuple) else (result,)) if out.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    return {"forward": forward, "backward": launches[len(forward) :]}


def attention_inputs(case: Case, setting: Setting) -> tuple[Tensor, int, Tensor]:
    """qkv, heads and bias of as many heads of `case.head_dim` as the width holds."""
    stream, low = DTYPES[setting.dtypes]
    heads = setting.width // case.head_dim
    packed = 3 * heads * case.head_dim
    return meta(BATCH, case.tokens, packed, dtype=low), heads, meta(packed, dtype=stream)


def record_step(setting: Setting) -> None:
    """float32 parameters; "fp32" without a copy, otherwise gradients of the stream's dtype and a bfloat16 copy."""
    grad_dtype, low = DTYPES[setting.dtypes]
    record_adamw(setting.width, grad_dtype, low if low == torch.bfloat16 else None)


STEPS: dict[str, Callable[[Setting], None]] = {
    "adaln_from_moments": lambda setting: record_recomputed_norm(
        (BATCH, 256, setting.width), *DTYPES[setting.dtypes]
    ),
    "adamw_ema": record_step,
}
"""Operations without a gradient, and so without an `OpSpec`: what launches them."""


def token_tensors(launch: Launch) -> dict[str, Tensor]:
    """The arguments that carry the bytes: those of a quarter of the largest's size or more."""
    tensors = tensor_arguments(launch.arguments)
    largest = max((x.numel() * x.itemsize for x in tensors.values()), default=0)
    return {name: x for name, x in tensors.items() if 4 * x.numel() * x.itemsize >= largest > 0}


def issued(kernel: Compiled, launch: Launch) -> dict[str, Any]:
    """What bounds a kernel without products besides its bytes, as `Row` has it: empty where a tile is not made of rows.

    A row is one of the largest token tensor. On sm_90 the time that its instructions take to issue is compared with
    that of its bytes; above 0.7 a kernel is likely not bound by memory.
    """
    arguments, tensors = launch.arguments, tensor_arguments(launch.arguments).values()
    columns = arguments.get("BLOCK_F", arguments.get("D"))
    if kernel.products() or columns is None or "ROWS" not in arguments:
        return {}
    largest = max(tensors, key=lambda x: x.numel() * x.itemsize)
    figures, programs = kernel.figures(), math.prod(launch.grid)
    tiles = largest.numel() / (arguments["ROWS"] * columns) if figures.tile else 0
    instructions = (tiles * figures.tile + programs * figures.once) * kernel.num_warps
    memory = sum(x.numel() * x.itemsize for x in tensors) / COPY_BANDWIDTH
    return {
        "barriers": figures.barriers,
        "in_flight": figures.loads_in_flight,
        "instructions": round(instructions / (largest.numel() // largest.shape[-1])),
        "issue": round(instructions / ISSUE_SLOTS / memory, 2) if kernel.capability == 90 else None,
    }


def broken_lines(kernel: Compiled, launch: Launch) -> Iterator[str]:
    """Each hard line that a kernel breaks, in words."""
    tokens = token_tensors(launch)
    allowed = SPILLS.get(kernel.kernel, 0) if kernel.capability != 90 else 0
    if kernel.spills > allowed:
        yield f"spills {kernel.spills} bytes a thread"
    limit = MAX_SHARED[kernel.capability]
    if kernel.shared > limit:
        yield f"takes {kernel.shared} bytes of shared memory, a block has {limit}"
    elif kernel.occupancy() == 0:
        yield f"fits no multiprocessor: {kernel.registers} registers a thread on {kernel.num_warps} warps"
    doubles = any(x.dtype == torch.float64 for x in tokens.values()) or kernel.kernel in FLOAT64
    if kernel.float64() and not doubles:
        yield f"computes in float64: {', '.join(kernel.float64())}"
    if not kernel.products() and kernel.kernel not in NARROW:
        accesses = kernel.accesses_by_tensor()
        for name in ("?", *tokens):
            narrow = sorted(width for width in accesses.get(name, {}) if int(width[2:]) < 128)
            if narrow:
                yield f"moves {name.removesuffix('_ptr')} by {', '.join(narrow)}, expected 128 bits"
    changed = kernel.machine_accesses().keys() - kernel.accesses().keys() - {"tma"}
    if changed:
        yield f"was assembled to {', '.join(sorted(changed))}, which the compiler had not asked for"
    wanted = TENSOR_CORE[kernel.capability]
    if kernel.products() & {"bf16", "f16"} and not kernel.tensor_core().keys() & set(wanted):
        found = ", ".join(kernel.tensor_core()) or "none"
        yield f"multiplies with tensor-core instructions {found}, expected {' or '.join(wanted)}"


def examine(setting: Setting) -> tuple[list[Row], list[Traffic]]:
    """Compile one setting's kernels and read what came out."""
    case = CASES.get(setting.op, (Case(),))[setting.case]
    rows, traffic = [], []
    for direction, launches in record(case, setting).items():
        for launch in launches:
            kernel = compile_launch(launch, setting.capability)
            tensors = tensor_arguments(launch.arguments).values()
            tabled = NARROW.get(kernel.kernel) == TABLED
            row = Row(
                op=setting.op,
                case=case.label,
                direction=direction,
                kernel=kernel.kernel,
                dtypes=setting.dtypes,
                width=setting.width,
                capability=setting.capability,
                warps=kernel.num_warps,
                registers=kernel.registers,
                spills=kernel.spills,
                shared=kernel.shared,
                occupancy=kernel.occupancy(),
                accesses=dict(sorted(kernel.machine_accesses().items())),
                tensor_core=kernel.tensor_core(),
                float64=kernel.float64(),
                bytes=0 if tabled else sum(x.numel() * x.itemsize for x in tensors),
                broken=tuple(broken_lines(kernel, launch)),
                **issued(kernel, launch),
            )
            if row not in rows:
                rows.append(row)
        if launches and case.whole and setting.op in EVERY:
            traffic.append(measure_traffic(EVERY[setting.op], case, setting, direction, launches))
    return rows, traffic


def measure_traffic(
    spec: OpSpec, case: Case, setting: Setting, direction: str, launches: Sequence[Launch]
) -> Traffic:
    """Bytes moved against `OpSpec`'s least elements, at the mean element size of the token tensors that were moved."""
    tensors = [x for launch in launches for x in tensor_arguments(launch.arguments).values()]
    tokens = [x for launch in launches for x in token_tensors(launch).values()]
    shape = (BATCH, case.tokens, case.width(setting.width))
    elements = spec.backward_elements if direction == "backward" else spec.forward_elements
    itemsize = sum(x.numel() * x.itemsize for x in tokens) / sum(x.numel() for x in tokens)
    return Traffic(
        op=setting.op,
        case=case.label,
        direction=direction,
        dtypes=setting.dtypes,
        width=setting.width,
        capability=setting.capability,
        moved=sum(x.numel() * x.itemsize for x in tensors),
        least=round(elements(*shape) * itemsize),
    )


def all_settings(
    ops: Sequence[str], dtypes: Sequence[str], widths: Sequence[int], capabilities: Sequence[int]
) -> list[Setting]:
    return [
        Setting(op, number, kind, width, capability)
        for op in ops
        for number, case in enumerate(CASES.get(op, (Case(),)))
        for width in widths
        for kind in dtypes
        for capability in capabilities
        if not case.head_dim or (width, kind) == (1152, "bf16")
        # AdamW's kernels do not know the width.
        if op != "adamw_ema" or width == widths[-1]
    ]


def small_settings(ops: Sequence[str]) -> list[Setting]:
    """The set that every test run examines: each case on sm_90 in bf16, each operation in one of two more corners.

    Attention of other heads and lengths is left to tests/operations/test_attention_aot.py.
    """
    corners = [("fp32", 384, 100), ("autocast", 768, 80)]
    each = [s for s in all_settings(ops, ["bf16"], [1152], [90]) if s.op != "attention" or s.case == 0]
    return each + [Setting(op, 0, *corners[number % 2]) for number, op in enumerate(ops)]


def report(settings: Sequence[Setting], jobs: int) -> tuple[list[Row], list[Traffic]]:
    """Examine all settings on `jobs` processes, in order."""
    rows: list[Row] = []
    traffic: list[Traffic] = []
    pool = ProcessPoolExecutor(jobs) if jobs > 1 else None
    try:
        results = pool.map(examine, settings) if pool else map(examine, settings)
        for found, moved in tqdm(results, total=len(settings), desc="compiling", file=sys.stderr):
            rows += found
            traffic += moved
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return rows, traffic


def failures(rows: Sequence[Row]) -> list[str]:
    """One line for each hard line that is broken."""
    return [
        f"{row.op}{f' ({row.case})' if row.case else ''} {row.direction}, {row.kernel.strip('_')}, {row.dtypes}, "
        f"D = {row.width}, sm_{row.capability}: {line}"
        for row in rows
        for line in row.broken
    ]


def as_json(rows: Sequence[Row], traffic: Sequence[Traffic]) -> str:
    """The figures of the tables, one kernel a line, and the versions that they hold for."""
    versions = {"torch": torch.__version__.split("+")[0], "triton": triton.__version__}
    lists = (
        f'"{name}": [\n' + ",\n".join(json.dumps(dataclasses.asdict(item)) for item in items) + "\n]"
        for name, items in (("kernels", rows), ("traffic", traffic))
    )
    return "{\n" + ",\n".join((f'"versions": {json.dumps(versions)}', *lists)) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What the compiler made of every kernel, without a GPU.")
    ops = (*EVERY, *STEPS)
    parser.add_argument("--op", nargs="+", choices=ops, default=ops)
    parser.add_argument("--capability", type=int, nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--width", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--small", action="store_true", help="only the small set that the tests examine")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a hard line is broken")
    parser.add_argument("--out", type=Path, help="folder for static_report.md and static_report.json")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument(
        "--matrix",
        action="store_true",
        help="compile every kernel for all that Triton specializes on instead",
    )
    args = parser.parse_args(arguments)
    if args.matrix:
        return compile_matrix(args.jobs)
    if args.small:
        settings = small_settings(args.op)
    else:
        settings = all_settings(args.op, args.dtypes, args.width, args.capability)
    rows, traffic = report(settings, args.jobs)
    text = markdown(rows, traffic, triton.__version__)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "static_report.md").write_text(text)
        (args.out / "static_report.json").write_text(as_json(rows, traffic))
    elif not args.check:
        print(text, end="")
    lines = failures(rows)
    if args.check:
        print("\n".join(lines) if lines else f"{len(rows)} kernels, no hard line broken")
    return 1 if args.check and lines else 0


if __name__ == "__main__":
    sys.exit(main())
