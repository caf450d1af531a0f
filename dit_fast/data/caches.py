"""Latent caches of other DiT codebases, opened as latent sets.

    fast-DiT      imagenet256_features/N.npy (1, C, H, W), one scaled sample each, and imagenet256_labels/N.npy (1,)
    REPA          vae-sd/**/*.npy (2 C, H, W), mean and standard deviation, and vae-sd/dataset.json with
                  {"labels": [[name, label], ...]} (the layout of EDM2)
    LightningDiT  *.safetensors with latents, latents_flip and labels, and latents_stats.pt with mean and std

The layouts are those of the projects' code and documentation. Only tensors are unpickled (`read_weight_file`).
"""

import hashlib
import os
import struct
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from dit_fast.checkpoint.weight_file import read_weight_file
from dit_fast.data.image_files import name_some
from dit_fast.data.latents import LatentSet, Posterior, make_latent_set
from dit_fast.data.rows import FileBytes, Rows, open_tensors, raise_unreadable, read_samples
from dit_fast.errors import CheckpointError, DataError
from dit_fast.utils.files import MOST_LIST_BYTES, check_file, open_file, parse_json, read_json, read_npy

# Scale of the latents of the Stable Diffusion autoencoders (Rombach et al. 2022, arXiv:2112.10752), and their
# downsampling factor.
_SD_SCALE = 0.18215
_SD_FACTOR = 8
# Threads that read one small file per label: the time is latency, not throughput.
_READERS = 16
_REPA_FOLDER = "vae-sd"
_REPA_LABELS = "dataset.json"
_STATISTICS = "latents_stats.pt"


def recognize(folder: Path) -> str | None:
    """Detect a cache by its files: "fast-DiT", "REPA" or "LightningDiT"; None for any other folder."""
    if (folder / _REPA_LABELS).is_file() or (folder / _REPA_FOLDER / _REPA_LABELS).is_file():
        return "REPA"
    if any(folder.glob("*.safetensors")):
        return "LightningDiT"
    if any(path.is_dir() for path in folder.glob("*_features")) and any(folder.glob("*_labels")):
        return "fast-DiT"
    return None


def open_cache(
    folder: str | Path,
    *,
    num_classes: int | None = None,
    flip: bool | None = None,
    holdout: float | None = None,
    skip_unreadable: int = 0,
) -> LatentSet:
    """Open the latent cache in `folder`, of any of the three projects.

    Args:
        folder: folder of the cache.
        num_classes: number of classes; None: the greatest label + 1, because caches do not name their classes.
        flip: whether latents of mirrored images are used; only LightningDiT's caches have them.
        holdout: held-out fraction of each class; None: 0.
        skip_unreadable: number of latents that may be damaged; they are replaced (`dit_fast.data.unreadable`).

    Raises:
        DataError: files are missing, damaged, unpaired or of different shapes, or labels are out of range.
        ConfigError: options that contradict the cache.
    """
    folder = Path(folder)
    kind = recognize(folder)
    openers = {"fast-DiT": _open_fast_dit, "REPA": _open_repa, "LightningDiT": _open_lightningdit}
    if kind is None:
        raise DataError(f"{folder} is not a latent cache of {', '.join(openers)}")
    cache = openers[kind](folder)
    if not len(cache.labels):
        raise DataError(f"{folder} holds no latents")
    classes = num_classes or int(cache.labels.max()) + 1
    return make_latent_set(
        str(folder),
        cache.source,
        cache.labels,
        [str(label) for label in range(classes)],
        cache.sample_shape,
        cache.posterior,
        sample_ids=lambda: cache.names,
        flips=cache.flips,
        flip=flip,
        num_classes=num_classes,
        holdout=holdout,
        pixel_size=cache.pixel_size,
        vae={"name": None, "source": f"{kind} cache", "sha256": None},
        fingerprint=cache.fingerprint,
        skip_unreadable=skip_unreadable,
        without=cache.without,
    )


@dataclass(frozen=True)
class NpySource:
    """One .npy file per sample, reshaped to (K, C, H, W)."""

    paths: tuple[Path, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, members: Sequence[int], flips: Sequence[bool]) -> Tensor:
        moments = np.empty((len(members), *self.shape), self.dtype)
        reasons: dict[int, str] = {}
        for row, member in zip(moments, members, strict=True):
            try:
                row[...] = self._one(member, row.size).reshape(self.shape)
            except DataError as error:
                reasons[member] = str(error)
        raise_unreadable(reasons)
        return torch.from_numpy(moments)

    def _one(self, member: int, size: int) -> np.ndarray:
        array = read_npy(self.paths[member], DataError)
        if array.size != size or array.dtype != self.dtype:
            raise DataError(
                f"{self.paths[member]} holds {array.dtype} {array.shape}, the first latent of the set "
                f"{self.dtype} {self.shape}"
            )
        return array

    def where(self, member: int) -> str:
        return str(self.paths[member])


@dataclass(frozen=True)
class SafetensorsSource:
    """Latents (M, C, H, W) of plain and mirrored images in safetensors shards; `starts` are their first members."""

    plain: tuple[Rows, ...]
    mirrored: tuple[Rows, ...]
    starts: np.ndarray

    def read(self, members: Sequence[int], flips: Sequence[bool]) -> Tensor:
        def place(member: int, flip: bool) -> tuple[FileBytes, int]:
            shard, row = self._place(member)
            rows = (self.mirrored if flip else self.plain)[shard]
            return rows.file, rows.start + row * rows.width

        first = self.plain[0]
        return read_samples(map(place, members, flips), members, (1, *first.shape[1:]), first.dtype)

    def where(self, member: int) -> str:
        shard, place = self._place(member)
        return f"{self.plain[shard].file.path}, latent {place}"

    def _place(self, member: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, member, side="right")) - 1
        return shard, member - int(self.starts[shard])


@dataclass(frozen=True)
class _Cache:
    source: NpySource | SafetensorsSource
    labels: Tensor
    names: tuple[str, ...]
    sample_shape: tuple[int, ...]
    posterior: Posterior
    flips: bool
    pixel_size: int | None
    fingerprint: str
    without: Callable[[Collection[str]], str] | None = None


def _open_fast_dit(folder: Path) -> _Cache:
    pairs = [
        (part, partner)
        for part in sorted(folder.glob("*_features"))
        if (partner := part.with_name(part.name.removesuffix("_features") + "_labels")).is_dir()
    ]
    if len(pairs) != 1:
        raise DataError(
            f"{folder} has {len(pairs)} pairs of folders NAME_features and NAME_labels, expected 1"
        )
    features, labels = ({path.stem: path for path in part.glob("*.npy")} for part in pairs[0])
    _check_pairs(folder, features, labels)
    # Files are numbered: 10 follows 9. Latents and labels are paired by name, not by the order of a listing.
    names = sorted(features, key=lambda name: (len(name), name) if name.isdecimal() else (1 << 30, name))
    values = np.empty(len(names), np.int64)
    with ThreadPoolExecutor(_READERS) as pool:
        read = pool.map(lambda name: read_npy(labels[name], DataError), names)
        for row, array in enumerate(tqdm(read, f"labels of {folder.name}", len(names), disable=None)):
            if array.size != 1 or array.dtype.kind not in "iu":
                raise DataError(
                    f"{labels[names[row]]} holds {array.dtype} {array.shape}; a label is one integer"
                )
            values[row] = array.item()
    return _files(folder, [features[name] for name in names], names, torch.from_numpy(values), "sample")


def _open_repa(folder: Path) -> _Cache:
    root = folder if (folder / _REPA_LABELS).is_file() else folder / _REPA_FOLDER
    index = root / _REPA_LABELS
    try:
        entries = read_json(index, DataError, MOST_LIST_BYTES)["labels"]
        labels = {str(name): label for name, label in entries}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f'{index} is not {{"labels": [[name, label], ...]}}: {error!r}') from None
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.npy"))
    _check_pairs(root, names, labels)
    for name in names:
        # `type`, because true and false are instances of int. The bound keeps labels within int64.
        if type(labels[name]) is not int or abs(labels[name]) >= 1 << 31:
            raise DataError(f"{index}: the label of {name} is {labels[name]!r}; a label is one integer")
    values = torch.tensor([labels[name] for name in names], dtype=torch.int64)
    return _files(folder, [root / name for name in names], names, values, "std")


def _check_pairs(folder: Path, latents: Collection[str], labels: Collection[str]) -> None:
    if unpaired := sorted(set(latents) ^ set(labels)):
        raise DataError(
            f"{folder}: {len(latents)} latents and {len(labels)} labels; without a partner: {name_some(unpaired)}"
        )


def _files(folder: Path, paths: Sequence[Path], names: Sequence[str], labels: Tensor, kind: str) -> _Cache:
    """A cache with one file per latent; their shape and dtype are those of the first."""
    if not paths:
        raise DataError(f"{folder} holds no latents")
    first = read_npy(paths[0], DataError)
    parts = 1 if kind == "sample" else 2
    # fast-DiT stores each sample as a batch of one.
    shape = first.shape[1:] if first.ndim == 4 and first.shape[0] == 1 else first.shape
    if len(shape) != 3 or shape[0] % parts or first.dtype.kind != "f":
        wanted = "(1, C, H, W)" if kind == "sample" else "(2 C, H, W), mean and standard deviation"
        raise DataError(f"{paths[0]} holds {first.dtype} {first.shape}; expected floating-point {wanted}")
    channels = shape[0] // parts
    # fast-DiT's samples are scaled already; REPA's moments are those of the autoencoder.
    scale = 1.0 if kind == "sample" else _SD_SCALE

    def fingerprint(without: Collection[str] = ()) -> str:
        listing = "\n".join(
            f"{name}\t{path.stat().st_size}\t{label}"
            for name, path, label in zip(names, paths, labels.tolist(), strict=True)
            if str(path) not in without
        )
        return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()

    return _Cache(
        source=NpySource(tuple(paths), (parts, channels, *shape[1:]), first.dtype),
        labels=labels,
        names=tuple(names),
        sample_shape=(channels, *shape[1:]),
        posterior=Posterior(kind, (0.0,) * channels, (scale,) * channels),
        flips=False,
        pixel_size=shape[1] * _SD_FACTOR,
        fingerprint=fingerprint(),
        without=fingerprint,
    )


def _open_lightningdit(folder: Path) -> _Cache:
    paths = tuple(sorted(folder.glob("*.safetensors")))
    shards = [_open_shard(path) for path in paths]
    shape = shards[0]["latents"].shape[1:]
    for path, shard in zip(paths, shards, strict=True):
        for key in ("latents", "latents_flip"):
            tensor, count = shard[key], len(shard["labels"])
            if (
                tensor.shape != (count, *shape)
                or len(tensor.shape) != 4
                or tensor.dtype != shards[0]["latents"].dtype
            ):
                raise DataError(
                    f"{path}: {key} is {tensor.dtype} {tuple(tensor.shape)} for {count} labels; expected "
                    f"{shards[0]['latents'].dtype} {(count, *shape)} as in {paths[0].name}"
                )
    mean, deviation = read_statistics(folder / _STATISTICS, int(shape[0]))
    labels = torch.cat([_labels(shard["labels"]) for shard in shards])
    counts = [len(shard["labels"]) for shard in shards]
    digest = hashlib.sha256(labels.numpy().data)
    digest.update(repr([(path.name, path.stat().st_size) for path in paths]).encode())
    return _Cache(
        source=SafetensorsSource(
            tuple(shard["latents"] for shard in shards),
            tuple(shard["latents_flip"] for shard in shards),
            np.cumsum([0, *counts[:-1]]),
        ),
        labels=labels,
        names=tuple(
            f"{path.name}/{row}" for path, count in zip(paths, counts, strict=True) for row in range(count)
        ),
        sample_shape=tuple(shape),
        posterior=Posterior("sample", tuple(mean), tuple(1.0 / value for value in deviation)),
        flips=True,
        # LightningDiT's autoencoders downsample by 8 or 16; the cache does not state which.
        pixel_size=None,
        fingerprint=digest.hexdigest(),
    )


def _open_shard(path: Path) -> dict[str, Rows]:
    """Open the tensors of one safetensors file without reading them."""
    check_file(path, DataError, what="a safetensors file")
    try:
        shard = open_tensors(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}{_expected_size(path)}") from error
    missing = [key for key in ("latents", "latents_flip", "labels") if key not in shard]
    if missing:
        raise DataError(
            f"{path} has no {', '.join(missing)} (it has {', '.join(sorted(shard)) or 'nothing'})"
        )
    labels = shard["labels"]
    if len(labels.shape) != 1 or labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise DataError(f"{path}: labels are {labels.dtype} {tuple(labels.shape)}; expected integers (N,)")
    return shard


def _labels(rows: Rows) -> Tensor:
    return rows.file.read(rows.start, rows.shape, rows.dtype).to(torch.int64)


def _expected_size(path: Path) -> str:
    """Actual and expected size of a damaged safetensors file, where its header is readable."""
    try:
        with open_file(path, DataError) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = parse_json(file.read(min(length, 1 << 24)), "its header", DataError)
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        return f" ({path.stat().st_size} bytes, expected {8 + length + end})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return ""


def read_statistics(path: Path, channels: int) -> tuple[list[float], list[float]]:
    """Read LightningDiT's `latents_stats.pt`, the statistics by which it normalizes latents.

    Args:
        path: the file.
        channels: expected number of channels, C.

    Returns:
        mean and standard deviation of each channel, (C,) each.

    Raises:
        DataError: the file is missing or damaged, has other channels, or values that are not finite and positive.
    """
    if not os.path.lexists(path):
        raise DataError(
            f"{path} is missing: LightningDiT writes it beside its shards; it is required to normalize the latents and "
            "to decode samples"
        )
    try:
        content = read_weight_file(path).state
        mean, deviation = (content[key].double().flatten() for key in ("mean", "std"))
    except (CheckpointError, KeyError) as error:
        raise DataError(f"{path} is not a file with tensors mean and std: {error}") from error
    if (
        len(mean) != channels
        or len(deviation) != channels
        or not ((deviation > 0) & deviation.isfinite()).all()
        or not mean.isfinite().all()
    ):
        raise DataError(
            f"{path} has {len(mean)} means and {len(deviation)} deviations for {channels} channels, or values that "
            "are not finite and positive"
        )
    return mean.tolist(), deviation.tolist()
