"""A model laid out as LightningDiT (Yao et al. 2025) is, in plain PyTorch, with its options.

Its rotary positions are complex numbers here, so that nothing of dit_fast's own formula is repeated.
"""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.plain_dit import PlainDiT, PlainFinalLayer, PlainMlp, modulate
from dit_fast.models import get_2d_sincos_pos_embed

SMALL: dict[str, Any] = {
    "input_size": [4, 4], "patch_size": 1, "in_channels": 8, "hidden_size": 64, "depth": 2, "num_heads": 4,
    "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 10, "learn_sigma": False,
}  # fmt: skip
PUBLISHED = {"rmsnorm": True, "swiglu": True, "rope": True}


class Norm(nn.Module):
    """RMSNorm with a weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class Rope(nn.Module):
    """Buffers as EVA-02's: the angle of each number of a head, by row in its first half and by column in the second."""

    def __init__(self, side: int, head_dim: int, base: float = 10000.0):
        super().__init__()
        pairs = head_dim // 4
        frequencies = torch.tensor([base ** (-k / pairs) for k in range(pairs)])
        places = [(row, column) for row in range(side) for column in range(side)]
        angles = torch.stack([torch.cat([row * frequencies, column * frequencies]) for row, column in places])
        self.register_buffer("freqs_cos", angles.cos().repeat_interleave(2, dim=1))
        self.register_buffer("freqs_sin", angles.sin().repeat_interleave(2, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        turn = torch.complex(self.freqs_cos[:, ::2], self.freqs_sin[:, ::2])
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: type[nn.Module] | None):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = qk_norm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: nn.Module) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).tensor_split(2, dim=-1)
        return self.w3(gate * gate.sigmoid() * value)


class Block(nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        rmsnorm: bool,
        swiglu: bool,
        qk_norm: bool,
        wo_shift: bool,
        rope: nn.Module,
    ):
        super().__init__()
        self.rope = (rope,)
        self.norm1, self.norm2 = (make_norm(width, rmsnorm) for _ in range(2))
        kind: type[nn.Module] = Norm if rmsnorm else nn.LayerNorm
        self.attn = Attention(width, heads, kind if qk_norm else None)
        self.mlp = SwiGLU(width, int(2 / 3 * (4 * width))) if swiglu else PlainMlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (4 if wo_shift else 6) * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts = self.adaLN_modulation(c).split(x.shape[-1], dim=1)
        none = torch.zeros_like(parts[0])
        shifts, scales, gates = (
            (parts[0::3], parts[1::3], parts[2::3])
            if len(parts) == 6
            else ((none, none), parts[0::2], parts[1::2])
        )
        x = x + gates[0][:, None] * self.attn(modulate(self.norm1(x), shifts[0], scales[0]), *self.rope)
        return x + gates[1][:, None] * self.mlp(modulate(self.norm2(x), shifts[1], scales[1]))


def make_norm(width: int, rmsnorm: bool) -> nn.Module:
    return Norm(width) if rmsnorm else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class LightningDiT(PlainDiT):
    """All weights are random, the norms' around 1; eval mode. Of 2 C channels the first C are the answer."""

    def __init__(
        self,
        rmsnorm: bool = False,
        swiglu: bool = False,
        rope: bool = False,
        qk_norm: bool = False,
        wo_shift: bool = False,
        base: float = 10000.0,
        **changes: Any,
    ):
        config = {**SMALL, **changes}
        super().__init__(**config)
        width, heads = config["hidden_size"], config["num_heads"]
        feat_rope = Rope(self.rows, width // heads, base) if rope else nn.Identity()
        self.feat_rope = feat_rope
        self.blocks = nn.ModuleList(
            Block(width, heads, rmsnorm, swiglu, qk_norm, wo_shift, feat_rope) for _ in range(config["depth"])
        )
        self.final_layer = PlainFinalLayer(width, self.final_layer.linear.out_features)
        self.final_layer.norm_final = make_norm(width, rmsnorm)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(one + torch.randn(parameter.shape, generator=draw) * (0.3 if one else 0.1))
            self.pos_embed.copy_(torch.from_numpy(get_2d_sincos_pos_embed(width, self.rows)).float()[None])
        self.eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)[:, : x.shape[1]]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x (3, 8, 4, 4), times from noise to data (3,), y (3,), the last label the null class of ten."""
    x = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.0, 0.37, 1.0]), torch.tensor([1, 7, 10])


def answer(model: nn.Module) -> Tensor:
    """float32 (3, 8, 4, 4), of any model that takes those."""
    with torch.no_grad():
        return model(*inputs())[:, :8]
