"""The four conditioning blocks at equal steps: `python -m benchmarks.analysis.conditioning --out FOLDER`.

As Peebles & Xie 2023, figure 5: the demo's recipe with each block, all else alike, several seeds each. While they
train, the averaged weights are scored by the Frechet distance of unguided samples, features those of the demo's
classifier; at the end by their loss on held-out images. Writes FOLDER/conditioning.json and FOLDER/conditioning.png;
the runs stay in FOLDER, and the same command resumes where it was interrupted.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_fast.distributed.world import join_world
from dit_fast.model.blocks import CONDITIONING
from dit_fast.training.log import read_scores
from dit_fast.training.presets import PRESETS
from dit_fast.training.scaling_study import Ladder, Rung

RECIPE: dict[str, Any] = {
    **PRESETS["demo"], "log_every": 10, "evaluate_samples": 500, "evaluate_features": "classifier", "sample_steps": 25,
}  # fmt: skip
SCORES = 3
"""Frechet distances in a run, at equal intervals."""


def rungs(seeds: int) -> list[Rung]:
    """A run for each block and seed."""
    return [
        Rung(f"{block}-{seed}", {"conditioning": block, "seed": seed})
        for seed in range(seeds)
        for block in CONDITIONING
    ]


def compare(steps: int, seeds: int, folder: Path) -> list[dict[str, Any]]:
    """Train what is not trained yet; of each run its block, seed, curves of loss and distance, held-out loss."""
    options = {**RECIPE, "steps": steps, "evaluate_every": max(1, steps // SCORES)}
    with join_world("cpu") as world:
        ladder = Ladder(options, rungs(seeds), folder)
        for number, rung in enumerate(ladder.rungs):
            print(f"== {rung.name} ({number + 1} of {len(ladder.rungs)})", flush=True)
            ladder.train(number, world)
        study = ladder.study(torch.device("cpu"))
    runs = []
    for rung, measured in zip(ladder.rungs, study.models, strict=True):
        scores = read_scores(folder / rung.folder / "log.jsonl")
        distances = [(line["step"], line["proxy_fid"]) for line in scores]
        losses = [(step, loss) for step, _, loss in measured.losses]
        runs.append(
            {**rung.fields, "heldout_loss": measured.metric, "losses": losses, "distances": distances}
        )
    return runs


def of_block(runs: list[dict[str, Any]], block: str, key: str) -> np.ndarray:
    """What the runs of a block have under `key`, a row for each seed."""
    return np.array([run[key] for run in runs if run["conditioning"] == block])


def wins(runs: list[dict[str, Any]], better: str, worse: str) -> tuple[int, int]:
    """In how many pairs of runs of one seed `better` has the smaller held-out loss, and the smaller last distance."""
    losses = of_block(runs, better, "heldout_loss") < of_block(runs, worse, "heldout_loss")
    distances = of_block(runs, better, "distances")[:, -1, 1] < of_block(runs, worse, "distances")[:, -1, 1]
    return int(losses.sum()), int(distances.sum())


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds, smallest and largest, and in how many seeds adaLN-Zero is better."""
    steps = [int(step) for step in of_block(runs, CONDITIONING[0], "distances")[0, :, 0]]
    heads = ["block", "held-out loss", *(f"distance at {step}" for step in steps), "adaln_zero is better"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for block in CONDITIONING:
        values = [of_block(runs, block, "heldout_loss"), *of_block(runs, block, "distances")[:, :, 1].T]
        cells = [block]
        for value, digits in zip(values, [4, *[1] * len(steps)], strict=True):
            cells.append(f"{value.mean():.{digits}f} ({value.min():.{digits}f} to {value.max():.{digits}f})")
        losses, distances = wins(runs, "adaln_zero", block)
        cells.append(f"loss {losses}, distance {distances} of {len(values[0])} seeds")
        lines.append(f"| {' | '.join(cells if block != 'adaln_zero' else [*cells[:-1], ''])} |")
    return "\n".join(lines) + "\n"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Training loss and Frechet distance over steps, means and ranges over seeds, as PNG; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, distance = figure.subplots(1, 2)
    for block in CONDITIONING:
        for axes, key in ((loss, "losses"), (distance, "distances")):
            curves = of_block(runs, block, key)
            steps, values = curves[0, :, 0], curves[:, :, 1]
            (line,) = axes.plot(steps, values.mean(0), "-" if axes is loss else "o-", label=block)
            axes.fill_between(
                steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0
            )
    seeds = len(of_block(runs, CONDITIONING[0], "heldout_loss"))
    loss.set(xlabel="optimiser step", ylabel="training loss, smoothed", xscale="log", yscale="log")
    distance.set(xlabel="optimiser step", ylabel="Frechet distance (classifier's features)", yscale="log")
    loss.set_title(f"mean and range of {seeds} seeds")
    distance.set_title("unguided samples of the averaged weights")
    distance.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=RECIPE["steps"], help="of each run (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each block (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("conditioning"))
    args = parser.parse_args()
    runs = compare(args.steps, args.seeds, args.out)
    print(table(runs))
    (args.out / "conditioning.json").write_text(json.dumps(runs) + "\n")
    draw(runs, args.out / "conditioning.png")


if __name__ == "__main__":
    main()
