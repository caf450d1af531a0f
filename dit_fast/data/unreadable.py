"""Samples of a set that turn out to be unreadable while it is trained on, and what is read in their place.

A sample's place in the order, its label's class and every draw for it stay as they are; where its file cannot be read,
the next one of the same class and shape is read instead, in the order of the set and round its end. That follows from
the files alone, so that any number of ranks, and a run that continues, read the same.
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
    """Members of a set that cannot be read: `reasons` by their position in its source."""

    def __init__(self, message: str, reasons: Mapping[int, str] | None = None):
        super().__init__(message)
        self.reasons = dict(reasons or {})


class Unreadable:
    """The members of a set that could not be read, up to `allowed`; `name` gives what a member is called.

    reasons: of members, as found by this process. known: of names, also those of other ranks and of the run so far.
    """

    def __init__(self, allowed: int = 0, name: Callable[[int], str] = str):
        self.allowed = allowed
        self.name = name
        self.reasons: dict[int, str] = {}
        self.known: dict[str, str] = {}
        self._before = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock, which belongs to one process: a copy has its own."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def add(self, error: UnreadableError) -> None:
        """Note what cannot be read; raises `error`, saying what to do, where that is more than is allowed."""
        with self._lock:
            for member, reason in error.reasons.items():
                self.reasons.setdefault(member, reason)
                self.known.setdefault(self.name(member), reason)
            count = len(self.known)
        if count > self.allowed or not error.reasons:
            more = f" ({count} files so far)" if self.allowed else ""
            raise DataError(
                f"{error}; replace it, or leave it out with --skip-unreadable {count}{more}"
            ) from error
        logger.warning("%s; left out, %d of --skip-unreadable %d", error, count, self.allowed)

    def merge(self, known: Mapping[str, str]) -> None:
        """Take in what other ranks could not read."""
        with self._lock:
            self.known = {**known, **self.known}

    def continue_from(self, known: Mapping[str, str]) -> None:
        """Take in what the run could not read before it was continued; it may be mended now."""
        self.merge(known)
        self._before = len(known)

    @property
    def exceeded(self) -> bool:
        """Whether all ranks together, as far as `merge` was told, could not read more than is allowed."""
        return len(self.known) > max(self.allowed, self._before)

    def replace(self, indices: Tensor, members: Tensor, groups: Sequence[Tensor]) -> Tensor:
        """`indices` int64 (B,) of a split, with others in the place of those that cannot be read.

        members: int64 (N,), of the split's samples; groups: int64 (N,) each, equal for samples that may stand for each
        other. Raises DataError where none of them can be read.
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
