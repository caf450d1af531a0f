"""Batches on their way to the device while the step before them runs."""

from collections import deque
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Readable:
    """The batches of `source` up to the first that cannot be read, which is known one batch ahead.

    `error` is what reading it raised, None as long as nothing was. A run then ends with the step before, saves, and
    raises it: an image that cannot be read costs no steps.
    """

    def __init__(self, source: Iterator[Batch]):
        self.error: Exception | None = None
        self._source = source
        self._ready: deque[Batch] = deque()

    def __iter__(self) -> Iterator[Batch]:
        while self.count(1):
            batch = self._ready.popleft()
            self.count(1)
            yield batch

    def count(self, most: int) -> int:
        """How many batches are ready, once up to `most` have been read."""
        while len(self._ready) < most and self.error is None:
            try:
                self._ready.append(next(self._source))
            except StopIteration:
                break
            except Exception as error:  # raised again, once the run is saved
                self.error = error
        return len(self._ready)

    @property
    def at_end(self) -> bool:
        """Whether the batch after the one that was given last cannot be read."""
        return self.error is not None and not self._ready


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`, each copied there one step early.

    On CUDA from page-locked memory and on a stream of its own, so that the copy runs beside the step and the host
    does not wait; on a CPU they pass as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    waiting: Batch | None = None
    for batch in chain(batches, [None]):
        arrived = waiting
        if batch is not None:
            with torch.cuda.stream(side):
                images, labels = (tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)
            waiting = images, labels
        if arrived is None:
            continue
        present = torch.cuda.current_stream(device)
        present.wait_stream(side)
        for tensor in arrived:
            # Its memory was given out by the other stream, which must not reuse it before the step is done.
            tensor.record_stream(present)
        yield arrived
