"""Launches under guard, in the interpreter: between protected pages, and far beyond 32-bit offsets.

A protected page beside each argument turns an access outside it into a segmentation fault of a child process; bytes
of the page and of a strided view's gaps that are not the argument's hold a canary. Large launches lie in sparse files.
"""

import copy
import ctypes
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_fast.kernels.launch import Launch
from tests.kernels.interpreter import in_child

Side = Literal["above", "below"]
CANARY = 0xFF  # NaN in every float, so that a value read from a gap shows as well
PAGE = mmap.PAGESIZE
FENCE = 16 * PAGE


def extent(tensor: Tensor) -> int:
    """Elements from the first to the last that a view covers, its gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def once_each(tensor: Tensor) -> Tensor:
    """The view without the repetitions of its expanded dimensions."""
    return tensor.as_strided(
        [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)],
        tensor.stride(),
    )


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's values, in order."""
    return once_each(tensor).contiguous().flatten().view(torch.uint8)


class MemoryFault(Exception):
    """Its only argument lists "kernel: argument: what happened"."""


class Fenced:
    """A copy of a tensor, of the same strides, with protected memory right before and right after its pages.

    `above`: its last byte is the last before the upper fence; `below`: its first byte is the first after the lower.
    Without `protect` the fences are memory like any other.
    """

    def __init__(self, source: Tensor, side: Side, protect: bool):
        size = extent(source) * source.itemsize
        pages = -(-size // PAGE) * PAGE
        self.memory = mmap.mmap(-1, pages + 2 * FENCE)  # shared with forked children
        first = FENCE if side == "below" else FENCE + pages - size
        self.inside = torch.frombuffer(self.memory, dtype=torch.uint8, count=pages, offset=FENCE)
        self.inside.fill_(CANARY)
        flat = torch.frombuffer(self.memory, dtype=source.dtype, count=extent(source), offset=first)
        self.tensor = flat.as_strided(source.shape, source.stride())
        once_each(self.tensor).copy_(once_each(source))
        covered = torch.zeros(extent(source), dtype=torch.bool)
        once_each(covered.as_strided(source.shape, source.stride())).fill_(True)
        self.gaps = torch.ones_like(self.inside, dtype=torch.bool)
        self.gaps[first - FENCE : first - FENCE + size] = ~covered.repeat_interleave(source.itemsize)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        for start in (0, FENCE + pages) if protect else ():
            if libc.mprotect(ctypes.c_void_p(address + start), FENCE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def is_sound(self) -> bool:
        """Whether the canary is alive in every byte that is not the tensor's."""
        return bool((self.inside[self.gaps] == CANARY).all())


def fence(
    arguments: dict[str, Any], names: set[str], side: Side, protected: set[str]
) -> tuple[dict[str, Any], dict[str, Fenced]]:
    """The arguments with those of `names` replaced by copies, fences beside those that are `protected`.

    Arguments that are one tensor stay one.
    """
    replaced, fences = dict(arguments), dict[str, Fenced]()
    shared: dict[tuple[Any, ...], Fenced] = {}
    for name in sorted(names):
        value = arguments[name]
        tensor = value.base if isinstance(value, TensorDescriptor) else value
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in shared:
            shared[key] = Fenced(tensor, side, name in protected)
        fences[name] = shared[key]
        replaced[name] = fences[name].tensor
        if isinstance(value, TensorDescriptor):
            replaced[name] = copy.copy(value)
            replaced[name].base = fences[name].tensor
    return replaced, fences


@contextmanager
def fenced_launches(side: Side) -> Iterator[None]:
    """While on, each launch runs in a child, its tensors between protected pages.

    Raises MemoryFault at the first launch with a fault: carried out unfenced, it would harm this process.
    """
    launch = InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        names = {
            name
            for name, value in arguments.items()
            if isinstance(value, TensorDescriptor) or (isinstance(value, Tensor) and value.numel())
        }

        def attempt(protected: set[str]) -> tuple[int, Any, dict[str, Fenced]]:
            replaced, fences = fence(arguments, names, side, protected)
            child = in_child(lambda: launch(self, grid=grid, warmup=warmup, **replaced))
            return child.status, child.answer, fences

        status, answer, fences = attempt(names)
        found = [
            f"{name}: bytes beside it were overwritten"
            for name in sorted(names)
            if not fences[name].is_sound()
        ]
        if status == -signal.SIGSEGV:
            culprits = [name for name in sorted(names) if attempt({name})[0] == -signal.SIGSEGV]
            found += [f"{name}: accessed out of bounds (SIGSEGV)" for name in culprits or ["an argument"]]
        elif status:
            found.append(f"the launch ended with status {status}: {answer}")
        if found:
            raise MemoryFault([f"{self.__name__}: {fault}" for fault in found])
        for name in names:
            value = arguments[name]
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if not torch.equal(bits(tensor), bits(fences[name].tensor)):
                once_each(tensor).copy_(once_each(fences[name].tensor))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", run)
        yield


def tail(large: Tensor, small: Tensor) -> Tensor:
    """The last part of `large` that has the shape of `small`."""
    for dim, size in enumerate(small.shape):
        large = large.narrow(dim, large.shape[dim] - size, size)
    return large


def filled(like: Tensor) -> Tensor:
    """Random values in the shape and strides of a recorded tensor."""
    value = torch.empty(extent(like), dtype=like.dtype)
    value = value.normal_() if value.is_floating_point() else value.zero_()
    return value.as_strided(like.shape, like.stride())


def sparse(like: Tensor, file: Path) -> Tensor:
    """A tensor of zeros in the shape and strides of a recorded one that takes no memory until it is written."""
    count = extent(like)
    with file.open("wb") as stream:
        stream.truncate(count * like.itemsize)
    return torch.from_file(str(file), shared=True, size=count, dtype=like.dtype).as_strided(
        like.shape, like.stride()
    )


def run_last_programs(launch: Launch, values: dict[str, Any], count: int = 2) -> None:
    """Carry out a recorded launch on `values`, only the last `count` programs of its first axis."""
    count = min(count, launch.grid[0])
    index, dimensions = InterpreterBuilder.set_grid_idx, InterpreterBuilder.set_grid_dim
    whole = (*launch.grid, 1, 1)[:3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "set_grid_dim", lambda self, *_: dimensions(self, *whole))
        patch.setattr(
            InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: index(self, x + whole[0] - count, y, z)
        )
        launch.kernel.run(grid=(count, *launch.grid[1:]), warmup=False, **{**launch.arguments, **values})


def last_programs_agree(large: Launch, small: Launch, folder: Path) -> list[str]:
    """Run the last programs of both launches, in a child, on the same data.

    The data of the small launch lies at the end of the large tensors. Returns the arguments that then differ, or how
    the child ended. Disk and memory hold only what the programs touch.
    """
    near = {name: filled(value) for name, value in small.arguments.items() if isinstance(value, Tensor)}
    far = {name: sparse(large.arguments[name], folder / name) for name in near}
    for name, value in near.items():
        once_each(tail(far[name], value)).copy_(once_each(value))

    def run() -> list[str]:
        run_last_programs(small, near)
        run_last_programs(large, far)
        return [name for name in near if not torch.equal(bits(tail(far[name], near[name])), bits(near[name]))]

    child = in_child(run)
    assert sum(os.stat(folder / name).st_blocks * 512 for name in far) < 128 * 2**20
    if child.status:
        return [f"{large.kernel.__name__} ended with status {child.status}: {child.answer}"]
    return [f"{large.kernel.__name__}: {name} differs beyond 2^31" for name in child.answer]


def reaches(launch: Launch) -> int:
    """The largest offset, in elements, within an argument of a recorded launch."""
    return max(extent(value) for value in launch.arguments.values() if isinstance(value, Tensor))


def fenced_run(function: Callable[[], list[Tensor]], side: Side) -> list[str]:
    """Faults of the launches of `function`, or what comes out other than without fences."""
    try:
        with fenced_launches(side):
            fenced = function()
    except MemoryFault as error:
        return list(error.args[0])
    return [
        f"output {index} differs between protected pages"
        for index, (a, b) in enumerate(zip(function(), fenced, strict=True))
        if not torch.equal(bits(a), bits(b))
    ]
