"""The kernels themselves: on a GPU, or on a CPU through Triton's interpreter (TRITON_INTERPRET=1)."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.interpreter import (
    INTERPRETED,
    indexing_by_one_element,
    patching_once,
    rounding_bfloat16,
    without_unread_checks,
)

if not INTERPRETED and not torch.cuda.is_available():
    # Without either, the registered operations run their references and these tests would show nothing.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """torch.empty is filled with NaN: a kernel that leaves an element unwritten cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter() -> Iterator[None]:
    if not INTERPRETED:
        yield
        return
    with rounding_bfloat16(), indexing_by_one_element(), patching_once(), without_unread_checks():
        yield
