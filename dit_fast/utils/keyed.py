"""Keyed random numbers: functions of (seed, stream, sample number) alone.

They do not depend on the batch, the number of ranks, the workers or earlier draws. Streams (noise, timestep, label
dropout, ...) have separate keys, so that a new stream changes no other. The generator is Philox4x32-10 (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3") in PyTorch's integer arithmetic: the same bits on every device.
Normal values may differ between devices in the last bits, as their logarithms and cosines do.
"""

import hashlib
import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# Constants of Philox4x32: multipliers and key increments.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def key(seed: int, stream: str) -> int:
    """64-bit key of (seed, stream), the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little")


def philox(key: int, counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]) -> list[Tensor]:
    """Philox4x32-10.

    Args:
        key: 64-bit key.
        counter: Four 32-bit words, int64 tensors or numbers that broadcast; at least one is a tensor.

    Returns:
        Four 32-bit words, each an int64 tensor of the broadcast shape.
    """
    device = next(word.device for word in counter if isinstance(word, Tensor))
    # A number becomes a tensor by a fill: a copy from the host would synchronize with the device.
    entries = (w if isinstance(w, Tensor) else torch.full((), w, device=device) for w in counter)
    c0, c1, c2, c3 = torch.broadcast_tensors(*entries)
    k0, k1 = key & MASK, key >> 32
    for _ in range(ROUNDS):
        # The product wraps at 2^64; in two's complement its upper 32 bits equal those of the unsigned product.
        left, right = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            ((right >> 32) & MASK) ^ c1 ^ k0,
            right & MASK,
            ((left >> 32) & MASK) ^ c3 ^ k1,
            left & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def words(key: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """32-bit words (B, 4, ceil(prod(shape) / 4)) for the samples `index` (B,), int64, on the device of `index`."""
    blocks = torch.arange(-(-math.prod(shape) // 4), device=index.device)
    index = index[:, None]
    return torch.stack(philox(key, (blocks[None], 0, index & MASK, index >> 32)), 1)


def take(values: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, 4, blocks) as (B, *shape)."""
    return values.flatten(1)[:, : math.prod(shape)].reshape(len(index), *shape)


def normal(key: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal values by the method of Box and Muller (1958), at most 6.7 in magnitude.

    Args:
        key: 64-bit key.
        index: Sample numbers from 0, int64 (B,).
        shape: Shape of the values of a sample.

    Returns:
        float32 (B, *shape) on the device of `index`.
    """
    first, second, third, fourth = words(key, index, shape).unbind(1)
    radius = (torch.stack([first, third], 1) + 1).float().mul(2**-32).log().mul(-2).sqrt()
    angle = torch.stack([second, fourth], 1).float().mul(2**-32 * 2 * math.pi)
    return take(torch.cat([radius * angle.cos(), radius * angle.sin()], 1), index, shape)


def uniform(key: int, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform values in [0, 1), multiples of 2^-24, float32 (B, *shape). Arguments as in `normal`."""
    return take((words(key, index, shape) >> 8).float() * 2**-24, index, shape)


def integers(key: int, index: Tensor, high: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Integers in [0, high), with high at most 2^31, int64 (B, *shape). Other arguments as in `normal`."""
    return take((words(key, index, shape) * high) >> 32, index, shape)
