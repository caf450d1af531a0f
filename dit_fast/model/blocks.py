"""Blocks and final layers of every conditioning (Peebles & Xie 2023, figure 3), on fused operations.

A block adds its branches lazily: `Stream` carries the residual stream together with the branch that is not added yet,
so that the addition and the next norm are one pass over memory. Biases are delayed in the same way, so that the kernel
that adds a bias also sums its gradient.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeGuard, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_fast.kernels import adaln_modulate, gated_residual, gated_residual_adaln, jvp, mlp, uses_triton
from dit_fast.kernels.adaln import adaln_with_moments, gated_residual_adaln_with_moments
from dit_fast.kernels.attention.backends import scaled_dot_product
from dit_fast.kernels.library import is_centred
from dit_fast.kernels.recompute import NormRecipe
from dit_fast.model.backends import Backends
from dit_fast.model.layers import (
    Attention,
    Layout,
    Mlp,
    RMSNorm,
    SwiGLU,
    is_plain,
    is_seen,
    make_norm,
    matrix_size,
    with_bias,
    without_bias,
)


class Normed(NamedTuple):
    """The residual stream x, y = norm(x) * (1 + scale) + shift, and the recipe that recomputes y (None: save y)."""

    x: Tensor
    y: Tensor
    recipe: NormRecipe | None


class Stream(NamedTuple):
    """The residual stream x + gate * (branch + bias), its last addition pending (`branch` None: none is).

    x, branch (N, T, D); gate (N, D); bias (D,) or None. layout: positions and padding of the tokens, or None.
    """

    x: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None
    layout: Layout | None = None

    def add(self, kernels: str) -> Tensor:
        """The stream as one tensor."""
        if self.branch is None or self.gate is None:
            return self.x
        return gated_residual(self.x, self.branch, self.gate, self.bias, kernels=kernels)

    def norm_modulate(
        self, shift: Tensor, scale: Tensor, eps: float, kernels: str, norm: str = "layernorm"
    ) -> Normed:
        """Add the pending branch, then norm(stream) * (1 + scale) + shift; `norm`: one of NORMS."""
        fused = uses_triton(kernels, self.x)
        if self.branch is None or self.gate is None:
            if not fused:
                y = adaln_modulate(self.x, shift, scale, eps, norm=norm, kernels=kernels)
                return Normed(self.x, y, None)
            x, (y, mean, rstd) = self.x, adaln_with_moments(self.x, shift, scale, eps, is_centred(norm))
        else:
            inputs = (self.x, self.branch, self.gate, shift, scale, self.bias, eps)
            if not fused:
                return Normed(*gated_residual_adaln(*inputs, norm=norm, kernels=kernels), None)
            x, y, mean, rstd = gated_residual_adaln_with_moments(*inputs, is_centred(norm))
        return Normed(x, y, NormRecipe(x, mean, rstd, shift, scale))


def normed(
    stream: Stream,
    norm: nn.Module,
    kernels: str,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Normed:
    """Add the pending branch, then norm(stream) * (1 + scale) + shift; without shift and scale, norm(stream).

    A norm from `make_norm` is fused, with its eps and, without shift and scale, its weight and bias. Any other is
    called: a replaced norm, one with hooks, or one that has a weight beside shift and scale.
    """
    adaptive = shift is not None and scale is not None
    if shift is None or scale is None:
        shift, scale = affine_modulation(norm, stream.x)
    if not is_built_here(norm) or (adaptive and norm.weight is not None):
        x = stream.add(kernels)
        return Normed(x, modulate(norm(x), shift, scale).to(scale.dtype), None)
    kind = "rmsnorm" if isinstance(norm, RMSNorm) else "layernorm"
    return stream.norm_modulate(shift, scale, norm.eps, kernels, kind)


def is_built_here(norm: nn.Module) -> TypeGuard[nn.LayerNorm | RMSNorm]:
    """Whether the norm is as `make_norm` builds it, so that a fused operation computes the same."""
    return (is_plain(norm, nn.LayerNorm) or is_plain(norm, RMSNorm)) and len(norm.normalized_shape) == 1


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift with one shift and scale (N, D) for all tokens of x (N, T, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def affine_modulation(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(shift, scale), each (N, D), with which `normed` computes norm(x) * weight + bias of an affine norm.

    Zeros for a norm that `normed` calls, and in place of a missing weight or bias. Under autocast the scale has
    autocast's dtype, which is then the dtype of the norm's output.
    """
    shift = scale = x.new_zeros(1, x.shape[-1]).expand(x.shape[0], -1)
    if is_built_here(norm):
        bias = None if isinstance(norm, RMSNorm) else norm.bias
        if bias is not None:
            shift = bias.expand(x.shape[0], -1)
        if norm.weight is not None:
            scale = (norm.weight - 1).expand(x.shape[0], -1)
    if torch.is_autocast_enabled(x.device.type):
        scale = scale.to(torch.get_autocast_dtype(x.device.type))
    return shift, scale


def unit_gate(x: Tensor) -> Tensor:
    """A gate of ones (N, D): the fused addition and norm then also compute a branch without a gate."""
    return x.new_ones(1, x.shape[-1]).expand(x.shape[0], -1)


class TransformerBlock(nn.Module):
    """A pre-norm transformer block (Dosovitskiy et al. 2021): the one of in-context conditioning, which others extend.

    `forward(x, c)`: x (N, T, D) -> (N, T, D); c is not read, the condition is among the tokens; `layout` as in
    `Attention`. For a `Stream` it returns a `Stream`: `run_block` calls it so. `affine`: whether the norms have their
    own weight and bias. The other options as in `DiT`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        affine: bool = True,
        norm: str = "layernorm",
        mlp: str = "gelu",
        qk_norm: bool = False,
        backends: Backends | None = None,
    ):
        super().__init__()
        self.backends = backends or Backends()
        self.norm1 = make_norm(norm, hidden_size, affine)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True, qk_norm=qk_norm, backends=self.backends)
        self.norm2 = make_norm(norm, hidden_size, affine)
        self.mlp = (SwiGLU if mlp == "swiglu" else Mlp)(hidden_size, int(hidden_size * mlp_ratio))

    @property
    def condition_layer(self) -> nn.Module | None:
        """The layer of the condition alone, which sampling computes before its loop; None: there is none."""
        return None

    def macs(self, tokens: int, condition_tokens: int) -> int:
        """Multiply-adds of one sample of `tokens` with `condition_tokens`; elementwise work is not counted."""
        per_token = matrix_size(self.attn) + matrix_size(self.mlp)
        return tokens * per_token + 2 * tokens**2 * self.attn.proj.out_features

    def forward(
        self,
        x: Tensor | Stream,
        c: Tensor | None = None,
        modulation: Tensor | None = None,
        layout: Layout | None = None,
        tangents: tuple[Any, Any] | None = None,
    ) -> Any:
        """`modulation`: the output of `condition_layer` for c, computed earlier; c is then not read.

        With `tangents`, of x and c, the output and its tangent, see `dit_fast.kernels.jvp`: forward mode begins and
        ends within the block, whose hooks and recomputation see plain tensors.
        """

        def run(x: Tensor | Stream, c: Tensor | None) -> Tensor | Stream:
            stream = x if isinstance(x, Stream) else Stream(x, layout=layout)
            stream = self.advance(stream, c, modulation)
            return stream if isinstance(x, Stream) else stream.add(self.backends.kernels)

        return run(x, c) if tangents is None else jvp(run, (x, c), tangents)

    def advance(self, stream: Stream, c: Tensor | None, modulation: Tensor | None) -> Stream:
        """The block's branches on a stream; the last addition stays pending."""
        return self.feed_forward(self.self_attention(stream))

    def self_attention(
        self,
        stream: Stream,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Stream:
        """The stream with attention's branch pending.

        Without shift and scale the norm uses its own weights; without a gate the branch is added unscaled.
        """
        h, layout = normed(stream, self.norm1, self.backends.kernels, shift, scale), stream.layout
        gate = unit_gate(h.x) if gate is None else gate
        return Stream(h.x, *self.attention_branch(h, layout), gate, layout)

    def feed_forward(
        self,
        stream: Stream,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Stream:
        """The stream with the MLP's branch pending; shift, scale and gate as in `self_attention`."""
        h = normed(stream, self.norm2, self.backends.kernels, shift, scale)
        return Stream(h.x, *self.mlp_branch(h), unit_gate(h.x) if gate is None else gate, stream.layout)

    def attention_branch(self, h: Normed, layout: Layout | None = None) -> tuple[Tensor, Tensor | None]:
        """`self.attn(h.y, layout)` as (branch, bias that is not added yet)."""
        if not uses_triton(self.backends.kernels, h.y) or not is_plain(self.attn, Attention):
            # A module in attention's place need not take a layout, which most models do not have.
            return self.attn(h.y) if layout is None else self.attn(h.y, layout), None
        recipe = None if self.backends.recompute == "none" else h.recipe
        return without_bias(self.attn.proj, self.attn.attend(h.y, layout, recipe))

    def mlp_branch(self, h: Normed) -> tuple[Tensor, Tensor | None]:
        """`self.mlp(h.y)` as (branch, bias that is not added yet)."""
        module = self.mlp
        if (
            not uses_triton(self.backends.kernels, h.y)
            or not isinstance(module, Mlp | SwiGLU)
            or not module.is_fusible()
        ):
            return module(h.y), None
        first, last = module.linears
        keep = self.backends.recompute == "none"
        branch = mlp(
            h.y, first.weight, first.bias, last.weight,
            activation=module.activation, keep_activation=keep, epilogue=self.backends.mlp_epilogue,
            recipe=None if keep else h.recipe, kernels=self.backends.kernels,
        )  # fmt: skip
        bias: Tensor | None = last.bias
        if bias is not None and hasattr(type(self), "reshard"):
            # `fully_shard` frees a block's own parameters when it returns, and the next block adds this one.
            bias = bias.clone()
        return branch, bias


class AdaptiveBlock(TransformerBlock):
    """A transformer block whose norms take shift and scale from the condition (adaptive layer norm).

    `forward(x, c)`: x (N, T, D), c (N, D) -> (N, T, D). Arguments and streams as in `TransformerBlock`. The condition
    becomes `vectors` vectors (N, D): shift, scale and, of 6, gate for attention, and the same for the MLP.
    """

    vectors: ClassVar[int]

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, **options: Any):
        super().__init__(hidden_size, num_heads, mlp_ratio, affine=False, **options)
        regression = nn.Linear(hidden_size, self.vectors * hidden_size, bias=True)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), regression)

    @property
    def condition_layer(self) -> nn.Module:
        return self.adaLN_modulation

    def macs(self, tokens: int, condition_tokens: int) -> int:
        return super().macs(tokens, condition_tokens) + matrix_size(self.adaLN_modulation)

    def advance(self, stream: Stream, c: Tensor | None, modulation: Tensor | None) -> Stream:
        """`modulation` (N, `vectors` * D): `adaLN_modulation(c)` computed earlier; c is then not read."""
        if modulation is None:
            modulation = self.adaLN_modulation(c)
        parts, half = modulation.chunk(self.vectors, dim=1), self.vectors // 2
        stream = self.self_attention(stream, *parts[:half])
        return self.feed_forward(stream, *parts[half:])


class DiTBlock(AdaptiveBlock):
    """A transformer block with adaptive layer norm and gates, initialized to the identity (adaLN-Zero)."""

    vectors = 6


def run_block(
    block: nn.Module,
    stream: Stream,
    c: Tensor | None,
    modulation: Tensor | None = None,
    *,
    kernels: str,
    recompute: bool = False,
) -> Stream:
    """Apply a block to the stream.

    A block that does not take a stream gets and returns (N, T, D), which its hooks then see, as in the reference; its
    last addition is not fused with the next norm. `recompute`: save the block's inputs only.
    """
    output = _call(block, block, arguments_of(block, stream, c, modulation, kernels), recompute)
    return output if isinstance(output, Stream) else Stream(output, layout=stream.layout)


def run_block_along(
    block: nn.Module,
    stream: Stream,
    c: Tensor,
    tangents: tuple[Any, Any],
    *,
    kernels: str,
    recompute: bool = False,
) -> tuple[Stream, Any]:
    """`run_block` and the tangent of its output, given those of stream and c.

    A block that does not take a stream is given dual tensors, so that what it and its hooks compute has a tangent too.
    """
    if takes_stream(block):
        return _call(block, block, (stream, c, None, None, tangents), recompute)
    run = functools.partial(run_block, block, kernels=kernels)
    return _call(block, jvp, (run, (stream, c), tangents), recompute)


def _call(block: nn.Module, function: Callable[..., Any], arguments: tuple[Any, ...], recompute: bool) -> Any:
    """`function(*arguments)`, which computes the block; `recompute`: again in the backward pass."""
    if not recompute:
        return function(*arguments)
    # Not always: generator states cannot be read during the capture of a CUDA graph.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=may_draw(block))


def may_draw(block: nn.Module) -> bool:
    """Whether the block may draw random numbers, as an adapter with dropout or a hook may, and a new block does not."""
    return not takes_stream(block) or any(
        type(part) not in _DRAW_NOTHING or is_seen(part) for part in block.modules() if part is not block
    )


def run_final_layer(
    layer: nn.Module, stream: Stream, c: Tensor | None, modulation: Tensor | None = None, *, kernels: str
) -> Tensor:
    """Apply a final layer to the stream: (N, T, P * P * C); its hooks see (N, T, D), as those of a block."""
    x, *others = arguments_of(layer, stream, c, modulation, kernels)
    return cast(Tensor, layer(x, *others[:2]))


def arguments_of(
    block: nn.Module, stream: Stream, c: Tensor | None, modulation: Tensor | None, kernels: str
) -> tuple[Any, ...]:
    """What a block or final layer is called with: (stream, c, modulation), or (tokens, c) as in the reference.

    The latter is followed by `modulation` and the layout where there are any.
    """
    if takes_stream(block):
        return stream, c, modulation
    x = stream.add(kernels)
    if stream.layout is not None:
        return x, c, modulation, stream.layout
    return (x, c) if modulation is None else (x, c, modulation)


def takes_stream(block: nn.Module) -> bool:
    """Whether only a block of this file, or a subclass with its forward, sees what it is called with."""
    return type(block).forward in _FORWARDS and not is_seen(block)


class Projection(nn.Module):
    """Base of the final layers: a norm, and the projection of each token to its patch of noise (and variance)."""

    def __init__(
        self,
        hidden_size: int,
        patch_size: int,
        out_channels: int,
        *,
        affine: bool,
        norm: str = "layernorm",
        backends: Backends | None = None,
    ):
        super().__init__()
        self.backends = backends or Backends()
        self.norm_final = make_norm(norm, hidden_size, affine)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels, bias=True)


class FinalLayer(Projection):
    """The final layer with adaptive norm: `forward(x, c)`, x (N, T, D), c (N, D) -> (N, T, P * P * C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, **options: Any):
        super().__init__(hidden_size, patch_size, out_channels, affine=False, **options)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size, bias=True))

    @property
    def condition_layer(self) -> nn.Module:
        """As in `TransformerBlock`."""
        return self.adaLN_modulation

    def macs(self, tokens: int, condition_tokens: int) -> int:
        """As in `TransformerBlock`."""
        return tokens * matrix_size(self.linear) + matrix_size(self.adaLN_modulation)

    def forward(self, x: Tensor | Stream, c: Tensor | None, modulation: Tensor | None = None) -> Tensor:
        """`modulation` (N, 2 D): `adaLN_modulation(c)` computed earlier; c is then not read."""
        stream = x if isinstance(x, Stream) else Stream(x)
        if modulation is None:
            modulation = self.adaLN_modulation(c)
        shift, scale = modulation.chunk(2, dim=1)
        return with_bias(self.linear, normed(stream, self.norm_final, self.backends.kernels, shift, scale).y)


ADAPTIVE = ("adaln_zero", "adaln")
"""Conditionings by one vector (N, D), timestep plus class; the others take the condition as tokens."""


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

    def attend(self, q: Tensor, kv: Tensor, present: Tensor | None = None) -> Tensor:
        """Attention before the output projection: q (N, T, D), kv (N, S, 2 D) -> (N, T, D).

        present: bool (N, S), False for padding of the condition, which is not attended to; None: no padding.
        """
        N, T, D = q.shape
        q = q.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if present is None else present[:, None, None]
        out = scaled_dot_product(q, k, v, mask)
        return out.transpose(1, 2).reshape(N, T, D)

    def forward(
        self, x: Tensor, c: Tensor | None, present: Tensor | None = None, kv: Tensor | None = None
    ) -> Tensor:
        """x (N, T, D) and the condition c (N, S, D) -> (N, T, D); present as in `attend`.

        kv: keys and values of the condition, `self.kv(c)` (N, S, 2 D), computed earlier; c is then not read.
        """
        kv = self.kv(c) if kv is None else kv
        return with_bias(self.proj, self.attend(with_bias(self.q, x), kv, present))


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

    def advance(self, stream: Stream, c: Tensor | None, modulation: Tensor | None) -> Stream:
        """`modulation` (N, S * 2 D): `cross.kv(c)` computed earlier, flattened; c is then not read."""
        stream = self.self_attention(stream)
        kv = None if modulation is None else modulation.unflatten(1, (-1, 2 * stream.x.shape[-1]))
        stream = self.cross_attention(stream, c, kv)
        return self.feed_forward(stream)

    def cross_attention(self, stream: Stream, c: Tensor | None, kv: Tensor | None = None) -> Stream:
        """The stream with cross-attention's branch pending."""
        present = None if stream.layout is None else stream.layout.condition_present
        h = normed(stream, self.norm_cross, self.backends.kernels)
        if not uses_triton(self.backends.kernels, h.y) or not is_plain(self.cross, CrossAttention):
            return Stream(h.x, self.cross(h.y, c, present, kv), None, unit_gate(h.x), stream.layout)
        recipe = None if self.backends.recompute == "none" else h.recipe
        kv = self.cross.kv(c) if kv is None else kv
        attended = self.cross.attend(with_bias(self.cross.q, h.y, recipe), kv, present)
        return Stream(h.x, *without_bias(self.cross.proj, attended), unit_gate(h.x), stream.layout)


class PlainFinalLayer(Projection):
    """The final layer whose norm has its own weight: `forward(x)`; the condition is not read."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, **options: Any):
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
        return with_bias(self.linear, normed(stream, self.norm_final, self.backends.kernels).y)


_FORWARDS = (TransformerBlock.forward, FinalLayer.forward, PlainFinalLayer.forward)
_DRAW_NOTHING = (
    Attention, CrossAttention, Mlp, SwiGLU, RMSNorm,
    nn.LayerNorm, nn.Linear, nn.GELU, nn.SiLU, nn.Identity, nn.Sequential,
)  # fmt: skip
"""Types of the modules within a block."""

Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
CONDITIONING = get_args(Conditioning)

BLOCKS: dict[str, tuple[type[TransformerBlock], Any]] = {
    "adaln_zero": (DiTBlock, FinalLayer),
    "adaln": (AdaLNBlock, FinalLayer),
    "cross_attention": (CrossAttentionBlock, PlainFinalLayer),
    "in_context": (TransformerBlock, PlainFinalLayer),
}
"""Block and final layer of each conditioning."""
