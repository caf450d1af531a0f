"""Files of a saved model: config.json, which is checked, and its weights in safetensors."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.model.config import MOST_MLP, OPTIONS
from dit_fast.model.layers import is_untouched
from dit_fast.utils.files import read_object, read_tensors, write_atomically


def read_config(path: Path) -> dict[str, Any]:
    """The constructor's arguments from a `config.json`; CheckpointError for anything that is not a DiT's."""
    if not os.path.lexists(path):
        raise CheckpointError(f"{path} does not exist: a saved model is config.json and model.safetensors")
    config = read_object(path, CheckpointError, what="a model's configuration")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    number = (int, float)
    expected: dict[str, type | tuple[type, ...]] = {
        "input_size": list, "patch_size": int, "in_channels": int, "hidden_size": int, "depth": int,
        "num_heads": int, "mlp_ratio": number, "class_dropout_prob": number, "num_classes": int,
        "learn_sigma": bool, **{name: type(choices[0]) for name, choices in OPTIONS.items()},
        "caption_dim": int,
    }  # fmt: skip
    problems = [f"unknown key {key!r:.80}" for key in sorted(config.keys() - expected.keys())]
    # An option that is missing has the paper's value: files written before the option existed stay readable.
    required = expected.keys() - OPTIONS.keys() - {"caption_dim"}
    problems += [f"missing key {key!r}" for key in expected if key in required - config.keys()]
    for key in expected.keys() & config.keys():
        value, kinds = config[key], expected[key]
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)
        # Zero classes: an unconditional model.
        wrong = wrong or (kinds is int and not (key != "num_classes") <= value < 1 << 24)
        wrong = wrong or (kinds is number and not 0 <= value <= MOST_MLP)
        wrong = wrong or (key == "class_dropout_prob" and value > 1)
        if kinds is list and not wrong:
            sides = [side for side in value if type(side) is int and 0 < side < 1 << 16]
            wrong = not len(value) == len(sides) == 2
        if wrong or value not in OPTIONS.get(key, (value,)):
            problems.append(f"{key} = {value!r:.80}")
    if problems:
        raise CheckpointError(f"{path} is not the configuration of a DiT: {', '.join(problems)}")
    return config


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str, assign: bool = False) -> None:
    """Load a state dict; CheckpointError lists every missing, unexpected and misshaped tensor at once."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state, assign=assign)


_ADAPTER = "an adapter's: merge it (peft's merge_and_unload()), or save it alone (PeftModel.save_pretrained)"
# Part of a name that a plain model does not have -> where it comes from, and what makes the layer plain again.
_CHANGES = {
    "lora_": _ADAPTER,
    "base_layer": _ADAPTER,
    "original_module": _ADAPTER,
    "parametrizations": "a parametrization: call torch.nn.utils.parametrize.remove_parametrizations",
    "weight_g": "a weight norm: call torch.nn.utils.remove_weight_norm",
    "weight_orig": "pruned, or a spectral norm: call torch.nn.utils.prune.remove or remove_spectral_norm",
}


def plain_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The state dict of a model, which must have the tensors `names` and no others, all of them plain and in memory.

    Raises ConfigError for a model with adapters, parametrizations, pruning, quantized, sharded or offloaded weights,
    which nothing could read back; its message says what to call first.
    """
    state = model.state_dict()
    known = dict.fromkeys(names)
    for name in (*(own for own in state if own not in known), *(own for own in known if own not in state)):
        what = next((what for part, what in _CHANGES.items() if part in name), None)
        found = (
            f"is {what}"
            if what
            else "differs from a DiT: put the plain layer back, or torch.save the state dict"
        )
        raise ConfigError(f"{name} {found}; then save the model")
    for name, tensor in state.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if type(tensor) not in (Tensor, nn.Parameter):
            raise ConfigError(
                f"{name} is quantized or sharded ({type(tensor).__name__}): save the model before, and repeat it after "
                "loading, or torch.save the state dict"
            )
        if tensor.itemsize == 1 or (tensor.dtype != state["pos_embed"].dtype and not is_untouched(owner)):
            raise ConfigError(
                f"{name} is stored as {tensor.dtype} (layerwise casting): save the model before, and repeat it after "
                "loading"
            )
        if tensor.is_meta or on_disk(owner):
            raise ConfigError(
                f"{name} is offloaded: save the model before, or call accelerate's remove_hook_from_submodules(model)"
            )
    return state


def on_disk(module: nn.Module) -> bool:
    """Whether diffusers' group offloading keeps the weights in files, and leaves uninitialized ones in the module."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    hook = registry and registry.get_hook("group_offloading")
    return bool(hook and hook.group.offload_to_disk_path)


def write_model(state: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
    """Write `config.json` and `model.safetensors` to `folder`, made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    write_atomically(
        folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(folder / "config.json", lambda path: path.write_text(text))


def read_model(folder: Path, weights: str) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """The constructor's arguments and the tensors of a saved model, and the name of the file that had them.

    Raises CheckpointError for a folder that is incomplete or damaged.
    """
    config = read_config(folder / "config.json")
    path = folder / f"{weights}.safetensors"
    if not os.path.lexists(path):
        raise CheckpointError(f"{path} does not exist: is {folder} a saved model?")
    state = read_tensors(path, CheckpointError)
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    if len(blocks) != config["depth"]:
        raise CheckpointError(f"{path} holds {len(blocks)} blocks, config.json says depth {config['depth']}")
    return config, state, str(path)
