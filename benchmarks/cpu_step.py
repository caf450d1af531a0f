"""Train step on the CPU, ours beside plain PyTorch: `python -m benchmarks.cpu_step --out FILE.json`.

A step is forward, mean squared error against noise, backward and fused AdamW at a constant rate, on random latents
of 32 x 32 x 4 with label dropout. All variants start from the same weights; their outputs and gradients are compared
before anything is timed. Steps are interleaved, one of each variant in turn, so that a busy machine slows all
of them alike; the speed-up is the median over rounds of plain / variant within the round.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.plain_dit import PlainDiT, plain_twin, random_model
from dit_fast.models import DiT, DiT_models

Batch = tuple[Tensor, Tensor, Tensor, Tensor]

PLAIN = "plain eager fp32"


@dataclass(frozen=True)
class Timing:
    """Step times of a variant: quartiles in milliseconds over `repeats` and the speed-up over plain eager float32."""

    variant: str
    repeats: int
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    images_per_second: float
    speed_up: float


def random_batch(model: DiT, size: int) -> Batch:
    """Latents, timesteps, labels and the noise to be predicted."""
    height, width = model.config["input_size"]
    x = torch.randn(size, model.in_channels, height, width)
    t = torch.randint(1000, (size,))
    y = torch.randint(model.config["num_classes"], (size,))
    return x, t, y, torch.randn(size, model.out_channels, height, width)


def gradients(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one evaluation without label dropout."""
    x, t, y, noise = batch
    out = model.eval()(x, t, y)
    (out - noise).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.train().zero_grad()
    return out.detach(), found


def check_agreement(ours: DiT, plain: PlainDiT, batch: Batch) -> dict[str, float]:
    """Largest differences of output (absolute) and gradients (relative to each tensor's largest entry).

    Raises SystemExit beyond 1e-4 and 1e-3: then the two are not the same model and timings mean nothing.
    """
    (out, grads), (expected, expected_grads) = gradients(ours, batch), gradients(plain, batch)
    output = (out - expected).abs().max().item()
    relative = [
        (grads[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
        for name, gradient in expected_grads.items()
    ]
    gradient = max(value.item() for value in relative)
    if output > 1e-4 or gradient > 1e-3 or grads.keys() != expected_grads.keys():
        raise SystemExit(f"the models disagree: output {output:.1e}, gradients {gradient:.1e}")
    return {"output_absolute": output, "gradient_relative": gradient}


def train_step(model: nn.Module, batch: Batch, autocast: bool) -> Callable[[], None]:
    """A function that does one optimiser step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0, fused=True)
    x, t, y, noise = batch

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x, t, y)
        (out.float() - noise).square().mean().backward()
        optimiser.step()

    return step


def timed(step: Callable[[], None]) -> float:
    """Milliseconds of one step."""
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def measure(name: str, size: int, repeats: int, bf16_repeats: int) -> tuple[list[Timing], dict[str, float]]:
    """Timings of the four variants, and how far ours and the plain model are apart."""
    ours = random_model(name)
    plain = plain_twin(ours)
    batch = random_batch(ours, size)
    agreement = check_agreement(ours, plain, batch)

    def compiled() -> nn.Module:
        twin = random_model(name)
        twin.compile(fullgraph=True)
        return twin

    steps = {
        PLAIN: train_step(plain, batch, autocast=False),
        "ours eager fp32": train_step(ours, batch, autocast=False),
        "ours compiled fp32": train_step(compiled(), batch, autocast=False),
    }
    if bf16_repeats:
        steps["ours compiled bf16 autocast"] = train_step(compiled(), batch, autocast=True)
    rounds = {variant: bf16_repeats if "bf16" in variant else repeats for variant in steps}
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    with tqdm(total=len(steps) + max(rounds.values()), desc="compiling and warming up") as bar:
        for step in steps.values():
            step()
            step()
            bar.update()
        bar.set_description("timing")
        for done in range(max(rounds.values())):
            for variant, step in steps.items():
                if done < rounds[variant]:
                    times[variant].append(timed(step))
            bar.update()
    return [summary(variant, times[variant], times[PLAIN], size) for variant in steps], agreement


def summary(variant: str, times: list[float], plain: list[float], size: int) -> Timing:
    """Quartiles of `times`; the speed-up compares steps of the same round."""
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    speed_up = statistics.median(base / own for base, own in zip(plain, times, strict=False))
    return Timing(variant, len(times), median, lower, upper, size / median * 1e3, speed_up)


def table(timings: list[Timing]) -> str:
    """The timings as aligned text."""
    rows = [
        f"{'variant':30}{'median ms':>11}{'quartiles ms':>18}{'images/s':>10}{'speed-up':>10}{'repeats':>9}"
    ]
    for timing in timings:
        spread = f"{timing.lower_quartile_ms:.0f} - {timing.upper_quartile_ms:.0f}"
        rows.append(
            f"{timing.variant:30}{timing.median_ms:11.0f}{spread:>18}{timing.images_per_second:10.2f}"
            f"{timing.speed_up:10.2f}{timing.repeats:9}"
        )
    return "\n".join(rows)


def positive(least: int) -> Callable[[str], int]:
    """An argument's type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=DiT_models, default="DiT-S/2")
    parser.add_argument("--batch", type=positive(1), default=8)
    parser.add_argument("--repeats", type=positive(2), default=10)
    parser.add_argument(
        "--bf16-repeats",
        type=positive(0),
        default=4,
        help="0 or few on a processor without bf16 instructions",
    )
    parser.add_argument("--note", default="", help="kept in the JSON, e.g. what else the machine was doing")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.bf16_repeats == 1:
        parser.error("--bf16-repeats 1 has no spread: give 0 or at least 2")

    before = environment()
    timings, agreement = measure(args.model, args.batch, args.repeats, args.bf16_repeats)
    print(f"{args.model}, batch {args.batch}, train step")
    print(", ".join(f"{key} {value}" for key, value in before.items()))
    print(table(timings))
    if args.out is not None:
        result = {
            "benchmark": "cpu_step",
            "model": args.model,
            "batch": args.batch,
            "date": time.strftime("%Y-%m-%d"),
            "note": args.note,
            "machine": before,
            "load_average_after": round(os.getloadavg()[0], 2),
            "largest_difference_from_plain": agreement,
            "timings": [asdict(timing) for timing in timings],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
