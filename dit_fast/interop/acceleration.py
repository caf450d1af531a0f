"""`accelerate(model)`: somebody else's DiT on the fused operations, in place and undone by one call.

Nothing of the model is replaced but the `forward` of its blocks, so that its class, modules, parameters, state dict,
hooks and optimisers stay what they are. Two models of the same structure may compute different things, so structure
is not trusted: `dit_fast.interop.block_check` tries every kind of block beside the fused forward first.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from dit_fast.errors import ConfigError
from dit_fast.interop.block_check import (
    FORWARDS,
    Layout,
    Verdict,
    built_otherwise,
    check_block,
    kind_of,
    taken_over,
    touched_parts,
)
from dit_fast.interop.fused_forwards import Fusion
from dit_fast.kernels import BACKENDS, EPILOGUES, KERNEL_MODES
from dit_fast.models import DiT
from dit_fast.options import one_of

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
    switches = Fusion(
        kernels=one_of("kernels", kernels, KERNEL_MODES),
        attention=one_of("attention", attention, BACKENDS),
        mlp_epilogue=one_of("mlp_epilogue", mlp_epilogue, EPILOGUES),
    )
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
