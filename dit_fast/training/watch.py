"""What a run says while it goes on: log lines, progress, spikes, trackers, and grids of samples."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dit_fast.errors import DitFastError
from dit_fast.training import metrics
from dit_fast.training.evaluate import Evaluation, score_line
from dit_fast.training.grids import SampleGrids
from dit_fast.training.progress import Progress, Record, RunLog
from dit_fast.training.step import BUCKETS, StepValues
from dit_fast.training.trackers import Tracker, open_trackers
from dit_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class Watch:
    """Follows a `Trainer` and writes to the run folder: log.jsonl, spikes.jsonl, samples/step-N.png, trackers.

    Every rank has one, since numbers are put together of all; rank 0 writes, and nothing before it is entered: what
    cannot be drawn or scored is refused when it is built.
    """

    def __init__(self, trainer: Trainer, run: Path):
        self.trainer = trainer
        self.run = run
        self.writes = trainer.world.is_first
        self.log: RunLog | None = None
        self.progress: Progress | None = None
        self.trackers: list[Tracker] = []
        self.spikes = metrics.SpikeDetector()
        self.flops = metrics.training_flops(trainer.model, trainer.data.caption_tokens, trainer.data.shapes)
        self.peak = metrics.peak_flops(trainer.device)
        self.grids = SampleGrids(trainer) if trainer.config.sample_every else None
        self.evaluation = Evaluation(trainer) if trainer.config.evaluate_every else None
        self.waited = 0.0
        self.skipped = int(trainer.state.skipped)
        self.logged_step, self.logged_at = trainer.step, time.perf_counter()

    def __enter__(self) -> "Watch":
        trainer = self.trainer
        if self.writes:
            self.trackers = open_trackers(trainer.config, self.run)
            self.log = RunLog(self.run / "log.jsonl", trainer.step)
            self.progress = Progress(trainer.total_steps, trainer.step)
        self.logged_at = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.close()
        for tracker in self.trackers:
            tracker.close()

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
        self.logged_at += time.perf_counter() - started

    def after_step(self, last: bool) -> None:
        """Log when a line is due, or now if the run ends."""
        config, step = self.trainer.config, self.trainer.step
        if self.progress is not None:
            self.progress.advance()
        if last or step % config.log_every == 0:
            self._log()

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

    def _log(self) -> None:
        trainer = self.trainer
        trainer.check_finite()
        values = trainer.values()
        elapsed = time.perf_counter() - self.logged_at
        trainer.seconds += elapsed
        steps, skipped = trainer.step - self.logged_step, int(trainer.state.skipped)
        speed = steps * trainer.config.batch_size / elapsed
        record = Record(
            step=trainer.step,
            **means(values),
            images_per_second=speed,
            mfu=None if self.peak is None else speed * self.flops / (self.peak * trainer.world.size),
            data_wait=min(1.0, self.waited / elapsed),
            peak_memory=metrics.peak_memory(trainer.device),
            seconds=trainer.seconds,
            lr=float(trainer.state.lr),
            loss_scale=values[-1].loss_scale,
            skipped=skipped - self.skipped,
        )
        if self.log is not None and self.progress is not None:
            self.log.append(dataclasses.asdict(record))
            self.progress.report(record, trainer.config.batch_size)
        for tracker in self.trackers:
            tracker.scalars(record.step, flat(record))
        self._note_spikes(values)
        self.skipped, self.waited = skipped, 0.0
        self.logged_step, self.logged_at = trainer.step, time.perf_counter()

    def _note_spikes(self, values: list[StepValues]) -> None:
        """Append steps whose loss stands out, or that were left out, to spikes.jsonl, with what they drew."""
        for step, value in enumerate(values, start=self.trainer.step - len(values) + 1):
            reason = self.spikes.judge(value.loss) if value.applied else "not finite, left out"
            if reason is None:
                continue
            drawn = self.trainer.drawn(step)
            if not self.writes:
                continue
            finite = {"loss": value.loss, "grad_norm": value.grad_norm} if value.applied else {}
            line = {
                "step": step, "reason": reason, **finite, "samples": self.trainer.sample_ids(step), **drawn
            }  # fmt: skip
            with (self.run / "spikes.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            logger.warning("step %d: the loss is %s; its samples are in spikes.jsonl", step, reason)

    def _sample(self, grids: SampleGrids) -> None:
        path = self.run / "samples" / f"step-{self.trainer.step:07d}.png"
        try:
            grids.draw(path)
        except DitFastError as error:
            logger.warning("step %d: no samples: %s", self.trainer.step, error)
            return
        for tracker in self.trackers:
            tracker.image(self.trainer.step, path)

    def _evaluate(self, evaluation: Evaluation) -> None:
        step = self.trainer.step
        try:
            quality = evaluation.score()
        except DitFastError as error:
            if self.writes:
                logger.warning("step %d: no score: %s", step, error)
            return
        if self.log is not None and self.progress is not None:
            line = score_line(step, quality)
            self.log.append(line)
            self.progress.say("\n".join(f"step {step}: {text}" for text in quality.lines()))
            for tracker in self.trackers:
                tracker.scalars(step, {name: line[name] for name in ("fid", "proxy_fid") if name in line})


def means(values: list[StepValues]) -> dict[str, Any]:
    """Means over the steps that were made: loss, mse, vb, grad_norm, loss_by_timestep."""
    made = [value for value in values if value.applied] or values
    plain = {
        name: sum(getattr(value, name) for value in made) / len(made)
        for name in ("loss", "mse", "vb", "grad_norm")
    }
    sums = [sum(value.bucket_sums[bucket] for value in made) for bucket in range(BUCKETS)]
    counts = [sum(value.bucket_counts[bucket] for value in made) for bucket in range(BUCKETS)]
    by_timestep = (total / count if count else None for total, count in zip(sums, counts, strict=True))
    return {**plain, "loss_by_timestep": tuple(by_timestep)}


def flat(record: Record) -> dict[str, float]:
    """A record's numbers by name, those of a list numbered."""
    numbers: dict[str, float] = {}
    for name, value in dataclasses.asdict(record).items():
        if isinstance(value, tuple):
            numbers |= {f"{name}/{index}": part for index, part in enumerate(value) if part is not None}
        elif value is not None and name != "step":
            numbers[name] = value
    return numbers
