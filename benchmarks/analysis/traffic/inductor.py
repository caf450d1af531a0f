"""What Inductor generates for a workload, launch by launch, read from its scheduler while it generates.

Reads internals of PyTorch 2.13 and runs in the counting process only. Every generated Triton kernel passes
`TritonScheduling.define_kernel`, every other launch `Scheduler.codegen_extern_call`; the generated wrapper is
searched for launches afterwards, and a count that differs is an error.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.codegen.simd_kernel_features import NodeScheduleMarker
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import Scheduler
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.analysis.traffic import PHASES, Pass, Program, Traffic, TrafficError, ours
from benchmarks.analysis.traffic.ours import kind_of, tensor_bytes
from dit_fast.kernels import tuned

LAUNCH = re.compile(
    r"^\s+(?:\w+ = )?(?:\w+\.run|extern_kernels\.\w+|torch\.ops\.\w+\.\w+\.\w+|aten\.\w+\.\w+)\(",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Workload:
    """A function and its example arguments on the device "cuda"; `backward` differentiates its (first) output."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    backward: bool = True


@dataclass
class Recorder:
    """What was seen since the last `clear`."""

    phase: str = PHASES[0]
    passes: Counter[Pass] = field(default_factory=Counter)
    calls: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    seen: int = 0
    generated: int = 0
    parameters: list[bool] = field(default_factory=list)
    kept: int = 0
    weights: int = 0

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    def add(self, kind: str, name: str, read: int, write: int) -> None:
        self.passes[Pass(self.phase, kind, name, read, write)] += 1


@contextmanager
def recording() -> Iterator[Recorder]:
    """Tell a Recorder of everything that Inductor generates meanwhile."""
    recorder = Recorder()
    define_kernel, extern_call = TritonScheduling.define_kernel, Scheduler.codegen_extern_call

    def on_kernel(self: Any, source: str, schedule: Any, kernel: Any) -> str:
        name = define_kernel(self, source, schedule, kernel)
        recorder.seen += 1
        recorder.add("inductor", short_name(name), *kernel_bytes(schedule, kernel))
        return name

    def on_extern(self: Any, node: Any) -> None:
        extern_call(self, node)
        record_extern(node.node, recorder)

    def on_code(code: str) -> None:
        recorder.generated += len(LAUNCH.findall(code[code.index("def call(") :]))

    with (
        mock.patch.object(TritonScheduling, "define_kernel", on_kernel),
        mock.patch.object(Scheduler, "codegen_extern_call", on_extern),
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(on_code)),
    ):
        yield recorder


def short_name(kernel: str) -> str:
    """The generated name without what differs between two copies of a kernel: prefix and number."""
    return re.sub(r"_\d+$", "", kernel.removeprefix("triton_"))


def kernel_bytes(schedule: Any, kernel: Any) -> tuple[int, int]:
    """Bytes that a generated kernel reads and writes: the elements of each buffer that it touches, once each.

    A buffer that the kernel writes and then reads again is written only; one that fusion removed is neither. An
    access through an index tensor (look-up, scatter) counts as the whole buffer.
    """
    reads: dict[str, set[Any]] = {}
    writes: dict[str, set[Any]] = {}
    for node in NodeScheduleMarker.only_nodes(schedule):
        for dependencies, of_node in ((reads, node.read_writes.reads), (writes, node.read_writes.writes)):
            for dependency in of_node:
                name = V.graph.scheduler.mutation_real_name.get(dependency.name, dependency.name)
                dependencies.setdefault(name, set()).add(dependency)
    shared = {id(b): b for b in kernel.args.inplace_buffers.values() if hasattr(b, "other_names")}.values()
    inputs = [*kernel.args.input_buffers, *(buffer.other_names[0] for buffer in shared)]
    outputs = [name for name, inner in kernel.args.output_buffers.items() if isinstance(inner, str)]
    outputs += [buffer.other_names[-1] for buffer in shared]
    workspaces = sum(_number(argument.count) for argument in kernel.args.workspace_args)
    read = sum(_touched(name, reads[name]) for name in inputs if name in reads)
    kept = [name for name in outputs if name in writes and name not in V.graph.removed_buffers]
    return read, sum(_touched(name, writes[name]) for name in kept) + workspaces


def _touched(name: str, dependencies: set[Any]) -> int:
    """Bytes of buffer `name` that are touched: through each distinct index, at most the whole buffer."""
    whole = _number(V.graph.get_numel(name))
    through: dict[str, int] = {}
    for dependency in dependencies:
        direct = isinstance(dependency, MemoryDep)
        index = str(dependency.index) if direct else "*"
        elements = _number(dependency.get_numel()) if direct else whole
        through[index] = max(through.get(index, 0), elements)
    return min(whole, sum(through.values())) * V.graph.get_dtype(name).itemsize


def _number(expression: Any) -> int:
    return int(V.graph.sizevars.optimization_hint(expression))


def record_extern(node: Any, recorder: Recorder) -> None:
    """A launch that is not a generated kernel: a library's, PyTorch's, or an operation of dit_fast."""
    if isinstance(node, ir.MultiOutput | ir.NopKernel):
        return
    recorder.seen += 1
    overload = getattr(node, "op_overload", None)
    origins = [origin for origin in node.origins if origin.op == "call_function"]
    origin = next((one for one in origins if one.target is overload), None)
    if origin is None:
        origin = node.get_origin_node() or (origins[0] if origins else None)
    if origin is None:
        raise TrafficError(f"no operation of the graph belongs to the launch {type(node).__name__}")
    values = torch.fx.map_arg((origin.args, origin.kwargs), lambda one: one.meta["val"])
    target: Any = origin.target
    if target.namespace == "dit_fast":
        recorder.calls.append((recorder.phase, target, *ours.on_meta(values)))
        return
    read = sum(map(tensor_bytes, ours.tensors(values)))
    write = sum(map(tensor_bytes, ours.tensors(origin.meta["val"])))
    recorder.add(kind_of(target), target.name(), read, write)


def count_eager(program: Program, factory: Callable[..., Workload]) -> Traffic:
    """Run a workload operation by operation on fake CPU tensors, whose backward pass stays in this thread."""
    found: Counter[Pass] = Counter()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        workload = factory(program, **program.settings)
        interceptor = ours.Interceptor([], given=workload.arguments)
        with interceptor, torch.set_grad_enabled(workload.backward):
            output = workload.function(*workload.arguments)
            forward = len(interceptor.counted)
            if workload.backward:
                output.backward()
    for index, one in enumerate(interceptor.counted):
        found[Pass(PHASES[index >= forward], *one)] += 1
    return Traffic(found)


def count(program: Program, factory: Callable[..., Workload], recorder: Recorder) -> Traffic:
    """Compile a workload, forward and (joint) backward, and count what it launches."""
    if not program.compiled:
        return count_eager(program, factory)
    recorder.clear()
    torch._dynamo.reset()
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        recorder.parameters = [isinstance(value, torch.nn.Parameter) for value in example]
        return compile_fx(graph, example, inner_compile=inner)

    def inner(graph: torch.fx.GraphModule, example: Any, **kwargs: Any) -> Any:
        recorder.phase = PHASES[bool(kwargs.get("is_backward"))]
        shapes_only = copy.deepcopy(graph)  # Inductor rewrites the graph that it compiles
        compile_fx_inner(graph, example, **kwargs)
        if kwargs.get("is_backward"):
            recorder.kept, recorder.weights = kept_bytes(shapes_only, recorder.parameters)

        def run(arguments: list[Any]) -> Any:
            with fake:  # the backward pass runs in a thread of its own
                return torch.fx.Interpreter(shapes_only).run(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    autocast = torch.autocast("cuda", torch.bfloat16, enabled=program.mode != "bf16")
    with fake:
        with torch.device("cuda"):
            workload = factory(program, **program.settings)
        compiled = torch.compile(workload.function, backend=backend, fullgraph=True, dynamic=False)
        with autocast, torch.set_grad_enabled(workload.backward):
            output = compiled(*workload.arguments)
        if workload.backward:
            first = output if isinstance(output, Tensor) else output[0]
            first.backward(torch.empty_like(first))
    if recorder.seen != recorder.generated:
        raise TrafficError(f"{recorder.seen} launches counted, {recorder.generated} in the generated code")
    with tuned.search({("choices", name): choice for name, choice in program.choices.items()}):
        for phase, operation, arguments, keywords in recorder.calls:
            recorder.phase = phase
            for launch in ours.launches(operation, arguments, keywords):
                recorder.add(*launch)
    return Traffic(recorder.passes.copy(), recorder.kept, recorder.weights)


def kept_bytes(graph: torch.fx.GraphModule, parameters: list[bool]) -> tuple[int, int]:
    """Bytes of the distinct storages a backward graph takes beside the incoming gradient: kept ones, parameters."""
    storages: dict[int, tuple[bool, int]] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node.name.startswith("tangents"):
            continue
        primal = re.fullmatch(r"primals_(\d+)", node.name)
        weight = bool(primal) and parameters[int(primal[1]) - 1] if primal else False
        storage = value.untyped_storage()
        storages[storage._cdata] = (weight, storage.nbytes())
    sizes = storages.values()
    return sum(size for weight, size in sizes if not weight), sum(size for weight, size in sizes if weight)
