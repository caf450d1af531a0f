"""The command that times operations: rows as each is timed, none of them twice, and reasons for what has none."""

from pathlib import Path

import pytest
import torch

from benchmarks.ops import operations
from benchmarks.ops.operations import main, reason
from benchmarks.ops.rows import read_results

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's shapes and peers")
WORDS = ["--shape", "2", "4", "64", "--rounds", "2", "--passes", "forward"]


def rows_in(folder: Path) -> dict[tuple[str, str], object]:
    (path,) = folder.glob("*/*.json")
    return {(row.case, row.provider): row for row in read_results(path).rows}


def test_rows_of_every_provider_and_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--out", str(tmp_path), "--providers", "ours", "eager", "flash-attn-2"]
    assert main([*words, "--ops", "gelu", "attention"]) == 0
    rows = rows_in(tmp_path)
    assert list(rows) == [("gelu", "ours"), ("gelu", "eager")] + [
        ("attention", name) for name in ("ours", "eager", "flash-attn-2")
    ]
    assert {key for key, row in rows.items() if row.failed} == {("attention", "flash-attn-2")}
    assert rows["attention", "flash-attn-2"].failed == "flash_attn needs a CUDA device"
    assert rows["gelu", "ours"].metrics["share of the ceiling"] > 0

    asked = []
    timed = operations.time_operation
    monkeypatch.setattr(operations, "time_operation", lambda *a: asked.append(a[0]) or timed(*a))
    assert main([*words, "--ops", "gelu", "attention", "swiglu"]) == 0
    assert asked == ["swiglu"]
    assert "attention fp32: known from before" in capsys.readouterr().out
    assert len(rows_in(tmp_path)) == 7


def test_a_failure_of_one_operation_is_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is timed again by the next call."""
    timed = operations.time_operation

    def fail(name: str, *rest):
        if name == "gelu":
            raise torch.OutOfMemoryError("CUDA out of memory\nlong story")
        return timed(name, *rest)

    words = [*WORDS, "--out", str(tmp_path), "--providers", "ours", "--ops", "gelu", "swiglu"]
    monkeypatch.setattr(operations, "time_operation", fail)
    assert main(words) == 0
    assert {key: row.failed for key, row in rows_in(tmp_path).items()} == {
        ("gelu", "ours"): "CUDA out of memory", ("swiglu", "ours"): None,
    }  # fmt: skip
    monkeypatch.setattr(operations, "time_operation", timed)
    assert main(words) == 0
    assert rows_in(tmp_path)["gelu", "ours"].failed is None


def test_our_own_result_that_is_wrong_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*WORDS, "--out", str(tmp_path), "--ops", "gelu", "--providers"]
    monkeypatch.setattr(operations.Bench, "disagreement", lambda *_: "result 0 has a relative error")
    assert main([*words, "eager"]) == 0
    assert main([*words, "ours"]) == 1
    assert rows_in(tmp_path)["gelu", "ours"].failed == "not timed: result 0 has a relative error"


def test_a_result_file_that_is_none_is_an_error_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = operations.Recorder(tmp_path).path
    path.write_text("{")
    assert main([*WORDS, "--out", str(tmp_path), "--ops", "gelu"]) == 1
    assert capsys.readouterr().err.startswith(f"operations: {path} is no result file")


def test_once_runs_every_pass_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operations, "Recorder", lambda *_: pytest.fail("a row is kept"))
    words = [*WORDS[:4], "--ops", "attention", "--providers", "ours", "flash-attn-2"]
    assert main([*words, "--once", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "attention fp32 ours: run",
        "attention fp32 flash-attn-2: flash_attn needs a CUDA device",
    ]


def test_reason() -> None:
    assert reason(RuntimeError("no room\nstory")) == "no room"
    assert reason(KeyError()) == "KeyError"
