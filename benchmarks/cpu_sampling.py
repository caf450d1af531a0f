"""CPU sampling, `Sampler` beside a loop built as the reference is: `python -m benchmarks.cpu_sampling --out FILE.json`.

The loop evaluates a plain PyTorch DiT on both halves of the batch at every step, takes its coefficients from float64
tables of the host, and draws and updates all 2n states. Both start from the same weights and draws; their samples are
compared before anything is timed. Times are processor seconds of all threads, which other programs lengthen less than
they do the clock; whole trajectories are interleaved, the speed-up is the median over rounds of loop / sampler.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.plain_dit import plain_twin, random_model
from benchmarks.plain_sampling import plain_sampling
from dit_fast.diffusion import create_diffusion
from dit_fast.models import DiT_models
from dit_fast.sampling import Guidance, Sampler, SamplerConfig

SCALE = 4.0


def timed(draw: Callable[[], Tensor]) -> float:
    """Processor seconds of one trajectory."""
    start = time.process_time()
    draw()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=DiT_models, default="DiT-S/2")
    numbers = {"images": 8, "steps": 4, "repeats": 5, "threads": torch.get_num_threads()}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number, help=f"(default: {number})")
    parser.add_argument("--note", default="", help="kept in the JSON, e.g. what else the machine was doing")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if small := [f"--{name}" for name in numbers if getattr(args, name) < 1]:
        parser.error(f"{', '.join(small)}: give at least 1")
    torch.set_num_threads(args.threads)

    model = random_model(args.model).eval()
    plain = plain_twin(model).eval()
    diffusion = create_diffusion(str(args.steps))
    labels = torch.arange(args.images) * 37 % 1000
    sampler = Sampler(model, diffusion, SamplerConfig(mode="reference", guidance=Guidance(SCALE)))
    ways: dict[str, Callable[[], Tensor]] = {
        "reference-structured loop": lambda: plain_sampling(
            plain, diffusion, labels, (4, 32, 32), scale=SCALE, null=1000, seed=0
        ),
        "Sampler": lambda: sampler(labels, seed=0),
    }
    expected, ours = (draw() for draw in ways.values())
    difference = ((ours - expected).abs().max() / expected.abs().max()).item()
    if difference > 1e-4:
        raise SystemExit(f"the samples disagree by {difference:.1e} of the largest value")

    before = environment()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, draw in ways.items():
            times[name].append(timed(draw))
    loop, own = times.values()
    ratios = sorted(a / b for a, b in zip(loop, own, strict=True))
    rows = {
        name: {"median_s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds)}
        for name, seconds in times.items()
    }
    print(f"{args.model}, {args.images} images, guidance, {args.steps} DDPM steps, float32 eager")
    for name, row in rows.items():
        print(f"{name:28}{row['median_s']:8.2f} s  ({row['least_s']:.2f} - {row['most_s']:.2f})")
    print(
        f"speed-up {statistics.median(ratios):.3f} ({ratios[0]:.3f} - {ratios[-1]:.3f}), {args.repeats} rounds"
    )
    if args.out is not None:
        result = {
            "benchmark": "cpu_sampling",
            "model": args.model,
            "images": args.images,
            "steps": args.steps,
            "repeats": args.repeats,
            "date": time.strftime("%Y-%m-%d"),
            "note": args.note,
            "environment": before,
            "largest_difference": difference,
            "times": rows,
            "speed_up": {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]},
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
