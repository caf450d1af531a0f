"""The words that a `DiT`'s options take: what makes one model of the family another, docs/models.md."""

from collections.abc import Mapping
from typing import Any

from dit_fast.conditioning import CONDITIONING
from dit_fast.errors import ConfigError
from dit_fast.kernels import ACTIVATIONS, NORMS
from dit_fast.positions import POSITIONS

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

PAPER: dict[str, Any] = {name: words[0] for name, words in OPTIONS.items()}


def beyond_the_paper(config: Mapping[str, Any]) -> str:
    """What makes a model of `DiT.config` another than the paper's, in words for a message; "" for the paper's."""
    others = {name: config[name] for name in OPTIONS if config.get(name, PAPER[name]) != PAPER[name]}
    if config.get("caption_dim"):
        others["caption_dim"] = config["caption_dim"]
    elif not config["num_classes"]:
        others["num_classes"] = 0
    return ", ".join(f"{name}={value!r}" for name, value in others.items())


def check_sizes(mlp_ratio: float, class_dropout_prob: float, **counts: int) -> None:
    """ConfigError for sizes of a `DiT` that no model has, as the constructor's arguments by name."""
    for name, value in counts.items():
        least = 0 if name in ("depth", "num_classes", "caption_dim") else 1
        if value < least:
            raise ConfigError(f"{name} {value}: give at least {least}")
    if not 0 < mlp_ratio <= MOST_MLP:
        raise ConfigError(f"mlp_ratio {mlp_ratio}: give a number above 0, up to {MOST_MLP}")
    if not 0 <= class_dropout_prob <= 1:
        raise ConfigError(f"class_dropout_prob {class_dropout_prob}: give a number from 0 to 1")


def one_of(name: str, value: Any, words: tuple[Any, ...]) -> Any:
    """`value`; ConfigError where it is none of `words`."""
    if value not in words:
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(map(repr, words))}")
    return value
