"""Step coefficients on the device: float64 on the host, one float32 table for each device that asks."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class DeviceTable:
    """A host array that is copied to each device once, and from then on only indexed there.

    A copy is made at the first use on a device; a CUDA graph must therefore be captured after a warm-up step.
    Copies stay out of pickles and deep copies, which make their own.
    """

    def __init__(self, array: NDArray[np.float64] | NDArray[np.int64], dtype: torch.dtype) -> None:
        self.array = array
        self.dtype = dtype
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The array as a tensor of `dtype` on `device`."""
        if device not in self._copies:
            # A tensor born in inference mode could not take part in a later training step.
            with torch.inference_mode(False):
                self._copies[device] = torch.from_numpy(self.array).to(dtype=self.dtype).to(device)
        return self._copies[device]

    def __getstate__(self) -> dict[str, object]:
        return {"array": self.array, "dtype": self.dtype, "_copies": {}}


class CoefficientTables:
    """Named coefficients of every timestep, gathered for a batch of timesteps by a single indexing.

    Args:
        columns: float64 arrays (steps,), one for each coefficient.

    The float32 table rounds each float64 entry once, so indexing it gives what indexing in float64 and
    rounding would.
    """

    def __init__(self, **columns: NDArray[np.float64]) -> None:
        self._column = {name: index for index, name in enumerate(columns)}
        self._table = DeviceTable(np.stack(list(columns.values()), axis=1), torch.float32)

    def at(self, t: Tensor, ndim: int, *names: str) -> list[Tensor]:
        """The coefficients `names` at timesteps `t` (N,), a float32 view (N, 1, ...) of `ndim` axes."""
        rows = self._table.on(t.device)[t]
        shape = (*t.shape, *(1,) * (ndim - t.dim()))
        return [rows[..., self._column[name]].view(shape) for name in names]
