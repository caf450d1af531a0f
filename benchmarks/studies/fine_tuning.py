"""Fine-tuning against training from scratch: `python -m benchmarks.studies.fine_tuning`.

The demo's model of MNIST's ten digits is trained once, or taken from the run of `make demo`. It then initializes runs
on a set of three other classes, mirrored digits 2, 4 and 7 in few images, which are compared with runs from random
weights: the same data, draws and recipe. Measured is the loss of the averaged weights on held-out images. Writes
OUT/fine_tuning.json and the picture --picture.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.environment import environment
from dit_fast.checkpoint.folder import step_folders
from dit_fast.data import open_data, open_stream
from dit_fast.data.datasets import BUILTIN
from dit_fast.diffusion import create_objective
from dit_fast.diffusion.timestep_sampler import TimestepSampling
from dit_fast.interop import load_model
from dit_fast.interop.guidance import default_guidance
from dit_fast.sampling import Sampler, SamplerConfig, default_solver, sampling_schedule
from dit_fast.training.config import TrainConfig
from dit_fast.training.presets import PRESETS
from dit_fast.training.run import train
from dit_fast.utils import keyed
from dit_fast.utils.images import draw_grid, to_uint8

OWN = ("data", "steps", "ckpt_every")
RECIPE: dict[str, Any] = {
    **{name: value for name, value in PRESETS["demo"].items() if name not in OWN},
    "device": "cpu",
    "keep_checkpoints": 0,
}
DIGITS = (2, 4, 7)
PER_CLASS = 400
DRAWS = 2


def write_mirrored(folder: Path) -> None:
    """Three classes of mirrored MNIST digits as PNG files."""
    images, labels = BUILTIN["mnist"]()
    for digit in DIGITS:
        target = folder / f"mirrored {digit}"
        target.mkdir(parents=True)
        for number in (labels == digit).nonzero()[0][:PER_CLASS]:
            Image.fromarray(np.ascontiguousarray(images[number, :, ::-1])).save(target / f"{number}.png")


@torch.no_grad()
def heldout_loss(checkpoint: Path, data: Any) -> float:
    """Loss of the averaged weights on held-out images, `DRAWS` times with fixed timesteps and noise."""
    model, info = load_model(checkpoint)
    objective = create_objective(**info.diffusion)
    timesteps = TimestepSampling(objective, 0, "uniform", torch.device("cpu"))
    stream = open_stream(dataclasses.replace(data, train=data.heldout), len(data.heldout), 0, flip=False)
    losses = []
    for step in range(DRAWS):
        samples, labels = stream.batch(step)
        index = stream.numbers(step)
        t, _ = timesteps.draw(index)
        noise = keyed.normal(keyed.key(0, "noise"), index, tuple(samples.shape[1:]))
        losses.append(objective.training_losses(model, samples, t, {"y": labels}, noise=noise)["loss"])
    return torch.cat(losses).double().mean().item()


def curve(config: TrainConfig, run: Path) -> list[tuple[int, float]]:
    """Train; held-out loss at every checkpoint."""
    train(config, run)
    data = open_data(config.data, holdout=config.holdout, flip=False)
    return [(int(path.name.removeprefix("step-")), heldout_loss(path, data)) for path in step_folders(run)]


def samples(run: Path, step: int) -> np.ndarray:
    """Grid of samples of the averaged weights at a step."""
    model, info = load_model(run / "checkpoints" / f"step-{step:07d}")
    schedule = sampling_schedule(
        info.diffusion, 50, default_solver(info.diffusion), learn_sigma=model.learn_sigma
    )
    guidance = dataclasses.replace(default_guidance(model, trained_here=True), scale=2.0)
    sampler = Sampler(model, schedule, SamplerConfig(guidance=guidance, clip=True, graph="never"))
    images = to_uint8(sampler(torch.arange(len(DIGITS)).repeat_interleave(8), seed=0))
    return np.asarray(draw_grid([("", images[8 * row : 8 * row + 8]) for row in range(len(DIGITS))]))


def first_at(points: Sequence[tuple[int, float]], level: float) -> int | None:
    """The first measured step with a loss of at most `level`."""
    return next((step for step, loss in points if loss <= level), None)


def draw(result: dict[str, Any], grids: dict[str, np.ndarray], path: Path) -> None:
    """Curves of all seeds, and samples of both after the same number of steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *pictures = figure.subplots(1, 3, width_ratios=[1.4, 1, 1])
    for color, name in enumerate(("scratch", "fine-tuned")):
        for number, points in enumerate(result["curves"][name]):
            axes.plot(
                *zip(*points, strict=True), color=f"C{color}", alpha=0.8, label=None if number else name
            )
    axes.set(xlabel="optimizer step", ylabel="held-out loss of the averaged weights", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    for panel, (name, grid) in zip(pictures, grids.items(), strict=True):
        panel.imshow(grid, cmap="gray")
        panel.set_title(name, fontsize="medium")
        panel.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=300, help="of each run on three classes (default: %(default)s)"
    )
    parser.add_argument("--base", type=Path, help="run of the demo (default: trained here)")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/fine-tuning.png"))
    args = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dit-fast-") as name:
        folder = Path(name)
        write_mirrored(folder / "mirrored")
        base = args.base or folder / "base"
        if args.base is None:
            train(TrainConfig(**PRESETS["demo"]), base)
        curves: dict[str, list[list[tuple[int, float]]]] = {"scratch": [], "fine-tuned": []}
        every = args.steps // 30
        for seed in range(args.seeds):
            for kind, origin in (("scratch", None), ("fine-tuned", str(base))):
                config = TrainConfig(
                    **RECIPE, data=str(folder / "mirrored"), channels=1, flip=False, holdout=0.2, seed=seed,
                    steps=args.steps, ckpt_every=every, init_from=origin,
                )  # fmt: skip
                curves[kind].append(curve(config, folder / f"{kind}-{seed}"))
                print(kind, seed, curves[kind][-1], flush=True)
        shown = args.steps // 3
        grids = {f"{kind}, step {shown}": samples(folder / f"{kind}-0", shown) for kind in curves}
    targets = [points[-1][1] for points in curves["scratch"]]
    reached = [first_at(points, level) for points, level in zip(curves["fine-tuned"], targets, strict=True)]
    result: dict[str, Any] = {
        "steps": args.steps,
        "scratch_final_loss": targets,
        "fine_tuned_reaches_it_at_step": reached,
        "largest_fraction_of_the_steps": None
        if None in reached
        else max(s / args.steps for s in reached if s),
        "images": len(DIGITS) * PER_CLASS,
        "recipe": RECIPE,
        "curves": curves,
        "seconds": round(time.perf_counter() - begun),
        "environment": environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fine_tuning.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, grids, args.picture)
    print({key: value for key, value in result.items() if key not in ("curves", "environment", "recipe")})


if __name__ == "__main__":
    main()
