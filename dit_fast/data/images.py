"""Labelled image sets in pixel space: what the trainer reads, whatever it came from.

A set has two splits, `train` and `heldout`; a held-out image is never trained on. The trainer only asks a
split for `labels`, `sample_shape` and `batch(indices, flip)`, so that a set of latents fits the same place.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dit_fast.data.conditions import Captions, ToldSet, ToldSplit
from dit_fast.data.decode import Conversion
from dit_fast.data.unreadable import Unreadable, UnreadableError
from dit_fast.errors import ConfigError, DataError
from dit_fast.model.embedders import as_pair
from dit_fast.utils.values import Number, check_memory

HOLDOUT = Number(0, 1, below=True)


class PixelSource(Protocol):
    """Where the pixels of a set lie: in memory, or in files that are decoded on demand."""

    @property
    def lazy(self) -> bool:
        """Whether a read decodes files."""
        ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """Images `indices` as uint8 (B, C, H, W). Raises UnreadableError for those that cannot be read."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """Pixels in memory: uint8 (N, C, H, W); unreadable: why some of them are not there, by position."""

    images: Tensor
    lazy: bool = False
    unreadable: Mapping[int, str] = field(default_factory=dict)

    def read(self, indices: Sequence[int]) -> Tensor:
        if reasons := {index: self.unreadable[index] for index in indices if index in self.unreadable}:
            raise UnreadableError("; ".join(reasons.values()), reasons)
        return self.images[torch.as_tensor(indices)]


@dataclass(frozen=True)
class Split(ToldSplit):
    """Part of a set: `labels` is int64 (N,), `members` are the positions in the source.

    `buckets`: int64 (N,), which of the set's shapes each sample has; None: all have `sample_shape`, else it is the
    first one's.
    """

    source: PixelSource
    members: Tensor
    labels: Tensor
    sample_shape: tuple[int, int, int]
    buckets: Tensor | None = None
    captions: Captions | None = None
    unreadable: Unreadable = field(default_factory=Unreadable)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def lazy(self) -> bool:
        """Whether a batch is read from files, so that reading ahead pays."""
        return self.source.lazy or self.captions is not None

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        """Samples `indices` (int64 (B,), positions in this split) of one shape as float32 (B, C, H, W) in [-1, 1].

        `flip` is bool (B,): True mirrors that sample left to right.
        """
        pixels = to_pixels(self.source.read(self.members[indices].tolist()))
        if flip is not None:
            pixels = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return pixels


@dataclass(frozen=True)
class ImageSet(ToldSet):
    """A labelled image set with its train and held-out split.

    `image_size` is the side of square images, else their height, `channels` 1 (grey) or 3 (RGB), `flip` whether
    a left-right mirror image is still a member of its class, `holdout` the held-out fraction of each class, and
    `fingerprint` a SHA-256 of what the set was made of. `buckets`: the (height, width) that images have, where there
    are several; `image_size` is then the first one's height. `conversion`: how files became pixels, None where there
    are none. `without`: the fingerprint that the set would have, did it not have the samples of these names.
    """

    name: str
    image_size: int
    channels: int
    class_names: tuple[str, ...]
    flip: bool
    holdout: float
    fingerprint: str
    train: Split
    heldout: Split
    buckets: tuple[tuple[int, int], ...] = ()
    conversion: Conversion | None = None
    without: Callable[[Collection[str]], str] | None = None

    @property
    def shapes(self) -> dict[tuple[int, int], int]:
        """How many training images have each of `buckets`; empty where there is one shape."""
        return count_shapes(self.buckets, self.train.buckets)

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts for a checkpoint's manifest; equal exactly if the training images are equal."""
        return {
            "name": self.name,
            "image_size": self.image_size,
            "channels": self.channels,
            "num_classes": self.num_classes,
            "num_train": len(self.train),
            "num_heldout": len(self.heldout),
            "holdout": self.holdout,
            "fingerprint": self.fingerprint,
            **({} if self.conversion is None else {"pixels": self.conversion.describe()}),
            **describe_shapes(self.shapes),
            **self.describe_captions(),
        }


def count_shapes(buckets: Sequence[tuple[int, int]], bucket_of: Tensor | None) -> dict[tuple[int, int], int]:
    """How many of the samples with these buckets, int64 (N,), have each shape."""
    counts = [] if bucket_of is None else bucket_of.bincount(minlength=len(buckets)).tolist()
    return dict(zip(buckets, counts, strict=True))


def describe_shapes(shapes: dict[tuple[int, int], int]) -> dict[str, list[Any]]:
    """What a manifest says of several shapes; nothing of one."""
    if not shapes:
        return {}
    return {"buckets": [list(size) for size in shapes], "bucket_images": list(shapes.values())}


def to_pixels(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return images.float().div_(127.5).sub_(1.0)


def heldout_mask(sample_ids: Sequence[str], labels: Tensor, fraction: float) -> Tensor:
    """Which samples are held out: bool (N,), round(fraction * n) of the n samples of each class.

    The choice ranks samples by a hash of their id, so it depends on neither the seed of a run nor the order
    of the samples. At least one sample of each class stays in the training split.
    """
    # Names of files need not be UTF-8: Python keeps their other bytes as surrogates.
    rank = [hashlib.sha256(sample_id.encode(errors="surrogateescape")).digest() for sample_id in sample_ids]
    mask = torch.zeros(len(sample_ids), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten().tolist()
        members.sort(key=rank.__getitem__)
        mask[members[: min(round(fraction * len(members)), len(members) - 1)]] = True
    return mask


def make_set(
    name: str,
    source: PixelSource,
    labels: Tensor,
    sample_ids: Sequence[str],
    class_names: Sequence[str],
    sample_shape: tuple[int, int, int],
    *,
    flip: bool,
    holdout: float,
    fingerprint: str,
    buckets: tuple[tuple[int, int], ...] = (),
    bucket_of: Tensor | None = None,
    captions: Captions | None = None,
    labelled: bool = True,
    unreadable: Unreadable | None = None,
    conversion: Conversion | None = None,
    without: Callable[[Collection[str]], str] | None = None,
) -> ImageSet:
    """Check the labels, divide the samples into the two splits and return the set.

    buckets, bucket_of: the shapes of a set that has several, and the shape of each sample, int64 (N,).
    captions: told in place of the classes. labelled: False for images that no class is told of. unreadable: the members
    that could not be read. conversion, without: as of `ImageSet`.
    Raises DataError for fewer than two classes without captions, a label outside 0..num_classes-1 or a class
    without samples, ConfigError for a held-out fraction outside [0, 1).
    """
    HOLDOUT.check("--holdout", holdout)
    if len(class_names) < 2 and captions is None and labelled:
        raise DataError(
            f"{name}: {len(class_names)} class found; class-conditional training needs at least 2"
        )
    outside = ((labels < 0) | (labels >= len(class_names))).nonzero().flatten()
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"{name}: label {int(labels[first])} of sample {first} is outside 0..{len(class_names) - 1} "
            f"({len(outside)} such labels in all)"
        )
    counts = labels.bincount(minlength=len(class_names))
    empty = [class_name for class_name, count in zip(class_names, counts.tolist(), strict=True) if count == 0]
    if empty:
        raise DataError(f"{name}: {len(empty)} classes have no images: {', '.join(empty[:5])}")
    held = heldout_mask(sample_ids, labels, holdout)
    register = unreadable or Unreadable()

    def split(mask: Tensor) -> Split:
        members = mask.nonzero().flatten()
        own = None if bucket_of is None else bucket_of[members]
        return Split(source, members, labels[members], sample_shape, own, captions, register)

    return ImageSet(
        name=name,
        image_size=sample_shape[1],
        channels=sample_shape[0],
        class_names=tuple(class_names),
        flip=flip,
        holdout=holdout,
        fingerprint=fingerprint,
        train=split(~held),
        heldout=split(held),
        buckets=buckets,
        conversion=conversion,
        without=without,
    )


def from_arrays(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    flip: bool = True,
    holdout: float = 0.0,
    resize: Callable[[np.ndarray, tuple[int, int]], np.ndarray] | None = None,
) -> ImageSet:
    """A set from arrays: `images` uint8 (N, H, W) grey or (N, H, W, 3) RGB, `labels` integers (N,).

    `resize(image, size)` gives one image the (height, width) `size`; it is needed where `image_size`, a side or both,
    is not the images' own. Raises DataError for shapes, types or labels that do not fit.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise DataError(
            f"{name}: images are {images.dtype} {images.shape}; expected uint8 (N, H, W) or (N, H, W, 3)"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"{name}: labels are {labels.dtype} {labels.shape}; expected {len(images)} integers, one an image"
        )
    fingerprint = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    size = as_pair(image_size or images.shape[1])
    check_memory(len(images) * size[0] * size[1], f"{name} with --image-size {'x'.join(map(str, size))}")
    if images.shape[1:3] != size:
        if resize is None:
            raise DataError(
                f"{name}: images are {images.shape[1]} x {images.shape[2]}, not {size[0]} x {size[1]}"
            )
        images = np.stack([resize(image, size) for image in images])
    own_channels = 1 if images.ndim == 3 else 3
    if channels not in (None, own_channels):
        raise ConfigError(f"--channels {channels} contradicts {name}, whose images have {own_channels}")
    stored = torch.from_numpy(np.ascontiguousarray(images.reshape(len(images), *size, own_channels)))
    return make_set(
        name,
        ArraySource(stored.permute(0, 3, 1, 2).contiguous()),
        torch.from_numpy(labels.astype(np.int64)),
        [str(position) for position in range(len(images))],
        class_names,
        (own_channels, *size),
        flip=flip,
        holdout=holdout,
        fingerprint=fingerprint,
    )
