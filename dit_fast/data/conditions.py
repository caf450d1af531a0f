"""What a model is told of the samples of a set: the class of each, or its caption."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from dit_fast.data.unreadable import Unreadable, UnreadableError


class Captions(Protocol):
    """Embeddings of the captions of all members of a set, on disk."""

    @property
    def shape(self) -> tuple[int, int]:
        """(S, E)."""
        ...

    @property
    def encoder(self) -> dict[str, Any]:
        """What made them, see `dit_fast.data.captions.CaptionEncoder.identity`."""
        ...

    @property
    def texts(self) -> Sequence[str]:
        """Each caption in words, or the name of its image where only embeddings are kept."""
        ...

    def read(self, members: Sequence[int]) -> Tensor:
        """Embeddings (B, S, E) of `members`, as stored, padded with zeros."""
        ...


class ToldSplit:
    """Of a part of a set: `members`, `labels` int64 (N,), and `captions` of all members, None in a set of classes.

    buckets: int64 (N,), which of the set's shapes each sample has, None where there is one. unreadable: the members
    that could not be read so far.
    """

    members: Tensor
    labels: Tensor
    buckets: Tensor | None
    captions: Captions | None
    unreadable: Unreadable

    def told(self, indices: Tensor) -> Tensor:
        """What a model is told of samples `indices`: labels int64 (B,), or captions (B, S, E) as stored."""
        if self.captions is None:
            return self.labels[indices]
        return self.captions.read(self.members[indices].tolist())

    def take(self, indices: Tensor, read: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """`read` of samples `indices`, and what a model is told of them.

        What cannot be read is replaced (`dit_fast.data.unreadable`). Raises DataError where that is too much.
        """
        groups = [self.labels] if self.buckets is None else [self.labels, self.buckets]
        while True:
            chosen = self.unreadable.replace(indices, self.members, groups)
            try:
                return read(chosen), self.told(chosen)
            except UnreadableError as error:
                self.unreadable.add(error)


class ToldSet:
    """Of a set with `class_names` and a part `train`; a set of captions has one class, which no model is told."""

    class_names: tuple[str, ...]
    train: Any

    @property
    def unreadable(self) -> Unreadable:
        """The members that could not be read so far, of both parts."""
        register: Unreadable = self.train.unreadable
        return register

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def captions(self) -> Captions | None:
        """Of all members; None in a set of classes."""
        return self.train.captions

    @property
    def caption_tokens(self) -> int:
        """Tokens S of a caption, 0 in a set of classes."""
        return 0 if self.captions is None else self.captions.shape[0]

    @property
    def caption_dim(self) -> int:
        """Width E of a caption's tokens, 0 in a set of classes."""
        return 0 if self.captions is None else self.captions.shape[1]

    def describe_captions(self) -> dict[str, Any]:
        """What a manifest says of them; nothing of a set of classes."""
        return {} if self.captions is None else {"captions": self.captions.encoder}
