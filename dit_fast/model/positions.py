"""Positions of an image's patches: sine tables, learned tables, and rotary angles.

"sincos" adds the paper's fixed table (Vaswani et al. 2017), "learned" a trained one (Dosovitskiy et al. 2021), "rope"
rotates queries and keys instead (Su et al. 2021), half of a head by the row and half by the column, "sincos_rope" does
both (as LightningDiT, Yao et al. 2025). A grid is (rows, columns) of patches; its T tokens are in row-major order.
"""

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Positions = Literal["sincos", "learned", "rope", "sincos_rope"]
POSITIONS = get_args(Positions)
SINES, ROTARY = ("sincos", "sincos_rope"), ("rope", "sincos_rope")
PERIOD = 10000.0
_CPU = torch.device("cpu")


def coordinates(
    grid: tuple[int, int], steps: tuple[float, float] = (1.0, 1.0), device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """(column, row) of each token, float64 (T,), patches `steps` (row, column) apart."""
    rows, columns = (
        torch.arange(count, dtype=torch.float64, device=device) * step
        for count, step in zip(grid, steps, strict=True)
    )
    return columns.repeat(grid[0]), rows.repeat_interleave(grid[1])


def angles(places: Tensor, count: int) -> Tensor:
    """(T, count): places (T,) times the frequencies PERIOD^(-k / count), k = 0 ... count - 1."""
    powers = torch.arange(count, dtype=places.dtype, device=places.device) / count
    return places[:, None] * PERIOD**-powers


def sinusoids(places: Tensor, width: int) -> Tensor:
    """(T, width) of places (T,): the sines, then the cosines. ValueError for an odd width."""
    if width % 2:
        raise ValueError(f"embed_dim {width} is odd: sines and cosines come in pairs")
    turned = angles(places, width // 2)
    return torch.cat([turned.sin(), turned.cos()], dim=1)


def sincos_table(
    grid: tuple[int, int],
    width: int,
    steps: tuple[float, float] = (1.0, 1.0),
    device: torch.device | None = None,
) -> Tensor:
    """(1, T, width) float32: the first half encodes the column, the second the row."""
    return _halves(*coordinates(grid, steps, device), width)[None].float()


def resized_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a learned table (1, T, D) from the grid `old` to `new`, bicubic (Dosovitskiy et al. 2021, section 3.2)."""
    image = table.unflatten(1, old).permute(0, 3, 1, 2).float()
    resized = F.interpolate(image, new, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(table.dtype)


def check_rotary(head_dim: int) -> None:
    """ValueError for a head width that does not split into pairs for two coordinates."""
    if head_dim % 4:
        raise ValueError(
            f"positions='rope' rotates pairs by row and by column: a head of {head_dim} is not a multiple of 4; "
            "change hidden_size or num_heads"
        )


def rotary_angles(grid: tuple[int, int], head_dim: int, device: torch.device | None = None) -> Tensor:
    """(T, head_dim / 2) float32, an angle per pair of a head: the first half by the row, the second by the column."""
    column, row = coordinates(grid, device=device)
    return torch.cat([angles(row, head_dim // 4), angles(column, head_dim // 4)], dim=1).float()


def get_2d_sincos_pos_embed(
    embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False, extra_tokens: int = 0
) -> np.ndarray:
    """(extra_tokens + T, embed_dim) float64 positions of a grid of (rows, columns), or of a square one.

    The first half of the width encodes the column, the second half the row. With `cls_token`, `extra_tokens` rows of
    zeros come first.
    """
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    embedding = _halves(*coordinates((rows, columns), device=_CPU), embed_dim).numpy()
    if cls_token and extra_tokens > 0:
        embedding = np.concatenate([np.zeros([extra_tokens, embed_dim]), embedding])
    return embedding


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: np.ndarray) -> np.ndarray:
    """(T, embed_dim) from the two coordinates of each token, `grid` (2, ...); half of the width for each."""
    first, second = torch.as_tensor(grid, device=_CPU).double().flatten(1)
    return _halves(first, second, embed_dim).numpy()


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: np.ndarray) -> np.ndarray:
    """(M, embed_dim) of M coordinates: [sin(pos w), cos(pos w)], w = 10000^(-k / (embed_dim / 2))."""
    return sinusoids(torch.as_tensor(pos, device=_CPU).double().flatten(), embed_dim).numpy()


def _halves(first: Tensor, second: Tensor, width: int) -> Tensor:
    if width % 4:
        raise ValueError(f"hidden_size {width} is not a multiple of 4, which 2-d sine positions need")
    return torch.cat([sinusoids(first, width // 2), sinusoids(second, width // 2)], dim=1)
