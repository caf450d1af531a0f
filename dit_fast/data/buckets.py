"""Aspect-ratio buckets: each image is resized to the nearest of several shapes, and each batch holds one shape.

A bucket is (height, width) in pixels. The batches depend only on the seed and the step, so that a run with buckets
resumes, and is divided among ranks, like any other.
"""

import bisect
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_fast.data.images import PixelSource
from dit_fast.data.unreadable import UnreadableError
from dit_fast.errors import ConfigError
from dit_fast.utils.values import SIDE, Whole

Size = tuple[int, int]
_STEP = Whole(0)


def parse_buckets(text: str) -> tuple[Size, ...]:
    """Parse bucket sizes such as "256x256,192x320", height before width.

    Raises:
        ConfigError: another format, a side out of range, or one size twice.
    """
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", word)]
    if wrong:
        raise ConfigError(
            f"--buckets {text}: {wrong[0]!r} is not HEIGHTxWIDTH; give for example 256x256,192x320"
        )
    sizes = tuple(
        (SIDE.check("--buckets: side", int(height[:9])), SIDE.check("--buckets: side", int(width[:9])))
        for height, width in (word.split("x") for word in words)
    )
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"--buckets {text}: a size is given twice")
    return sizes


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """Index of the bucket whose aspect ratio is nearest to that of `size`; ties are resolved by the nearest area."""

    def distance(bucket: Size) -> tuple[float, float]:
        down, across = (math.log(side / other) for side, other in zip(size, bucket, strict=True))
        # Rounded, so that equal aspect ratios of different sizes compare equal.
        return round(abs(down - across), 9), abs(down + across)

    return min(range(len(buckets)), key=lambda number: distance(buckets[number]))


def apportion(total: int, images: Sequence[int]) -> list[int]:
    """Divide `total` samples among buckets in proportion to their `images`, as integers that sum to `total`."""
    ends = [round(total * end / sum(images)) for end in itertools.accumulate(images)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


@dataclass(frozen=True)
class BucketSource:
    """Pixels of several shapes: member i is image `places[i]` of `sources[buckets[i]]`.

    A call to `read` must request members of one bucket.
    """

    sources: tuple[PixelSource, ...]
    buckets: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def lazy(self) -> bool:
        return any(source.lazy for source in self.sources)

    def read(self, indices: Sequence[int]) -> Tensor:
        (bucket,) = {self.buckets[index] for index in indices}
        try:
            return self.sources[bucket].read([self.places[index] for index in indices])
        except UnreadableError as error:
            index_of = {self.places[index]: index for index in indices}
            reasons = {index_of[place]: reason for place, reason in error.reasons.items()}
            raise UnreadableError(str(error), reasons) from error


class BucketOrder:
    """Assignment of samples to steps: B samples of one bucket per step.

    In each epoch every sample is appended once, in that epoch's order, to the queue of its bucket; a queue that holds B
    samples becomes the next batch. A queue that is not full at the end of an epoch continues in the next one. With one
    bucket, these are the batches of plain shuffling. The batch of any step is computed without those before it.

    Args:
        bucket_of: bucket of each sample, int64 (N,).
        batch_size: samples per step, B.
        order: returns the permutation of 0 ... N - 1, int64 (N,), of an epoch.
    """

    def __init__(self, bucket_of: Tensor, batch_size: int, order: Callable[[int], Tensor]):
        self.bucket_of = bucket_of
        self.batch_size = batch_size
        self.order = order
        self.sizes: list[int] = bucket_of.bincount().tolist()
        self._open_caches()

    def _open_caches(self) -> None:
        # A batch needs only the epochs around its step, unless its bucket is smaller than the batch.
        self._queues = functools.lru_cache(3)(self._make_queues)
        self._batches = functools.lru_cache(2)(self._make_batches)

    def __getstate__(self) -> dict[str, Any]:
        # Caches of functions cannot be pickled; a copy or a spawned worker opens its own.
        return {name: value for name, value in vars(self).items() if name not in ("_queues", "_batches")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_caches()

    def indices(self, step: int) -> Tensor:
        """Samples of `step`, int64 (B,); steps count from 0."""
        step = _STEP.check("step", step)
        # `_before` grows by N / B per epoch, less at most one unfinished batch per bucket.
        most = (step + len(self.sizes) + 1) * self.batch_size // len(self.bucket_of) + 2
        epoch = bisect.bisect_right(range(most), step, key=lambda epoch: sum(self._before(epoch))) - 1
        bucket, number = self._batches(epoch)[step - sum(self._before(epoch))]
        first, end = number * self.batch_size, (number + 1) * self.batch_size
        parts = []
        while first < end:
            epoch, start = divmod(first, self.sizes[bucket])
            parts.append(self._queues(epoch)[bucket][start : start + end - first])
            first += len(parts[-1])
        return torch.cat(parts)

    def _before(self, epoch: int) -> list[int]:
        """Number of batches of each bucket that are complete before `epoch`."""
        return [epoch * size // self.batch_size for size in self.sizes]

    def _make_queues(self, epoch: int) -> list[Tensor]:
        """Samples of each bucket, in their order in `epoch`."""
        order = self.order(epoch)
        buckets = self.bucket_of[order]
        return [order[buckets == bucket] for bucket in range(len(self.sizes))]

    def _make_batches(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, number of its batch) of the batches that are completed in `epoch`, in order of completion."""
        buckets = self.bucket_of[self.order(epoch)]
        completed = []
        for bucket, (first, end) in enumerate(zip(self._before(epoch), self._before(epoch + 1), strict=True)):
            when = (buckets == bucket).nonzero().flatten()
            for number in range(first, end):
                # Position, among the bucket's samples of this epoch, of the sample that completes the batch.
                last = (number + 1) * self.batch_size - 1 - epoch * self.sizes[bucket]
                completed.append((int(when[last]), bucket, number))
        return [(bucket, number) for _, bucket, number in sorted(completed)]
