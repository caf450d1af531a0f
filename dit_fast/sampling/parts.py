"""Many samples on disk: drawn in parts by any number of ranks, resumed after a kill, joined at the end.

A part is one batch, `parts/NNNNNN.npy`, and is there in full or not at all; which parts are missing is all that a
resumed run needs to know, whatever the number of ranks. Ranks share the folder and nothing else.
"""

import contextlib
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_fast.errors import OutputError
from dit_fast.files import write_atomically

# Of every member of an archive, so that equal samples give equal bytes: the first date that zip can hold.
_DATE = (1980, 1, 1, 0, 0, 0)


class Parts:
    """The parts of `num` samples in `folder`/parts, `batch_size` in each but the last.

    `request`: JSON values that say what is drawn; parts of another request are not mixed with it, OutputError names
    what differs. `shape`, `dtype`: of one sample.
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
        self.folder = folder / "parts"
        self.num, self.batch_size, self.shape, self.dtype = num, batch_size, shape, np.dtype(dtype)
        self.count = -(-num // batch_size)
        self.request = {**request, "num": num, "batch_size": batch_size, "shape": list(shape), "dtype": dtype}

    def open(self) -> None:
        """Make the folder, or see that the one there is of the same request."""
        path = self.folder / "request.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                text = json.dumps(self.request, indent=2, sort_keys=True) + "\n"
                write_atomically(path, lambda temporary: temporary.write_text(text))
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"{path} cannot be read ({error}); remove {self.folder} or choose another --out"
            ) from None
        wanted = json.loads(json.dumps(self.request))
        keys = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        if keys:
            differing = ", ".join(f"{k} {found.get(k)!r} there, {wanted.get(k)!r} asked for" for k in keys)
            raise OutputError(
                f"{self.folder} holds samples of another request: {differing}; remove it or choose another --out"
            )

    def numbers(self, part: int) -> range:
        """The samples of a part."""
        return range(part * self.batch_size, min((part + 1) * self.batch_size, self.num))

    def path(self, part: int) -> Path:
        return self.folder / f"{part:06d}.npy"

    def read(self, part: int) -> np.ndarray | None:
        """A part as it lies on disk, (n, *shape); None where it is not there in full."""
        try:
            array = np.load(self.path(part), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        whole = array.shape == (len(self.numbers(part)), *self.shape) and array.dtype == self.dtype
        return array if whole else None

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Parts that `rank` of `world` has still to draw; shares of different ranks do not meet."""
        return [part for part in range(rank, self.count, world) if self.read(part) is None]

    def finished(self) -> int:
        """Number of samples that are there, of all ranks."""
        there = {path.name for path in self.folder.glob("*.npy")}
        return sum(len(self.numbers(part)) for part in range(self.count) if f"{part:06d}.npy" in there)

    def write(self, part: int, samples: np.ndarray) -> None:
        """Keep a part; it survives a kill from here on."""
        expected = (len(self.numbers(part)), *self.shape)
        if samples.shape != expected or samples.dtype != self.dtype:
            raise ValueError(
                f"part {part} is {samples.dtype} {samples.shape}, expected {self.dtype} {expected}"
            )

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.save(file, samples)

        write_atomically(self.path(part), save)
        # Or `wait` would wait for it for ever.
        if self.read(part) is None:
            raise OutputError(f"{self.path(part)} does not read back as it was written; choose another --out")

    def wait(self, notify: Callable[[int], None], seconds: float = 1.0) -> None:
        """Return when the parts of all ranks are there; `notify` hears of the number of samples."""
        while self.missing():
            notify(self.finished())
            time.sleep(seconds)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The parts in order, each (n, *shape)."""
        for part in range(self.count):
            array = self.read(part)
            if array is None:
                raise OutputError(f"{self.path(part)} is missing or damaged; run the command again")
            yield array

    def first(self, most: int) -> np.ndarray:
        """The first `most` samples, or all of fewer."""
        taken: list[np.ndarray] = []
        for array in self:
            taken.append(np.asarray(array[: most - sum(map(len, taken))]))
            if sum(map(len, taken)) == most:
                break
        return np.concatenate(taken)

    def write_npz(self, path: Path) -> None:
        """All samples as ADM's archive: uint8 (num, H, W, C) under `arr_0`, stored; equal samples give equal bytes."""

        def save(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                member = zipfile.ZipInfo("arr_0.npy", _DATE)
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
        """Take the parts away, once what was asked for is made of them."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)
