"""Kernels compiled by many processes before anything is timed, into the cache that Triton's launches read.

A launch is compiled by Triton's own launcher, for the architecture that it is given: what the disk cache then
holds is what a launch on such a device looks up. No device is needed, and none is touched.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.ops.op_bench import Bench
from benchmarks.ops.registry import REGISTRY
from dit_fast.kernels import tuned
from dit_fast.kernels.launch import Launch


class _Architecture:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Let Triton's launcher take the current device for one of sm_<capability>."""
    before = driver._active
    driver.set_active(_Architecture(capability))
    try:
        yield
    finally:
        driver._active = before


def compile_as_launched(launch: Launch) -> Any:
    """Compile a recorded launch as its launcher would, within `compiling_for`; tensors may be on the meta device."""
    return launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **launch.options)


@dataclass(frozen=True)
class Answer:
    """One answer of the search: kernel `name` of operation `op` with `option` for its launch configuration.

    given: answers to other questions, by (section, name).
    """

    op: str
    shape: tuple[int, int, int]
    dtypes: str
    name: str
    option: Any
    given: Mapping[tuple[str, str], Any] = field(default_factory=dict)


def compile_answer(answer: Answer, capability: int) -> str | None:
    """Compile what an answer launches; why not, in a line."""
    bench = Bench(REGISTRY[answer.op], answer.shape, answer.dtypes, "meta")
    try:
        with tuned.search({**answer.given, ("launches", answer.name): answer.option}):
            launches = bench.launches(answer.name, capability)
        with compiling_for(capability):
            for launch in launches:
                compile_as_launched(launch)
    # A configuration that does not compile is found again, and named, when it is its turn to be timed.
    except Exception as error:
        return f"{answer.name} {answer.option}: {(str(error).splitlines() or [''])[0]}"
    return None


def compile_answers(answers: Sequence[Answer], capability: int, jobs: int) -> Iterable[str]:
    """Compile all answers in `jobs` processes; yields why some did not compile."""
    # Not forked: a process that has used CUDA cannot be.
    with ProcessPoolExecutor(max(1, min(jobs, len(answers))), get_context("spawn")) as pool:
        for done in as_completed([pool.submit(compile_answer, answer, capability) for answer in answers]):
            if (why := done.result()) is not None:
                yield why
