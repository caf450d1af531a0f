"""Training steps of DiT, one improvement after the other: `python -m benchmarks.ladder [--model M] [--batch B]`.

A step is label drop, noise, forward, hybrid loss, backward, AdamW and moving average on random latents that lie on the
device. The first rungs are the plain PyTorch model (`plain_dit.py`) as the reference ships it, then with what any user
can switch on; the last are ours. The fair baseline is "+ torch.compile". Every rung starts from the same weights, and
its first losses are compared with those of the first rung before it is timed. Rungs are timed in turn, upwards and
downwards again, because two of the largest do not fit a device together; both passes are in the spread.
MFU: 3 x the forward FLOPs (2 a multiply-add; no recomputation) over the dense bf16 peak of the data sheet.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.clock import now
from benchmarks.environment import environment
from benchmarks.plain_dit import PlainDiT
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import DitFastError
from dit_fast.models import DiT, DiT_models
from dit_fast.training.cuda_graph import CudaGraphs, GraphedStep
from dit_fast.training.metrics import peak_flops, training_flops
from dit_fast.training.optimizer import AdamWEma
from dit_fast.training.parallel import parallelize
from dit_fast.training.precision import use_float8
from dit_fast.training.step import StepOptions, StepState, TrainStep
from dit_fast.training.world import World

DECAY = 0.9999
Work = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rung:
    """How a step is made. ours: dit_fast's model, step and optimiser, else plain PyTorch throughout."""

    name: str
    ours: bool = False
    tf32: bool = False
    bf16: bool = False
    sdpa: bool = False
    compile: bool = False
    graph: bool = False
    fp8: bool = False
    recompute: str = "none"
    needs_gpu: bool = False


RUNGS = (
    Rung("plain fp32"),
    Rung("+ TF32", tf32=True, needs_gpu=True),
    Rung("+ bf16", tf32=True, bf16=True),
    Rung("+ SDPA", tf32=True, bf16=True, sdpa=True),
    Rung("+ torch.compile", tf32=True, bf16=True, sdpa=True, compile=True),
    Rung("ours, fp32", ours=True),
    Rung("ours, eager", ours=True, tf32=True, bf16=True),
    Rung("ours", ours=True, tf32=True, bf16=True, compile=True),
    Rung("ours, least memory", ours=True, tf32=True, bf16=True, compile=True, recompute="cheap"),
    Rung("ours + CUDA graph", ours=True, tf32=True, bf16=True, compile=True, graph=True, needs_gpu=True),
    Rung("ours + fp8", ours=True, tf32=True, bf16=True, compile=True, fp8=True, needs_gpu=True),
)


@dataclass(frozen=True)
class Result:
    """Times of one rung in milliseconds over both passes, or `failed`: why there are none."""

    rung: str
    batch: int
    median_ms: float | None = None
    lower_ms: float | None = None
    upper_ms: float | None = None
    images_per_second: float | None = None
    mfu: float | None = None
    peak_memory_gb: float | None = None
    launches: int | None = None
    first_losses: tuple[float, ...] = ()
    failed: str | None = None


def plain_step(model: DiT, rung: Rung, device: torch.device) -> Work:
    """The reference's step: fused AdamW, and an average by a foreach pass."""
    plain = PlainDiT(**model.config).to(device)
    plain.load_state_dict(model.state_dict())
    parameters: list[Tensor] = [p for p in plain.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0, fused=True)
    diffusion = create_diffusion("")
    called: nn.Module = torch.compile(plain, fullgraph=True, dynamic=False) if rung.compile else plain  # type: ignore[assignment]

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=rung.bf16):
            return called(x, t, y).float()

    def step(x: Tensor, y: Tensor) -> Tensor:
        t = torch.randint(0, diffusion.num_timesteps, (len(x),), device=device)
        # Without a fused kernel, scores and probabilities are tensors of their own, as the reference's are.
        with nullcontext() if rung.sdpa else sdpa_kernel(SDPBackend.MATH):
            loss = diffusion.training_losses(denoise, x, t, {"y": y})["loss"].mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - DECAY)
        return loss.detach()

    return step


def our_step(model: DiT, rung: Rung, device: torch.device, batch: int) -> Work:
    """dit_fast's step, as its trainer makes it."""
    ours = DiT(**model.config, recompute=rung.recompute).to(device).eval()
    ours.load_state_dict(model.state_dict())
    if rung.fp8:
        use_float8(ours, device)
    called = parallelize(ours, World(device=device), "none", compile=rung.compile)
    parameters = [p for p in ours.parameters() if p.requires_grad]
    state = StepState(device, 16, torch.float64)
    state.lr.fill_(1e-4)
    optimizer = AdamWEma(parameters, lr=state.lr, ema_decay=DECAY, ema_warmup=True)

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=rung.bf16):
            return called(x, t, y).float()

    options = StepOptions(seed=0, batch_size=batch, num_classes=1000, class_dropout_prob=0.1)
    step = TrainStep(
        denoise, optimizer, create_diffusion(""), options, state, torch.arange(batch, device=device)
    )
    if rung.compile:
        step.draw = torch.compile(step.draw, dynamic=False, fullgraph=True)  # type: ignore[method-assign]
    work = GraphedStep(step, CudaGraphs()) if rung.graph else step

    def run(x: Tensor, y: Tensor) -> Tensor:
        work(x, y)
        return state.history[(state.step - 1) % len(state.history), 0]

    return run


def launches_of(work: Callable[[], Any]) -> int | None:
    """Kernels and copies on the device in one step; None without a CUDA device."""
    if not torch.cuda.is_available():
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@dataclass
class Timed:
    """What one pass over one rung leaves."""

    times: list[float]
    losses: list[float]
    memory: float | None
    launches: int | None


def time_rung(model: DiT, rung: Rung, batch: int, repeats: int, device: torch.device) -> Timed:
    """Build the step, warm it up and time it."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = rung.tf32
    torch.backends.cudnn.allow_tf32 = rung.tf32
    x = torch.randn(batch, 4, *model.config["input_size"], device=device)
    y = torch.randint(model.config["num_classes"], (batch,), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = our_step(model, rung, device, batch) if rung.ours else plain_step(model, rung, device)
    losses = [float(step(x, y)) for _ in range(6 if rung.graph else 3)]
    times = []
    for _ in range(repeats):
        start = now()
        step(x, y)
        times.append(now() - start)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return Timed(times, losses, memory, launches_of(lambda: step(x, y)))


def clear(device: torch.device) -> None:
    """Leave nothing of the rung before on the device."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def climb(
    model: DiT,
    rungs: Sequence[Rung],
    batch: int,
    repeats: int,
    device: torch.device,
    say: Callable[[str], None],
    keep: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Every rung, upwards and downwards; a rung that fails or whose losses are off is a row without figures.

    `keep` is given the results so far after each rung.
    """

    def results() -> list[Result]:
        rows = (
            result_of(rung, found[rung.name], failed.get(rung.name), model, batch, device) for rung in rungs
        )
        return check_losses(list(rows))

    found: dict[str, list[Timed]] = {rung.name: [] for rung in rungs}
    failed = {rung.name: "needs a CUDA device" for rung in rungs if rung.needs_gpu and device.type != "cuda"}
    for order in (rungs, rungs[::-1]):
        for rung in order:
            if rung.name in failed:
                continue
            try:
                found[rung.name].append(time_rung(model, rung, batch, repeats, device))
            except (RuntimeError, DitFastError) as error:
                failed[rung.name] = str(error).splitlines()[0]
                say(f"{rung.name}: {failed[rung.name]}")
            else:
                say(f"{rung.name}: {1e3 * statistics.median(found[rung.name][-1].times):.1f} ms")
            clear(device)
            keep(results())
    return results()


def result_of(
    rung: Rung, passes: list[Timed], failed: str | None, model: DiT, batch: int, device: torch.device
) -> Result:
    if failed is not None or not passes:
        return Result(rung.name, batch, failed=failed or "not run")
    times = [time for timed in passes for time in timed.times]
    # One time has no quartiles but itself.
    lower, median, upper = statistics.quantiles(
        times * 2 if len(times) == 1 else times, n=4, method="inclusive"
    )
    peak = peak_flops(device)
    return Result(
        rung=rung.name,
        batch=batch,
        median_ms=1e3 * median,
        lower_ms=1e3 * lower,
        upper_ms=1e3 * upper,
        images_per_second=batch / median,
        mfu=training_flops(model) * batch / median / peak if peak else None,
        peak_memory_gb=passes[0].memory,
        launches=passes[0].launches,
        first_losses=tuple(passes[0].losses),
    )


def check_losses(results: list[Result], tolerance: float = 0.2) -> list[Result]:
    """Refuse rungs that do not train the same model: a first loss that is not near the first rung's, or not finite.

    Draws differ between the rungs, so that the bound is that of another batch of noise, not of rounding.
    """
    checked: list[Result] = []
    expected = next((r.first_losses[0] for r in results if r.first_losses), None)
    for result in results:
        if (
            result.first_losses
            and expected is not None
            and not abs(result.first_losses[0] / expected - 1) < tolerance
        ):
            reason = f"its first loss is {result.first_losses[0]:.4g}, the first rung's {expected:.4g}"
            result = Result(result.rung, result.batch, failed=reason, first_losses=result.first_losses)
        checked.append(result)
    return checked


def table(results: Sequence[Result]) -> str:
    """The ladder as Markdown, each time relative to "+ torch.compile" where that is there."""
    base = next((r.median_ms for r in results if r.rung == "+ torch.compile" and r.median_ms), None)
    lines = [
        "| step | batch | ms | quartiles | images/s | over + torch.compile | MFU | peak GB | launches |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if r.median_ms is None:
            lines.append(f"| {r.rung} | {r.batch} | {r.failed} | | | | | | |")
            continue
        cells = [
            f"{r.median_ms:.1f}",
            f"{r.lower_ms:.1f} - {r.upper_ms:.1f}",
            f"{r.images_per_second:.1f}",
            f"{base / r.median_ms:.2f}" if base else "",
            f"{r.mfu:.1%}" if r.mfu else "",
            f"{r.peak_memory_gb:.1f}" if r.peak_memory_gb else "",
            str(r.launches or ""),
        ]
        lines.append(f"| {r.rung} | {r.batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def random_model(name: str, image_size: int) -> DiT:
    """A model whose zero-initialised weights hold small normals, so that every branch counts."""
    torch.manual_seed(0)
    model = DiT_models[name](input_size=image_size // 8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Training steps of DiT, one improvement after the other.")
    parser.add_argument("--model", choices=tuple(DiT_models), help="default: DiT-XL/2, DiT-S/8 without a GPU")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch", type=int, help="default: 128, 2 without a GPU")
    parser.add_argument("--repeats", type=int, help="steps of each pass (default: 10, 2 without a GPU)")
    parser.add_argument("--only", nargs="+", choices=[rung.name for rung in RUNGS], help="these rungs only")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    name = args.model or ("DiT-XL/2" if on_gpu else "DiT-S/8")
    batch, repeats = args.batch or (128 if on_gpu else 2), args.repeats or (10 if on_gpu else 2)
    patch = int(name.rpartition("/")[2])
    if args.image_size <= 0 or args.image_size % (8 * patch):
        parser.error(f"--image-size {args.image_size} is not a multiple of 8 x patch {patch}")
    if batch < 1 or repeats < 1:
        parser.error("--batch and --repeats: give at least 1")
    before = environment()
    rungs = [rung for rung in RUNGS if args.only is None or rung.name in args.only]
    device = torch.device("cuda" if on_gpu else "cpu")

    def keep(results: list[Result]) -> None:
        if args.out is None:
            return
        report = {
            "benchmark": "ladder",
            "model": name,
            "image_size": args.image_size,
            "repeats": repeats,
            "environment": before,
            "environment_after": environment(),
            "results": [asdict(result) for result in results],
        }
        temporary = args.out.with_suffix(".tmp")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(args.out)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    results = climb(random_model(name, args.image_size), rungs, batch, repeats, device, say, keep)
    print(f"{name}, {args.image_size} px, {device.type}, {repeats} steps in each of two passes")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
