"""Latent sets: posteriors that `dit-fast encode` wrote, or that an autoencoder computes while images are read.

A set stores the posterior of every image, not a sample of it, and the posterior of the mirrored image too, because the
latent of a mirrored image is not the mirrored latent. Which of the two a step uses, and the sample, are keyed draws
(`LatentStream`): every epoch draws new latents, and every run, on any number of ranks, draws the same ones.
"""

import functools
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from dit_fast.data.base import HOLDOUT, Captions, DataSet, DataSplit, check_labels, heldout_mask
from dit_fast.data.captions import open_captions
from dit_fast.data.decode import Conversion
from dit_fast.data.images import ImageSet, PixelSource, Split, to_pixels
from dit_fast.data.rows import Rows, read_samples
from dit_fast.data.shards import (
    LABELS,
    MANIFEST,
    MANIFEST_CHECK,
    NAMES,
    TEXTS,
    caption_name,
    open_array,
    read_sealed,
    shard_name,
)
from dit_fast.data.stream import BatchStream
from dit_fast.data.unreadable import Unreadable, UnreadableError
from dit_fast.errors import ConfigError, DataError
from dit_fast.utils import keyed
from dit_fast.utils.files import MOST_LIST_BYTES, file_facts, read_json, read_npy
from dit_fast.utils.schema import array, require, text


@dataclass(frozen=True)
class Posterior:
    """Conversion of stored moments (B, K, C, H, W) to the latents that a model is trained on.

    Args:
        kind: meaning of the moments: "logvar" or "std", K = 2: the mean, and log-variance or standard deviation;
            "sample", K = 1: a sample that was drawn once.
        shift: one value per channel; the latents are (z - shift) * scale.
        scale: one value per channel.
    """

    kind: str
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def is_drawn(self) -> bool:
        """Whether training draws a sample, or uses the stored one."""
        return self.kind != "sample"

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw latents: mean + std * noise, shifted and scaled.

        Args:
            moments: (B, K, C, H, W), in the stored dtype.
            noise: standard normal (B, C, H, W); None returns the mean.

        Returns:
            float32 (B, C, H, W).
        """
        z = moments[:, 0].float()
        if noise is not None and self.is_drawn:
            spread = moments[:, 1].float()
            z = torch.addcmul(z, (0.5 * spread).exp_() if self.kind == "logvar" else spread, noise)
        shift, scale = (per_channel(values, z.device) for values in (self.shift, self.scale))
        return (z - shift) * scale


@functools.lru_cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`values` as float32 (C, 1, 1) on `device`; cached, because a copy to the device would stall every step."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


class LatentSource(Protocol):
    """Moments of the samples of a set, in files or computed when they are read."""

    def read(self, members: Sequence[int], flips: Sequence[bool]) -> Tensor:
        """Moments (B, K, C, H, W) of `members` in the stored dtype; of the mirrored image where `flips` is True."""
        ...

    def where(self, member: int) -> str:
        """File of a sample and its position there, for messages."""
        ...


@dataclass(frozen=True)
class ShardSource:
    """Moments in shards (M, flips, 2, C, H, W), of equal length M except the last."""

    shards: tuple[Rows, ...]

    def read(self, members: Sequence[int], flips: Sequence[bool]) -> Tensor:
        shards, first = self.shards, self.shards[0]
        # A row holds the moments of the plain image, then those of the mirrored one.
        length, width, orientation = len(first), first.width, first.width // first.shape[1]
        places = (
            (shard.file, shard.start + member % length * width + flip * orientation)
            for member, flip in zip(members, flips, strict=True)
            for shard in (shards[member // length],)
        )
        return read_samples(places, members, first.shape[2:], first.dtype)

    def where(self, member: int) -> str:
        shard, place = divmod(member, len(self.shards[0]))
        return f"{self.shards[shard].file.path}, image {place}"


@dataclass(frozen=True, kw_only=True)
class LatentSplit(DataSplit):
    """One split of a latent set.

    Args:
        source: moments of all samples.
        posterior: conversion of moments to latents.
        lazy: whether a batch is read from files.
    """

    source: LatentSource
    posterior: Posterior
    lazy: bool = True

    def moments(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        """Read moments.

        Args:
            indices: positions in this split, int64 (B,).
            flip: bool (B,); True selects the moments of the mirrored image.

        Returns:
            (B, K, C, H, W), in the stored dtype.

        Raises:
            UnreadableError: a sample cannot be read, or a value is not finite.
        """
        members = self.members[indices].tolist()
        moments = self.source.read(members, [False] * len(members) if flip is None else flip.tolist())
        # The minimum and maximum are NaN if any value is: twelve times as fast as isfinite on every value.
        if not torch.stack(moments.aminmax()).isfinite().all():
            bad = (~moments.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise UnreadableError(
                f"{self.source.where(members[bad[0]])}: the latent contains NaN or infinity ({len(bad)} of the "
                f"{len(members)} in this batch do); encode the set again",
                {members[row]: "NaN or infinity" for row in bad},
            )
        return moments

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        """Latents float32 (B, C, H, W) at the posterior's mean, as input of the model."""
        return self.posterior.sample(self.moments(indices, flip))


@dataclass(frozen=True, kw_only=True)
class LatentSet(DataSet):
    """A labeled set of latents; `image_size` and `channels` are those of the latents, the model's input.

    Args:
        pixel_size: side of the encoded images in pixels; None where the files do not specify it.
        posterior: conversion of moments to latents.
        vae: the autoencoder: name, source and SHA-256.
    """

    pixel_size: int | None
    posterior: Posterior
    vae: dict[str, Any]
    train: LatentSplit
    heldout: LatentSplit

    def describe(self) -> dict[str, Any]:
        """As `DataSet.describe`; `image_size` is that of the images, `latent_size` that of the latents."""
        return {
            **super().describe(),
            "image_size": self.pixel_size,
            "latent_size": self.image_size,
            "posterior": self.posterior.kind,
            "shift": list(self.posterior.shift),
            "scale": list(self.posterior.scale),
            "vae": self.vae,
        }


class LatentStream(BatchStream):
    """Training batches of a latent split; arguments as of `BatchStream`.

    The latent of global sample number g = step * batch_size + position is drawn with the key (seed, "posterior", g) and
    depends on nothing else: a rank draws only its own rows and gets those of one process. `read` yields moments, read
    ahead by a thread, and the training step draws latents from them on its own device.
    """

    def __init__(self, split: LatentSplit, batch_size: int, seed: int, flip: bool):
        super().__init__(cast(Any, split), batch_size, seed, flip)
        self.latents = split

    def moments(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Moments (b, K, C, H, W) in the stored dtype, flips bool (b,), and the conditioning of `rows` of a step."""
        indices = self.indices(step)[rows]
        flips = self.mirrored(step, rows)
        # Mirroring selects the stored moments of the mirrored image; the latents themselves are never flipped.
        if flips is None:
            flips = torch.zeros(len(indices), dtype=torch.bool)
        moments, conditioning = self.latents.take(indices, lambda chosen: self.latents.moments(chosen, flips))
        return moments, flips, conditioning

    def noise(self, step: int, rows: slice = slice(None), shape: tuple[int, ...] | None = None) -> Tensor:
        """Standard normal noise float32 (b, *shape) for the posteriors of `rows` of a step; `shape` is (C, H, W)."""
        key = keyed.key(self.seed, "posterior")
        return keyed.normal(key, self.numbers(step, rows), shape or self.latents.sample_shape)

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Latents float32 (b, C, H, W) and the conditioning of `rows` of a step."""
        moments, _, conditioning = self.moments(step, rows)
        posterior = self.latents.posterior
        noise = self.noise(step, rows, tuple(moments.shape[2:])) if posterior.is_drawn else None
        return posterior.sample(moments, noise), conditioning

    def stored(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Moments and conditioning of `rows` of a step, for the training step to draw latents from."""
        moments, _, conditioning = self.moments(step, rows)
        return moments, conditioning


def open_latents(
    folder: str | Path,
    *,
    num_classes: int | None = None,
    flip: bool | None = None,
    holdout: float | None = None,
    verify: bool = False,
    skip_unreadable: int = 0,
) -> LatentSet:
    """Open the latent set that `dit-fast encode` wrote to `folder`.

    Args:
        folder: the folder.
        num_classes: expected number of classes; 0 for a model without class conditioning; None accepts any.
        flip: whether latents of mirrored images are used; None: yes.
        holdout: held-out fraction of each class; None: 0.
        verify: compare every shard with its SHA-256, not only sizes and shapes.
        skip_unreadable: number of latents that may not be finite; they are replaced (`dit_fast.data.unreadable`).

    Raises:
        DataError: the set is unfinished, changed, damaged or empty, or its labels and latents disagree.
        ConfigError: options that contradict the set.
    """
    folder = Path(folder)
    try:
        manifest = read_sealed(folder / MANIFEST, MANIFEST_CHECK)
    except FileNotFoundError:
        raise DataError(
            f"{folder} is not a finished latent set: it has no {MANIFEST}; run dit-fast encode (again)"
        ) from None
    _check_layout(folder / MANIFEST, manifest)
    images, shards, settings, vae = (manifest[key] for key in ("images", "shards", "settings", "vae"))
    shape = manifest["sample_shape"]
    paths = tuple(folder / shard["file"] for shard in shards)
    rows = tuple(
        open_array(path, (shard["images"], *shape), settings["dtype"])
        for path, shard in zip(paths, shards, strict=True)
    )
    captions = open_captions(folder, manifest)
    # Its size, shape and dtype first, so that no more is read than a file of labels can hold.
    open_array(folder / LABELS, (images,), "int64")
    labels = read_npy(folder / LABELS, DataError)
    checked = [(folder / LABELS, manifest["labels"])]
    if verify:
        checked += [(folder / NAMES, manifest["names"]), *zip(paths, shards, strict=True)]
        checked += [
            (folder / caption_name(i), s["captions"]) for i, s in enumerate(shards) if captions is not None
        ]
        checked += [(folder / TEXTS, manifest["texts"])] if "texts" in manifest else []
    for path, expected in checked:
        if file_facts(path, DataError)["sha256"] != expected["sha256"]:
            raise DataError(
                f"{path} was changed or damaged: it does not match its SHA-256; encode the set again"
            )
    return make_latent_set(
        str(folder),
        ShardSource(rows),
        torch.from_numpy(labels.astype(np.int64)),
        manifest["class_names"],
        shape[2:],
        Posterior("logvar", tuple(vae["shift"]), tuple(vae["scale"])),
        sample_ids=lambda: _read_names(folder / NAMES, images),
        flips=True,
        flip=flip,
        num_classes=num_classes,
        holdout=holdout,
        pixel_size=settings["image_size"],
        vae={key: vae[key] for key in ("name", "source", "sha256")},
        fingerprint=_fingerprint(shards, manifest["labels"]),
        captions=captions,
        # Rows of images that could not be read when the set was encoded; they contain NaN.
        excluded=manifest.get("unreadable", ()),
        conversion=Conversion.of(settings["pixels"]) if "pixels" in settings else None,
        skip_unreadable=skip_unreadable,
    )


def _check_layout(path: Path, manifest: dict[str, Any]) -> None:
    """Raise DataError where facts of the manifest contradict each other; `MANIFEST_CHECK` checked their types."""
    shape, shards, vae = manifest["sample_shape"], manifest["shards"], manifest["vae"]
    counts = [shard["images"] for shard in shards]
    if sum(counts) != manifest["images"]:
        raise DataError(f"{path}: the shards hold {sum(counts)} latents for {manifest['images']} labels")
    if not sum(counts):
        raise DataError(f"{path.parent} holds no latents")
    channels = len(vae["shift"]), len(vae["scale"])
    if shape[:2] != [2, 2] or channels != (shape[2], shape[2]):
        raise DataError(
            f"{path}: sample shape {tuple(shape)} with {channels} shifts and scales; expected (2, 2, C, H, W)"
        )
    side = manifest["settings"]["image_size"]
    if not all(vae["scale"]) or side % shape[3]:
        raise DataError(
            f"{path}: scales {vae['scale']}, and latents of {shape[3]}x{shape[4]} for images of {side}x{side}"
        )
    names = [shard["file"] for shard in shards]
    if any(count != counts[0] for count in counts[:-1]) or names != list(map(shard_name, range(len(shards)))):
        raise DataError(f"{path}: the shards are not {shard_name(0)}, ... of equal length")
    if any(row >= manifest["images"] for row in manifest.get("unreadable", ())):
        raise DataError(f"{path}: unreadable lists rows that the set does not have; encode the set again")


def _read_names(path: Path, images: int) -> list[str]:
    names: list[str] = read_json(path, DataError, MOST_LIST_BYTES)
    require(names, array(text(), images), path, DataError)
    return names


def _fingerprint(shards: Sequence[dict[str, Any]], labels: dict[str, Any]) -> str:
    digests = [*(shard["sha256"] for shard in shards), labels["sha256"]]
    digests += [shard["captions"]["sha256"] for shard in shards if "captions" in shard]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def make_latent_set(
    name: str,
    source: LatentSource,
    labels: Tensor,
    class_names: Sequence[str],
    sample_shape: Sequence[int],
    posterior: Posterior,
    *,
    sample_ids: Callable[[], Sequence[str]],
    flips: bool,
    flip: bool | None,
    num_classes: int | None,
    holdout: float | None,
    pixel_size: int | None,
    vae: dict[str, Any],
    fingerprint: str,
    captions: Captions | None = None,
    excluded: Sequence[int] = (),
    conversion: Conversion | None = None,
    skip_unreadable: int = 0,
    without: Callable[[Collection[str]], str] | None = None,
) -> LatentSet:
    """Check what every kind of latent set must hold, and divide the samples into the two splits.

    Args:
        name, class_names, posterior, pixel_size, vae, fingerprint, conversion, without: as of `LatentSet`.
        source: moments of all samples.
        labels: int64 (N,).
        sample_shape: (C, H, W) of a latent.
        sample_ids: returns a name for each sample; called only if samples are held out.
        flips: whether the source has latents of mirrored images.
        flip, num_classes, holdout, skip_unreadable: as of `open_latents`.
        captions: conditioning in place of the classes.
        excluded: members that are in neither split.

    Raises:
        DataError, ConfigError: as `open_latents`.
    """
    channels, height, width = sample_shape
    fraction = HOLDOUT.check("--holdout", holdout or 0.0)
    if flip and not flips:
        raise ConfigError(
            f"--flip: {name} has no latents of mirrored images; remove it, or encode with dit-fast encode"
        )
    if num_classes not in (None, 0, len(class_names)):
        raise ConfigError(
            f"--num-classes {num_classes} contradicts {name}, which has {len(class_names)} classes"
        )
    if not len(labels):
        raise DataError(f"{name} holds no latents")
    if height != width:
        raise DataError(f"{name}: the latents are {height} x {width}; square ones are required")
    check_labels(name, labels, len(class_names), captions is None and num_classes != 0, source.where)
    # Ids of excluded rows take no part in the choice: the split is that of a set without them.
    there = torch.ones(len(labels), dtype=torch.bool)
    there[list(excluded)] = False
    held = torch.zeros(len(labels), dtype=torch.bool)
    if fraction:
        ids, rows = sample_ids(), there.nonzero().flatten()
        held[rows] = heldout_mask([ids[row] for row in rows.tolist()], labels[rows], fraction)
    register = Unreadable(skip_unreadable, source.where)

    def split(mask: Tensor) -> LatentSplit:
        members = (mask & there).nonzero().flatten()
        return LatentSplit(
            source=source,
            members=members,
            labels=labels[members],
            sample_shape=(channels, height, width),
            posterior=posterior,
            captions=captions,
            unreadable=register,
        )

    return LatentSet(
        name=name,
        image_size=height,
        channels=channels,
        pixel_size=pixel_size,
        class_names=tuple(class_names),
        flip=flips if flip is None else flip,
        holdout=fraction,
        fingerprint=fingerprint,
        posterior=posterior,
        vae=vae,
        train=split(~held),
        heldout=split(held),
        conversion=conversion,
        without=without,
    )


class Encoder(Protocol):
    """Interface of an autoencoder's encoder, see `dit_fast.encoders.autoencoder.LatentEncoder`."""

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
    """Moments that an encoder computes from images when they are read, equal to those that `encode` stores."""

    images: PixelSource
    encoder: Encoder
    name: Callable[[int], str]

    def read(self, members: Sequence[int], flips: Sequence[bool]) -> Tensor:
        pixels = to_pixels(self.images.read(members))
        # Flipped before encoding, because the latent of a mirrored image is not the mirrored latent.
        mirrored = torch.tensor(flips, dtype=torch.bool).view(-1, 1, 1, 1)
        return self.encoder(torch.where(mirrored, pixels.flip(-1), pixels)).cpu()

    def where(self, member: int) -> str:
        return self.name(member)


def latents_as_pixels(latents: Tensor) -> Tensor:
    """Three channels of latents (N, C, H, W), or one, in about [-1, 1]: their variance is 1, most lie within 3."""
    return latents[:, :3] / 3 if latents.shape[1] >= 3 else latents[:, :1] / 3


def encode_in_loop(images: ImageSet, encoder: Encoder) -> LatentSet:
    """A latent set that encodes `images` when they are read.

    Args:
        images: the image set.
        encoder: encoder of an autoencoder.

    Raises:
        ConfigError: channels or sizes of the images do not fit the autoencoder.
    """
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
                f"{flag} {'x'.join(map(str, size))} is not a multiple of {encoder.factor}, the downsampling factor of "
                f"--vae {encoder.name}: give {'x'.join(map(str, near))}"
            )
    side = images.image_size // encoder.factor
    posterior = Posterior("logvar", encoder.shift, encoder.scale)

    # The register of unreadable members is that of the images: both sets count the same files.
    def split(part: Split) -> LatentSplit:
        height, width = (pixels // encoder.factor for pixels in part.sample_shape[1:])
        return LatentSplit(
            source=EncodingSource(part.source, encoder, part.unreadable.name),
            members=part.members,
            labels=part.labels,
            sample_shape=(encoder.latent_channels, height, width),
            posterior=posterior,
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
