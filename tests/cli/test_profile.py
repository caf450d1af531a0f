"""`dit-fast profile`: traces of training and of sampling steps, tables of ranges and kernels, achieved bandwidth."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch.autograd import DeviceType
from triton.compiler.compiler import LazyDict

from dit_fast.cli import main
from dit_fast.cli.profile import LaunchBytes, kernel_table, range_table
from dit_fast.kernels.launch import describe

PROFILED = [
    *("profile", "--data", "digits", "--hidden-size", "16", "--depth", "2", "--num-heads", "2"),
    *("--patch-size", "4", "--batch-size", "4", "--device", "cpu"),
]  # fmt: skip


def tables(text: str) -> tuple[dict[str, float], list[list[str]], str]:
    """Calls of each range; the rows of the kernels; the last line."""
    lines = text.splitlines()
    blank = lines.index("")
    assert lines[0].split() == ["ms", "a", "step", "calls", "range"]
    ranges = {line.split()[2]: float(line.split()[1]) for line in lines[1:blank]}
    return ranges, [line.split(maxsplit=4) for line in lines[blank + 2 : -1]], lines[-1]


def names_of(trace: Path) -> list[str]:
    return [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]


@pytest.mark.parametrize("first", [0, 3])
def test_training_steps(first: int, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "deep" / "trace.json"
    options = ["--first", str(first), "--count", "2", "--top", "5", "--trace", str(target)]
    assert main([*PROFILED, *options]) == 0
    ranges, kernels, last = tables(capsys.readouterr().out)
    for name, calls in {
        "step": 1,
        "data": 1,
        "forward": 1,
        "block_*": 2,
        "backward": 1,
        "optimizer_ema": 1,
    }.items():
        assert ranges[name] == calls, name
    assert len(kernels) == 5
    shares = [float(row[1].rstrip("%")) for row in kernels]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5
    assert {row[3] for row in kernels} == {"-"}
    assert last == f"{target}: 2 steps after {first}"
    names = names_of(target)
    # Of the traced steps alone, not of those before them.
    assert [names.count(name) for name in ("forward", "block_1")] == [2, 2]
    traced = {name for name in names if str(name).startswith("ProfilerStep#")}
    assert traced == {f"ProfilerStep#{first}", f"ProfilerStep#{first + 1}"}


@pytest.mark.parametrize("more", [[], ["--num-classes", "0"], ["--objective", "flow"]])
def test_sampling_steps(more: list[str], tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "trace.json"
    options = ["--first", "2", "--count", "3", "--top", "4", "--trace", str(target)]
    assert main([*PROFILED, "--sample", *more, *options]) == 0
    ranges, kernels, last = tables(capsys.readouterr().out)
    assert ranges == {"block_*": 2}
    assert len(kernels) == 4
    assert last == f"{target}: 3 sampling steps after 2"
    names = names_of(target)
    assert names.count("block_0") == 3
    assert not {"backward", "optimizer_ema"} & set(names)


def test_a_compiled_sampling_step_has_no_ranges_of_blocks(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled(function, backend="eager", **how))
    options = ["--first", "1", "--count", "1", "--trace", str(tmp_path / "trace.json")]
    assert main([*PROFILED, "--sample", "--compile", *options]) == 0
    ranges, _, last = tables(capsys.readouterr().out)
    assert ranges == {}
    assert last.endswith("1 sampling step after 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "run"], "dit-fast profile keeps no run: remove --out"),
    ],
)
def test_a_profile_that_cannot_be(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*PROFILED, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_profile_needs_data(capsys: Any) -> None:
    assert main(["profile", "--first", "0"]) == 1
    assert "--data is missing" in capsys.readouterr().err


def event(key: str, ms: float, count: int, device: bool = True, annotation: bool = False) -> Any:
    time = 1000 * ms
    return SimpleNamespace(
        key=key, count=count, is_user_annotation=annotation,
        device_type=DeviceType.CUDA if device else DeviceType.CPU,
        self_device_time_total=time, device_time_total=time, self_cpu_time_total=time, cpu_time_total=time,
    )  # fmt: skip


def test_bandwidth_is_of_the_launched_tensors_over_the_devices_time() -> None:
    """Triton hands its hooks a lazy description of a launch; `launch` gives kernels `describe` for it."""
    x, out = torch.zeros(1000), torch.zeros(1000)
    with LaunchBytes() as launched:
        assert launched in triton.knobs.runtime.launch_enter_hook.calls
        for kernel in ("_gated_residual_fwd_kernel", "_gated_residual_fwd_kernel", "_gelu_fwd_kernel"):
            found = LazyDict({"name": kernel})
            found.add(describe, ((1,), SimpleNamespace(name=kernel), {"x_ptr": x, "out_ptr": out, "T": 4}))
            for call in triton.knobs.runtime.launch_enter_hook.calls:
                call(found)
        launched(LazyDict({"name": "triton_poi_fused_add_0"}))
    assert not triton.knobs.runtime.launch_enter_hook.calls
    events = [
        event("_gated_residual_fwd_kernel", ms=0.008, count=4),
        event("triton_poi_fused_add_0", ms=2.0, count=2),
        event("aten::mm", ms=50.0, count=2, device=False),
        event("forward", ms=9.0, count=2, annotation=True),
    ]
    rows = [line.split() for line in kernel_table(events, True, 2, 9, launched).splitlines()[1:]]
    # Two launches a step of 8,000 bytes each in 4 microseconds.
    assert rows[0] == ["1.000", "99.6%", "1", "-", "triton_poi_fused_add_0"]
    assert rows[1] == ["0.004", "0.4%", "2", "4", "_gated_residual_fwd_kernel"]
    assert len(rows) == 2


def test_ranges_are_those_of_the_device_and_not_pytorchs_own() -> None:
    events = [
        event("forward", ms=9.0, count=2, annotation=True),
        event("forward", ms=1.0, count=2, device=False, annotation=True),
        event("block_0", ms=2.0, count=2, annotation=True),
        event("block_11", ms=2.0, count=2, annotation=True),
        event("ProfilerStep*", ms=9.0, count=1, annotation=True),
        event("_gelu_fwd_kernel", ms=1.0, count=2),
    ]
    rows = [line.split() for line in range_table(events, True, 2).splitlines()[1:]]
    assert rows == [["4.500", "1", "forward"], ["2.000", "2", "block_*"]]
    rows = [line.split() for line in range_table(events, False, 2).splitlines()[1:]]
    assert rows == [["0.500", "1", "forward"]]
