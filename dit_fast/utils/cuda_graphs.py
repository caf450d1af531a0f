"""Captured trajectories: a CUDA graph for each kind of request, made once and replayed.

A graph reads and writes fixed memory. What it reads is copied there before each replay; what it returns is cloned, so
that a caller's tensor is never overwritten by a later replay.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

Replay = Callable[[], None]


class GraphBackend(Protocol):
    """What captures launches: `CudaGraphs`, or a stand-in of the tests."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why nothing can be captured on `device`; None where it can."""
        ...

    def pool(self) -> Any:
        """Memory that graphs replayed one after the other may share."""
        ...

    def capture(self, run: Callable[[], None], pool: Any) -> Replay:
        """Record what `run` launches, without its effects; the result launches it again."""
        ...


class CudaGraphs:
    """PyTorch's CUDA graphs."""

    def unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"there are no CUDA graphs on {device.type}"

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None], pool: Any) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay


Program = TypeVar("Program")


@dataclass
class GraphCache(Generic[Program]):
    """The captured programs of the last `most` keys; the least recently used one goes first."""

    most: int = 4

    def __post_init__(self) -> None:
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()
        self.captures = 0

    def get(self, key: Hashable, make: Callable[[], Program]) -> Program:
        """The program of `key`, made and kept if there is none."""
        if key not in self._programs:
            while len(self._programs) >= self.most:
                self._programs.popitem(last=False)
            self._programs[key] = make()
            self.captures += 1
        self._programs.move_to_end(key)
        return self._programs[key]

    def drop(self, key: Hashable) -> None:
        """Forget the program of `key`, if there is one."""
        self._programs.pop(key, None)

    def clear(self) -> None:
        """Forget all of them, and with them their memory."""
        self._programs.clear()
