"""The class or caption of each sample of a request, computed where it is read: a request may be of any number."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_fast import keyed


@dataclass(frozen=True)
class Labels:
    """Labels of `num` samples.

    Args:
        num: number of samples.
        rule: what the labels are, in words that are equal for equal labels.
        of: labels int64 (n,) of the samples with the numbers int64 (n,).
    """

    num: int
    rule: str
    of: Callable[[Tensor], Tensor]

    @classmethod
    def in_turn(cls, num: int, labels: list[int]) -> "Labels":
        """Each of `labels` in turn."""
        values = torch.tensor(labels)
        return cls(num, f"{labels} in turn", lambda numbers: values[numbers % len(values)])

    @classmethod
    def random(cls, num: int, seed: int, high: int) -> "Labels":
        """Random labels below `high`, a function of the seed and a sample's number."""
        key = keyed.key(seed, "sampling labels")
        return cls(num, f"random below {high}", lambda numbers: keyed.integers(key, numbers, high))

    def __len__(self) -> int:
        return self.num

    def first(self, most: int) -> Tensor:
        """Labels of the first `most` samples, or of all if there are fewer, int64 (n,)."""
        return self.of(torch.arange(min(most, self.num)))
