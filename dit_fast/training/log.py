"""Logging of a run: progress bar, `log.jsonl`, loss curve, loss spikes, TensorBoard and Weights & Biases."""

import dataclasses
import json
import logging
import math
import os
import resource
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit_fast.distributed.world import is_lost_connection
from dit_fast.errors import DataError, DitFastError, MissingExtraError, OutputError, RankError
from dit_fast.model.cost import mean_macs
from dit_fast.model.dit import DiT
from dit_fast.training.config import TrainConfig
from dit_fast.training.step import BUCKETS, LEVELS, StepValues
from dit_fast.utils.files import MOST_LIST_BYTES, parse_json, read_bytes, read_text, sync, write_atomically
from dit_fast.utils.terminal import say

logger = logging.getLogger(__name__)


class BestEffort:
    """Runs printing, logging, plotting and scoring, whose failure must not end training; `failed`: names so far."""

    def __init__(self) -> None:
        self.failed: set[str] = set()

    def __call__(self, name: str, action: Callable[[], object]) -> bool:
        """Call `action`; if it raises, warn of `name` the first time, and return False.

        The error of a lost rank is raised unchanged: training cannot continue without it.
        """
        try:
            action()
        except Exception as error:
            lost = isinstance(error, RuntimeError) and is_lost_connection(error)
            if lost or isinstance(error, RankError):
                raise
            if name not in self.failed:
                self.failed.add(name)
                reason = " ".join(str(error).split()) or type(error).__name__
                logger.warning(
                    "%s; training continues without it", reason if name in reason else f"{name}: {reason}"
                )
            return False
        return True


MOST_WAITING = 10_000
"""Upper bound on lines that wait while the disk is full; the oldest are dropped first."""
Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """Records of a file in order: JSON objects with a `step` from 0. One warning names all other lines.

    Returns [] where the file does not exist.

    Raises:
        DataError: `path` is not a regular file, or cannot be read.
    """
    if not os.path.lexists(path):
        return []
    records, odd = [], []
    content = read_bytes(path, DataError, MOST_LIST_BYTES, "a log of a run")
    for number, text in enumerate(content.split(b"\n"), start=1):
        record = _record(text)
        if record is not None:
            records.append(record)
        elif text.strip():
            odd.append(number)
    if odd:
        which = ", ".join(map(str, odd[:4])) + (", ..." if len(odd) > 4 else "")
        logger.warning("%s: skipped what is not a record of a step: line %s", path, which)
    return records


def _record(text: bytes) -> Line | None:
    try:
        record = parse_json(text, "", DataError)
    except DataError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


class LineFile:
    """Appends lines to `path`, after reducing it to the lines for which `keeps` is true.

    Nothing is written before the first `append`, which raises OSError where writing fails. Lines that could not be
    written are kept, and written by a later call.
    """

    def __init__(self, path: Path, keeps: Callable[[Line], bool]):
        self.path = path
        self._keeps = keeps
        self._reduced = False
        self._waiting: deque[Line] = deque(maxlen=MOST_WAITING)

    def reduce(self) -> None:
        """Drop lines of steps that the resumed run repeats; a second call does nothing."""
        if not self._reduced and os.path.lexists(self.path):
            kept = {}
            for line in read_lines(self.path):
                if self._keeps(line):
                    # Logs of older versions may hold a step twice; the last line counts.
                    kept[line["step"], "extractor" in line, "changed" in line] = line
            text = "".join(map(_text, kept.values()))
            write_atomically(self.path, lambda temporary: temporary.write_text(text))
        self._reduced = True

    def append(self, line: Line) -> None:
        """Write a line, after those that are waiting."""
        self._waiting.append(line)
        self.reduce()
        left = "".join(map(_text, self._waiting)).encode()
        # Unbuffered: a buffer would write the rest of a line that did not fit at some later time.
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(end)
                raise
        self._waiting.clear()

    def sync(self) -> None:
        """Flush the file to disk."""
        if self.path.is_file():
            sync(self.path)


def _text(line: Line) -> str:
    return json.dumps(line) + "\n"


@dataclass(frozen=True)
class Record:
    """One line of log.jsonl: means over the steps since the last line, up to and including `step`.

    Attributes:
        step: Number of finished steps.
        loss, mse, vb: loss = mse + vb; vb is in bits, 0 without a learned variance.
        grad_norm: Norm of all gradients before clipping.
        loss_by_timestep: Mean loss of the samples in each quarter of the timesteps, least noise first; None for none.
        images_per_second: Throughput of all ranks.
        mfu: Model FLOPs utilization: FLOPs of forward and backward over the device's dense bf16 peak; None where the
            peak is not known.
        data_wait: Fraction of the host's time spent waiting for batches.
        peak_memory: Bytes.
        seconds: Training time since the run began.
        lr: Learning rate.
        loss_scale: 1 except in float16.
        skipped: Non-finite steps since the last line; the means do not include them.
    """

    step: int
    loss: float
    mse: float
    vb: float
    grad_norm: float
    loss_by_timestep: tuple[float | None, ...]
    images_per_second: float
    mfu: float | None
    data_wait: float
    peak_memory: int
    seconds: float
    lr: float
    loss_scale: float
    skipped: int


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a log that have a `loss`; damaged lines are skipped with a warning."""
    return losses_of(read_lines(path))


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Scores of samples in a log: step, extractor, num_samples, and fid or proxy_fid."""
    return scores_of(read_lines(path))


def losses_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a log that have a loss."""
    return [line for line in lines if _is_number(line.get("loss"))]


def scores_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a log that are scores."""
    needed = ("extractor", "num_samples", "proxy")
    return [
        line
        for line in lines
        if all(name in line for name in needed) and _is_number(line.get("fid", line.get("proxy_fid")))
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Progress:
    """Loss, images/s and time left: a tqdm bar on a terminal, one plain line per record elsewhere."""

    def __init__(self, total: int, done: int):
        self.total = total
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            desc="train",
            disable=sys.stderr is None or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def advance(self) -> None:
        self.bar.update()

    def report(self, record: Record, batch_size: int) -> None:
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {record.loss:.4f}, {record.images_per_second:.0f} img/s")
            return
        left = (self.total - record.step) * batch_size / record.images_per_second
        say(
            f"step {record.step}/{self.total}  loss {record.loss:.4f}  mse {record.mse:.4f}  "
            f"vb {record.vb:.4f}  {record.images_per_second:.0f} img/s  {_clock(left)} left",
        )

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        tqdm.write(text)

    def close(self) -> None:
        self.bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def plot_loss(log: Path, target: Path) -> None:
    """Plot the loss of `log` over the steps to the PNG `target`, as logged and smoothed.

    Raises MissingExtraError without matplotlib, OutputError where plotting fails.
    """
    plot_losses({log.parent.name: log}, target)


def plot_losses(logs: dict[str, Path], target: Path) -> None:
    """Plot the losses of several runs, name -> log.jsonl, in one picture, each as logged and smoothed.

    A second panel shows the Frechet distances of samples, where a run has them.

    Raises MissingExtraError without matplotlib, OutputError where plotting fails.
    """
    try:
        _draw_losses(logs, target)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "no loss curve: matplotlib is not installed; pip install 'dit-fast[plot]'"
        ) from error
    except DitFastError:
        raise
    except Exception as error:
        # The user's own configuration files and fonts of matplotlib may be broken in any way.
        raise OutputError(f"cannot draw {target} ({' '.join(str(error).split())[:200]})") from error


def _draw_losses(logs: dict[str, Path], target: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines_of = {name: read_lines(log) for name, log in logs.items()}
    scores = {name: scores_of(lines) for name, lines in lines_of.items()}
    panels = 2 if any(scores.values()) else 1
    figure = Figure(figsize=(7, 4 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *below = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    lowest = []
    for index, (name, lines) in enumerate(lines_of.items()):
        records = [record for record in losses_of(lines) if math.isfinite(record["loss"])]
        steps = [record["step"] for record in records]
        losses = [record["loss"] for record in records]
        axes.plot(steps, losses, color=f"C{index}", alpha=0.3, linewidth=0.8)
        axes.plot(steps, smooth(losses), color=f"C{index}", label=_label(name))
        lowest += losses[:1] and [min(losses)]
    axes.set(xlabel="optimizer step", ylabel="loss = mse + variational bound (bits)")
    axes.set_title("pale: mean since the last log line; full: smoothed", fontsize="small")
    if lowest and min(lowest) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    _add_legend(axes)
    for index, (name, lines) in enumerate(scores.items()):
        if lines:
            distances = [line.get("fid", line.get("proxy_fid")) for line in lines]
            kind = f"proxy, {lines[0]['extractor']}" if lines[0]["proxy"] else lines[0]["extractor"]
            label = f"{_label(name)} ({kind}, {lines[0]['num_samples']} samples)"
            steps = [line["step"] for line in lines]
            below[0].plot(steps, distances, color=f"C{index}", marker=".", label=label)
    for panel in below:
        panel.set(xlabel="optimizer step", ylabel="Frechet distance of samples", yscale="log")
        panel.grid(alpha=0.3, which="both")
        _add_legend(panel)
    write_atomically(target, lambda path: figure.savefig(path, dpi=150))


def _label(name: str) -> str:
    """A name that matplotlib shows: it leaves out labels that begin with an underscore."""
    printable = name.encode(errors="backslashreplace").decode()
    return f" {printable}" if printable.startswith("_") else printable


def _add_legend(axes: Any) -> None:
    """Add a legend; a dollar sign in a name does not start a formula."""
    for text in axes.legend().get_texts():
        text.set_parse_math(False)


def smooth(values: Sequence[float]) -> list[float]:
    """Means over a centered window: a tenth of all values, at least five, fewer towards both ends.

    A centered window leaves a straight line unchanged, where a trailing average lags behind.
    """
    count = len(values)
    sums = list(accumulate(values, initial=0.0))
    widest = max(2, count // 20)
    smoothed = []
    for index in range(count):
        half = min(widest, index, count - 1 - index)
        smoothed.append((sums[index + half + 1] - sums[index - half]) / (2 * half + 1))
    return smoothed


# Dense bf16 tensor-core peaks in FLOP/s from NVIDIA's data sheets. The first name contained in the device's counts.
PEAKS = (
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200", 989e12), ("H800", 989e12),
    ("GH200", 989e12), ("B200", 2250e12), ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12),
)  # fmt: skip


def training_flops(
    model: DiT, caption_tokens: int = 1, shapes: Mapping[tuple[int, int], int] | None = None
) -> int:
    """Model FLOPs of training on one image, the mean over `shapes` (`mean_macs`)."""
    return 3 * 2 * mean_macs(model, caption_tokens, shapes)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Peak bytes in use: allocated on a CUDA device, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class SpikeDetector:
    """Finds steps whose loss is an outlier, by robust statistics of the part that the timesteps do not explain.

    The loss of a sample is mostly a function of its timestep, over two orders of magnitude, so that the mean over a
    small batch follows the timesteps that were drawn. Each loss is therefore compared with the mean of recent losses in
    the same of `LEVELS` ranges of timesteps (means of about the last 100 steps), and a step is judged by

        r = ln(sum of the batch's losses / sum of the losses expected at its timesteps).

    A step is a spike where r is above the median of the last 100 by 1.4826 * 5 median absolute deviations (five
    standard deviations of normal values) and by ln 1.5. A lasting new level is not a spike: r must be as far above the
    median of the last five, too. Before there are 50 steps, only ten times the expected loss is one.

    The state is a few hundred numbers in the checkpoint, so that a resumed run finds the same spikes.
    """

    WINDOW, FIRST, NEAR = 100, 50, 5
    DEVIATIONS, RATIO, FIRST_RATIO = 5.0, 1.5, 10.0
    KEPT = 0.99

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=self.WINDOW)
        self.sums = [0.0] * LEVELS
        self.counts = [0.0] * LEVELS

    def judge(self, value: StepValues) -> str | None:
        """The reason why the loss of this step is a spike, or None; adds the step to the statistics."""
        excess = self._excess(value)
        reason = None
        if excess is not None:
            recent = list(self.recent)
            middle, least = 0.0, math.log(self.FIRST_RATIO)
            if len(recent) >= self.FIRST:
                middle = median(recent)
                deviation = 1.4826 * median(abs(each - middle) for each in recent)
                middle = max(middle, median(recent[-self.NEAR :]))
                least = max(self.DEVIATIONS * deviation, math.log(self.RATIO))
            if excess - middle >= least:
                reason = f"{math.exp(excess - middle):.1f} times what its timesteps let expect"
            self.recent.append(excess)
        for level in range(LEVELS):
            self.sums[level] = self.KEPT * self.sums[level] + value.level_sums[level]
            self.counts[level] = self.KEPT * self.counts[level] + value.level_counts[level]
        return reason

    def _excess(self, value: StepValues) -> float | None:
        """r of this step over the ranges of timesteps seen before; None where there is none."""
        found = expected = 0.0
        for level, (loss, count) in enumerate(zip(value.level_sums, value.level_counts, strict=True)):
            if count and self.counts[level]:
                found += loss
                expected += count * self.sums[level] / self.counts[level]
        return math.log(found / expected) if found > 0 and expected > 0 else None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "recent": list(self.recent),
            "sums": list(self.sums),
            "counts": list(self.counts),
        }

    def restore(self, state: dict[str, Any]) -> None:
        if len(state["sums"]) != LEVELS or len(state["counts"]) != LEVELS:
            raise ValueError(f"statistics of losses in {len(state['sums'])} ranges, not {LEVELS}")
        self.recent = deque(state["recent"], maxlen=self.WINDOW)
        self.sums, self.counts = list(state["sums"]), list(state["counts"])


class Averages:
    """Sums over the steps since the last log line; they are in the checkpoint, so that no line misses a step.

    Values are added one by one in the order of the steps, so that a sum does not depend on when it was read.
    """

    PLAIN = ("loss", "mse", "vb", "grad_norm")

    def __init__(self) -> None:
        self.count = 0
        self.sums = [0.0] * (len(self.PLAIN) + 2 * BUCKETS)
        self.loss_scale = 1.0

    def add(self, value: StepValues) -> None:
        """Add a step; one that was skipped because it was not finite does not count."""
        self.loss_scale = value.loss_scale
        if value.applied:
            self.count += 1
            values = (
                *(getattr(value, name) for name in self.PLAIN),
                *value.bucket_sums,
                *value.bucket_counts,
            )
            self.sums = [total + each for total, each in zip(self.sums, values, strict=True)]

    def means(self) -> dict[str, Any]:
        """loss, mse, vb, grad_norm (NaN where no step counts), loss_by_timestep."""
        plain, buckets = self.sums[: len(self.PLAIN)], self.sums[len(self.PLAIN) :]
        by_timestep = zip(buckets[:BUCKETS], buckets[BUCKETS:], strict=True)
        return {
            **{
                name: total / self.count if self.count else math.nan
                for name, total in zip(self.PLAIN, plain, strict=True)
            },
            "loss_by_timestep": tuple(total / count if count else None for total, count in by_timestep),
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"count": self.count, "sums": list(self.sums), "loss_scale": self.loss_scale}

    def restore(self, state: dict[str, Any]) -> None:
        if len(state["sums"]) != len(self.sums):
            raise ValueError(f"{len(state['sums'])} sums, not {len(self.sums)}")
        self.count, self.sums = state["count"], list(state["sums"])
        self.loss_scale = state["loss_scale"]


class Tracker(Protocol):
    """Receives the values and pictures of a run at its log lines. `name`: for warnings."""

    name: str

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def image(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `run`/tensorboard. Raises MissingExtraError without tensorboard."""

    name = "TensorBoard"

    def __init__(self, run: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "--tensorboard: tensorboard is not installed; pip install 'dit-fast[track]'"
            ) from error
        self.writer: Any = SummaryWriter(str(run / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, path: Path) -> None:
        with Image.open(path) as picture:
            self.writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run with the folder's name, whose id is stored there: a resumed run continues it.

    Raises MissingExtraError without wandb.
    """

    name = "Weights & Biases"

    def __init__(self, config: TrainConfig, run: Path):
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError(
                "--wandb: wandb is not installed; pip install 'dit-fast[track]'"
            ) from error
        self.wandb: Any = wandb
        remembered = run / "wandb_id"
        held = read_text(remembered, DataError, 1 << 10).strip() if remembered.exists() else None
        self.session = wandb.init(
            project="dit-fast", name=run.name, id=held, resume="allow", dir=str(run),
            config=dataclasses.asdict(config),
        )  # fmt: skip
        write_atomically(remembered, lambda temporary: temporary.write_text(self.session.id))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.session.log(values, step=step)

    def image(self, step: int, path: Path) -> None:
        self.session.log({"samples": self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.session.finish()


def open_trackers(config: TrainConfig, run: Path, best_effort: BestEffort) -> list[Tracker]:
    """The trackers of the configuration, without those that cannot be opened.

    Raises MissingExtraError for a package that is not installed: better before the first step than after the last.
    """
    trackers: list[Tracker] = []
    missing: list[MissingExtraError] = []

    def add(make: Callable[[], Tracker]) -> None:
        try:
            trackers.append(make())
        except MissingExtraError as error:
            missing.append(error)

    if config.tensorboard:
        best_effort(TensorBoard.name, lambda: add(lambda: TensorBoard(run)))
    if config.wandb:
        best_effort(WeightsAndBiases.name, lambda: add(lambda: WeightsAndBiases(config, run)))
    if missing:
        raise missing[0]
    return trackers
