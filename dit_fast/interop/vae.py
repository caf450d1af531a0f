"""Latents to images through the Stable Diffusion autoencoder of diffusers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError
from dit_fast.interop.weight_file import first_line

# Rombach et al. 2022, appendix: latents are scaled to unit variance by this factor.
LATENT_SCALE = 0.18215
LATENT_FACTOR = 8

_PUBLISHED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


class LatentDecoder:
    """The decoder of an AutoencoderKL: `name` is "ema", "mse" or a folder that diffusers wrote.

    Weights are read from safetensors only. Raises MissingExtraError without diffusers, CheckpointError when
    the weights cannot be loaded and ConfigError when they expect other latents than `channels`.
    """

    def __init__(self, name: str, channels: int, device: torch.device | str = "cpu") -> None:
        if name not in _PUBLISHED and not Path(name).is_dir():
            raise ConfigError(
                f"--vae {name}: give ema, mse, none, or a folder with a diffusers AutoencoderKL"
            )
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise MissingExtraError(
                "diffusers, which decodes latents, is not installed; pip install 'dit-fast[vae]'"
            ) from error
        try:
            # The memory-saving loader wants a further package, accelerate, and is no use for 84 M parameters.
            vae: Any = AutoencoderKL.from_pretrained(
                _PUBLISHED.get(name, name), use_safetensors=True, low_cpu_mem_usage=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            where = f"{_PUBLISHED[name]} (offline? give --vae a local folder)" if name in _PUBLISHED else name
            raise CheckpointError(f"cannot load the autoencoder {where}: {first_line(error)}") from error
        if vae.config.latent_channels != channels:
            raise ConfigError(
                f"--vae {name} has {vae.config.latent_channels} latent channels, the model makes {channels}"
            )
        self.vae = vae.to(device).eval()
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        """Images float32 (M, 3, 8 H, 8 W) in about [-1, 1] on the CPU, of latents (M, C, H, W)."""
        parts = latents.split(batch_size)
        decoded = [
            self.vae.decode(part.to(self.device) / LATENT_SCALE).sample.float().cpu() for part in parts
        ]
        return torch.cat(decoded)
