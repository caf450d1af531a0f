"""What a benchmark run says about itself."""

import pytest
import torch

from benchmarks.environment import environment


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info["dit_fast"] = environment()


def pytest_report_header(config: pytest.Config) -> str:
    if torch.cuda.is_available():
        return f"benchmarks: {torch.cuda.get_device_name()}, device time, second-level cache cold"
    return "benchmarks: no CUDA device; small shapes on the CPU, where no kernel of ours runs but its PyTorch path"
