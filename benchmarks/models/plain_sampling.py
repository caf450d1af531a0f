"""Sampling as one writes it from the papers, the reference's structure: what the sampler's timings are relative to.

Every step evaluates the model on both halves of the batch, takes its coefficients from float64 tables of the host, and
draws and updates all 2n states. Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, equation 15, for the variance.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dit_fast.diffusion import SpacedDiffusion

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def plain_sampling(
    denoise: Denoise,
    diffusion: SpacedDiffusion,
    labels: Tensor,
    shape: tuple[int, ...],
    *,
    scale: float | None,
    null: int,
    seed: int,
) -> Tensor:
    """DDPM with a learned variance, (n, *shape) on the device of `labels` (n,), for `torch.manual_seed(seed)`.

    denoise(x, t, y): noise and variance (N, 2C, H, W) in float32. scale: of guidance on three channels, the null class
    being `null`; None: one evaluation of n states a step.
    """
    torch.manual_seed(seed)
    n, device = len(labels), labels.device
    x, y = torch.randn(n, *shape, device=device), labels
    if scale is not None:
        x, y = torch.cat([x, x]), torch.cat([labels, torch.full_like(labels, null)])

    def extract(table: np.ndarray, t: Tensor) -> Tensor:
        return torch.from_numpy(table).to(device)[t].float()[:, None, None, None] + torch.zeros_like(x)

    log_betas = np.log(diffusion.betas)
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.tensor([i] * len(x), device=device)
        inputs = x if scale is None else torch.cat([x[:n], x[:n]])
        out = denoise(inputs, torch.tensor(diffusion.timestep_map, device=device)[t], y)
        eps, fraction = out.chunk(2, dim=1)
        if scale is not None:
            conditional, unconditional = eps[:, :3].chunk(2)
            guided = unconditional + scale * (conditional - unconditional)
            eps = torch.cat([torch.cat([guided, guided]), eps[:, 3:]], dim=1)
        least, most = extract(diffusion.posterior_log_variance_clipped, t), extract(log_betas, t)
        fraction = (fraction + 1) / 2
        log_variance = fraction * most + (1 - fraction) * least
        data = (
            extract(diffusion.sqrt_recip_alphas_cumprod, t) * x
            - extract(diffusion.sqrt_recipm1_alphas_cumprod, t) * eps
        )
        mean = (
            extract(diffusion.posterior_mean_coef1, t) * data + extract(diffusion.posterior_mean_coef2, t) * x
        )
        later = (t != 0).float().view(-1, 1, 1, 1)
        x = mean + later * torch.exp(0.5 * log_variance) * torch.randn_like(x)
    return x[:n]
