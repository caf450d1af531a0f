"""A scaling study: models of several sizes, trained alike, and power laws of their losses over compute.

As in Peebles & Xie 2023 (section 5, figures 2, 8 and 9), every model is trained for the same number of steps. The loss
of its averaged weights is fitted over the multiply-adds of its forward pass, and the smallest loss that any model
reaches within a training compute over that compute, which is 3 x 2 FLOPs per multiply-add, image and step.
"""

import dataclasses
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.checkpoint.folder import latest_checkpoint, read_part, step_folders
from dit_fast.checkpoint.manifest import read_manifest
from dit_fast.data import open_stream
from dit_fast.diffusion import create_objective
from dit_fast.diffusion.timestep_sampler import TimestepSampling
from dit_fast.distributed.world import World
from dit_fast.errors import ConfigError, NonFiniteError
from dit_fast.model.cost import Counts, count
from dit_fast.model.dit import DiT
from dit_fast.model.folder import load_weights
from dit_fast.model.presets import DiT_models
from dit_fast.training.config import TrainConfig, build_model, open_set, resumed_config
from dit_fast.training.log import read_log, smooth
from dit_fast.training.run import TrainResult, resume, train
from dit_fast.utils import keyed

LADDER = ("32x2", "64x3", "96x4", "128x5", "160x6")
"""WIDTHxDEPTH of five small models, each with about three times the computation of the one before."""

HEAD_WIDTH = 32
"""Width of an attention head of models that are given as WIDTHxDEPTH."""

DRAWS = 2048
"""Samples, each with a timestep and noise, on which the averaged weights are measured; the same for all models."""

_POINTS = 60
_SETTLED = 0.1
_LOG_LINES = 100


@dataclass(frozen=True)
class Rung:
    """One model of the ladder: its name, and its fields of `TrainConfig`."""

    name: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, name: str) -> "Rung":
        """From a size of the paper, or WIDTHxDEPTH. Raises ConfigError."""
        if name in DiT_models:
            return cls(name, {"model": name})
        match = re.fullmatch(r"(\d+)x(\d+)", name)
        if match is None or int(match[1]) % HEAD_WIDTH or not int(match[1]) * int(match[2]):
            raise ConfigError(
                f"--sizes {name}: give WIDTHxDEPTH with a width that {HEAD_WIDTH} divides, as in 128x6, or a size of "
                f"the paper, as in DiT-S/8"
            )
        width, depth = int(match[1]), int(match[2])
        return cls(name, {"hidden_size": width, "depth": depth, "num_heads": width // HEAD_WIDTH})

    @property
    def folder(self) -> str:
        return self.name.replace("/", "-")


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x^exponent, fitted to logarithms by least squares, and the correlation of the logarithms."""

    exponent: float
    factor: float
    correlation: float

    @classmethod
    def fit(cls, x: Sequence[float], y: Sequence[float]) -> "PowerLaw":
        """Fit y over x. Raises ConfigError for values without a logarithm, or fewer than two different ones."""
        if len(set(x)) < 2 or min(*x, *y) <= 0:
            raise ConfigError(f"no power law through {len(set(x))} sizes with values from {min(y):.3g}")
        u, v = np.log(x), np.log(y)
        exponent, constant = np.polyfit(u, v, 1)
        return cls(float(exponent), float(np.exp(constant)), float(np.corrcoef(u, v)[0, 1]))

    def __call__(self, x: float) -> float:
        return self.factor * x**self.exponent


@dataclass(frozen=True)
class Measured:
    """Results of a rung.

    Attributes:
        name: Name of the rung.
        counts: Parameters and computation of the model.
        seconds: Training time.
        losses: (step, training FLOPs so far, smoothed training loss) of each log line.
        metric: Loss of the averaged weights on held-out samples.
    """

    name: str
    counts: Counts
    seconds: float
    losses: list[tuple[int, float, float]]
    metric: float

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of `losses`."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(loss for _, _, loss in last) / len(last)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "counts": self.counts.as_json()}


@dataclass(frozen=True)
class Study:
    """A finished study. metric: description of `Measured.metric`."""

    steps: int
    batch_size: int
    data: str
    metric: str
    models: list[Measured]

    @property
    def over_model(self) -> PowerLaw:
        """The metric over multiply-adds of a forward pass."""
        return PowerLaw.fit(
            [model.counts.macs for model in self.models], [model.metric for model in self.models]
        )

    @property
    def over_compute(self) -> PowerLaw:
        """The smallest training loss over training FLOPs."""
        return PowerLaw.fit(*zip(*self.frontier(), strict=True))

    def frontier(self) -> list[tuple[float, float]]:
        """(training FLOPs, smallest smoothed loss of any model within them), evenly in the logarithm of FLOPs.

        They range from a tenth of the smallest model's steps to the end of the largest model.
        """
        runs = [np.array(model.losses) for model in self.models]
        first = min(run[-1, 1] for run in runs) * _SETTLED
        last = max(run[-1, 1] for run in runs)
        points = []
        for flops in np.geomspace(first, last, _POINTS):
            within = [run[run[:, 1] <= flops * (1 + 1e-9), 2] for run in runs]
            lowest = [losses.min() for losses in within if len(losses)]
            if lowest:
                points.append((float(flops), float(min(lowest))))
        return points

    def as_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "data": self.data,
            "metric": self.metric,
            "metric_over_macs": asdict(self.over_model),
            "loss_over_training_flops": asdict(self.over_compute),
            "models": [model.as_json() for model in self.models],
        }


class Ladder:
    """The runs of a study in the folder `out`, one for each rung, all with the recipe `options` of `TrainConfig`.

    Args:
        options: Fields of `TrainConfig`, with either `steps` or `epochs` unless there is a budget.
        rungs: The models.
        out: Folder of the runs.
        budget: Training FLOPs of all models together, which determine the number of steps.

    Raises:
        ConfigError: Sizes that are not different, or a budget of less than one step; and the errors of `open_data`.
    """

    def __init__(
        self, options: dict[str, Any], rungs: Sequence[Rung], out: Path, budget: float | None = None
    ):
        names = [rung.name for rung in rungs]
        if len(set(names)) < max(2, len(names)):
            raise ConfigError(f"--sizes {' '.join(names)}: give at least two, each once")
        self.out = out
        self.rungs = rungs
        configs = [TrainConfig(**{**options, **rung.fields}) for rung in rungs]
        self.data = open_set(configs[0])
        self.counts = []
        for config in configs:
            with torch.device("meta"):
                model = build_model(config, self.data)
            self.counts.append(count(model, self.data.caption_tokens, self.data.shapes))
        self.batch_size = configs[0].batch_size
        step = sum(counts.training_flops for counts in self.counts) * self.batch_size
        if budget is None:
            self.steps = configs[0].total_steps(len(self.data.train))
        else:
            self.steps = int(budget // step)
            if not self.steps:
                raise ConfigError(
                    f"--budget {budget:.3g}: one step of all {len(rungs)} models takes {step:.3g} FLOP; give more"
                )
        self.flops = float(step * self.steps)
        logged = {"log_every": max(1, self.steps // _LOG_LINES)}
        self.options = {**logged, **options, "steps": self.steps, "epochs": None}

    def train(self, number: int, world: World) -> TrainResult | None:
        """Train or resume a rung to its end; None where it is finished. Raises the errors of `train` and `resume`."""
        rung = self.rungs[number]
        run = self.out / rung.folder
        asked = {**self.options, **rung.fields}
        if not world.first(lambda: bool(step_folders(run))):
            # A run that was killed before its first checkpoint cannot be resumed.
            world.first(lambda: shutil.rmtree(run, ignore_errors=True))
            return train(TrainConfig(**asked), run, world)
        path = latest_checkpoint(run, world)
        manifest = read_manifest(path)
        resumed_config(manifest["train_config"], asked, str(path))
        if manifest["step"] > self.steps:
            raise ConfigError(f"{path} is beyond the {self.steps} steps of this study; give another --out")
        return resume(run, asked, world) if manifest["step"] < self.steps else None

    def study(self, device: torch.device) -> Study:
        """Measure all rungs once they are trained."""
        metric = (
            f"loss of the averaged weights on {'held-out' if len(self.data.heldout) else 'training'} samples"
        )
        models = [self._measure(number, device) for number in range(len(self.rungs))]
        return Study(self.steps, self.batch_size, self.data.name, metric, models)

    def _measure(self, number: int, device: torch.device) -> Measured:
        rung, counts = self.rungs[number], self.counts[number]
        run = self.out / rung.folder
        path = latest_checkpoint(run)
        manifest = read_manifest(path)
        per_step = counts.training_flops * self.batch_size
        log = [record for record in read_log(run / "log.jsonl") if "loss" in record]
        losses = [
            (record["step"], float(record["step"] * per_step), loss)
            for record, loss in zip(log, smooth([record["loss"] for record in log]), strict=True)
        ]
        config = TrainConfig(**{**self.options, **rung.fields})
        with torch.device("meta"):
            model = build_model(config, self.data)
        load_weights(model, read_part(path, manifest, "ema"), str(path), assign=True)
        metric = self._loss(model.to(device).eval(), config, device)
        if not math.isfinite(metric):
            raise NonFiniteError(f"{path}: the loss of its averaged weights is not finite; give a lower --lr")
        return Measured(rung.name, counts, manifest["seconds"], losses, metric)

    @torch.no_grad()
    def _loss(self, model: DiT, config: TrainConfig, device: torch.device) -> float:
        """Mean loss of `DRAWS` samples, with the same timesteps and noise for all models."""
        objective = create_objective(**config.objective_arguments())
        timesteps = TimestepSampling(objective, 0, "uniform", device)
        losses = []
        for samples, labels, index in self._draws():
            t, _ = timesteps.draw(index.to(device))
            noise = keyed.normal(keyed.key(0, "noise"), index, tuple(samples.shape[1:])).to(device)
            conditions = {"y": labels.to(device)}
            losses.append(
                objective.training_losses(model, samples.to(device), t, conditions, noise=noise)["loss"]
            )
        return torch.cat(losses).double().mean().item()

    def _draws(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Held-out samples, or training samples where none are held out, with their labels and numbers."""
        split: Any = self.data.heldout if len(self.data.heldout) else self.data.train
        chosen = dataclasses.replace(self.data, train=split)
        stream = open_stream(chosen, min(self.batch_size, len(split)), 0, flip=False)
        for step in range(-(-DRAWS // stream.batch_size)):
            yield (*stream.batch(step), stream.numbers(step))
