"""Labeled image sets in pixel space."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dit_fast.data.base import HOLDOUT, Captions, DataSet, DataSplit, check_labels, heldout_mask
from dit_fast.data.decode import Conversion
from dit_fast.data.unreadable import Unreadable, UnreadableError
from dit_fast.errors import ConfigError, DataError
from dit_fast.model.embedders import as_pair
from dit_fast.utils.values import check_memory


class PixelSource(Protocol):
    """Pixels of a set, in memory or in files that are decoded on demand."""

    @property
    def lazy(self) -> bool:
        """Whether `read` decodes files."""
        ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """Images `indices` as uint8 (B, C, H, W). Raises UnreadableError for those that cannot be read."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """Pixels in memory, uint8 (N, C, H, W); `unreadable` maps positions without pixels to the reason."""

    images: Tensor
    lazy: bool = False
    unreadable: Mapping[int, str] = field(default_factory=dict)

    def read(self, indices: Sequence[int]) -> Tensor:
        if reasons := {index: self.unreadable[index] for index in indices if index in self.unreadable}:
            raise UnreadableError("; ".join(reasons.values()), reasons)
        return self.images[torch.as_tensor(indices)]


@dataclass(frozen=True, kw_only=True)
class Split(DataSplit):
    """One split of an image set; `source` holds the pixels."""

    source: PixelSource

    @property
    def lazy(self) -> bool:
        """Whether a batch is read from files, so that reading ahead saves time."""
        return self.source.lazy or self.captions is not None

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        """Read samples of one shape.

        Args:
            indices: positions in this split, int64 (B,).
            flip: bool (B,); True mirrors that sample left to right.

        Returns:
            float32 (B, C, H, W) in [-1, 1].
        """
        pixels = to_pixels(self.source.read(self.members[indices].tolist()))
        if flip is not None:
            pixels = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return pixels


@dataclass(frozen=True, kw_only=True)
class ImageSet(DataSet):
    """A labeled image set; `channels` is 1 (grayscale) or 3 (RGB), `image_size` in pixels."""

    train: Split
    heldout: Split


def to_pixels(images: Tensor) -> Tensor:
    """Convert uint8 0..255 to float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def make_image_set(
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
    labeled: bool = True,
    unreadable: Unreadable | None = None,
    conversion: Conversion | None = None,
    without: Callable[[Collection[str]], str] | None = None,
) -> ImageSet:
    """Check the labels and divide the samples into the two splits.

    Args:
        name, class_names, flip, holdout, fingerprint, buckets, conversion, without: as of `DataSet`.
        source: pixels of all samples.
        labels: int64 (N,).
        sample_ids: a name for each sample, by which held-out samples are chosen.
        sample_shape: (C, H, W); with `buckets`, the shape of the first one.
        bucket_of: index of each sample's bucket, int64 (N,).
        captions: conditioning in place of the classes.
        labeled: False for images without class conditioning.
        unreadable: register of the members that could not be read.

    Raises:
        DataError: fewer than two classes without captions, a label outside 0..num_classes - 1 or a class without
            samples.
        ConfigError: a held-out fraction outside [0, 1).
    """
    HOLDOUT.check("--holdout", holdout)
    check_labels(name, labels, len(class_names), captions is None and labeled)
    counts = labels.bincount(minlength=len(class_names)).tolist()
    if empty := [class_name for class_name, count in zip(class_names, counts, strict=True) if count == 0]:
        raise DataError(f"{name}: {len(empty)} classes have no images: {', '.join(empty[:5])}")
    held = heldout_mask(sample_ids, labels, holdout)
    register = unreadable or Unreadable()

    def split(mask: Tensor) -> Split:
        members = mask.nonzero().flatten()
        return Split(
            source=source,
            members=members,
            labels=labels[members],
            sample_shape=sample_shape,
            buckets=None if bucket_of is None else bucket_of[members],
            captions=captions,
            unreadable=register,
        )

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
    """Create an image set from arrays.

    Args:
        name: name of the set, for messages and manifests.
        images: uint8 (N, H, W) grayscale or (N, H, W, 3) RGB.
        labels: integers (N,).
        class_names: name of each class.
        image_size: side or (height, width) of the samples; None keeps that of `images`.
        channels: expected number of channels; None accepts any.
        flip: whether images may be mirrored left to right in training.
        holdout: held-out fraction of each class.
        resize: resizes one image to (height, width); required where `image_size` differs from that of `images`.

    Raises:
        DataError: shapes, dtypes or labels that do not fit.
        ConfigError: `channels` or `holdout` contradict the images or are out of range.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise DataError(
            f"{name}: images are {images.dtype} {images.shape}; expected uint8 (N, H, W) or (N, H, W, 3)"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"{name}: labels are {labels.dtype} {labels.shape}; expected {len(images)} integers, one per image"
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
    return make_image_set(
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
