"""Named ranges in the timeline of Nsight Systems or PyTorch's profiler; without overhead while they are off.

run > step > data | draw | forward | backward | optimizer_ema | checkpoint
forward > block_0 > one range per launch of a Triton kernel, named by operation, shape and dtypes
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

COLORS = {
    "data": "orange", "draw": "purple", "forward": "green", "backward": "blue", "optimizer_ema": "yellow",
    "communication": "red", "checkpoint": "cyan", "run": "white", "step": "white",
}  # fmt: skip
"""Colors of NVTX ranges by phase, as named by the nvtx package."""

_EMPTY: AbstractContextManager[None] = nullcontext()


def OFF(name: str) -> AbstractContextManager[None]:
    """No ranges; returns the same empty context at every call."""
    return _EMPTY


def nvtx_ranges() -> Ranges:
    """NVTX ranges of the nvtx package or a CUDA build of PyTorch; MissingExtraError where both are missing."""
    try:
        import nvtx
    except ImportError as error:
        if torch.version.cuda is not None:
            return torch.cuda.nvtx.range
        raise MissingExtraError("--nvtx: nvtx is not installed; pip install 'dit-fast[profile]'") from error

    def annotate(name: str) -> AbstractContextManager[None]:
        inner = "darkgreen" if name.startswith("block_") else "rapids"
        return nvtx.annotate(name, domain="dit_fast", color=COLORS.get(name, inner))

    return annotate


def profiler_ranges() -> Ranges:
    """Ranges in the traces of `torch.profiler`."""
    return torch.profiler.record_function


def mark_blocks(blocks: nn.ModuleList, ranges: Ranges) -> None:
    """Put a range around the forward pass of each block, outside of compiled code."""
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
    """Context manager: a range around each launch of a Triton kernel, also in compiled code, by Triton's hooks."""
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
