"""One way in for every kind of checkpoint: `load_model`."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dit_fast.checkpoint.folder import find_checkpoint, read_part, step_folders
from dit_fast.checkpoint.hub import fetch_hub_model, is_hub_id
from dit_fast.checkpoint.manifest import MANIFEST, read_manifest, verify_files
from dit_fast.checkpoint.power_ema import WIDEST, Profile, reconstruct
from dit_fast.checkpoint.tensors import part_files
from dit_fast.checkpoint.weight_file import WeightFile, read_weight_file
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop.diffusers import (
    Conventions,
    ConvertedDiT,
    diffusers_config_of,
    read_folder,
    transformer_folder,
)
from dit_fast.interop.infer_config import infer_config, registry_size, require_config
from dit_fast.interop.lightningdit import is_lightningdit, state_from_lightningdit
from dit_fast.interop.objective import pipeline_facts, settled_objective, transport_objective
from dit_fast.model.dit import DiT
from dit_fast.model.embedders import as_pair
from dit_fast.model.folder import load_weights, read_config
from dit_fast.utils.values import SOURCE, TEXT

WEIGHTS = ("ema", "model")
WIDTH = "ema:"
"""What stands before a relative width in `weights`: an average made of snapshots (`dit_fast.checkpoint.power_ema`)."""

# Positions are fixed sines: another size needs a new table, not new weights.
_HINTS = {
    "input_size": "load_model(..., input_size=SIZE) or model.regrid(SIZE) makes positions for another size"
}


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from and what its checkpoint says of it.

    `weights` is "ema", "model", "ema:WIDTH" or "only" (the file has one set); `latent` says whether the model makes
    latents of an autoencoder or pixels; `notes` are lines that a user should see. The other fields are a
    training checkpoint's and empty for other files: `data` describes the image set (its name, size,
    channels, held-out fraction, fingerprint, and `flip` as the run was told), `diffusion` are arguments of
    `create_objective`. A pipeline's folder tells `class_names` and `diffusion` too; training files of SiT and
    LightningDiT tell `diffusion`, and for other weight files the caller may. `vae`: the autoencoder of the latents,
    "ema", "mse" or a folder, where the checkpoint or the pipeline tells it. `working_directory`: what the relative
    paths in `data` and `vae` are relative to.
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

    def summary(self) -> str:
        """One line: which weights of which file."""
        named = {"ema": "EMA weights", "model": "raw weights (not EMA)", "only": "weights"}
        width = self.weights.removeprefix(WIDTH)
        which = named.get(self.weights, f"EMA weights of relative width {width}")
        step = f" at step {self.step}" if self.step is not None else ""
        return f"{which}{step} of {self.path}"


def load_model(
    path: str | Path,
    *,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    num_heads: int | None = None,
    expected: Mapping[str, Any] | None = None,
    input_size: int | tuple[int, int] | None = None,
    objective: str | Mapping[str, Any] | None = None,
) -> tuple[DiT, ModelInfo]:
    """The model of any checkpoint, in eval mode on `device`, and what is known of it.

    `path` is a run folder of `dit-fast train` (its newest checkpoint that verifies), a step folder, a
    `save_pretrained` folder, a folder that diffusers or `FastDiT` wrote (a pipeline's or the transformer's; then
    the model is a `ConvertedDiT`), the id of such a model on the Hugging Face hub (`organisation/name`, with
    `@revision` to pin it), a `.safetensors` file, or a `.pt` file: a bare state dict as the reference, SiT and
    LightningDiT publish, or a dictionary of their train.py.

    weights     "ema" or "model", where the checkpoint has both; the one there is, with a note, where it has
    one
    num_heads   where neither a config.json nor the registry tells it
    expected    fields of `DiT.config` that the checkpoint must have
    input_size  of the model, whatever the checkpoint's: `DiT.regrid` makes its positions for that size, with a note
    objective   what the model was trained to predict, where the checkpoint does not tell: "flow", or a mapping with
                "objective", "prediction" and "path" as of `create_objective`

    Raises CheckpointError for a file that is damaged, unsafe, no DiT, or not as `expected`; all differing
    fields and all missing, unexpected and misshaped tensors are listed at once.
    """
    path = SOURCE.check("path", path)
    if TEXT.check("weights", weights) not in WEIGHTS:
        _width(weights)
    path = fetch_hub_model(str(path)) if is_hub_id(path) else Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path}: neither a file nor a folder (a device or a pipe)")
    try:
        model, info = _from_path(path, weights, num_heads, expected or {}, told=objective is not None)
    except RecursionError:
        raise CheckpointError(f"{path}: refused: its JSON is nested deeper than any checkpoint's") from None
    info = replace(info, diffusion=settled_objective(objective, info.diffusion, str(path)))
    if input_size is not None and as_pair(input_size) != model.x_embedder.img_size:
        sizes = " to ".join(
            "x".join(map(str, size)) for size in (model.x_embedder.img_size, as_pair(input_size))
        )
        model.regrid(input_size)
        info = replace(info, notes=(*info.notes, f"{path}: positions made for another input size, {sizes}"))
    return model.to(device).eval(), info


def _from_path(
    path: Path, weights: str, num_heads: int | None, expected: Mapping[str, Any], told: bool
) -> tuple[DiT, ModelInfo]:
    if (path / MANIFEST).exists() or step_folders(path):
        return _from_training(find_checkpoint(path), weights, expected)
    if weights not in WEIGHTS:
        raise ConfigError(
            f"weights {weights}: {path} is no run of dit-fast train, whose snapshots that takes"
        )
    folder = path.parent if path.is_file() else path
    pipeline = folder.resolve().parent
    if not told and (pipeline / "model_index.json").is_file() and diffusers_config_of(folder / "config.json"):
        # A part of a pipeline, whose scheduler says what it was trained for; unless the caller does.
        model, info = _from_path(path, weights, num_heads, expected, told=True)
        return _with_facts(model, info, pipeline)
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


def _with_facts(model: DiT, info: ModelInfo, pipeline: Path) -> tuple[DiT, ModelInfo]:
    facts = pipeline_facts(pipeline, model.config["num_classes"])
    return model, replace(info, class_names=facts.class_names, diffusion=facts.diffusion, vae=facts.vae)


def _from_diffusers(
    folder: Path, config: Mapping[str, Any], expected: Mapping[str, Any]
) -> tuple[DiT, ModelInfo]:
    file, ours, conventions = read_folder(folder, config)
    model = _build(file, ours, expected, conventions)
    return model, ModelInfo(file.path, "only", latent=_looks_latent(model), notes=file.notes)


def _from_training(folder: Path, weights: str, expected: Mapping[str, Any]) -> tuple[DiT, ModelInfo]:
    manifest = read_manifest(folder)
    verify_files(folder, manifest, ["config.json"])
    file = _training_weights(folder, manifest, weights)
    model = _build(file, read_config(folder / "config.json"), expected)
    data = dict(manifest.get("data") or {})
    if data.get("posterior") == "sample" and {*data["shift"]} == {0.0} and {*data["scale"]} == {1.0}:
        # A cache of samples as another program scaled them: by the autoencoder's own statistics.
        del data["shift"], data["scale"]
    data["flip"] = (manifest.get("train_config") or {}).get("flip")
    names = manifest.get("class_names")
    image_size = data.get("image_size")
    return model, ModelInfo(
        path=folder,
        weights=weights,
        # The trainer says what it was fed: images of the model's own size are pixels, larger were encoded.
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
        note = f"{folder}: an average of {weights} made of snapshots; its profile is {off:.2%} off"
        return WeightFile(folder, state, weights, notes=(note,))
    verify_files(folder, manifest, part_files(manifest["files"], weights))
    return WeightFile(folder / f"{weights}.safetensors", read_part(folder, manifest, weights), weights)


def _width(weights: str) -> float:
    """The relative width that "ema:WIDTH" asks for. Raises ConfigError."""
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
    told = transport_objective(file.arguments)
    beside = path.with_name("config.json")
    if path.suffix == ".safetensors" and beside.is_file():
        if theirs := diffusers_config_of(beside):
            return _from_diffusers(path.parent, theirs, expected)
        config = read_config(beside)
    elif is_lightningdit(file.state):
        state, known = state_from_lightningdit(file.state, str(path))
        file, told = replace(file, state=state), told or {"objective": "flow"}
        config = _inferred(file, num_heads, {**expected, **known})
    else:
        config = _inferred(file, num_heads, expected)
    model = _build(file, config, expected)
    return model, ModelInfo(path, file.weights, latent=_looks_latent(model), diffusion=told, notes=file.notes)


def _inferred(file: WeightFile, num_heads: int | None, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that the shapes tell, with the help of what the caller or the saved arguments
    know.
    """
    known = {"num_heads": num_heads} if num_heads else {}
    saved_classes, saved_model = file.arguments.get("num_classes"), file.arguments.get("model")
    if isinstance(saved_classes, int):
        known["num_classes"] = saved_classes
    if isinstance(saved_model, str) and not num_heads:
        # A model name of someone's own says nothing; its size may still be one of the registry's.
        with contextlib.suppress(ConfigError):
            known["num_heads"] = registry_size(saved_model)["num_heads"]
    return infer_config(_shapes(file), str(file.path), {**expected, **known})


def _build(
    file: WeightFile,
    config: dict[str, Any],
    expected: Mapping[str, Any],
    conventions: Conventions | None = None,
) -> DiT:
    """The model of `config` with the file's tensors; nothing is allocated before the two are known to fit."""
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
    """Grey and RGB models make pixels; the Stable Diffusion autoencoders have four latent channels or
    more.
    """
    return model.in_channels not in (1, 3)
