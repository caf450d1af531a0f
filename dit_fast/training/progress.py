"""What a run says about itself: a bar or plain lines, `log.jsonl`, and the loss curve."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dit_fast.errors import DitFastError, MissingExtraError, OutputError
from dit_fast.files import write_atomically
from dit_fast.terminal import say
from dit_fast.training.lines import read_lines


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


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, with their `loss`; other lines are left out, damaged ones with a warning."""
    return losses_of(read_lines(path))


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The scores of samples in a log: step, extractor, num_samples, and fid or proxy_fid."""
    return scores_of(read_lines(path))


def losses_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the lines of a log that have a loss."""
    return [line for line in lines if _is_number(line.get("loss"))]


def scores_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the lines of a log that are scores."""
    needed = ("extractor", "num_samples", "proxy")
    return [
        line
        for line in lines
        if all(name in line for name in needed) and _is_number(line.get("fid", line.get("proxy_fid")))
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Progress:
    """Loss, images/s and time left: a tqdm bar on a terminal, one plain line a record elsewhere."""

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
        """A line of its own, above the bar if there is one."""
        tqdm.write(text)

    def close(self) -> None:
        self.bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def plot_loss(log: Path, target: Path) -> None:
    """Draw the loss of `log` over the steps to the PNG `target`, as logged and smoothed.

    Raises MissingExtraError without matplotlib, OutputError where it fails.
    """
    plot_losses({log.parent.name: log}, target)


def plot_losses(logs: dict[str, Path], target: Path) -> None:
    """Draw the losses of several runs, name: log.jsonl, over each other, each as logged and smoothed.

    Below them stand the Frechet distances of samples, where a run has them.

    Raises MissingExtraError without matplotlib, OutputError where it fails.
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
        # matplotlib is configured by files and fonts of the user's, which may be broken in any way.
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
    axes.set(xlabel="optimiser step", ylabel="loss = mse + variational bound (bits)")
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
        panel.set(xlabel="optimiser step", ylabel="Frechet distance of samples", yscale="log")
        panel.grid(alpha=0.3, which="both")
        _add_legend(panel)
    write_atomically(target, lambda path: figure.savefig(path, dpi=150))


def _label(name: str) -> str:
    """A name as it can be drawn: matplotlib leaves out labels that begin with an underscore."""
    printable = name.encode(errors="backslashreplace").decode()
    return f" {printable}" if printable.startswith("_") else printable


def _add_legend(axes: Any) -> None:
    """Names are no formulas, whatever dollars they have."""
    for text in axes.legend().get_texts():
        text.set_parse_math(False)


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
