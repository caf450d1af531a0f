"""Configuration of a DiT, inferred from the shapes of its tensors.

Shapes determine everything except the number of heads, whether the last row of the label table is the null class, and
the sides of a grid that is not square. Unless the caller knows them, the heads are those of the registry's model with
this width and depth, the label table has `num_classes + 1` rows, since the reference always trains with label dropout,
and the grid is square.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.model.config import PAPER
from dit_fast.model.layers import swiglu_width
from dit_fast.model.presets import SIZES, DiT_models

# Label dropout of the reference; a state dict only shows that there was some.
_LABEL_DROPOUT = 0.1

_RANKS = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "blocks.0.attn.qkv.weight": 2,
    "final_layer.linear.weight": 2,
}
# Optional tensors: an unconditional model has no labels, and a SwiGLU has w12 in place of fc1.
_LABELS, _FC1, _SWIGLU = (
    "y_embedder.embedding_table.weight",
    "blocks.0.mlp.fc1.weight",
    "blocks.0.mlp.w12.weight",
)
_CAPTIONS = "y_embedder.mlp.0.weight"


def registry_size(name: str) -> dict[str, int]:
    """depth, hidden_size, num_heads and patch_size of a registry name such as "DiT-XL/2"; ConfigError where unknown."""
    if name not in DiT_models:
        near = difflib.get_close_matches(name, DiT_models, n=3, cutoff=0.3) or list(DiT_models)
        raise ConfigError(f"unknown model {name!r}; the nearest are {', '.join(near)}")
    size, _, patch = name.removeprefix("DiT-").partition("/")
    return {**SIZES[size], "patch_size": int(patch)}


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], source: str, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Infer the configuration of the `DiT` with tensors of these shapes.

    Args:
        shapes: Shapes by name, under the keys of the reference.
        source: Name of the file, for messages.
        known: Fields that the caller knows; they decide what shapes leave open, including rotary or learned positions
            and the kind of an adaptive norm (the paper's by default). Where they contradict the shapes, the shapes win.

    Returns:
        `DiT.config`.

    Raises:
        CheckpointError: The tensors are not those of a DiT, or the number of heads or the grid remains unknown.
    """
    known = known or {}
    _require_dit(shapes, source)
    hidden_size, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
    # The number of distinct indices, not the largest: one absurd key must not request a million blocks.
    depth = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})

    per_patch = shapes["final_layer.linear.weight"][0]
    # The final layer predicts P * P * C values per patch, or twice as many with a learned variance.
    outputs, left = divmod(per_patch, patch * patch)
    if left or outputs not in (in_channels, 2 * in_channels):
        raise CheckpointError(
            f"{source} predicts {per_patch} values per patch of {patch}x{patch}, "
            f"expected {in_channels} channels of noise, with or without as many of variance"
        )

    rows, caption_dim = shapes.get(_LABELS, (0,))[0], shapes.get(_CAPTIONS, (0, 0))[1]
    dropout = known.get("class_dropout_prob")
    if caption_dim:
        dropout = _LABEL_DROPOUT if dropout is None else dropout
    elif dropout is None or not rows:
        dropout = 0.0 if rows == known.get("num_classes", 0) else _LABEL_DROPOUT

    options = _options(shapes, hidden_size, known)
    return {
        "input_size": _input_size(shapes["pos_embed"][1], patch, known.get("input_size"), source),
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": known.get("num_heads") or _registry_heads(hidden_size, depth, source),
        "mlp_ratio": _mlp_ratio(shapes, hidden_size, known.get("mlp_ratio", 0.0)),
        "class_dropout_prob": dropout,
        "num_classes": rows - (dropout > 0) if rows else 0,
        "learn_sigma": outputs == 2 * in_channels,
        # As in `DiT.config`: only options that differ from the reference.
        **{name: value for name, value in options.items() if value != PAPER[name]},
        **({"caption_dim": caption_dim} if caption_dim else {}),
    }


def _options(
    shapes: Mapping[str, tuple[int, ...]], hidden_size: int, known: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of the model by name; those that shapes do not determine are as known, or the paper's."""
    affine = "blocks.0.norm1.weight" in shapes
    norm = "layernorm" if "blocks.0.norm1.bias" in shapes else "rmsnorm"
    return {
        **{name: known.get(name, paper) for name, paper in PAPER.items()},
        "conditioning": _conditioning(shapes, hidden_size),
        "mlp": "swiglu" if _SWIGLU in shapes else "gelu",
        "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
        **({"norm": norm} if affine else {}),
    }


def _mlp_ratio(shapes: Mapping[str, tuple[int, ...]], hidden_size: int, known: float) -> float:
    """The known ratio where it agrees with the shapes, else one that does."""
    hidden = int(hidden_size * known)
    if _SWIGLU in shapes:
        # w12 stacks both halves of the SwiGLU, whose width is 2/3 of that of a plain MLP.
        rows = shapes[_SWIGLU][0] // 2
        return known if swiglu_width(hidden) == rows else 1.5 * rows / hidden_size
    rows = shapes[_FC1][0]
    return known if hidden == rows else rows / hidden_size


def _conditioning(shapes: Mapping[str, tuple[int, ...]], hidden_size: int) -> str:
    """Conditioning of the blocks, from the tensors of the first block."""
    if shapes.get("blocks.0.adaLN_modulation.1.weight", ())[:1] == (4 * hidden_size,):
        return "adaln"
    if "blocks.0.cross.q.weight" in shapes:
        return "cross_attention"
    return "in_context" if "blocks.0.norm1.weight" in shapes else "adaln_zero"


def _require_dit(shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    ranks = {
        **_RANKS,
        _SWIGLU if _SWIGLU in shapes else _FC1: 2,
        **{name: 2 for name in (_LABELS, _CAPTIONS) if name in shapes},
    }
    missing = [key for key in ranks if key not in shapes]
    if missing:
        hint = ""
        if any(key.startswith("transformer_blocks.") for key in shapes):
            hint = " (these are names of diffusers: give the folder, with its config.json)"
        raise CheckpointError(f"{source} is not a DiT: {', '.join(missing)} missing{hint}")
    wrong = [key for key, rank in ranks.items() if len(shapes[key]) != rank or 0 in shapes[key]]
    if not wrong and len(set(shapes["x_embedder.proj.weight"][2:])) != 1:
        wrong = ["x_embedder.proj.weight"]
    if wrong:
        listed = ", ".join(f"{key} {shapes[key]}" for key in wrong)
        raise CheckpointError(f"{source} is not a DiT: misshaped {listed}")


def _input_size(tokens: int, patch: int, known: Any, source: str) -> list[int]:
    if known is not None:
        height, width = (known, known) if isinstance(known, int) else known
        if (height // patch) * (width // patch) == tokens:
            return [height, width]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(
            f"{source} has {tokens} positions, which is not a square grid: put its config.json beside it"
        )
    return [side * patch, side * patch]


def _registry_heads(hidden_size: int, depth: int, source: str) -> int:
    for size in SIZES.values():
        if (size["hidden_size"], size["depth"]) == (hidden_size, depth):
            return size["num_heads"]
    raise CheckpointError(
        f"{source}: weights of width {hidden_size} and depth {depth} do not determine the number of heads, and no "
        "registry model has that size: give num_heads (--num-heads)"
    )


def require_config(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    source: str,
    hints: Mapping[str, str] | None = None,
) -> None:
    """Check a configuration.

    Args:
        found: `DiT.config` of the checkpoint.
        expected: Fields that it must have.
        source: Name of the file, for messages.
        hints: For some fields, what to do about a difference.

    Raises:
        CheckpointError: Lists every differing field with both values.
    """
    found = {**PAPER, "caption_dim": 0, **found}
    differing = [key for key, value in expected.items() if _plain(found[key]) != _plain(value)]
    if differing:
        lines = [
            f"{key} is {_plain(found[key])} in the checkpoint, {_plain(expected[key])} expected"
            for key in differing
        ]
        lines += [hints[key] for key in differing if hints and key in hints]
        raise CheckpointError(f"{source} has another configuration: {'; '.join(lines)}")


def _plain(value: Any) -> Any:
    """A square size as one number, so that 32 and [32, 32] are equal."""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        return value[0]
    return tuple(value) if isinstance(value, list) else value
