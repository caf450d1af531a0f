"""What a run is measured by: model FLOPs, their share of the device's peak, memory, and losses that stand out.

FLOP convention: 3 x the forward pass (backward costs twice the forward), 2 FLOPs a multiply-add, of the linear layers,
the patch projection and attention's two products; elementwise work and recomputation are not credited. DiT-XL/2 at
256 px: 118.6 GMAC forward, 711.7 GFLOP an image. MFU is that over the dense bf16 peak of the device, in any precision.
"""

import resource
from collections import deque
from collections.abc import Mapping

import torch

from dit_fast.counting import mean_macs
from dit_fast.models import DiT

# Dense bf16 tensor-core peaks in FLOP/s of NVIDIA's data sheets; the first name that is part of the device's counts.
PEAKS = (
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200", 989e12), ("H800", 989e12),
    ("GH200", 989e12), ("B200", 2250e12), ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12),
)  # fmt: skip


def training_flops(
    model: DiT, caption_tokens: int = 1, shapes: Mapping[tuple[int, int], int] | None = None
) -> int:
    """Model FLOPs of training on one image, of several shapes on average (`mean_macs`)."""
    return 3 * 2 * mean_macs(model, caption_tokens, shapes)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on a CUDA device, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class SpikeDetector:
    """Losses that stand out: 10 times the greatest so far, or, once there are 10, twice the mean of the last 10.

    The first as Megatron-LM's rerun state machine, the second as Lightning's spike detection. Starts anew with a
    process.
    """

    WINDOW, OF_MEAN, OF_MAX = 10, 2.0, 10.0

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=self.WINDOW)
        self.greatest = 0.0

    def judge(self, loss: float) -> str | None:
        """Why this loss is a spike, or None; taken into the window either way: a new level is no spike."""
        reason = None
        if loss >= self.OF_MAX * self.greatest > 0:
            reason = f"{loss / self.greatest:.1f} times the greatest loss before"
        elif len(self.recent) == self.WINDOW:
            mean = sum(self.recent) / self.WINDOW
            if loss >= self.OF_MEAN * mean > 0:
                reason = f"{loss / mean:.1f} times the mean of the {self.WINDOW} before"
        self.greatest = max(self.greatest, loss)
        self.recent.append(loss)
        return reason
