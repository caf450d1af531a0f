"""Compile recorded launches ahead of time, for GPUs that this machine does not have, and read what came out.

`ahead_of_time(run, capability)` executes `run()` on meta tensors, so that each launcher chooses its own
configuration, and compiles what would have been launched with Triton's own ptxas. Of each kernel it tells
registers, spilled bytes, shared memory, occupancy, the instructions of the machine code (SASS), those of its main loop
(sass.py), and the width of the accesses to each tensor.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import create_function_from_signature

from benchmarks.compile import sass
from dit_fast.kernels.launch import Launch, record_launches

MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one block may have, in bytes (CUDA C++ Programming Guide, compute capabilities)."""

WARPS, REGISTERS, BLOCKS = 64, 65536, 32
"""Of one multiprocessor; the same on sm_80, sm_90 and sm_100."""

RESERVED_SHARED = 1024
"""Bytes that the driver takes for each block; the multiprocessor has MAX_SHARED + RESERVED_SHARED in all."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch. Sizes in bytes; `spills` is local memory a thread."""

    kernel: str
    capability: int
    num_warps: int
    registers: int
    spills: int
    shared: int
    tensors: tuple[str, ...]
    ttir: str
    ptx: str
    cubin: bytes

    def accesses(self) -> dict[str, int]:
        """How many global loads and stores of each width in bits a thread issues: {"ld128": 6, ...}."""
        return dict(Counter(width for width, _ in global_accesses(self.ptx)))

    def accesses_by_tensor(self) -> dict[str, dict[str, int]]:
        """`accesses` for each pointer argument, by name; what cannot be told apart is under "?"."""
        origins = pointer_origins(self.ptx)
        count = len(pointer_parameters(self.ptx))
        counts: dict[str, Counter[str]] = {}
        for width, register in global_accesses(self.ptx):
            roots = origins.get(register, set())
            # A kernel with descriptors has parameters of Triton's own between the tensors.
            known = len(roots) == 1 and count == len(self.tensors)
            name = self.tensors[next(iter(roots))] if known else "?"
            counts.setdefault(name, Counter())[width] += 1
        return {name: dict(counter) for name, counter in counts.items()}

    def instructions(self) -> dict[str, int]:
        """How often each instruction of interest is in the machine code, its modifiers included."""
        return machine_instructions(self.cubin)

    def figures(self) -> sass.Figures:
        """Barriers, instructions and loads in flight of the main loop."""
        return machine_figures(self.cubin)

    def machine_accesses(self) -> dict[str, int]:
        """`accesses` counted in the machine code; "tma" are bulk copies by descriptor."""
        counts: Counter[str] = Counter()
        for instruction, count in self.instructions().items():
            name, *modifiers = instruction.split(".")
            if name in ("LDG", "LDGSTS", "STG"):
                counts[f"{'st' if name == 'STG' else 'ld'}{width(modifiers)}"] += count
            elif name.startswith(("UTMA", "UBLKCP")):
                counts["tma"] += count
        return dict(counts)

    def tensor_core(self) -> dict[str, int]:
        """Tensor-core instructions by name: HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100), ..."""
        return self._named(r"[A-Z]*MMA", without="DMMA")

    def float64(self) -> dict[str, int]:
        """Instructions that compute in float64, or convert to or from it."""
        return self._named(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)|\w+\..*F64.*|MUFU\.RCP64H.*|MUFU\.RSQ64H.*")

    def _named(self, pattern: str, without: str = "") -> dict[str, int]:
        counts: Counter[str] = Counter()
        for instruction, count in self.instructions().items():
            name = instruction.split(".")[0]
            if name != without and (re.fullmatch(pattern, instruction) or re.fullmatch(pattern, name)):
                counts[name] += count
        return dict(counts)

    def products(self) -> set[str]:
        """Element types of the operands of `tl.dot` in the kernel; empty for one that is bound by memory."""
        dots = re.findall(r"tt\.dot .*?: tensor<[\dx]+x(\w+)> \* tensor", self.ttir)
        return set(dots)

    def occupancy(self) -> float:
        """Resident warps over the most that a multiprocessor holds, as registers, shared memory and warps allow."""
        per_warp = -(-max(self.registers, 1) * 32 // 256) * 256
        by_registers = REGISTERS // 4 // per_warp * 4 // self.num_warps
        total = MAX_SHARED[self.capability] + RESERVED_SHARED
        by_shared = total // (-(-self.shared // 128) * 128 + RESERVED_SHARED)
        return min(by_registers, by_shared, WARPS // self.num_warps, BLOCKS) * self.num_warps / WARPS


def ahead_of_time(run: Callable[[], Any], capability: int) -> list[Compiled]:
    """Compile every kernel that `run` launches on meta tensors for sm_<capability> (80, 90, 100, ...)."""
    with record_launches(capability) as launches:
        run()
    return [compile_launch(launch, capability) for launch in launches]


def specialize(launch: Launch, capability: int) -> ASTSource:
    """What Triton compiles for a launch: signature, constants and attributes from the binder that its launcher has.

    1 and None become constants; integers that are multiples of 16, and pointers aligned to 16 bytes, are marked as
    such. A fresh meta tensor counts as aligned, a view of one by its offset.
    """
    kernel, backend = launch.kernel, make_backend(target(capability))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**launch.arguments, **launch.options}
    _, signature, constants, attributes = kernel._pack_args(backend, keywords, *binder(**keywords))
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def target(capability: int) -> GPUTarget:
    """sm_<capability>, as Triton names it."""
    return GPUTarget("cuda", capability, 32)


def lower(launch: Launch, capability: int) -> str:
    """The TTIR of a launch: Triton's front end alone, which reads the Python source; a tenth of a compilation."""
    source, backend, context = specialize(launch, capability), make_backend(target(capability)), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(launch.options)
    helpers = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(source.make_ir(target(capability), options, *helpers, context))


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile one launch for sm_<capability> as Triton's launcher would."""
    source = specialize(launch, capability)
    binary = triton.compile(source, target=target(capability), options=launch.options)
    registers, spills = resources(binary.asm["cubin"])
    return Compiled(
        kernel=launch.kernel.fn.__name__,
        capability=capability,
        num_warps=launch.num_warps,
        registers=registers,
        spills=spills,
        shared=binary.metadata.shared,
        tensors=tuple(name for name, kind in source.signature.items() if kind.startswith("*")),
        ttir=binary.asm["ttir"],
        ptx=binary.asm["ptx"],
        cubin=binary.asm["cubin"],
    )


def global_accesses(ptx: str) -> Iterator[tuple[str, str]]:
    """("ld128", address register) of each global load, store and asynchronous copy in PTX, bulk copies aside."""
    pattern = r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)[^\[;]*\[\s*(%\w+)"
    for kind, lanes, bits, register in re.findall(pattern, ptx):
        yield f"{kind}{int(lanes or 1) * int(bits)}", register
    copies = (
        r"\bcp\.async\.c[ag]\.shared\S*\.global\S*\s+\[[^\]]*\],\s*\[\s*(%\w+)[^\]]*\],\s*(0x[0-9a-f]+|\d+)"
    )
    for register, size in re.findall(copies, ptx):
        yield f"ld{8 * int(size, 0)}", register


def pointer_parameters(ptx: str) -> list[str]:
    """The entry's pointer parameters in order, without Triton's two scratch pointers at the end."""
    return re.findall(r"\.param \.u64 \.ptr \.global [^,\n]*?(\w+),?\n", ptx)[:-2]


def pointer_origins(ptx: str) -> dict[str, set[int]]:
    """For each 64-bit register that holds an address, the indices of the pointer parameters it comes from."""
    parameters = {name: index for index, name in enumerate(pointer_parameters(ptx))}
    origins: dict[str, set[int]] = {}
    for register, name in re.findall(r"ld\.param\.[bu]64\s+(%\w+), \[(\w+)\]", ptx):
        if name in parameters:
            origins[register] = {parameters[name]}
    moves = re.findall(r"\b(?:add|sub|mov|mad|selp)\.\S+\s+(%rd\d+), ([^;]+);", ptx)
    changed = True
    while changed:
        changed = False
        for target, operands in moves:
            found = set().union(*(origins.get(name, ()) for name in re.findall(r"%rd\d+", operands)))
            if not found <= origins.get(target, set()):
                origins[target] = origins.get(target, set()) | found
                changed = True
    return origins


def width(modifiers: list[str]) -> int:
    """Bits that an SASS load or store moves a thread."""
    for modifier in modifiers:
        if modifier in ("64", "128", "256"):
            return int(modifier)
        if modifier in ("U8", "S8", "U16", "S16"):
            return int(modifier[1:])
    return 32


INTERESTING = r"LDG|STG|LDGSTS|LDL|STL|UTMA\w*|UBLKCP\w*|ATOM\w*|RED|[A-Z]*MMA|D(?:ADD|MUL|FMA|SETP|MNMX)"


def machine_instructions(cubin: bytes) -> dict[str, int]:
    """SASS instructions of a binary that tell of memory, tensor cores or float64, counted; kept in Triton's cache."""
    key = hashlib.sha256(INTERESTING.encode() + cubin).hexdigest()
    cache = get_cache_manager(key)
    if (found := cache.get_file("instructions.json")) is not None:
        return json.loads(Path(found).read_text())
    text = cuda_tool("cuobjdump", "-sass", cubin)
    pattern = rf"(?<![\w.])(?:(?:{INTERESTING})(?:\.\w+)*|[A-Z]\w*(?:\.\w+)*\.(?:F64|RCP64H|RSQ64H)(?:\.\w+)*)(?![\w])"
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    if not code:
        raise RuntimeError(f"cuobjdump printed no instructions: {text[-200:]!r}")
    counts = dict(Counter(instruction for instruction in code if re.fullmatch(pattern, instruction)))
    cache.put(json.dumps(counts), "instructions.json", binary=False)
    return counts


def machine_figures(cubin: bytes) -> sass.Figures:
    """`sass.figures` of a binary, kept in Triton's cache."""
    cache = get_cache_manager(hashlib.sha256(Path(sass.__file__).read_bytes() + cubin).hexdigest())
    if (found := cache.get_file("figures.json")) is not None:
        return sass.Figures(**json.loads(Path(found).read_text()))
    figures = sass.figures(cuda_tool("cuobjdump", "-sass", cubin))
    cache.put(json.dumps(asdict(figures)), "figures.json", binary=False)
    return figures


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (spills, stack) of a thread, as cuobjdump reads them from the binary."""
    out = cuda_tool("cuobjdump", "-res-usage", cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", out)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {out[-200:]!r}")
    registers, stack, local = map(int, usage.groups())
    return registers, max(stack, local)


def cuda_tool(name: str, option: str, cubin: bytes) -> str:
    """What the CUDA binary tool that ships inside Triton prints of a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return out.stdout + out.stderr
