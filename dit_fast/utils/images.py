"""Images as uint8, and a labelled grid of them for a person to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

GRID_KEY = "dit-fast grid"
"""The text in the PNG of a grid that says that it is one, so that it is not scored as a sample."""
_MARGIN = 12
_GAP = 4
_INK = (40, 40, 40)
_PAPER = (255, 255, 255)


def to_uint8(images: Tensor) -> np.ndarray:
    """float (M, C, H, W) in [-1, 1] to uint8 (M, H, W, C), by the reference's rule: 127.5 x + 128, clamped,
    truncated.
    """
    scaled = torch.clamp(127.5 * images.float() + 128.0, 0, 255)
    return scaled.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def to_pil(image: np.ndarray) -> Image.Image:
    """One uint8 (H, W, 1) or (H, W, 3) image as PIL, grey or RGB."""
    return Image.fromarray(image[..., 0]) if image.shape[-1] == 1 else Image.fromarray(image)


@dataclass(frozen=True)
class GridLayout:
    """Where the tiles of a grid lie, in pixels: `left` is the width of the label column."""

    tile_height: int
    tile_width: int
    columns: int
    rows: int
    left: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the whole picture."""
        width = 2 * _MARGIN + self.left + self.columns * (self.tile_width + _GAP) - _GAP
        return width, 2 * _MARGIN + self.rows * (self.tile_height + _GAP) - _GAP

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """(x, y) of a tile's upper left pixel."""
        x = _MARGIN + self.left + column * (self.tile_width + _GAP)
        return x, _MARGIN + row * (self.tile_height + _GAP)


def upscale_factor(height: int, width: int, target: int = 56) -> int:
    """Whole-number factor that brings a small image to at least `target` pixels on its longer side."""
    return max(1, -(-target // max(height, width)))


def short_label(text: str, most: int = 40) -> str:
    """A caption in one line, cut to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3].rstrip() + "..."


def grid_layout(rows: Sequence[tuple[str, np.ndarray]]) -> GridLayout:
    """The layout that `draw_grid` gives these rows."""
    height, width = rows[0][1].shape[1:3]
    factor = upscale_factor(height, width)
    label_width = max(_font(height * factor).getlength(label) for label, _ in rows)
    return GridLayout(
        tile_height=height * factor,
        tile_width=width * factor,
        columns=max(len(images) for _, images in rows),
        rows=len(rows),
        left=int(label_width) + _MARGIN if label_width else 0,
    )


def _font(tile_height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=max(12, min(28, tile_height // 4)))


def on_paper(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 images (n, H, W, C) in the middle of white tiles of `height` and `width`, for a grid of several shapes."""
    down, across = height - images.shape[1], width - images.shape[2]
    margins = ((0, 0), (down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0))
    return np.pad(images, margins, constant_values=255)


def draw_grid(rows: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """A picture with one row per (label, images); images are uint8 (n, H, W, C), C 1 or 3, n may differ.

    Small images are enlarged by a whole factor without smoothing. The label stands at the left of its row, in
    full. The picture is RGB.
    """
    layout = grid_layout(rows)
    font = _font(layout.tile_height)
    picture = Image.new("RGB", layout.size, _PAPER)
    ink = ImageDraw.Draw(picture)
    for row, (label, images) in enumerate(rows):
        _, top = layout.corner(row, 0)
        ink.text((layout.left, top + layout.tile_height // 2), label, fill=_INK, font=font, anchor="rm")
        for column, image in enumerate(images):
            tile = to_pil(image).resize((layout.tile_width, layout.tile_height), Image.Resampling.NEAREST)
            picture.paste(tile.convert("RGB"), layout.corner(row, column))
    return picture


def save_grid(picture: Image.Image, path: Path) -> None:
    """Write what `draw_grid` gave as a PNG that says that it is a grid."""
    said = PngImagePlugin.PngInfo()
    said.add_text(GRID_KEY, "samples laid out to be looked at")
    picture.save(path, format="PNG", pnginfo=said)
