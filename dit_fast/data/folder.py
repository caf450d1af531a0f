"""A folder of class sub-folders of PNG and JPEG images, of any size, RGB or grey."""

import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dit_fast.data.buckets import BucketSource, Size, nearest_bucket
from dit_fast.data.images import ArraySource, ImageSet, PixelSource, make_set
from dit_fast.embedders import as_pair
from dit_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dit_fast.data.captions import FileCaptions

SUFFIXES = (".png", ".jpg", ".jpeg")
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
# What Pillow raises for damaged files, by format and kind of damage.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_T = TypeVar("_T")


def centre_crop(image: Image.Image, size: int | Size) -> Image.Image:
    """The centre of `image`, of (height, width) `size` or square, once it is scaled to just cover that.

    The image is first halved with a box filter while it is at least twice as large, then scaled the rest of the
    way with a bicubic filter (the preprocessing of Dhariwal and Nichol 2021, "ADM", there for squares).
    """
    height, width = as_pair(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        new_size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(new_size, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def centre_crop_array(image: np.ndarray, size: int | Size) -> np.ndarray:
    """`centre_crop` of a uint8 array (H, W) or (H, W, 3)."""
    return np.asarray(centre_crop(Image.fromarray(image), size))


def read_image(path: Path, size: int | Size, channels: int) -> Tensor:
    """One file as uint8 (channels, height, width). Orientation tags are ignored, as the reference does."""
    mode = "L" if channels == 1 else "RGB"
    with Image.open(path) as file:
        if file.mode.startswith("I"):
            # Pillow clips 16-bit values to 255 when it converts; their upper byte is the 8-bit image.
            upper_byte = (np.asarray(file).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            image = Image.fromarray(upper_byte).convert(mode)
        else:
            image = file.convert(mode)
    pixels = np.array(centre_crop(image, size))
    return torch.from_numpy(pixels).view(*as_pair(size), channels).permute(2, 0, 1)


@dataclass(frozen=True)
class FileSource:
    """Pixels in files, decoded by `num_workers` threads on every read."""

    paths: tuple[Path, ...]
    size: Size
    channels: int
    num_workers: int
    lazy: bool = True

    def read(self, indices: Sequence[int]) -> Tensor:
        paths = [self.paths[index] for index in indices]
        images, failures = read_each(
            paths, lambda path: read_image(path, self.size, self.channels), self.num_workers
        )
        if failures:
            raise DataError(f"{list_failures(failures)}: cannot be read")
        return torch.stack(images)


@dataclass(frozen=True)
class _Header:
    width: int
    height: int
    mode: str


def _header(path: Path) -> _Header:
    with Image.open(path) as image:
        return _Header(image.width, image.height, image.mode)


def read_each(
    paths: Sequence[Path], read: Callable[[Path], _T], num_workers: int, progress: str = ""
) -> tuple[list[_T], list[tuple[Path, str]]]:
    """`read` of every path, in order, and (path, reason) of those that could not be read."""

    def attempt(path: Path) -> _T | str:
        try:
            return read(path)
        except _DECODE_ERRORS as error:
            return " ".join(str(error).split()) or type(error).__name__

    results, failures = [], []
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        answers = pool.map(attempt, paths)
        for path, answer in zip(
            paths,
            tqdm(answers, desc=progress, total=len(paths), disable=None if progress else True),
            strict=True,
        ):
            if isinstance(answer, str):
                failures.append((path, answer))
            else:
                results.append(answer)
    return results, failures


def list_failures(failures: Sequence[tuple[Path, str]], named: int = 5) -> str:
    """What `read_each` could not read, for a message: the first `named` files, each with its reason."""
    text = "; ".join(f"{path} ({reason})" for path, reason in failures[:named])
    return text if len(failures) <= named else f"{text}; and {len(failures) - named} more"


def image_files(folder: Path) -> list[Path]:
    """The PNG and JPEG files below `folder`, in the order of their names; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def list_classes(root: Path) -> tuple[list[str], list[Path], list[int]]:
    """Class names (sorted sub-folder names), files, and the label of each file; DataError where a class has none."""
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if not root.is_dir():
        raise DataError(f"{root} is a file; give a folder with one sub-folder of images for each class")
    classes = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    loose = sum(entry.suffix.lower() in SUFFIXES for entry in root.iterdir())
    if loose and ((root / "metadata.jsonl").exists() or any(root.glob("*.txt"))):
        raise DataError(
            f"{root} has captions and no embeddings of them: make them with dit-fast encode --text-encoder NAME, "
            f"for its latents or with --vae none --out {root / 'embeddings.safetensors'}"
        )
    if not classes:
        found = f"{loose} images but no sub-folders" if loose else "no sub-folders"
        raise DataError(f"{root} has {found}; put the images of each class into a sub-folder of its own")
    paths, labels, empty = [], [], []
    for label, folder in enumerate(classes):
        members = image_files(folder)
        if not members:
            empty.append(folder.name)
        paths += members
        labels += [label] * len(members)
    if not paths:
        raise DataError(f"{root} has {len(classes)} sub-folders and no PNG or JPEG image in any of them")
    if len(classes) == 1:
        raise DataError(
            f"{root} has one class, {classes[0].name}; class-conditional training needs at least 2"
        )
    if empty:
        raise DataError(
            f"{root}: {len(empty)} of {len(classes)} class sub-folders have no PNG or JPEG image: "
            f"{', '.join(empty[:5])}; fill or remove them"
        )
    return [folder.name for folder in classes], paths, labels


def _agreed_size(root: Path, headers: Sequence[_Header]) -> int:
    sizes = {(header.width, header.height) for header in headers}
    width, height = min(sizes)
    if len(sizes) == 1 and width == height:
        return width
    found = (
        f"{width} x {height}" if len(sizes) == 1 else f"{len(sizes)} different sizes, e.g. {width} x {height}"
    )
    raise ConfigError(f"{root}: the images are not all square and equal ({found}); give --image-size")


def open_folder(
    root: Path,
    *,
    image_size: int | Size | None,
    channels: int | None,
    flip: bool,
    holdout: float,
    num_workers: int,
    memory_limit: int,
    buckets: tuple[Size, ...] = (),
    captions: "FileCaptions | None" = None,
) -> ImageSet:
    """The images under `root`, one class for each sub-folder, labels in the sorted order of their names; or those that
    have `captions`.

    All are cropped to `image_size`, a side or (height, width), or each to the one of `buckets` that is nearest to its
    aspect ratio.
    A set that fits in `memory_limit` bytes is decoded at once, so that every damaged file is found before
    training begins; of a larger one only the headers are read, and files are decoded as batches need them.
    """
    if captions is None:
        class_names, paths, labels = list_classes(root)
    else:
        paths = [root / name for name in captions.names]
        class_names, labels = ["captions"], [0] * len(paths)
    bar = f"reading {root.name}"
    headers, failures = read_each(paths, _header, num_workers)
    if failures:
        # Damage shows in the header or only in the body: count both kinds before saying so.
        headless = {path for path, _ in failures}
        headed = [path for path in paths if path not in headless]
        failures += read_each(headed, lambda path: read_image(path, image_size or 1, 1), num_workers, bar)[1]
    else:
        sizes = buckets or (as_pair(image_size or _agreed_size(root, headers)),)
        depth = channels or (1 if all(header.mode in GREY_MODES for header in headers) else 3)
        nearest = [nearest_bucket((header.height, header.width), sizes) for header in headers]
        bucket_of = dict(zip(paths, nearest, strict=True))
        grouped = [[path for path in paths if bucket_of[path] == n] for n in range(len(sizes))]
        sources: list[PixelSource] = [
            FileSource(tuple(members), size, depth, num_workers)
            for members, size in zip(grouped, sizes, strict=True)
        ]
        if sum(depth * math.prod(sizes[n]) for n in nearest) <= memory_limit:
            images, failures = read_each(
                paths, lambda path: read_image(path, sizes[bucket_of[path]], depth), num_workers, bar
            )
            if not failures:
                kept = dict(zip(paths, images, strict=True))
                sources = [
                    ArraySource(torch.stack([kept[path] for path in members])) if members else source
                    for members, source in zip(grouped, sources, strict=True)
                ]
        source = sources[0]
        if buckets:
            place = {path: number for members in grouped for number, path in enumerate(members)}
            source = BucketSource(tuple(sources), tuple(nearest), tuple(place[path] for path in paths))
    if failures:
        raise DataError(
            f"{root}: {len(failures)} of {len(paths)} images cannot be read: {list_failures(failures)}; "
            f"replace or remove them"
        )
    names = [path.relative_to(root).as_posix() for path in paths]
    listing = "\n".join(f"{name}\t{path.stat().st_size}" for name, path in zip(names, paths, strict=True))
    listing += "" if captions is None else f"\n{captions.file.sha256}"
    return make_set(
        str(root),
        source,
        torch.tensor(labels),
        names,
        class_names,
        (depth, *sizes[0]),
        flip=flip,
        holdout=holdout,
        fingerprint=hashlib.sha256(listing.encode()).hexdigest(),
        buckets=buckets,
        bucket_of=torch.tensor(nearest) if buckets else None,
        captions=captions,
    )
