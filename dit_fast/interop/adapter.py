"""Adapters (LoRA, DoRA) in the files of peft: read, checked against a model, merged into its weights, written.

A folder holds adapter_config.json and adapter_model.safetensors, which peft reads, and base.json with what a DiT
needs besides: the digest of the weights that it was trained on, and the configuration of the model. Merging is plain
arithmetic, so that a merged model is a `DiT` as any other, and sampling with an adapter needs no peft.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dit_fast.checkpoint.folder import read_part
from dit_fast.checkpoint.manifest import MANIFEST, read_manifest, verify_files
from dit_fast.checkpoint.tensors import part_files
from dit_fast.encoders.autoencoder import weights_digest
from dit_fast.errors import CheckpointError, OutputError
from dit_fast.model.dit import DiT
from dit_fast.model.embedders import LabelEmbedder
from dit_fast.model.folder import load_weights, read_model
from dit_fast.utils.files import read_object, read_tensors, temporary_folder, write_atomically
from dit_fast.utils.schema import array, fields, flag, integer, maybe, number, require, table, text
from dit_fast.utils.terminal import listed

BASE, ADAPTER = "base", "adapter"
"""Folders of a run with --lora: the model whose layers the adapters change, and the adapter of its last step."""
CONFIG, WEIGHTS, FACTS = "adapter_config.json", "adapter_model.safetensors", "base.json"

_CONFIG = fields(
    {"peft_type": text(), "lora_alpha": number()},
    {
        "modules_to_save": maybe(array(text())),
        "base_model_name_or_path": maybe(text()),
        "alpha_pattern": maybe(table(number())),
        "use_rslora": maybe(flag),
    },
)
_FACTS = fields(
    {"base_sha256": text(), "model": fields({"input_size": array(integer(1, 1 << 16))})},
    {"class_names": maybe(array(text())), "diffusion": maybe(fields({}))},
)
_PREFIX = re.compile(r"(base_model\.model\.)?(dit\.)?")
_PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?")
# What a model may have otherwise than the one that an adapter was trained on: `apply` changes it.
_CHANGEABLE = ("input_size", "num_classes", "class_dropout_prob")


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        source: Its folder, for messages.
        config: Content of adapter_config.json.
        state: Tensors by name, without peft's prefix: `blocks.0.attn.qkv.lora_A.weight`, and those of modules that were
            trained whole.
        facts: Content of base.json; {} for an adapter of another program.
    """

    source: str
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def base_digest(state: Mapping[str, Tensor], saved: Iterable[str]) -> str:
    """SHA-256 of the weights that an adapter refers to: all but positions and the modules `saved` with it."""
    outside = tuple(f"{module}." for module in saved)
    return weights_digest(
        {
            name: tensor.float()
            for name, tensor in state.items()
            if name != "pos_embed" and not name.startswith(outside)
        }
    )


def read_adapter(path: str | Path) -> Adapter:
    """Read a folder with an adapter; CheckpointError for one that is incomplete, damaged or of another kind."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        inside = path / ADAPTER
        hint = f"; give {inside}" if (inside / CONFIG).is_file() else ""
        raise CheckpointError(f"{path} is not an adapter: it has no {CONFIG}{hint}")
    config = read_object(path / CONFIG, CheckpointError, what="the configuration of an adapter")
    require(config, _CONFIG, path / CONFIG, CheckpointError)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} is an adapter of type {config.get('peft_type')!r:.40}, not LORA: merge it with peft "
            "(merge_and_unload()), and give the merged model"
        )
    state = read_tensors(path / WEIGHTS, CheckpointError)
    facts = path / FACTS
    known = read_object(facts, CheckpointError, what="what an adapter records") if facts.is_file() else {}
    if known:
        require(known, _FACTS, facts, CheckpointError)
    return Adapter(str(path), config, {_PREFIX.sub("", name, 1): state[name] for name in state}, known)


def adapter_of(folder: Path, state: Mapping[str, Tensor]) -> Adapter:
    """The adapter whose tensors, with the names of the run, are in a checkpoint of a run with --lora."""
    manifest = read_manifest(folder)
    about = manifest["adapter"]
    require(about["config"], _CONFIG, folder / MANIFEST, CheckpointError)
    facts = {
        "base_sha256": about["base_sha256"],
        "model": read_object(folder / "config.json", CheckpointError, what="a model's configuration"),
        **{name: manifest.get(name) for name in ("class_names", "diffusion", "step")},
    }
    return Adapter(str(folder), about["config"], adapter_names(state), facts)


def read_base(run: Path, digest: str, saved: Iterable[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of the model whose layers the adapters of a run change; checked against `digest`."""
    if not (run / BASE).is_dir():
        raise CheckpointError(
            f"{run / BASE} is missing: the run trained adapters (--lora) on the weights there; restore the folder, or "
            f"give the weights with --ckpt and {run / ADAPTER} with --lora"
        )
    config, state, source = read_model(run / BASE, "model")
    if base_digest(state, saved) != digest:
        raise CheckpointError(f"{source} is not what the run was trained on: its SHA-256 differs")
    return config, state


def adapter_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model with adapters, by the names that they have in peft's files."""
    return {
        name.replace("magnitude_vector.default.weight", "magnitude_vector").replace(".default.", "."): tensor
        for name, tensor in state.items()
    }


def merged(
    state: Mapping[str, Tensor], adapter: Mapping[str, Tensor], config: Mapping[str, Any], source: str
) -> dict[str, Tensor]:
    """The state dict of a DiT with an adapter merged: W + s B A, and of DoRA each row of it scaled to its magnitude.

    Args:
        state: State dict of the plain model.
        adapter: As `Adapter.state`.
        config: As `Adapter.config`.
        source: Names the adapter in messages.

    Raises:
        CheckpointError: Lists all layers that the model does not have, or has with another shape.
    """
    result = dict(state)
    layers: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in adapter.items():
        if match := _PART.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["part"]] = tensor
        elif name not in state:
            problems.append(f"{name}: not a parameter of the model")
        elif state[name].shape != tensor.shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, the model's is {tuple(state[name].shape)}")
        else:
            result[name] = tensor.to(state[name])
    for layer, parts in layers.items():
        weight = state.get(f"{layer}.weight")
        if weight is None:
            problems.append(f"{layer}: no such layer")
            continue
        if not parts.keys() >= {"lora_A", "lora_B"}:
            problems.append(f"{layer}: lora_A or lora_B is missing")
            continue
        down, up = (parts[part].to(weight.device, torch.float32) for part in ("lora_A", "lora_B"))
        rows, columns = up.shape[0], down.flatten(1).shape[1]
        if (rows, columns) != tuple(weight.flatten(1).shape):
            problems.append(
                f"{layer}: the adapter is for {rows}x{columns}, the layer is "
                f"{'x'.join(map(str, weight.flatten(1).shape))}"
            )
            continue
        rank = down.shape[0]
        alpha = _by_pattern(config.get("alpha_pattern") or {}, layer, config.get("lora_alpha", rank))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        whole = weight.float() + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * scale
        if (magnitude := parts.get("lora_magnitude_vector")) is not None:
            norms = whole.flatten(1).norm(dim=1)
            factor = magnitude.to(norms).flatten() / norms
            whole = whole * factor.reshape(-1, *[1] * (weight.ndim - 1))
        result[f"{layer}.weight"] = whole.to(weight.dtype)
    if problems:
        raise CheckpointError(f"adapter {source} does not fit the model: {listed(problems)}")
    return result


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the state dict of a model with adapters of peft: that of the plain model, and the adapters'."""
    own = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    return {name.replace(".base_layer.", "."): state[name] for name in state if name not in own}, own


def check_base(
    state: Mapping[str, Tensor], config: Mapping[str, Any], adapter: Adapter, checkpoint: str
) -> None:
    """Raise CheckpointError for an adapter of other weights than `state` of a model of `config`, named `checkpoint`."""
    facts = adapter.facts
    there = facts.get("model") or {}
    others = [
        f"{name} is {there[name]} there and {config[name]} here"
        for name in config
        if name in there and name not in _CHANGEABLE and there[name] != config[name]
    ]
    if others:
        raise CheckpointError(
            f"adapter {adapter.source} was trained on another model than {checkpoint}: {', '.join(others)}"
        )
    saved = adapter.config.get("modules_to_save") or ()
    if facts and base_digest(state, saved) != facts.get("base_sha256"):
        raise CheckpointError(
            f"adapter {adapter.source} was trained on other weights than {checkpoint}: those of "
            f"{adapter.config.get('base_model_name_or_path')} (their SHA-256 differ)"
        )


def apply(model: DiT, adapter: Adapter, checkpoint: str) -> DiT:
    """Merge an adapter into a model in place; classes and input size become those that it was trained with.

    Raises:
        CheckpointError: It was trained on other weights, or has other layers; the model is unchanged.
    """
    check_base(model.state_dict(), model.config, adapter, checkpoint)
    there = adapter.facts.get("model") or {}
    state = dict(model.state_dict())
    embedder = _embedder_for(model, adapter)
    if embedder is not None:
        state["y_embedder.embedding_table.weight"] = embedder.embedding_table.weight.detach()
    state = merged(state, adapter.state, adapter.config, adapter.source)
    if embedder is not None:
        model.y_embedder = embedder
    load_weights(model, state, adapter.source)
    size = tuple(there.get("input_size", model.x_embedder.img_size))
    return model if size == model.x_embedder.img_size else model.regrid(size)


def _embedder_for(model: DiT, adapter: Adapter) -> LabelEmbedder | None:
    """A new embedder of labels where the adapter brings a table of other classes; None: the model's own fits."""
    table, own = adapter.state.get("y_embedder.embedding_table.weight"), model.y_embedder
    if table is None or not isinstance(own, LabelEmbedder) or own.embedding_table.weight.shape == table.shape:
        return None
    dropout = (adapter.facts.get("model") or {}).get("class_dropout_prob", own.dropout_prob)
    weight = own.embedding_table.weight
    return LabelEmbedder(len(table) - (dropout > 0), table.shape[1], dropout).to(weight.device, weight.dtype)


def write_adapter(adapter: Adapter, folder: Path, replace: bool = False) -> None:
    """Write the three files of an adapter to a new folder, completely or not at all; `replace`: also in its place."""
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in adapter.state.items()}
    try:
        with temporary_folder(folder) as temporary:
            temporary.mkdir(parents=True)
            write_atomically(
                temporary / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"})
            )
            for name, content in ((CONFIG, adapter.config), (FACTS, adapter.facts)):
                text = json.dumps(content, indent=2, sort_keys=True) + "\n"
                write_atomically(temporary / name, lambda path, text=text: path.write_text(text))  # type: ignore[misc]
            if replace:
                shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {folder}: {error}") from error


def write_run_adapter(step: Path, folder: Path, weights: str = "ema") -> None:
    """Write the adapter of a checkpoint of a run with --lora, in place of an earlier one."""
    manifest = read_manifest(step)
    verify_files(step, manifest, part_files(manifest["files"], weights))
    write_adapter(adapter_of(step, read_part(step, manifest, weights)), folder, replace=True)


def read_run_adapter(folder: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Adapter] | None:
    """Of a step folder of a run with --lora: its merged state dict and its adapter; None for another run."""
    about = read_manifest(folder).get("adapter")
    if about is None:
        return None
    adapter = adapter_of(folder, weights)
    _, base = read_base(
        folder.resolve().parents[1], about["base_sha256"], about["config"].get("modules_to_save") or ()
    )
    return merged(base, adapter.state, adapter.config, str(folder)), adapter


def _by_pattern(values: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a layer's name, as peft finds it."""
    return next((value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", layer)), default)
