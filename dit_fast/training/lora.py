"""Adapters of a run (`--lora`): put on the model by peft, trained alone, kept beside the weights that they change.

The model keeps its structure; each adapted layer becomes peft's, with the frozen layer inside it. What the checkpoint
of --init-from does not have, such as the rows of new classes, is trained whole and belongs to the adapter. RUN/base
holds the weights that the run began with, once; its checkpoints hold what is trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast.errors import ConfigError, MissingExtraError
from dit_fast.interop import adapter as files
from dit_fast.model.dit import DiT
from dit_fast.model.folder import load_weights
from dit_fast.training.config import TrainConfig
from dit_fast.training.initial import InitialWeights, matches, nearest

TARGETS = ("blocks.*.attn", "blocks.*.mlp", "blocks.*.cross")
"""Patterns of the layers that are adapted without --lora-targets: those that every token of an image goes through."""


@dataclass
class Base:
    """The weights that the run of a checkpoint with --lora began with, for a continuation of it.

    run: The run's folder; about: entry "adapter" of the manifest.
    """

    run: Path
    about: Mapping[str, Any]
    past: None = field(default=None, init=False)

    @property
    def saved(self) -> tuple[str, ...]:
        return tuple(self.about["config"].get("modules_to_save") or ())

    def fit(self, model: DiT) -> None:
        """Load the weights into a new model of the run."""
        _, state = files.read_base(self.run, self.about["base_sha256"], self.saved)
        load_weights(model, state, str(self.run / files.BASE))

    def record(self) -> None:
        """The manifest has it."""


@dataclass
class Adapters:
    """The adapters of a model in training.

    Attributes:
        config: peft's configuration, as adapter_config.json holds it.
        base_sha256: Digest of the weights that they refer to.
        base: These weights, on the first rank until `save_base`.
        line: What is trained, for the user.
    """

    config: dict[str, Any]
    base_sha256: str
    base: dict[str, Tensor] | None
    line: str

    def about(self) -> dict[str, Any]:
        """Entry of the manifest."""
        return {"config": self.config, "base_sha256": self.base_sha256}

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of the plain model for one of the model with adapters."""
        plain, own = files.split(state)
        return files.merged(plain, files.adapter_names(own), self.config, "of the run")


def attach(model: DiT, config: TrainConfig, initial: InitialWeights | Base, keep: bool) -> Adapters:
    """Put adapters on a plain model in place, and freeze everything else but the modules that are trained whole.

    Args:
        model: The model with the weights of --init-from, on the CPU.
        config: The run's, with `lora`.
        initial: Where the weights came from.
        keep: Whether this rank keeps the weights, to write them.

    Raises:
        ConfigError: A pattern matches no layer.
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("--lora: peft is not installed; pip install 'dit-fast[lora]'") from error

    assert config.lora is not None
    saved = initial.saved if isinstance(initial, Base) else _saved(model, initial, config.lora_train)
    targets = layers_of(model, config.lora_targets, saved)
    base = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    digest = files.base_digest(base, saved)
    # Modules that are trained whole change in place.
    kept = {name: tensor.clone() for name, tensor in base.items()} if keep else None
    every = sum(parameter.numel() for parameter in model.parameters())
    options = LoraConfig(
        r=config.lora,
        lora_alpha=config.lora if config.lora_alpha is None else config.lora_alpha,  # type: ignore[arg-type]
        target_modules=targets,
        use_dora=config.lora_dora,
        base_model_name_or_path=config.init_from,
    )
    inject_adapter_in_model(options, model)
    for module in saved:
        model.get_submodule(module).requires_grad_(True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parts = [f"LoRA of rank {config.lora} on {len(targets)} layers"]
    parts += [f"{', '.join(saved)} whole"] if saved else []
    line = f"training {' and '.join(parts)}: {trained} parameters beside {every} ({trained / every:.2%})"
    kept_options = ("r", "lora_alpha", "lora_dropout", "bias", "use_dora", "base_model_name_or_path")
    about = {
        **{name: getattr(options, name) for name in kept_options},
        "peft_type": "LORA",
        "target_modules": targets,
        "modules_to_save": list(saved) or None,
        "inference_mode": True,
    }
    return Adapters(about, digest, kept, line)


def _saved(model: DiT, initial: InitialWeights, given: Sequence[str]) -> tuple[str, ...]:
    """The modules that are trained whole: those --lora-train names, and those with weights of their own."""
    known = dict(model.named_modules())
    for name in given:
        if not name or name not in known:
            near = nearest(name, list(known))
            raise ConfigError(f"--lora-train {name} is no module of the model; the closest are {near}")
        if not list(known[name].parameters()):
            raise ConfigError(f"--lora-train {name} has no parameters; leave it out")
    old = initial.source.state_dict()
    drawn = [
        name
        for name, tensor in model.state_dict().items()
        if name != "pos_embed"
        and (
            name not in old
            or old[name].shape != tensor.shape
            or not torch.equal(old[name].to(tensor), tensor)
        )
    ]
    modules = {
        "y_embedder" if name.startswith("y_embedder.") else name.rpartition(".")[0] for name in drawn
    } | set(given)
    # A module inside another one is saved with it.
    return tuple(
        sorted(name for name in modules if not any(name.startswith(f"{other}.") for other in modules))
    )


def layers_of(model: DiT, given: Sequence[str], saved: Sequence[str]) -> list[str]:
    """Names of the layers that are adapted."""
    layers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
        and not f"{name}.".startswith(tuple(f"{module}." for module in saved))
    ]  # fmt: skip
    for pattern in given:
        if not any(matches(name, pattern) for name in layers):
            raise ConfigError(
                f"--lora-targets {pattern} matches no layer; the closest are {nearest(pattern, layers)}"
            )
    return [name for name in layers if any(matches(name, pattern) for pattern in given or TARGETS)]
