"""`accelerate(model)`: fused operations under the blocks of another implementation's DiT, in place and reversible.

Only the `forward` of its blocks is replaced: class, modules, parameters, state dict, hooks and optimizers of the model
stay the same objects. Since models of the same structure may compute different things, every kind of block is first
run beside the fused forward, in float64 with random weights, and is left alone where the results differ.
"""

import copy
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
from dit_fast.model.layers import hooks_of, is_original, is_plain, is_untouched
from dit_fast.utils.terminal import one_line

# Names of the linear layers of an attention and of both MLPs.
_ATTENTION = ("qkv", "proj")
_REFERENCE_MLP = ("fc1", "fc2")
_DIFFUSERS_MLP = ("net.0.proj", "net.2")

# Relative; float64 sums in another order agree to about 1e-13.
_TOLERANCE = 1e-9
_TOKENS = 4


Computation = tuple[Any, ...]
"""Equal for modules that differ only in their weights, hooks and mode; see `computation_of`."""


@dataclass(frozen=True)
class Fusion:
    """How one block runs.

    Attributes:
        backends: Kernels, attention backend and MLP epilogue.
        trunk: What the block computed when it was checked, beside attention and MLP.
        attn: What the attention computed; None calls the attention module.
        mlp: What the MLP computed; None calls the MLP module.
        in_training: Whether the block is fused in training mode, where its own forward may draw random numbers.
    """

    backends: Backends
    trunk: Computation
    attn: Computation | None = None
    mlp: Computation | None = None
    in_training: bool = True

    def applies(self, block: nn.Module, kind: "BlockKind") -> bool:
        """Whether the block is still what was checked, except for its attention and MLP."""
        unchanged = trunk_of(block, kind) == self.trunk and _is_original(type(block))
        return unchanged and (self.in_training or not block.training)


def _is_original(kind: type[nn.Module]) -> bool:
    # torch.compile cannot trace a look into the classes of diffusers.
    return torch.compiler.is_compiling() or is_original(kind)


def may_fuse_norm(norm: nn.Module) -> bool:
    """Whether the norm is still a layer norm without parameters and hooks, as `accelerate` checked."""
    return type(norm) is nn.LayerNorm and norm.weight is None and is_untouched(norm)


def may_fuse(part: Any, checked: Computation | None, names: tuple[str, ...]) -> bool:
    """Whether the layers `names` of an attention or MLP may be used instead of calling the module.

    Compared with what was checked at every call: adapters, hooks, other classes, activations, dropout and scales may
    be put in after `accelerate`.
    """
    if computation_of(part) != checked or not _is_original(type(part)):
        return False
    plain = all(is_plain(part.get_submodule(name), nn.Linear) for name in names)
    # The fused MLP adds the bias of the first layer; attention's may be missing.
    plain = plain and (names == _ATTENTION or part.get_submodule(names[0]).bias is not None)
    return plain and all(is_untouched(inner) for inner in part.modules())


def reference_block(block: Any, fusion: Fusion, x: Tensor, c: Tensor) -> Tensor:
    """Fused block of facebookresearch/DiT and SiT: x (N, T, D), c (N, D) -> (N, T, D)."""
    norms = may_fuse_norm(block.norm1) and may_fuse_norm(block.norm2)
    if not norms or not fusion.applies(block, REFERENCE_BLOCK):
        return type(block).forward(block, x, c)
    kernels = fusion.backends.kernels
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c).chunk(6, dim=1)
    h = Stream(x.contiguous()).norm_modulate(shift_msa, scale_msa, block.norm1.eps, kernels)
    stream = Stream(h.x, *_attention_branch(block.attn, fusion, h.y), gate_msa)
    h = stream.norm_modulate(shift_mlp, scale_mlp, block.norm2.eps, kernels)
    return Stream(h.x, *_mlp_branch(block.mlp, fusion, _REFERENCE_MLP, h.y), gate_mlp).add(kernels)


def reference_final(final: Any, fusion: Fusion, x: Tensor, c: Tensor) -> Tensor:
    """Fused final layer of facebookresearch/DiT and SiT: x (N, T, D), c (N, D) -> (N, T, P * P * C)."""
    if not may_fuse_norm(final.norm_final) or not fusion.applies(final, REFERENCE_FINAL):
        return type(final).forward(final, x, c)
    shift, scale = final.adaLN_modulation(c).chunk(2, dim=1)
    normed = Stream(x.contiguous()).norm_modulate(shift, scale, final.norm_final.eps, fusion.backends.kernels)
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
    """Fused BasicTransformerBlock of diffusers with norm_type "ada_norm_zero": hidden_states (N, T, D) -> (N, T, D).

    The attention of diffusers and its processors are called, since they project to q, k and v separately.
    """
    norm = block.norm1
    applies = fusion.applies(block, DIFFUSERS_BLOCK) and is_untouched(norm) and _is_original(type(norm))
    norms = applies and may_fuse_norm(norm.norm) and may_fuse_norm(block.norm3)
    if not norms or block._chunk_size is not None:
        return type(block).forward(
            block, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            timestep, cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    kernels, x = fusion.backends.kernels, hidden_states.contiguous()
    modulation = norm.linear(norm.silu(norm.emb(timestep, class_labels, hidden_dtype=x.dtype)))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
    h = Stream(x).norm_modulate(shift_msa, scale_msa, norm.norm.eps, kernels)
    attended = block.attn1(
        h.y, encoder_hidden_states=None, attention_mask=attention_mask, **(cross_attention_kwargs or {})
    )
    h = Stream(h.x, attended, None, gate_msa).norm_modulate(shift_mlp, scale_mlp, block.norm3.eps, kernels)
    return Stream(h.x, *_mlp_branch(block.ff, fusion, _DIFFUSERS_MLP, h.y), gate_mlp).add(kernels)


def _attention_branch(attn: Any, fusion: Fusion, y: Tensor) -> tuple[Tensor, Tensor | None]:
    if uses_triton(fusion.backends.kernels, y) and may_fuse(attn, fusion.attn, _ATTENTION):
        return fused_attention(attn, fusion, y)
    return attn(y), None


def _mlp_branch(part: Any, fusion: Fusion, names: tuple[str, str], y: Tensor) -> tuple[Tensor, Tensor | None]:
    if uses_triton(fusion.backends.kernels, y) and may_fuse(part, fusion.mlp, names):
        return fused_mlp(part, fusion, names, y)
    return part(y), None


def fused_attention(attn: Any, fusion: Fusion, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """timm's `Attention` without options, fused.

    Args:
        attn: The module.
        fusion: How the block runs.
        y: Tokens (N, T, D).

    Returns:
        The output (N, T, D) without the bias of the projection, and that bias, which a later operation adds.
    """
    head_dim = attn.qkv.in_features // attn.num_heads
    if attention_backend(y, head_dim, fusion.backends.attention, fusion.backends.kernels) == "triton":
        qkv, bias = without_bias(attn.qkv, y)
    else:
        qkv, bias = attn.qkv(y), None
    attended = attention(
        qkv, attn.num_heads, bias, backend=fusion.backends.attention, kernels=fusion.backends.kernels
    )
    return without_bias(attn.proj, attended)


def fused_mlp(
    part: nn.Module, fusion: Fusion, names: tuple[str, str], y: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Linear - GELU (tanh) - Linear, fused.

    Args:
        part: The MLP module.
        fusion: How the block runs.
        names: Names of its two linear layers.
        y: Tokens (N, T, D).

    Returns:
        The output (N, T, D) without the second bias, and that bias, which a later operation adds.
    """
    fc1, fc2 = (cast(nn.Linear, part.get_submodule(name)) for name in names)
    branch = mlp(
        y, fc1.weight, fc1.bias, fc2.weight,
        keep_activation=True, epilogue=fusion.backends.mlp_epilogue, kernels=fusion.backends.kernels,
    )  # fmt: skip
    return branch, fc2.bias


@dataclass(frozen=True)
class BlockKind:
    """A kind of block that can be fused.

    Attributes:
        title: Its name in messages.
        forward: Its fused forward.
        children: Names of the modules that it must have.
        norms: Paths of its layer norms.
    """

    title: str
    forward: Callable[..., Tensor]
    children: tuple[str, ...]
    norms: tuple[str, ...]


REFERENCE_BLOCK = BlockKind(
    "DiT block",
    reference_block,
    ("norm1", "attn", "norm2", "mlp", "adaLN_modulation"),
    ("norm1", "norm2"),
)
REFERENCE_FINAL = BlockKind(
    "final layer", reference_final, ("norm_final", "linear", "adaLN_modulation"), ("norm_final",)
)
DIFFUSERS_BLOCK = BlockKind(
    "BasicTransformerBlock", diffusers_block, ("norm1", "attn1", "norm3", "ff"), ("norm1.norm", "norm3")
)
_FORWARDS = (reference_block, reference_final, diffusers_block)


@dataclass(frozen=True)
class Verdict:
    """Result of a check.

    Attributes:
        reason: Why the block is left alone; None where it is fused.
        trunk: As in `Fusion`.
        attn: As in `Fusion`.
        mlp: As in `Fusion`.
        in_training: As in `Fusion`.
        notes: What is not fused, or not always.
    """

    reason: str | None
    trunk: Computation = ()
    attn: Computation | None = None
    mlp: Computation | None = None
    in_training: bool = True
    notes: tuple[str, ...] = ()


def structural_difference(module: nn.Module, kind: BlockKind) -> str | None:
    """Why the module does not have the structure of this kind of block, or None; nothing is run."""
    children = dict(module.named_children())
    name = type(module).__name__
    missing = [child for child in kind.children if child not in children]
    if missing:
        return f"{name} has no {', '.join(missing)}"
    # Not left to the trial: a module that draws at random, such as DropPath, may happen to draw nothing there.
    inert = (nn.Identity, nn.Dropout)
    for child, inner in children.items():
        if child not in kind.children and not isinstance(inner, inert):
            return f"{name} has a {type(inner).__name__} {child}, which the paper's block does not have"
    if kind is DIFFUSERS_BLOCK:
        if getattr(module, "norm_type", None) != "ada_norm_zero" or not hasattr(module.norm1, "norm"):
            return f"{name} has norm_type {getattr(module, 'norm_type', None)!r}, not 'ada_norm_zero'"
    else:
        arguments = list(inspect.signature(type(module).forward).parameters)
        if len(arguments) != 3:
            return f"{name}.forward takes ({', '.join(arguments)}), the paper's block takes (self, x, c)"
    for path in kind.norms:
        norm = module.get_submodule(path)
        if type(norm) is not nn.LayerNorm or norm.elementwise_affine:
            return f"{name}.{path} is not an nn.LayerNorm without parameters"
    return None


def earlier_change(module: nn.Module, kind: BlockKind) -> str | None:
    """How a block of the right structure was already changed so that it cannot be fused, or None."""
    if "forward" in vars(module):
        return "has a forward on the instance"
    if module._compiled_call_impl is not None:
        return "is compiled: accelerate first, then compile"
    touched = [name for name in kind.norms if not is_untouched(module.get_submodule(name))]
    if touched:
        return f"hooks or a replaced forward on {', '.join(touched)}"
    return None


def touched_parts(module: nn.Module) -> tuple[str, ...]:
    """Names of the inner modules that have hooks or a forward on the instance."""
    return tuple(name for name, part in module.named_modules() if name and not is_untouched(part))


def computation_of(module: nn.Module) -> Computation:
    """A key that is equal for modules that differ only in their weights, so that one trial serves all of them."""
    return tuple((name, type(part), _settings(part)) for name, part in module.named_modules())


def trunk_of(block: nn.Module, kind: BlockKind) -> Computation:
    """A key of a block's own class and settings, and of the modules that the fused forward does not call."""
    skipped = [child for child in block.named_children() if child[0] not in kind.children]
    norms = [type(getattr(block, path.partition(".")[0], None)) for path in kind.norms]
    others = [(name, computation_of(child)) for name, child in skipped]
    return type(block), _settings(block), *norms, *others


def _settings(module: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (key, _plain(value))
        for key, value in vars(module).items()
        if key[0] != "_" and key not in ("training", "forward")
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else type(value)


@torch.no_grad()
def check_block(module: nn.Module, kind: BlockKind) -> Verdict:
    """Compare a copy of the module with the fused forward; the module itself is not changed.

    Args:
        module: The block.
        kind: What it should be.

    Returns:
        Whether it is fused, and which of its layers.
    """
    try:
        trial = _trial_copy(module)
        inputs = _inputs(trial, kind)
        own = type(trial).forward(trial, *inputs)
    except Exception as error:  # code of others may raise anything on a CPU in float64
        return Verdict(f"cannot run on the CPU in float64: {one_line(error)}")
    verdict = _fusible_layers(trial, kind)
    try:
        fused = kind.forward(trial, _fusion(verdict, Backends("triton")), *inputs)
    except Exception as error:
        return Verdict(f"does not fit the fused forward: {one_line(error)}")
    if not _same(own, fused):
        return Verdict(f"does not compute the paper's {kind.title}")
    trial.train()
    with torch.random.fork_rng(devices=[]):
        in_training = _same(own, type(trial).forward(trial, *inputs))
    if in_training:
        return verdict
    note = "in training mode its own forward runs, which drops at random"
    return replace(verdict, in_training=False, notes=(*verdict.notes, note))


def _fusion(verdict: Verdict, backends: Backends) -> Fusion:
    return Fusion(backends, verdict.trunk, verdict.attn, verdict.mlp, verdict.in_training)


def _fusible_layers(trial: Any, kind: BlockKind) -> Verdict:
    """Whether attention and MLP compute on random tokens what the fused operations compute."""
    trunk = trunk_of(trial, kind)
    if kind is REFERENCE_FINAL:
        return Verdict(None, trunk)
    attn_checked = mlp_checked = None
    notes: tuple[str, ...] = ()
    fusion = Fusion(Backends("triton"), trunk)
    y = _random(2, _TOKENS, _width(trial, kind))
    part, names = (trial.mlp, _REFERENCE_MLP) if kind is REFERENCE_BLOCK else (trial.ff, _DIFFUSERS_MLP)
    if _computes(part, names, lambda: fused_mlp(part, fusion, names, y), y):
        mlp_checked = computation_of(part)
    else:
        notes += (f"{type(part).__name__} is not Linear - tanh GELU - Linear, and is called unchanged",)
    if kind is REFERENCE_BLOCK:
        attn = trial.attn
        if _computes(attn, _ATTENTION, lambda: fused_attention(attn, fusion, y), y):
            attn_checked = computation_of(attn)
        else:
            notes += (f"{type(attn).__name__} is not plain attention on one qkv, and is called unchanged",)
    return Verdict(None, trunk, attn_checked, mlp_checked, notes=notes)


def _computes(
    part: nn.Module,
    names: tuple[str, ...],
    fused: Callable[[], tuple[Tensor, Tensor | None]],
    y: Tensor,
) -> bool:
    """Whether `fused` returns the (branch, bias) that the module computes from y (N, T, D)."""
    try:
        if not may_fuse(part, computation_of(part), names):
            return False
        branch, bias = fused()
    # Layers or attributes are missing, or do not fit.
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return _same(part(y), branch if bias is None else branch + bias)


def _trial_copy(module: nn.Module) -> Any:
    """A copy in float64 on the CPU, in eval mode, without hooks.

    Its weights are random: with the zero gates of a new model, every block would be the identity.
    """
    trial = copy.deepcopy(module)
    for part in trial.modules():
        for hooks in hooks_of(part):
            hooks.clear()
    trial = trial.to("cpu", torch.float64).eval().requires_grad_(False)
    for number, parameter in enumerate(trial.parameters()):
        # Outputs of matrix products have magnitude 1, so that no branch is lost beside another.
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.copy_(scale * _random(*parameter.shape, seed=number))
    return trial


def _inputs(trial: Any, kind: BlockKind) -> tuple[Any, ...]:
    width = _width(trial, kind)
    x = _random(2, _TOKENS, width, seed=1)
    if kind is not DIFFUSERS_BLOCK:
        return x, _random(2, width, seed=2)
    return x, None, None, None, torch.tensor([3, 700]), None, torch.tensor([0, 0])


def _width(trial: Any, kind: BlockKind) -> int:
    return trial.get_submodule(kind.norms[0]).normalized_shape[-1]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are equal up to rounding in float64; False for values that are not finite."""
    if not isinstance(one, Tensor) or one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= _TOLERANCE * one.abs().max())


# What is never fused, by family.
_NOT_FUSED = {
    "reference": {"x_embedder, unpatchify": "run by the model's own forward"},
    "diffusers": {
        "attn1": "it projects to q, k and v separately, and keeps its processors",
        "pos_embed, norm_out, proj_out_2": "run by the model's own forward",
    },
}


@dataclass(frozen=True)
class Acceleration:
    """Report of `accelerate`; `str(report)` is a summary of a few lines.

    Attributes:
        model: The model.
        family: "reference" (the layout of facebookresearch/DiT and SiT) or "diffusers".
        replaced: Names of the modules whose forward is fused.
        notes: For modules that are fused in part, or not always: name -> what is not fused.
        left: Name -> reason why the module runs as before.
    """

    model: nn.Module = field(repr=False)
    family: str
    replaced: tuple[str, ...]
    notes: dict[str, str]
    left: dict[str, str]

    def undo(self) -> None:
        """Restore the forward of every module, as `restore(model)` does."""
        restore(self.model)

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__} ({self.family} layout): fused {_listed(self.replaced)}"]
        for title, entries in (("not fused in", self.notes), ("left", self.left)):
            for reason in dict.fromkeys(entries.values()):
                names = [name for name, why in entries.items() if why == reason]
                lines.append(f"  {title} {_listed(names)}: {reason}")
        return "\n".join(lines)


def accelerate(
    model: nn.Module, *, kernels: str = "auto", attention: str = "auto", mlp_epilogue: str = "auto"
) -> Acceleration:
    """Run the blocks of a reference DiT, a SiT or diffusers' DiTTransformer2DModel on fused operations, in place.

    Outputs and gradients change only by rounding, and the model keeps its class, modules, state dict, parameters and
    hooks. A block is left alone where it computes something other than figure 3 of the paper (Peebles & Xie 2023), or
    where its forward was replaced. An attention or MLP that has hooks, adapters or other operations is called
    unchanged, also when it gets them later. Call it before `torch.compile`.

    Args:
        model: The model.
        kernels: As in `DiT`.
        attention: As in `DiT`.
        mlp_epilogue: As in `DiT`.

    Returns:
        What was fused, what was not, and why.

    Raises:
        ConfigError: The model is of another kind, is wrapped, or is already accelerated.
    """
    backends = Backends(kernels, attention, mlp_epilogue)
    family, candidates = _candidates(model)
    if any(_is_fused(module) for module in model.modules()):
        raise ConfigError(f"this {type(model).__name__} is accelerated already: restore(model) first")
    left = {
        name: reason
        for name, (module, kind) in candidates.items()
        if (reason := structural_difference(module, kind))
    }
    if left.keys() >= {name for name in candidates if name != "final_layer"}:
        raise _unknown(model, next(iter(left.values()), "it has no blocks"))

    verdicts: dict[Any, Verdict] = {}
    notes: dict[str, str] = {}
    fused = []
    for name, (module, kind) in candidates.items():
        if name in left:
            continue
        if reason := earlier_change(module, kind):
            left[name] = reason
            continue
        computation = kind, computation_of(module)
        if computation not in verdicts:
            verdicts[computation] = check_block(module, kind)
        verdict = verdicts[computation]
        if verdict.reason is not None:
            left[name] = verdict.reason
            continue
        touched = touched_parts(module)
        hooked = (f"hooks or a replaced forward on {', '.join(touched)}",) if touched else ()
        if verdict.notes or hooked:
            notes[name] = "; ".join((*verdict.notes, *hooked))
        fused.append((name, module, functools.partial(kind.forward, module, _fusion(verdict, backends))))
    # Only now is the model changed, so that an error above leaves it as it was.
    for _, module, forward in fused:
        vars(module)["forward"] = forward
    return Acceleration(model, family, tuple(name for name, *_ in fused), notes, left | _NOT_FUSED[family])


def restore(model: nn.Module) -> None:
    """Undo `accelerate` on a model, or on a copy of an accelerated one."""
    for module in model.modules():
        if _is_fused(module):
            # The forward of the class is visible again.
            del vars(module)["forward"]


def _is_fused(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func in _FORWARDS


def _candidates(model: Any) -> tuple[str, dict[str, tuple[nn.Module, BlockKind]]]:
    """The family of a model, and the modules that may be fused by name; ConfigError for an unknown model."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        inner = next(
            (a for a in ("transformer", "model") if isinstance(getattr(model, a, None), nn.Module)), None
        )
        hint = f": give its .{inner}" if inner else ""
        raise ConfigError(f"accelerate takes a model, this is a {name}{hint}")
    if isinstance(model, DiT) or isinstance(getattr(model, "dit", None), DiT):
        raise ConfigError(f"{name} is dit_fast's own model and runs the fused operations already")
    # Parameters of wrappers have other names, and a compiled model would not see the new forward.
    for inner, what in (("_orig_mod", "compiled, and accelerate comes before"), ("module", "a wrapper")):
        if isinstance(getattr(model, inner, None), nn.Module):
            raise ConfigError(f"{name} is {what}: give its .{inner}")
    for attribute, family, kind in (
        ("blocks", "reference", REFERENCE_BLOCK),
        ("transformer_blocks", "diffusers", DIFFUSERS_BLOCK),
    ):
        blocks = getattr(model, attribute, None)
        if isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks):
            found = {f"{attribute}.{number}": (block, kind) for number, block in blocks.named_children()}
            final = getattr(model, "final_layer", None)
            if family == "reference" and isinstance(final, nn.Module):
                found["final_layer"] = (final, REFERENCE_FINAL)
            return family, found
    raise _unknown(model, "it has no list of blocks or transformer_blocks")


def _unknown(model: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} is not a model that accelerate knows: {why}; it knows DiT and SiT in the layout of "
        "the reference, and diffusers' DiTTransformer2DModel"
    )


def _listed(names: Iterable[str]) -> str:
    """Names on one line, with ranges such as blocks.0-27."""
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
