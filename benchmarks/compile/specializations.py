"""Every kernel compiled for what Triton specializes a launch on, without a GPU.

Triton compiles a kernel again for another dtype, architecture or set of pointers that are None, and for what it finds
in the other arguments: an integer that is 1 becomes a constant, one that is a multiple of 16 and a pointer aligned to
16 bytes are marked as such, one beyond 32 bits gets a wider type. A kernel that compiles for one set may fail for
another: `B.to(tl.int64)` is an error where B is 1.

`recordings` calls every operation in the ways that lead to other pointers and constants. Two sets come from them:
`sources`, each subset of the integers as 1, which the front end (Python to TTIR) reads; and `binaries`, assembled to
machine code, a covering of all pairs of values that two properties of a launch may have, and of each on its own.
Alignment does not reach the front end; it reads the same source for each architecture.
"""

import dataclasses
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.compile.aot import compile_launch, lower
from benchmarks.ops.registry import DUALS, REGISTRY, Make, OpSpec, Shape, dual
from dit_fast.kernels import AdamWSettings, AdamWTensors, adamw_ema, grad_square_sum, mlp
from dit_fast.kernels.launch import Launch, record_launches
from dit_fast.kernels.recompute import adaln_from_moments
from dit_fast.model.layers import swiglu_width

CAPABILITIES = (80, 90, 100)
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "autocast": (torch.float32, torch.bfloat16),
    "autocast-fp16": (torch.float32, torch.float16),
}
SHAPES: tuple[Shape, ...] = ((256, 256, 1152), (1, 1, 384), (2, 81, 72), (4, 1024, 1024))
"""(B, T, D), T a square for patches: the model's, one image of one patch, no full tile, long attention."""


def swiglu_mlp_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Tensor, ...]:
    """What `mlp` takes for a SwiGLU as wide as a model's."""
    B, T, D = shape
    F = swiglu_width(4 * D)
    weights = make(2 * F, D, dtype=stream), make(2 * F, dtype=stream), make(D, F, dtype=stream)
    return make(B, T, D, dtype=low), *weights


SPECS: tuple[OpSpec, ...] = (
    *REGISTRY.values(),
    *DUALS.values(),
    *(dual(spec) for spec in REGISTRY.values() if f"{spec.key}-dual" in DUALS),
    dataclasses.replace(
        REGISTRY["mlp"], op=partial(mlp, activation="swiglu"), variant="swiglu", make_inputs=swiglu_mlp_inputs
    ),
)

KEYWORDS: dict[str, tuple[dict[str, Any], ...]] = {
    "mlp-swiglu": ({"keep_activation": False}, {"keep_activation": True}),
    "mlp": tuple(
        {"epilogue": epilogue, "keep_activation": keep}
        for epilogue in ("separate", "triton")
        for keep in (False, True)
    ),
}
"""Operations with keywords that lead to other kernels or pointers."""

INTEGERS = {"1": 1, "16n": 48, "odd": 33}
"""What Triton tells apart in an integer; the values do not matter to the compiler."""

WIDE = 2**31 + 1
"""An integer beyond 32 bits; strides between samples, and counts of all elements, may be."""

POINTERS = ("aligned", "misaligned")


def meta(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def record_adamw(
    width: int,
    grad_dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
    *,
    ema: bool = True,
    max_norm: float | None = 1.0,
    scaled: bool = True,
) -> None:
    """One AdamW step on two float32 parameters; `scaled`: it reads a flag whether a gradient is not finite."""
    shapes = ((4 * width, width), (width,))

    def tensors(dtype: torch.dtype) -> list[Tensor]:
        return [meta(*shape, dtype=dtype) for shape in shapes]

    params, exp_avgs, exp_avg_sqs, averages = (tensors(torch.float32) for _ in range(4))
    steps = [meta(dtype=torch.float32) for _ in shapes]
    copies = None if copy_dtype is None else tensors(copy_dtype)
    state = AdamWTensors(params, exp_avgs, exp_avg_sqs, steps, averages if ema else None, copies)
    grads, scalar = tensors(grad_dtype), meta(dtype=torch.float32)
    square_sum = None if max_norm is None else grad_square_sum(state, grads, kernels="triton")
    settings = AdamWSettings(weight_decay=0.1, ema_warmup=ema, max_norm=max_norm)
    found_inf = scalar if scaled else None
    adamw_ema(state, grads, scalar, settings, square_sum=square_sum, found_inf=found_inf, kernels="triton")


def record_recomputed_norm(shape: Shape, stream: torch.dtype, low: torch.dtype) -> None:
    """The modulated norm from its moments, as recomputation launches it."""
    B, T, D = shape
    x, moments = meta(B, T, D, dtype=stream), meta(B, T, dtype=torch.float32)
    shift, scale = meta(B, 2 * D, dtype=low).chunk(2, dim=1)
    adaln_from_moments(x, moments, moments, shift, scale)


@dataclass(frozen=True)
class Recorded:
    """A launch and how it came about; `name` is the kernel's."""

    launch: Launch
    capability: int
    dtypes: str
    shape: Shape

    @property
    def name(self) -> str:
        return self.launch.kernel.fn.__name__

    def arguments(self) -> dict[str, Any]:
        """What Triton looks at: the arguments that are not `tl.constexpr`."""
        return {
            parameter.name: self.launch.arguments[parameter.name]
            for parameter in self.launch.kernel.params
            if not parameter.is_constexpr
        }

    def absent(self) -> tuple[str, ...]:
        """The pointers that are None."""
        return tuple(name for name, value in self.arguments().items() if value is None)

    def source(self) -> tuple[Any, ...]:
        """What decides which lines of it the front end reads: types, and whether a constant is 0, 1 or more."""
        arguments = self.arguments()
        constants = {
            name: min(value, 2) if isinstance(value, int) else value
            for name, value in self.launch.arguments.items()
            if name not in arguments
        }
        types = {name: value.dtype for name, value in arguments.items() if isinstance(value, Tensor)}
        return str(constants), str(types), self.absent()

    def replace(self, values: dict[str, str]) -> "Recorded":
        """The launch with arguments of other `values`: keys of INTEGERS, "wide", or words of POINTERS."""
        arguments = dict(self.launch.arguments)
        for name, word in values.items():
            old = arguments[name]
            arguments[name] = (
                placed(old, word) if isinstance(old, Tensor) else {**INTEGERS, "wide": WIDE}[word]
            )
        return dataclasses.replace(self, launch=dataclasses.replace(self.launch, arguments=arguments))


def placed(tensor: Tensor, word: str) -> Tensor:
    """A meta tensor like `tensor`, its address a multiple of 16 bytes or one element beyond one."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    base = tensor.new_empty(max(extent, 1) + 1)
    return base.as_strided(tensor.shape, tensor.stride(), 1 if word == "misaligned" else 0)


def optional_inputs(spec: OpSpec, inputs: Sequence[Any]) -> list[str]:
    """The tensors that a caller may leave out."""
    parameters = inspect.signature(spec.op).parameters
    return [
        name
        for name, value in zip(parameters, inputs, strict=False)
        if isinstance(value, Tensor) and parameters[name].default is None
    ]


def calls(spec: OpSpec, shape: Shape, dtypes: str) -> Iterator[Callable[[], None]]:
    """Each way to call an operation: with and without what is optional, and with the gradients of all, one or none."""
    names = list(inspect.signature(spec.op).parameters)
    plain = spec.make_inputs(shape, *DTYPES[dtypes], meta)
    optional = optional_inputs(spec, plain)
    for kept in itertools.product((True, False), repeat=len(optional)):
        gone = {name for name, keep in zip(optional, kept, strict=True) if not keep}
        inputs = [None if name in gone else value for name, value in zip(names, plain, strict=False)]
        for keywords in KEYWORDS.get(spec.key, ({},)):
            for wanted in (len(inputs), 1, 0):

                def call(inputs=inputs, keywords=keywords, wanted=wanted) -> None:
                    differentiable = spec.differentiable(inputs)
                    leaves = [
                        value.detach().requires_grad_(index < wanted and differentiable[index])
                        if isinstance(value, Tensor)
                        else value
                        for index, value in enumerate(inputs)
                    ]
                    outputs = spec.op(*leaves, **keywords, kernels="triton")
                    outputs = [
                        x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad
                    ]
                    if outputs:
                        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])

                yield call


def step_calls(shape: Shape, dtypes: str) -> Iterator[Callable[[], None]]:
    """The operations without a gradient."""
    stream, low = DTYPES[dtypes]
    yield partial(record_recomputed_norm, shape, stream, low)
    for ema, max_norm, scaled in itertools.product((True, False), (1.0, None), (True, False)):
        for copy in (None, low) if low.itemsize == 2 else (None,):
            yield partial(record_adamw, shape[2], low, copy, ema=ema, max_norm=max_norm, scaled=scaled)


def recordings(
    capabilities: Iterable[int] = CAPABILITIES,
    dtypes: Iterable[str] = DTYPES,
    shapes: Iterable[Shape] = SHAPES,
) -> dict[str, list[Recorded]]:
    """By kernel, the launches that differ in their source or in their options."""
    found: dict[str, dict[Any, Recorded]] = defaultdict(dict)
    for capability, kind, shape in itertools.product(capabilities, dtypes, shapes):
        ways = (call for spec in SPECS for call in calls(spec, shape, kind))
        for call in itertools.chain(ways, step_calls(shape, kind)):
            with record_launches(capability) as launches:
                call()
            for launch in launches:
                item = Recorded(launch, capability, kind, shape)
                key = (capability, kind, item.source(), str(launch.options))
                found[item.name].setdefault(key, item)
    return {name: list(items.values()) for name, items in found.items()}


def choices(item: Recorded) -> dict[str, tuple[str, ...]]:
    """The values that each argument of a launch may take."""
    taken: dict[str, tuple[str, ...]] = {}
    for name, value in item.arguments().items():
        if isinstance(value, Tensor):
            taken[name] = POINTERS
        elif value is not None:
            wide = name.startswith("stride") or name in ("total", "BLOCKS")
            taken[name] = (*INTEGERS, "wide") if wide else tuple(INTEGERS)
    if item.launch.arguments.get("P", 1) > 1:
        # An image is as wide as a patch: of 1 the compiler divides 0 by 0, and fails.
        taken["W"] = ("16n", "odd")
    if item.launch.arguments.get("DESCRIPTORS"):
        # The launcher makes descriptors of aligned tensors whose rows are multiples of 16 bytes, nothing else.
        taken |= {name: ("16n",) for name in ("N", "K")}
        taken |= {name: ("aligned",) for name in ("x_ptr", "dout_ptr", "w_ptr") if name in taken}
    return taken


def sources(items: Sequence[Recorded]) -> Iterator[Recorded]:
    """Each source that the front end may meet, with no integer and with all as 1; with every subset once for each set
    of pointers that are None.
    """
    seen, patterns = set(), set()
    for item in items:
        if item.source() in seen:
            continue
        seen.add(item.source())
        integers = [name for name, words in choices(item).items() if words[0] == "1"]
        subsets = itertools.product(("odd", "1"), repeat=len(integers))
        for words in (
            subsets if item.absent() not in patterns else {(word,) * len(integers) for word in ("odd", "1")}
        ):
            yield item.replace(dict(zip(integers, words, strict=True)))
        patterns.add(item.absent())


def binaries(items: Sequence[Recorded]) -> list[Recorded]:
    """A covering of all pairs of values that two properties of a launch may have together.

    Properties are the architecture, dtypes, which pointers are None, and the kind of every argument; a shape, which
    decides constants alone, meets each architecture. Greedy: each launch covers the first pair that is left, and as
    many others as its arguments can.
    """
    possible = []
    for item in items:
        fixed = {
            "capability": item.capability, "dtypes": item.dtypes, "shape": item.shape, "absent": item.absent(),
            "centred": item.launch.arguments.get("CENTRED"), "descriptors": item.launch.arguments.get("DESCRIPTORS"),
        }  # fmt: skip
        possible.append({**{name: (value,) for name, value in fixed.items()}, **choices(item)})
    # A dict, since a set of strings has another order in each process.
    pairs = {
        ((a, x), (b, y)): None
        for values in possible
        for (a, first), (b, second) in itertools.combinations(values.items(), 2)
        if b != "shape" or a == "capability"
        if a != "shape"
        for x in first
        for y in second
    }
    chosen = []
    while pairs:
        wanted = dict(next(iter(pairs)))
        able = [
            (index, values)
            for index, values in enumerate(possible)
            if all(word in values.get(name, ()) for name, word in wanted.items())
        ]
        index, values = max(able, key=lambda one: fixed_gain(one[1], pairs))
        cells: list[tuple[str, Any]] = []
        for name, words in values.items():
            words = (wanted[name],) if name in wanted else words
            cells.append(
                max(
                    ((name, word) for word in words),
                    key=lambda new: sum((cell, new) in pairs for cell in cells),
                )
            )
        for pair in itertools.combinations(cells, 2):
            pairs.pop(pair, None)
        arguments = items[index].arguments()
        chosen.append(items[index].replace({name: word for name, word in cells if name in arguments}))
    return chosen


def fixed_gain(values: dict[str, tuple[Any, ...]], pairs: dict[Any, None]) -> int:
    """How many of `pairs` the fixed properties cover."""
    cells = [(name, words[0]) for name, words in values.items() if len(words) == 1]
    return sum(pair in pairs for pair in itertools.combinations(cells, 2))


Job = tuple[Callable[[Launch, int], Any], Recorded]
"""`lower` or `compile_launch`, and what it takes."""


def attempt(job: Job) -> str | None:
    """What is wrong with a launch, in one line; None where it compiles."""
    compiler, item = job
    try:
        compiler(item.launch, item.capability)
    except Exception as error:
        arguments = {
            name: value if isinstance(value, int) else f"{value.dtype}+{value.data_ptr() % 16}"
            for name, value in item.arguments().items()
            if value is not None
        }
        lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else type(error).__name__
        return f"{item.name} sm_{item.capability} {item.dtypes} {item.shape} {arguments}: {reason}"
    return None


def failures(jobs: Sequence[Job], processes: int) -> list[str]:
    """Compile everything on `processes` processes and describe what fails."""
    global _jobs
    # Kernels cannot be pickled: the processes inherit the list and are sent indices.
    _jobs = jobs
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        indices = range(len(jobs))
        results = pool.map(_attempt, indices, chunksize=4) if processes > 1 else map(_attempt, indices)
        return [line for line in tqdm(results, total=len(jobs), desc="compiling", mininterval=10) if line]


_jobs: Sequence[Job] = ()


def _attempt(index: int) -> str | None:
    return attempt(_jobs[index])


def compile_matrix(processes: int) -> int:
    """Compile everything, print how much and what failed; the exit status."""
    kernels = recordings()
    read: list[Job] = [(lower, item) for items in kernels.values() for item in sources(items)]
    built: list[Job] = [(compile_launch, item) for items in kernels.values() for item in binaries(items)]
    broken = failures([*read, *built], processes)
    print("\n".join(broken), end="\n" if broken else "")
    print(
        f"{len(kernels)} kernels: {len(read)} specializations read by the front end, {len(built)} compiled to machine "
        f"code for {', '.join(f'sm_{capability}' for capability in CAPABILITIES)}: {len(broken)} failures"
    )
    return 1 if broken else 0
