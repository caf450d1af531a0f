"""Whether a block of somebody else's computes what the fused forward computes: by structure, then by trial.

The trial is a copy of the block on the CPU, in float64, with random weights (a block as it is initialised is the
identity and would show nothing), beside the fused forward on that same copy. It also tells which parts may be fused
and whether the block draws random numbers in training.
"""

import copy
import enum
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast.interop.fused_forwards import (
    ATTENTION,
    DIFFUSERS_MLP,
    REFERENCE_MLP,
    Fusion,
    diffusers_block,
    fused_attention,
    fused_mlp,
    is_untouched,
    may_fuse,
    reference_block,
    reference_final,
)
from dit_fast.interop.weight_file import first_line

# float64 sums in another order agree to about 1e-13.
_TOLERANCE = 1e-9
_TOKENS = 4


class Layout(enum.Enum):
    """Which block, and the forward that stands in for its own."""

    REFERENCE_BLOCK = "DiT block"
    REFERENCE_FINAL = "final layer"
    DIFFUSERS_BLOCK = "BasicTransformerBlock"


FORWARDS: dict[Layout, Callable[..., Tensor]] = {
    Layout.REFERENCE_BLOCK: reference_block,
    Layout.REFERENCE_FINAL: reference_final,
    Layout.DIFFUSERS_BLOCK: diffusers_block,
}
_PARTS = {
    Layout.REFERENCE_BLOCK: ("norm1", "attn", "norm2", "mlp", "adaLN_modulation"),
    Layout.REFERENCE_FINAL: ("norm_final", "linear", "adaLN_modulation"),
    Layout.DIFFUSERS_BLOCK: ("norm1", "attn1", "norm3", "ff"),
}
_NORMS = {
    Layout.REFERENCE_BLOCK: ("norm1", "norm2"),
    Layout.REFERENCE_FINAL: ("norm_final",),
    Layout.DIFFUSERS_BLOCK: ("norm1.norm", "norm3"),
}


@dataclass(frozen=True)
class Verdict:
    """`reason`: why the block is to be left alone, else None; `fusion`: how it may run; `notes`: what is not fused."""

    reason: str | None
    fusion: Fusion
    notes: tuple[str, ...] = ()


def built_otherwise(module: nn.Module, layout: Layout) -> str | None:
    """Why the module is no block of this layout, or None; nothing is run."""
    children = dict(module.named_children())
    kind = type(module).__name__
    missing = [name for name in _PARTS[layout] if name not in children]
    if missing:
        return f"{kind} has no {', '.join(missing)}"
    inert = (nn.Identity, nn.Dropout)
    for name, child in children.items():
        if name not in _PARTS[layout] and not isinstance(child, inert):
            return f"{kind} has a {type(child).__name__} {name}, which is no part of the paper's block"
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        return f"{kind} has parameters of its own: {', '.join(own)}"
    if layout is Layout.DIFFUSERS_BLOCK:
        if getattr(module, "norm_type", None) != "ada_norm_zero" or not hasattr(module.norm1, "norm"):
            return f"{kind} has norm_type {getattr(module, 'norm_type', None)!r}, not 'ada_norm_zero'"
    else:
        taken = list(inspect.signature(type(module).forward).parameters)
        if len(taken) != 3:
            return f"{kind}.forward takes ({', '.join(taken)}), the paper's block takes (self, x, c)"
    for name in _NORMS[layout]:
        norm = module.get_submodule(name)
        if type(norm) is not nn.LayerNorm or norm.elementwise_affine:
            return f"{kind}.{name} is no nn.LayerNorm without parameters"
    return None


def taken_over(module: nn.Module, layout: Layout) -> str | None:
    """Why a block of the right build cannot be changed, or None: somebody else changed it already."""
    if "forward" in vars(module):
        return "has a forward of its own on the instance"
    if module._compiled_call_impl is not None:
        return "is compiled: accelerate first, then compile"
    touched = [name for name in _NORMS[layout] if not is_untouched(module.get_submodule(name))]
    if touched:
        return f"hooks or a replaced forward on {', '.join(touched)}"
    return None


def touched_parts(module: nn.Module) -> tuple[str, ...]:
    """Names of the modules within that have hooks or a forward of their own."""
    return tuple(name for name, part in module.named_modules() if name and not is_untouched(part))


def kind_of(module: nn.Module, layout: Layout) -> tuple[Any, ...]:
    """Equal for blocks that compute the same but for their weights."""
    return layout, tuple(
        (name, type(part), tuple((key, _plain(value)) for key, value in vars(part).items() if key[0] != "_"))
        for name, part in module.named_modules()
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else type(value)


@torch.no_grad()
def check_block(module: nn.Module, layout: Layout) -> Verdict:
    """Try a copy of the module; the module itself is only read."""
    try:
        trial = _trial_copy(module)
        inputs = _inputs(trial, layout)
        own = type(trial).forward(trial, *inputs)
    except Exception as error:  # whatever somebody else's code raises on a CPU in float64
        return Verdict(f"could not be tried on the CPU in float64: {first_line(error)}", Fusion())
    fusion, notes = _fusable(trial, layout)
    try:
        fused = FORWARDS[layout](trial, fusion, *inputs)
    except Exception as error:
        return Verdict(f"does not fit the fused forward: {first_line(error)}", Fusion())
    if not _same(own, fused):
        return Verdict(f"computes something else than the paper's {layout.value}", Fusion())
    trial.train()
    with torch.random.fork_rng(devices=[]):
        in_training = _same(own, type(trial).forward(trial, *inputs))
    if not in_training:
        notes += ("in training mode its own forward runs, which drops at random",)
    return Verdict(None, replace(fusion, in_training=in_training), notes)


def _fusable(trial: Any, layout: Layout) -> tuple[Fusion, tuple[str, ...]]:
    """Which of attention and MLP give on random tokens what the operations give, and notes on the others."""
    fusion = Fusion(kernels="triton")
    notes: tuple[str, ...] = ()
    if layout is Layout.REFERENCE_FINAL:
        return fusion, notes
    part, names = (
        (trial.mlp, REFERENCE_MLP) if layout is Layout.REFERENCE_BLOCK else (trial.ff, DIFFUSERS_MLP)
    )
    y = _random(2, _TOKENS, _width(trial, layout))
    if _gives(part, names, lambda: fused_mlp(part, fusion, names, y), y):
        fusion = replace(fusion, mlp_type=type(part))
    else:
        notes += (f"{type(part).__name__} is not Linear - tanh GELU - Linear, and is called as it is",)
    if layout is Layout.REFERENCE_BLOCK:
        attn = trial.attn
        if _gives(attn, ATTENTION, lambda: fused_attention(attn, fusion, y), y):
            fusion = replace(fusion, attn_type=type(attn))
        else:
            notes += (f"{type(attn).__name__} is not plain attention on one qkv, and is called as it is",)
    return fusion, notes


def _gives(
    part: nn.Module,
    names: tuple[str, ...],
    fused: Callable[[], tuple[Tensor, Tensor | None]],
    y: Tensor,
) -> bool:
    """Whether the fused (branch, bias) is what the part itself makes of y."""
    try:
        if not may_fuse(part, type(part), names):
            return False
        branch, bias = fused()
    except (
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ):  # layers or attributes are not there, or misfit
        return False
    return _same(part(y), branch if bias is None else branch + bias)


def _trial_copy(module: nn.Module) -> Any:
    """A copy in float64 on the CPU, in eval mode, without hooks, with random weights."""
    trial = copy.deepcopy(module)
    for part in trial.modules():
        for hooks in (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._backward_hooks,
            part._backward_pre_hooks,
        ):
            hooks.clear()
    trial = trial.to("cpu", torch.float64).eval().requires_grad_(False)
    for number, parameter in enumerate(trial.parameters()):
        # Of size one after a matrix product, so that no branch is drowned by another.
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.copy_(scale * _random(*parameter.shape, seed=number))
    return trial


def _inputs(trial: Any, layout: Layout) -> tuple[Any, ...]:
    width = _width(trial, layout)
    x = _random(2, _TOKENS, width, seed=1)
    if layout is not Layout.DIFFUSERS_BLOCK:
        return x, _random(2, width, seed=2)
    return x, None, None, None, torch.tensor([3, 700]), None, torch.tensor([0, 0])


def _width(trial: Any, layout: Layout) -> int:
    return trial.get_submodule(_NORMS[layout][0]).normalized_shape[-1]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal within float64's rounding; never so for something that is not finite."""
    if not isinstance(one, Tensor) or one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= _TOLERANCE * one.abs().max())
