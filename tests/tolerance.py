"""How far two computations of the same values may lie apart: it follows from their dtype, their size and their sums.

The width of the vector units, the number of threads and the library that multiplies matrices decide in which order a
sum is added, and no test may depend on that. Where PyTorch computes the same in the same dtype, its own error on this
machine is the measure (`assert_as_accurate`); elsewhere it is `rounding`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUM = 256
"""The longest sum in the models of the tests: an MLP's 4 * 64 hidden features."""

FEW = 16
"""For no sum: what some operations one after another round, such as a step of a sampler and its table."""


def rounding(terms: int = SUM, dtype: torch.dtype = torch.float32) -> float:
    """What the order of a sum may change, relative to its largest values: 4 sqrt(terms) units of the last place.

    Each addition rounds by half a unit at most and 0.3 of one in the mean square, up or down: a random walk. Two
    orders then differ by 0.4 sqrt(terms) units in the mean square, and ten times that is out of reach for chance.
    Of two terms that are no sums, only rounded in two ways, at most 6 units are left.

    Args:
        terms: The length of the sum behind one value; for a chain of sums, the lengths added up.
        dtype: Of the additions.
    """
    return 4 * terms**0.5 * torch.finfo(dtype).eps


def tensor_of(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))


def dtype_of(value: Any) -> torch.dtype:
    """The dtype of a tensor's or an array's numbers; float32 of Python's, which tests read from float32 tensors."""
    dtype = torch.float32 if isinstance(value, int | float) else tensor_of(value).dtype
    return dtype if dtype.is_floating_point else torch.float32


def largest(value: Any) -> float:
    """The largest absolute value, 0 of none."""
    tensor = tensor_of(value)
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


def relative(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value; infinite where either is not finite."""
    found, expected = tensor_of(found), tensor_of(expected)
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference = largest(found.double() - expected.double())
    return difference / (largest(expected) or 1.0) if math.isfinite(difference) else math.inf


def assert_close(
    found: Any,
    expected: Any,
    terms: int = SUM,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    what: object = "",
) -> None:
    """Both are the same values, but for `rounding`.

    Args:
        found: A tensor, an array, a number, or a mapping or sequence of such.
        expected: Alike; a number is the value of every element.
        terms: The length of the sum behind one value; for a chain of sums, the lengths added up.
        scale: The size of what was added, where terms cancel out; None is the largest expected value.
        dtype: Of the additions; None is the coarser one of the two values', float32 of Python's numbers.
        what: Named when it fails.
    """
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, terms, scale=scale, dtype=dtype, what=key)
        return
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, terms, scale=scale, dtype=dtype, what=f"{what}[{place}]")
        return
    if dtype is None:
        dtype = max(dtype_of(found), dtype_of(expected), key=lambda each: torch.finfo(each).eps)
    number = isinstance(expected, int | float)
    found, expected = tensor_of(found), tensor_of(expected)
    expected = expected.expand(found.shape) if number else expected
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference = largest(found.double() - expected.double())
    size = largest(expected) if scale is None else float(scale)
    allowed = rounding(terms, dtype) * size
    assert difference <= allowed, (
        f"{what or 'values'} differ by {difference:.3e}, {allowed:.3e} is rounding: {terms} terms in {dtype}, "
        f"the largest {size:.3e}"
    )


def assert_same_distance(found: float, expected: float) -> None:
    """Scores of the same images: a Frechet distance is what is left of sums that are up to a hundred times its size."""
    assert_close(found, expected, scale=100 * abs(expected))


def assert_trained_alike(
    found: Mapping[str, Any], expected: Mapping[str, Any], moved: float, terms: int = SUM
) -> None:
    """Weights after the same steps of Adam or AdamW: alike but for `rounding`.

    Adam divides a gradient by its own size: what rounding changes in the gradient, relative to that size, it changes
    in the step. Where the gradient is rounding and nothing else, as of the keys' biases, a weight may go either way.

    Args:
        found: Weights by name.
        expected: Alike.
        moved: The sum of the steps' rates, which is as far as a weight can have moved.
        terms: The length of the sum behind one element of a gradient.
    """
    assert found.keys() == expected.keys()
    apart: list[str] = []
    count = total = 0
    for name, value in expected.items():
        one, other = tensor_of(found[name]), tensor_of(value)
        assert one.shape == other.shape, name
        difference = (one.double() - other.double()).abs()
        assert difference.max() <= 2 * moved, f"{name} differs by {difference.max():.3e}"
        # A gradient that is a hundredth of its tensor's largest has a hundred times the relative rounding.
        allowed = rounding(terms, dtype_of(other)) * (largest(other) + 100 * moved)
        beyond = int((difference > allowed).sum())
        count, total = count + beyond, total + difference.numel()
        if beyond:
            apart.append(f"{beyond} of {difference.numel()} of {name}")
    assert count <= total / 50, f"more than rounding apart: {', '.join(apart)}"


def assert_as_accurate(ours: Tensor, torchs: Tensor, exact: Tensor, factor: float, floor: float) -> None:
    """|ours - exact| <= factor * |torch's - exact| + floor, the maxima over all elements."""
    assert ours.dtype == torchs.dtype
    assert ours.shape == torchs.shape
    if not exact.numel():
        return
    error, allowed = (ours.double() - exact).abs().max(), (torchs.double() - exact).abs().max()
    scale = max(1.0, exact.abs().max().item())
    assert ours.isfinite().all()
    assert error <= factor * allowed + floor * scale, f"error {error:.3e}, PyTorch's {allowed:.3e}"
