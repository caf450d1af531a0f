"""Options and sizes of a `DiT`, and the values that they may have; docs/models.md describes each."""

from collections.abc import Mapping
from typing import Any

from dit_fast.kernels import ACTIVATIONS, NORMS
from dit_fast.model.blocks import CONDITIONING
from dit_fast.model.positions import POSITIONS
from dit_fast.utils.values import FLAG, Number, Value, Whole

OPTIONS: dict[str, tuple[Any, ...]] = {
    "conditioning": CONDITIONING,
    "positions": POSITIONS,
    "norm": NORMS,
    "mlp": ACTIVATIONS,
    "qk_norm": (False, True),
}
"""Choices of each option. The first is the paper's, and the default of a configuration without the option."""

MOST_MLP = 1 << 10
"""Upper bound of mlp_ratio: a mistyped ratio is rejected before memory is allocated."""

SIZES: dict[str, Value] = {
    "patch_size": Whole(1, 1 << 12),
    "in_channels": Whole(1, 1 << 12),
    "hidden_size": Whole(1, 1 << 16),
    "depth": Whole(0, 1 << 12),
    "num_heads": Whole(1, 1 << 12),
    "num_classes": Whole(0, 1 << 24),
    "caption_dim": Whole(0, 1 << 16),
    "mlp_ratio": Number(0, MOST_MLP, above=True),
    "class_dropout_prob": Number(0, 1),
    "learn_sigma": FLAG,
}
"""Ranges of a model's sizes. The upper bounds are beyond any real model: a mistyped or hostile size is rejected before
memory is allocated.
"""

PAPER: dict[str, Any] = {name: choices[0] for name, choices in OPTIONS.items()}


def beyond_the_paper(config: Mapping[str, Any]) -> str:
    """The options in which a `DiT.config` differs from the paper's, for a message; "" for the paper's model."""
    others = {name: config[name] for name in OPTIONS if config.get(name, PAPER[name]) != PAPER[name]}
    if config.get("caption_dim"):
        others["caption_dim"] = config["caption_dim"]
    elif not config["num_classes"]:
        others["num_classes"] = 0
    return ", ".join(f"{name}={value!r}" for name, value in others.items())


def check_sizes(**sizes: Any) -> dict[str, Any]:
    """The constructor's sizes by name, converted to Python's types; ConfigError for one out of range."""
    return {name: SIZES[name].check(name, value) for name, value in sizes.items()}
