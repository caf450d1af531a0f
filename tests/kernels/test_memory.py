"""Memory of every operation: nothing outside its tensors (K5), nothing lost beyond 2^31 elements (K4)."""

from pathlib import Path

import pytest

from benchmarks.ops.registry import REGISTRY, OpSpec, Shape
from tests.kernels.guarded import Side
from tests.kernels.interpreter import interpreter_only
from tests.kernels.proofs import OPS, is_beyond_int32, stays_inside_its_tensors

pytestmark = interpreter_only

# Batches of which each token tensor passes 2^31 elements; patch_embed's image does too at a width of 16.
LARGE: dict[str, Shape] = {"patch_embed": (2**27 + 64, 1, 16)}
WALKS_THE_BATCH = {
    "_gelu_bwd_kernel": "its programs share the rows of a column block; test_mlp_offsets.py gives them one tile each",
    "_swiglu_bwd_kernel": "as _gelu_bwd_kernel",
    "_patch_embed_bwd_weight_kernel": "its 32 programs walk the whole batch, hours in the interpreter; the rule on "
    "program ids in test_architecture.py holds it",
}


def large_shape(name: str) -> Shape:
    return LARGE.get(name, (2**26 + 64, 1, 40))


@OPS
@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize("shape", [(2, 9, 100), (1, 1, 13)], ids=["D100", "D13"])
def test_stays_inside_its_tensors(spec: OpSpec, shape: Shape, side: Side) -> None:
    stays_inside_its_tensors(spec, shape, side)


@OPS
def test_beyond_32_bit_offsets(spec: OpSpec, tmp_path: Path) -> None:
    assert not is_beyond_int32(spec, large_shape(spec.name), tmp_path, WALKS_THE_BATCH)


def test_exemptions_are_of_registered_operations() -> None:
    assert LARGE.keys() <= REGISTRY.keys()
