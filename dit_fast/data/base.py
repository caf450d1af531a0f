"""Base classes of data sets: what the trainer requires of images and latents alike.

A set has two splits, `train` and `heldout`; a held-out sample is never trained on. A sample has a class label or, in a
set with captions, the embedding of a caption.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_fast.data.decode import Conversion
from dit_fast.data.unreadable import Unreadable, UnreadableError
from dit_fast.errors import DataError
from dit_fast.utils.values import Number

HOLDOUT = Number(0, 1, below=True)
"""Range of the held-out fraction."""


class Captions(Protocol):
    """Embeddings of the captions of all members of a set, stored on disk."""

    @property
    def shape(self) -> tuple[int, int]:
        """(S, E): tokens per caption and their width."""
        ...

    @property
    def encoder(self) -> dict[str, Any]:
        """Identity of the text encoder, see `dit_fast.data.captions.CaptionEncoder.identity`."""
        ...

    @property
    def texts(self) -> Sequence[str]:
        """The text of each caption, or the name of its image where only embeddings are stored."""
        ...

    def read(self, members: Sequence[int]) -> Tensor:
        """Embeddings (B, S, E) of `members` in the stored dtype, padded with zeros."""
        ...


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """One split of a data set.

    Args:
        members: positions of the samples in the source, int64 (N,).
        labels: class labels, int64 (N,).
        sample_shape: (C, H, W); with `buckets`, the shape of the first bucket.
        buckets: index of each sample's bucket, int64 (N,); None where all samples have one shape.
        captions: captions of all members; None in a set of classes.
        unreadable: register of the members that could not be read so far.
    """

    members: Tensor
    labels: Tensor
    sample_shape: tuple[int, int, int]
    buckets: Tensor | None = None
    captions: Captions | None = None
    unreadable: Unreadable = field(default_factory=Unreadable)

    def __len__(self) -> int:
        return len(self.members)

    def conditioning(self, indices: Tensor) -> Tensor:
        """The conditioning of samples `indices`: labels int64 (B,), or captions (B, S, E) in the stored dtype."""
        if self.captions is None:
            return self.labels[indices]
        return self.captions.read(self.members[indices].tolist())

    def take(self, indices: Tensor, read: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Read samples and their conditioning; unreadable samples are replaced (`dit_fast.data.unreadable`).

        Args:
            indices: positions in this split, int64 (B,).
            read: returns the samples at the positions that it is given.

        Returns:
            the samples, and their conditioning as `conditioning` returns it.

        Raises:
            DataError: more samples are unreadable than the register allows.
        """
        groups = [self.labels] if self.buckets is None else [self.labels, self.buckets]
        # Each pass registers at least one member more, or raises: the loop ends.
        while True:
            chosen = self.unreadable.replace(indices, self.members, groups)
            try:
                return read(chosen), self.conditioning(chosen)
            except UnreadableError as error:
                self.unreadable.add(error)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A labeled data set with its train and held-out split. A set with captions has one class.

    Args:
        name: the name or path that it was opened with.
        image_size: side of the samples that the model is trained on, in pixels or latents; with `buckets`, the height
            of the first one.
        channels: channels of those samples.
        class_names: name of each class.
        flip: whether samples may be mirrored left to right in training.
        holdout: held-out fraction of each class.
        fingerprint: SHA-256 of what the set was made from.
        train: samples for training.
        heldout: samples that are never trained on.
        buckets: (height, width) of each bucket; empty where all samples have one shape.
        conversion: how files were converted to pixels; None where there are no files.
        without: returns the fingerprint of the set without the samples of the given names; None where unknown.
    """

    name: str
    image_size: int
    channels: int
    class_names: tuple[str, ...]
    flip: bool
    holdout: float
    fingerprint: str
    train: Any
    heldout: Any
    buckets: tuple[tuple[int, int], ...] = ()
    conversion: Conversion | None = None
    without: Callable[[Collection[str]], str] | None = None

    @property
    def unreadable(self) -> Unreadable:
        """Register of the members that could not be read so far, shared by both splits."""
        register: Unreadable = self.train.unreadable
        return register

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def captions(self) -> Captions | None:
        """Captions of all members; None in a set of classes."""
        captions: Captions | None = self.train.captions
        return captions

    @property
    def caption_tokens(self) -> int:
        """Tokens S per caption; 0 in a set of classes."""
        return 0 if self.captions is None else self.captions.shape[0]

    @property
    def caption_dim(self) -> int:
        """Width E of a caption's tokens; 0 in a set of classes."""
        return 0 if self.captions is None else self.captions.shape[1]

    @property
    def shapes(self) -> dict[tuple[int, int], int]:
        """Number of training samples per bucket; empty where all samples have one shape."""
        if self.train.buckets is None:
            return {}
        counts = self.train.buckets.bincount(minlength=len(self.buckets)).tolist()
        return dict(zip(self.buckets, counts, strict=True))

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts for a checkpoint's manifest; equal if and only if the training samples are equal."""
        facts: dict[str, Any] = {
            "name": self.name,
            "image_size": self.image_size,
            "channels": self.channels,
            "num_classes": self.num_classes,
            "num_train": len(self.train),
            "num_heldout": len(self.heldout),
            "holdout": self.holdout,
            "fingerprint": self.fingerprint,
        }
        if self.conversion is not None:
            facts["pixels"] = self.conversion.describe()
        if shapes := self.shapes:
            facts |= {
                "buckets": [list(size) for size in shapes],
                "bucket_images": list(shapes.values()),
            }
        if self.captions is not None:
            facts["captions"] = self.captions.encoder
        return facts


def check_labels(
    name: str, labels: Tensor, num_classes: int, conditional: bool, where: Callable[[int], str] | None = None
) -> None:
    """Check the labels of a set.

    Args:
        name: name of the set, for messages.
        labels: int64 (N,).
        num_classes: number of classes.
        conditional: whether the model is conditioned on the classes.
        where: returns file and position of a sample, for messages.

    Raises:
        DataError: fewer than two classes to condition on, or a label outside 0..num_classes - 1.
    """
    if num_classes < 2 and conditional:
        raise DataError(
            f"{name}: {num_classes} class found; class-conditional training needs at least 2 (--num-classes 0 "
            "trains without classes)"
        )
    outside = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(outside):
        first = int(outside[0])
        place = "" if where is None else f" ({where(first)})"
        raise DataError(
            f"{name}: label {int(labels[first])} of sample {first}{place} is outside 0..{num_classes - 1} "
            f"({len(outside)} such labels in total)"
        )


def heldout_mask(sample_ids: Sequence[str], labels: Tensor, fraction: float) -> Tensor:
    """Choose the held-out samples: round(fraction * n) of the n samples of each class.

    Samples are ranked by a hash of their id, so that the choice depends neither on a run's seed nor on the order of the
    samples. At least one sample of each class stays in the training split.

    Args:
        sample_ids: a name for each of the N samples.
        labels: int64 (N,).
        fraction: held-out fraction of each class, in [0, 1).

    Returns:
        bool (N,), True for held-out samples.
    """
    # File names need not be UTF-8: Python represents their other bytes as surrogates.
    rank = [hashlib.sha256(sample_id.encode(errors="surrogateescape")).digest() for sample_id in sample_ids]
    mask = torch.zeros(len(sample_ids), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten().tolist()
        members.sort(key=rank.__getitem__)
        mask[members[: min(round(fraction * len(members)), len(members) - 1)]] = True
    return mask
