"""A run's model, optimiser and step: built from a configuration, saved, and restored to the bit."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast import __version__, keyed
from dit_fast.data import ImageSet, LatentSet, open_stream
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import CheckpointError, ConfigError, NonFiniteError
from dit_fast.models import DiT
from dit_fast.training.checkpoint import Checkpoint, save_checkpoint
from dit_fast.training.config import TrainConfig, build_model
from dit_fast.training.cuda_graph import CudaGraphs, GraphedStep
from dit_fast.training.precision import (
    AUTOCAST,
    LossScale,
    choose_precision,
    keep_residual_in_bf16,
    use_float8,
)
from dit_fast.training.ranges import OFF, Ranges, mark_blocks, nvtx_ranges
from dit_fast.training.rates import learning_rate
from dit_fast.training.step import StepOptions, StepState, StepValues, TrainStep
from dit_fast.training.torch_optimizer import make_optimizer

logger = logging.getLogger(__name__)


class Trainer:
    """Model, optimiser with averaged weights, diffusion and stream of a run, and its step.

    `step` counts finished optimiser steps. The model is trained in eval mode: label dropout is the only thing
    that a DiT does differently in training, and the step draws it itself, keyed by the sample.
    """

    def __init__(self, config: TrainConfig, data: ImageSet | LatentSet, ranges: Ranges | None = None):
        self.device = choose_device(config.device)
        # A run keeps the precision that "auto" chose, wherever it goes on.
        config = dataclasses.replace(config, precision=choose_precision(config.precision, self.device))
        self.config = config
        self.data = data
        self.ranges = ranges or (nvtx_ranges() if config.nvtx else OFF)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = build_model(config, data).to(self.device).eval()
        self._prepare(self.model)
        self.denoiser: Callable[[Tensor, Tensor, Tensor], Tensor] = self.model
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        rate_dtype = torch.float64 if config.optimizer == "ours" else torch.float32
        self.state = StepState(self.device, config.log_every, rate_dtype)
        self.optimizer = make_optimizer(
            config.optimizer,
            self.trained.values(),
            lr=self.state.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            ema_decay=config.ema_decay,
            max_grad_norm=config.max_grad_norm,
            kernels=config.kernels,
        )
        self.diffusion = create_diffusion("", **config.diffusion_arguments())
        self.stream = open_stream(data, config.batch_size, config.seed, config.flip)
        self.total_steps = config.total_steps(len(data.train))
        self.step = 0
        self.seconds = 0.0
        # On CUDA, reading a value waits for the device, so there it is read when a log line is due.
        self.checks_every_step = self.device.type == "cpu"
        self.loss_scale = LossScale(self.device) if config.precision == "fp16" else None
        self.work = TrainStep(
            self._denoise,
            self.optimizer,
            self.diffusion,
            StepOptions(
                seed=config.seed,
                batch_size=config.batch_size,
                num_classes=data.num_classes,
                class_dropout_prob=config.class_dropout_prob,
                accumulate=config.accumulate,
                skip_nonfinite=config.skip_nonfinite,
            ),
            self.state,
            torch.arange(config.batch_size, device=self.device),
            posterior=data.posterior if isinstance(data, LatentSet) else None,
            loss_scale=self.loss_scale,
            before_update=self._check_at_once,
            ranges=self.ranges,
        )
        self.run_step: Callable[[Tensor, Tensor], None] = self.work
        if config.cuda_graph:
            if self.device.type != "cuda":
                raise ConfigError(f"--cuda-graph: a step on a {self.device.type} device is no CUDA graph")
            self.run_step = GraphedStep(self.work, CudaGraphs())
        self._rate: float | None = None
        self._read = 0

    def _prepare(self, model: DiT) -> None:
        """Precision, compilation and ranges of the model's parts, in the order in which they may be nested."""
        config = self.config
        if config.precision == "fp8":
            use_float8(model, self.device)
        if config.residual == "bf16":
            keep_residual_in_bf16(model)
        if config.compile and can_compile(self.device):
            for block in model.blocks:
                # The method, not the module: hooks (ranges, fully_shard) then stay outside of the graph.
                setattr(block, "forward", torch.compile(block.forward, dynamic=False, fullgraph=True))  # noqa: B010
        if self.ranges is not OFF:
            mark_blocks(model.blocks, self.ranges)

    def train_step(self, samples: Tensor, labels: Tensor) -> None:
        """One optimiser and EMA step on what `stream.stored` gives for `step`: samples or moments, labels (B,).

        Raises NonFiniteError for a loss or gradient norm that is NaN or infinite, with the parameters and the
        optimiser as they were before the step: at once on the CPU, at the next `check_finite` on CUDA.
        """
        rate = self.learning_rate()
        if rate != self._rate:
            self._rate = rate
            self.state.lr.fill_(rate)
        self.run_step(samples.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
        self.step += 1

    def learning_rate(self) -> float:
        """The rate of the next step."""
        config = self.config
        return learning_rate(
            self.step,
            lr=config.lr,
            schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            total_steps=self.total_steps,
        )

    def _check_at_once(self) -> None:
        if self.checks_every_step:
            self.check_finite()

    def check_finite(self) -> None:
        """Raise NonFiniteError if a step so far had a loss or gradient norm that is NaN or infinite."""
        failed = int(self.state.failed)
        if failed < 0:
            return
        samples = ", ".join(map(str, self.sample_ids(failed)[:8]))
        more = f", {self.config.batch_size - 8} more" if self.config.batch_size > 8 else ""
        cap = self.config.skip_nonfinite
        raise NonFiniteError(
            f"step {failed}: the loss or the gradient norm is not finite"
            + (f", after {cap} such steps were skipped" if cap else "")
            + f"; the update was not made (training samples {samples}{more}). "
            f"Start anew with a lower --lr or with --precision fp32; the last checkpoint is whole"
        )

    def sample_ids(self, step: int) -> list[int]:
        """Positions in the data set of the samples of step number `step`, counted from 1."""
        indices = self.stream.indices(step - 1)
        return self.stream.split.members[indices].tolist()

    def timesteps(self, step: int) -> list[int]:
        """The noise levels that the samples of step number `step`, counted from 1, were given."""
        numbers = self.stream.numbers(step - 1)
        key = keyed.key(self.config.seed, "timestep")
        return keyed.integers(key, numbers, self.diffusion.num_timesteps).tolist()

    def values(self) -> list[StepValues]:
        """What the steps since the last call left behind, at most as many as are remembered; waits for the device."""
        size = len(self.state.history)
        rows = self.state.history.tolist()
        first, self._read = max(self._read, self.step - size), self.step
        return [StepValues.of_row(rows[step % size]) for step in range(first, self.step)]

    def manifest(self) -> dict[str, Any]:
        """What a checkpoint says about itself, besides its files."""
        return {
            "dit_fast_version": __version__,
            "torch_version": torch.__version__,
            "step": self.step,
            "samples_seen": self.step * self.config.batch_size,
            "seconds": round(self.seconds, 3),
            "seed": self.config.seed,
            "train_config": dataclasses.asdict(self.config),
            "data": self.data.describe(),
            "class_names": list(self.data.class_names),
            "diffusion": self.config.diffusion_arguments(),
            "ema_decay": self.config.ema_decay,
            "updates": self._updates(),
            "skipped": int(self.state.skipped),
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state(),
        }

    def _updates(self) -> int:
        """Updates that the optimiser made: `step` less the steps that were left out."""
        held = [self.optimizer.state.get(p, {}).get("step") for p in self.trained.values()]
        return max((int(step) for step in held if step is not None), default=0)

    def ema_state(self) -> dict[str, Tensor]:
        """The averaged state dict, with the model's names; the tensors are live, not copies."""
        return {
            name: self.optimizer.average(self.trained[name]) if name in self.trained else tensor.detach()
            for name, tensor in self.model.state_dict().items()
        }

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments by parameter name; before the first step they are zeros."""
        state = {}
        for name, parameter in self.trained.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                held = self.optimizer.state.get(parameter, {}).get(moment)
                state[f"{moment}.{name}"] = torch.zeros_like(parameter) if held is None else held
        return state

    def save(self, run: Path) -> Path:
        """Write a checkpoint of this moment; never one that follows a step that failed."""
        self.check_finite()
        with self.ranges("checkpoint"):
            return save_checkpoint(
                run,
                self.model,
                self.ema_state(),
                self.optimizer_state(),
                self.manifest(),
                self.config.keep_checkpoints,
            )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the state of a verified checkpoint. Raises CheckpointError if it was trained on other data."""
        manifest, present = checkpoint.manifest, self.data.describe()
        changed = [
            f"{key} is {manifest['data'].get(key)} there and {value} here"
            for key, value in present.items()
            if key != "name" and manifest["data"].get(key) != value
        ]
        if changed:
            raise CheckpointError(f"{checkpoint.path} was trained on other data: {'; '.join(changed)}")
        self.step = self._read = checkpoint.step
        self.state.step.fill_(self.step)
        self.state.skipped.fill_(manifest.get("skipped", 0))
        self.seconds = float(manifest["seconds"])
        self.model.load_state_dict(checkpoint.model)
        if self.loss_scale is not None and manifest.get("loss_scale"):
            self.loss_scale.restore(manifest["loss_scale"])
        updates = float(manifest.get("updates", self.step))
        for name, parameter in self.trained.items():
            # Copied, since a file's tensors are mapped.
            self.optimizer.state[parameter] = {
                "step": torch.tensor(updates, device=self.device),
                "exp_avg": checkpoint.optimizer[f"exp_avg.{name}"].to(self.device, copy=True),
                "exp_avg_sq": checkpoint.optimizer[f"exp_avg_sq.{name}"].to(self.device, copy=True),
                "ema": checkpoint.ema[name].to(self.device, copy=True),
            }

    def _denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        # Only the model runs in low precision; the losses are taken in float32.
        low = AUTOCAST.get(self.config.precision)
        with torch.autocast(self.device.type, low or torch.bfloat16, enabled=low is not None):
            return self.denoiser(x, t, y).float()


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda". Raises ConfigError for CUDA where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this PyTorch sees no CUDA device; give --device cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds the compiler it needs; says so in one line where it does not."""
    if device.type == "cuda":
        return True
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        logger.warning("--compile: no C++ compiler (%s) found; training without torch.compile", compiler)
        return False
    return True
