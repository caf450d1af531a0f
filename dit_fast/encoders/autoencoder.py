"""Latents of images, and images of latents, with the Stable Diffusion autoencoder of diffusers."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.checkpoint.hub import fetch_hub_model
from dit_fast.checkpoint.weight_file import read_diffusers_weights
from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError, NonFiniteError
from dit_fast.model.folder import load_weights
from dit_fast.utils.files import read_object
from dit_fast.utils.schema import array, fields, flag, integer, maybe, number, require, text
from dit_fast.utils.terminal import one_line

LATENT_FACTOR = 8
"""Downsampling factor of the Stable Diffusion autoencoders."""
SD_CHANNELS = 4
"""Latent channels of the Stable Diffusion autoencoders."""
TILED_FROM = 128
"""Latents larger than this (images above 1024 pixels) are decoded in overlapping tiles, to bound the memory."""

_CLASS_NAME = "AutoencoderKL"
_BY_LEVEL = ("block_out_channels", "down_block_types", "up_block_types")
_BY_CHANNEL = ("latents_mean", "latents_std")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_CONFIG = fields(
    {},
    {
        **{name: integer(1, 1 << 10) for name in ("in_channels", "out_channels", "latent_channels")},
        **{name: array(text()) for name in ("down_block_types", "up_block_types")},
        **{
            name: flag
            for name in ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
        },
        "block_out_channels": array(integer(1, 1 << 13)),
        "layers_per_block": integer(1, 1 << 6),
        "act_fn": text(),
        "norm_num_groups": integer(1, 1 << 13),
        "scaling_factor": number(1e-6, 1e6),
        "shift_factor": maybe(number(-1e6, 1e6)),
        "latents_mean": maybe(array(number(-1e6, 1e6))),
        "latents_std": maybe(array(number(1e-6, 1e6))),
    },
)
PUBLISHED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


class LatentDecoder:
    """Decoder of an AutoencoderKL.

    `factor` is its upsampling factor, `sha256` the digest of all weights, as in `LatentEncoder`.

    Args:
        name: "ema", "mse", or a folder of diffusers.
        channels: Latent channels of the model.
        device: Device of the decoder.

    Raises:
        MissingExtraError: diffusers is not installed.
        CheckpointError: The weights are missing, damaged, or do not fit their configuration.
        ConfigError: The decoder expects a different number of channels.
    """

    def __init__(self, name: str, channels: int, device: torch.device | str = "cpu") -> None:
        vae = _load_autoencoder(name, "ema, mse, none, or a folder", "decodes")
        if vae.config.latent_channels != channels:
            raise ConfigError(
                f"--vae {name} has {vae.config.latent_channels} latent channels, the model has {channels}"
            )
        if vae.config.out_channels not in (1, 3):
            raise ConfigError(
                f"--vae {name} produces images of {vae.config.out_channels} channels; grayscale or RGB needed"
            )
        self.name = name
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
        """Decode latents.

        Args:
            latents: (M, C, H, W), normalized as (z - shift) * scale.
            shift: Shift of each channel; None takes it from the autoencoder's configuration.
            scale: Scale of each channel; None takes it from the configuration, 0.18215 for Stable Diffusion (Rombach et
                al. 2022, appendix).
            batch_size: Latents decoded at once.

        Returns:
            Images float32 (M, 3, factor H, factor W) on the CPU, approximately in [-1, 1].

        Raises:
            NonFiniteError: Decoded images contain NaN or infinity.
        """
        large = max(latents.shape[-2:]) > TILED_FROM
        (self.vae.enable_tiling if large else self.vae.disable_tiling)()
        given = (shift or self.shift, scale or self.scale)
        add, divide = (torch.tensor(v, dtype=torch.float32, device=self.device).view(-1, 1, 1) for v in given)
        decoded = [
            self.vae.decode(part.to(self.device) / divide + add).sample.float().cpu()
            for part in latents.split(batch_size)
        ]
        images = torch.cat(decoded)
        # Minimum and maximum are NaN where any value is: one pass over the images instead of a mask.
        if len(images) and not torch.stack(images.aminmax()).isfinite().all():
            bad = int((~images.isfinite().flatten(1).all(1)).sum())
            raise NonFiniteError(
                f"--vae {self.name}: {bad} of {len(images)} decoded images contain NaN or infinity (latents from "
                f"{latents.min():g} to {latents.max():g}); check that it is the autoencoder of these latents"
            )
        # Grayscale images are repeated over three channels.
        return images.expand(-1, 3, -1, -1)


class LatentEncoder:
    """Encoder of an AutoencoderKL.

    Models are trained on (z - shift) * scale, with a `shift` and `scale` per channel of z. `image_channels` and
    `latent_channels` are its channels, `factor` is its downsampling factor. `sha256` is the digest of all weights: a
    renamed folder is the same autoencoder, a changed one is not.

    Args:
        name: "ema", "mse", or a folder of diffusers.
        device: Device of the encoder.
        dtype: float32 or bfloat16.

    Raises:
        MissingExtraError: diffusers is not installed.
        CheckpointError: The weights are missing, damaged, or do not fit their configuration.
        ConfigError: The dtype or the number of image channels is not supported.
    """

    def __init__(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            # The published encoder overflows in float16 (its configuration has force_upcast).
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
                f"--vae {name} takes images of {self.image_channels} channels; grayscale or RGB needed"
            )
        self.shift, self.scale = _scaling(config, self.latent_channels)
        self.device = torch.device(device)
        self.dtype = dtype
        # The decoder is not copied to the device.
        self.encoder = vae.encoder.to(self.device, dtype).eval()
        self.quant_conv = None if vae.quant_conv is None else vae.quant_conv.to(self.device, dtype).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            Posterior float32 (B, 2, C, H / factor, W / factor): mean and log-variance. The log-variance is clamped to
            [-30, 20], as in diffusers when it samples.
        """
        moments = self.encoder(images.to(self.device, self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.float().chunk(2, dim=1)
        return torch.stack([mean, logvar.clamp(-30.0, 20.0)], dim=1)

    def identity(self) -> dict[str, Any]:
        """JSON-serializable identity; encoders with equal values, except for `name`, compute the same latents."""
        return {
            "name": self.name,
            "source": PUBLISHED.get(self.name, self.name),
            "sha256": self.sha256,
            "latent_channels": self.latent_channels,
            "factor": self.factor,
            "shift": list(self.shift),
            "scale": list(self.scale),
        }


def _load_autoencoder(name: str, accepted: str, does: str) -> Any:
    """A diffusers AutoencoderKL on the CPU in float32, with every tensor from the file.

    Not loaded by diffusers' `from_pretrained`, which initializes missing tensors at random.
    """
    source = PUBLISHED.get(name, name)
    published = source in PUBLISHED.values()
    if not published and not Path(name).is_dir():
        raise ConfigError(f"--vae {name}: give {accepted} with a diffusers AutoencoderKL")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise MissingExtraError(
            f"diffusers, which {does} latents, is not installed; pip install 'dit-fast[vae]'"
        ) from error
    try:
        return _from_folder(AutoencoderKL, fetch_hub_model(source) if published else Path(name))
    except CheckpointError as error:
        raise CheckpointError(f"cannot load the autoencoder {source}: {error}") from error


def _from_folder(kind: Any, folder: Path) -> Any:
    """The autoencoder of class `kind` in a folder of diffusers; CheckpointError where it has none."""
    if (folder / "model_index.json").exists():
        raise CheckpointError(f"this is the folder of a pipeline; give {folder / 'vae'}")
    path = folder / "config.json"
    config = read_object(path, CheckpointError, what="a folder with a diffusers AutoencoderKL")
    if (found := config.get("_class_name", _CLASS_NAME)) != _CLASS_NAME:
        raise CheckpointError(f"{path} describes a diffusers {str(found)[:80]}, expected an {_CLASS_NAME}")
    require(config, _CONFIG, path, CheckpointError)
    _cross_check(config, path)
    file, state, _ = read_diffusers_weights(folder)
    try:
        with torch.device("meta"):
            vae = kind.from_config(config)
    except Exception as error:  # the constructor may raise anything for inconsistent numbers
        raise CheckpointError(f"{path}: no {_CLASS_NAME} can be built from it ({one_line(error)})") from error
    load_weights(vae, {_new_name(key): tensor for key, tensor in state.items()}, str(file), assign=True)
    if bad := [key for key, tensor in vae.state_dict().items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{file}: {bad[0]} contains NaN or infinity ({len(bad)} such tensors)")
    return vae


def _new_name(key: str) -> str:
    """Current name of a tensor; sd-vae-ft-ema has names of attention layers from the first releases of diffusers."""
    parts = key.split(".")
    if len(parts) > 3 and parts[-4] == "attentions" and parts[-2] in _OLD_ATTENTION:
        parts[-2] = _OLD_ATTENTION[parts[-2]]
    return ".".join(parts)


def _cross_check(config: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError where the lists of a configuration have inconsistent lengths."""
    # One entry per resolution level.
    levels = {name: len(config[name]) for name in _BY_LEVEL if name in config}
    channels = config.get("latent_channels", SD_CHANNELS)
    statistics = {name: len(config[name]) for name in _BY_CHANNEL if config.get(name) is not None}
    if len(set(levels.values())) > 1:
        raise CheckpointError(f"{path}: lists of different lengths: {levels}")
    if any(length != channels for length in statistics.values()):
        raise CheckpointError(f"{path}: statistics for other than {channels} channels: {statistics}")


def _factor(config: Any) -> int:
    # Every level but the last halves the resolution.
    return 2 ** (len(config.block_out_channels) - 1)


def _scaling(config: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale per channel, for (z - shift) * scale, as pipelines of diffusers apply them."""
    factor = float(config.scaling_factor)
    means, deviations = (config.get(key) for key in ("latents_mean", "latents_std"))
    if means is not None and deviations is not None:
        return tuple(map(float, means)), tuple(factor / float(deviation) for deviation in deviations)
    return (float(config.get("shift_factor") or 0.0),) * channels, (factor,) * channels


def check_autoencoder(name: str, vae: "LatentDecoder", data: Mapping[str, Any], source: str) -> None:
    """Check that an autoencoder fits the latents of a run.

    Args:
        name: Name of the autoencoder, for the message.
        vae: Its decoder.
        data: "data" of the run's manifest (`LatentSet.describe`); missing fields are not compared.
        source: The run, for the message.

    Raises:
        ConfigError: The factor, the shift or the scale differs.
    """
    pixels, side = data.get("image_size"), data.get("latent_size")
    problems = []
    if pixels and side and pixels != side * vae.factor:
        problems.append(
            f"its factor is {vae.factor}, the latents are {side}x{side} for images of {pixels}x{pixels}"
        )
    # A cache written by another program may have other statistics.
    if (data.get("vae") or {}).get("sha256"):
        for what, own in (("shift", vae.shift), ("scale", vae.scale)):
            stored = data.get(what, own)
            if len(stored) != len(own) or not np.allclose(stored, own, rtol=1e-4, atol=1e-6):
                problems.append(f"its {what} is {_shown(own)}, that of the latents {_shown(stored)}")
    if problems:
        raise ConfigError(
            f"--vae {name} is not the autoencoder of {source}: {'; '.join(problems)}; give the one that encoded the "
            "latents, or a version of it with another decoder"
        )


def _shown(values: Sequence[float]) -> str:
    numbers = [f"{value:.6g}" for value in values]
    return numbers[0] if len(set(numbers)) == 1 else ", ".join(numbers)


def weights_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of tensors, with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
