"""What Triton specializes a launch on: modelled by its own binder, met by every kernel, and a fault is found."""

import importlib
import inspect
import os
import pkgutil
import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import dit_fast.kernels
from benchmarks.compile.aot import compile_launch, lower, specialize
from benchmarks.compile.specializations import (
    POINTERS,
    WIDE,
    Recorded,
    attempt,
    binaries,
    choices,
    compile_matrix,
    failures,
    placed,
    recordings,
    sources,
)
from dit_fast.kernels.launch import launch, record_launches

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="interpreted functions cannot be compiled"
)
DIVISIBLE = [["tt.divisibility", 16]]


@triton.jit
def _scaled_copy_kernel(x_ptr, scale_ptr, y_ptr, B, T, stride, FIXED: tl.constexpr, SIZE: tl.constexpr):
    b = tl.program_id(0)
    offsets = tl.arange(0, SIZE)
    # An argument that is 1 is a constexpr, which has no method `to`.
    rows = tl.cast(B, tl.int64) if FIXED else B.to(tl.int64)
    x = tl.load(x_ptr + b * stride + offsets, mask=offsets < T * rows, other=0.0)
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + b)
    tl.store(y_ptr + b * stride + offsets, x)


def recorded(B: int = 2, T: int = 33, stride: int = 48, fixed: bool = True, **tensors: Any) -> Recorded:
    x = torch.empty(64, device="meta")
    pointers = {"x_ptr": x, "scale_ptr": x, "y_ptr": x, **tensors}
    with record_launches(90) as launches:
        launch(
            _scaled_copy_kernel, (B,), on=x, num_warps=1, **pointers, B=B, T=T, stride=stride, FIXED=fixed, SIZE=64
        )  # fmt: skip
    return Recorded(launches[0], 90, "fp32", (B, T, 64))


def test_a_launch_is_specialized_as_triton_does() -> None:
    x = torch.empty(65, device="meta")
    source = specialize(recorded(B=1, stride=WIDE, x_ptr=x[1:], scale_ptr=None).launch, 90)
    assert source.signature == {
        "x_ptr": "*fp32", "scale_ptr": "constexpr", "y_ptr": "*fp32", "B": "constexpr", "T": "i32", "stride": "i64",
        "FIXED": "constexpr", "SIZE": "constexpr",
    }  # fmt: skip
    names = list(source.signature)
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    assert constants == {"scale_ptr": None, "B": 1, "FIXED": True, "SIZE": 64}
    marked = {names[path[0]] for path, attributes in source.attrs.items() if attributes == DIVISIBLE}
    assert marked == {"y_ptr"}
    marked = specialize(recorded(B=16, T=48, x_ptr=x[4:]).launch, 90).attrs
    assert [names[path[0]] for path, attributes in marked.items() if attributes == DIVISIBLE] == [
        "x_ptr", "scale_ptr", "y_ptr", "B", "T", "stride",
    ]  # fmt: skip


def test_an_argument_that_is_one_is_found() -> None:
    """Only the subsets with B as 1 fail, each with a line that names the kernel, the arguments and the reason."""
    jobs = [(lower, item) for item in sources([recorded(fixed=False)])]
    assert len(jobs) == 2**3
    broken = failures(jobs, 1)
    assert len(broken) == 2**2
    assert all(re.match(r"_scaled_copy_kernel sm_90 fp32 .*'B': 1, .*: .*\bto\b", line) for line in broken)
    assert failures([(lower, item) for item in sources([recorded()])], 1) == []
    pair = [recorded(fixed=False), recorded(B=1, fixed=False)]
    assert len(failures([(lower, item) for item in pair], 2)) == 1


def test_the_covering_has_every_pair() -> None:
    items = [recorded(), recorded(scale_ptr=None)]
    seen = set()
    for item in binaries(items):
        values = {"absent": item.absent()}
        for name, value in item.arguments().items():
            if isinstance(value, torch.Tensor):
                values[name] = POINTERS[value.data_ptr() % 16 != 0]
            elif value is not None:
                values[name] = {1: "1", 48: "16n", 33: "odd", WIDE: "wide"}[value]
        seen |= {(a, b) for a in values.items() for b in values.items()}
    for item in items:
        taken = {**choices(item), "absent": (item.absent(),)}
        assert taken["stride"] == ("1", "16n", "odd", "wide")
        for a, first in taken.items():
            for b, second in taken.items():
                assert a == b or all(((a, x), (b, y)) in seen for x in first for y in second)


@pytest.mark.parametrize("word", POINTERS)
def test_a_placed_tensor_keeps_its_layout(word: str) -> None:
    view = torch.empty(3, 10, dtype=torch.bfloat16, device="meta")[:, 2:6]
    tensor = placed(view, word)
    assert (tensor.shape, tensor.stride(), tensor.dtype) == (view.shape, view.stride(), view.dtype)
    assert tensor.data_ptr() % 16 == (2 if word == "misaligned" else 0)


@pytest.fixture(scope="module")
def met() -> dict[str, list[Recorded]]:
    """What the operations launch with one mix of dtypes, on the two generations of attention."""
    return recordings((80, 90), ("autocast",), ((2, 81, 72),))


def jit_functions() -> dict[str, Any]:
    found = {}
    for module in pkgutil.walk_packages(dit_fast.kernels.__path__, "dit_fast.kernels."):
        members = vars(importlib.import_module(module.name))
        found |= {name: value for name, value in members.items() if isinstance(value, triton.JITFunction)}
    return found


def test_every_kernel_and_both_sides_of_every_optional_pointer_are_met(
    met: dict[str, list[Recorded]],
) -> None:
    kernels = {name: value for name, value in jit_functions().items() if name.endswith("_kernel")}
    assert met.keys() == kernels.keys()
    for name, kernel in kernels.items():
        optional = set(re.findall(r"if (\w+_ptr) is not None", inspect.getsource(kernel.fn)))
        for pointer in optional & set(kernel.arg_names):
            assert {pointer in item.absent() for item in met[name]} == {True, False}, f"{name}: {pointer}"


@pytest.mark.slow
def test_the_front_end_reads_every_kernel(met: dict[str, list[Recorded]]) -> None:
    """The slice of the matrix for every run: all integers as 1 and none, whatever pointers are None."""
    jobs = []
    for items in met.values():
        distinct = {item.source(): item for item in items}.values()
        for item in distinct:
            integers = [name for name, words in choices(item).items() if words[0] == "1"]
            jobs += [(lower, item.replace(dict.fromkeys(integers, word))) for word in ("1", "odd")]
    assert len(jobs) > 2 * len(met)
    assert failures(jobs, 1) == []


@pytest.mark.parametrize("name", ["_gelu_fwd_kernel", "_gated_residual_bwd_kernel", "_permute_kernel"])
def test_machine_code_of_misaligned_and_odd_arguments(met: dict[str, list[Recorded]], name: str) -> None:
    item = met[name][0]
    worst = {words_of: words[-1] for words_of, words in choices(item).items()}
    assert "misaligned" in worst.values()
    assert attempt((compile_launch, item.replace(worst))) is None


@pytest.mark.nightly
def test_the_whole_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_matrix(os.cpu_count() or 1) == 0, capsys.readouterr().out
