"""Batches on their way to the device while the step before them runs."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


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
