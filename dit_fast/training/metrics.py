"""What a run is measured by: model FLOPs, their share of the device's peak, memory, and losses that stand out.

FLOP convention: 3 x the forward pass (backward costs twice the forward), 2 FLOPs a multiply-add, of the linear layers,
the patch projection and attention's two products; elementwise work and recomputation are not credited. DiT-XL/2 at
256 px: 118.6 GMAC forward, 711.7 GFLOP an image. MFU is that over the dense bf16 peak of the device, in any precision.
"""

import math
import resource
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from dit_fast.counting import mean_macs
from dit_fast.models import DiT
from dit_fast.training.step import BUCKETS, LEVELS, StepValues

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
    """Finds steps whose loss stands out from those before, by robust statistics of what timesteps do not explain.

    The loss of a sample is mostly a function of its timestep, over two orders of magnitude, and the mean over a small
    batch follows what was drawn. So each loss is compared with the mean of recent losses at the same noise (`LEVELS`
    parts of the timesteps, means of about the last 100 steps), and a step is judged by

        r = ln(sum of the batch's losses / sum of what its timesteps let expect).

    A step is a spike where r is above the median of the last 100 by 1.4826 * 5 median absolute deviations (five
    standard deviations of normal values) and by ln 1.5. A new level is no spike: r must be as far above the median
    of the last five. Until there are 50 steps, only ten times what is expected is one.

    A state of a few hundred numbers, which a checkpoint keeps: a continuation finds the same spikes.
    """

    WINDOW, FIRST, NEAR = 100, 50, 5
    DEVIATIONS, RATIO, FIRST_RATIO = 5.0, 1.5, 10.0
    KEPT = 0.99

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=self.WINDOW)
        self.sums = [0.0] * LEVELS
        self.counts = [0.0] * LEVELS

    def judge(self, value: StepValues) -> str | None:
        """Why the loss of this step is a spike, or None; taken into the statistics either way."""
        excess = self._excess(value)
        reason = None
        if excess is not None:
            recent = list(self.recent)
            middle, least = 0.0, math.log(self.FIRST_RATIO)
            if len(recent) >= self.FIRST:
                middle = median(recent)
                deviation = 1.4826 * median(abs(each - middle) for each in recent)
                middle = max(middle, median(recent[-self.NEAR :]))
                least = max(self.DEVIATIONS * deviation, math.log(self.RATIO))
            if excess - middle >= least:
                reason = f"{math.exp(excess - middle):.1f} times what its timesteps let expect"
            self.recent.append(excess)
        for part in range(LEVELS):
            self.sums[part] = self.KEPT * self.sums[part] + value.level_sums[part]
            self.counts[part] = self.KEPT * self.counts[part] + value.level_counts[part]
        return reason

    def _excess(self, value: StepValues) -> float | None:
        """r of this step, of the parts of the timesteps that were seen before; None where there is none."""
        found = expected = 0.0
        for part, (loss, count) in enumerate(zip(value.level_sums, value.level_counts, strict=True)):
            if count and self.counts[part]:
                found += loss
                expected += count * self.sums[part] / self.counts[part]
        return math.log(found / expected) if found > 0 and expected > 0 else None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "recent": list(self.recent),
            "sums": list(self.sums),
            "counts": list(self.counts),
        }

    def restore(self, state: dict[str, Any]) -> None:
        if len(state["sums"]) != LEVELS or len(state["counts"]) != LEVELS:
            raise ValueError(f"statistics of losses in {len(state['sums'])} parts, not {LEVELS}")
        self.recent = deque(state["recent"], maxlen=self.WINDOW)
        self.sums, self.counts = list(state["sums"]), list(state["counts"])


class Averages:
    """Sums over the steps since the last log line; a checkpoint keeps them, so that no line misses a step.

    Added one by one in the order of the steps, so that a sum does not depend on when it was looked at.
    """

    PLAIN = ("loss", "mse", "vb", "grad_norm")

    def __init__(self) -> None:
        self.count = 0
        self.sums = [0.0] * (len(self.PLAIN) + 2 * BUCKETS)
        self.loss_scale = 1.0

    def add(self, value: StepValues) -> None:
        """Take a step in; one that was left out because it was not finite does not count."""
        self.loss_scale = value.loss_scale
        if value.applied:
            self.count += 1
            values = (
                *(getattr(value, name) for name in self.PLAIN),
                *value.bucket_sums,
                *value.bucket_counts,
            )
            self.sums = [total + each for total, each in zip(self.sums, values, strict=True)]

    def means(self) -> dict[str, Any]:
        """loss, mse, vb, grad_norm (NaN where no step counts), loss_by_timestep."""
        plain, parts = self.sums[: len(self.PLAIN)], self.sums[len(self.PLAIN) :]
        by_timestep = zip(parts[:BUCKETS], parts[BUCKETS:], strict=True)
        return {
            **{
                name: total / self.count if self.count else math.nan
                for name, total in zip(self.PLAIN, plain, strict=True)
            },
            "loss_by_timestep": tuple(total / count if count else None for total, count in by_timestep),
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"count": self.count, "sums": list(self.sums), "loss_scale": self.loss_scale}

    def restore(self, state: dict[str, Any]) -> None:
        if len(state["sums"]) != len(self.sums):
            raise ValueError(f"{len(state['sums'])} sums, not {len(self.sums)}")
        self.count, self.sums = state["count"], list(state["sums"])
        self.loss_scale = state["loss_scale"]
