"""Where a trajectory's random numbers come from: a key for each sample, or the reference's order of draws."""

import numpy as np
import torch
from torch import Tensor

from dit_fast import keyed

# A draw covers this many steps: one launch of the generator costs as much as several steps' numbers.
BLOCK = 25


class KeyedNoise:
    """Noise of sample i that depends on (seed, i) alone: not on the batch, the ranks, or the samples before.

    `numbers`: int64 (n,), on the device of the draws. `shape`: (C, H, W).
    """

    def __init__(self, seed: int, numbers: Tensor, shape: tuple[int, ...]) -> None:
        self.seed, self.numbers, self.shape = seed, numbers, shape
        self._block, self._values = -1, torch.empty(0)

    def start(self) -> Tensor:
        """Pure noise to begin with, float32 (n, C, H, W)."""
        return keyed.normal(keyed.key(self.seed, "sampling start"), self.numbers, self.shape)

    def step(self, i: int) -> Tensor:
        """The noise of step i, float32 (n, C, H, W)."""
        if i // BLOCK != self._block:
            self._block = i // BLOCK
            key = keyed.key(self.seed, f"sampling steps {self._block}")
            self._values = keyed.normal(key, self.numbers, (BLOCK, *self.shape))
        return self._values[:, i % BLOCK]


class ReferenceNoise:
    """The reference's draws after `torch.manual_seed(seed)`: n to begin with, then 2n at each step under guidance.

    Steps must be asked for in order. The second half of 2n belongs to the null branch, whose state is thrown away.
    """

    def __init__(self, seed: int, numbers: Tensor, shape: tuple[int, ...], doubled: bool) -> None:
        self.shape, self.doubled, self.n = shape, doubled, len(numbers)
        self.device = numbers.device
        self.generator = torch.Generator(self.device).manual_seed(batch_seed(seed, int(numbers[0])))

    def start(self) -> Tensor:
        """As `KeyedNoise.start`."""
        return torch.randn(self.n, *self.shape, generator=self.generator, device=self.device)

    def step(self, i: int) -> Tensor:
        """As `KeyedNoise.step`, for the next i."""
        n = 2 * self.n if self.doubled else self.n
        return torch.randn(n, *self.shape, generator=self.generator, device=self.device)[: self.n]


def batch_seed(seed: int, first: int) -> int:
    """Seed of the batch whose first sample has number `first`; the first batch has `seed` itself."""
    if first == 0:
        return seed
    return int(np.random.SeedSequence((seed, first)).generate_state(1, np.uint64)[0] >> np.uint64(1))
