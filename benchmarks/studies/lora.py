"""LoRA against full fine-tuning on another set of digits: `python -m benchmarks.studies.lora`.

A small class-conditional model is trained on MNIST at 14 x 14 once. Then two runs start from it on the 8 x 8 digits of
scikit-learn, scaled to 14 x 14, with the same data, draws and number of steps: adapters of rank 8, and all weights.
Samples before and after are scored as `make demo` scores them (`dit_fast.evaluation.Scorer`), by a classifier of the
new set. Writes OUT/lora.json and the picture --picture.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import commit, environment
from dit_fast.data import ImageSet, open_data
from dit_fast.evaluation import Scorer
from dit_fast.interop import load_model
from dit_fast.interop.adapter import read_adapter
from dit_fast.sampling import (
    Guidance,
    Sampler,
    SamplerConfig,
    default_solver,
    draw_grid,
    sampling_schedule,
    to_uint8,
)
from dit_fast.training.config import TrainConfig
from dit_fast.training.log import read_log
from dit_fast.training.run import train

SIZE = 14
RECIPE: dict[str, Any] = {
    "image_size": SIZE, "hidden_size": 160, "depth": 4, "num_heads": 4, "patch_size": 7, "batch_size": 64,
    "lr": 2e-3, "beta2": 0.99, "ema_decay": 0.995, "prediction": "x0", "diffusion_steps": 100, "log_every": 50,
    "device": "cpu", "threads": 1,
}  # fmt: skip
RANK = 8
SHOWN = 6


def scores(
    path: Path, scorer: Scorer, per_class: int, adapter: Path | None = None
) -> tuple[dict[str, Any], np.ndarray]:
    """Scores of samples of the averaged weights, and a grid of some of them, a column for each class."""
    model, info = load_model(path, adapter=adapter)
    schedule = sampling_schedule(
        info.diffusion, 100, default_solver(info.diffusion), learn_sigma=model.learn_sigma
    )
    options = SamplerConfig(guidance=Guidance(2.0, None), clip=True, graph="never")
    labels = torch.arange(10).repeat(per_class)
    drawn = Sampler(model, schedule, options)(labels, seed=0, batch_size=len(labels))
    # In 256 levels, as they are written.
    pixels = to_uint8(drawn)
    found = scorer(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, labels)
    grid = draw_grid([("", pixels[10 * row : 10 * row + 10]) for row in range(SHOWN)])
    return found.as_json(), np.asarray(grid)


def loss_curve(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["mse"]) for line in read_log(run / "log.jsonl") if "mse" in line]


def draw(result: dict[str, Any], grids: dict[str, np.ndarray], path: Path) -> None:
    """Samples before and after, with their agreement, and the losses of both runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    *panels, axes = figure.subplots(2, 2).flat
    for panel, (name, grid) in zip(panels, grids.items(), strict=True):
        panel.imshow(grid, cmap="gray")
        agreement = result["models"][name]["scores"]["labels"]["agreement"]
        trained = result["models"][name]["trained_parameters"]
        panel.set_title(
            f"{name}: {trained:,} parameters trained, {agreement:.1%} agree with their label", fontsize=9
        )
        panel.axis("off")
    for name, facts in result["models"].items():
        if facts.get("curve"):
            axes.plot(*zip(*facts["curve"], strict=True), label=name)
    axes.set(xlabel="optimizer step", ylabel="mean squared error in training", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, help="run of the first model, trained earlier by this recipe")
    parser.add_argument(
        "--base-steps", type=int, default=700, help="of the first model (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=400, help="of each run from it (default: %(default)s)")
    parser.add_argument(
        "--per-class", type=int, default=40, help="samples that are scored (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/lora.png"))
    args = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dit-fast-") as name:
        folder = Path(name)
        base = args.base or folder / "base"
        if args.base is None:
            train(
                TrainConfig(**RECIPE, data="mnist", steps=args.base_steps, ckpt_every=args.base_steps), base
            )
        parameters = sum(p.numel() for p in load_model(base)[0].parameters() if p.requires_grad)
        shared = {
            **RECIPE, "data": "digits", "steps": args.steps, "ckpt_every": args.steps, "init_from": str(base),
        }  # fmt: skip
        train(TrainConfig(**shared, lora=RANK), folder / "lora")
        train(TrainConfig(**{**shared, "lr": 5e-4}), folder / "full")
        adapter = read_adapter(folder / "lora" / "adapter")
        adapted = sum(tensor.numel() for tensor in adapter.state.values())
        data = open_data("digits", SIZE)
        assert isinstance(data, ImageSet)
        scorer = Scorer(data)
        result: dict[str, Any] = {
            "command": "python -m benchmarks.studies.lora",
            "commit": commit(),
            "environment": environment(),
            "base_steps": args.base_steps,
            "steps": args.steps,
            "rank": RANK,
            "parameters": parameters,
            "models": {},
        }
        grids = {}
        runs = {
            "before": (base, None, 0),
            f"LoRA of rank {RANK}": (base, folder / "lora", adapted),
            "all weights": (folder / "full", None, parameters),
        }
        for kind, (path, run, trained) in runs.items():
            found, grids[kind] = scores(path, scorer, args.per_class, run and run / "adapter")
            result["models"][kind] = {
                "trained_parameters": trained, "trained_share": trained / parameters, "scores": found,
                "curve": [] if path == base and run is None else loss_curve(run or path),
            }  # fmt: skip
            print(kind, trained, found["labels"]["agreement"], found, flush=True)
    result["seconds"] = round(time.perf_counter() - begun, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "lora.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, grids, args.picture)


if __name__ == "__main__":
    main()
