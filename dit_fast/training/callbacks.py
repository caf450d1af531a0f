"""Callbacks of a run: log lines, progress, loss spikes, trackers, grids of samples, and Frechet distances."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dit_fast.data import LatentSet, Size, apportion
from dit_fast.distributed.sharding import whole
from dit_fast.distributed.world import is_lost_connection
from dit_fast.encoders.autoencoder import LatentDecoder, check_autoencoder
from dit_fast.errors import ConfigError, DitFastError
from dit_fast.evaluation import (
    Activations,
    Quality,
    SavedStatistics,
    StreamingStatistics,
    check_reference,
    collect,
    open_extractor,
    open_reference,
    score,
)
from dit_fast.model.dit import DiT
from dit_fast.model.folder import load_weights
from dit_fast.sampling import (
    Guidance,
    Sampler,
    SamplerConfig,
    default_solver,
    draw_grid,
    sampling_schedule,
    save_grid,
    short_label,
    to_uint8,
)
from dit_fast.training.config import build_model
from dit_fast.training.log import (
    Averages,
    BestEffort,
    LineFile,
    Progress,
    Record,
    SpikeDetector,
    Tracker,
    open_trackers,
    peak_flops,
    peak_memory,
    read_scores,
    training_flops,
)
from dit_fast.training.precision import AUTOCAST
from dit_fast.training.step import StepValues
from dit_fast.training.trainer import Trainer
from dit_fast.utils import keyed
from dit_fast.utils.files import write_atomically
from dit_fast.utils.images import on_paper


class AverageSampler:
    """Samples from the current averaged weights, in `sample_steps` steps of the run's objective.

    Attributes:
        choices: Number of classes, or of training captions; 1 for an unconditional model.
        sizes: Sizes of the samples: the run's buckets, or the model's own size.
    """

    def __init__(self, trainer: Trainer, guidance: float):
        config, data = trainer.config, trainer.data
        self.choices = len(data.train) if trainer.model.caption_dim else max(trainer.model.num_classes, 1)
        objective = config.objective_arguments()
        solver = default_solver(objective)
        steps = min(config.sample_steps, objective.get("diffusion_steps", config.sample_steps))
        self.trainer = trainer
        self.sizes: tuple[Size, ...] = data.buckets or (trainer.model.x_embedder.img_size,)
        self.schedule = sampling_schedule(objective, steps, solver, learn_sigma=bool(config.learn_sigma))
        self.config = SamplerConfig(
            solver=solver,
            guidance=Guidance(guidance if trainer.model.has_null else 1.0, channels=None),
            clip=not isinstance(data, LatentSet),
            graph="never",
        )
        self._samplers: list[Sampler] = []

    @contextmanager
    def averages(self, draws: bool = True) -> Iterator[None]:
        """Gather the averages for `draw`. Every rank must enter, since each holds a shard; those with `draws` draw."""
        averages = {name: whole(tensor) for name, tensor in self.trainer.ema_state().items()}
        if not draws:
            yield
            return
        try:
            self._samplers = [
                Sampler(self._model(averages, size), self.schedule, self.config) for size in self.sizes
            ]
            yield
        finally:
            # Frees their memory before training continues.
            self._samplers = []

    def names(self, choices: Sequence[int]) -> list[str]:
        """Names of the choices: classes, or captions."""
        data, model = self.trainer.data, self.trainer.model
        if not model.caption_dim:
            return [data.class_names[choice] if model.num_classes else "samples" for choice in choices]
        assert data.captions is not None
        return [data.captions.texts[member] for member in data.train.members[list(choices)].tolist()]

    def draw(self, choices: Tensor, numbers: Tensor | None = None, bucket: int = 0) -> Tensor:
        """Images, or normalized latents, float32 (M, C, H, W) on the CPU, for `choices` int64 (M,).

        They have the size `sizes[bucket]`; the seed is the run's plus `bucket`.
        """
        config, device = self.trainer.config, self.trainer.device
        told = self.trainer.data.train.told(choices) if self.trainer.model.caption_dim else choices
        low = AUTOCAST.get(config.precision)
        with torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None):
            return self._samplers[bucket](told, seed=config.seed + bucket, numbers=numbers).cpu()

    def _model(self, averages: dict[str, Tensor], size: Size) -> DiT:
        """A model whose parameters are the averages themselves, except for the positions of another size."""
        with torch.device("meta"):
            model = build_model(self.trainer.config, self.trainer.data)
        load_weights(model, averages, "the averaged weights", assign=True)
        return model if size == model.x_embedder.img_size else model.regrid(size)


def open_decoder(trainer: Trainer) -> LatentDecoder | None:
    """The decoder of the autoencoder that made the run's latents, raising its errors; None for pixels."""
    data = trainer.data
    if not isinstance(data, LatentSet):
        return None
    name = str(data.vae.get("source") or data.vae.get("name"))
    decoder = LatentDecoder(name, data.channels, trainer.device)
    check_autoencoder(name, decoder, data.describe(), data.name)
    return decoder


logger = logging.getLogger(__name__)
MOST_ROWS, PER_ROW, GUIDANCE = 8, 8, 4.0


class SampleGrids:
    """Grids of `PER_ROW` samples for each of up to `MOST_ROWS` classes or training captions, by the averaged weights.

    A run with buckets shows all its shapes side by side, at least one sample of each. Latents are decoded by the
    autoencoder that made them, if it can be loaded; else their first three channels are shown.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.sampler = AverageSampler(trainer, GUIDANCE)
        count = min(MOST_ROWS, self.sampler.choices)
        self.choices = [row * self.sampler.choices // count for row in range(count)]
        self.names = self.sampler.names(self.choices)
        self.decoder: LatentDecoder | None = None
        try:
            self.decoder = open_decoder(trainer)
        except DitFastError as error:
            logger.warning("--sample-every: latents are shown without decoding them: %s", error)

    def draw(self, path: Path) -> None:
        """Write a labeled grid to the PNG `path`, and full captions to captions.txt beside it.

        Every rank must call it, since each holds a shard; the first rank draws.
        """
        first = self.trainer.world.is_first
        with self.sampler.averages(first):
            if not first:
                return
            count = max(1, PER_ROW // len(self.sampler.sizes))
            choices = torch.tensor(self.choices).repeat_interleave(count)
            drawn = [self.sampler.draw(choices, bucket=bucket) for bucket in range(len(self.sampler.sizes))]
        shapes = [to_uint8(self._decode(samples)) for samples in drawn]
        height, width = (max(images.shape[axis] for images in shapes) for axis in (1, 2))
        tiles = [on_paper(images, height, width) for images in shapes]
        rows = [
            (short_label(name), np.concatenate([images[row * count : (row + 1) * count] for images in tiles]))
            for row, name in enumerate(self.names)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_grid(draw_grid(rows), temporary))
        if self.trainer.model.caption_dim:
            lines = "".join(" ".join(name.split()) + "\n" for name in self.names)
            write_atomically(path.parent / "captions.txt", lambda file: file.write_text(lines, "utf-8"))

    def _decode(self, drawn: Tensor) -> Tensor:
        data = self.trainer.data
        if not isinstance(data, LatentSet):
            return drawn
        if self.decoder is not None:
            return self.decoder(drawn, data.posterior.shift, data.posterior.scale)
        # Latents have unit variance, so that nearly all are within 3 standard deviations.
        return drawn[:, :3] / 3 if drawn.shape[1] >= 3 else drawn[:, :1] / 3


_BATCH = 64


class EvaluationError(DitFastError):
    """Samples that could not be drawn, are not finite, or could not be measured."""


class Evaluation:
    """Frechet distance of `evaluate_samples` unguided samples from the averaged weights.

    Classes, or captions of training samples, are random. In a run with buckets, the samples have the buckets' shapes in
    the proportion of the training images, and are compared with all real images in their shapes. Choices and noise are
    functions of seed and sample number: the same each time, for any number of ranks, and independent of training's
    draws. Every rank holds an `Evaluation`, and draws its part of the samples.

    Raises:
        ConfigError: Latents without images to compare them with, or fewer samples than ranks; and the errors of
            `open_reference`, `open_extractor` and `LatentDecoder`.
    """

    def __init__(self, trainer: Trainer):
        config, world = trainer.config, trainer.world
        self.trainer = trainer
        if config.evaluate_samples < world.size:
            raise ConfigError(
                f"--evaluate-samples {config.evaluate_samples}: give at least one per rank, {world.size}"
            )
        if config.evaluate_against is None and isinstance(trainer.data, LatentSet) and config.vae is None:
            raise ConfigError(
                f"--evaluate-every: {config.data} holds latents; give real images or their statistics with "
                "--evaluate-against"
            )
        against = config.evaluate_against or config.data
        # Real images are converted as the training images were, by the run or by dit-fast encode.
        self.conversion = trainer.data.conversion or config.conversion()
        self.decoder = open_decoder(trainer)
        size = trainer.data.image_size * (1 if self.decoder is None else self.decoder.factor)
        weights = config.evaluate_weights and Path(config.evaluate_weights)
        self.extractor = open_extractor(
            config.evaluate_features,
            trainer.device,
            weights=weights or None,
            labelled=against,
            image_size=size,
            conversion=self.conversion,
        )
        self.sampler = AverageSampler(trainer, guidance=1.0)
        self.reference: SavedStatistics = world.first(lambda: self._reference(against, size))
        counts = apportion(config.evaluate_samples, list(trainer.data.shapes.values()) or [1])
        # In the order of the buckets; the samples of each are numbered from 0.
        self.bucket_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[
            world.rank :: world.size
        ]
        self.numbers = torch.cat([torch.arange(count) for count in counts])[world.rank :: world.size]

    def score(self) -> Quality:
        """The current distance. Raises EvaluationError on every rank if one could not draw or measure its samples."""
        world = self.trainer.world
        with self.sampler.averages():
            try:
                features: Tensor | str = self._features()
            except Exception as error:
                if isinstance(error, RuntimeError) and is_lost_connection(error):
                    raise
                # Raised after the exchange below, in which the other ranks wait.
                features = " ".join(str(error).split()) or type(error).__name__
        found = world.gather(features)
        for rank, other in enumerate(found):
            if isinstance(other, str):
                raise EvaluationError(f"rank {rank}: {other}" if world.size > 1 else other)
        # In the order of the samples' numbers, so that the sums do not depend on the number of ranks.
        every = torch.empty(sum(map(len, found)), found[0].shape[1])
        for rank, own in enumerate(found):
            every[rank :: world.size] = own
        moments = StreamingStatistics()
        moments.update(every)
        statistics = SavedStatistics(moments.finish(), None, self.extractor.name)
        samples = Activations(statistics, every, None)
        return score(samples, self.reference, None, self.extractor.proxy, ["fid"])

    def _features(self) -> Tensor:
        """Features (m, D) of this rank's samples, on the CPU."""
        kept = []
        for bucket in range(len(self.sampler.sizes)):
            for numbers in self.numbers[self.bucket_of == bucket].split(_BATCH):
                if len(numbers):
                    images = torch.from_numpy(self._draw(numbers, bucket)).permute(0, 3, 1, 2)
                    kept.append(
                        self.extractor(images.expand(-1, 3, -1, -1).contiguous()).pooled.float().cpu()
                    )
        return torch.cat(kept)

    def _draw(self, numbers: Tensor, bucket: int) -> np.ndarray:
        """Samples of a bucket as uint8 (m, H, W, C)."""
        data = self.trainer.data
        key = keyed.key(self.trainer.config.seed + bucket, "sampling labels")
        choices = keyed.integers(key, numbers, self.sampler.choices)
        drawn = self.sampler.draw(choices, numbers, bucket)
        if self.decoder is not None and isinstance(data, LatentSet):
            drawn = self.decoder(drawn, data.posterior.shift, data.posterior.scale)
        return to_uint8(drawn)

    def _reference(self, against: str, size: int) -> SavedStatistics:
        config = self.trainer.config
        opened = open_reference(
            against, size, config.num_workers or os.cpu_count() or 1, config.bucket_sizes(), self.conversion
        )
        if opened.statistics is not None:
            check_reference(opened.statistics, self.extractor.name, self.extractor.proxy)
            return opened.statistics
        assert opened.images is not None
        return collect(opened.images, self.extractor).statistics


def score_line(step: int, quality: Quality) -> dict[str, Any]:
    """A score's line in log.jsonl: step, extractor, numbers of images, and fid, or proxy_fid for other features."""
    kept = {name: value for name, value in quality.as_json().items() if value is not None and name != "notes"}
    return {"step": step, **kept}


PICTURES = "samples"
"""Folder of a run for its grids of samples."""

Item = TypeVar("Item")


class Watch:
    """Callbacks of a `Trainer`; writes log.jsonl, spikes.jsonl, samples/step-N.png and to trackers.

    Every rank holds one, since values are reduced over all; rank 0 writes, and nothing before the context is entered.
    Options that cannot be drawn or scored raise when it is built; later failures are warnings (`BestEffort`).

    A log line holds means over the steps since the last line. The sums of an unfinished line and the statistics of
    spikes are in the checkpoint: `state`, which a resumed run passes as `saved`.
    """

    def __init__(self, trainer: Trainer, run: Path, saved: dict[str, Any] | None = None):
        self.trainer = trainer
        self.run = run
        self.writes = trainer.world.is_first
        self.best_effort = BestEffort()
        self.progress: Progress | None = None
        self.trackers: list[Tracker] = []
        self.averages, self.spikes = Averages(), SpikeDetector()
        self.flops = training_flops(trainer.model, trainer.data.caption_tokens, trainer.data.shapes)
        self.peak = peak_flops(trainer.device)
        self.grids = SampleGrids(trainer) if trainer.config.sample_every else None
        self.evaluation = Evaluation(trainer) if trainer.config.evaluate_every else None
        self.skipped = int(trainer.state.skipped)
        # The step of the last line whose means are complete: a line that a stop or the end wrote early is written
        # again, with all its steps, by the resumed run.
        self.line_step = trainer.step
        if saved is not None:
            self.best_effort("the log's state in the checkpoint", partial(self._restore, saved))
        self.log = LineFile(run / "log.jsonl", self._stays)
        resumed = trainer.step
        self.spike_log = LineFile(run / "spikes.jsonl", lambda line: line["step"] <= resumed)
        self._resumed = resumed
        # Times of this process only: of its steps since the last line.
        self.timed_step, self.elapsed, self.waited = trainer.step, 0.0, 0.0
        self.clock = time.perf_counter()

    def _restore(self, saved: dict[str, Any]) -> None:
        averages, spikes = Averages(), SpikeDetector()
        averages.restore(saved["averages"])
        spikes.restore(saved["spikes"])
        self.line_step, self.skipped = int(saved["line_step"]), int(saved["skipped"])
        self.averages, self.spikes = averages, spikes

    def _stays(self, line: dict[str, Any]) -> bool:
        return line["step"] <= (self.line_step if "loss" in line else self._resumed)

    def __enter__(self) -> "Watch":
        trainer = self.trainer
        if self.writes:
            self.trackers = open_trackers(trainer.config, self.run, self.best_effort)
            for file in (self.log, self.spike_log):
                self.best_effort(str(file.path), file.reduce)
            self.best_effort("the progress bar", self._open_progress)
        self.clock = time.perf_counter()
        return self

    def _open_progress(self) -> None:
        self.progress = Progress(self.trainer.total_steps, self.trainer.step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.best_effort("the progress bar", self.progress.close)
        for tracker in self.trackers:
            self.best_effort(tracker.name, tracker.close)

    def waiting(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Yield the batches, and add up the time that the host waits for them.

        The NVTX range of a step lasts until the next batch is requested.
        """
        while True:
            with self.trainer.ranges("step"):
                started = time.perf_counter()
                with self.trainer.ranges("data"):
                    batch = next(batches, None)
                self.waited += time.perf_counter() - started
                if batch is None:
                    return
                yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time does not count as training."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started

    def after_step(self, last: bool) -> None:
        """Write a log line if one is due, or if the run ends."""
        config, step = self.trainer.config, self.trainer.step
        if self.progress is not None:
            self.best_effort("the progress bar", self.progress.advance)
        if last or step % config.log_every == 0:
            self._log()
        elif step % len(self.trainer.state.history) == 0:
            self._read()

    def draw(self, last: bool = False) -> None:
        """Draw and score samples if they are due, or if the run ends."""
        config, step = self.trainer.config, self.trainer.step
        if self.grids is not None and (last or step % (config.sample_every or 1) == 0):
            with self.paused():
                self._sample(self.grids)
        ended = step == self.trainer.total_steps
        if self.evaluation is not None and (ended or step % (config.evaluate_every or 1) == 0):
            with self.paused():
                self._evaluate(self.evaluation)

    def catch_up(self) -> None:
        """Draw and score what was due at the resumed checkpoint's step, if the run ended before it was done."""
        config, step = self.trainer.config, self.trainer.step
        grid_due = self.grids is not None and step % (config.sample_every or 1) == 0
        score_due = self.evaluation is not None and step % (config.evaluate_every or 1) == 0
        if not step or not (grid_due or score_due):
            return

        def missing() -> tuple[bool, bool]:
            scored = score_due and any(line["step"] == step for line in read_scores(self.log.path))
            return grid_due and not self._grid().exists(), score_due and not scored

        draws, scores = self.trainer.world.first(missing)
        with self.paused():
            if self.grids is not None and draws:
                self._sample(self.grids)
            if self.evaluation is not None and scores:
                self._evaluate(self.evaluation)

    def _grid(self) -> Path:
        return self.run / PICTURES / f"step-{self.trainer.step:07d}.png"

    def state(self) -> dict[str, Any]:
        """State for a checkpoint of this step; every rank must call it."""
        self._read()
        self._measure()
        if self.writes:
            self.best_effort("log.jsonl", self.log.sync)
        return {
            "line_step": self.line_step,
            "skipped": self.skipped,
            "averages": self.averages.state(),
            "spikes": self.spikes.state(),
        }

    def _measure(self) -> None:
        now = time.perf_counter()
        self.elapsed += now - self.clock
        self.trainer.seconds += now - self.clock
        self.clock = now

    def _read(self) -> None:
        """Add the values of the steps since the last call."""
        self.trainer.check_finite()
        values = self.trainer.values()
        for value in values:
            self.averages.add(value)
        self._note_spikes(values)

    def _log(self) -> None:
        trainer = self.trainer
        self._read()
        self._measure()
        skipped = int(trainer.state.skipped)
        speed = (trainer.step - self.timed_step) * trainer.config.batch_size / self.elapsed
        record = Record(
            step=trainer.step,
            **self.averages.means(),
            images_per_second=speed,
            mfu=None if self.peak is None else speed * self.flops / (self.peak * trainer.world.size),
            data_wait=min(1.0, self.waited / self.elapsed),
            peak_memory=peak_memory(trainer.device),
            seconds=trainer.seconds,
            lr=float(trainer.state.lr),
            loss_scale=self.averages.loss_scale,
            skipped=skipped - self.skipped,
        )
        self._write(dataclasses.asdict(record))
        if self.progress is not None:
            progress = self.progress
            self.best_effort("the progress", lambda: progress.report(record, trainer.config.batch_size))
        self._track(lambda tracker: tracker.scalars(record.step, flat(record)))
        if trainer.step % trainer.config.log_every == 0:
            self.line_step, self.skipped = trainer.step, skipped
            self.averages = Averages()
        self.timed_step, self.elapsed, self.waited = trainer.step, 0.0, 0.0

    def _write(self, line: dict[str, Any]) -> None:
        if self.writes:
            self.best_effort(str(self.log.path), lambda: self.log.append(line))

    def _track(self, action: Callable[[Tracker], None]) -> None:
        """Call `action` for each tracker; one that fails is not called again."""
        for tracker in list(self.trackers):
            if not self.best_effort(tracker.name, partial(action, tracker)):
                self.trackers.remove(tracker)

    def _note_spikes(self, values: list[StepValues]) -> None:
        """Append steps with an outlying loss, and skipped steps, to spikes.jsonl, with their samples and draws."""
        for step, value in enumerate(values, start=self.trainer.step - len(values) + 1):
            reason = self.spikes.judge(value) if value.applied else "not finite, left out"
            if reason is None:
                continue
            drawn = self.trainer.drawn(step)
            if not self.writes:
                continue
            finite = {"loss": value.loss, "grad_norm": value.grad_norm} if value.applied else {}
            line = {
                "step": step, "reason": reason, **finite, "samples": self.trainer.sample_ids(step), **drawn
            }  # fmt: skip
            if self.best_effort(str(self.spike_log.path), partial(self.spike_log.append, line)):
                logger.warning("step %d: the loss is %s; its samples are in spikes.jsonl", step, reason)
            else:
                logger.warning("step %d: the loss is %s", step, reason)

    def _sample(self, grids: SampleGrids) -> None:
        step, path = self.trainer.step, self._grid()
        if self.best_effort("the grid of samples", lambda: grids.draw(path)):
            self._track(lambda tracker: tracker.image(step, path))

    def _evaluate(self, evaluation: Evaluation) -> None:
        step = self.trainer.step
        found: list[Quality] = []
        if not self.best_effort("the score of samples", lambda: found.append(evaluation.score())):
            return
        (quality,) = found
        line = score_line(step, quality)
        self._write(line)
        if self.progress is not None:
            progress, text = self.progress, "\n".join(f"step {step}: {text}" for text in quality.lines())
            self.best_effort("the progress", lambda: progress.say(text))
        scalars: dict[str, float] = {name: line[name] for name in ("fid", "proxy_fid") if name in line}
        self._track(lambda tracker: tracker.scalars(step, scalars))


def flat(record: Record) -> dict[str, float]:
    """A record's numbers by name; those of a tuple are numbered."""
    numbers: dict[str, float] = {}
    for name, value in dataclasses.asdict(record).items():
        if isinstance(value, tuple):
            numbers |= {f"{name}/{index}": part for index, part in enumerate(value) if part is not None}
        elif value is not None and name != "step":
            numbers[name] = value
    return numbers
