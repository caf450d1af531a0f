"""Chains of transformer blocks to count: plain PyTorch's and ours. The modulation's linear layer is left out of both.

A block reads its modulation (N, 6 D), which is two hundredths of a token tensor; its linear layer belongs to the
vectors of a sample, not to its tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.analysis.traffic import Program
from benchmarks.analysis.traffic.inductor import Workload
from benchmarks.models.plain_dit import PlainBlock, PlainLightningBlock
from dit_fast.kernels import jvp
from dit_fast.model.backends import Backends
from dit_fast.model.blocks import DiTBlock, Stream
from dit_fast.model.layers import Layout


class Chain(nn.Module):
    """Blocks one after the other, each with its own modulation; `lazy` for those that pass a `Stream` on.

    `along`: with tangents of tokens and modulations, which follow them among the arguments.
    """

    def __init__(self, blocks: list[nn.Module], lazy: bool, along: bool = False):
        super().__init__()
        for block in blocks:
            block.adaLN_modulation = nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.lazy, self.along = lazy, along

    def forward(self, x: Tensor, modulations: list[Tensor], *others: Any) -> Any:
        return self.run_along(x, modulations, *others) if self.along else self.run(x, modulations, *others)

    def run_along(
        self, x: Tensor, modulations: list[Tensor], x_t: Tensor, modulations_t: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        stream, stream_t = Stream(x), Stream(x_t)
        for block, modulation, modulation_t in zip(self.blocks, modulations, modulations_t, strict=True):
            stream, stream_t = block(stream, modulation, None, None, (stream_t, modulation_t))
        return jvp(lambda stream: stream.add("auto"), (stream,), (stream_t,))

    def run(self, x: Tensor, modulations: list[Tensor], *rotation: Tensor) -> Tensor:
        stream: Any = Stream(x, layout=Layout(*rotation)) if self.lazy else x
        told = () if self.lazy else rotation
        for block, modulation in zip(self.blocks, modulations, strict=True):
            stream = block(stream, modulation, *told)
        return stream.add("auto") if self.lazy else stream


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make parameters of this dtype; a module of fake tensors cannot be converted afterwards."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def chain(program: Program, block: Callable[[], nn.Module], lazy: bool, along: bool = False) -> Workload:
    """`program.blocks` blocks and their inputs: bfloat16 weights and tokens, or float32 ones for autocast."""
    dtype = torch.bfloat16 if program.mode == "bf16" else torch.float32
    with default_dtype(torch.float32 if program.mode == "autocast" else torch.bfloat16):
        model = Chain([block() for _ in range(program.blocks)], lazy, along)
    size = program.batch, program.tokens, program.width
    x = torch.empty(size, dtype=dtype, requires_grad=True)
    modulations = [
        torch.empty(program.batch, 6 * program.width, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(program.blocks)
    ]
    tangents = (torch.empty_like(x), list(map(torch.empty_like, modulations))) if along else ()
    return Workload(model, (x, modulations, *tangents))


def plain(program: Program) -> Workload:
    """What Inductor makes of the block in plain PyTorch."""
    return chain(program, lambda: PlainBlock(program.width, program.heads, 4.0), lazy=False)


def dit_fast(
    program: Program, trunk: dict[str, Any] | None = None, tangents: bool = False, **settings: Any
) -> Workload:
    """Our block with `Backends(**settings)`; `trunk` are further arguments of `DiTBlock`; `tangents`: with those."""
    backends = Backends(**settings)
    return chain(
        program,
        lambda: DiTBlock(program.width, program.heads, backends=backends, **(trunk or {})),
        lazy=True,
        along=tangents,
    )


def plain_lightning(program: Program) -> Workload:
    """What Inductor makes of LightningDiT's block in plain PyTorch."""
    return rotated(
        program, chain(program, lambda: PlainLightningBlock(program.width, program.heads), lazy=False)
    )


def lightning(program: Program, **settings: Any) -> Workload:
    """Our block with the same trunk: RMSNorm, SwiGLU, normed queries and keys, rotary positions."""
    trunk = {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True}
    return rotated(program, dit_fast(program, trunk, **settings))


def rotated(program: Program, workload: Workload) -> Workload:
    """The workload with the cosines and sines of rotary positions."""
    rotation = torch.empty(1, program.tokens, program.width // program.heads // 2, 2, dtype=torch.float32)
    return Workload(workload.function, (*workload.arguments, rotation))
