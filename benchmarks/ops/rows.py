"""Results with provenance: `benchmarks/results/<device>/<date>-<commit>.json`, a row for each measurement.

    recorder = Recorder(folder)  # before anything is timed: refuses a file that it cannot add to
    recorder.add(Row.timed("train", "DiT-S/2", (8, 256), "fp32", "ours", "step", seconds, {"images/s": 3.4}))
    recorder.add(Row("train", "DiT-S/2", (8, 256), "fp8", "ours", "step", failed="needs a CUDA device"))

A file's head says on what and with which versions; a row, what was measured and how it spread. A measurement that is
repeated with the same code replaces its row. `python -m benchmarks.report` makes the README's tables of such files.
"""

import json
import math
import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import commit, environment
from dit_fast.errors import DataError
from dit_fast.utils.files import prepare_folder, write_atomically

FORMAT = "dit_fast results 1"
HEAD = ("device", "date", "commit", "environment")
RESULTS = Path(__file__).resolve().parents[1] / "results"
"""Where the results that the README shows are kept."""

VOLATILE = ("clocks", "load_average", "threads")
"""Of the environment: may differ between measurements of one file."""


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    benchmark: "op", "train", "sample", ...; case: the operation or the model; shape: (B, T, D) of an operation, batch
    and image size of a model; provider: whose; direction: "forward", "backward", "both" or "step". median, lower and
    upper quartile in seconds over `repeats`; None where something is counted rather than timed. metrics: figures
    beside the time, under names with their units. failed: the reason, of a row without any figure. ValueError for a
    row that has both, neither, or a figure that is not finite.
    """

    benchmark: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    provider: str
    direction: str
    median: float | None = None
    lower: float | None = None
    upper: float | None = None
    repeats: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    failed: str | None = None
    threads: int = field(default_factory=torch.get_num_threads)
    load: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))

    def __post_init__(self) -> None:
        names = (self.benchmark, self.case, self.dtype, self.provider, self.direction)
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"row {names}: a name is missing")
        if not isinstance(self.shape, tuple) or not all(type(size) is int for size in self.shape):
            raise ValueError(f"row {names}: shape {self.shape!r} is not a tuple of whole numbers")
        times = (self.lower, self.median, self.upper)
        figures = [*(time for time in times if time is not None), *self.metrics.values()]
        if self.failed is not None:
            if figures or self.repeats or not isinstance(self.failed, str) or not self.failed:
                raise ValueError(f"row {names}: a failed measurement has a reason and no figures")
            return
        if not figures:
            raise ValueError(f"row {names}: neither a figure nor the reason why there is none")
        for figure in (*figures, self.load):
            if isinstance(figure, bool) or not isinstance(figure, int | float) or not math.isfinite(figure):
                raise ValueError(f"row {names}: {figure!r} is not a finite number")
        if any(time is not None for time in times):
            ordered = None not in times and 0 < times[0] <= times[1] <= times[2]  # type: ignore[operator]
            if not ordered or self.repeats < 1:
                raise ValueError(f"row {names}: times {times} of {self.repeats} repeats")

    @classmethod
    def timed(
        cls,
        benchmark: str,
        case: str,
        shape: tuple[int, ...],
        dtype: str,
        provider: str,
        direction: str,
        seconds: Sequence[float],
        metrics: Mapping[str, float] | None = None,
    ) -> "Row":
        """A row with the median and the quartiles of `seconds`."""
        # One time has no quartiles but itself.
        several = list(seconds) * 2 if len(seconds) == 1 else seconds
        lower, median, upper = statistics.quantiles(several, n=4, method="inclusive")
        return cls(
            benchmark, case, shape, dtype, provider, direction,
            median, lower, upper, len(seconds), dict(metrics or {}),
        )  # fmt: skip

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured: rows of the same key are the same measurement."""
        return self.benchmark, self.case, self.shape, self.dtype, self.provider, self.direction


@dataclass(frozen=True)
class Results:
    """A file of rows. date: UTC, when the last run that added rows began; commit: as `environment.commit` says."""

    device: str
    date: str
    commit: str
    environment: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def on_gpu(self) -> bool:
        return "gpu" in self.environment


def device_of(found: Mapping[str, Any]) -> str:
    """The device that an environment's figures are of."""
    return str(found.get("gpu") or f"{found['cpu']} (CPU)")


def slug(device: str) -> str:
    """A device's folder: "nvidia-h100-80gb-hbm3", "amd-epyc-cpu"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read_results(path: Path) -> Results:
    """Read a file. DataError names it and the reason where it is cut, foreign or holds a row that is none."""
    try:
        data = json.loads(path.read_text(), parse_constant=_refuse)
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        rows = tuple(Row(**{**item, "shape": tuple(item["shape"])}) for item in data["rows"])
        head = {name: data[name] for name in HEAD}
        device_of(head["environment"])
        if (expected := _place(head)) != (place := f"{path.parent.name}/{path.name}"):
            raise ValueError(f"its head says that it is {expected}, not {place}")
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror or error})") from error
    except KeyError as error:
        raise DataError(f"{path} is no result file: it has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no result file, or a part of one: {error}") from error
    if len({row.key for row in rows}) < len(rows):
        raise DataError(f"{path} is no result file: it has two rows of one measurement")
    return Results(**head, rows=rows)


def _head(results: Results) -> dict[str, Any]:
    return {name: getattr(results, name) for name in HEAD}


def _place(head: Mapping[str, Any]) -> str:
    return f"{slug(head['device'])}/{head['date'][:10]}-{head['commit']}.json"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a figure")


class Recorder:
    """Adds rows to the file of this device, day and commit in `folder`; the file is whole after each addition.

    DataError for a file there that was made with other versions or is not readable; OutputError where none can be
    written.
    """

    def __init__(self, folder: Path) -> None:
        found = environment()
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.results = Results(device_of(found), date, commit() or "unknown", found, ())
        self.path = folder / _place(_head(self.results))
        prepare_folder(self.path.parent)
        self._before()

    def add(self, *rows: Row) -> None:
        """Append rows; those of the same measurement are replaced."""
        new = {row.key: row for row in rows}
        kept = [new.pop(row.key, row) for row in self._before()]
        head = json.dumps({"format": FORMAT, **_head(self.results)}, indent=1).removesuffix("\n}")
        lines = ",\n".join("  " + json.dumps(asdict(row)) for row in (*kept, *new.values()))
        write_atomically(self.path, lambda path: path.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n'))

    def _before(self) -> tuple[Row, ...]:
        if not self.path.exists():
            return ()
        before = read_results(self.path)
        old, new = (
            {key: value for key, value in found.items() if key not in VOLATILE}
            for found in (before.environment, self.results.environment)
        )
        if changed := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
            raise DataError(f"{self.path} was made with another {', '.join(changed)}: move it away first")
        return before.rows
