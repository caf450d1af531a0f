"""Launches and weight bytes of a denoising step: `python -m benchmarks.models.sampling_launches --out FILE.md`.

A step is one guided evaluation of DiT-XL/2 (bfloat16) on 2 n latents and the DDPM update with a learned variance. The
plain step is PlainDiT with the reference's structure: everything is computed and updated for 2 n. Launches of 28
blocks are those of one block and 27 times what a second one adds. Copies from the host are not among them.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.analysis.traffic import Program, Traffic, count
from benchmarks.analysis.traffic.blocks import default_dtype
from benchmarks.analysis.traffic.inductor import Workload
from benchmarks.analysis.traffic.ours import Interceptor
from benchmarks.models.plain_dit import PlainDiT
from dit_fast.kernels.launch import record_launches
from dit_fast.models import DiT
from dit_fast.sampling.trajectory import evaluate, loop_parameters, modulation_width

HERE = "benchmarks.models.sampling_launches"
DEPTH = 28
# 8 images and their null branches: aligned products, which Inductor does not think of padding.
BATCH = 16
SCALE = 4.0


def plain_step(program: Program) -> Workload:
    """One step of the reference's structure: guidance on three channels, noise and update of all 2 n states."""
    with default_dtype(torch.bfloat16):
        model = PlainDiT([32, 32], 2, 4, 1152, program.blocks, 16, 4.0, 0.1, 1000, True).eval()

    def run(x: Tensor, t: Tensor, y: Tensor, c: Tensor) -> Tensor:
        half = x.chunk(2)[0]
        out = model(torch.cat([half, half]).bfloat16(), t, y).float()
        conditional, null = out[:, :3].chunk(2)
        guided = null + SCALE * (conditional - null)
        eps = torch.cat([torch.cat([guided, guided]), out[:, 3:4]], dim=1)
        a, b, of_x, of_data, low, high = (c[i][t].view(-1, 1, 1, 1) for i in range(6))
        fraction = (out[:, 4:] + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        mean = of_data * (a * x - b * eps) + of_x * x
        later = (t != 0).float().view(-1, 1, 1, 1)
        return mean + later * torch.exp(0.5 * log_variance) * torch.randn_like(x)

    x = torch.empty(program.batch, 4, 32, 32, dtype=torch.float32)
    t, y = (torch.empty(program.batch, dtype=torch.int64) for _ in range(2))
    return Workload(run, (x, t, y, torch.empty(6, 1000, dtype=torch.float32)), backward=False)


def our_step(program: Program, hoisted: bool = True) -> Workload:
    """One step of the Sampler; without `hoisted`, with the modulation vectors made in it."""
    model = _our_model(program.blocks)
    return Workload(partial(_our_step, model, hoisted), _our_arguments(program, model), backward=False)


def _our_model(blocks: int) -> DiT:
    with default_dtype(torch.bfloat16):
        return DiT(depth=blocks, kernels="triton", attention="triton").eval()


def _our_arguments(program: Program, model: DiT) -> tuple[Tensor, ...]:
    n = program.batch // 2
    state = torch.empty(n, 4, 32, 32, dtype=torch.float32)
    rows = torch.empty(n + 1, modulation_width(model), dtype=torch.bfloat16)
    slots, t, y = (torch.empty(program.batch, dtype=torch.int64) for _ in range(3))
    return state, rows, slots, t, y, torch.empty(7, dtype=torch.float32), torch.empty_like(state)


def _our_step(
    model: DiT,
    hoisted: bool,
    x: Tensor,
    rows: Tensor,
    slots: Tensor,
    t: Tensor,
    y: Tensor,
    c: Tensor,
    noise: Tensor,
) -> Tensor:
    a, b, scale, of_x, of_data, low, high = c
    if not hoisted:
        rows, slots = model.modulations(t, y), torch.arange(len(t), device=x.device)
    data, fraction = evaluate(model, x, rows, slots, a, b, scale, 3, False, False)
    assert fraction is not None
    log_variance = torch.lerp(low, high, (fraction + 1) / 2)
    return torch.addcmul(torch.addcmul(of_x * x, of_data, data), (0.5 * log_variance).exp(), noise)


def fused_eager(program: Program, hoisted: bool) -> int:
    """Launches of our step without a compiler: Triton kernels and PyTorch's operations, on meta tensors."""
    with torch.device("meta"), record_launches() as recorded, torch.no_grad():
        model = _our_model(program.blocks)
        arguments = _our_arguments(program, model)
        interceptor = Interceptor(recorded, given=(arguments, list(model.parameters())))
        with interceptor:
            _our_step(model, hoisted, *arguments)
        interceptor.take_launches()
    return sum(kind != "epilogue" for kind, *_ in interceptor.counted)


def of_all_blocks(one: int, two: int) -> int:
    """Launches of DEPTH blocks from those of one and of two."""
    return one + (DEPTH - 1) * (two - one)


def counted(factory: str, compiled: bool, **settings: bool) -> int:
    """Launches of a factory's step with 28 blocks, counted by `benchmarks.analysis.traffic`."""
    programs = [
        Program(f"{HERE}:{factory}", settings=settings, batch=BATCH, blocks=blocks, compiled=compiled)
        for blocks in (1, 2)
    ]
    one, two = count(programs)
    return of_all_blocks(_forward(one), _forward(two))


def _forward(traffic: Traffic) -> int:
    return traffic.launches("forward")


def weight_bytes() -> tuple[int, int]:
    """Bytes of bfloat16 weights that a step of DiT-XL/2 reads: plain, and with the modulation vectors given."""
    with torch.device("meta"):
        model = DiT(depth=DEPTH)
    # Of the label table a step reads single rows.
    table = model.get_parameter("y_embedder.embedding_table.weight").numel()
    everything = sum(p.numel() for p in model.parameters()) - table
    return 2 * everything, 2 * sum(p.numel() for p in loop_parameters(model))


def document() -> str:
    """The table as Markdown."""
    plain, hoisted = weight_bytes()
    shape = partial(Program, f"{HERE}:our_step", batch=BATCH)
    ours: Callable[[bool], int] = lambda hoist: of_all_blocks(  # noqa: E731
        *(fused_eager(shape(blocks=blocks), hoist) for blocks in (1, 2))
    )
    rows = [
        ("plain PyTorch, eager", counted("plain_step", False), plain),
        ("plain PyTorch, compiled by Inductor", counted("plain_step", True), plain),
        ("ours, fused kernels, modulation in the step", ours(False), plain),
        ("ours, fused kernels, modulation hoisted", ours(True), hoisted),
        ("ours, hoisted, the rest compiled by Inductor", counted("our_step", True, hoisted=True), hoisted),
    ]
    lines = [
        "# A denoising step of DiT-XL/2 with guidance: launches and weights",
        "",
        "`python -m benchmarks.models.sampling_launches`: 8 images at 256 pixels, bfloat16, DDPM, learned variance; "
        "counted on a CPU, nothing was timed.",
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}. In a captured trajectory the host launches one graph "
        "for all steps.",
        "",
        "| step | launches | weights read, MB |",
        "|---|---|---|",
        *(f"| {name} | {launches} | {size / 1e6:.1f} |" for name, launches, size in rows),
        "",
        f"Hoisting leaves {hoisted / plain:.1%} of the weights in the loop; a row of vectors, "
        f"{2 * (6 * DEPTH + 2) * 1152 / 1e6:.2f} MB, is read for each label instead.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    text = document()
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
