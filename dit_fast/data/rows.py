"""Arrays in files, read row by row from an open file descriptor.

The files are not mapped into memory: accessing a mapped page of a file that was truncated kills the process (SIGBUS).
A failed read raises an error that names the file, and the run saves a checkpoint first.
"""

import functools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dit_fast.data.unreadable import raise_unreadable
from dit_fast.errors import DataError
from dit_fast.utils.files import npy_header, open_file, parse_json, utf8_name

# Upper bound on open files of all sets; the default limit of a process is 1,024 descriptors.
_MOST_OPEN = 256


class _Descriptor:
    """A file descriptor that is closed with its last reference: a thread may still read from an evicted one."""

    def __init__(self, path: Path):
        with open_file(path, DataError) as file:
            self.number = os.dup(file.fileno())

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(_MOST_OPEN)
def _opened(file: "FileBytes") -> _Descriptor:
    descriptor = _Descriptor(file.path)
    found = os.fstat(descriptor.number)
    # A set reopens files that were evicted: a changed file must not be mixed with what was read before.
    if (found.st_size, found.st_mtime_ns) != (file.size, file.changed):
        raise DataError(
            f"{file.path} has {found.st_size} bytes, {file.size} when it was opened: it changed during use"
        )
    return descriptor


class FileBytes:
    """The bytes of a file as it is at construction. Holds no descriptor, so that it can be pickled and copied.

    Args:
        path: the file.

    Raises:
        DataError: the file cannot be opened. From a read: it was truncated or changed since, or cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_file(path, DataError) as file:
            found = os.fstat(file.fileno())
            self.size, self.changed = found.st_size, found.st_mtime_ns
        _opened(self)

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the file's bytes from `start` on."""
        descriptor = _opened(self)
        try:
            done = 0
            while done < target.nbytes:  # a signal or a network file system may cause a short read
                more = os.preadv(descriptor.number, [target[done:]], start + done)
                if not more:
                    raise DataError(
                        f"{self.path} has {os.fstat(descriptor.number).st_size} bytes, {self.size} when it was "
                        "opened: it was truncated during use"
                    )
                done += more
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror or error})") from None

    def bytes_at(self, start: int, count: int) -> bytes:
        """Read `count` bytes from `start` on."""
        content = bytearray(count)
        self.read_into(start, memoryview(content))
        return bytes(content)

    def read(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Read a tensor whose bytes start at `start`."""
        tensor = torch.empty(tuple(shape), dtype=dtype)
        if tensor.numel():
            self.read_into(start, bytes_of(tensor))
        return tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, of any dtype: NumPy has no bfloat16."""
    return tensor.flatten().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Rows:
    """An array in a file: its first byte `start`, its `shape`, whose first dimension counts rows, and its `dtype`."""

    file: FileBytes
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @functools.cached_property
    def width(self) -> int:
        """Bytes per row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


def read_samples(
    places: Iterable[tuple[FileBytes, int]], members: Sequence[int], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Read one array per sample into a batch, each with one system call straight into the batch's memory.

    Args:
        places: file and first byte of each sample.
        members: the samples' positions in their source, which errors refer to.
        shape: shape of one sample.
        dtype: element type, the same in all files.

    Returns:
        tensor (B, *shape).

    Raises:
        UnreadableError: some samples cannot be read; its `reasons` name each of them.
    """
    batch = torch.empty(len(members), *shape, dtype=dtype)
    if not batch.numel():
        return batch
    width = batch[0].nbytes
    memory = bytes_of(batch)
    reasons: dict[int, str] = {}
    stop = 0
    for (file, start), member in zip(places, members, strict=True):
        first, stop = stop, stop + width
        target = memory[first:stop]
        # This loop runs once per sample and bounds the loading speed: attempt the plain read here, and leave
        # short reads and errors to `read_into`, which retries and explains.
        try:
            if os.preadv(_opened(file).number, (target,), start) == width:
                continue
        except (OSError, DataError):
            pass
        try:
            file.read_into(start, target)
        except DataError as error:
            reasons[member] = str(error)
    raise_unreadable(reasons)
    return batch


def open_npy(path: Path, shape: Sequence[int], dtype: str, expected: int) -> Rows:
    """Open a C-ordered .npy file without reading its values.

    Args:
        path: the file.
        shape: expected shape.
        dtype: expected dtype.
        expected: expected size of the file in bytes.

    Raises:
        DataError: the file is missing, or its size, shape or dtype differs.
    """
    if not os.path.lexists(path):
        raise DataError(f"{path} is missing; encode the set again")
    file = FileBytes(path)
    if file.size != expected:
        raise DataError(
            f"{path} has {file.size} bytes, expected {expected}: it is damaged; encode the set again"
        )
    try:
        found, size, fortran, start = npy_header(file.bytes_at(0, min(file.size, 4096)))
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if size != tuple(shape) or found != np.dtype(dtype) or fortran:
        raise DataError(f"{path} holds {found} {size}, the manifest says {dtype} {tuple(shape)}")
    return Rows(file, start, size, getattr(torch, dtype))


def open_tensors(path: Path) -> dict[str, Rows]:
    """Open a safetensors file without reading its values. Raises DataError, SafetensorError and OSError."""
    file = FileBytes(path)
    with utf8_name(path) as name, safe_open(name, framework="pt") as tensors:
        # For dtypes and shapes only: `get_tensor` maps the file and no page of it is accessed.
        kinds = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        length = int.from_bytes(file.bytes_at(0, 8), "little")
        header = file.bytes_at(8, min(length, file.size - 8))
        entries: dict[str, Any] = parse_json(header.rstrip(b" "), f"{path}: its header", DataError)
        return {
            key: Rows(file, 8 + len(header) + entries[key]["data_offsets"][0], tuple(kind.shape), kind.dtype)
            for key, kind in kinds.items()
        }
