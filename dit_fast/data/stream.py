"""The endless shuffled stream of training batches, addressed by step.

Where samples are of one shape, global sample number g = step * batch_size + position belongs to epoch g // N and takes
that epoch's shuffled place g % N; of several shapes, each batch is of one (`BucketOrder`). Over each epoch no sample is
missing and none comes twice, batches run on over the epoch's end, and the batch of a step, or any rows of it, can be
had without those before it. What a run needs to continue is its seed and step.
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


def epoch_key(seed: int, stream: str, index: int) -> int:
    """A 63-bit seed from (seed, stream, index); equal keys give equal draws, on every machine."""
    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, stream: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one draw. CPU and CUDA generators give different numbers for one epoch_key."""
    return torch.Generator(device=device).manual_seed(epoch_key(seed, stream, index))


READ_AHEAD = 2


class BatchStream:
    """Batches of `split`: (images float32 (B, C, H, W), labels int64 (B,) or captions), mirrored at random if `flip`.

    Raises DataError for a split that is smaller than a batch.
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
        buckets = torch.zeros_like(split.labels) if split.buckets is None else split.buckets
        self._order = BucketOrder(buckets, batch_size, self._shuffled)

    def indices(self, step: int) -> Tensor:
        """Positions in the split of the samples of `step`, int64 (B,); steps count from 0."""
        return self._order.indices(step)

    def numbers(self, step: int, rows: slice = slice(None)) -> Tensor:
        """Global sample numbers int64 (b,) of `rows` of a step: what every draw for a sample is keyed by."""
        return torch.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows]

    def mirrored(self, step: int, rows: slice = slice(None)) -> Tensor | None:
        """Which samples of `rows` of a step are mirrored, bool (b,); None where none is."""
        if not self.flip:
            return None
        return keyed.uniform(keyed.key(self.seed, "flip"), self.numbers(step, rows)) < 0.5

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Images, and labels or captions, of `rows` of a step."""
        flip = self.mirrored(step, rows)
        return self.split.take(self.indices(step)[rows], lambda indices: self.split.batch(indices, flip))

    def stored(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """What `dit_fast.training.step.TrainStep` makes the batch of, on its device, and the labels."""
        return self.batch(step, rows)

    def read(self, first: int, last: int, rows: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        """`stored` of steps `first` to `last` - 1; files are read ahead in a thread of their own."""
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
            reader.shutdown(wait=True, cancel_futures=True)

    def _shuffled(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.split), generator=generator(self.seed, "order", epoch))
