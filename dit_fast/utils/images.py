"""Conversion of images to uint8, and labeled grids of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

GRID_KEY = "dit-fast grid"
"""Key of the text chunk that marks a PNG as a grid, so that it is not scored as a sample."""
_MARGIN = 12
_GAP = 4
_INK = (40, 40, 40)
_PAPER = (255, 255, 255)


def to_uint8(images: Tensor) -> np.ndarray:
    """Convert images as the reference does: 127.5 x + 128, clamped and truncated.

    Args:
        images: float (M, C, H, W) in [-1, 1].

    Returns:
        uint8 (M, H, W, C).
    """
    scaled = torch.clamp(127.5 * images.float() + 128.0, 0, 255)
    return scaled.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def to_pil(image: np.ndarray) -> Image.Image:
    """Convert an image, uint8 (H, W, 1) or (H, W, 3), to a grayscale or RGB image of PIL."""
    return Image.fromarray(image[..., 0]) if image.shape[-1] == 1 else Image.fromarray(image)


@dataclass(frozen=True)
class GridLayout:
    """Layout of a grid in pixels; `left` is the width of the label column."""

    tile_height: int
    tile_width: int
    columns: int
    rows: int
    left: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture."""
        width = 2 * _MARGIN + self.left + self.columns * (self.tile_width + _GAP) - _GAP
        return width, 2 * _MARGIN + self.rows * (self.tile_height + _GAP) - _GAP

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """(x, y) of the upper left pixel of a tile."""
        x = _MARGIN + self.left + column * (self.tile_width + _GAP)
        return x, _MARGIN + row * (self.tile_height + _GAP)


def upscale_factor(height: int, width: int, target: int = 56) -> int:
    """Integer factor that enlarges an image to at least `target` pixels on its longer side."""
    return max(1, -(-target // max(height, width)))


def short_label(text: str, most: int = 40) -> str:
    """A caption on one line, shortened to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3].rstrip() + "..."


def grid_layout(rows: Sequence[tuple[str, np.ndarray]]) -> GridLayout:
    """Layout of the picture that `draw_grid` draws for these rows."""
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
    """Center images, uint8 (n, H, W, C), on white tiles (n, height, width, C), for a grid of several image shapes."""
    down, across = height - images.shape[1], width - images.shape[2]
    margins = ((0, 0), (down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0))
    return np.pad(images, margins, constant_values=255)


def draw_grid(rows: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """Draw a grid of images with a label at the left of each row.

    Small images are enlarged by an integer factor without smoothing.

    Args:
        rows: (label, images) of each row; images are uint8 (n, H, W, 1 or 3), and n may differ between rows.

    Returns:
        The picture, RGB.
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
    """Write the picture of `draw_grid` as a PNG that is marked as a grid."""
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text(GRID_KEY, "grid of samples")
    picture.save(path, format="PNG", pnginfo=metadata)
