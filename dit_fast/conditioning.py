"""The other three ways of the paper to tell a DiT timestep and class (Peebles & Xie 2023, figure 3).

"in_context" gives them as two more tokens to plain `TransformerBlock`s, "cross_attention" lets the image's tokens
attend to the two, "adaln" regresses shift and scale of each norm; "adaln_zero", gates too, is `DiTBlock`. The norms,
and the additions of branches (with gates of one), run on the fused operations in all four.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dit_fast.blocks import (
    AdaptiveBlock,
    DiTBlock,
    FinalLayer,
    Projection,
    Stream,
    TransformerBlock,
    normed,
    unit_gate,
)
from dit_fast.kernels import uses_triton
from dit_fast.layers import is_plain, make_norm, matrix_size, with_bias, without_bias

ADAPTIVE = ("adaln_zero", "adaln")
"""Conditionings by one vector (N, D), timestep plus class; the others take these, or a caption, as tokens."""


class AdaLNBlock(AdaptiveBlock):
    """A transformer block with adaptive layer norm, without gates (adaLN)."""

    vectors = 4


class CrossAttention(nn.Module):
    """Multi-head attention from tokens x (N, T, D) to a condition's S tokens (Vaswani et al. 2017, section 3.2.2).

    Rows of `kv` are [k; v], each (heads, head_dim). Always PyTorch's scaled_dot_product_attention.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, q: Tensor, kv: Tensor, told: Tensor | None = None) -> Tensor:
        """Attention before the output projection: q (N, T, D), kv (N, S, 2 D) -> (N, T, D).

        told: bool (N, S), False for padding that is not attended to; None: all are.
        """
        N, T, D = q.shape
        q = q.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if told is None else told[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return out.transpose(1, 2).reshape(N, T, D)

    def forward(self, x: Tensor, kv: Tensor, told: Tensor | None = None) -> Tensor:
        """x (N, T, D) and what `self.kv` made of the condition's tokens, (N, S, 2 D) -> (N, T, D); as `attend`."""
        return self.proj(self.attend(self.q(x), kv, told))


class CrossAttentionBlock(TransformerBlock):
    """A transformer block with cross-attention between self-attention and MLP: `forward(x, c)`, c (N, S, D).

    Arguments and streams as in `TransformerBlock`.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, **options: Any):
        super().__init__(hidden_size, num_heads, mlp_ratio, affine=True, **options)
        self.norm_cross = make_norm(options.get("norm", "layernorm"), hidden_size, affine=True)
        self.cross = CrossAttention(hidden_size, num_heads)

    @property
    def condition_layer(self) -> nn.Module:
        return self.cross.kv

    def macs(self, tokens: int, condition_tokens: int) -> int:
        cross, S = self.cross, condition_tokens
        projections = tokens * (matrix_size(cross.q) + matrix_size(cross.proj)) + S * matrix_size(cross.kv)
        return super().macs(tokens, S) + projections + 2 * tokens * S * cross.proj.out_features

    def forward(
        self, x: Tensor | Stream, c: Tensor | None = None, modulation: Tensor | None = None
    ) -> Tensor | Stream:
        """`modulation` (N, S * 2 D): what `cross.kv(c)` gave earlier, flattened; then `c` is not read."""
        stream = x if isinstance(x, Stream) else Stream(x)
        made = None if modulation is None else modulation.unflatten(1, (-1, self.cross.kv.out_features))
        kv = self.cross.kv(c) if made is None else made
        stream = self.self_attention(stream)
        stream = self.cross_attention(stream, kv)
        stream = self.feed_forward(stream)
        return stream if isinstance(x, Stream) else stream.add(self.kernels)

    def cross_attention(self, stream: Stream, kv: Tensor) -> Stream:
        """The stream with cross-attention's branch pending."""
        norm, told = self.norm_cross, None if stream.layout is None else stream.layout.told
        h = normed(stream, norm, self.kernels)
        if not uses_triton(self.kernels, h.y) or not is_plain(self.cross, CrossAttention):
            return Stream(h.x, self.cross(h.y, kv, told), None, unit_gate(h.x), stream.layout)
        recipe = None if self.recompute == "none" else h.recipe
        attended = self.cross.attend(with_bias(self.cross.q, h.y, recipe), kv, told)
        return Stream(h.x, *without_bias(self.cross.proj, attended), unit_gate(h.x), stream.layout)


class PlainFinalLayer(Projection):
    """The final layer with a norm of its own weight; the condition is not read."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, **options: str):
        super().__init__(hidden_size, patch_size, out_channels, affine=True, **options)

    @property
    def condition_layer(self) -> nn.Module | None:
        return None

    def macs(self, tokens: int, condition_tokens: int) -> int:
        """As in `TransformerBlock`."""
        return tokens * matrix_size(self.linear)

    def forward(
        self, x: Tensor | Stream, c: Tensor | None = None, modulation: Tensor | None = None
    ) -> Tensor:
        stream = x if isinstance(x, Stream) else Stream(x)
        return self.linear(normed(stream, self.norm_final, self.kernels).y)


BLOCKS: dict[str, tuple[type[TransformerBlock], Any]] = {
    "adaln_zero": (DiTBlock, FinalLayer),
    "adaln": (AdaLNBlock, FinalLayer),
    "cross_attention": (CrossAttentionBlock, PlainFinalLayer),
    "in_context": (TransformerBlock, PlainFinalLayer),
}
"""Block and final layer of each conditioning."""

CONDITIONING = tuple(BLOCKS)
