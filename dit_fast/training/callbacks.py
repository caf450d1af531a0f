"""What a run reports while it trains: log lines, progress, spikes, trackers, and grids of samples."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dit_fast.data import LatentSet, Size, apportion
from dit_fast.data.latents import latents_as_pixels
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
from dit_fast.interop.guidance import default_guidance
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
from dit_fast.sampling.schedule import VELOCITY_SOLVERS
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
from dit_fast.utils.terminal import say


class AverageSampler:
    """Draws with the averaged weights as they are at the time, by `sample_steps` levels of the run's objective.

    `choices`: how many classes there are to draw, or captions of training samples; 1 without conditioning.
    `sizes`: of what it draws, the run's buckets or the model's own.
    """

    def __init__(self, trainer: Trainer, guided: bool = True):
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
            guidance=default_guidance(trainer.model, trained_here=True) if guided else Guidance(1.0),
            clip=not isinstance(data, LatentSet) and solver not in VELOCITY_SOLVERS,
            graph="never",
        )
        self._samplers: list[Sampler] = []

    @contextmanager
    def averages(self, draws: bool = True) -> Iterator[None]:
        """Inside, `draw` has the averages. Each rank must enter, since it holds a part; those with `draws` can draw."""
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
            # Training goes on without the memory that they take.
            self._samplers = []

    def names(self, choices: Sequence[int]) -> list[str]:
        """What is drawn, in words."""
        data, model = self.trainer.data, self.trainer.model
        if not model.caption_dim:
            return [data.class_names[choice] if model.num_classes else "samples" for choice in choices]
        assert data.captions is not None
        return [data.captions.texts[member] for member in data.train.members[list(choices)].tolist()]

    def draw(self, choices: Tensor, numbers: Tensor | None = None, bucket: int = 0) -> Tensor:
        """Images, or latents as the model knows them, float32 (M, C, H, W) on the CPU, of `choices` int64 (M,).

        Of `sizes[bucket]`. Each size has a seed of its own, the run's and one more for each before it.
        """
        config, device = self.trainer.config, self.trainer.device
        conditioning = (
            self.trainer.data.train.conditioning(choices) if self.trainer.model.caption_dim else choices
        )
        low = AUTOCAST.get(config.precision)
        with torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None):
            return self._samplers[bucket](conditioning, seed=config.seed + bucket, numbers=numbers).cpu()

    def _model(self, averages: dict[str, Tensor], size: Size) -> DiT:
        """Made on no device: the averages themselves become its parameters, but for the positions of another size."""
        with torch.device("meta"):
            model = build_model(self.trainer.config, self.trainer.data)
        adapters = self.trainer.adapters
        averages = averages if adapters is None else adapters.merged(averages)
        load_weights(model, averages, "the averaged weights", assign=True)
        return model if size == model.x_embedder.img_size else model.regrid(size)


def open_decoder(trainer: Trainer) -> LatentDecoder | None:
    """The decoder of the autoencoder that made the run's latents; None for pixels. Raises as `LatentDecoder`."""
    data = trainer.data
    if not isinstance(data, LatentSet):
        return None
    name = str(data.vae.get("source") or data.vae.get("name"))
    decoder = LatentDecoder(name, data.channels, trainer.device)
    check_autoencoder(name, decoder, data.describe(), data.name)
    return decoder


logger = logging.getLogger(__name__)
MOST_ROWS, PER_ROW = 8, 8


class SampleGrids:
    """Draws samples with the trainer's averaged weights.

    `PER_ROW` samples of up to `MOST_ROWS` classes or training captions, or without conditioning.

    Of a run with buckets they are of all its shapes, at least one each, side by side.
    Latents are decoded by the autoencoder that made them, where it can be loaded; else their first three channels
    are shown.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.sampler = AverageSampler(trainer)
        count = min(MOST_ROWS, self.sampler.choices)
        self.choices = [row * self.sampler.choices // count for row in range(count)]
        self.names = self.sampler.names(self.choices)
        self.decoder: LatentDecoder | None = None
        try:
            self.decoder = open_decoder(trainer)
        except DitFastError as error:
            logger.warning("--sample-every: latents are shown without decoding them: %s", error)

    def draw(self, path: Path) -> None:
        """Write a labeled grid to the PNG `path`, and captions in full to captions.txt beside it.

        Each rank must call it, since it holds a part; the first draws.
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
        return latents_as_pixels(drawn)


_BATCH = 64


class EvaluationError(DitFastError):
    """Samples that could not be drawn, are not finite, or could not be measured."""


class Evaluation:
    """Scores `evaluate_samples` unguided samples of random classes, or of random captions of training samples, with the
    trainer's averaged weights.

    Of a run with buckets they have the buckets' shapes, in the proportion of the training images, and are compared with
    all real images in theirs.
    What is drawn and its noise are functions of seed and sample number, the same each time and for any number of ranks,
    which share the samples. Nothing that training draws is touched. Every rank has one; the first has the reference.
    Raises the errors of `open_reference`, `open_extractor` and `LatentDecoder`, and ConfigError for latents without
    images to compare them with.
    """

    def __init__(self, trainer: Trainer):
        config, world = trainer.config, trainer.world
        self.trainer = trainer
        if config.evaluate_samples < world.size:
            raise ConfigError(
                f"--evaluate-samples {config.evaluate_samples}: give one for each rank, {world.size}"
            )
        if config.evaluate_against is None and isinstance(trainer.data, LatentSet) and config.vae is None:
            raise ConfigError(
                f"--evaluate-every: {config.data} holds latents; give real images or their statistics with "
                "--evaluate-against"
            )
        against = config.evaluate_against or config.data
        # As the training images were read, by the run or by dit-fast encode.
        self.conversion = trainer.data.conversion or config.conversion()
        self.decoder = open_decoder(trainer)
        size = trainer.data.image_size * (1 if self.decoder is None else self.decoder.factor)
        weights = config.evaluate_weights and Path(config.evaluate_weights)
        self.extractor = open_extractor(
            config.evaluate_features,
            trainer.device,
            weights=weights or None,
            labeled=against,
            image_size=size,
            conversion=self.conversion,
        )
        self.sampler = AverageSampler(trainer, guided=False)
        self.reference: SavedStatistics = world.first(lambda: self._reference(against, size))
        shares = apportion(config.evaluate_samples, list(trainer.data.shapes.values()) or [1])
        # In the order of the buckets; samples of one are numbered from 0.
        self.bucket_of = torch.arange(len(shares)).repeat_interleave(torch.tensor(shares))[
            world.rank :: world.size
        ]
        self.numbers = torch.cat([torch.arange(share) for share in shares])[world.rank :: world.size]

    def score(self) -> Quality:
        """The distance now. Raises EvaluationError on every rank where one could not draw or measure its samples."""
        world = self.trainer.world
        with self.sampler.averages():
            try:
                features: Tensor | str = self._features()
            except Exception as error:
                if isinstance(error, RuntimeError) and is_lost_connection(error):
                    raise
                # The other ranks wait in the exchange below.
                features = " ".join(str(error).split()) or type(error).__name__
        found = world.gather(features)
        for rank, other in enumerate(found):
            if isinstance(other, str):
                raise EvaluationError(f"rank {rank}: {other}" if world.size > 1 else other)
        # In the order of the samples' numbers, whatever rank drew them.
        every = torch.empty(sum(map(len, found)), found[0].shape[1])
        for rank, own in enumerate(found):
            every[rank :: world.size] = own
        moments = StreamingStatistics()
        moments.update(every)
        statistics = SavedStatistics(moments.finish(), None, self.extractor.name)
        samples = Activations(statistics, every, None)
        return score(samples, self.reference, None, self.extractor.proxy, ["fid"])

    def _features(self) -> Tensor:
        """Of this rank's samples, (m, D) on the CPU."""
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
    """What log.jsonl says of a score: step, extractor, numbers of images, and fid, or proxy_fid by other features."""
    kept = {name: value for name, value in quality.as_json().items() if value is not None and name != "notes"}
    return {"step": step, **kept}


PICTURES = "samples"
"""Folder of a run for its grids of samples."""

Item = TypeVar("Item")


class Watch:
    """Follows a `Trainer` and writes to the run folder: log.jsonl, spikes.jsonl, samples/step-N.png, trackers.

    Every rank has one, since numbers are put together of all; rank 0 writes, and nothing before it is entered: what
    cannot be drawn or scored is refused when it is built. Whatever fails later is a warning (`BestEffort`).

    A log line holds means over the steps since the one before. Those of an unfinished line, and what is known of
    spikes, are part of a checkpoint: `state`, which a continuation gives as `saved`, with the `changes` of its recipe,
    (old, new) by option, which are logged.
    """

    def __init__(
        self,
        trainer: Trainer,
        run: Path,
        saved: dict[str, Any] | None = None,
        changes: Mapping[str, tuple[Any, Any]] | None = None,
    ):
        self.trainer = trainer
        self.run = run
        self.changes = dict(changes or {})
        self.writes = trainer.world.is_first
        self.best_effort = BestEffort()
        self.progress: Progress | None = None
        self.trackers: list[Tracker] = []
        self.averages, self.spikes = Averages(), SpikeDetector()
        self.flops = training_flops(trainer.model, trainer.data.caption_tokens, trainer.data.shapes)
        if trainer.adapters is not None:
            # Frozen weights have no gradient: two of the three passes. Attention's own two products are then counted
            # with one gradient instead of two.
            self.flops = self.flops * 2 // 3
        self.peak = peak_flops(trainer.device)
        self.grids = SampleGrids(trainer) if trainer.config.sample_every else None
        self.evaluation = Evaluation(trainer) if trainer.config.evaluate_every else None
        self.skipped = int(trainer.state.skipped)
        # The step of the last line whose means are complete: one that a stop or the end wrote before its time is
        # written again, with all its steps.
        self.line_step = trainer.step
        if saved is not None:
            self.best_effort("the log's state in the checkpoint", partial(self._restore, saved))
        self.log = LineFile(run / "log.jsonl", self._stays)
        resumed = trainer.step
        self.spike_log = LineFile(run / "spikes.jsonl", lambda line: line["step"] <= resumed)
        self._resumed = resumed
        # Time is of this process alone: of the steps that it made since the line before.
        self.timed_step, self.elapsed, self.waited = trainer.step, 0.0, 0.0
        self.clock = time.perf_counter()

    def _restore(self, saved: dict[str, Any]) -> None:
        averages, spikes = Averages(), SpikeDetector()
        averages.restore(saved["averages"])
        spikes.restore(saved["spikes"])
        self.line_step, self.skipped = int(saved["line_step"]), int(saved["skipped"])
        self.averages, self.spikes = averages, spikes

    def _stays(self, line: dict[str, Any]) -> bool:
        if "changed" in line:
            # A change at this step is not part of its checkpoint: a run that is resumed here again may have others.
            return line["step"] < self._resumed
        return line["step"] <= (self.line_step if "loss" in line else self._resumed)

    def __enter__(self) -> "Watch":
        trainer = self.trainer
        if self.writes:
            self.trackers = open_trackers(trainer.config, self.run, self.best_effort)
            for file in (self.log, self.spike_log):
                self.best_effort(str(file.path), file.reduce)
            self.best_effort("the first lines", self._announce)
            if self.changes:
                self._write({"step": trainer.step, "changed": self.changes})
            self.best_effort("the progress bar", self._open_progress)
        self.clock = time.perf_counter()
        return self

    def _announce(self) -> None:
        """Print how samples are drawn."""
        config, channels = self.trainer.config, self.trainer.model.in_channels
        drawn = {
            f"grids every {config.sample_every} steps": self.grids,
            f"FID every {config.evaluate_every} steps": self.evaluation,
        }
        say(
            *(
                f"{what}: {each.sampler.config.guidance.summary(channels)}"
                for what, each in drawn.items()
                if each is not None
            )
        )

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
        """The same batches; the time that the host waits for each is counted.

        The range of a step lasts until the next batch is asked for.
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
        """Time spent inside does not count as training."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started

    def after_step(self, last: bool) -> None:
        """Log when a line is due, or now if the run ends."""
        config, step = self.trainer.config, self.trainer.step
        if self.progress is not None:
            self.best_effort("the progress bar", self.progress.advance)
        if last or step % config.log_every == 0:
            self._log()
        elif step % len(self.trainer.state.history) == 0:
            self._read()

    def draw(self, last: bool = False) -> None:
        """Draw and score samples when they are due, or now if the run ends."""
        config, step = self.trainer.config, self.trainer.step
        if self.grids is not None and (last or step % (config.sample_every or 1) == 0):
            with self.paused():
                self._sample(self.grids)
        ended = step == self.trainer.total_steps
        if self.evaluation is not None and (ended or step % (config.evaluate_every or 1) == 0):
            with self.paused():
                self._evaluate(self.evaluation)

    def catch_up(self) -> None:
        """Draw and score what is due at the step of the checkpoint that is resumed, and was not done any more."""
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
        """For a checkpoint of this step; every rank calls it."""
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
        """Take in what the steps since the last call left behind."""
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
        """Call `action` for each tracker; one that fails gets no more."""
        for tracker in list(self.trackers):
            if not self.best_effort(tracker.name, partial(action, tracker)):
                self.trackers.remove(tracker)

    def _note_spikes(self, values: list[StepValues]) -> None:
        """Append steps whose loss stands out, or that were left out, to spikes.jsonl, with what they drew."""
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
    """A record's numbers by name, those of a list numbered."""
    numbers: dict[str, float] = {}
    for name, value in dataclasses.asdict(record).items():
        if isinstance(value, tuple):
            numbers |= {f"{name}/{index}": part for index, part in enumerate(value) if part is not None}
        elif value is not None and name != "step":
            numbers[name] = value
    return numbers
