"""What a run reports while it trains: log lines, progress, spikes, trackers, and grids of samples."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dit_fast.evaluation import Quality
from dit_fast.training import metrics
from dit_fast.training.best_effort import BestEffort
from dit_fast.training.evaluate import Evaluation, score_line
from dit_fast.training.grids import SampleGrids
from dit_fast.training.lines import LineFile
from dit_fast.training.metrics import Averages, SpikeDetector
from dit_fast.training.progress import Progress, Record, read_scores
from dit_fast.training.step import StepValues
from dit_fast.training.trackers import Tracker, open_trackers
from dit_fast.training.trainer import Trainer

PICTURES = "samples"
"""Folder of a run for its grids of samples."""

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class Watch:
    """Follows a `Trainer` and writes to the run folder: log.jsonl, spikes.jsonl, samples/step-N.png, trackers.

    Every rank has one, since numbers are put together of all; rank 0 writes, and nothing before it is entered: what
    cannot be drawn or scored is refused when it is built. Whatever fails later is a warning (`BestEffort`).

    A log line holds means over the steps since the one before. Those of an unfinished line, and what is known of
    spikes, are part of a checkpoint: `state`, which a continuation gives as `saved`.
    """

    def __init__(self, trainer: Trainer, run: Path, saved: dict[str, Any] | None = None):
        self.trainer = trainer
        self.run = run
        self.writes = trainer.world.is_first
        self.best_effort = BestEffort()
        self.progress: Progress | None = None
        self.trackers: list[Tracker] = []
        self.averages, self.spikes = Averages(), SpikeDetector()
        self.flops = metrics.training_flops(trainer.model, trainer.data.caption_tokens, trainer.data.shapes)
        self.peak = metrics.peak_flops(trainer.device)
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
            peak_memory=metrics.peak_memory(trainer.device),
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
