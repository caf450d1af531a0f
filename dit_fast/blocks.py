"""The adaLN-Zero block of the paper and its final layer (Peebles & Xie 2023, figure 3), on fused operations.

A block adds its branches lazily: `Stream` carries the residual stream together with the branch that has not been
added yet, so that the addition and the next norm are one pass over memory.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dit_fast.kernels import adaln_modulate, gated_residual, gated_residual_adaln, uses_triton


class Stream(NamedTuple):
    """The residual stream x + gate * (branch + bias) with its last addition pending (none: `branch` is None).

    x, branch (N, T, D); gate (N, D); bias (D,) or None.
    """

    x: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None

    def add(self, kernels: str) -> Tensor:
        """The stream as one tensor."""
        if self.branch is None or self.gate is None:
            return self.x
        return gated_residual(self.x, self.branch, self.gate, self.bias, kernels=kernels)

    def add_norm_modulate(
        self, shift: Tensor, scale: Tensor, eps: float, kernels: str
    ) -> tuple[Tensor, Tensor]:
        """The stream as one tensor and norm(stream) * (1 + scale) + shift."""
        if self.branch is None or self.gate is None:
            return self.x, adaln_modulate(self.x, shift, scale, eps, kernels=kernels)
        return gated_residual_adaln(
            self.x, self.branch, self.gate, shift, scale, self.bias, eps, kernels=kernels
        )


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift with one shift and scale (N, D) for all tokens of x (N, T, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module is exactly a `kind`, so that its parts may be used instead of calling it.

    Not so for a subclass or another module in its place (LoRA, float8), hooks, or a forward that was replaced.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not hooked


def without_bias(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """`linear(x)` as (product, bias still to be added), so that a fused kernel adds it and gives its gradient.

    A layer that is not a plain nn.Linear (LoRA, float8) or has hooks is called as it is: (its output, None).
    """
    if isinstance(linear, nn.Linear) and is_plain(linear, nn.Linear):
        return F.linear(x, linear.weight), linear.bias
    return linear(x), None


class Attention(nn.Module):
    """Multi-head self-attention on one packed projection; rows of `qkv` are [q; k; v], each (heads, head_dim)."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_size {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor) -> Tensor:
        """Attention before the output projection, (N, T, D)."""
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # (N, H, T, K)
        return out.transpose(1, 2).reshape(N, T, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(x))


class Mlp(nn.Module):
    """Linear - GELU (tanh approximation) - Linear."""

    def __init__(self, in_features: int, hidden_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, in_features)

    def expand(self, x: Tensor) -> Tensor:
        """The activations before the second projection, (N, T, hidden_features)."""
        return self.act(self.fc1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.expand(x))


class DiTBlock(nn.Module):
    """A transformer block with adaptive layer norm, initialised to the identity (adaLN-Zero).

    `forward(x, c)`: x (N, T, D), c (N, D) -> (N, T, D). Given a `Stream`, returns a `Stream`: that is how `DiT`
    runs its blocks.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, *, kernels: str = "auto"):
        super().__init__()
        self.kernels = kernels
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size, bias=True))

    def forward(self, x: Tensor | Stream, c: Tensor) -> Tensor | Stream:
        stream = x if isinstance(x, Stream) else Stream(x)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(
            6, dim=1
        )

        h, y = stream.add_norm_modulate(shift_msa, scale_msa, self.norm1.eps, self.kernels)
        stream = Stream(h, *self.attention_branch(y), gate_msa)
        h, y = stream.add_norm_modulate(shift_mlp, scale_mlp, self.norm2.eps, self.kernels)
        stream = Stream(h, *self.mlp_branch(y), gate_mlp)

        return stream if isinstance(x, Stream) else stream.add(self.kernels)

    def attention_branch(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """`self.attn(y)` as (branch, bias still to be added)."""
        if not uses_triton(self.kernels, y) or not is_plain(self.attn, Attention):
            return self.attn(y), None
        return without_bias(self.attn.proj, self.attn.attend(y))

    def mlp_branch(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """`self.mlp(y)` as (branch, bias still to be added)."""
        if not uses_triton(self.kernels, y) or not is_plain(self.mlp, Mlp):
            return self.mlp(y), None
        return without_bias(self.mlp.fc2, self.mlp.expand(y))


class FinalLayer(nn.Module):
    """Adaptive layer norm and the projection of each token to its patch of noise (and variance)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, *, kernels: str = "auto"):
        super().__init__()
        self.kernels = kernels
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels, bias=True)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size, bias=True))

    def forward(self, x: Tensor | Stream, c: Tensor) -> Tensor:
        stream = x if isinstance(x, Stream) else Stream(x)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        _, y = stream.add_norm_modulate(shift, scale, self.norm_final.eps, self.kernels)
        return self.linear(y)
