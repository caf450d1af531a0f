"""What a step computes beside its blocks: Inductor's launches and bytes against the least possible.

The least possible reads each input and writes each result once and keeps intermediate values in registers; bias
gradients and low-precision copies of weights come free from a matrix product and from the optimizer.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.analysis.traffic import MEMORY_BOUND, PHASES, Program, Traffic, count

MODULE = "benchmarks.analysis.traffic.chains:"
DEPTH = 28
PIXELS_PER_TOKEN, LATENT_CHANNELS, TABLE_ROWS = 4, 4, 1001


@dataclass(frozen=True)
class Chain:
    """A chain of chains.py: Inductor's version, ours if there is one, and the least possible.

    tokens, latents: float32 or bfloat16 token tensors (in U) and float32 latents (B, 4, H, W) that must move;
    vectors: bfloat16 (B, D) vectors; table: float32 label tables; launches: how many are needed. `eager`: count
    PyTorch without a compiler as well, where none depends on autocast.
    """

    name: str
    tokens: float = 0
    latents: float = 0
    vectors: float = 0
    table: float = 0
    launches: int = 1
    step: str = "training"
    ours: str | None = None
    eager: bool = False

    def least(self, program: Program) -> float:
        """Bytes that must move, forward and backward."""
        latent = program.batch * program.tokens * PIXELS_PER_TOKEN * LATENT_CHANNELS * 4
        moved = self.tokens * program.unit + self.latents * latent
        moved += self.vectors * program.batch * program.width * 2
        return moved + self.table * TABLE_ROWS * program.width * 4


CHAINS = (
    # x (2 U in float32), y, then d_y, x, d_x; the output as tokens and as image (bfloat16, 1 latent), as float32 (2).
    Chain("final_layer", tokens=8, latents=6, launches=4, ours="our_final_layer"),
    # float32 tokens out, their gradient in; the image both times.
    Chain("patch_embedding", tokens=4, latents=2, launches=2, ours="our_patch_embedding"),
    # waves (256 of D values), SiLU read and written, its gradient with the input.
    Chain("timestep_embedding", vectors=2 + 3 + 256 / 1152, launches=3),
    # rows looked up as float32 and written; gradients read; the table's gradient is dense.
    Chain("label_embedding", vectors=4 + 2, table=1, launches=2),
    # SiLU; backward, the gradients from all blocks and the final layer added in one pass.
    Chain("modulations", vectors=2 + DEPTH + 1 + 2, launches=2),
    Chain("noise_draw", latents=1, eager=True),
    Chain("noise_mixing", latents=3, eager=True),
    # the output (2 latents), x_0, x_t, noise, and the gradient of the output, all in one pass.
    Chain("hybrid_loss", latents=7, eager=True),
    # n = B / 2: three channels of both halves and five of one, x in, x out.
    Chain("ddpm_update", latents=(2 * 3 + 5) / 8 + 1, step="sampling", eager=True),
    Chain("ddim_update", latents=(2 * 3 + 5) / 8 + 1, step="sampling", eager=True),
)

HEADER = (
    "| chain | step | Inductor U | least U | could save, % of the step | launches | least | ours U | ours launches "
    "| eager U | eager launches |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def document(batch: int, versions: str) -> tuple[str, dict[str, Any]]:
    """The table of all chains, and the counts as JSON values."""
    shape = Program(MODULE, mode="autocast", batch=batch)
    names = [chain.name for chain in CHAINS] + [chain.ours for chain in CHAINS if chain.ours]
    programs = [Program(MODULE + name, mode="autocast", batch=batch) for name in names]
    eager = [f"{chain.name}, eager" for chain in CHAINS if chain.eager]
    programs += [
        Program(MODULE + chain.name, mode="autocast", batch=batch, compiled=False)
        for chain in CHAINS
        if chain.eager
    ]
    block = Program("benchmarks.analysis.traffic.blocks:plain", mode="autocast", batch=batch, blocks=2)
    sampling = Program(MODULE + "forward_block", mode="bf16", batch=batch, blocks=2)
    longer = [Program(one.factory, mode=one.mode, batch=batch, blocks=3) for one in (block, sampling)]
    *counted, block_2, forward_2, block_3, forward_3 = count([*programs, block, sampling, *longer])
    found = dict(zip([*names, *eager], counted, strict=True))
    steps = {
        "training": DEPTH * (block_3 - block_2).moved(),
        "sampling": DEPTH * (forward_3 - forward_2).moved(),
    }
    launches = {
        "training": DEPTH * (block_3 - block_2).launches(),
        "sampling": DEPTH * (forward_3 - forward_2).launches(),
    }
    lines = [
        "# What a step computes beside its blocks, compiled by Inductor, against the least possible",
        "",
        f"`python -m benchmarks.analysis.traffic --chains`: DiT-XL/2, B = {batch}, T = {shape.tokens}, autocast; "
        f"U = {shape.unit / 1e6:.1f} MB. {versions}. Nothing was timed.",
        f"Inductor's {DEPTH} blocks: training (autocast) {steps['training'] / shape.unit:.0f} U and "
        f"{launches['training']} launches, a sampling step (bf16, forward only) "
        f"{steps['sampling'] / shape.unit:.0f} U and {launches['sampling']} launches.",
        "Launches are memory-bound ones; those of matrix products and convolutions are left out, with their bytes.",
        "",
        HEADER,
        *(line(chain, found, shape, steps[chain.step]) for chain in CHAINS),
    ]
    values = {"unit": shape.unit, "steps": steps, "launches": launches}
    chains = {name: traffic.as_json() for name, traffic in found.items()}
    return "\n".join(lines) + "\n", {**values, "chains": chains}


def line(chain: Chain, found: dict[str, Traffic], shape: Program, step: float) -> str:
    """One row of the table."""
    traffic = found[chain.name]
    moved, least = traffic.moved(), chain.least(shape)
    cells = [chain.name, chain.step, f"{moved / shape.unit:.3f}", f"{least / shape.unit:.3f}"]
    cells += [f"{100 * (moved - least) / step:.2f}", bound(traffic), str(chain.launches)]
    mine = found[chain.ours] if chain.ours else None
    for other in (mine, found.get(f"{chain.name}, eager")):
        cells += [f"{other.moved() / shape.unit:.3f}", bound(other)] if other else ["", ""]
    return f"| {' | '.join(cells)} |"


def bound(traffic: Traffic) -> str:
    """Memory-bound launches, forward + backward."""
    return " + ".join(str(traffic.launches(phase, MEMORY_BOUND)) for phase in PHASES)
