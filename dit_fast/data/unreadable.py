"""Samples that turn out to be unreadable during training, and the samples that replace them.

A sample's place in the order, its class and every draw for it are unchanged. If its file cannot be read, the next
readable sample of the same class and shape is used instead, in the order of the set, cyclically. The replacement
depends only on which files are readable, so that it is the same on any number of ranks and in a resumed run.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import DataError

logger = logging.getLogger(__name__)


class UnreadableError(DataError):
    """Members of a set that cannot be read; `reasons` maps their positions in the source to the reason."""

    def __init__(self, message: str, reasons: Mapping[int, str] | None = None):
        super().__init__(message)
        self.reasons = dict(reasons or {})


def raise_unreadable(reasons: dict[int, str]) -> None:
    """Raise UnreadableError if there are `reasons`; a reason that several members share is named once."""
    if reasons:
        raise UnreadableError("; ".join(dict.fromkeys(reasons.values())), reasons)


class Unreadable:
    """Register of the members of a set that could not be read.

    Args:
        allowed: maximum number of unreadable files (`--skip-unreadable`).
        name: returns the name of a member.

    Attributes:
        reasons: reason by member, for the failures of this process.
        known: reason by name, also for the failures of other ranks and of the run before it was resumed.
    """

    def __init__(self, allowed: int = 0, name: Callable[[int], str] = str):
        self.allowed = allowed
        self.name = name
        self.reasons: dict[int, str] = {}
        self.known: dict[str, str] = {}
        self._before = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # A lock cannot be pickled; a copy gets its own.
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def add(self, error: UnreadableError) -> None:
        """Register the members of `error`.

        Raises:
            DataError: there are more than allowed; the message says how to proceed.
        """
        # The thread that reads ahead adds failures while the main thread reads the register at a checkpoint.
        with self._lock:
            for member, reason in error.reasons.items():
                self.reasons.setdefault(member, reason)
                self.known.setdefault(self.name(member), reason)
            count = len(self.known)
        if count > self.allowed or not error.reasons:
            more = f" ({count} files so far)" if self.allowed else ""
            raise DataError(
                f"{error}; replace it, or skip it with --skip-unreadable {count}{more}"
            ) from error
        logger.warning("%s; skipped, %d of --skip-unreadable %d", error, count, self.allowed)

    def merge(self, known: Mapping[str, str]) -> None:
        """Add the failures of other ranks, reason by name."""
        with self._lock:
            self.known = {**known, **self.known}

    def resume_from(self, known: Mapping[str, str]) -> None:
        """Add the failures of the run before it was resumed; the files may have been repaired since."""
        self.merge(known)
        self._before = len(known)

    @property
    def exceeded(self) -> bool:
        """Whether all ranks together, as far as `merge` knows, failed to read more files than allowed."""
        return len(self.known) > max(self.allowed, self._before)

    def replace(self, indices: Tensor, members: Tensor, groups: Sequence[Tensor]) -> Tensor:
        """Replace the samples that are known to be unreadable.

        Args:
            indices: positions in a split, int64 (B,).
            members: members of that split, int64 (N,).
            groups: int64 (N,) each; samples with equal values may replace each other.

        Returns:
            `indices` with replacements, int64 (B,).

        Raises:
            DataError: no sample of the group is readable.
        """
        chosen = members[indices].tolist()
        if not any(member in self.reasons for member in chosen):
            return indices
        replaced = indices.clone()
        for row, member in enumerate(chosen):
            if member in self.reasons:
                replaced[row] = self._next(int(indices[row]), members, groups)
        return replaced

    def _next(self, index: int, members: Tensor, groups: Sequence[Tensor]) -> int:
        alike = torch.ones(len(members), dtype=torch.bool)
        for group in groups:
            alike &= group == group[index]
        candidates = alike.nonzero().flatten().tolist()
        start = candidates.index(index)
        for candidate in [*candidates[start + 1 :], *candidates[:start]]:
            if int(members[candidate]) not in self.reasons:
                return candidate
        name = self.name(int(members[index]))
        raise DataError(f"{name} cannot be read, and no other image of its class and shape can: replace it")
