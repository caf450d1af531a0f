"""The table in docs/diffusers.md: the checks of diffusers' own tests, on three classes."""

import re
from pathlib import Path

import pytest
from diffusers.utils import logging

from tests.interop.diffusers_checks import CHECKS, outcome, subjects

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = Path(__file__).parents[2] / "docs" / "diffusers.md"
ROW = re.compile(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
TABLE = {name: cells for name, *cells in ROW.findall(PAGE.read_text()) if name in CHECKS}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.parametrize("name", CHECKS)
def test_the_check(name, tmp_path) -> None:
    found = [
        outcome(CHECKS[name], subject, tmp_path / str(number)) for number, subject in enumerate(subjects())
    ]
    # A cell that fails says why after a colon.
    assert [result for result, _ in found] == [cell.partition(":")[0] for cell in TABLE[name]], found


def test_as_many_passes_as_diffusers_own_class() -> None:
    assert list(TABLE) == list(CHECKS)
    for cells in TABLE.values():
        assert "fail" not in cells
        assert cells[1] == "pass"
        assert cells[0] == cells[2]
    passes = [sum(cell == "pass" for cell in column) for column in zip(*TABLE.values(), strict=True)]
    assert f"{passes[0]}, {passes[1]} and {passes[2]} of {len(TABLE)} pass" in PAGE.read_text()
