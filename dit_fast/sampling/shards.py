"""Output folder of `dit-fast sample`: shards while it runs, results when it has finished.

Shards are drawn by any number of ranks, survive a kill, and are joined at the end. A shard is one batch,
`parts/NNNNNN.npy`: an array, which `numpy.load` reads, followed by a SHA-256 of the request and of the array's bytes.
A shard that is truncated, damaged or from another request counts as missing, and the missing shards are all that a
resumed run needs to know, whatever the number of ranks.
"""

import contextlib
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_fast.errors import OutputError
from dit_fast.utils.files import (
    MOST_LIST_BYTES,
    TEMPORARY,
    parse_npy,
    read_bytes,
    read_object,
    write_atomically,
)
from dit_fast.utils.schema import brief

GRID, IMAGES, ARCHIVE, SCORES = "sample.png", "images", "samples.npz", "scores.json"
"""Grid, folder of single images, ADM archive and scores."""
SHARDS = "parts"
"""Folder of the shards; removed when the results are complete."""
OUTPUTS = frozenset((GRID, IMAGES, ARCHIVE, SCORES, SHARDS, "trajectory.gif", "latents.npy"))
"""Everything that `dit-fast sample` may write to its folder."""

# Date of every archive member, so that equal samples give equal bytes: the first date that zip can represent.
_DATE = (1980, 1, 1, 0, 0, 0)
_CHECKSUM_BYTES = hashlib.sha256().digest_size


class SampleShards:
    """Shards of `num` samples in `folder`/parts, with `batch_size` samples in each but the last.

    Args:
        folder: Output folder of the command.
        request: JSON values of everything that determines a sample: weights, model configuration, solver,
            precision, autoencoder. Shards of different requests are never mixed.
        num: Number of samples.
        batch_size: Samples per shard.
        shape: Shape of one sample.
        dtype: Name of the samples' NumPy dtype.
    """

    def __init__(
        self,
        folder: Path,
        request: Mapping[str, Any],
        num: int,
        batch_size: int,
        shape: tuple[int, ...],
        dtype: str,
    ) -> None:
        self.folder = folder / SHARDS
        self.num, self.batch_size, self.shape, self.dtype = num, batch_size, shape, np.dtype(dtype)
        self.count = -(-num // batch_size)
        self.request = {**request, "num": num, "batch_size": batch_size, "shape": list(shape), "dtype": dtype}
        self._text = json.dumps(self.request, indent=2, sort_keys=True) + "\n"
        # Shards whose checksum this process has verified, so that counting them does not read them again.
        self._verified: set[int] = set()

    def open(self) -> None:
        """Create the folder, or check that the existing one belongs to the same request.

        A folder of another request without any shard is reused.

        Raises:
            OutputError: The folder holds shards of another request, or is not writable.
        """
        path = self.folder / "request.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Unfinished files of a killed process.
            for partial in self.folder.glob(f"{TEMPORARY}*.npy"):
                partial.unlink(missing_ok=True)
            # Several ranks may do this at once: each writes the same bytes, atomically.
            if not path.exists() or not any(self.folder.glob("[0-9]*.npy")):
                write_atomically(path, lambda temporary: temporary.write_text(self._text))
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"cannot write {self.folder} ({error.strerror}); choose another --out"
            ) from None
        found = read_object(path, OutputError, what="the request of an unfinished dit-fast sample")
        wanted = json.loads(self._text)
        keys = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        if keys:
            differing = ", ".join(
                f"{k if k.isidentifier() else brief(k)} {brief(found.get(k))} there, {brief(wanted.get(k))} requested"
                for k in keys
            )
            raise OutputError(
                f"{self.folder} holds samples of another request: {differing}; remove it or choose another --out"
            )

    def numbers(self, shard: int) -> range:
        """Sample numbers of a shard."""
        return range(shard * self.batch_size, min((shard + 1) * self.batch_size, self.num))

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.npy"

    def _checksum(self, array_bytes: bytes | memoryview) -> bytes:
        digest = hashlib.sha256(self._text.encode())
        digest.update(array_bytes)
        return digest.digest()

    def read(self, shard: int) -> np.ndarray | None:
        """A shard (n, *shape); None where it is missing, truncated, damaged or from another request."""
        try:
            stored = read_bytes(self.path(shard), OutputError, MOST_LIST_BYTES)
            body, checksum = memoryview(stored)[:-_CHECKSUM_BYTES], stored[-_CHECKSUM_BYTES:]
            if self._checksum(body) != checksum:
                return None
            array = parse_npy(body, str(self.path(shard)), OutputError)
        except OutputError:
            return None
        whole = array.shape == (len(self.numbers(shard)), *self.shape) and array.dtype == self.dtype
        return array if whole else None

    def is_whole(self, shard: int) -> bool:
        """Whether a shard exists and matches its checksum; verified once per process."""
        if shard not in self._verified and self.read(shard) is not None:
            self._verified.add(shard)
        return shard in self._verified

    def missing(self) -> list[int]:
        """Numbers of the shards that have not been drawn."""
        return [shard for shard in range(self.count) if not self.is_whole(shard)]

    def finished(self) -> int:
        """Number of samples in existing shards, of all ranks; checksums are not verified."""
        # One listing: other ranks write while this one counts.
        there = {path.name for path in self.folder.glob("*.npy")}
        return sum(len(self.numbers(shard)) for shard in range(self.count) if f"{shard:06d}.npy" in there)

    def write(self, shard: int, samples: np.ndarray) -> None:
        """Store a shard (n, *shape) durably.

        Raises:
            OutputError: It cannot be written, or does not read back as written.
        """
        expected = (len(self.numbers(shard)), *self.shape)
        if samples.shape != expected or samples.dtype != self.dtype:
            raise ValueError(
                f"shard {shard} is {samples.dtype} {samples.shape}, expected {self.dtype} {expected}"
            )

        def save(temporary: Path) -> None:
            buffer = io.BytesIO()
            np.save(buffer, samples)
            with temporary.open("wb") as file:
                file.write(buffer.getbuffer())
                file.write(self._checksum(buffer.getbuffer()))

        write_atomically(self.path(shard), save)
        # A disk that loses data is found here, and not after hours of sampling.
        if not self.is_whole(shard):
            raise OutputError(
                f"{self.path(shard)} does not read back as it was written; choose another --out"
            )

    def __iter__(self) -> Iterator[np.ndarray]:
        """The shards in order, each (n, *shape); OutputError for one that is missing or damaged."""
        for shard in range(self.count):
            array = self.read(shard)
            if array is None:
                raise OutputError(f"{self.path(shard)} is missing or damaged; run the command again")
            yield array

    def first(self, most: int) -> np.ndarray:
        """The first `most` samples, or all if there are fewer."""
        taken: list[np.ndarray] = []
        for array in self:
            taken.append(array[: most - sum(map(len, taken))])
            if sum(map(len, taken)) == most:
                break
        return np.concatenate(taken)

    def write_npz(self, path: Path) -> None:
        """Write an ADM archive: `arr_0`, uint8 (num, H, W, C), uncompressed; equal samples give equal bytes."""

        def save(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                member = zipfile.ZipInfo("arr_0.npy", _DATE)
                # The size is not known to zipfile beforehand; 50,000 images of 256 x 256 exceed 4 GiB.
                with archive.open(member, "w", force_zip64=True) as file:
                    header = {
                        "descr": self.dtype.str,
                        "fortran_order": False,
                        "shape": (self.num, *self.shape),
                    }
                    np.lib.format.write_array_header_1_0(file, header)
                    for array in self:
                        file.write(np.ascontiguousarray(array).data)

        write_atomically(path, save)

    def remove(self) -> None:
        """Delete the shards, once the results are written."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)

    def remove_if_empty(self) -> None:
        """Delete the folder of a command that failed before its first shard."""
        if not any(self.folder.glob("[0-9]*.npy")):
            self.remove()
