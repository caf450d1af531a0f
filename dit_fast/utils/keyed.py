"""Random draws that depend on a key and on a sample's number, and on nothing else.

A draw is a function of (seed, stream, sample): not of the step's batch, of the ranks that share it, of workers or of
what was drawn before. Streams (noise, timestep, label drop, ...) are keyed apart, so that a new one shifts no other.
The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in integer
arithmetic of PyTorch: the same bits on every device. Normal values differ in their last places between devices, whose
logarithms and cosines do.
"""

import hashlib
import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def key(seed: int, stream: str) -> int:
    """A 64-bit key from (seed, stream): the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little")


def philox(key: int, counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]) -> list[Tensor]:
    """Philox4x32-10: four 32-bit words, each in an int64 tensor, for a counter of four and a 64-bit key.

    Entries of `counter` broadcast; at least one is an int64 tensor.
    """
    device = next(word.device for word in counter if isinstance(word, Tensor))
    # A number becomes a tensor by a fill: copied from the host, it would make the host wait for the device.
    entries = (w if isinstance(w, Tensor) else torch.full((), w, device=device) for w in counter)
    c0, c1, c2, c3 = torch.broadcast_tensors(*entries)
    k0, k1 = key & MASK, key >> 32
    for _ in range(ROUNDS):
        # The product wraps at 2^64; as two's complement its upper 32 bits are those of the unsigned one.
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
    """Standard normal values, float32 (B, *shape), by Box and Muller (1958); at most 6.7 in magnitude.

    index: int64 (B,), the samples' numbers, from 0; the result lies on its device.
    """
    first, second, third, fourth = words(key, index, shape).unbind(1)
    radius = (torch.stack([first, third], 1) + 1).float().mul(2**-32).log().mul(-2).sqrt()
    angle = torch.stack([second, fourth], 1).float().mul(2**-32 * 2 * math.pi)
    return take(torch.cat([radius * angle.cos(), radius * angle.sin()], 1), index, shape)


def uniform(key: int, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform values from 0 up to, not including, 1 in steps of 2^-24, float32 (B, *shape). `index` as for `normal`."""
    return take((words(key, index, shape) >> 8).float() * 2**-24, index, shape)


def integers(key: int, index: Tensor, high: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Integers from 0 up to, not including, `high` (at most 2^31), int64 (B, *shape). `index` as for `normal`."""
    return take((words(key, index, shape) * high) >> 32, index, shape)
