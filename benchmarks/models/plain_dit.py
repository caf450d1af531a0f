"""The DiT in plain PyTorch, as one writes it from the paper: the peer that the timings are relative to.

Nothing of dit_fast runs in it; only the names of its parameters are those of `dit_fast.models.DiT`, so that one's
state dict loads into the other (`plain_twin`). `N` batch, `C` channels, `T` tokens, `D` width, `P` patch.
Peebles & Xie 2023, figure 3.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_fast.models import DiT, DiT_models


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, shift and scale (N, D) for all tokens of x (N, T, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainAttention(nn.Module):
    """Multi-head self-attention through PyTorch's scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(N, T, D))


class PlainMlp(nn.Module):
    """Linear - GELU (tanh approximation) - Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PlainBlock(nn.Module):
    """The adaLN-Zero block, every line of figure 3 an operation of its own."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = PlainAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = PlainMlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class PlainRMSNorm(nn.Module):
    """x / rms(x) in float32, with a weight or without."""

    def __init__(self, width: int, affine: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return y if self.weight is None else y * self.weight


class PlainRotaryAttention(nn.Module):
    """Attention of normed queries and keys that are turned by neighboring pairs."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = (PlainRMSNorm(width // heads, affine=True) for _ in range(2))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = turned(self.q_norm(q), rotation), turned(self.k_norm(k), rotation)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(N, T, D))


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """x (N, H, T, K) with neighboring pairs turned; rotation (1, T, K / 2, 2)."""
    (first, second), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), rotation.unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2).to(x.dtype)


class PlainSwiGLU(nn.Module):
    """Linear - SiLU of one half times the other - Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class PlainLightningBlock(nn.Module):
    """The adaLN-Zero block with RMSNorm, SwiGLU, normed queries and keys, and rotary positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = PlainRMSNorm(width, affine=False), PlainRMSNorm(width, affine=False)
        self.attn = PlainRotaryAttention(width, heads)
        self.mlp = PlainSwiGLU(width, 8 * width // 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rotation)
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class PlainFinalLayer(nn.Module):
    """Modulated norm and projection to the patches."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PlainPatchEmbed(nn.Module):
    """A convolution whose kernel and stride are one patch: (N, C, H, W) -> (N, T, D)."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class PlainTimestepEmbedder(nn.Module):
    """(N,) timesteps to (N, D): 256 sinusoids, then Linear - SiLU - Linear."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.pairs = frequencies // 2
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        exponents = torch.arange(self.pairs, dtype=torch.float32, device=t.device) / self.pairs
        angles = t[:, None].float() * torch.exp(-math.log(10000) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class PlainLabelEmbedder(nn.Module):
    """(N,) labels to (N, D); in training a share of them becomes the null class."""

    def __init__(self, num_classes: int, width: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), width)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)


class PlainDiT(nn.Module):
    """The model for the values of `dit_fast.models.DiT.config`; weights come by `load_state_dict`.

    `forward(x, t, y)`: x (N, C, H, W), t and y (N,) -> (N, 2C or C, H, W).
    """

    def __init__(
        self,
        input_size: list[int],
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        class_dropout_prob: float,
        num_classes: int,
        learn_sigma: bool,
    ):
        super().__init__()
        self.patch = patch_size
        self.rows, self.columns = (size // patch_size for size in input_size)
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PlainPatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = PlainTimestepEmbedder(hidden_size)
        self.y_embedder = PlainLabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = torch.zeros(1, self.rows * self.columns, hidden_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(PlainBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = PlainFinalLayer(hidden_size, patch_size**2 * out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).reshape(len(x), self.rows, self.columns, self.patch, self.patch, -1)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(len(x), -1, self.rows * self.patch, self.columns * self.patch)


def random_model(name: str, image_size: int = 256, **sizes: int) -> DiT:
    """A model of `DiT_models` whose zero-initialized tensors hold small normals, so that every branch counts.

    `sizes`: arguments of the constructor that differ, as depth=1.
    """
    torch.manual_seed(0)
    model = DiT_models[name](input_size=image_size // 8, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def plain_twin(model: DiT) -> PlainDiT:
    """The plain model with copies of the weights of `model`, on its device."""
    plain = PlainDiT(**model.config).to(model.pos_embed.device)
    plain.load_state_dict(model.state_dict())
    return plain
