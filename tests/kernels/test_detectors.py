"""Negative controls: each proof sees the fault that is planted for it, and none in the same operation without one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError
from torch.testing._internal.optests.generate_tests import OpCheckError

from benchmarks.ops.registry import OpSpec
from tests.kernels.guarded import fenced_run
from tests.kernels.interpreter import in_child, interpreter_only
from tests.kernels.planted import planted
from tests.kernels.proofs import (
    agrees_in_float64,
    assert_refused,
    draw,
    fused,
    is_as_accurate_as_torch,
    is_beyond_int32,
    is_the_same_in_any_layout,
    passes_gradcheck,
    passes_opcheck,
    refuses_misfits,
    repeats_to_the_bit,
    stays_inside_its_tensors,
    strangers,
    survives_hard_rows,
    takes_no_rows,
)
from tests.patience import PATIENCE

LARGE = (2**26 + 64, 1, 40)
PROOFS: dict[str, tuple[str, Callable[[OpSpec], None]]] = {
    "float64, batch of two": ("batch", lambda spec: agrees_in_float64(spec, (2, 4, 24))),
    "float64, unwritten rows": ("rows", lambda spec: agrees_in_float64(spec, (1, 5, 24))),
    "float64, odd width": ("odd", lambda spec: agrees_in_float64(spec, (1, 4, 25))),
    "K1 accuracy": ("half", lambda spec: is_as_accurate_as_torch(spec, (1, 4, 24), "fp32")),
    "K2 empty": ("empty", lambda spec: takes_no_rows(spec, (2, 0, 24))),
    "K3 layouts": ("strides", lambda spec: is_the_same_in_any_layout(spec, (2, 4, 24))),
    "K6 unwritten rows": ("rows", lambda spec: is_as_accurate_as_torch(spec, (1, 5, 24), "bf16")),
    "K7 dropped NaN": ("nan", lambda spec: survives_hard_rows(spec, "NaN")),
    "K8 misfits": ("unchecked", refuses_misfits),
    "K9 gradcheck": ("gradient", passes_gradcheck),
    "K9 opcheck": ("fake", lambda spec: passes_opcheck(spec, "planted")),
    "K10 repeats": ("order", lambda spec: repeats_to_the_bit(spec, (2, 33, 72))),
}


@pytest.mark.parametrize("proof", PROOFS)
def test_the_fault_is_caught(proof: str) -> None:
    fault, prove = PROOFS[proof]
    prove(planted(""))
    with pytest.raises((AssertionError, OpCheckError, GradcheckError)):
        prove(planted(fault))


@interpreter_only
@pytest.mark.parametrize(
    ("fault", "argument", "side"),
    [
        ("load", "x_ptr: accessed out of bounds (SIGSEGV)", "above"),
        ("store", "out_ptr: accessed out of bounds (SIGSEGV)", "above"),
        ("store", "out_ptr: bytes beside it were overwritten", "below"),
        ("gap", "scale_ptr: bytes beside it were overwritten", "above"),
    ],
)
def test_fences_name_the_argument(fault: str, argument: str, side: str) -> None:
    """K5: an access outside a tensor is a segmentation fault or a dead canary, reported by kernel and argument.

    Nothing but the fence sees the missing mask of "load": what it reads too much is never stored.
    """
    inputs = planted(fault).make_inputs((2, 4, 25), torch.float32, torch.float32, draw)
    if fault == "load":
        assert in_child(lambda: agrees_in_float64(planted(fault), (2, 4, 25))).status == 0
    stays_inside_its_tensors(planted(""), (2, 4, 25), side)
    with torch.no_grad():
        faults = fenced_run(lambda: [planted(fault).op(*inputs, kernels="triton")], side)
    assert f"_scale_rows_fwd_kernel: {argument}" in faults
    assert {fault.split(": ")[1] for fault in faults} == {argument.split(": ")[0]}
    with pytest.raises(AssertionError):
        stays_inside_its_tensors(planted(fault), (2, 4, 25), side)


@interpreter_only
def test_32_bit_offsets_are_caught(tmp_path: Path) -> None:
    """K4: the same launches with an int32 sample index crash or read other data."""
    assert not is_beyond_int32(planted(""), LARGE, tmp_path / "sound", {})
    faults = is_beyond_int32(planted("int32"), LARGE, tmp_path / "planted", {})
    assert faults
    assert all(fault.startswith("_scale_rows_fwd_kernel") for fault in faults)


def test_refusals_are_read(recwarn: pytest.WarningsRecorder) -> None:
    """K8: what the planted operation does not check is reported; a fake tensor of another device is too."""
    accepted = [name for what, name, inputs in strangers(planted("unchecked")) if what == "dtype"]
    assert accepted == ["x", "scale"]
    for what, name, inputs in strangers(planted("unchecked")):
        with pytest.raises((AssertionError, RuntimeError)):
            assert_refused(planted("unchecked"), inputs, f"{what} of {name}")


def test_a_child_reports_how_it_ended() -> None:
    """The harness itself: an answer, an exception, a signal, a hang."""
    import os
    import signal
    import time

    assert in_child(lambda: ["a"]) == (0, ["a"])
    assert in_child(lambda: 1 / 0) == (1, "ZeroDivisionError: division by zero")
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGSEGV)).status == -signal.SIGSEGV
    assert in_child(lambda: time.sleep(PATIENCE), seconds=0.1).status == -signal.SIGKILL


def test_results_are_compared_to_the_bit() -> None:
    inputs = planted("").make_inputs((1, 4, 24), torch.float32, torch.float32, draw)
    first = fused(planted(""), inputs)
    second = [value.clone() for value in first]
    second[1].view(-1)[0] = torch.nextafter(second[1].view(-1)[0], torch.tensor(9e9))
    from tests.kernels.proofs import same_bits

    assert same_bits(first, first)
    assert not same_bits(first, second)
