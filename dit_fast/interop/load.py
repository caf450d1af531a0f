"""`load_model`: a model from any kind of checkpoint."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dit_fast.checkpoint.folder import find_checkpoint, read_part, step_folders
from dit_fast.checkpoint.hub import fetch_hub_model, is_hub_id, no_such_path
from dit_fast.checkpoint.manifest import MANIFEST, read_manifest, verify_files
from dit_fast.checkpoint.power_ema import WIDEST, Profile, reconstruct
from dit_fast.checkpoint.tensors import part_files
from dit_fast.checkpoint.weight_file import WeightFile, read_weight_file
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop.adapter import Adapter, apply, read_adapter, read_run_adapter
from dit_fast.interop.diffusers import (
    Conventions,
    ConvertedDiT,
    diffusers_config_of,
    read_folder,
    transformer_folder,
)
from dit_fast.interop.infer_config import infer_config, registry_size, require_config
from dit_fast.interop.lightningdit import is_lightningdit, state_from_lightningdit
from dit_fast.interop.objective import merged_objective, pipeline_facts, transport_objective
from dit_fast.model.dit import DiT
from dit_fast.model.embedders import as_pair
from dit_fast.model.folder import load_weights, read_config
from dit_fast.utils.values import SOURCE, TEXT

WEIGHTS = ("ema", "model")
WIDTH = "ema:"
"""Prefix of a relative width in `weights`: a post-hoc average of snapshots (`dit_fast.checkpoint.power_ema`)."""

# Positions are fixed sines, so that another input size needs a new table, not new weights.
_HINTS = {
    "input_size": "load_model(..., input_size=SIZE) or model.regrid(SIZE) computes positions for another size"
}


@dataclass(frozen=True)
class ModelInfo:
    """Source of a model, and the metadata of its checkpoint.

    Attributes:
        path: File or folder of the weights.
        weights: "ema", "model", "ema:WIDTH", or "only" where the file has one set.
        latent: Whether the model generates latents of an autoencoder rather than pixels.
        step: Step of a training checkpoint.
        class_names: Names of the classes, from a training checkpoint or a pipeline.
        data: Image set of a training checkpoint: name, size, channels, held-out fraction, fingerprint, and `flip`.
        diffusion: Arguments of `create_objective`, from a training checkpoint, a pipeline, a training file of SiT or
            LightningDiT, or the caller of `load_model`.
        vae: Autoencoder of the latents, "ema", "mse" or a folder, where the checkpoint or pipeline names it.
        notes: Lines for the user.
        working_directory: The folder to which relative paths in `data` and `vae` refer.
        adapter: Folder of the adapter that was merged into the weights, of `load_model(..., adapter=...)`.
    """

    path: Path
    weights: str
    latent: bool
    step: int | None = None
    class_names: tuple[str, ...] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    diffusion: dict[str, Any] = field(default_factory=dict)
    vae: str | None = None
    notes: tuple[str, ...] = ()
    working_directory: str | None = None
    adapter: str | None = None

    def summary(self) -> str:
        """The weights and their file on one line."""
        named = {"ema": "EMA weights", "model": "raw weights (not EMA)", "only": "weights"}
        width = self.weights.removeprefix(WIDTH)
        which = named.get(self.weights, f"EMA weights of relative width {width}")
        step = f" at step {self.step}" if self.step is not None else ""
        merged = f" with the adapter {self.adapter}" if self.adapter is not None else ""
        return f"{which}{step} of {self.path}{merged}"


def load_model(
    path: str | Path,
    *,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    num_heads: int | None = None,
    expected: Mapping[str, Any] | None = None,
    input_size: int | tuple[int, int] | None = None,
    objective: str | Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
) -> tuple[DiT, ModelInfo]:
    """Load a model from any kind of checkpoint.

    Args:
        path: One of
            - a run folder of `dit-fast train` (its newest valid checkpoint), or a step folder of it;
            - a folder written by `DiT.save_pretrained`;
            - a folder written by diffusers or `FastDiT`, of a pipeline or a transformer (the model is then a
              `ConvertedDiT`), or the id of such a model on the Hugging Face hub (`organization/name`, with `@revision`
              to pin it);
            - a `.safetensors` file, or a `.pt` file with a state dict or a train.py dictionary of the reference, SiT or
              LightningDiT.
        weights: "ema" or "model", where the checkpoint has both (otherwise the one it has, with a note), or
            "ema:WIDTH" for a post-hoc average.
        device: Device of the model.
        num_heads: Number of attention heads, where neither a config.json nor the registry determines it.
        expected: Fields of `DiT.config` that the checkpoint must have.
        input_size: Input size of the model, (height, width) or one number; other positions are computed for it
            (`DiT.regrid`), with a note.
        objective: Training objective, where the checkpoint does not store it: "flow", or a mapping with "objective",
            "prediction" and "path" as in `create_objective`.
        adapter: Folder with a LoRA adapter of these weights, which is merged into them.

    Returns:
        The model in eval mode, and the metadata of its checkpoint.

    Raises:
        CheckpointError: The file is damaged, unsafe, not a DiT, or not as `expected`. All differing fields, and all
            missing, unexpected and misshaped tensors, are listed at once.
        ConfigError: An argument is out of range, or does not fit the checkpoint.
    """
    path = SOURCE.check("path", path)
    if TEXT.check("weights", weights) not in WEIGHTS:
        _width(weights)
    read = None if adapter is None else read_adapter(adapter)
    path = fetch_hub_model(str(path)) if is_hub_id(path) else Path(path)
    if not path.exists():
        raise CheckpointError(no_such_path(path))
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path}: neither a file nor a folder (a device or a pipe)")
    try:
        model, info = _from_path(path, weights, num_heads, expected or {}, pipeline=objective is None)
    except RecursionError:
        raise CheckpointError(f"{path}: refused: its JSON is nested deeper than in any checkpoint") from None
    if read is not None:
        model, info = apply(model, read, str(path)), _with_adapter(info, read)
    info = replace(info, diffusion=merged_objective(objective, info.diffusion, str(path)))
    if input_size is not None and as_pair(input_size) != model.x_embedder.img_size:
        sizes = " to ".join(
            "x".join(map(str, size)) for size in (model.x_embedder.img_size, as_pair(input_size))
        )
        model.regrid(input_size)
        info = replace(
            info, notes=(*info.notes, f"{path}: positions computed for another input size, {sizes}")
        )
    return model.to(device).eval(), info


def _from_path(
    path: Path, weights: str, num_heads: int | None, expected: Mapping[str, Any], pipeline: bool
) -> tuple[DiT, ModelInfo]:
    """Load by the kind of `path`; `pipeline`: read the scheduler of the pipeline to which a transformer belongs."""
    if (path / MANIFEST).exists() or step_folders(path):
        return _from_training(find_checkpoint(path), weights, expected)
    if weights not in WEIGHTS:
        raise ConfigError(
            f"weights {weights}: {path} is not a run of dit-fast train, whose snapshots this needs"
        )
    folder = path.parent if path.is_file() else path
    parent = folder.resolve().parent
    if pipeline and (parent / "model_index.json").is_file() and diffusers_config_of(folder / "config.json"):
        # The scheduler of its pipeline determines the training objective, unless the caller does.
        model, info = _from_path(path, weights, num_heads, expected, pipeline=False)
        return _with_facts(model, info, parent)
    if path.is_file():
        return _from_file(path, weights, num_heads, expected)
    if config := diffusers_config_of(transformer_folder(path) / "config.json"):
        return _with_facts(*_from_diffusers(transformer_folder(path), config, expected), path)
    if (path / "config.json").is_file():
        return _from_file(path / "model.safetensors", weights, num_heads, expected)
    raise CheckpointError(
        f"{path}: no checkpoint in this folder; expected checkpoints/step-N (a run), {MANIFEST} (one "
        "step), config.json with model.safetensors, or a folder of diffusers"
    )


def _with_adapter(info: ModelInfo, adapter: Adapter) -> ModelInfo:
    known = {name: value for name in ("class_names", "diffusion") if (value := adapter.facts.get(name))}
    if "class_names" in known:
        known["class_names"] = tuple(map(str, known["class_names"]))
    return replace(info, **known, adapter=adapter.source)


def _with_facts(model: DiT, info: ModelInfo, pipeline: Path) -> tuple[DiT, ModelInfo]:
    facts = pipeline_facts(pipeline, model.config["num_classes"])
    return model, replace(info, class_names=facts.class_names, diffusion=facts.diffusion, vae=facts.vae)


def _from_diffusers(
    folder: Path, config: Mapping[str, Any], expected: Mapping[str, Any]
) -> tuple[DiT, ModelInfo]:
    file, dit_config, conventions = read_folder(folder, config)
    model = _build(file, dit_config, expected, conventions)
    return model, ModelInfo(file.path, "only", latent=_looks_latent(model), notes=file.notes)


def _from_training(folder: Path, weights: str, expected: Mapping[str, Any]) -> tuple[DiT, ModelInfo]:
    manifest = read_manifest(folder)
    verify_files(folder, manifest, ["config.json"])
    file = _training_weights(folder, manifest, weights)
    found = read_run_adapter(folder, file.state)
    if found is not None:
        file = replace(file, state=found[0])
    model = _build(file, read_config(folder / "config.json"), expected)
    data = dict(manifest.get("data") or {})
    if data.get("posterior") == "sample" and {*data["shift"]} == {0.0} and {*data["scale"]} == {1.0}:
        # A cache of latents that another program has already scaled by the statistics of the autoencoder.
        del data["shift"], data["scale"]
    data["flip"] = (manifest.get("train_config") or {}).get("flip")
    names = manifest.get("class_names")
    image_size = data.get("image_size")
    return model, ModelInfo(
        path=folder,
        weights=weights,
        # Images of the model's input size are pixels; larger ones were encoded.
        latent=_looks_latent(model) if image_size is None else image_size != model.x_embedder.img_size[0],
        step=int(manifest["step"]),
        class_names=tuple(map(str, names)) if names else None,
        data=data,
        diffusion=dict(manifest.get("diffusion") or {}),
        vae=(data.get("vae") or {}).get("name"),
        notes=file.notes,
        working_directory=manifest.get("working_directory"),
    )


def _training_weights(folder: Path, manifest: dict[str, Any], weights: str) -> WeightFile:
    if weights not in WEIGHTS:
        state, off = reconstruct(folder, _width(weights))
        note = f"{folder}: the average {weights}, reconstructed from snapshots; its profile is {off:.2%} off"
        return WeightFile(folder, state, weights, notes=(note,))
    verify_files(folder, manifest, part_files(manifest["files"], weights))
    return WeightFile(folder / f"{weights}.safetensors", read_part(folder, manifest, weights), weights)


def _width(weights: str) -> float:
    """The relative width in "ema:WIDTH"; ConfigError for other values."""
    kind, _, width = weights.partition(":")
    try:
        if kind == "ema":
            return Profile(float(width), 1.0).sigma_rel
    except ValueError:
        pass
    raise ConfigError(
        f"weights {weights!r}: choose {', '.join(WEIGHTS)}, or {WIDTH}WIDTH with a relative width between 0 and "
        f"{WIDEST:.4f}, as in ema:0.08"
    )


def _from_file(
    path: Path, weights: str, num_heads: int | None, expected: Mapping[str, Any]
) -> tuple[DiT, ModelInfo]:
    file = read_weight_file(path, weights)
    objective = transport_objective(file.arguments)
    beside = path.with_name("config.json")
    if path.suffix == ".safetensors" and beside.is_file():
        if diffusers := diffusers_config_of(beside):
            return _from_diffusers(path.parent, diffusers, expected)
        config = read_config(beside)
    elif is_lightningdit(file.state):
        state, known = state_from_lightningdit(file.state, str(path))
        file, objective = replace(file, state=state), objective or {"objective": "flow"}
        config = _inferred(file, num_heads, {**expected, **known})
    else:
        config = _inferred(file, num_heads, expected)
    model = _build(file, config, expected)
    return model, ModelInfo(
        path, file.weights, latent=_looks_latent(model), diffusion=objective, notes=file.notes
    )


def _inferred(file: WeightFile, num_heads: int | None, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, from the shapes, the caller and the arguments saved in the file."""
    known = {"num_heads": num_heads} if num_heads else {}
    saved_classes, saved_model = file.arguments.get("num_classes"), file.arguments.get("model")
    if isinstance(saved_classes, int):
        known["num_classes"] = saved_classes
    if isinstance(saved_model, str) and not num_heads:
        # A custom model name is ignored; the registry may still have a model of that width and depth.
        with contextlib.suppress(ConfigError):
            known["num_heads"] = registry_size(saved_model)["num_heads"]
    return infer_config(_shapes(file), str(file.path), {**expected, **known})


def _build(
    file: WeightFile,
    config: dict[str, Any],
    expected: Mapping[str, Any],
    conventions: Conventions | None = None,
) -> DiT:
    """A model of `config` with the tensors of the file; nothing is allocated before they are known to fit."""
    source = str(file.path)
    require_config(infer_config(_shapes(file), source, known=config), config, source)
    require_config(config, expected, source, _HINTS)
    try:
        with torch.device("meta"):
            model = DiT(**config) if conventions is None else ConvertedDiT(**config, conventions=conventions)
    except ConfigError as error:
        raise CheckpointError(f"{source} cannot be built: {error}") from None
    load_weights(model, file.state, source, assign=True)
    return model


def _shapes(file: WeightFile) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in file.state.items()}


def _looks_latent(model: DiT) -> bool:
    """Whether a model generates latents: Stable Diffusion autoencoders have four channels or more, images 1 or 3."""
    return model.in_channels not in (1, 3)
