"""The tolerances of the tests: any order of a sum passes, an error of a few units of the last place is caught."""

import math

import pytest
import torch
from torch import Tensor

from tests.tolerance import SUM, assert_as_accurate, assert_close, assert_trained_alike, relative, rounding

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def in_lanes(terms: Tensor, lanes: int) -> Tensor:
    """The sum over the last dimension as a CPU with vectors of `lanes` values adds it: rounded after each addition."""
    rows = terms.unflatten(-1, (-1, lanes))
    partial = rows[..., 0, :].clone()
    for index in range(1, rows.shape[-2]):
        partial += rows[..., index, :]
    total = partial[..., 0].clone()
    for lane in range(1, lanes):
        total += partial[..., lane]
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [16, 256, 4096])
def test_a_sum_may_be_added_in_any_order(dtype: torch.dtype, terms: int) -> None:
    products = torch.randn(500, terms, dtype=dtype) * torch.randn(500, terms, dtype=dtype)
    plain = in_lanes(products, 1)
    for lanes in (4, 8, 16):
        other = in_lanes(products, lanes)
        assert_close(other, plain, terms)
        # Nor is the bound far from what long sums need.
        assert terms < SUM or relative(other, plain) > rounding(terms, dtype) / 50


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_error_of_a_few_units_is_caught(dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 4, 50, dtype=dtype)
    eps = torch.finfo(dtype).eps
    for terms in (1, 4, SUM):
        for place in (0, 7, 49):
            wrong = values.double().clone()
            wrong[place] += 2 * rounding(terms, dtype) * 4
            with pytest.raises(AssertionError, match=f"is rounding: {terms} terms in {dtype}, the largest 4"):
                assert_close(wrong, values, terms)
    assert rounding(1, dtype) == 4 * eps
    assert_close(values + 2 * eps * values, values, 1)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.inf])),
        (torch.zeros(2, 1), torch.zeros(2)),
        (torch.full((3,), 1e-30), torch.zeros(3)),
        ({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2) + 1e-4}),
        ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}),
        ([1.0, 2.0], [1.0, 2.001]),
        ([1.0], [1.0, 2.0]),
    ],
)
def test_what_is_not_close(found: object, expected: object) -> None:
    with pytest.raises(AssertionError):
        assert_close(found, expected)


def test_sizes_are_those_of_the_values() -> None:
    small = torch.tensor([1e-8, 2e-8])
    with pytest.raises(AssertionError):
        assert_close(small, small + 1e-12)
    assert_close(small, small + 1e-12, scale=1.0)
    assert_close(1e8 + 8, 1e8)
    with pytest.raises(AssertionError):
        assert_close(1.0 + 1e-9, 1.0, dtype=torch.float64)
    assert relative(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.125
    assert relative(torch.tensor([math.nan]), torch.tensor([3.0])) == math.inf


def test_pytorch_s_own_error_is_the_measure() -> None:
    exact = torch.linspace(1, 2, 9, dtype=torch.float64)
    torchs = (exact + 1e-6).float()
    assert_as_accurate((exact - 1.8e-6).float(), torchs, exact, 2, 0)
    with pytest.raises(AssertionError, match="PyTorch's 9"):
        assert_as_accurate((exact - 2.4e-6).float(), torchs, exact, 2, 0)
    with pytest.raises(AssertionError):
        assert_as_accurate(exact, torchs, exact, 2, 0)


def test_weights_that_adam_trained() -> None:
    """Only where a gradient is rounding itself may a weight have gone the other way."""
    torch.manual_seed(0)
    start, gradient = torch.randn(1000), torch.randn(1000)
    gradient[:10] = 0
    rate = 1e-3

    def trained(error: float) -> dict[str, Tensor]:
        weight = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([weight], lr=rate)
        for _ in range(3):
            weight.grad = gradient + error * torch.randn(1000)
            optimizer.step()
        return {"weight": weight}

    assert_trained_alike(trained(1e-7), trained(1e-7), 3 * rate)
    with pytest.raises(AssertionError, match=r"more than rounding apart: \d+ of 1000 of weight"):
        assert_trained_alike(trained(0.1), trained(0), 3 * rate)
    with pytest.raises(AssertionError, match="weight differs by 8"):
        assert_trained_alike({"weight": start + 8 * rate}, {"weight": start}, 3 * rate)
