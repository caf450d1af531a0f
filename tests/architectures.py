"""The GPUs that tests compile for without having them: sm_90 in every run, sm_80 and sm_100 nightly."""

from collections.abc import Iterable
from typing import Any

import pytest


def sm_90_first(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters that begin with a compute capability, those of other GPUs than sm_90 marked nightly."""
    return [case if case[0] == 90 else pytest.param(*case, marks=pytest.mark.nightly) for case in cases]


each_capability = pytest.mark.parametrize(
    "capability", [90, *(pytest.param(sm, marks=pytest.mark.nightly) for sm in (80, 100))]
)
