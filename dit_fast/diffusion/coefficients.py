"""Step coefficients on the device: float64 on the host, one float32 table for each device that asks."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class DeviceTable:
    """A host tensor that is copied to each device once, and from then on only indexed there.

    A copy is made at the first use on a device; a CUDA graph must therefore be captured after a warm-up step.
    Copies stay out of pickles and deep copies, which make their own.
    """

    def __init__(self, host: Tensor) -> None:
        self._host = host
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The table as a tensor on `device`."""
        if device not in self._copies:
            self._copies[device] = self._host.to(device)
        return self._copies[device]

    def __getstate__(self) -> dict[str, object]:
        return {"_host": self._host, "_copies": {}}


class CoefficientTables:
    """Named coefficients of every timestep, gathered for a batch of timesteps by a single indexing.

    Args:
        columns: float64 arrays (steps,), one for each coefficient.

    The float32 table rounds each float64 entry once: indexing it gives what indexing in float64 and rounding
    would.
    """

    def __init__(self, **columns: NDArray[np.float64]) -> None:
        self._column = {name: index for index, name in enumerate(columns)}
        self._table = DeviceTable(torch.from_numpy(np.stack(list(columns.values()), axis=1)).float())

    def at(self, t: Tensor, ndim: int, *names: str) -> list[Tensor]:
        """The coefficients `names` at timesteps `t` (N,), each a float32 view (N, 1, ...)."""
        rows = self._table.on(t.device)[t]
        shape = (*t.shape, *(1,) * (ndim - t.dim()))
        return [rows[..., self._column[name]].view(shape) for name in names]
