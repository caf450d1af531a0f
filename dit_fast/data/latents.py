"""Sets of latents: what `dit-fast encode` wrote, read as it is needed, for training without the autoencoder.

A set stores the posterior of every image, not a sample of it, and of the mirrored image too, since the latent
of a mirrored image is not the mirrored latent. Which of the two a step takes, and the sample, are keyed draws
(`LatentStream`), so that no two epochs see the same latent and every run, on any number of ranks, draws the same.
"""

import functools
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from dit_fast.data.captions import caption_name, open_captions
from dit_fast.data.conditions import Captions, ToldSet, ToldSplit
from dit_fast.data.decode import Conversion
from dit_fast.data.images import (
    ImageSet,
    PixelSource,
    Split,
    count_shapes,
    describe_shapes,
    heldout_mask,
    to_pixels,
)
from dit_fast.data.rows import Rows, read_samples
from dit_fast.data.shards import (
    LABELS,
    MANIFEST,
    MANIFEST_CHECK,
    NAMES,
    TEXTS,
    digest_file,
    open_array,
    read_json,
    shard_name,
)
from dit_fast.data.stream import BatchStream
from dit_fast.data.unreadable import Unreadable, UnreadableError
from dit_fast.errors import ConfigError, DataError
from dit_fast.utils import keyed
from dit_fast.utils.files import MOST_LIST_BYTES, parse_json, read_bytes, read_npy
from dit_fast.utils.schema import array, require, text


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


class LatentSource(Protocol):
    """Where moments lie."""

    def read(self, members: Sequence[int], flips: Sequence[bool]) -> Tensor:
        """Moments (B, K, C, H, W) of samples `members`, mirrored where `flips` says so, as stored."""
        ...

    def where(self, member: int) -> str:
        """File, and place in it, of a sample, for messages."""
        ...


@dataclass(frozen=True)
class ShardSource:
    """The shards of a set, each (M, flips, 2, C, H, W), all but the last equally long."""

    shards: tuple[Rows, ...]

    def read(self, members: Sequence[int], flips: Sequence[bool]) -> Tensor:
        shards, first = self.shards, self.shards[0]
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


@dataclass(frozen=True)
class LatentSplit(ToldSplit):
    """Part of a set: `members` are the positions in the source, `labels` is int64 (N,); `buckets` as of `Split`."""

    source: LatentSource
    members: Tensor
    labels: Tensor
    sample_shape: tuple[int, int, int]
    posterior: Posterior
    lazy: bool = True
    buckets: Tensor | None = None
    captions: Captions | None = None
    unreadable: Unreadable = field(default_factory=Unreadable)

    def __len__(self) -> int:
        return len(self.members)

    def moments(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        """Moments (B, K, C, H, W) of samples `indices` (int64 (B,), positions in this split), as stored.

        `flip` is bool (B,): True takes the mirrored image's. Raises DataError for a value that is not finite.
        """
        members = self.members[indices].tolist()
        moments = self.source.read(members, [False] * len(members) if flip is None else flip.tolist())
        # The least and the greatest value are NaN where any value is: twelve times as fast as isfinite.
        if not torch.stack(moments.aminmax()).isfinite().all():
            bad = (~moments.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise UnreadableError(
                f"{self.source.where(members[bad[0]])}: the latent holds NaN or infinity ({len(bad)} of the "
                f"{len(members)} in this batch do); encode the set again",
                {members[row]: "NaN or infinity" for row in bad},
            )
        return moments

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        """Latents float32 (B, C, H, W) as a model sees them, at the posterior's mean."""
        return self.posterior.sample(self.moments(indices, flip))


@dataclass(frozen=True)
class LatentSet(ToldSet):
    """A labelled set of latents with its train and held-out split; stands where an `ImageSet` stands.

    `image_size` is the side of a latent, which is the model's input size, and `pixel_size` that of the images,
    None where the files do not tell. `flip`: whether the set holds mirrored images too. `vae` says which
    autoencoder made it. `fingerprint` is a SHA-256 of what the set is made of. `buckets`, `conversion`, `without`: as
    of `ImageSet`.
    """

    name: str
    image_size: int
    channels: int
    pixel_size: int | None
    class_names: tuple[str, ...]
    flip: bool
    holdout: float
    fingerprint: str
    posterior: Posterior
    vae: dict[str, Any]
    train: LatentSplit
    heldout: LatentSplit
    buckets: tuple[tuple[int, int], ...] = ()
    conversion: Conversion | None = None
    without: Callable[[Collection[str]], str] | None = None

    @property
    def shapes(self) -> dict[tuple[int, int], int]:
        """How many training latents have each of `buckets`; empty where there is one shape."""
        return count_shapes(self.buckets, self.train.buckets)

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts for a checkpoint's manifest. `image_size` is that of the images."""
        return {
            "name": self.name,
            "image_size": self.pixel_size,
            "latent_size": self.image_size,
            "channels": self.channels,
            "num_classes": self.num_classes,
            "num_train": len(self.train),
            "num_heldout": len(self.heldout),
            "holdout": self.holdout,
            "fingerprint": self.fingerprint,
            "posterior": self.posterior.kind,
            "shift": list(self.posterior.shift),
            "scale": list(self.posterior.scale),
            "vae": self.vae,
            **({} if self.conversion is None else {"pixels": self.conversion.describe()}),
            **describe_shapes(self.shapes),
            **self.describe_captions(),
        }


class LatentStream(BatchStream):
    """The stream of training batches of a latent set: (latents float32 (B, C, H, W), labels int64 (B,)).

    The sample of global sample number g = step * batch_size + position is drawn with the key (seed, "posterior", g):
    it depends on nothing else, so that a rank draws its own rows only and gets what one process would get. `read`
    gives the moments, from which `TrainStep` draws on its device, ahead of time on a thread of its own.
    """

    def __init__(self, split: LatentSplit, batch_size: int, seed: int, flip: bool):
        super().__init__(cast(Any, split), batch_size, seed, flip)
        self.latents = split

    def moments(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Moments (b, K, C, H, W) as stored, flips bool (b,) and `LatentSplit.told` of `rows` of a step."""
        indices = self.indices(step)[rows]
        flips = self.mirrored(step, rows)
        if flips is None:
            flips = torch.zeros(len(indices), dtype=torch.bool)
        moments, told = self.latents.take(indices, lambda chosen: self.latents.moments(chosen, flips))
        return moments, flips, told

    def noise(self, step: int, rows: slice = slice(None), shape: tuple[int, ...] | None = None) -> Tensor:
        """Standard normal float32 (b, *shape) for the posteriors of `rows` of a step, each (C, H, W)."""
        key = keyed.key(self.seed, "posterior")
        return keyed.normal(key, self.numbers(step, rows), shape or self.latents.sample_shape)

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Latents and labels of `rows` of a step."""
        moments, _, labels = self.moments(step, rows)
        posterior = self.latents.posterior
        noise = self.noise(step, rows, tuple(moments.shape[2:])) if posterior.is_drawn else None
        return posterior.sample(moments, noise), labels

    def stored(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        moments, _, labels = self.moments(step, rows)
        return moments, labels


def open_latents(
    folder: str | Path,
    *,
    num_classes: int | None = None,
    flip: bool | None = None,
    holdout: float | None = None,
    verify: bool = False,
    skip_unreadable: int = 0,
) -> LatentSet:
    """Open the set that `dit-fast encode` wrote to `folder`.

    num_classes  checked against the set when given; 0: no class is told
    flip         whether mirrored images are used; None: yes
    holdout      held-out fraction of each class; None: 0
    verify       compare every shard with its SHA-256, instead of sizes and shapes only
    skip_unreadable   latents that may turn out not to be finite, and are replaced then (`dit_fast.data.unreadable`)

    Raises DataError for a set that is unfinished, changed, damaged or empty, whose labels and latents disagree,
    and ConfigError for options that contradict it.
    """
    folder = Path(folder)
    try:
        manifest = read_json(folder / MANIFEST, MANIFEST_CHECK)
    except FileNotFoundError:
        raise DataError(
            f"{folder} is not a finished latent set: it has no {MANIFEST}; run dit-fast encode (again)"
        ) from None
    images, shards, shape, settings = _layout(folder, manifest)
    paths = tuple(folder / shard["file"] for shard in shards)
    rows = tuple(
        open_array(path, (shard["images"], *shape), settings["dtype"])
        for path, shard in zip(paths, shards, strict=True)
    )
    captions = open_captions(folder, manifest)
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
        if digest_file(path)["sha256"] != expected["sha256"]:
            raise DataError(
                f"{path} was changed or damaged: it does not match its SHA-256; encode the set again"
            )
    vae = manifest["vae"]
    return make_latent_set(
        str(folder),
        ShardSource(rows),
        torch.from_numpy(labels.astype(np.int64)),
        manifest["class_names"],
        shape[2:],
        Posterior("logvar", tuple(vae["shift"]), tuple(vae["scale"])),
        sample_ids=lambda: _names(folder / NAMES, images),
        flips=True,
        flip=flip,
        num_classes=num_classes,
        holdout=holdout,
        pixel_size=settings["image_size"],
        vae={key: vae[key] for key in ("name", "source", "sha256")},
        fingerprint=_fingerprint(shards, manifest["labels"]),
        captions=captions,
        lost=_lost(folder, manifest, images),
        conversion=Conversion.of(settings["pixels"]) if "pixels" in settings else None,
        skip_unreadable=skip_unreadable,
    )


def _lost(folder: Path, manifest: dict[str, Any], images: int) -> list[int]:
    """The rows of images that could not be read when the set was encoded: they hold NaN and are no members."""
    lost = manifest.get("unreadable", [])
    if not isinstance(lost, list) or not all(type(row) is int and 0 <= row < images for row in lost):
        raise DataError(f"{folder / MANIFEST}: unreadable is no list of rows; encode the set again")
    return lost


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
    lost: Sequence[int] = (),
    conversion: Conversion | None = None,
    skip_unreadable: int = 0,
    without: Callable[[Collection[str]], str] | None = None,
) -> LatentSet:
    """Check what every kind of set must hold, divide the samples into the two splits and return the set.

    `sample_shape` is (C, H, W); `sample_ids` is called only where samples are held out; `flips`: whether the
    source has mirrored images; `lost`: members that neither split has. Raises DataError and ConfigError as
    `open_latents`.
    """
    channels, height, width = sample_shape
    fraction = holdout or 0.0
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(
            f"--holdout {fraction} is not a fraction: give a number from 0 up to, not including, 1"
        )
    if flip and not flips:
        raise ConfigError(
            f"--flip: {name} holds no mirrored latents; leave it out or encode with dit-fast encode"
        )
    if num_classes not in (None, 0, len(class_names)):
        raise ConfigError(
            f"--num-classes {num_classes} contradicts {name}, which has {len(class_names)} classes"
        )
    if not len(labels):
        raise DataError(f"{name} holds no latents")
    if height != width:
        raise DataError(f"{name}: the latents are {height} x {width}; square ones are needed")
    if len(class_names) < 2 and captions is None and num_classes != 0:
        raise DataError(
            f"{name}: {len(class_names)} class found; class-conditional training needs at least 2 (--num-classes 0 "
            "trains without classes)"
        )
    outside = ((labels < 0) | (labels >= len(class_names))).nonzero().flatten()
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"{name}: label {int(labels[first])} of sample {first} ({source.where(first)}) is outside "
            f"0..{len(class_names) - 1} ({len(outside)} such labels in all)"
        )
    there = torch.ones(len(labels), dtype=torch.bool)
    there[list(lost)] = False
    held = torch.zeros(len(labels), dtype=torch.bool)
    if fraction:
        ids, rows = sample_ids(), there.nonzero().flatten()
        held[rows] = heldout_mask([ids[row] for row in rows.tolist()], labels[rows], fraction)

    register = Unreadable(skip_unreadable, source.where)

    def split(mask: Tensor) -> LatentSplit:
        members = (mask & there).nonzero().flatten()
        shape = (channels, height, width)
        return LatentSplit(
            source, members, labels[members], shape, posterior, captions=captions, unreadable=register
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


def _names(path: Path, images: int) -> list[str]:
    names: list[str] = parse_json(read_bytes(path, DataError, MOST_LIST_BYTES), str(path), DataError)
    require(names, array(text(), images), path, DataError)
    return names


def _layout(
    folder: Path, manifest: dict[str, Any]
) -> tuple[int, list[dict[str, Any]], tuple[int, ...], dict[str, Any]]:
    """Number of images, shards, shape of an image's moments and settings, if they fit together."""
    path = folder / MANIFEST
    try:
        images, shards, settings = manifest["images"], manifest["shards"], manifest["settings"]
        shape, counts = tuple(manifest["sample_shape"]), [shard["images"] for shard in shards]
        channels = len(manifest["vae"]["shift"]), len(manifest["vae"]["scale"])
        names = [shard["file"] for shard in shards]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not the manifest of a latent set: {error!r} is missing or wrong"
        ) from None
    if sum(counts) != images:
        raise DataError(f"{path}: the shards hold {sum(counts)} latents for {images} labels")
    if images == 0:
        raise DataError(f"{folder} holds no latents")
    if len(shape) != 5 or shape[:2] != (2, 2) or channels != (shape[2], shape[2]):
        raise DataError(
            f"{path}: sample shape {shape} with {channels} shifts and scales; expected (2, 2, C, H, W)"
        )
    if not all(manifest["vae"]["scale"]) or settings["image_size"] % shape[3]:
        raise DataError(
            f"{path}: scales {manifest['vae']['scale']}, and latents of {shape[3]}x{shape[4]} of images of "
            f"{settings['image_size']}x{settings['image_size']}"
        )
    if any(count != counts[0] for count in counts[:-1]) or names != [
        shard_name(i) for i in range(len(shards))
    ]:
        raise DataError(f"{path}: the shards are not {shard_name(0)}, ... of equal length")
    return images, shards, shape, settings


def _fingerprint(shards: Sequence[dict[str, Any]], labels: dict[str, Any]) -> str:
    digests = [*(shard["sha256"] for shard in shards), labels["sha256"]]
    digests += [shard["captions"]["sha256"] for shard in shards if "captions" in shard]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


class Encoder(Protocol):
    """What is asked of an autoencoder's encoder, see `dit_fast.encoders.autoencoder.LatentEncoder`."""

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
