"""Images to latents and back through the Stable Diffusion autoencoder of diffusers."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError
from dit_fast.interop.weight_file import first_line

LATENT_FACTOR = 8
"""Side of an image over that of its latents, of the Stable Diffusion autoencoders."""
SD_CHANNELS = 4
"""Channels of their latents."""
TILED_FROM = 128
"""Latents larger than this, images of more than 1024 pixels, are decoded in overlapping tiles, to bound the memory."""

_PUBLISHED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


class LatentDecoder:
    """The decoder of an AutoencoderKL: `name` is "ema", "mse" or a folder that diffusers wrote.

    `factor`: side of an image over that of its latents; `sha256`: of all weights, as in LatentEncoder. Weights are
    read from safetensors only. Raises
    MissingExtraError without diffusers, CheckpointError when the weights cannot be loaded and ConfigError when they
    expect other latents than `channels`.
    """

    def __init__(self, name: str, channels: int, device: torch.device | str = "cpu") -> None:
        vae = _load_autoencoder(name, "ema, mse, none, or a folder", "decodes")
        if vae.config.latent_channels != channels:
            raise ConfigError(
                f"--vae {name} has {vae.config.latent_channels} latent channels, the model makes {channels}"
            )
        self.factor = _factor(vae.config)
        self.shift, self.scale = _scaling(vae.config, channels)
        self.sha256 = weights_digest(vae.state_dict())
        self.vae = vae.to(device).eval()
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        shift: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Images float32 (M, 3, factor H, factor W) in about [-1, 1] on the CPU, of latents (M, C, H, W).

        shift, scale  of each channel: latents are (z - shift) * scale; None: as the autoencoder's configuration says,
                      0 and 0.18215 for Stable Diffusion's (Rombach et al. 2022, appendix)
        """
        large = max(latents.shape[-2:]) > TILED_FROM
        (self.vae.enable_tiling if large else self.vae.disable_tiling)()
        given = (shift or self.shift, scale or self.scale)
        add, divide = (torch.tensor(v, dtype=torch.float32, device=self.device).view(-1, 1, 1) for v in given)
        decoded = [
            self.vae.decode(part.to(self.device) / divide + add).sample.float().cpu()
            for part in latents.split(batch_size)
        ]
        return torch.cat(decoded)


class LatentEncoder:
    """The encoder of an AutoencoderKL: `name` is "ema", "mse" or a folder that diffusers wrote.

    `image_channels` and `latent_channels` are what it takes and makes, `factor` the side of an image over that
    of its latent. A model is trained on (z - shift) * scale, one `shift` and `scale` for each channel of z.
    `sha256` is of all weights, so that a renamed folder is the same autoencoder and a changed one is not.

    Errors as `LatentDecoder`; ConfigError for a dtype other than float32 and bfloat16.
    """

    def __init__(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            # The published encoder overflows float16 (its configuration says force_upcast).
            raise ConfigError(f"the autoencoder runs in float32 or bfloat16, not {dtype}")
        vae = _load_autoencoder(name, "ema, mse, or a folder", "encodes")
        config = vae.config
        self.name = name
        self.sha256 = weights_digest(vae.state_dict())
        self.image_channels = int(config.in_channels)
        self.latent_channels = int(config.latent_channels)
        self.factor = _factor(config)
        if self.image_channels not in (1, 3):
            raise ConfigError(
                f"--vae {name} takes images of {self.image_channels} channels; grey or RGB needed"
            )
        self.shift, self.scale = _scaling(config, self.latent_channels)
        self.device = torch.device(device)
        self.dtype = dtype
        # Only the encoding half goes to the device.
        self.encoder = vae.encoder.to(self.device, dtype).eval()
        self.quant_conv = None if vae.quant_conv is None else vae.quant_conv.to(self.device, dtype).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Posterior float32 (B, 2, C, H/f, W/f), mean then log-variance, of images (B, 3, H, W) in [-1, 1].

        The log-variance is kept within [-30, 20], as diffusers keeps it when it draws a sample.
        """
        moments = self.encoder(images.to(self.device, self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.float().chunk(2, dim=1)
        return torch.stack([mean, logvar.clamp(-30.0, 20.0)], dim=1)

    def identity(self) -> dict[str, Any]:
        """JSON-ready facts; two encoders with equal facts, `name` aside, make the same latents."""
        return {
            "name": self.name,
            "source": _PUBLISHED.get(self.name, self.name),
            "sha256": self.sha256,
            "latent_channels": self.latent_channels,
            "factor": self.factor,
            "shift": list(self.shift),
            "scale": list(self.scale),
        }


def _load_autoencoder(name: str, accepted: str, does: str) -> Any:
    """A diffusers AutoencoderKL on the CPU, in float32."""
    source = _PUBLISHED.get(name, name)
    published = source in _PUBLISHED.values()
    if not published and not Path(name).is_dir():
        raise ConfigError(f"--vae {name}: give {accepted} with a diffusers AutoencoderKL")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise MissingExtraError(
            f"diffusers, which {does} latents, is not installed; pip install 'dit-fast[vae]'"
        ) from error
    try:
        # The memory-saving loader wants a further package, accelerate, and is no use for 84 M parameters.
        return AutoencoderKL.from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        where = f"{source} (offline? give --vae a local folder)" if published else name
        raise CheckpointError(f"cannot load the autoencoder {where}: {first_line(error)}") from error


def _factor(config: Any) -> int:
    return 2 ** (len(config.block_out_channels) - 1)


def _scaling(config: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale of each channel: z -> (z - shift) * scale, as diffusers' pipelines apply them."""
    factor = float(config.scaling_factor)
    means, deviations = (config.get(key) for key in ("latents_mean", "latents_std"))
    if means is not None and deviations is not None:
        return tuple(map(float, means)), tuple(factor / float(deviation) for deviation in deviations)
    return (float(config.get("shift_factor") or 0.0),) * channels, (factor,) * channels


def weights_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
