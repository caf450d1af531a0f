"""Does a training step fit: what is kept for the backward pass, parameters and optimizer, beside a card's memory.

`python -m benchmarks.analysis.traffic --memory`. What each block and the layers around them keep is counted by the same
compilation as their traffic; the rest is arithmetic, stated in the table.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.analysis.traffic import Program, Traffic, TrafficError, count, prices, steady_state
from dit_fast.models import DiT

SCHEME = {"weights": 4, "gradients": 4, "two moments": 8, "average": 4, "bfloat16 copy": 2}
"""Bytes that each parameter holds between two steps (`dit_fast.training.optimizer.AdamWEma`)."""

RESERVE = 2 * 10**9
"""Bytes left to the CUDA context, libraries' workspaces and the allocator's rounding. Assumed."""

CARD = 80 * 10**9, 80 * 2**30
"""What "80 GB" may mean: an H100 offers between the two."""

AROUND = ("timestep_embedding", "label_embedding", "modulations", "hybrid_loss")
REPLACED = ("final_layer", "patch_embedding")
"""Chains of chains.py that keep something in a training step; of the second, dit_fast has its own."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step.

    blocks, around: kept for the backward pass by all blocks and by the layers around them; parameters: weights,
    gradients and optimizer; working: all that one block's backward pass writes, as if it freed nothing before its end.
    """

    blocks: int
    around: int
    parameters: int
    working: int

    @property
    def least(self) -> int:
        """What is held at once when the backward pass starts."""
        return self.blocks + self.around + self.parameters

    @property
    def most(self) -> int:
        """An upper bound of the peak."""
        return self.least + self.working + RESERVE

    @property
    def fits(self) -> str:
        """In 80 GB: "yes" if `most` is within its smaller meaning, "no" if `least` is beyond its larger, else open."""
        smaller, larger = CARD
        return "yes" if self.most <= smaller else "no" if self.least > larger else "open"


def parameters(shape: Program, depth: int) -> int:
    """Parameters of the DiT with this shape's blocks, patch 2, trained ones only."""
    side = 2 * math.isqrt(shape.tokens)
    with torch.device("meta"):
        model = DiT(input_size=side, hidden_size=shape.width, num_heads=shape.heads, depth=depth)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def written(block: Traffic) -> int:
    """Bytes that the backward pass of a block writes, products and attention included."""
    return sum(
        one.write * launches
        for one, launches in block.passes.items()
        if one.phase == "backward" and one.kind != "epilogue"  # an epilogue's are in its product's
    )


def measure(
    plain: Program, ours: Sequence[tuple[str, Program]], modes: Sequence[str], depth: int
) -> list[tuple[str, str, Traffic, Memory]]:
    """(mode, name, one block, memory of the step) of Inductor's plain model and of each of `ours`."""
    if math.isqrt(plain.tokens) ** 2 != plain.tokens:
        raise TrafficError(f"--tokens {plain.tokens}: the memory of a model needs a square number")
    rows = [(mode, name, program) for mode in modes for name, program in (("Inductor", plain), *ours)]
    programs = [replace(program, mode=mode) for mode, _, program in rows]
    chains = [
        (mode, name) for mode in modes for name in (*AROUND, *REPLACED, *map("our_{}".format, REPLACED))
    ]
    around = [replace(plain, factory=prices.MODULE + name, mode=mode) for mode, name in chains]
    counted = count([*(one for program in programs for one in steady_state(program)), *around])
    steady, rest = counted[: 2 * len(rows)], dict(zip(chains, counted[2 * len(rows) :], strict=True))
    held = parameters(plain, depth) * sum(SCHEME.values())
    found = []
    for (mode, name, _), longer, shorter in zip(rows, steady[::2], steady[1::2], strict=True):
        block = longer - shorter
        layers = (*AROUND, *(layer if name == "Inductor" else f"our_{layer}" for layer in REPLACED))
        kept = sum(rest[mode, layer].kept for layer in layers)
        found.append((mode, name, block, Memory(depth * block.kept, kept, held, written(block))))
    return found


HEADER = (
    "| mode | block | kept per block, U | blocks | around them | parameters | held, at least | one block's backward, "
    "at most | with it and reserve, at most | fits in 80 GB |\n|---|---|---|---|---|---|---|---|---|---|"
)


def document(
    shape: Program, found: Sequence[tuple[str, str, Traffic, Memory]], depth: int, versions: str
) -> tuple[str, dict[str, Any]]:
    """The table in GB (10^9 bytes), and the bytes as JSON values."""
    scheme = ", ".join(f"{name} {size}" for name, size in SCHEME.items())
    lines = [
        "# Memory of a training step on one GPU",
        "",
        f"Counted without a GPU by `python -m benchmarks.analysis.traffic --memory`: depth {depth}, B = {shape.batch}, "
        f"T = {shape.tokens}, D = {shape.width}, H = {shape.heads}, {parameters(shape, depth) / 1e6:.1f} M trained "
        f"parameters; U = {shape.unit / 1e6:.1f} MB.",
        f"{versions}. Nothing was run on a GPU. All but the first column in GB of 10^9 bytes.",
        "",
        "- Blocks, around them: distinct storages that the compiled backward pass takes, one block's times the depth; "
        "those of embeddings, modulations, final layer and loss.",
        f"- Parameters: {sum(SCHEME.values())} bytes each ({scheme}), the same in every row.",
        "- One block's backward: all that it writes, as if it freed nothing before its end. Reserve: "
        f"{RESERVE / 1e9:.0f} GB for CUDA context, workspaces and allocator, assumed.",
        "- Fits in 80 GB: yes if the upper bound is within 80 * 10^9 bytes, no if the lower bound is beyond 80 * 2^30, "
        "else open.",
        "",
        HEADER,
    ]
    for mode, name, block, memory in found:
        sizes = memory.blocks, memory.around, memory.parameters, memory.least, memory.working, memory.most
        cells = [mode, name, f"{block.kept / shape.unit:.1f}", *(f"{size / 1e9:.1f}" for size in sizes)]
        lines.append(f"| {' | '.join(cells)} | {memory.fits} |")
    values = {f"{mode}: {name}": {**asdict(memory), "fits": memory.fits} for mode, name, _, memory in found}
    return "\n".join(lines) + "\n", {"unit": shape.unit, "depth": depth, "memory": values}
