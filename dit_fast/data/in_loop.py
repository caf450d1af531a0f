"""Images that are encoded while they are trained on: no latents on disk, the encoder's forward pass for every batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_fast.data.images import ImageSet, PixelSource, Split, to_pixels
from dit_fast.data.latents import LatentSet, LatentSplit
from dit_fast.data.posterior import Posterior
from dit_fast.errors import ConfigError


class Encoder(Protocol):
    """What is asked of an autoencoder's encoder, see `dit_fast.interop.vae.LatentEncoder`."""

    name: str
    image_channels: int
    latent_channels: int
    factor: int
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor: ...

    def identity(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class EncodingSource:
    """Moments of images, or of mirrored images, by an encoder, as `dit-fast encode` stores them."""

    images: PixelSource
    encoder: Encoder
    name: Callable[[int], str]

    def read(self, members: Sequence[int], flips: Sequence[bool]) -> Tensor:
        pixels = to_pixels(self.images.read(members))
        mirrored = torch.tensor(flips, dtype=torch.bool).view(-1, 1, 1, 1)
        return self.encoder(torch.where(mirrored, pixels.flip(-1), pixels)).cpu()

    def where(self, member: int) -> str:
        return self.name(member)


def encode_in_loop(images: ImageSet, encoder: Encoder) -> LatentSet:
    """The set of the latents of `images`, made when they are read. Raises ConfigError for sizes that do not fit."""
    if images.channels != encoder.image_channels:
        raise ConfigError(
            f"--vae {encoder.name} takes images of {encoder.image_channels} channels, {images.name} has "
            f"{images.channels}"
        )
    flag = "--buckets" if images.buckets else "--image-size"
    for size in images.buckets or ((images.image_size,),):
        if any(side % encoder.factor for side in size):
            near = (encoder.factor * max(1, round(side / encoder.factor)) for side in size)
            raise ConfigError(
                f"{flag} {'x'.join(map(str, size))} is not a multiple of {encoder.factor}, which --vae {encoder.name} "
                f"shrinks images by: give {'x'.join(map(str, near))}"
            )
    side = images.image_size // encoder.factor
    posterior = Posterior("logvar", encoder.shift, encoder.scale)

    def split(part: Split) -> LatentSplit:
        height, width = (pixels // encoder.factor for pixels in part.sample_shape[1:])
        return LatentSplit(
            EncodingSource(part.source, encoder, part.unreadable.name),
            part.members,
            part.labels,
            (encoder.latent_channels, height, width),
            posterior,
            buckets=part.buckets,
            captions=part.captions,
            unreadable=part.unreadable,
        )

    identity = encoder.identity()
    return LatentSet(
        name=images.name,
        image_size=side,
        channels=encoder.latent_channels,
        pixel_size=images.image_size,
        class_names=images.class_names,
        flip=images.flip,
        holdout=images.holdout,
        fingerprint=images.fingerprint,
        conversion=images.conversion,
        without=images.without,
        posterior=posterior,
        vae={key: identity[key] for key in ("name", "source", "sha256")},
        train=split(images.train),
        heldout=split(images.heldout),
        buckets=tuple(
            (height // encoder.factor, width // encoder.factor) for height, width in images.buckets
        ),
    )
