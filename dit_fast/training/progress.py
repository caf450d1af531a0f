"""What a run says about itself: a bar or plain lines, `log.jsonl`, and the loss curve."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dit_fast.errors import MissingExtraError
from dit_fast.terminal import say


@dataclass(frozen=True)
class Record:
    """One line of log.jsonl: means over the steps since the line before, up to and including `step`.

    loss = mse + vb (vb in bits, 0 without learned sigma); loss_by_timestep: of the samples in each quarter of the
    timesteps, least noise first, None where there was none; skipped: steps left out since the line before because they
    were not finite, which the means leave out too; seconds of training since the run began; mfu: see
    `dit_fast.training.metrics`, None where the device's peak is not known; data_wait: share of the host's time spent
    waiting for batches; peak_memory in bytes.
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


class RunLog:
    """Appends records to a JSON-lines file; of a resumed run, lines past its step are dropped first."""

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        kept = [line for line in _lines(path) if line["step"] <= resumed_step] if resumed_step else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that a kill cut short is left out."""
    return [line for line in _lines(path) if "loss" in line]


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The scores of samples in a log: step, extractor, num_samples, and fid or proxy_fid."""
    return [line for line in _lines(path) if "extractor" in line]


def _lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class Progress:
    """Loss, images/s and time left: a tqdm bar on a terminal, one plain line a record elsewhere."""

    def __init__(self, total: int, done: int):
        self.total = total
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            desc="train",
            disable=not sys.stderr.isatty(),
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
        """A line of its own, above the bar if there is one."""
        tqdm.write(text)

    def close(self) -> None:
        self.bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def plot_loss(log: Path, target: Path) -> None:
    """Draw the loss of `log` over the steps to the PNG `target`, as logged and smoothed.

    Raises MissingExtraError without matplotlib.
    """
    plot_losses({log.parent.name: log}, target)


def plot_losses(logs: dict[str, Path], target: Path) -> None:
    """Draw the losses of several runs, name: log.jsonl, over each other, each as logged and smoothed.

    Below them stand the Frechet distances of samples, where a run has them.

    Raises MissingExtraError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "no loss curve: matplotlib is not installed; pip install 'dit-fast[plot]'"
        ) from error
    scores = {name: read_scores(log) for name, log in logs.items()}
    panels = 2 if any(scores.values()) else 1
    figure = Figure(figsize=(7, 4 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *below = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    lowest = []
    for index, (name, log) in enumerate(logs.items()):
        records = read_log(log)
        steps = [record["step"] for record in records]
        losses = [record["loss"] for record in records]
        axes.plot(steps, losses, color=f"C{index}", alpha=0.3, linewidth=0.8)
        axes.plot(steps, smooth(losses), color=f"C{index}", label=name)
        lowest += losses[:1] and [min(losses)]
    axes.set(xlabel="optimiser step", ylabel="loss = mse + variational bound (bits)")
    axes.set_title("pale: mean since the last log line; full: smoothed", fontsize="small")
    if lowest and min(lowest) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    for index, (name, lines) in enumerate(scores.items()):
        if lines:
            distances = [line.get("fid", line.get("proxy_fid")) for line in lines]
            kind = f"proxy, {lines[0]['extractor']}" if lines[0]["proxy"] else lines[0]["extractor"]
            label = f"{name} ({kind}, {lines[0]['num_samples']} samples)"
            steps = [line["step"] for line in lines]
            below[0].plot(steps, distances, color=f"C{index}", marker=".", label=label)
    for panel in below:
        panel.set(xlabel="optimiser step", ylabel="Frechet distance of samples", yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend()
    figure.savefig(target, dpi=150)


def smooth(values: Sequence[float]) -> list[float]:
    """Means over a window around each value: a tenth of all, at least five, fewer towards both ends.

    A window of both sides leaves a straight line where it is; an average of what came before lags behind a fall.
    """
    count = len(values)
    sums = list(accumulate(values, initial=0.0))
    widest = max(2, count // 20)
    smoothed = []
    for index in range(count):
        half = min(widest, index, count - 1 - index)
        smoothed.append((sums[index + half + 1] - sums[index - half]) / (2 * half + 1))
    return smoothed
