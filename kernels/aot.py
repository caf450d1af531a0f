"""Compile recorded launches ahead of time, for GPUs that this machine does not have, and read what came out.

`ahead_of_time(run, capability)` carries out `run()` on meta tensors, so that each launcher chooses its own
configuration, and compiles what would have been launched with Triton's own ptxas. The report of one kernel says
registers, spilled bytes, shared memory, and the width of its accesses to global memory.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_fast.kernels.launch import Launch, record_launches

POINTER = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch. Sizes in bytes; `spills` is local memory a thread."""

    kernel: str
    capability: int
    num_warps: int
    registers: int
    spills: int
    shared: int
    ptx: str

    def accesses(self) -> dict[str, int]:
        """How many global loads and stores of each width in bits a thread issues: {"ld128": 6, ...}."""
        counts: dict[str, int] = {}
        pattern = r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)"
        for kind, lanes, bits in re.findall(pattern, self.ptx):
            key = f"{kind}{int(lanes or 1) * int(bits)}"
            counts[key] = counts.get(key, 0) + 1
        return counts


def ahead_of_time(run: Callable[[], Any], capability: int) -> list[Compiled]:
    """Compile every kernel that `run` launches on meta tensors for sm_<capability> (80, 90, 100, ...)."""
    with record_launches(capability) as launches:
        run()
    return [compile_launch(launch, capability) for launch in launches]


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile one launch as Triton's own binder would specialise it, for sm_<capability>."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTER[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options=launch.options)
    registers, spills = resources(binary.asm["cubin"])
    return Compiled(
        kernel=launch.kernel.fn.__name__,
        capability=capability,
        num_warps=launch.num_warps,
        registers=registers,
        spills=spills,
        shared=binary.metadata.shared,
        ptx=binary.asm["ptx"],
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (spills, stack) of a thread, as cuobjdump reads them from the binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", out.stdout + out.stderr)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {(out.stdout + out.stderr)[-200:]!r}")
    registers, stack, local = map(int, usage.groups())
    return registers, max(stack, local)
