"""How the moments that a set of latents stores become what a model is trained on."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """How stored moments (B, K, C, H, W) become the latents that a model is trained on.

    kind          "logvar" or "std": K = 2, the mean and that; "sample": K = 1, a sample that was drawn once
    shift, scale  one for each channel: a model sees (z - shift) * scale
    """

    kind: str
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def is_drawn(self) -> bool:
        """Whether a sample is drawn in training."""
        return self.kind != "sample"

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents float32 (B, C, H, W): mean + std * noise, shifted and scaled; the mean without `noise`."""
        z = moments[:, 0].float()
        if noise is not None and self.is_drawn:
            spread = moments[:, 1].float()
            z = torch.addcmul(z, (0.5 * spread).exp_() if self.kind == "logvar" else spread, noise)
        shift, scale = (per_channel(values, z.device) for values in (self.shift, self.scale))
        return (z - shift) * scale


@functools.lru_cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 (C, 1, 1) on `device`; kept, since a copy to the device would make every step wait for it."""
    return torch.tensor(values, device=device).view(-1, 1, 1)
