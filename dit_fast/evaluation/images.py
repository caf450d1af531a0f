"""Images to score and statistics of images: folders, .npz archives and built-in sets, as batches of uint8 RGB."""

import contextlib
import functools
import logging
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from dit_fast.data import BUILTIN, Conversion, Size, center_crop_array, nearest_bucket
from dit_fast.data.decode import list_failures, read_each, read_header, read_image
from dit_fast.data.image_files import FORMATS, image_files, warn_of_frames
from dit_fast.errors import DataError
from dit_fast.evaluation.metrics import GaussianStatistics
from dit_fast.sampling.shards import ARCHIVE, GRID, IMAGES, OUTPUTS, SHARDS
from dit_fast.utils.files import check_file

logger = logging.getLogger(__name__)

# Scores need a covariance, which needs two images.
_LEAST = 2
_NAMED = 3
# Deflate compresses zeros a thousandfold but images hardly at all; a small member is harmless at any ratio.
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
    """One array of an archive: its key, and the shape and dtype in its header, which match its size."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Archive:
    """The arrays of the `.npz` file `path`.

    Raises:
        DataError: the file is damaged, contains pickled objects, or a member that is too large or compressed too far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_file(path, DataError, what="an .npz archive")
        # Only the list of members is kept; each read opens the file again, and no descriptor stays open.
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
        """Shape and dtype of the array `key`."""
        with self._reading(), zipfile.ZipFile(self.path) as archive, archive.open(self._infos[key]) as file:
            return self._header(key, file)

    def read(self, key: str) -> np.ndarray:
        """Read the array `key`, of at most 4 GiB."""
        member = self.member(key)
        size = math.prod(member.shape) * member.dtype.itemsize
        if size > _MOST_ARRAY_BYTES:
            raise DataError(f"{self.path}: refused: {key} has {size} bytes, too many for statistics")
        with self._reading(), zipfile.ZipFile(self.path) as archive, archive.open(self._infos[key]) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def batches(self, key: str, batch_size: int) -> Iterator[np.ndarray]:
        """Yield the array `key` (N, ...) in batches along its first dimension.

        The checksum is verified with the last batch.
        """
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
                f"{self.path}: refused: {key} expands from {info.compress_size} to {info.file_size} bytes: not images"
            )
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise DataError(
                f"{self.path}: {key} has .npy version {version[0]}.{version[1]}, expected 1.0 or 2.0"
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
                f"{self.path}: damaged or not an .npz archive ({reason}); copy or create it again"
            ) from error


class ImageSource(Protocol):
    """A set of images.

    Attributes:
        name: path or name of the set, for messages.
        num: number of images.
        sizes: their (height, width), usually one.
    """

    @property
    def name(self) -> str: ...

    @property
    def num(self) -> int: ...

    @property
    def sizes(self) -> tuple[Size, ...]: ...

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the images in order, or size by size where there are several, as uint8 (B, 3, H, W)."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory: uint8 (N, H, W, 3) or grayscale (N, H, W)."""

    name: str
    images: np.ndarray

    @property
    def num(self) -> int:
        return len(self.images)

    @property
    def sizes(self) -> tuple[Size, ...]:
        return ((self.images.shape[1], self.images.shape[2]),)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for first in range(0, self.num, batch_size):
            yield _to_rgb(self.images[first : first + batch_size])


@dataclass(frozen=True)
class ArchiveImages:
    """`arr_0` of an archive in ADM's layout, uint8 (N, H, W, 3), read batch by batch; `crop`: side to resize to."""

    archive: Archive
    num: int
    stored: Size
    crop: int | None = None

    @property
    def name(self) -> str:
        return str(self.archive.path)

    @property
    def sizes(self) -> tuple[Size, ...]:
        return (self.stored if self.crop is None else (self.crop, self.crop),)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for batch in self.archive.batches("arr_0", batch_size):
            images = batch[..., 0] if batch.ndim == 4 and batch.shape[3] == 1 else batch
            # Grayscale is kept as (B, H, W) until here, the form that Pillow and `_to_rgb` accept.
            if self.stored != self.sizes[0]:
                images = np.stack([center_crop_array(image, self.sizes[0][0]) for image in images])
            yield _to_rgb(images)


@dataclass(frozen=True)
class FolderImages:
    """Image files, decoded by `num_workers` threads and each resized and cropped to its shape, as in training."""

    name: str
    paths: tuple[Path, ...]
    shapes: tuple[Size, ...]
    num_workers: int
    conversion: Conversion

    @property
    def num(self) -> int:
        return len(self.paths)

    @property
    def sizes(self) -> tuple[Size, ...]:
        return tuple(dict.fromkeys(self.shapes))

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for size in self.sizes:
            paths = [path for path, own in zip(self.paths, self.shapes, strict=True) if own == size]
            decode = functools.partial(read_image, size=size, channels=3, how=self.conversion)
            for first in range(0, len(paths), batch_size):
                part = paths[first : first + batch_size]
                images, failures = read_each(part, decode, self.num_workers)
                if failures:
                    raise _unreadable(self.name, part, failures)
                yield torch.stack([image for image in images if image is not None])


@dataclass(frozen=True)
class JoinedImages:
    """The images of several sources, one after the other."""

    name: str
    sources: tuple[ImageSource, ...]

    @property
    def num(self) -> int:
        return sum(source.num for source in self.sources)

    @property
    def sizes(self) -> tuple[Size, ...]:
        return tuple(dict.fromkeys(size for source in self.sources for size in source.sizes))

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for source in self.sources:
            yield from source.batches(batch_size)


def open_source(
    source: str | Path,
    image_size: int | None = None,
    num_workers: int = 1,
    buckets: Sequence[Size] = (),
    conversion: Conversion = Conversion(),  # noqa: B008 (frozen)
) -> ImageSource:
    """Open images to score.

    In a folder that `dit-fast sample --out` wrote, the single images are used, or the archive, never the grid.

    Args:
        source: a folder of images, at any depth; an .npz archive with `arr_0`; or the name of a built-in set.
        image_size: resize and crop to this side, as ADM does (`center_crop`); None: the images must have one size, and
            those of a folder must be square.
        num_workers: decoding threads.
        buckets: resize and crop each image of a folder to the bucket of the nearest aspect ratio, as in training.
        conversion: conversion of files to pixels.

    Raises:
        DataError: there are fewer than 2 images, several sizes, damaged files, or `source` is none of these.
    """
    path = Path(source)
    if buckets and not path.is_dir():
        raise DataError(f"{source}: --buckets applies only to a folder of images; give one, or --image-size")
    if str(source) in BUILTIN and not path.exists():
        opened: ImageSource = _builtin(str(source), image_size)
    elif path.is_dir():
        opened = _folder(path, image_size, num_workers, buckets, conversion)
    elif not path.exists():
        raise DataError(f"{path}: no such file or folder (built-in sets: {', '.join(sorted(BUILTIN))})")
    elif path.suffix != ".npz":
        raise DataError(
            f"{path}: expected a folder of images or an .npz archive, found a file with suffix "
            f"{path.suffix or '(none)'}"
        )
    else:
        opened = archive_images(Archive(path), image_size)
    if opened.num < _LEAST:
        raise DataError(f"{opened.name} has {opened.num} images; scores need at least {_LEAST}")
    return opened


def archive_images(archive: Archive, image_size: int | None = None) -> ArchiveImages:
    """Open the images `arr_0` of an archive, uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W).

    Args:
        archive: the archive.
        image_size: side to resize and crop to; None keeps the images' own.

    Raises:
        DataError: there is no such array, or it has another dtype or shape.
    """
    if "arr_0" not in archive:
        raise DataError(f"{archive.path} has {', '.join(archive.keys[:5])}, expected images under arr_0")
    member = archive.member("arr_0")
    shape = member.shape
    gray = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
    if member.dtype != np.uint8 or not (gray or (len(shape) == 4 and shape[3] == 3)) or 0 in shape[1:]:
        raise DataError(f"{archive.path}: arr_0 is {member.dtype} {shape}, expected uint8 (N, H, W, 3)")
    return ArchiveImages(archive, shape[0], (shape[1], shape[2]), image_size)


def _builtin(name: str, image_size: int | None) -> ArrayImages:
    images, _ = BUILTIN[name]()
    if image_size is not None:
        images = np.stack([center_crop_array(image, image_size) for image in images])
    return ArrayImages(name, images)


def _folder(
    root: Path,
    image_size: int | None,
    num_workers: int,
    buckets: Sequence[Size],
    conversion: Conversion,
) -> ImageSource:
    if (root / GRID).is_file() and all(
        entry.name in OUTPUTS or entry.name.startswith(".") for entry in root.iterdir()
    ):
        if (root / SHARDS).is_dir():
            # Images and archives beside the shards may belong to an earlier command.
            raise DataError(
                f"{root}: dit-fast sample has not finished there ({SHARDS}); run the same command again, or wait for it"
            )
        # A folder of dit-fast sample. Grids of older versions carry no mark and cannot be recognized by their header.
        if (root / IMAGES).is_dir():
            return _folder(root / IMAGES, image_size, num_workers, buckets, conversion)
        if (root / ARCHIVE).is_file() and not buckets:
            return archive_images(Archive(root / ARCHIVE), image_size)
    paths = image_files(root)
    headers, failures = read_each(paths, lambda path: read_header(path, conversion), num_workers)
    if failures:
        raise _unreadable(str(root), paths, failures)
    known = [(path, header) for path, header in zip(paths, headers, strict=True) if header is not None]
    single = [(path, header) for path, header in known if not header.grid]
    if grids := len(known) - len(single):
        if not single:
            raise DataError(
                f"{root} has no single images, only {grids} grids of samples: sample with dit-fast sample "
                "--save-images or --npz"
            )
        logger.warning("%s: %d grids of samples are ignored", root, grids)
    if not single:
        raise DataError(f"{root} has no readable image ({FORMATS})")
    warn_of_frames(root, [path.relative_to(root).as_posix() for path, header in single if header.more])
    paths, sizes = [path for path, _ in single], [(header.height, header.width) for _, header in single]
    if buckets:
        shapes = [buckets[nearest_bucket(size, buckets)] for size in sizes]
        return FolderImages(str(root), tuple(paths), tuple(shapes), num_workers, conversion)
    if image_size is None:
        other = [(path, size) for path, size in zip(paths, sizes, strict=True) if size != sizes[0]]
        if other:
            named = ", ".join(f"{path.name} {size[1]}x{size[0]}" for path, size in other[:_NAMED])
            raise DataError(
                f"{root}: {len(other)} of {len(paths)} images differ in size from {paths[0].name} "
                f"{sizes[0][1]}x{sizes[0][0]}: {named}; give --image-size to resize and crop"
            )
        if sizes[0][0] != sizes[0][1]:
            raise DataError(
                f"{root}: images are {sizes[0][1]}x{sizes[0][0]}, not square; give --image-size to resize and crop"
            )
    shape = sizes[0] if image_size is None else (image_size, image_size)
    return FolderImages(str(root), tuple(paths), (shape,) * len(paths), num_workers, conversion)


def _unreadable(name: str, paths: Sequence[Path], failures: dict[int, str]) -> DataError:
    return DataError(
        f"{name}: images cannot be read: {list_failures(paths, failures)}; replace or remove them"
    )


def _to_rgb(images: np.ndarray) -> Tensor:
    """Convert uint8 (B, H, W, 3) or (B, H, W) to (B, 3, H, W)."""
    tensor = torch.from_numpy(np.array(images))
    if tensor.ndim == 3:
        return tensor[:, None].expand(-1, 3, -1, -1).contiguous()
    return tensor.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class SavedStatistics:
    """Statistics of a feature network.

    Args:
        pooled: moments of the pooled features, for FID.
        spatial: moments of the spatial features, for sFID.
        extractor: name of the feature network; None in the archives of ADM and pytorch-fid, which do not state it.
    """

    pooled: GaussianStatistics
    spatial: GaussianStatistics | None
    extractor: str | None


def read_statistics(archive: Archive) -> SavedStatistics:
    """Read the statistics in an archive.

    Raises:
        DataError: mu or sigma are missing, have incompatible shapes, or are not finite or not a covariance.
    """
    if "mu" not in archive or "sigma" not in archive:
        raise DataError(f"{archive.path} has {', '.join(archive.keys[:5])}, expected mu and sigma")
    spatial = _gaussian(archive, "mu_s", "sigma_s") if "mu_s" in archive and "sigma_s" in archive else None
    extractor = None
    if "extractor" in archive:
        name = archive.read("extractor")
        if name.dtype.kind != "U" or name.ndim:
            raise DataError(f"{archive.path}: extractor is {name.dtype} {name.shape}, expected a name")
        extractor = str(name)
    return SavedStatistics(_gaussian(archive, "mu", "sigma"), spatial, extractor)


def write_statistics(path: Path, statistics: SavedStatistics) -> None:
    """Write an .npz archive that `read_statistics`, ADM's evaluator and pytorch-fid read."""
    arrays = {"mu": statistics.pooled.mean.numpy(), "sigma": statistics.pooled.covariance.numpy()}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean.numpy(), "sigma_s": statistics.spatial.covariance.numpy()}
    if statistics.pooled.num is not None:
        arrays["num"] = np.array(statistics.pooled.num)
    if statistics.extractor is not None:
        arrays["extractor"] = np.array(statistics.extractor)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _gaussian(archive: Archive, mean_key: str, covariance_key: str) -> GaussianStatistics:
    for key in (mean_key, covariance_key):
        if archive.member(key).dtype.kind != "f":
            raise DataError(f"{archive.path}: {key} is {archive.member(key).dtype}, expected floating point")
    mean, covariance = archive.read(mean_key), archive.read(covariance_key)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(
            f"{archive.path}: {mean_key} is {mean.shape} and {covariance_key} {covariance.shape}, "
            "expected (D,) and (D, D)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{archive.path}: {mean_key} or {covariance_key} has NaN or infinite values")
    # Relative to the largest entry: saved covariances have rounding errors.
    symmetric = np.abs(covariance - covariance.T).max() <= 1e-3 * max(np.abs(covariance).max(), 1e-30)
    if not len(mean) or not symmetric or (covariance.diagonal() < 0).any():
        raise DataError(
            f"{archive.path}: {covariance_key} is not a covariance: not symmetric, or with negative variances"
        )
    num = int(archive.read("num")) if "num" in archive and archive.member("num").shape == () else None
    if num is not None and num < 1:
        raise DataError(f"{archive.path}: num is {num}, expected a number of images")
    return GaussianStatistics(
        torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64)), num
    )
