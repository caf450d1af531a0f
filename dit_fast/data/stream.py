"""The endless shuffled stream of training batches, addressed by step.

Where samples have one shape, global sample number g = step * batch_size + position belongs to epoch g // N and takes
place g % N of that epoch's permutation; with several shapes, each batch holds one shape (`BucketOrder`). In each epoch
every sample comes exactly once, and batches may span the end of an epoch. The batch of any step, or any rows of it, can
be read without those before it: a run resumes from its seed and step alone.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor

from dit_fast.data.buckets import BucketOrder
from dit_fast.data.images import Split
from dit_fast.errors import DataError
from dit_fast.utils import keyed
from dit_fast.utils.values import SEED, Whole

# Batches that are read while the model trains on the current one.
READ_AHEAD = 2


def epoch_key(seed: int, stream: str, index: int) -> int:
    """A 63-bit seed from (seed, stream, index); equal arguments give equal draws on every machine."""
    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, stream: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator seeded with `epoch_key`. CPU and CUDA generators draw different numbers from one seed."""
    return torch.Generator(device=device).manual_seed(epoch_key(seed, stream, index))


class BatchStream:
    """Training batches of an image split.

    Args:
        split: samples to draw from.
        batch_size: samples per step, B.
        seed: seed of the order and of the mirroring.
        flip: whether half of the samples, drawn per sample, are mirrored left to right.

    Raises:
        ConfigError: `batch_size` or `seed` is out of range.
        DataError: the split is smaller than a batch.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, flip: bool):
        batch_size, seed = Whole(1).check("batch_size", batch_size), SEED.check("seed", seed)
        if len(split) < batch_size:
            raise DataError(
                f"the training set has {len(split)} images, fewer than a batch of {batch_size}; "
                f"give --batch-size {len(split)} or less"
            )
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        # One bucket yields plain shuffling, so that both cases share one code path.
        buckets = torch.zeros_like(split.labels) if split.buckets is None else split.buckets
        self._order = BucketOrder(buckets, batch_size, self._shuffled)

    def indices(self, step: int) -> Tensor:
        """Positions in the split of the samples of `step`, int64 (B,); steps count from 0."""
        return self._order.indices(step)

    def numbers(self, step: int, rows: slice = slice(None)) -> Tensor:
        """Global sample numbers int64 (b,) of `rows` of a step: the key of every random draw for a sample."""
        return torch.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows]

    def mirrored(self, step: int, rows: slice = slice(None)) -> Tensor | None:
        """Whether each sample of `rows` of a step is mirrored, bool (b,); None without mirroring."""
        if not self.flip:
            return None
        return keyed.uniform(keyed.key(self.seed, "flip"), self.numbers(step, rows)) < 0.5

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Samples and their conditioning for one step.

        Args:
            step: the step, counted from 0.
            rows: rows of the batch, b of B, such as those of one rank.

        Returns:
            float32 (b, C, H, W), and labels int64 (b,) or captions (b, S, E).

        Raises:
            DataError: more samples are unreadable than are allowed.
        """
        flip = self.mirrored(step, rows)
        return self.split.take(self.indices(step)[rows], lambda indices: self.split.batch(indices, flip))

    def stored(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """What the training step converts to a batch on its own device: here, the batch itself."""
        return self.batch(step, rows)

    def read(self, first: int, last: int, rows: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `stored` of steps `first` to `last` - 1; a thread reads files ahead."""
        if not self.split.lazy:
            yield from (self.stored(step, rows) for step in range(first, last))
            return
        reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        try:
            steps = iter(range(first, last))
            waiting = deque(reader.submit(self.stored, step, rows) for step in islice(steps, READ_AHEAD))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(reader.submit(self.stored, step, rows) for step in islice(steps, 1))
        finally:
            # Also when the consumer stops early: no thread outlives the loop.
            reader.shutdown(wait=True, cancel_futures=True)

    def _shuffled(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.split), generator=generator(self.seed, "order", epoch))
