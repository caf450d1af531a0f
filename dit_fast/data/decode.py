"""Decode an image file to 8-bit pixels: formats, bit depths, transparency, orientation and cropping."""

import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor
from tqdm import tqdm

from dit_fast.errors import ConfigError
from dit_fast.model.embedders import as_pair
from dit_fast.utils.images import GRID_KEY

_GRAY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
# Exceptions of Pillow for damaged files; they depend on the format and the damage.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Formats are detected from a file's first bytes, whatever its suffix. Pillow's other readers are excluded: that of EPS
# starts Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# TIFF tags.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
# Bytes at the end of a PNG in which an eXIf chunk is searched for.
_TAIL = 1 << 16
_T = TypeVar("_T")


@dataclass(frozen=True)
class Conversion:
    """Conversion of image files to pixels, the same for all images of a set.

    Args:
        background: color (a name, "#rrggbb" or "rgb(r, g, b)") on which transparent images are composited.
        raw: ignore transparency and EXIF orientation, as the reference does.

    Raises:
        ConfigError: `background` is not an opaque color.
    """

    background: str = "white"
    raw: bool = False

    def __post_init__(self) -> None:
        try:
            opaque = len(ImageColor.getrgb(self.background)) == 3
        except (ValueError, AttributeError, TypeError):
            opaque = False
        if not opaque:
            raise ConfigError(
                f"--background {self.background}: give a color, such as white, black, #808080 or rgb(128,128,128)"
            )

    @property
    def color(self) -> tuple[int, ...]:
        """(red, green, blue), 0 to 255."""
        return tuple(ImageColor.getrgb(self.background))

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts for a manifest."""
        return {"background": self.background, "raw_pixels": self.raw}

    @classmethod
    def of(cls, facts: Any) -> "Conversion":
        """Inverse of `describe`. Sets without these facts are older than the option and were read raw."""
        if not isinstance(facts, dict):
            return cls(raw=True)
        return cls(str(facts.get("background", cls.background)), bool(facts.get("raw_pixels")))


@dataclass(frozen=True)
class Header:
    """Properties of an image as it is read.

    Args:
        width, height: size in pixels, after the EXIF orientation is applied.
        gray: whether it is grayscale.
        grid: whether it is a grid of samples that `dit-fast` wrote.
        more: whether the file has more frames or pages.
    """

    width: int
    height: int
    gray: bool
    grid: bool = False
    more: bool = False


def read_header(path: Path, how: Conversion) -> Header:
    """Read an image's properties, without decoding its pixels. Raises the exceptions that `read_each` catches."""
    with Image.open(path, formats=_FORMATS) as file:
        red, green, blue = how.color
        on_color = not how.raw and file.has_transparency_data and not red == green == blue
        gray = file.mode in _GRAY_MODES and not on_color
        width, height = file.size
        if not how.raw and _turn(file, _has_late_exif(file, path)) in (5, 6, 7, 8):
            width, height = height, width
        return Header(width, height, gray, GRID_KEY in file.info, _has_more(file))


@dataclass(frozen=True)
class ImageFacts(Header):
    """What only decoding tells of an image.

    Args:
        transparent: whether a pixel is not opaque.
    """

    transparent: bool = False


def read_facts(path: Path, how: Conversion) -> ImageFacts:
    """Decode an image to describe it. Raises the exceptions that `read_each` catches."""
    header = read_header(path, how)
    with Image.open(path, formats=_FORMATS) as file:
        file.load()
        clear = file.has_transparency_data and _has_clear_pixel(file)
    return ImageFacts(**vars(header), transparent=clear)


def _has_clear_pixel(file: Image.Image) -> bool:
    opaque = file if file.mode in ("RGBA", "LA", "PA") else file.convert("RGBA")
    lowest: Any = opaque.getchannel("A").getextrema()[0]
    return lowest < 255


def _has_more(file: Image.Image) -> bool:
    # The other pictures in a JPEG (MPO) are other views, or the depth, of the first one.
    try:
        return file.format not in ("JPEG", "MPO") and bool(getattr(file, "is_animated", False))
    except _DECODE_ERRORS:  # a damaged list of pages; the first one is still readable
        return False


def read_image(
    path: Path,
    size: int | tuple[int, int],
    channels: int,
    how: Conversion = Conversion(),
) -> Tensor:
    """Decode one file, resized and cropped by `center_crop`.

    Args:
        path: image file; its first frame or page is read.
        size: side or (height, width) in pixels.
        channels: 1 for grayscale, 3 for RGB.
        how: conversion to opaque, upright pixels.

    Returns:
        uint8 (channels, height, width).

    Raises the exceptions that `read_each` catches for files that are damaged or whose values have no known range.
    """
    return read_first_frame(path, size, channels, how)[0]


def read_first_frame(
    path: Path, size: int | tuple[int, int], channels: int, how: Conversion
) -> tuple[Tensor, bool]:
    """The pixels of `read_image`, and whether the file has more frames or pages."""
    with Image.open(path, formats=_FORMATS) as file:
        more = _has_more(file)
        image = _convert(file, "L" if channels == 1 else "RGB", how)
    pixels = np.array(center_crop(image, size))
    return torch.from_numpy(pixels).view(*as_pair(size), channels).permute(2, 0, 1), more


def _convert(file: Image.Image, mode: str, how: Conversion) -> Image.Image:
    """Convert an opened file to 8 bits, mode "L" or "RGB", opaque and upright."""
    file.load()
    image = _eight_bits(file, how) if file.mode.startswith(("I", "F")) else file
    if how.raw:
        return image.convert(mode)
    if image.has_transparency_data:
        key = image.info.get("transparency")
        if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
            raise ValueError("a transparent color of 16 bits; convert it to 8 bits")
        # Grayscale survives the conversion to RGBA and back exactly, level by level.
        canvas = Image.new("RGBA", image.size, (*how.color, 255))
        layer = image.convert("LA") if image.mode == "La" else image
        image = Image.alpha_composite(canvas, layer.convert("RGBA"))
    image = image.convert(mode)
    turn = _turn(file, True)
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _eight_bits(file: Image.Image, how: Conversion) -> Image.Image:
    """The upper 8 bits of a 12- or 16-bit grayscale image, whose values Pillow would clip to 255.

    Raises:
        ValueError: another bit depth, whose range of values is unknown.
    """
    tags: Any = getattr(file, "tag_v2", {}) if file.format == "TIFF" else {}
    bits = _first(tags.get(_BITS, 16))
    if file.mode == "F" or _first(tags.get(_SAMPLE_FORMAT, 1)) != 1 or bits not in (12, 16):
        kind = "floating-point" if file.mode == "F" else f"{bits}-bit signed or wide"
        raise ValueError(f"{kind} values have no known range; convert it to 8 or 16 bits")
    values = np.asarray(file).astype(np.int64)
    levels = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC, 1) == 0:  # WhiteIsZero, which Pillow applies to 8-bit images only
        levels = 255 - levels
    image = Image.fromarray(levels)
    key = file.info.get("transparency")
    if isinstance(key, int) and not how.raw:
        image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return image


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _turn(file: Image.Image, may_load: bool) -> int:
    """The EXIF orientation to apply, 1 to 8. Pillow has already rotated a TIFF."""
    if file.format == "TIFF" or (file.format == "PNG" and not may_load and "exif" not in file.info):
        return 1
    try:
        turn = file.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF can raise anything in Pillow and does not affect the pixels
        return 1
    return turn if isinstance(turn, int) else 1


def _has_late_exif(file: Image.Image, path: Path) -> bool:
    """Whether EXIF may follow the pixels of a PNG, where Pillow finds it only after decoding the whole image."""
    if file.format != "PNG":
        return True
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL))
        return b"eXIf" in stream.read()


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Resize an image until it just covers `size`, then crop its center.

    The image is halved with a box filter while it is at least twice as large, then resized with a bicubic filter: the
    preprocessing of ADM (Dhariwal & Nichol 2021, arXiv:2105.05233), extended from squares to rectangles.

    Args:
        image: image of any size and mode.
        size: side or (height, width) in pixels.

    Returns:
        image of that size.
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


def center_crop_array(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Apply `center_crop` to a uint8 array (H, W) or (H, W, 3)."""
    return np.asarray(center_crop(Image.fromarray(image), size))


def read_each(
    paths: Sequence[Path], read: Callable[[Path], _T], num_workers: int, progress: str = ""
) -> tuple[list[_T | None], dict[int, str]]:
    """Read image files in threads.

    Args:
        paths: the files.
        read: reads one file.
        num_workers: number of threads.
        progress: title of a progress bar; empty for none.

    Returns:
        the results in order, None where a file could not be read, and the reasons by position.
    """

    def attempt(path: Path) -> _T | str:
        try:
            return read(path)
        except _DECODE_ERRORS as error:
            return " ".join(str(error).split()) or type(error).__name__

    results: list[_T | None] = []
    failures: dict[int, str] = {}
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        attempts = pool.map(attempt, paths)
        bar = tqdm(attempts, desc=progress, total=len(paths), disable=None if progress else True)
        for position, result in enumerate(bar):
            if isinstance(result, str):
                failures[position] = result
            results.append(None if isinstance(result, str) else result)
    return results, failures


def list_failures(names: Sequence[Any], failures: dict[int, str], named: int = 5) -> str:
    """The first `named` failures of `read_each` with their reasons, for a message."""
    lines = [f"{names[position]} ({reason})" for position, reason in sorted(failures.items())]
    return "; ".join(lines[:named]) + (f"; and {len(lines) - named} more" if len(lines) > named else "")
