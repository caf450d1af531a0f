"""One image file into 8-bit pixels: formats, bit depths, transparency, orientation, and the crop."""

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

GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
# What Pillow raises for damaged files, by format and kind of damage.
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
# A file is read as what its first bytes say. Not by Pillow's other readers, one of which runs a program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""TIFF's tags."""
_TAIL = 1 << 16
_T = TypeVar("_T")


@dataclass(frozen=True)
class Conversion:
    """How files become pixels, the same for all images of a set.

    background: the colour (a name, "#rrggbb" or "rgb(r, g, b)") that transparent images are composited on. raw: as the
    reference does, ignore transparency and EXIF orientation. Raises ConfigError for what is no opaque colour.
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
                f"--background {self.background}: give a colour, such as white, black, #808080 or rgb(128,128,128)"
            )

    @property
    def colour(self) -> tuple[int, ...]:
        """(red, green, blue), 0 to 255."""
        return tuple(ImageColor.getrgb(self.background))

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts for a manifest."""
        return {"background": self.background, "raw_pixels": self.raw}

    @classmethod
    def of(cls, facts: Any) -> "Conversion":
        """What `describe` gave; sets that do not say were read raw, before there was a choice."""
        if not isinstance(facts, dict):
            return cls(raw=True)
        return cls(str(facts.get("background", cls.background)), bool(facts.get("raw_pixels")))


@dataclass(frozen=True)
class Header:
    """Of an image as it is read: its size, whether it is grey, a grid of samples that we drew, and whether more frames
    or pages follow.
    """

    width: int
    height: int
    grey: bool
    grid: bool = False
    more: bool = False


def read_header(path: Path, how: Conversion) -> Header:
    """Size and kind of an image, from the head of its file where that says all."""
    with Image.open(path, formats=_FORMATS) as file:
        red, green, blue = how.colour
        lies_on_colour = not how.raw and file.has_transparency_data and not red == green == blue
        grey = file.mode in GREY_MODES and not lies_on_colour
        width, height = file.size
        if not how.raw and _turn(file, _has_late_exif(file, path)) in (5, 6, 7, 8):
            width, height = height, width
        return Header(width, height, grey, GRID_KEY in file.info, _has_more(file))


def _has_more(file: Image.Image) -> bool:
    # A JPEG's further pictures are views or depths of the first one.
    try:
        return file.format not in ("JPEG", "MPO") and bool(getattr(file, "is_animated", False))
    except _DECODE_ERRORS:  # a damaged list of pages: the first one is there
        return False


def read_image(
    path: Path,
    size: int | tuple[int, int],
    channels: int,
    how: Conversion = Conversion(),
) -> Tensor:
    """One file as uint8 (channels, height, width), scaled and cropped as `center_crop` does.

    Raises what `read_each` catches for files that are damaged or whose values have no known range.
    """
    return read_first_frame(path, size, channels, how)[0]


def read_first_frame(
    path: Path, size: int | tuple[int, int], channels: int, how: Conversion
) -> tuple[Tensor, bool]:
    """The image of `read_image`, and whether the file has more frames or pages."""
    with Image.open(path, formats=_FORMATS) as file:
        more = _has_more(file)
        image = _convert(file, "L" if channels == 1 else "RGB", how)
    pixels = np.array(center_crop(image, size))
    return torch.from_numpy(pixels).view(*as_pair(size), channels).permute(2, 0, 1), more


def _convert(file: Image.Image, mode: str, how: Conversion) -> Image.Image:
    """An opened file in 8 bits, "L" or "RGB", opaque and upright."""
    file.load()
    image = _eight_bits(file, how) if file.mode.startswith(("I", "F")) else file
    if how.raw:
        return image.convert(mode)
    if image.has_transparency_data:
        key = image.info.get("transparency")
        if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
            raise ValueError("a transparent colour of 16 bits; convert it to 8 bits")
        # Compositing in RGBA: grey stays what it is, to the level, when it is converted back.
        canvas = Image.new("RGBA", image.size, (*how.colour, 255))
        layer = image.convert("LA") if image.mode == "La" else image
        image = Image.alpha_composite(canvas, layer.convert("RGBA"))
    image = image.convert(mode)
    turn = _turn(file, True)
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _eight_bits(file: Image.Image, how: Conversion) -> Image.Image:
    """The upper 8 bits of a grey image of 12 or 16, which Pillow would clip to 255; ValueError for other depths."""
    tags: Any = getattr(file, "tag_v2", {}) if file.format == "TIFF" else {}
    bits = _first(tags.get(_BITS, 16))
    if file.mode == "F" or _first(tags.get(_SAMPLE_FORMAT, 1)) != 1 or bits not in (12, 16):
        kind = "floating-point" if file.mode == "F" else f"{bits}-bit signed or wide"
        raise ValueError(f"{kind} values have no known range; convert it to 8 or 16 bits")
    values = np.asarray(file).astype(np.int64)
    levels = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC, 1) == 0:  # white is zero, which Pillow heeds in 8 bits only
        levels = 255 - levels
    image = Image.fromarray(levels)
    key = file.info.get("transparency")
    if isinstance(key, int) and not how.raw:
        image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return image


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _turn(file: Image.Image, may_load: bool) -> int:
    """The EXIF orientation that is left to apply, 1 to 8; a TIFF is upright already."""
    if file.format == "TIFF" or (file.format == "PNG" and not may_load and "exif" not in file.info):
        return 1
    try:
        turn = file.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever damaged EXIF makes Pillow raise, the pixels are what they are
        return 1
    return turn if isinstance(turn, int) else 1


def _has_late_exif(file: Image.Image, path: Path) -> bool:
    """Whether EXIF may follow the pixels of a PNG, which Pillow sees once all is decoded."""
    if file.format != "PNG":
        return True
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL))
        return b"eXIf" in stream.read()


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
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


def center_crop_array(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """`center_crop` of a uint8 array (H, W) or (H, W, 3)."""
    return np.asarray(center_crop(Image.fromarray(image), size))


def read_each(
    paths: Sequence[Path], read: Callable[[Path], _T], num_workers: int, progress: str = ""
) -> tuple[list[_T | None], dict[int, str]]:
    """`read` of every path, in order, None where it could not be read, and the reasons by position."""

    def attempt(path: Path) -> _T | str:
        try:
            return read(path)
        except _DECODE_ERRORS as error:
            return " ".join(str(error).split()) or type(error).__name__

    results: list[_T | None] = []
    failures: dict[int, str] = {}
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        answers = pool.map(attempt, paths)
        bar = tqdm(answers, desc=progress, total=len(paths), disable=None if progress else True)
        for position, answer in enumerate(bar):
            if isinstance(answer, str):
                failures[position] = answer
            results.append(None if isinstance(answer, str) else answer)
    return results, failures


def list_failures(names: Sequence[Any], failures: dict[int, str], named: int = 5) -> str:
    """What `read_each` could not read, for a message: the first `named`, each with its reason."""
    said = [f"{names[position]} ({reason})" for position, reason in sorted(failures.items())]
    return "; ".join(said[:named]) + (f"; and {len(said) - named} more" if len(said) > named else "")
