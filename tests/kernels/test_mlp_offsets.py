"""Offsets beyond 2^31 elements in kernels whose programs walk: products of `mlp`, backward passes of activations."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_fast.kernels.launch import Launch, record_launches
from tests.kernels.guarded import last_programs_agree
from tests.kernels.interpreter import interpreter_only

gelu = importlib.import_module("dit_fast.kernels.mlp.gelu")
gemm = importlib.import_module("dit_fast.kernels.mlp.gemm")
swiglu = importlib.import_module("dit_fast.kernels.mlp.swiglu")
pytestmark = interpreter_only
WIDTH, DEPTH, ROWS = 1040, 24, 2**21 + 2**16


def meta(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float16, device="meta")


def forward(rows: int) -> None:
    gemm.gemm_gelu(meta(rows, DEPTH), meta(WIDTH, DEPTH), meta(WIDTH), True, descriptors=False)


def backward(rows: int) -> None:
    pre = meta(rows, WIDTH)
    gemm.gemm_gelu_backward(meta(rows, DEPTH), meta(DEPTH, WIDTH), pre, True, True, descriptors=False)


def gelu_backward(rows: int) -> None:
    pre = meta(rows, WIDTH)
    gelu.plan_gelu_backward(pre, rows, WIDTH, True, True)(meta(rows, WIDTH), pre, None)


def swiglu_backward(rows: int) -> None:
    pre = meta(rows, 2 * WIDTH)
    swiglu.plan_swiglu_backward(pre, rows, WIDTH, True, True)(meta(rows, WIDTH), pre, None)


@pytest.mark.parametrize("run", [forward, backward, gelu_backward, swiglu_backward])
def test_beyond_32_bit_offsets(run, monkeypatch, tmp_path) -> None:
    """The last program computes at the end of a large tensor what it does at the end of a small one."""
    chosen = gelu.elementwise_launch
    # One tile for each program: else the last one would walk over a thousandth of the large tensor. With 8 rows of
    # tiles, a whole group, the last programs have the same tiles of both tensors.
    monkeypatch.setattr(gemm, "_programs", lambda on, arch: 2**30)
    for module in (gelu, swiglu):
        monkeypatch.setattr(
            module,
            "elementwise_launch",
            lambda rows, width, tile: replace(chosen(rows, width, tile), splits=rows // tile),
        )
    small, large = (recorded(run, rows) for rows in (1024, ROWS))
    assert large.arguments["pre_ptr"].numel() > 2**31
    assert last_programs_agree(large, small, tmp_path) == []


def recorded(run, rows: int) -> Launch:
    with record_launches(capability=0) as launches:
        run(rows)
    (launch,) = launches
    return launch
