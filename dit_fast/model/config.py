"""The words that a `DiT`'s options take: what makes one model of the family another, docs/models.md."""

from collections.abc import Mapping
from typing import Any

from dit_fast.errors import ConfigError
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
"""The first is the paper's: what a configuration that does not name the option means."""

MOST_MLP = 1 << 10
"""What nobody's MLP is wider than, over the model's width: a mistyped ratio is refused before memory is asked for."""

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
"""Sizes of a model. The largest are what nobody means to exceed: a mistyped or hostile one is refused before memory is
asked for it.
"""

PAPER: dict[str, Any] = {name: words[0] for name, words in OPTIONS.items()}


def beyond_the_paper(config: Mapping[str, Any]) -> str:
    """What makes a model of `DiT.config` another than the paper's, in words for a message; "" for the paper's."""
    others = {name: config[name] for name in OPTIONS if config.get(name, PAPER[name]) != PAPER[name]}
    if config.get("caption_dim"):
        others["caption_dim"] = config["caption_dim"]
    elif not config["num_classes"]:
        others["num_classes"] = 0
    return ", ".join(f"{name}={value!r}" for name, value in others.items())


def check_sizes(**sizes: Any) -> dict[str, Any]:
    """Sizes of a `DiT`, the constructor's arguments by name, in Python's types; ConfigError for what no model has."""
    return {name: SIZES[name].check(name, value) for name, value in sizes.items()}


def one_of(name: str, value: Any, words: tuple[Any, ...]) -> Any:
    """`value`; ConfigError where it is none of `words`."""
    if value not in words:
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(map(repr, words))}")
    return value
