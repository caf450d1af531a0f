"""The training loop: one process, on the CPU or one CUDA device.

A step is a function of (seed, step) and the state before it: order, flips, timesteps, noise and dropped
labels come from generators keyed by them (`dit_fast.data.keyed`), so a resumed run is bit for bit the
uninterrupted one.
"""

import dataclasses
import logging
import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast import __version__
from dit_fast.data import ImageSet, LatentSet, generator, open_data, open_stream
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError, NonFiniteError, OutputError
from dit_fast.training.checkpoint import (
    Checkpoint,
    checkpoint_bytes,
    checkpoints_folder,
    latest_checkpoint,
    load_checkpoint,
    read_manifest,
    remove_leftovers,
    require_space,
    save_checkpoint,
)
from dit_fast.training.config import TrainConfig, build_model, resumed_config
from dit_fast.training.ema import Ema
from dit_fast.training.progress import Progress, Record, RunLog, plot_loss
from dit_fast.training.signals import StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended. `stopped_by`: the signal that ended it early; `checkpoint`: the last one written."""

    run: Path
    step: int
    total_steps: int
    checkpoint: Path
    stopped_by: signal.Signals | None


class Trainer:
    """Model, averaged weights, optimiser and diffusion of a run, and its step.

    `step` counts finished optimiser steps. The model is trained in eval mode: label dropout is the only thing
    that a DiT does differently in training, and the trainer draws it itself, keyed by the step.
    """

    def __init__(self, config: TrainConfig, data: ImageSet | LatentSet):
        self.config = config
        self.data = data
        self.device = choose_device(config.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = build_model(config, data).to(self.device).eval()
        self.ema = Ema(self.model, config.ema_decay)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=0,
            fused=True,
        )
        self.diffusion = create_diffusion("", **config.diffusion_arguments())
        self.stream = open_stream(data, config.batch_size, config.seed, config.flip)
        self.total_steps = config.total_steps(len(data.train))
        self.step = 0
        self.seconds = 0.0
        self.denoiser = (
            torch.compile(self.model) if config.compile and can_compile(self.device) else self.model
        )
        # On CUDA, reading a value waits for the device, so there it is read when a log line is due; the
        # optimiser then skips its update on the device from the first bad step on.
        self.checks_every_step = self.device.type == "cpu"
        self._failed_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._sums = torch.zeros(4, device=self.device)

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One optimiser and EMA step on images (B, C, H, W) and labels (B,).

        Raises NonFiniteError for a loss or gradient norm that is NaN or infinite, with the parameters and the
        optimiser as they were before the step: at once on the CPU, at the next `check_finite` on CUDA.
        """
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        t, noise, dropped = self._draw(images)
        labels = torch.where(dropped, self.data.num_classes, labels)
        terms = self.diffusion.training_losses(self._denoise, images, t, {"y": labels}, noise=noise)
        loss = terms["loss"].mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)

        loss = loss.detach()
        bad = ~(loss.isfinite() & norm.isfinite()) & (self._failed_step < 0)
        self._failed_step = torch.where(bad, self.step + 1, self._failed_step)
        if self.checks_every_step:
            self.check_finite()
        # The fused optimiser leaves everything as it is where `found_inf` is not zero.
        self.optimizer.found_inf = (self._failed_step >= 0).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.step)
        parts = [
            terms[name].detach().mean() if name in terms else torch.zeros_like(loss) for name in ("mse", "vb")
        ]
        self._sums += torch.stack([loss, *parts, norm])

    def check_finite(self) -> None:
        """Raise NonFiniteError if any step so far had a loss or gradient norm that is NaN or infinite."""
        failed = int(self._failed_step)
        if failed >= 0:
            raise NonFiniteError(
                f"step {failed}: the loss or the gradient norm is not finite; the update was not made. "
                f"Start anew with a lower --lr or with --precision fp32; the last checkpoint is whole"
            )

    def losses(self) -> list[float]:
        """Sums of loss, mse, vb and gradient norm since the last call; waits for the device."""
        sums = self._sums.tolist()
        self._sums.zero_()
        return sums

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
        }

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments by parameter name; before the first step they are zeros."""
        state = {}
        for name, parameter in self.trained.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                held = self.optimizer.state[parameter]
                state[f"{moment}.{name}"] = held[moment] if held else torch.zeros_like(parameter)
        return state

    def save(self, run: Path) -> Path:
        """Write a checkpoint of this moment; never one that follows a step that failed."""
        self.check_finite()
        return save_checkpoint(
            run,
            self.model,
            self.ema.state_dict(),
            self.optimizer_state(),
            self.manifest(),
            self.config.keep_checkpoints,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the state of a verified checkpoint. Raises CheckpointError if it was trained on other data."""
        saved, present = checkpoint.manifest["data"], self.data.describe()
        changed = [
            f"{key} is {saved.get(key)} there and {value} here"
            for key, value in present.items()
            if key != "name" and saved.get(key) != value
        ]
        if changed:
            raise CheckpointError(f"{checkpoint.path} was trained on other data: {'; '.join(changed)}")
        self.step = checkpoint.step
        self.seconds = float(checkpoint.manifest["seconds"])
        self.model.load_state_dict(checkpoint.model)
        self.ema.load_state_dict(checkpoint.ema)
        if self.step == 0:
            return
        for name, parameter in self.trained.items():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), device=self.device),
                "exp_avg": checkpoint.optimizer[f"exp_avg.{name}"].to(self.device),
                "exp_avg_sq": checkpoint.optimizer[f"exp_avg_sq.{name}"].to(self.device),
            }

    def _draw(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps, noise and label drops of the present step, from one stream each."""
        seed, size, device = self.config.seed, len(images), self.device

        def stream(name: str) -> torch.Generator:
            return generator(seed, name, self.step, device)

        t = torch.randint(
            0, self.diffusion.num_timesteps, (size,), generator=stream("timestep"), device=device
        )
        noise = torch.randn(images.shape, generator=stream("noise"), device=device)
        dropped = (
            torch.rand(size, generator=stream("label drop"), device=device) < self.config.class_dropout_prob
        )
        return t, noise, dropped

    def _denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        # Only the model runs in low precision; the losses are taken in float32.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
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


def train(config: TrainConfig, run: str | Path) -> TrainResult:
    """Start a run in the folder `run`, which must not hold one yet.

    Leaves checkpoints/step-N, log.jsonl and loss.png there. Raises the errors of `dit_fast.errors` before the
    first step wherever it can: for data, configuration, an output folder that is taken or not writable, and
    for a full disk.
    """
    run = Path(run)
    if checkpoints_folder(run).exists() or (run / "log.jsonl").exists():
        raise OutputError(f"{run} already holds a run; continue it with --resume {run} or give another --out")
    trainer = Trainer(config, _open(config))
    prepare_folder(run)
    return _run(trainer, run)


def resume(run: str | Path, asked: dict[str, Any]) -> TrainResult:
    """Continue the run in the folder `run` from its newest checkpoint, with the options `asked` for anew.

    Raises CheckpointError where they, or the data, contradict what the run was trained with.
    """
    run = Path(run)
    if not run.is_dir():
        raise CheckpointError(f"--resume {run}: no such run folder")
    path = latest_checkpoint(run)
    config = resumed_config(read_manifest(path)["train_config"], asked, str(path))
    trainer = Trainer(config, _open(config))
    trainer.restore(load_checkpoint(path))
    if trainer.step >= trainer.total_steps:
        raise ConfigError(
            f"{run} is already at step {trainer.step} of {trainer.total_steps}; give more --steps"
        )
    prepare_folder(run)
    return _run(trainer, run)


def prepare_folder(run: Path) -> None:
    """Make the run folder and see that it takes files. Raises OutputError."""
    try:
        checkpoints_folder(run).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {run}: {error.strerror}; give another --out") from error


def _open(config: TrainConfig) -> ImageSet | LatentSet:
    return open_data(
        config.data,
        config.image_size,
        channels=config.channels,
        num_classes=config.num_classes,
        flip=config.flip,
        holdout=config.holdout,
        num_workers=config.num_workers,
    )


def _run(trainer: Trainer, run: Path) -> TrainResult:
    config = trainer.config
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    remove_leftovers(run)
    saves = -(-(trainer.total_steps - trainer.step) // config.ckpt_every)
    room = min(saves, config.keep_checkpoints + 1) if config.keep_checkpoints else saves
    size = checkpoint_bytes(trainer.model.state_dict(), trainer.ema.state_dict(), trainer.optimizer_state())
    require_space(run, room * size)
    log = RunLog(run / "log.jsonl", trainer.step)
    progress = Progress(trainer.total_steps, trainer.step)
    try:
        with StopRequest() as stop:
            checkpoint = _steps(trainer, run, log, progress, stop)
    finally:
        progress.close()
    try:
        plot_loss(log.path, run / "loss.png")
    except MissingExtraError as error:
        logger.warning("%s", error)
    return TrainResult(run, trainer.step, trainer.total_steps, checkpoint, stop.signal)


def _steps(trainer: Trainer, run: Path, log: RunLog, progress: Progress, stop: StopRequest) -> Path:
    """Train to the end or to a stop request; returns the checkpoint written last."""
    config, total = trainer.config, trainer.total_steps
    logged_step, logged_at = trainer.step, time.perf_counter()
    for images, labels in trainer.stream.read(trainer.step, total):
        trainer.train_step(images, labels)
        progress.advance()
        last = trainer.step == total or stop.signal is not None
        if last or trainer.step % config.log_every == 0:
            trainer.check_finite()
            steps = trainer.step - logged_step
            loss, mse, vb, norm = (value / steps for value in trainer.losses())
            elapsed = time.perf_counter() - logged_at
            trainer.seconds += elapsed
            record = Record(
                step=trainer.step,
                loss=loss,
                mse=mse,
                vb=vb,
                grad_norm=norm,
                images_per_second=steps * config.batch_size / elapsed,
                seconds=trainer.seconds,
                lr=config.lr,
            )
            log.append(record)
            progress.report(record, config.batch_size)
            logged_step, logged_at = trainer.step, time.perf_counter()
        if last:
            break
        if trainer.step % config.ckpt_every == 0:
            paused = time.perf_counter()
            try:
                trainer.save(run)
            except OutputError as error:
                # The older checkpoints are whole and the run is not lost: try again at the next one.
                logger.warning("step %d: %s; training goes on", trainer.step, error)
            logged_at += time.perf_counter() - paused
    return trainer.save(run)
