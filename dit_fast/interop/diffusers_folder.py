"""Read and write a DiT as diffusers lays it out on disk, without diffusers.

A pipeline's folder has `model_index.json` and the model in `transformer/`; the model's own folder has `config.json`
and `diffusion_pytorch_model.safetensors`, whole or in shards with an index.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dit_fast import __version__
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.files import read_object, write_atomically
from dit_fast.interop.converted import Conventions, conventions_of
from dit_fast.interop.diffusers_layout import (
    ADAPTER,
    CLASS_NAMES,
    TRANSFORMER,
    config_from_diffusers,
    diffusers_config,
    state_from_diffusers,
    state_to_diffusers,
)
from dit_fast.interop.weight_file import WeightFile, read_weight_file
from dit_fast.models import DiT

_NAME = "diffusion_pytorch_model"


def diffusers_config_of(path: Path) -> dict[str, Any] | None:
    """The `config.json` at `path` when it is of a DiT that diffusers or `FastDiT` wrote, else None."""
    if not path.exists():
        return None
    config = read_object(path, CheckpointError)
    return config if config.get("_class_name") in CLASS_NAMES else None


def transformer_folder(folder: Path) -> Path:
    """The model's folder within a pipeline's, or `folder` itself."""
    return folder / "transformer" if (folder / "model_index.json").is_file() else folder


def read_folder(folder: Path, config: Mapping[str, Any]) -> tuple[WeightFile, dict[str, Any], Conventions]:
    """(weights under the reference's keys, `DiT.config`, conventions) of a folder with this `config.json`.

    Raises CheckpointError for files that are missing, unsafe or no DiT's.
    """
    source = str(folder / "config.json")
    ours, conventions = config_from_diffusers(config, source)
    path, state, notes = read_weights(folder)
    if config["_class_name"] == ADAPTER:
        state = {key.removeprefix("dit."): value for key, value in state.items()}
    else:
        state = state_from_diffusers(state, ours, str(path))
    if not conventions.same_outputs_as_reference:
        notes = (
            *notes,
            f"{folder}: computed as diffusers does: timestep_freq_shift {conventions.timestep_freq_shift}, "
            f"norm2_eps {conventions.norm2_eps}",
        )
    return WeightFile(path, state, notes=notes), ours, conventions


def write_folder(model: DiT, folder: str | Path) -> None:
    """Write `model` as diffusers' `DiTTransformer2DModel.save_pretrained` would, made when missing.

    Raises ConfigError for what diffusers' files cannot tell: timestep frequencies other than diffusers' own, a grid
    that is not square, positions that are not its own, another MLP ratio than 4, no null class.
    """
    conventions = conventions_of(model)
    if conventions.timestep_freq_shift != 1:
        raise ConfigError(
            f"diffusers computes timestep frequencies with shift 1, this model with "
            f"{conventions.timestep_freq_shift}, and its files cannot say so: save FastDiT.from_dit(model), or give "
            "conventions=DIFFUSERS to export the weights as they are"
        )
    config = diffusers_config(model.config, conventions)
    check_positions(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # clone: q, k and v are views of one tensor and the embedders stand in every block.
    tensors = {
        key: value.detach().cpu().clone() for key, value in state_to_diffusers(model.state_dict()).items()
    }
    write_atomically(
        folder / f"{_NAME}.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    written = json.dumps({"_class_name": TRANSFORMER, "_dit_fast_version": __version__, **config}, indent=2)
    write_atomically(folder / "config.json", lambda path: path.write_text(written + "\n"))


def check_positions(model: DiT) -> None:
    """ConfigError when the model's positions are not the plain grid 0, 1, 2, ..., the only one diffusers makes."""
    plain = state_from_diffusers({}, model.config, "the model")["pos_embed"]
    own = model.pos_embed.detach().float().cpu()
    difference = (own - plain).abs().max().item() if own.shape == plain.shape else float("inf")
    if not difference < 1e-2:  # bfloat16 keeps 8 bits of a sine
        raise ConfigError(
            f"diffusers numbers positions 0, 1, 2, ...; this model's differ by up to {difference:.3g} (interpolated "
            "or trained): save FastDiT.from_dit(model)"
        )


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor], tuple[str, ...]]:
    """(file or index, tensors, notes) of the model's folder: safetensors, whole or sharded, before `.bin`."""
    for name in (f"{_NAME}.safetensors", f"{_NAME}.fp16.safetensors"):
        if (folder / name).is_file():
            file = read_weight_file(folder / name)
            return file.path, file.state, file.notes
    index = folder / f"{_NAME}.safetensors.index.json"
    if index.is_file():
        return index, *_read_shards(index)
    if (folder / f"{_NAME}.bin").is_file():
        file = read_weight_file(folder / f"{_NAME}.bin")
        return file.path, file.state, file.notes
    raise CheckpointError(f"{folder}: no {_NAME}.safetensors beside config.json")


def _read_shards(index: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    names = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: no weight_map of tensor to file")
    shards = sorted(set(names.values()))
    # The names come from the file: none may lead out of its folder.
    outside = [name for name in shards if Path(name).name != name or not name.endswith(".safetensors")]
    if outside:
        raise CheckpointError(f"{index}: refused: {outside[0][:80]!r} is no safetensors file of this folder")
    state: dict[str, Tensor] = {}
    notes: list[str] = []
    for name in shards:
        file = read_weight_file(index.parent / name)
        twice = sorted(state.keys() & file.state.keys())
        if twice:
            raise CheckpointError(f"{index}: {twice[0]} is in two shards")
        state.update(file.state)
        notes += file.notes
    return state, tuple(notes)
