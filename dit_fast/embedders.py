"""What turns image, timestep and label into vectors: `PatchEmbed`, `TimestepEmbedder`, `LabelEmbedder`, positions.

`N` batch, `C` channels, `T` tokens, `D` width. Peebles & Xie 2023, section 3.2; the sinusoids are Vaswani et al. 2017.
"""

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from dit_fast import kernels


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or as two."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


class PatchEmbed(nn.Module):
    """Image to patch tokens: a convolution whose kernel and stride are one patch.

    `forward(x, pos=None)` takes (N, C, H, W) and returns (N, T, D), tokens in row-major order, plus `pos`
    (1, T, D) when given. Raises ValueError when the image is not of `img_size`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        kernels: str = "auto",
    ):
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.kernels = kernels
        self.set_img_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def set_img_size(self, img_size: int | tuple[int, int]) -> None:
        """Expect images of this size from now on; ValueError when it is not a multiple of the patch."""
        height, width = as_pair(img_size)
        patch = self.patch_size[0]
        if height < 1 or width < 1 or height % patch or width % patch:
            raise ValueError(
                f"input_size {height}x{width} is not a positive multiple of patch_size {patch}: "
                "change one of them"
            )
        self.img_size = (height, width)
        self.grid_size = (height // patch, width // patch)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"input is {x.shape[-2]}x{x.shape[-1]}, the model's input_size is "
                f"{self.img_size[0]}x{self.img_size[1]}: call model.regrid(...) to change it"
            )
        if pos is None:
            pos = x.new_zeros(1, self.num_patches, self.proj.out_channels, dtype=self.proj.weight.dtype)
        bias = cast(Tensor, self.proj.bias)
        return kernels.patch_embed(x, self.proj.weight, bias, pos, kernels=self.kernels)


class TimestepEmbedder(nn.Module):
    """Scalar timesteps to vectors: sinusoids (cosine first), then Linear - SiLU - Linear."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size, bias=True),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size, bias=True),
        )
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
        """(N,) timesteps, also fractional, to (N, dim) float32: [cos(t f), sin(t f)], f = max_period^(-i / half)."""
        half = dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device)
        freqs = torch.exp(-math.log(max_period) * exponents / half)
        args = t[:, None].float() * freqs[None]
        embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
        return nn.functional.pad(embedding, (0, dim % 2))

    def forward(self, t: Tensor) -> Tensor:
        t_freq = self.timestep_embedding(t, self.frequency_embedding_size)
        return self.mlp(t_freq.to(cast(nn.Linear, self.mlp[0]).weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels to vectors, with label dropout for classifier-free guidance (Ho & Salimans 2022).

    With `dropout_prob` > 0 the table has one more row, the null class `num_classes`.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """(N,) labels with a random share, or those where `force_drop_ids` is 1, replaced by the null class."""
        if force_drop_ids is None:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
        else:
            drop = force_drop_ids == 1
        return torch.where(drop, self.num_classes, labels)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)


def get_2d_sincos_pos_embed(
    embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False, extra_tokens: int = 0
) -> np.ndarray:
    """(extra_tokens + T, embed_dim) float64 positions of a grid of (rows, columns), or of a square one.

    The first half of the width encodes the column, the second half the row. `extra_tokens` rows of zeros stand in
    front when `cls_token` is set.
    """
    rows, columns = as_pair(grid_size)
    grid = np.stack(np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32)))
    embedding = get_2d_sincos_pos_embed_from_grid(embed_dim, grid)
    if cls_token and extra_tokens > 0:
        embedding = np.concatenate([np.zeros([extra_tokens, embed_dim]), embedding])
    return embedding


def stepped_grid(grid_size: tuple[int, int], steps: tuple[float, float]) -> np.ndarray:
    """(2, rows, columns) float64: the column's and the row's coordinate of each token, `steps` (row, column) apart."""
    rows, columns = (np.arange(n, dtype=np.float64) * step for n, step in zip(grid_size, steps, strict=True))
    return np.stack(np.meshgrid(columns, rows))


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: np.ndarray) -> np.ndarray:
    """(T, embed_dim) from the two coordinates of each token, `grid` (2, ...); half of the width for each."""
    if embed_dim % 4:
        raise ValueError(f"hidden_size {embed_dim} is not a multiple of 4, which 2-d sine positions need")
    halves = [get_1d_sincos_pos_embed_from_grid(embed_dim // 2, axis) for axis in grid]
    return np.concatenate(halves, axis=1)


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: np.ndarray) -> np.ndarray:
    """(M, embed_dim) of M coordinates: [sin(pos w), cos(pos w)], w = 10000^(-k / (embed_dim / 2))."""
    if embed_dim % 2:
        raise ValueError(f"embed_dim {embed_dim} is odd: sines and cosines come in pairs")
    omega = 1.0 / 10000 ** (np.arange(embed_dim // 2, dtype=np.float64) / (embed_dim / 2.0))
    angles = np.outer(pos.reshape(-1), omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
