"""`accelerate(model)`: somebody else's DiT on the fused operations, in place and undone by one call.

Nothing of the model is replaced but the `forward` of its blocks, so that its class, modules, parameters, state dict,
hooks and optimisers stay what they are. Two models of the same structure may compute different things, so structure
is not trusted: `dit_fast.interop.accelerate` tries every kind of block beside the fused forward first.
"""

import copy
import enum
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.kernels import attention, mlp, uses_triton
from dit_fast.kernels.attention.attention import attention_backend
from dit_fast.model.backends import Backends
from dit_fast.model.blocks import Stream, without_bias
from dit_fast.model.dit import DiT
from dit_fast.utils.terminal import one_line

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
        return Verdict(f"could not be tried on the CPU in float64: {one_line(error)}", Fusion())
    fusion, notes = _fusable(trial, layout)
    try:
        fused = FORWARDS[layout](trial, fusion, *inputs)
    except Exception as error:
        return Verdict(f"does not fit the fused forward: {one_line(error)}", Fusion())
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


_ELSEWHERE = {
    "reference": {"x_embedder, unpatchify": "run by the model's own forward"},
    "diffusers": {
        "attn1": "q, k and v are three products, and its processors stay",
        "pos_embed, norm_out, proj_out_2": "run by the model's own forward",
    },
}


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did. `str()` of it is a few lines to read; `undo()` takes it all back.

    model     the model that was given
    family    "reference" (the layout of facebookresearch/DiT and SiT) or "diffusers"
    replaced  names of the modules whose forward is fused now
    notes     of those that are fused in part, or not always: name -> what is not
    left      name -> why it runs as before
    """

    model: nn.Module = field(repr=False)
    family: str
    replaced: tuple[str, ...]
    notes: dict[str, str]
    left: dict[str, str]

    def undo(self) -> None:
        """Give every module its own forward back, as `restore(model)` does."""
        restore(self.model)

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__} ({self.family} layout): fused {_listed(self.replaced)}"]
        for title, entries in (("fused but for", self.notes), ("left", self.left)):
            for reason in dict.fromkeys(entries.values()):
                names = [name for name, why in entries.items() if why == reason]
                lines.append(f"  {title} {_listed(names)}: {reason}")
        return "\n".join(lines)


def accelerate(
    model: nn.Module, *, kernels: str = "auto", attention: str = "auto", mlp_epilogue: str = "auto"
) -> Acceleration:
    """Run the blocks of a reference DiT, a SiT or diffusers' DiTTransformer2DModel on the fused operations, in place.

    Outputs and gradients stay the same within rounding; the model's class, modules, state dict, parameters and hooks
    stay the same objects. Returns what was fused, what was left and why. A block is left alone where it computes
    something else than the paper's figure 3, or where somebody else replaced its forward; an attention or MLP with
    hooks, adapters or other maths is called as it is, also when it becomes so later. `kernels`, `attention` and
    `mlp_epilogue` as in `DiT`. Call it before torch.compile.

    Raises ConfigError, in one line, for a model that is none of these, is wrapped, or is accelerated already.
    """
    backends = Backends(kernels, attention, mlp_epilogue)
    switches = Fusion(backends.kernels, backends.attention, backends.mlp_epilogue)
    family, candidates = _candidates(model)
    if any(_is_fused(module) for module in model.modules()):
        raise ConfigError(f"this {type(model).__name__} is accelerated already: restore(model) first")
    strange = {
        name: reason
        for name, (module, layout) in candidates.items()
        if (reason := built_otherwise(module, layout))
    }
    if strange.keys() >= {name for name in candidates if name != "final_layer"}:
        raise _unknown(model, next(iter(strange.values()), "it has no blocks"))

    verdicts: dict[Any, Verdict] = {}
    notes: dict[str, str] = {}
    left = dict(strange)
    fused = []
    for name, (module, layout) in candidates.items():
        if name in strange:
            continue
        reason = taken_over(module, layout)
        if reason is None:
            kind = kind_of(module, layout)
            verdict = (
                verdicts[kind] if kind in verdicts else verdicts.setdefault(kind, check_block(module, layout))
            )
            reason = verdict.reason
        if reason is not None:
            left[name] = reason
            continue
        touched = touched_parts(module)
        parts = (
            *verdict.notes,
            *((f"hooks or a replaced forward on {', '.join(touched)}",) if touched else ()),
        )
        if parts:
            notes[name] = "; ".join(parts)
        own = verdict.fusion
        fusion = replace(
            switches, attn_type=own.attn_type, mlp_type=own.mlp_type, in_training=own.in_training
        )
        forward = functools.partial(FORWARDS[layout], module, fusion)
        fused.append((name, module, forward))
    for _, module, forward in fused:
        vars(module)["forward"] = forward
    return Acceleration(model, family, tuple(name for name, *_ in fused), notes, left | _ELSEWHERE[family])


def restore(model: nn.Module) -> None:
    """Undo `accelerate` on a model, or on a copy of an accelerated one; nothing else is touched."""
    for module in model.modules():
        if _is_fused(module):
            del vars(module)["forward"]


def _is_fused(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func in FORWARDS.values()


def _candidates(model: Any) -> tuple[str, dict[str, tuple[nn.Module, Layout]]]:
    """("reference" or "diffusers", name -> (module, layout)) of what might be fused; ConfigError for the unknown."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        inner = next(
            (a for a in ("transformer", "model") if isinstance(getattr(model, a, None), nn.Module)), None
        )
        hint = f": give its .{inner}" if inner else ""
        raise ConfigError(f"accelerate takes a model, this is a {name}{hint}")
    if isinstance(model, DiT) or isinstance(getattr(model, "dit", None), DiT):
        raise ConfigError(f"{name} is dit_fast's own model and runs the fused operations already")
    for inner, what in (("_orig_mod", "compiled, and accelerate comes before"), ("module", "a wrapper")):
        if isinstance(getattr(model, inner, None), nn.Module):
            raise ConfigError(f"{name} is {what}: give its .{inner}")
    for attribute, family, layout in (
        ("blocks", "reference", Layout.REFERENCE_BLOCK),
        ("transformer_blocks", "diffusers", Layout.DIFFUSERS_BLOCK),
    ):
        blocks = getattr(model, attribute, None)
        if isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks):
            found = {f"{attribute}.{number}": (block, layout) for number, block in blocks.named_children()}
            final = getattr(model, "final_layer", None)
            if family == "reference" and isinstance(final, nn.Module):
                found["final_layer"] = (final, Layout.REFERENCE_FINAL)
            return family, found
    raise _unknown(model, "it has no list of blocks or transformer_blocks")


def _unknown(model: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} is not a model that accelerate knows: {why}; known are DiT and SiT in the reference's "
        "layout, and diffusers' DiTTransformer2DModel"
    )


def _listed(names: Iterable[str]) -> str:
    """Names in a few words: runs of numbers as blocks.0-27."""
    runs: list[tuple[str, int, int]] = []
    words = []
    for name in names:
        stem, _, number = name.rpartition(".")
        if not number.isdigit():
            words.append(name)
        elif runs and runs[-1][0] == stem and runs[-1][2] + 1 == int(number):
            runs[-1] = (stem, runs[-1][1], int(number))
        else:
            runs.append((stem, int(number), int(number)))
    counted = [f"{stem}.{first}" + (f"-{last}" if last > first else "") for stem, first, last in runs]
    return ", ".join(counted + words) or "nothing"
