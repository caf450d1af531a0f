"""Models laid out as facebookresearch/DiT and SiT are, with timm's attention and MLP, in plain PyTorch.

The maths is that of benchmarks/models/plain_dit.py; what is added are the attributes and the inert layers that timm's
modules carry (q_norm, k_norm, dropouts), which is what a live reference model looks like.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.plain_dit import PlainDiT, PlainFinalLayer, modulate

SMALL: dict[str, Any] = {
    "input_size": [8, 8], "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 4,
    "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 10, "learn_sigma": True,
}  # fmt: skip


class TimmAttention(nn.Module):
    """timm's `Attention` with qkv_bias."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(N, T, D)))


class TimmMlp(nn.Module):
    """timm's `Mlp`."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(dropout)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class DiTBlock(nn.Module):
    """The adaLN-Zero block."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = TimmAttention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = TimmMlp(dim, 4 * dim, dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class ReferenceDiT(PlainDiT):
    """`block` makes the blocks; weights are random everywhere, its zero-initialised layers too."""

    def __init__(self, block: type[nn.Module] = DiTBlock, dropout: float = 0.0, **changes: Any):
        config = {**SMALL, **changes}
        super().__init__(**config)
        width, heads = config["hidden_size"], config["num_heads"]
        extra = (dropout,) if dropout else ()
        self.blocks = nn.ModuleList(block(width, heads, *extra) for _ in range(config["depth"]))
        randomise(self)


class SiT(ReferenceDiT):
    """SiT keeps the velocity and drops the second half of the channels."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y).chunk(2, dim=1)[0]


class OtherFinalLayer(PlainFinalLayer):
    """A final layer of other maths in the same parts."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c) + 1


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Normal weights of deviation 0.15, the same for the same seed; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x (3, 4, 8, 8), t (3,), y (3,), the last label the null class of ten."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 321, 999]), torch.tensor([1, 7, 10])
