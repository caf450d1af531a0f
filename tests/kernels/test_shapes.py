"""K1: any size and mix of dtypes, by hypothesis; error at most twice PyTorch's own, three times for gradients."""

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from benchmarks.ops.registry import OpSpec, Shape
from tests.kernels.planted import planted
from tests.kernels.proofs import DEVICE, DTYPES, OPS, is_as_accurate_as_torch

EXAMPLES = 300 if DEVICE == "cuda" else 25
# Few programs a launch: at most 4 samples of at most 4 tiles.
SIZES = st.tuples(
    st.integers(1, 4),
    st.integers(1, 17),
    st.one_of(st.integers(1, 130), st.sampled_from((251, 257, 384, 509, 1000, 1024, 1151, 1152))),
)
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@OPS
def test_any_size(spec: OpSpec) -> None:
    @SETTINGS
    @example((1, 1, 1), "fp32")
    @example((3, 7, 127), "bf16")
    @example((2, 5, 129), "autocast")
    @given(SIZES, st.sampled_from(sorted(DTYPES)))
    def prove(shape: Shape, dtypes: str) -> None:
        is_as_accurate_as_torch(spec, shape, dtypes)

    prove()


@pytest.mark.parametrize("fault", ["odd", "half", "batch"])
def test_a_planted_fault_is_found(fault: str) -> None:
    """Forgotten columns, lost precision and a wrong sample turn up within the same number of examples."""
    spec = planted(fault)

    # The first example found is enough: a smaller one would be looked for with hundreds of launches.
    @settings(SETTINGS, phases=[Phase.generate])
    @given(SIZES, st.sampled_from(sorted(DTYPES)))
    def prove(shape: Shape, dtypes: str) -> None:
        is_as_accurate_as_torch(spec, shape, dtypes)

    with pytest.raises(AssertionError):
        prove()
