"""Draws keyed by sample: published vectors, distribution, and independence of batch and order."""

import math

import pytest
import torch

from dit_fast.utils.keyed import integers, key, normal, philox, uniform


@pytest.mark.parametrize(
    ("counter", "secret", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors(counter: list[int], secret: list[int], expected: str) -> None:
    """The known answers of Random123, the authors' library."""
    words = philox(secret[0] | secret[1] << 32, tuple(torch.tensor([word]) for word in counter))
    assert " ".join(f"{word.item():08x}" for word in words) == expected


@pytest.mark.parametrize("draw", [normal, uniform, lambda *args: integers(args[0], args[1], 1000, args[2])])
def test_a_sample_is_the_same_in_any_batch(draw) -> None:
    index = torch.arange(17)
    whole = draw(key(3, "noise"), index, (3, 5))
    shuffled = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(key(3, "noise"), shuffled, (3, 5)), whole[shuffled])
    for sample in (0, 16):
        assert torch.equal(draw(key(3, "noise"), index[sample : sample + 1], (3, 5))[0], whole[sample])
    others = [
        draw(key(3, "drop"), index, (3, 5)),
        draw(key(4, "noise"), index, (3, 5)),
        draw(key(3, "noise"), index + 2**32, (3, 5)),
    ]
    assert all((other != whole).float().mean() > 0.9 for other in others)


def test_values_of_a_sample_differ() -> None:
    values = uniform(key(0, "x"), torch.arange(64), (1021,))
    assert values.unique().numel() > 0.99 * values.numel()


def test_normal_distribution() -> None:
    values = normal(key(0, "noise"), torch.arange(512), (4, 32, 32)).double()
    count = values.numel()
    assert values.isfinite().all()
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / count)
    for edge in (-2.0, -0.5, 0.0, 1.0, 3.0):
        share = 0.5 * (1 + math.erf(edge / math.sqrt(2)))
        assert abs((values < edge).double().mean() - share) < 4 * math.sqrt(share * (1 - share) / count)
    # Neighbours within a sample, and the same place in neighbouring samples, are uncorrelated.
    flat = values.flatten(1)
    for other, own in ((flat[:, 1:], flat[:, :-1]), (flat[1:], flat[:-1]), (flat[:, 1024:], flat[:, :-1024])):
        assert abs((other * own).mean()) < 4 / math.sqrt(own.numel())


def test_uniform_and_integers() -> None:
    index = torch.arange(200_000)
    values, numbers = uniform(key(0, "drop"), index), integers(key(0, "timestep"), index, 1000)
    assert (values.dtype, values.shape) == (torch.float32, (200_000,))
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.double().mean() - 0.5) < 4 / math.sqrt(12 * len(index))
    assert (numbers.dtype, numbers.min().item(), numbers.max().item()) == (torch.int64, 0, 999)
    counts = numbers.bincount(minlength=1000).double()
    # chi-square with 999 degrees of freedom: mean 999, deviation sqrt(1998)
    assert abs((counts - 200).square().sum() / 200 - 999) < 4 * math.sqrt(1998)


def test_empty() -> None:
    assert normal(key(0, "noise"), torch.arange(0), (4, 2)).shape == (0, 4, 2)
