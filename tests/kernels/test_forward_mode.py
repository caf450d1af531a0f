"""Every operation on values and tangents, by the proofs of test_ops.py: the reference is PyTorch's forward mode."""

import pytest

from benchmarks.ops.registry import DUALS, REGISTRY, OpSpec, Shape, dual
from tests.kernels.guarded import Side
from tests.kernels.proofs import (
    DTYPES,
    HARD_ROWS,
    agrees_in_float64,
    is_as_accurate_as_torch,
    is_the_same_in_any_layout,
    passes_gradcheck,
    passes_opcheck,
    repeats_to_the_bit,
    stays_inside_its_tensors,
    survives_hard_rows,
    takes_no_rows,
)

NIGHTLY = pytest.mark.nightly
ALL = pytest.mark.parametrize(
    "spec", [pytest.param(s, id=s.key, marks=NIGHTLY if "rms" in s.variant else ()) for s in DUALS.values()]
)
"""Every operation and, nightly, every variant of one."""

# (operation, kind of row): why the case says nothing about it.
DOES_NOT_APPLY = {
    ("patch_embed", "NaN"): "PyTorch multiplies a NaN in the image by the tangent of a constant weight, 0",
}


SHAPES = [
    (1, 4, 1152),
    *(pytest.param(shape, marks=NIGHTLY) for shape in ((1, 37, 72), (3, 9, 384), (2, 4, 1000))),
]


@ALL
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-D{}".format(*s))
def test_float64_agrees(spec: OpSpec, shape: Shape) -> None:
    agrees_in_float64(spec, shape)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NIGHTLY if spec.variant else ()) for name, spec in REGISTRY.items()]
)
def test_every_input_may_have_a_tangent(name: str) -> None:
    """Parameters too."""
    agrees_in_float64(dual(REGISTRY[name]), (2, 9, 72))


@ALL
@pytest.mark.parametrize(
    "dtypes", [kind if kind in ("fp32", "fp16") else pytest.param(kind, marks=NIGHTLY) for kind in DTYPES]
)
def test_as_accurate_as_torch(spec: OpSpec, dtypes: str) -> None:
    is_as_accurate_as_torch(spec, (1, 5, 72), dtypes)


@NIGHTLY
@ALL
def test_runs_agree_to_the_bit(spec: OpSpec) -> None:
    repeats_to_the_bit(spec, (2, 9, 72))


@ALL
def test_empty(spec: OpSpec) -> None:
    takes_no_rows(spec, (0, 16, 72))


@NIGHTLY
@ALL
@pytest.mark.parametrize("kind", HARD_ROWS)
def test_hard_rows(spec: OpSpec, kind: str) -> None:
    if reason := DOES_NOT_APPLY.get((spec.name, kind)):
        pytest.skip(reason)
    survives_hard_rows(spec, kind)


@NIGHTLY
@ALL
def test_layout_does_not_matter(spec: OpSpec) -> None:
    is_the_same_in_any_layout(spec, (2, 9, 72))


@NIGHTLY
@ALL
def test_gradcheck(spec: OpSpec) -> None:
    passes_gradcheck(spec)


@NIGHTLY
@ALL
def test_opcheck(spec: OpSpec) -> None:
    passes_opcheck(spec)


@NIGHTLY
@ALL
@pytest.mark.parametrize("side", ["above", "below"])
def test_stays_inside_its_tensors(spec: OpSpec, side: Side) -> None:
    stays_inside_its_tensors(spec, (2, 9, 100), side)
