"""Named ranges around the parts of a run, for Nsight Systems or PyTorch's profiler; off, they cost nothing.

run > step > data | draw | forward | backward | optimizer_ema | checkpoint
forward > block_0 > one for each launch of a Triton kernel, named by operation, shape and dtypes
forward, backward, optimizer_ema > communication, with several ranks
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import nn

from dit_fast.errors import MissingExtraError

Ranges = Callable[[str], AbstractContextManager[Any]]
"""ranges(name): a context manager; nested ranges are nested in the timeline."""

COLOURS = {
    "data": "orange", "draw": "purple", "forward": "green", "backward": "blue", "optimizer_ema": "yellow",
    "communication": "red", "checkpoint": "cyan", "run": "white", "step": "white",
}  # fmt: skip
"""Of NVTX ranges, by phase: the names that the nvtx package knows. Blocks are darker, launches stand out."""

_NOTHING: AbstractContextManager[None] = nullcontext()


def OFF(name: str) -> AbstractContextManager[None]:
    """No ranges: always the same empty context."""
    return _NOTHING


def nvtx_ranges() -> Ranges:
    """NVTX ranges, by the nvtx package or, without it, a CUDA build of PyTorch. Raises MissingExtraError."""
    try:
        import nvtx
    except ImportError as error:
        if torch.version.cuda is not None:
            return torch.cuda.nvtx.range
        raise MissingExtraError("--nvtx: nvtx is not installed; pip install 'dit-fast[profile]'") from error

    def annotate(name: str) -> AbstractContextManager[None]:
        inner = "darkgreen" if name.startswith("block_") else "rapids"
        return nvtx.annotate(name, domain="dit_fast", color=COLOURS.get(name, inner))

    return annotate


def profiler_ranges() -> Ranges:
    """Ranges in the traces of `torch.profiler`."""
    return torch.profiler.record_function


def mark_blocks(blocks: nn.ModuleList, ranges: Ranges) -> None:
    """Put a range around the forward pass of each block; outside of what is compiled, if the blocks are."""
    for number, block in enumerate(blocks):
        open_ranges: list[AbstractContextManager[Any]] = []

        def enter(
            module: nn.Module, arguments: Any, name: str = f"block_{number}", stack: Any = open_ranges
        ) -> None:
            context = ranges(name)
            context.__enter__()
            stack.append(context)

        def leave(module: nn.Module, arguments: Any, output: Any, stack: Any = open_ranges) -> None:
            stack.pop().__exit__(None, None, None)

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)


@contextmanager
def mark_launches(ranges: Ranges) -> Iterator[None]:
    """Inside, a range stands around each launch of a Triton kernel, also by compiled code: Triton's hooks open it."""
    if ranges is OFF:
        yield
        return
    open_ranges: list[AbstractContextManager[Any]] = []

    def enter(metadata: Any) -> None:
        context = ranges(metadata.get()["name"])
        context.__enter__()
        open_ranges.append(context)

    def leave(metadata: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooks = triton.knobs.runtime
    hooks.launch_enter_hook.add(enter)
    hooks.launch_exit_hook.add(leave)
    try:
        yield
    finally:
        hooks.launch_enter_hook.remove(enter)
        hooks.launch_exit_hook.remove(leave)
