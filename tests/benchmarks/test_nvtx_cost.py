"""`python -m benchmarks.models.nvtx_cost`: the side without ranges has none and trains alike; a row for each side."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models import nvtx_cost
from benchmarks.ops.rows import read_results


def test_ranges_are_taken_out_and_nothing_else(capsys: Any) -> None:
    sides = dict(nvtx_cost.trainers())
    plain, shipped = sides[nvtx_cost.NONE], sides[nvtx_cost.SWITCHED_OFF]
    assert nvtx_cost.ranges_of_a_step(type(plain)) == []
    assert {"draw", "forward", "backward"} <= set(nvtx_cost.ranges_of_a_step())
    times = nvtx_cost.measure({"plain": plain, "shipped": shipped}, repeats=2, warmup=1)
    assert [len(seconds) for seconds in times.values()] == [2, 2]
    assert all(torch.equal(a, shipped.trained[name]) for name, a in plain.trained.items())
    with pytest.raises(RuntimeError, match="no range was found"):
        nvtx_cost.without_ranges("dit_fast.training.optimizer")


def test_a_row_for_each_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(sys, "argv", ["nvtx_cost", "--repeats", "2", "--results", str(tmp_path)])
    nvtx_cost.main()
    (file,) = tmp_path.rglob("*.json")
    rows = {row.provider: row for row in read_results(file).rows}
    assert rows[nvtx_cost.SWITCHED_OFF].repeats == rows[nvtx_cost.NONE].repeats == 2
    assert "nvtx is not installed" in (rows[nvtx_cost.ON].failed or "")
    said = capsys.readouterr().out
    assert "nvtx is not installed" in said
    assert "ranges a step; one that is off takes" in said
