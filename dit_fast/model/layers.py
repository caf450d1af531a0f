"""Norms, self-attention and MLP of a block, and how linear layers run: whole, or with the bias to be added yet."""

from typing import NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from dit_fast.kernels import attention, qk_norm_rope, uses_triton
from dit_fast.kernels.attention.attention import MAX_HEAD_DIM, attention_backend
from dit_fast.kernels.recompute import NormRecipe, linear
from dit_fast.kernels.reference import rotate

Kind = TypeVar("Kind", bound=nn.Module)


def matrix_size(module: nn.Module) -> int:
    """Numbers in a module's matrices: the multiply-adds of one token that goes through each of them once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether the module is exactly a `kind`, so that its parts may be used instead of calling it.

    Not so for a subclass or another module in its place (LoRA, float8), hooks, or a forward that was replaced.
    """
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
    return type(module) is kind and not hooked


def without_bias(
    layer: nn.Module, x: Tensor, recipe: NormRecipe | None = None
) -> tuple[Tensor, Tensor | None]:
    """`layer(x)` as (product, bias still to be added), so that a fused kernel adds it and gives its gradient.

    `recipe`: of x, kept in its place. A layer that is not a plain nn.Linear (LoRA, float8) or has hooks is called as
    it is: (its output, None).
    """
    if is_plain(layer, nn.Linear):
        return linear(x, layer.weight, recipe=recipe), layer.bias
    return layer(x), None


def with_bias(layer: nn.Module, x: Tensor, recipe: NormRecipe | None = None) -> Tensor:
    """`layer(x)`, keeping `recipe` in place of x where the layer is a plain nn.Linear."""
    if is_plain(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias, recipe)
    return layer(x)


class Layout(NamedTuple):
    """Where a sequence's tokens stand, and which of them are there.

    rotation: (N or 1, T, K / 2, 2), cosine and sine of rotary positions, or None; present: bool (N, T), False for
    padding that no token attends to, or None: all are. told: the same of the condition's tokens, bool (N, S), where
    cross-attention attends to them.
    """

    rotation: Tensor | None = None
    present: Tensor | None = None
    told: Tensor | None = None


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang & Sennrich 2019, equation 4), in float32 at least; returns the dtype of x."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = nn.functional.rms_norm(wide, x.shape[-1:], eps=self.eps)
        return (y if self.weight is None else y * self.weight).to(x.dtype)


def make_norm(kind: str, width: int, affine: bool) -> nn.LayerNorm | RMSNorm:
    """A norm of NORMS over the last dimension, with a weight (a layer norm: and a bias) of its own or without."""
    if kind == "rmsnorm":
        return RMSNorm(width, eps=1e-6, elementwise_affine=affine)
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)


class Attention(nn.Module):
    """Multi-head self-attention on one packed projection; rows of `qkv` are [q; k; v], each (heads, head_dim).

    `backend`: "auto" | "triton" | "sdpa" | "cudnn" | "flash", see `dit_fast.kernels.attention`. `qk_norm`: an RMSNorm
    for the queries and one for the keys of each head (Dehghani et al. 2023, section 2). It, a layout's rotation and the
    bias before them are one operation where the kernels run, `dit_fast.kernels.qk_norm_rope`, unless a norm was
    replaced or hooked; a layout with padding is attended to by PyTorch's attention alone.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        backend: str = "auto",
        qk_norm: bool = False,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_size {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.backend = backend
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.q_norm: nn.Module = RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def project(
        self,
        x: Tensor,
        layout: Layout | None = None,
        recipe: NormRecipe | None = None,
        kernels: str = "reference",
    ) -> Tensor:
        """Queries, keys and values (N, T, 3, H, K) of tokens x (N, T, D), normalised and rotated where they are."""
        heads = (3, self.num_heads, self.head_dim)
        rotation = None if layout is None else layout.rotation
        norm = self.fused_norm() if uses_triton(kernels, x) and self.is_prepared(layout) else None
        if norm is not None:
            qkv, bias = without_bias(self.qkv, x, recipe)
            weight, eps = norm
            qkv = qk_norm_rope(qkv, self.num_heads, bias, weight, rotation, eps, kernels=kernels)
            return qkv.unflatten(2, heads)
        packed = with_bias(self.qkv, x, recipe).unflatten(2, heads)
        if not self.is_prepared(layout):
            return packed
        q, k, v = packed.unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return torch.stack([q, k, v], dim=2)

    def is_prepared(self, layout: Layout | None) -> bool:
        """Whether something is done to queries and keys between projection and attention."""
        rotated = layout is not None and layout.rotation is not None
        return rotated or type(self.q_norm) is not nn.Identity or type(self.k_norm) is not nn.Identity

    def fused_norm(self) -> tuple[Tensor | None, float] | None:
        """Weight (2, K) of both norms (None without) and eps; None where `qk_norm_rope` cannot stand for them."""
        q, k = self.q_norm, self.k_norm
        if self.head_dim > MAX_HEAD_DIM:
            return None
        if is_plain(q, nn.Identity) and is_plain(k, nn.Identity):
            return None, 1e-6
        if not (is_plain(q, RMSNorm) and is_plain(k, RMSNorm)):
            return None
        if q.weight is None or k.weight is None or q.eps != k.eps:
            return None
        return torch.stack([q.weight, k.weight]), q.eps

    def attend(
        self,
        x: Tensor,
        layout: Layout | None = None,
        recipe: NormRecipe | None = None,
        kernels: str = "auto",
    ) -> Tensor:
        """Attention before the output projection, (N, T, D); `recipe`: of x, kept in its place."""
        masked = layout is not None and layout.present is not None
        fused = attention_backend(x, self.head_dim, self.backend, kernels) == "triton"
        if fused and not masked and not self.is_prepared(layout):
            return self._mix(*without_bias(self.qkv, x, recipe), layout, kernels)
        return self._mix(self.project(x, layout, recipe, kernels).flatten(2), None, layout, kernels)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        return self.proj(self._mix(self.project(x, layout).flatten(2), None, layout))

    def _mix(self, qkv: Tensor, bias: Tensor | None, layout: Layout | None, kernels: str = "auto") -> Tensor:
        """Attention of qkv + bias, (N, T, 3 * H * K), among the tokens that are there: (N, T, D)."""
        if layout is None or layout.present is None:
            return attention(qkv, self.num_heads, bias, backend=self.backend, kernels=kernels)
        packed = qkv.unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mask = layout.present[:, None, None]
        return nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Linear - GELU (tanh approximation) - Linear.

    `epilogue`: who applies the GELU where the kernels run, see `dit_fast.kernels.mlp`; `forward` is plain PyTorch.
    """

    activation = "gelu"

    def __init__(self, in_features: int, hidden_features: int, *, epilogue: str = "auto"):
        super().__init__()
        self.epilogue = epilogue
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        return self.fc1, self.fc2

    def is_fusible(self) -> bool:
        """Whether this and its parts are what was built here, so that one operation may stand for them."""
        linears = all(is_plain(linear, nn.Linear) for linear in self.linears)
        tanh = is_plain(self.act, nn.GELU) and self.act.approximate == "tanh"
        return is_plain(self, Mlp) and linears and tanh


def swiglu_width(hidden_features: int) -> int:
    """The width of the `SwiGLU` that stands for a GELU of so many features."""
    return -(-2 * hidden_features // 24) * 8


class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * w2 x), w1 and w2 in one matrix `w12` (Shazeer 2020, equation 6); `forward` is plain PyTorch.

    `hidden_features`: of the GELU that it stands for; two thirds of it, up to a multiple of 8, are its own, so that
    the three matrices have the parameters of two.
    """

    activation = "swiglu"
    epilogue = "separate"

    def __init__(self, in_features: int, hidden_features: int):
        super().__init__()
        hidden = swiglu_width(hidden_features)
        self.w12 = nn.Linear(in_features, 2 * hidden)
        self.w3 = nn.Linear(hidden, in_features)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * value)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        return self.w12, self.w3

    def is_fusible(self) -> bool:
        """As in `Mlp`."""
        return is_plain(self, SwiGLU) and all(is_plain(linear, nn.Linear) for linear in self.linears)
