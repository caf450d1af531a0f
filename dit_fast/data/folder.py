"""Open a folder of images as a data set: class sub-folders, images with captions, or images without classes."""

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_fast.data.buckets import BucketSource, Size, nearest_bucket
from dit_fast.data.decode import Conversion, Header, list_failures, read_each, read_header, read_image
from dit_fast.data.image_files import image_files, list_classes, warn_of_frames
from dit_fast.data.images import ArraySource, ImageSet, PixelSource, make_image_set
from dit_fast.data.unreadable import Unreadable, UnreadableError
from dit_fast.errors import ConfigError, DataError
from dit_fast.model.embedders import as_pair

if TYPE_CHECKING:
    from dit_fast.data.captions import FileCaptions

__all__ = ["image_files", "open_folder"]


@dataclass(frozen=True)
class ImageFileSource:
    """Pixels in files, decoded by `num_workers` threads on every read."""

    paths: tuple[Path, ...]
    size: Size
    channels: int
    num_workers: int
    conversion: Conversion
    lazy: bool = True

    def read(self, indices: Sequence[int]) -> Tensor:
        paths = [self.paths[index] for index in indices]
        images, failures = read_each(
            paths, lambda path: read_image(path, self.size, self.channels, self.conversion), self.num_workers
        )
        if failures:
            reasons = {indices[row]: reason for row, reason in failures.items()}
            raise UnreadableError(f"{list_failures(paths, failures)}: cannot be read", reasons)
        return torch.stack([image for image in images if image is not None])


def _agreed_size(root: Path, headers: Sequence[Header | None]) -> int:
    sizes = {(header.width, header.height) for header in headers if header is not None}
    width, height = min(sizes)
    if len(sizes) == 1 and width == height:
        return width
    found = f"{width} x {height}"
    if len(sizes) > 1:
        found = f"{len(sizes)} different sizes, e.g. {found}"
    raise ConfigError(f"{root}: the images are not all square and equal ({found}); give --image-size")


def open_folder(
    root: Path,
    *,
    image_size: int | Size | None,
    channels: int | None,
    flip: bool,
    holdout: float,
    num_workers: int,
    memory_limit: int,
    buckets: tuple[Size, ...] = (),
    captions: "FileCaptions | None" = None,
    labeled: bool = True,
    conversion: Conversion = Conversion(),  # noqa: B008 (frozen)
    skip_unreadable: int = 0,
) -> ImageSet:
    """Open the images below `root` as a data set.

    A set of at most `memory_limit` bytes is decoded at once, so that every damaged file is found before training
    begins. Of a larger set only the headers are read, and files are decoded as batches need them.

    Args:
        root: folder with one sub-folder per class; labels follow the sorted order of their names.
        image_size: side or (height, width) to resize and crop to; None keeps the images' own, which must be equal.
        channels: 1 or 3; None selects 1 if all images are grayscale.
        flip: whether images may be mirrored in training.
        holdout: held-out fraction of each class.
        num_workers: decoding threads.
        memory_limit: bytes of pixels up to which the set is kept in memory.
        buckets: resize each image to the bucket nearest to its aspect ratio instead.
        captions: captions of the images, in place of classes.
        labeled: False for images without class conditioning.
        conversion: conversion of files to pixels.
        skip_unreadable: number of files that may be unreadable; they are replaced (`dit_fast.data.unreadable`).

    Raises:
        DataError: files are missing or unreadable.
        ConfigError: options that contradict the images.
    """
    if captions is None:
        class_names, paths, labels = list_classes(root, labeled)
    else:
        paths = [root / name for name in captions.names]
        class_names, labels = ["captions"], [0] * len(paths)
    names = [path.relative_to(root).as_posix() for path in paths]
    register = Unreadable(skip_unreadable, names.__getitem__)
    bar = f"reading {root.name}"
    headers, failures = read_each(paths, lambda path: read_header(path, conversion), num_workers)
    warn_of_frames(
        root, [name for name, header in zip(names, headers, strict=True) if header and header.more]
    )
    sources: list[PixelSource] = []
    if len(failures) == len(paths) or len(failures) > skip_unreadable:
        # Damage is found in the header or only in the body: decode all files, to report both kinds at once.
        headed = [number for number, header in enumerate(headers) if header is not None]
        bodies = [paths[number] for number in headed]
        size = image_size or 1
        _, damaged = read_each(bodies, lambda path: read_image(path, size, 1, conversion), num_workers, bar)
        failures |= {headed[number]: reason for number, reason in damaged.items()}
        raise _too_many(root, paths, failures)
    sizes = buckets or (as_pair(image_size or _agreed_size(root, headers)),)
    depth = channels or (1 if all(header.gray for header in headers if header is not None) else 3)
    # A file without a readable header has no size. It is never read; count it with the bucket of the next image.
    known = [header for header in headers if header is not None]
    filled, following = [], known[0]
    for header in reversed(headers):
        following = header or following
        filled.append(following)
    nearest = [nearest_bucket((header.height, header.width), sizes) for header in reversed(filled)]
    grouped: list[list[int]] = [[] for _ in sizes]
    for number, bucket in enumerate(nearest):
        grouped[bucket].append(number)
    # uint8: one byte per pixel and channel.
    if sum(depth * math.prod(sizes[n]) for n in nearest) <= memory_limit:
        size_of = dict(zip(paths, (sizes[n] for n in nearest), strict=True))
        images, failures = read_each(
            paths, lambda path: read_image(path, size_of[path], depth, conversion), num_workers, bar
        )
        if len(failures) > skip_unreadable:
            raise _too_many(root, paths, failures)
        for members, size in zip(grouped, sizes, strict=True):
            # Unreadable images occupy their row, so that positions do not shift; `unreadable` prevents their use.
            blank = torch.zeros(depth, *size, dtype=torch.uint8)
            pixels = [blank if (image := images[number]) is None else image for number in members]
            lost = {
                place: f"{paths[number]} ({failures[number]}): cannot be read"
                for place, number in enumerate(members)
                if number in failures
            }
            stacked = torch.stack(pixels) if pixels else torch.empty(0, depth, *size, dtype=torch.uint8)
            sources.append(ArraySource(stacked, unreadable=lost))
    else:
        for members, size in zip(grouped, sizes, strict=True):
            files = tuple(paths[number] for number in members)
            sources.append(ImageFileSource(files, size, depth, num_workers, conversion))
    if failures:
        register.add(UnreadableError(f"{list_failures(paths, failures)}: cannot be read", failures))
    source = sources[0]
    if buckets:
        place = {number: row for members in grouped for row, number in enumerate(members)}
        source = BucketSource(tuple(sources), tuple(nearest), tuple(place[n] for n in range(len(paths))))

    # Names and sizes, not contents: hashing every file would read the whole set at each start.
    def fingerprint(without: Collection[str] = ()) -> str:
        listing = "\n".join(
            f"{name}\t{path.stat().st_size}"
            for name, path in zip(names, paths, strict=True)
            if name not in without
        )
        listing += "" if captions is None else f"\n{captions.file.sha256}"
        return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()

    return make_image_set(
        str(root),
        source,
        torch.tensor(labels),
        names,
        class_names,
        (depth, *sizes[0]),
        flip=flip,
        holdout=holdout,
        fingerprint=fingerprint(),
        buckets=buckets,
        bucket_of=torch.tensor(nearest) if buckets else None,
        captions=captions,
        labeled=labeled,
        unreadable=register,
        conversion=conversion,
        without=fingerprint,
    )


def _too_many(root: Path, paths: Sequence[Path], failures: dict[int, str]) -> DataError:
    return DataError(
        f"{root}: {len(failures)} of {len(paths)} images cannot be read: {list_failures(paths, failures)}; "
        f"replace or remove them, or skip them with --skip-unreadable {len(failures)}"
    )
