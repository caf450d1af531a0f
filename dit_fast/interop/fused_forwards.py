"""Forward passes that run other people's blocks on the fused operations, on those blocks' own parameters.

They stand in a block's `forward` attribute, so that the block, its parts, parameters and hooks stay as they are.
A part that is not as it was when the block was accelerated (hooks, another layer such as LoRA, a replaced forward)
is called as the module it is; where that is not possible, the class's own forward runs.
`N` batch, `T` tokens, `D` width. Peebles & Xie 2023, figure 3.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from dit_fast.blocks import Stream, without_bias
from dit_fast.kernels import attention, mlp, uses_triton
from dit_fast.kernels.attention import attention_backend

ATTENTION = ("qkv", "proj")
REFERENCE_MLP = ("fc1", "fc2")
DIFFUSERS_MLP = ("net.0.proj", "net.2")


@dataclass(frozen=True)
class Fusion:
    """How one block runs: the switches of `DiT`, and what of it may be fused.

    attn_type, mlp_type  the classes of its attention and MLP that were checked; None: call the module
    in_training          whether it may be fused in training mode, where its own forward may draw random numbers
    """

    kernels: str = "auto"
    attention: str = "auto"
    mlp_epilogue: str = "auto"
    attn_type: type[nn.Module] | None = None
    mlp_type: type[nn.Module] | None = None
    in_training: bool = True


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else: no hooks, no forward of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def may_fuse_norm(norm: nn.Module) -> bool:
    """Whether the norm is still what `accelerate` checked: a layer norm without weights of its own."""
    return type(norm) is nn.LayerNorm and norm.weight is None and is_untouched(norm)


def may_fuse(part: Any, kind: type[nn.Module] | None, names: tuple[str, ...]) -> bool:
    """Whether the layers of an attention or MLP of the checked class may be used instead of calling it."""
    if type(part) is not kind:
        return False
    plain = all(type(part.get_submodule(name)) is nn.Linear for name in names)
    return plain and all(is_untouched(inner) for inner in part.modules())


def reference_block(block: Any, fusion: Fusion, x: Tensor, c: Tensor) -> Tensor:
    """The block of facebookresearch/DiT and of SiT: x (N, T, D), c (N, D) -> (N, T, D)."""
    norms = may_fuse_norm(block.norm1) and may_fuse_norm(block.norm2)
    if not norms or (block.training and not fusion.in_training):
        return type(block).forward(block, x, c)
    kernels = fusion.kernels
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c).chunk(6, dim=1)
    h = Stream(x.contiguous()).norm_modulate(shift_msa, scale_msa, block.norm1.eps, kernels)
    stream = Stream(h.x, *_attention_branch(block.attn, fusion, h.y), gate_msa)
    h = stream.norm_modulate(shift_mlp, scale_mlp, block.norm2.eps, kernels)
    return Stream(h.x, *_mlp_branch(block.mlp, fusion, REFERENCE_MLP, h.y), gate_mlp).add(kernels)


def reference_final(final: Any, fusion: Fusion, x: Tensor, c: Tensor) -> Tensor:
    """The final layer of both: x (N, T, D), c (N, D) -> (N, T, P * P * C)."""
    if not may_fuse_norm(final.norm_final) or (final.training and not fusion.in_training):
        return type(final).forward(final, x, c)
    shift, scale = final.adaLN_modulation(c).chunk(2, dim=1)
    normed = Stream(x.contiguous()).norm_modulate(shift, scale, final.norm_final.eps, fusion.kernels)
    return final.linear(normed.y)


def diffusers_block(
    block: Any,
    fusion: Fusion,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """diffusers' BasicTransformerBlock with norm_type "ada_norm_zero": hidden_states (N, T, D) -> (N, T, D).

    Attention stays diffusers' own, with its processors: it projects to q, k and v apart.
    """
    norm = block.norm1
    untouched = is_untouched(norm) and may_fuse_norm(norm.norm) and may_fuse_norm(block.norm3)
    if not untouched or block._chunk_size is not None or (block.training and not fusion.in_training):
        return type(block).forward(
            block, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            timestep, cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    kernels, x = fusion.kernels, hidden_states.contiguous()
    modulation = norm.linear(norm.silu(norm.emb(timestep, class_labels, hidden_dtype=x.dtype)))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
    h = Stream(x).norm_modulate(shift_msa, scale_msa, norm.norm.eps, kernels)
    attended = block.attn1(
        h.y, encoder_hidden_states=None, attention_mask=attention_mask, **(cross_attention_kwargs or {})
    )
    h = Stream(h.x, attended, None, gate_msa).norm_modulate(shift_mlp, scale_mlp, block.norm3.eps, kernels)
    return Stream(h.x, *_mlp_branch(block.ff, fusion, DIFFUSERS_MLP, h.y), gate_mlp).add(kernels)


def _attention_branch(attn: Any, fusion: Fusion, y: Tensor) -> tuple[Tensor, Tensor | None]:
    if uses_triton(fusion.kernels, y) and may_fuse(attn, fusion.attn_type, ATTENTION):
        return fused_attention(attn, fusion, y)
    return attn(y), None


def _mlp_branch(part: Any, fusion: Fusion, names: tuple[str, str], y: Tensor) -> tuple[Tensor, Tensor | None]:
    if uses_triton(fusion.kernels, y) and may_fuse(part, fusion.mlp_type, names):
        return fused_mlp(part, fusion, names, y)
    return part(y), None


def fused_attention(attn: Any, fusion: Fusion, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """What timm's `Attention` without extras gives for y (N, T, D), as (branch, bias still to be added)."""
    head_dim = attn.qkv.in_features // attn.num_heads
    if attention_backend(y, head_dim, fusion.attention, fusion.kernels) == "triton":
        qkv, bias = without_bias(attn.qkv, y)
    else:
        qkv, bias = attn.qkv(y), None
    attended = attention(qkv, attn.num_heads, bias, backend=fusion.attention, kernels=fusion.kernels)
    return without_bias(attn.proj, attended)


def fused_mlp(
    part: nn.Module, fusion: Fusion, names: tuple[str, str], y: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Linear - GELU (tanh) - Linear of the two layers so named, as (branch, bias still to be added)."""
    fc1, fc2 = (cast(nn.Linear, part.get_submodule(name)) for name in names)
    branch = mlp(
        y, fc1.weight, fc1.bias, fc2.weight,
        keep_activation=True, epilogue=fusion.mlp_epilogue, kernels=fusion.kernels,
    )  # fmt: skip
    return branch, fc2.bias
