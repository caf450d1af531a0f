"""Reading `.npz` archives that may come from anyone: nothing is unpickled, no claimed size is believed.

Images are read from the archive batch by batch, so that fifty thousand of them need no more memory than one batch.
"""

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from dit_fast.errors import DataError
from dit_fast.files import check_file

# Deflate packs zeros a thousandfold, images hardly at all; a small member is harmless however it is packed.
_MOST_RATIO = 100
_HARMLESS_BYTES = 64 * 2**20
_MOST_ARRAY_BYTES = 4 * 2**30
_MOST_HEADER_BYTES = 10_000
_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Member:
    """One array of an archive: its key, shape and dtype, as its header says and its size confirms."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Archive:
    """The arrays of the `.npz` file `path`. Raises DataError for anything damaged, pickled or larger than it can be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_file(path, DataError, what="an .npz archive")
        with self._reading(), zipfile.ZipFile(path) as archive:
            self._infos = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
        if not self._infos:
            raise DataError(
                f"{path} holds no arrays; expected an .npz archive with arr_0, or with mu and sigma"
            )

    def __contains__(self, key: str) -> bool:
        return key in self._infos

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(self._infos)

    def member(self, key: str) -> Member:
        """What the header of the array `key` says."""
        with self._reading(), zipfile.ZipFile(self.path) as archive, archive.open(self._infos[key]) as file:
            return self._header(key, file)

    def read(self, key: str) -> np.ndarray:
        """The whole array `key`, of at most 4 GiB."""
        member = self.member(key)
        size = math.prod(member.shape) * member.dtype.itemsize
        if size > _MOST_ARRAY_BYTES:
            raise DataError(f"{self.path}: refused: {key} of {size} bytes are no statistics")
        with self._reading(), zipfile.ZipFile(self.path) as archive, archive.open(self._infos[key]) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def batches(self, key: str, batch_size: int) -> Iterator[np.ndarray]:
        """The array `key` (N, ...) in batches along its first dimension; the last if the checksum holds."""
        with self._reading(), zipfile.ZipFile(self.path) as archive, archive.open(self._infos[key]) as file:
            member = self._header(key, file)
            num, shape = member.shape[0], member.shape[1:]
            row = math.prod(shape) * member.dtype.itemsize
            for first in range(0, num, batch_size):
                count = min(batch_size, num - first)
                data = file.read(count * row)
                if len(data) != count * row:
                    raise DataError(
                        f"{self.path}: truncated: {key} ends before image {first + count} of {num}"
                    )
                yield np.frombuffer(data, member.dtype).reshape(count, *shape)

    def _header(self, key: str, file: IO[bytes]) -> Member:
        info = self._infos[key]
        if info.file_size > _HARMLESS_BYTES and info.file_size > _MOST_RATIO * info.compress_size:
            raise DataError(
                f"{self.path}: refused: {key} unpacks from {info.compress_size} to {info.file_size} bytes, no images do"
            )
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise DataError(
                f"{self.path}: {key} is of .npy version {version[0]}.{version[1]}, expected 1.0 or 2.0"
            )
        shape, fortran_order, dtype = readers[version](file, max_header_size=_MOST_HEADER_BYTES)
        if dtype.hasobject:
            raise DataError(f"{self.path}: refused: {key} holds pickled objects, expected plain numbers")
        if fortran_order and len(shape) > 1 and key == "arr_0":
            raise DataError(f"{self.path}: {key} is in Fortran order; save it with np.ascontiguousarray")
        needed = file.tell() + math.prod(shape) * dtype.itemsize
        if needed != info.file_size:
            raise DataError(
                f"{self.path}: damaged: {key} {dtype} {shape} needs {needed} bytes, the archive holds {info.file_size}"
            )
        return Member(key, tuple(shape), dtype)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except _READ_ERRORS as error:
            if isinstance(error, DataError):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"{self.path}: damaged or no .npz archive ({reason}); copy or make it again"
            ) from error
