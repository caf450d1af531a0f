"""Every operation of the registry: agreement in float64, accuracy, layouts, hard rows, gradients, determinism (K2, K3,
K6, K7, K9, K10). Sizes by hypothesis (K1) are in test_shapes.py, memory (K4, K5) in test_memory.py, refusals (K8) in
test_refusals.py; test_detectors.py shows that each proof sees its fault.
"""

import dataclasses
import sys

import pytest
import torch

from benchmarks.ops.registry import REGISTRY, OpSpec, Shape
from dit_fast.kernels import tuned
from tests.kernels.proofs import (
    DEVICE,
    DTYPES,
    FLOAT64,
    HARD_ROWS,
    OPS,
    VARIANTS_TOO,
    agrees_in_float64,
    draw,
    evaluate,
    fused,
    is_as_accurate_as_torch,
    is_the_same_in_any_layout,
    passes_gradcheck,
    passes_opcheck,
    repeats_to_the_bit,
    survives_hard_rows,
    takes_no_rows,
)

WIDTHS = (72, 384, 768, 1000, 1024, 1152)
# The interpreter's time goes with the number of programs, and a program is a tile of a few rows: one row, a tile and a
# row, several tiles with and without a rest. More of the same kind run nightly.
SHAPES: list[Shape] = [
    *((2, 1, width) for width in WIDTHS),
    *((1, 9, width) for width in WIDTHS),
    (3, 5, 384),
    (1, 37, 72),
    (1, 64, 72),
]
LONG: list[Shape] = [(1, 100, 72), (8, 1, 1152), (1, 255, 72), (1, 256, 72), (1, 1024, 72)]
if DEVICE == "cuda":
    SHAPES, LONG = [*SHAPES, *LONG], []
    SHAPES += [
        (batch, tokens, width) for batch, tokens in ((8, 256), (1, 1024), (3, 255)) for width in WIDTHS
    ]

# (operation, case): why the case says nothing about it.
DOES_NOT_APPLY = {
    ("patch_embed", "no tokens"): "an image without pixels: the convolution of the reference refuses it",
}


@OPS
@pytest.mark.parametrize(
    "shape",
    [*SHAPES, *(pytest.param(shape, marks=pytest.mark.nightly) for shape in LONG)],
    ids=lambda s: "B{}-T{}-D{}".format(*s),
)
def test_float64_agrees(spec: OpSpec, shape: Shape) -> None:
    agrees_in_float64(spec, shape)


@VARIANTS_TOO
def test_programs_that_walk_several_tiles(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large batches leave each program more than one tile of a sample; here small ones do."""
    for name, module in list(sys.modules.items()):
        if (
            name.startswith("dit_fast.kernels.")
            and (choose := getattr(module, "row_launch", None)) is not None
        ):
            monkeypatch.setattr(
                module,
                "row_launch",
                lambda *shape, choose=choose: dataclasses.replace(choose(*shape), splits=2),
            )
    tuned.forget()
    try:
        agrees_in_float64(spec, (2, 33, 72))
    finally:
        tuned.forget()


@VARIANTS_TOO
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4, 1152), (2, 9, 72)], ids=["D1152", "D72"])
def test_as_accurate_as_torch(spec: OpSpec, shape: Shape, dtypes: str) -> None:
    is_as_accurate_as_torch(spec, shape, dtypes)


@OPS
@pytest.mark.parametrize("shape", [(0, 16, 72), (2, 0, 72)], ids=["no samples", "no tokens"])
def test_empty(spec: OpSpec, shape: Shape) -> None:
    case = "no tokens" if shape[0] else "no samples"
    if reason := DOES_NOT_APPLY.get((spec.name, case)):
        pytest.skip(reason)
    takes_no_rows(spec, shape)


@pytest.mark.slow
@OPS
def test_layout_does_not_matter(spec: OpSpec) -> None:
    is_the_same_in_any_layout(spec, (2, 9, 72))


@pytest.mark.slow
@VARIANTS_TOO
@pytest.mark.parametrize("kind", HARD_ROWS)
def test_hard_rows(spec: OpSpec, kind: str) -> None:
    survives_hard_rows(spec, kind)


@VARIANTS_TOO
def test_gradcheck(spec: OpSpec) -> None:
    passes_gradcheck(spec)


@pytest.mark.slow
@OPS
def test_opcheck(spec: OpSpec) -> None:
    passes_opcheck(spec)


@pytest.mark.slow
@OPS
@pytest.mark.parametrize("shape", [(1, 9, 1152), (2, 36, 72)], ids=["D1152", "D72"])
def test_runs_agree_to_the_bit(spec: OpSpec, shape: Shape) -> None:
    repeats_to_the_bit(spec, shape)


def test_unwritten_memory_is_poisoned() -> None:
    """K6 rests on it: what a kernel does not write is NaN."""
    for empty in (torch.empty(8, device=DEVICE), torch.empty_like(draw(8, dtype=torch.float32))):
        assert empty.isnan().all()
    assert draw(2, dtype=torch.float16).new_empty(3).isnan().all()


def test_exemptions_are_of_registered_operations() -> None:
    assert {name for name, _ in DOES_NOT_APPLY} <= REGISTRY.keys()


@pytest.mark.parametrize("bias", [True, False])
def test_gated_residual_without_bias(bias: bool) -> None:
    """The bias is optional in both gated operations."""
    for name in ("gated_residual", "gated_residual_adaln"):
        inputs = REGISTRY[name].make_inputs((2, 5, 72), torch.float64, torch.float64, draw)
        inputs = inputs if bias else inputs[:-1]
        ours, exact = fused(REGISTRY[name], inputs), evaluate(REGISTRY[name].reference, inputs)
        assert all((a - b).abs().max() <= FLOAT64 for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize(
    ("channels", "patch", "size", "width"), [(3, 4, (8, 16), 40), (1, 8, (16, 8), 24), (4, 8, (16, 16), 72)]
)
def test_patches(channels: int, patch: int, size: tuple[int, int], width: int) -> None:
    """Other patch sizes, channel counts and non-square grids."""
    height, columns = size[0] // patch, size[1] // patch
    x = draw(2, channels, *size, dtype=torch.float64)
    inputs = [
        x, draw(width, channels, patch, patch, dtype=torch.float64), draw(width, dtype=torch.float64),
        draw(1, height * columns, width, dtype=torch.float64),
    ]  # fmt: skip
    spec = REGISTRY["patch_embed"]
    ours, exact = fused(spec, inputs), evaluate(spec.reference, inputs)
    assert all((a - b).abs().max() <= FLOAT64 for a, b in zip(ours, exact, strict=True))
    tokens = draw(2, height * columns, patch * patch * channels, dtype=torch.float64)
    spec = REGISTRY["unpatchify"]
    ours = fused(spec, (tokens, patch, height, columns))
    exact = evaluate(spec.reference, (tokens, patch, height, columns))
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
