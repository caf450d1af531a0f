"""Named ranges around the parts of a step, for Nsight Systems or PyTorch's profiler; off, they cost nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dit_fast.errors import MissingExtraError

Ranges = Callable[[str], AbstractContextManager[Any]]
"""ranges(name): a context manager; nested ranges are nested in the timeline."""

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
    return lambda name: nvtx.annotate(name, domain="dit_fast")


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
