"""The kernels themselves: on a GPU, or on a CPU through Triton's interpreter (TRITON_INTERPRET=1)."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dit_fast.kernels import tuned
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


@pytest.fixture
def monkeypatch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """pytest's, after which launches are prepared anew: the code that prepares them may be what was replaced."""
    replace = monkeypatch.setattr

    def setattr_and_drop_plans(*args: Any, **kwargs: Any) -> None:
        replace(*args, **kwargs)
        tuned.drop_plans()

    monkeypatch.setattr = setattr_and_drop_plans  # type: ignore[method-assign]
    yield monkeypatch
    monkeypatch.undo()
    tuned.drop_plans()


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter() -> Iterator[None]:
    if not INTERPRETED:
        yield
        return
    with rounding_bfloat16(), indexing_by_one_element(), patching_once(), without_unread_checks():
        yield
