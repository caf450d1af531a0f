"""What a benchmark run says about itself, and where its rows go."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.environment import environment
from benchmarks.ops.rows import Recorder, Row
from dit_fast.errors import DitFastError

RECORDER = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", metavar="FOLDER", type=Path, help="keep a row for each case in a file there"
    )


def pytest_configure(config: pytest.Config) -> None:
    if (folder := config.getoption("--results", None)) is not None:
        try:
            config.stash[RECORDER] = Recorder(folder)
        except DitFastError as error:
            raise pytest.UsageError(str(error)) from error


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Callable[[Row], None]:
    """Keeps a row, where `--results` says that rows are kept."""
    recorder = pytestconfig.stash.get(RECORDER, None)
    return recorder.add if recorder is not None else lambda row: None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info["dit_fast"] = environment()


def pytest_report_header(config: pytest.Config) -> str:
    if torch.cuda.is_available():
        return f"benchmarks: {torch.cuda.get_device_name()}, device time, second-level cache cold"
    return "benchmarks: no CUDA device; small shapes on the CPU, where no kernel of ours runs but its PyTorch path"
