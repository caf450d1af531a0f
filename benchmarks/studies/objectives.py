"""Every conditioning block with every objective, trained on the demo data: `python -m benchmarks.studies.objectives`.

Trains a tiny model for each pair and writes OUT/objectives.md: the loss at the start and at the end, and whether
samples are finite.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dit_fast.interop import load_model
from dit_fast.model.blocks import CONDITIONING
from dit_fast.sampling import Guidance, Sampler, SamplerConfig, default_solver, sampling_schedule
from dit_fast.sampling.schedule import VELOCITY_SOLVERS
from dit_fast.training.config import TrainConfig, open_set
from dit_fast.training.log import read_log
from dit_fast.training.run import train
from dit_fast.training.trainer import Trainer

TINY: dict[str, Any] = {
    "data": "digits", "hidden_size": 64, "depth": 2, "num_heads": 2, "patch_size": 2, "batch_size": 32,
    "lr": 2e-3, "beta2": 0.99, "ema_decay": 0.98, "device": "cpu", "log_every": 20,
}  # fmt: skip

# Options of each objective, and what share of its first loss its last may be.
OBJECTIVES: dict[str, tuple[dict[str, Any], float]] = {
    "diffusion, epsilon": ({"diffusion_steps": 100}, 0.3),
    "diffusion, epsilon, variance by its logarithm": ({"diffusion_steps": 100, "learned_range": False}, 0.3),
    "diffusion, epsilon, fixed variance": ({"diffusion_steps": 100, "learn_sigma": False}, 0.3),
    "diffusion, epsilon, fixed small variance, cosine": (
        {"diffusion_steps": 100, "learn_sigma": False, "sigma_small": True, "noise_schedule": "squaredcos_cap_v2"}, 0.4,
    ),
    "diffusion, epsilon, the bound alone": ({"diffusion_steps": 100, "use_kl": True}, 0.6),
    "diffusion, x0, importance": (
        {"diffusion_steps": 25, "prediction": "x0", "timestep_sampling": "importance"}, 0.45,
    ),
    "diffusion, v, min-SNR": ({"diffusion_steps": 100, "prediction": "v", "loss_weighting": "min-snr"}, 0.7),
    "flow, velocity": ({"objective": "flow"}, 0.6),
    "flow, velocity and its direction, logit-normal": (
        {"objective": "flow", "direction_loss": True, "timestep_sampling": "logit-normal"}, 0.75,
    ),
    "flow, velocity, GVP": ({"objective": "flow", "path": "gvp"}, 0.7),
    "flow, x0, weighted as the velocity": (
        {"objective": "flow", "prediction": "x0", "loss_weighting": "velocity"}, 0.15,
    ),
    "flow, score, VP": ({"objective": "flow", "path": "vp", "prediction": "score"}, 0.3),
    "flow, score, weighted by the likelihood": (
        {"objective": "flow", "prediction": "score", "loss_weighting": "likelihood"}, 0.65,
    ),
    "flow, epsilon, GVP, logit-normal": (
        {"objective": "flow", "path": "gvp", "prediction": "epsilon", "timestep_sampling": "logit-normal"}, 0.4,
    ),
}  # fmt: skip


class Outcome(NamedTuple):
    """A run's loss before the first step, the mean of its last, and the largest value of samples of its averages."""

    conditioning: str
    objective: str
    first: float
    last: float
    bound: float
    largest_sample: float

    @property
    def sound(self) -> bool:
        return self.last < self.bound * self.first and np.isfinite(self.largest_sample)


def table(steps: int, folder: Path) -> Iterator[Outcome]:
    """A run for each pair of block and objective."""
    for conditioning in CONDITIONING:
        for name, (options, bound) in OBJECTIVES.items():
            config = TrainConfig(**TINY, **options, conditioning=conditioning, steps=steps)
            run = folder / f"{conditioning} {name}".replace(" ", "-").replace(",", "")
            train(config, run)
            losses = [line["loss"] for line in read_log(run / "log.jsonl")]
            outcome = Outcome(conditioning, name, first_loss(config), losses[-1], bound, largest_sample(run))
            print(outcome, flush=True)
            yield outcome


def first_loss(config: TrainConfig) -> float:
    """The mean loss over eight batches of the model that a run begins with."""
    trainer = Trainer(config, open_set(config))
    losses = []
    for step in range(8):
        samples, labels = trainer.stream.stored(step)
        trainer.work.state.step.fill_(step)
        x, t, noise, y, weights = trainer.work.draw(samples, labels)
        with torch.no_grad():
            loss = trainer.objective.training_losses(trainer.work.denoise, x, t, {"y": y}, noise=noise)[
                "loss"
            ]
        losses.append(float((loss if weights is None else loss * weights).mean()))
    return float(np.mean(losses))


def largest_sample(run: Path) -> float:
    """Of ten samples of a run, guided, in 20 steps."""
    model, info = load_model(run)
    solver = default_solver(info.diffusion)
    schedule = sampling_schedule(info.diffusion, 20, solver, learn_sigma=model.learn_sigma)
    clip = solver not in VELOCITY_SOLVERS
    sampler = Sampler(model, schedule, SamplerConfig(solver=solver, guidance=Guidance(2.0, None), clip=clip))
    return float(sampler(range(10)).abs().max())


def markdown(outcomes: list[Outcome]) -> str:
    """The table of last losses, as shares of the first, a row for each objective."""
    cells = {(o.objective, o.conditioning): o for o in outcomes}
    lines = [
        f"| objective | first loss | bound | {' | '.join(CONDITIONING)} |",
        "|---" * (3 + len(CONDITIONING)) + "|",
    ]
    for name, (_, bound) in OBJECTIVES.items():
        row = [cells[name, conditioning] for conditioning in CONDITIONING]
        shares = (f"{o.last / o.first:.2f}" + ("" if o.sound else " (not sound)") for o in row)
        lines.append(f"| {name} | {row[0].first:.3f} | {bound:.2f} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120, help="of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("objectives"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dit-fast-") as name:
        text = markdown(list(table(args.steps, Path(name))))
    (args.out / "objectives.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
