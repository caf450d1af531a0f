"""Initial weights of a run from a checkpoint (`--init-from`), fitted to the run's model, and frozen parameters.

A tensor of the checkpoint is kept where the run's model has the same one. Positions are regridded for another
resolution. What the checkpoint does not have is drawn with the run's seed, as at the start of any run: the model is
built first, and the kept tensors replace its own.
"""

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dit_fast.checkpoint.weight_file import TrainingState, read_training_state
from dit_fast.data import ImageSet, LatentSet
from dit_fast.download import fetch_model, pretrained_models
from dit_fast.encoders.autoencoder import weights_digest
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop import REFERENCE, ModelInfo, load_model
from dit_fast.interop.diffusers import conventions_of
from dit_fast.model.blocks import ADAPTIVE
from dit_fast.model.config import OPTIONS
from dit_fast.model.dit import DiT
from dit_fast.model.embedders import CaptionEmbedder, LabelEmbedder
from dit_fast.model.positions import resized_table
from dit_fast.model.presets import SIZES, DiT_models
from dit_fast.training.config import BY_NAME, TrainConfig
from dit_fast.utils.files import read_object
from dit_fast.utils.options import flag_of
from dit_fast.utils.terminal import listed

_SIZES = ("hidden_size", "depth", "num_heads")
_TABLE, _POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"
_PATCH_LAYERS = ("x_embedder.proj.weight", "x_embedder.proj.bias")
_OUTPUT_LAYERS = ("final_layer.linear.weight", "final_layer.linear.bias")


@dataclass
class InitialWeights:
    """A checkpoint from which a run starts.

    Attributes:
        source: The model of the checkpoint, in its own configuration, on the CPU.
        info: Metadata of the checkpoint.
        config: Configuration of the run.
        class_names: Classes of the run.
        past: EMA, optimizer state and step with --init-optimizer.
        lines: What was kept, regridded or drawn, for the user; filled by `fit`.
    """

    source: DiT
    info: ModelInfo
    config: TrainConfig
    class_names: tuple[str, ...]
    past: TrainingState | None = None
    lines: list[str] = field(default_factory=list)

    @torch.no_grad()
    def fit(self, model: DiT) -> None:
        """Copy the weights of the checkpoint into a newly built `model`, and fill `lines`.

        Raises:
            CheckpointError: The checkpoint has another architecture.
            ConfigError: Options that do not fit the checkpoint.
        """
        self._check_architecture(model)
        own, old = model.state_dict(), self._cut(model, self.source.state_dict())
        drawn: list[str] = []
        kept = 0
        for name, tensor in own.items():
            if name == _POSITIONS:
                self._fit_positions(model)
            elif name.startswith("y_embedder."):
                continue
            elif name in _PATCH_LAYERS + _OUTPUT_LAYERS and not self._has_patches_of(model):
                drawn.append(name)
            elif name in _OUTPUT_LAYERS and tensor.shape != old[name].shape:
                # Rows of the variance stay as drawn.
                new_rows, old_rows = (
                    each.unflatten(0, (model.patch_size**2, -1)) for each in (tensor, old[name])
                )
                new_rows[:, : model.in_channels] = old_rows
                kept += 1
            else:
                tensor.copy_(old[name])
                kept += 1
        kept += self._fit_conditioning(model)
        self._report(model, kept, drawn)
        if self.past is not None:
            moments = {name: self._cut(model, tensors) for name, tensors in self.past.moments.items()}
            self.past = replace(self.past, ema=self._cut(model, self.past.ema), moments=moments)
            self._check_past(model, self.past, old)

    def record(self) -> dict[str, Any]:
        """Origin of the weights, for the manifest."""
        return {
            "path": str(self.config.init_from),
            "weights": self.info.weights,
            "step": self.info.step,
            "sha256": weights_digest(self.source.state_dict()),
            "lines": list(self.lines),
        }

    def _has_patches_of(self, model: DiT) -> bool:
        return (self.source.patch_size, self.source.in_channels) == (model.patch_size, model.in_channels)

    def _check_architecture(self, model: DiT) -> None:
        there, here = self.source.config | self.source.options, model.config | model.options
        differing = [name for name in (*_SIZES, *OPTIONS) if there[name] != here[name]]
        if not differing:
            shapes = [
                {n: tuple(t.shape) for n, t in each.blocks.state_dict().items()}
                for each in (self.source, model)
            ]
            differing = ["mlp_ratio"] if shapes[0] != shapes[1] else []
        if differing:
            facts = ", ".join(f"{name} is {there[name]} there and {here[name]} here" for name in differing)
            raise CheckpointError(
                f"--init-from {self.config.init_from} has another architecture: {facts}; give "
                f"{' '.join(_flags(there))}"
            )

    def _fit_positions(self, model: DiT) -> None:
        grids = [each.x_embedder.grid_size for each in (self.source, model)]
        if grids[0] == grids[1]:
            # Also sines: a model that was regridded by interpolation has a table of its own.
            model.pos_embed.copy_(self.source.pos_embed)
        elif model.positions == "learned":
            model.pos_embed.copy_(resized_table(self.source.pos_embed, *grids))
        if grids[0] != grids[1] and model.positions != "rope":
            how = "resized" if model.positions == "learned" else "computed"
            sizes = " to ".join("x".join(map(str, grid)) for grid in grids)
            self.lines.append(f"regridded: positions {how} for another grid of patches, {sizes}")

    def _cut(self, model: DiT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the checkpoint by name, without the variance in the output layer where `model` has none.

        The output layer has (P * P, 2 C) rows. SiT keeps those of a variance, and does not use them.
        """
        if model.learn_sigma or not self.source.learn_sigma or not self._has_patches_of(model):
            return tensors
        return {
            name: tensor.unflatten(0, (model.patch_size**2, -1))[:, : model.in_channels].flatten(0, 1)
            if name in _OUTPUT_LAYERS
            else tensor
            for name, tensor in tensors.items()
        }

    def _fit_conditioning(self, model: DiT) -> int:
        """Fit `y_embedder`; returns the number of tensors that were kept whole or in part."""
        source, target = self.source.y_embedder, model.y_embedder
        if self.config.keep_classes and not (
            isinstance(source, LabelEmbedder) and isinstance(target, LabelEmbedder)
        ):
            which = "the run" if isinstance(source, LabelEmbedder) else str(self.config.init_from)
            raise ConfigError(f"--keep-classes: {which} has no classes; leave it out")
        if isinstance(source, LabelEmbedder) and isinstance(target, LabelEmbedder):
            self._fit_classes(source, target)
            return 1
        if isinstance(source, CaptionEmbedder) and isinstance(target, CaptionEmbedder):
            if self.source.caption_dim == model.caption_dim:
                target.load_state_dict(source.state_dict())
                return len(source.state_dict())
            self.lines.append(
                f"drawn: the caption embedder (captions are {self.source.caption_dim} wide there and "
                f"{model.caption_dim} here)"
            )
        elif isinstance(source, LabelEmbedder) and target is None and self.source.has_null:
            if model.conditioning in ADAPTIVE:
                # The condition is the sum of both embeddings, so that the null class is a part of this bias.
                cast(Tensor, model.t_embedder.mlp[2].bias).add_(
                    source.embedding_table.weight[source.num_classes]
                )
                self.lines.append("kept: the null class, in the bias of the timestep embedding")
        elif target is not None:
            self.lines.append(
                "drawn: the embedder of classes or captions, which the checkpoint does not have"
            )
        if source is not None and target is None:
            self.lines.append("left out: the embedder of classes or captions; the run is unconditional")
        return 0

    def _fit_classes(self, source: LabelEmbedder, target: LabelEmbedder) -> None:
        rows = self._class_rows(source.num_classes, target.num_classes)
        new, old = target.embedding_table.weight, source.embedding_table.weight
        for row, origin in rows.items():
            new[row] = old[origin]
        null = source.dropout_prob > 0 and target.dropout_prob > 0
        if null:
            new[target.num_classes] = old[source.num_classes]
        ending = (
            "the null class is kept"
            if null
            else "there is no null class"
            if target.dropout_prob == 0
            else "the null class is drawn"
        )
        drawn = [name for row, name in enumerate(self.class_names) if row not in rows]
        parts = [f"{len(rows)} of {target.num_classes} classes kept"]
        parts += [f"drawn: {listed(drawn)}"] if drawn else []
        common = set(drawn) & set(self.info.class_names or ())
        hint = f" (--keep-classes keeps {listed(sorted(common))})" if common else ""
        self.lines.append(f"label table: {', '.join(parts)}{hint}; {ending}")

    def _class_rows(self, old_count: int, count: int) -> dict[int, int]:
        """Row of the checkpoint's label table for each row of the run's that is kept."""
        names, given = self.info.class_names, self.config.keep_classes
        if given is None:
            same = count == old_count and names in (None, self.class_names)
            return {row: row for row in range(count)} if same else {}
        old = {name: row for row, name in enumerate(names or map(str, range(old_count)))}
        where = f"--keep-classes {given}"
        renamed: dict[str, Any] = {}
        if given == BY_NAME:
            if names is None:
                raise ConfigError(
                    f"{where}: {self.config.init_from} does not record the names of its {old_count} classes: give a "
                    'JSON file of {"new name": number}'
                )
        else:
            renamed = read_object(Path(given), ConfigError, what="a JSON file of new and old class names")
            if unknown := sorted(renamed.keys() - set(self.class_names)):
                raise ConfigError(
                    f"{where}: {listed(unknown)}: no such class in {self.config.data}, whose classes are "
                    f"{listed(self.class_names)}"
                )
        rows = {
            row: old[name] for row, name in enumerate(self.class_names) if name in old and names is not None
        }
        missing = []
        for new_name, old_name in renamed.items():
            origin = old.get(str(old_name))
            if origin is None and isinstance(old_name, int | str) and str(old_name).isdecimal():
                origin = int(old_name) if int(old_name) < old_count else None
            if origin is None:
                missing.append(str(old_name))
            else:
                rows[self.class_names.index(new_name)] = origin
        if missing:
            raise ConfigError(
                f"{where}: {listed(missing)}: no such class in {self.config.init_from}, whose classes are "
                f"{listed(list(old))}"
            )
        if not rows:
            raise ConfigError(
                f"{where}: no class of {self.config.data} ({listed(self.class_names)}) is one of "
                f"{self.config.init_from} ({listed(list(old))})"
            )
        return rows

    def _check_past(self, model: DiT, past: TrainingState, old: dict[str, Tensor]) -> None:
        """Refuse to continue where a trained parameter is not exactly the checkpoint's."""
        other = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and (
                name not in past.moments["exp_avg"]
                or parameter.shape != old[name].shape
                or not torch.equal(parameter, old[name])
            )
        ]
        if other:
            raise ConfigError(
                f"--init-optimizer continues the same model, and the run has other parameters in {listed(other)}; "
                f"leave it out ({'; '.join(self.lines[1:])})"
            )
        here = {"lr": self.config.lr, "betas": (self.config.beta1, self.config.beta2), "eps": 1e-8}
        here["weight_decay"] = self.config.weight_decay
        changed = [
            f"{name} {past.options[name]} to {value}"
            for name, value in here.items()
            if past.options[name] is not None and past.options[name] != value
        ]
        self.lines.append(f"continuing at step {past.step} with the optimizer state and the EMA")
        if changed:
            self.lines.append(f"changed: {', '.join(changed)}")

    def _report(self, model: DiT, kept: int, drawn: list[str]) -> None:
        lines = [f"starting from {self.info.summary()}: {kept} of {len(model.state_dict()) - 1} tensors kept"]
        if drawn:
            facts = (
                f"patch size {each.patch_size}, {each.in_channels} channels" for each in (self.source, model)
            )
            lines.append(f"drawn: patch embedding and output layer ({' there and '.join(facts)} here)")
        elif self.source.learn_sigma != model.learn_sigma:
            lines.append(
                "drawn: the variance in the output layer" if model.learn_sigma
                else "left out: the variance in the output layer"
            )  # fmt: skip
        if conventions_of(self.source) != REFERENCE and conventions_of(self.source).timestep_freq_shift:
            lines.append(
                "changed: timestep frequencies and eps of the norms are those of DiT, not of diffusers"
            )
        there, here = (
            {**_OBJECTIVE, **each} for each in (self.info.diffusion, self.config.objective_arguments())
        )
        if changed := [
            f"{name} {there[name]} to {here[name]}" for name in _OBJECTIVE if there[name] != here[name]
        ]:
            lines.append(
                f"changed: {', '.join(changed)}; the output layer starts with the weights for the old one"
            )
        self.lines[:] = [*lines, *self.lines]


_OBJECTIVE: dict[str, Any] = {"objective": "diffusion", "prediction": "epsilon"}


def read_initial(config: TrainConfig, data: ImageSet | LatentSet) -> InitialWeights | None:
    """Read the checkpoint of --init-from; None without one. Raises the errors of `load_model`."""
    if config.init_from is None:
        return None
    path = config.init_from
    if path in pretrained_models and not Path(path).exists():
        path = str(fetch_model(path))
    size = _size_of(config.model) | {
        name: value for name in _SIZES if (value := getattr(config, name)) is not None
    }
    # Files that do not record the number of heads, of a size that is not the paper's, have those of the run.
    paper = any(
        (each["hidden_size"], each["depth"]) == (size["hidden_size"], size["depth"])
        for each in SIZES.values()
    )
    weights = "model" if config.init_optimizer else config.init_weights
    source, info = load_model(path, weights=weights, num_heads=None if paper else size["num_heads"])
    past = None
    if config.init_optimizer:
        if not info.path.is_file():
            raise ConfigError(
                f"--init-optimizer: {path} is not a dictionary of train.py; --resume continues a run"
            )
        past = read_training_state(info.path)
    return InitialWeights(source, info, config, data.class_names, past)


def _size_of(name: str) -> dict[str, int]:
    """Depth, width, heads and patch size of a model of the paper: "DiT-XL/2"."""
    size, _, patch = name.removeprefix("DiT-").partition("/")
    return {**SIZES[size], "patch_size": int(patch)}


def _flags(config: dict[str, Any]) -> list[str]:
    """Options of `dit-fast train` for the architecture of a `DiT.config`, from the closest preset."""

    def distance(name: str) -> tuple[float, ...]:
        size = _size_of(name)
        ratios = [max(size[key], config[key]) / max(min(size[key], config[key]), 1) for key in _SIZES]
        return (sum(ratios), abs(size["patch_size"] - config["patch_size"]))

    model = min(DiT_models, key=distance)
    size = _size_of(model)
    flags = [f"--model {model}"]
    flags += [
        f"{flag_of(name)} {config[name]}" for name in (*_SIZES, "patch_size") if config[name] != size[name]
    ]
    flags += [f"--mlp-ratio {config['mlp_ratio']:g}"] if config["mlp_ratio"] != 4 else []
    for name, choices in OPTIONS.items():
        if config[name] != choices[0]:
            flags.append(flag_of(name) if config[name] is True else f"{flag_of(name)} {config[name]}")
    return flags


def freeze(model: nn.Module, patterns: Sequence[str]) -> str | None:
    """Freeze the parameters whose names match: they get no gradient.

    Args:
        model: The model.
        patterns: Shell patterns (`fnmatch`) of names of parameters, or of modules, which stand for all parameters
            inside, such as `blocks.[0-3]`.

    Returns:
        A line for the user; None without patterns.

    Raises:
        ConfigError: A pattern matches nothing, or nothing is left to train.
    """
    if not patterns:
        return None
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in parameters if matches(name, pattern)]
        if not found:
            known = [name for name, _ in model.named_modules() if name] + list(parameters)
            raise ConfigError(
                f"--freeze {pattern} matches no parameter; the closest are {nearest(pattern, known)}"
            )
        for name in found:
            parameters[name].requires_grad_(False)
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    if not trained:
        raise ConfigError(f"--freeze {' '.join(patterns)} freezes every parameter; nothing is left to train")
    every = sum(p.numel() for p in parameters.values())
    return f"frozen: {every - trained} of {every} parameters ({' '.join(patterns)})"


def nearest(pattern: str, known: list[str]) -> str:
    """The names most like a pattern that matches none."""
    return ", ".join(difflib.get_close_matches(pattern, known, 3, 0.3) or known[:3])


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a name, or that of a module around it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
