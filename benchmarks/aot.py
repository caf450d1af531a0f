"""Ahead-of-time report of every kernel: `python -m benchmarks.aot [--capability 80 90 100] [--out FILE.md]`.

Compiles what each registered operation launches at DiT-XL/2's training shape (B = 256, T = 256, D = 1152) and prints
registers, spilled bytes, shared memory and global accesses by width. Needs no GPU.
"""

import argparse
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from dit_fast.kernels.aot import Compiled, ahead_of_time
from dit_fast.kernels.registry import REGISTRY

SHAPE = (256, 256, 1152)
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
}
CAPABILITIES = (80, 90, 100)


def meta(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def launches(name: str, stream: torch.dtype, low: torch.dtype) -> Iterator[Callable[[], Any]]:
    """The forward and the backward launcher of an operation on meta tensors."""
    adaln = importlib.import_module("dit_fast.kernels.adaln")
    gated = importlib.import_module("dit_fast.kernels.gated_residual")
    fused = importlib.import_module("dit_fast.kernels.gated_residual_adaln")
    patchify = importlib.import_module("dit_fast.kernels.patchify")
    inputs = REGISTRY[name].make_inputs(SHAPE, stream, low, meta)
    moments = meta(*SHAPE[:2], dtype=torch.float32)
    if name == "adaln_modulate":
        x, shift, scale = inputs
        dy = meta(*SHAPE, dtype=low)
        yield lambda: adaln._forward(x, shift, scale, 1e-6)
        yield lambda: adaln._backward(dy, x, scale, moments, moments)
    elif name == "gated_residual":
        x, branch, gate, bias = inputs
        yield lambda: gated._residual(x, branch, gate, bias)
        yield lambda: gated._residual_backward(x, branch, gate, bias)
    elif name == "gated_residual_adaln":
        x, branch, gate, shift, scale, bias = inputs
        dy = meta(*SHAPE, dtype=low)
        yield lambda: fused._forward(x, branch, gate, shift, scale, bias, 1e-6)
        yield lambda: fused._backward(x, dy, x, branch, gate, scale, moments, moments, bias)
    elif name == "patch_embed":
        image, weight, bias, pos = inputs
        dtokens = meta(*SHAPE, dtype=torch.promote_types(stream, low))
        yield lambda: patchify._embed(image, weight, bias, pos)
        yield lambda: patchify._embed_backward(dtokens, image, weight, True)
    elif name == "unpatchify":
        tokens, patch, height, width = inputs
        images = meta(SHAPE[0], 8, height * patch, width * patch, dtype=low)
        yield lambda: patchify._unpatchify(tokens, patch, height, width)
        yield lambda: patchify._patchify(images, patch)
    else:
        raise KeyError(f"no launches written down for {name}")


def compile_all(name: str, dtypes: str, capability: int) -> list[Compiled]:
    """Every kernel of an operation, forward and backward, compiled for sm_<capability>."""
    return [kernel for run in launches(name, *DTYPES[dtypes]) for kernel in ahead_of_time(run, capability)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, spills and memory accesses of every kernel.")
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    rows = [
        f"Triton {triton.__version__}, B, T, D = {SHAPE}. Accesses are global loads and stores a thread issues, "
        "by width in bits.",
        "",
        "| kernel | dtypes | sm | warps | registers | spilled bytes | shared bytes | accesses |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(rows))
    for name in REGISTRY:
        for dtypes in DTYPES:
            for capability in args.capability:
                for kernel in compile_all(name, dtypes, capability):
                    accesses = ", ".join(
                        f"{key} x {count}" for key, count in sorted(kernel.accesses().items())
                    )
                    rows.append(
                        f"| {kernel.kernel.strip('_')} | {dtypes} | {capability} | {kernel.num_warps} | "
                        f"{kernel.registers} | {kernel.spills} | {kernel.shared} | {accesses} |"
                    )
                    print(rows[-1], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
