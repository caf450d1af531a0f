"""Embedders of image, timestep, class label and caption.

`N` batch, `C` channels, `T` tokens, `D` width. Peebles & Xie 2023, section 3.2; the sinusoids are Vaswani et al. 2017.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dit_fast import kernels
from dit_fast.errors import ConfigError
from dit_fast.model.backends import Backends
from dit_fast.model.layers import is_plain
from dit_fast.utils.values import MANY, Pair, Whole

_SIDES = Pair(Whole(-MANY))


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or as two."""
    return _SIDES.check("size", size)


class PatchEmbed(nn.Module):
    """Image to patch tokens: a convolution whose kernel and stride are one patch.

    `forward(x, pos=None)`: image (N, C, H, W) -> tokens (N, T, D) in row-major order, plus `pos` (1, T, D) if given.
    Raises ConfigError when a side of the image is not a multiple of the patch.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        backends: Backends | None = None,
    ):
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.backends = backends or Backends()
        self.set_img_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def set_img_size(self, img_size: int | tuple[int, int]) -> None:
        """Expect images of this size from now on; ConfigError when it is not a multiple of the patch."""
        self.img_size = as_pair(img_size)
        self.grid_size = self.grid_of(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def grid_of(self, img_size: Sequence[int]) -> tuple[int, int]:
        """(rows, columns) of the patches of an image; ConfigError when its size is not a multiple of the patch."""
        (height, width), patch = img_size, self.patch_size[0]
        if height < 1 or width < 1 or height % patch or width % patch:
            near = "x".join(str(patch * max(1, round(side / patch))) for side in (height, width))
            raise ConfigError(
                f"input_size {height}x{width} is not a positive multiple of patch_size {patch}: "
                f"change one of them, for example to {near}"
            )
        return height // patch, width // patch

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        rows, columns = self.grid_of((x.shape[-2], x.shape[-1]))
        if not self.is_fusible():
            # The weight may be stored in another dtype than it is used in.
            tokens = self.proj(x if pos is None else x.to(pos.dtype)).flatten(2).transpose(1, 2)
            # Without a copy, the residual stream would keep the convolution's channels-first memory order through all
            # blocks, see `reference.patch_embed`.
            tokens = tokens.contiguous()
            return tokens if pos is None else tokens + pos
        weight, bias = self.proj.weight, cast(Tensor, self.proj.bias)
        if pos is None:
            pos = weight.new_zeros(1, rows * columns, len(weight))
        return kernels.patch_embed(x, weight, bias, pos, kernels=self.backends.kernels)

    def is_fusible(self) -> bool:
        """Whether `proj` is unchanged, so that `dit_fast.kernels.patch_embed` computes the same."""
        conv = self.proj
        if not is_plain(conv, nn.Conv2d) or conv.bias is None or conv.groups != 1:
            return False
        patches = conv.kernel_size == conv.stride == self.patch_size
        return patches and conv.padding == (0, 0) and conv.dilation == (1, 1)


class TimestepEmbedder(nn.Module):
    """Scalar timesteps to vectors: sinusoids (cosine first), then Linear - SiLU - Linear.

    `freq_shift` is 0 in the reference; with 1 the last frequency is exactly 1 / 10000 (Ho et al. 2020, diffusers).
    """

    freq_shift: float = 0

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size, bias=True),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size, bias=True),
        )
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(
        t: Tensor,
        dim: int,
        max_period: float = 10000,
        freq_shift: float = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """(N,) timesteps, also fractional, to (N, dim): [cos(t f), sin(t f)].

        f = max_period^(-i / (half - freq_shift)), i = 0, ..., half - 1.
        """
        half = dim // 2
        exponents = torch.arange(half, dtype=dtype, device=t.device)
        freqs = torch.exp(-math.log(max_period) * exponents / (half - freq_shift))
        args = t[:, None].to(dtype) * freqs[None]
        embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
        return nn.functional.pad(embedding, (0, dim % 2))

    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Timesteps (N,) to (N, D); `dtype`: of the input of the layers, None: of the first one's weight."""
        # Sinusoids in float32 also for low-precision weights: bfloat16 rounds timesteps above 256.
        dtype = dtype or cast(nn.Linear, self.mlp[0]).weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        t_freq = self.timestep_embedding(
            t, self.frequency_embedding_size, freq_shift=self.freq_shift, dtype=wide
        )
        return self.mlp(t_freq.to(dtype))


class LabelEmbedder(nn.Module):
    """Class labels to vectors, with label dropout for classifier-free guidance (Ho & Salimans 2022).

    With `dropout_prob` > 0 the table has one more row, the null class `num_classes`.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def initialize_weights(self) -> None:
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Labels (N,), a random fraction of them, or those where `force_drop_ids` is 1, replaced by the null class."""
        if force_drop_ids is None:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
        else:
            drop = force_drop_ids == 1
        return torch.where(drop, self.num_classes, labels)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        try:
            return self.embedding_table(labels)
        except IndexError:  # CUDA reports this by a device-side assertion instead.
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise ConfigError(
                f"labels are {found}: the model has {self.num_classes} classes, 0 to {self.num_classes - 1}"
            ) from None


class CaptionEmbedder(nn.Module):
    """Captions (N, S, E) of a text encoder to tokens (N, S, D): Linear - GELU - Linear, with caption dropout.

    The projection of PixArt-alpha (Chen et al. 2023, arXiv:2310.00426). A token of zeros is padding and
    stays zeros; the first token of a caption that is all padding becomes a learned one, the null caption's.
    """

    def __init__(self, caption_dim: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(caption_dim, hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden_size, hidden_size),
        )
        self.null_token = nn.Parameter(torch.zeros(1, hidden_size))
        self.dropout_prob = dropout_prob

    def initialize_weights(self) -> None:
        for weight in (self.mlp[0].weight, self.mlp[2].weight, self.null_token):
            nn.init.normal_(cast(Tensor, weight), std=0.02)

    def forward(self, captions: Tensor, train: bool) -> Tensor:
        if train and self.dropout_prob > 0:
            drop = torch.rand(len(captions), device=captions.device) < self.dropout_prob
            captions = torch.where(drop[:, None, None], 0, captions)
        present = (captions != 0).any(dim=-1, keepdim=True)
        tokens = self.mlp(captions.to(self.null_token.dtype))
        # The biases of the projection would make padding nonzero, and padding is recognized by its zeros.
        tokens = torch.where(present, tokens, 0)
        empty = ~present.any(dim=1)
        first = torch.where(empty, self.null_token.to(tokens.dtype), tokens[:, 0])
        return torch.cat([first[:, None], tokens[:, 1:]], dim=1)
