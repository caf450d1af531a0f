"""Reading weight files from untrusted sources: `.pt` files and safetensors.

Nothing is unpickled freely: `torch.load(weights_only=True)` is the boundary. Before it, a `.pt` file is checked as a
zip archive (members stored without compression, sizes consistent, checksums correct), since torch itself ignores a
flipped bit and would unpack any amount of memory.
"""

import argparse
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dit_fast.errors import CheckpointError
from dit_fast.utils.files import open_file, read_object, utf8_name
from dit_fast.utils.terminal import listed, one_line

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
"""Name, without suffix, of the weight file in a folder of diffusers."""

# XL/2 with EMA and optimizer needs 0.3 MB of pickle, and 0.04 MB of safetensors header for 292 tensors (560 in the
# layout of diffusers). Many small entries cost time long before they cost memory.
_MAX_PICKLE_BYTES = 4 * 2**20
_MAX_HEADER_BYTES = 4 * 2**20
_MAX_TENSORS = 10_000
_FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class WeightFile:
    """Weights read from one file.

    Attributes:
        path: The file.
        state: Float32 tensors on the CPU under the keys of the reference.
        weights: Which set of the file it is: "ema" or "model" of a training dictionary, "only" where there is one set.
        arguments: The `argparse` options that train.py of the reference and of SiT saves, or the transport options of
            LightningDiT.
        notes: Lines for the user.
    """

    path: Path
    state: dict[str, Tensor]
    weights: str = "only"
    arguments: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_weight_file(path: str | Path, weights: str = "ema") -> WeightFile:
    """Read a `.safetensors` file or a file written by `torch.save`.

    Prefixes of wrappers (DDP, `torch.compile`, FSDP) are removed, and half and double precision are cast to float32.

    Args:
        path: The file.
        weights: Which set to read from a dictionary of the reference's train.py ({"model", "ema", "opt", "args"}):
            "ema" or "model". A bare state dict is returned whole.

    Returns:
        The weights.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe, or contains something other than weights.
    """
    path = Path(path)
    with open_file(path, CheckpointError, what="a weight file") as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(8)
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty (0 bytes); copy or download it again")
    if path.suffix == ".safetensors":
        content: Any = _read_safetensors(path, size, head)
    else:
        content = _read_torch(path, size)
    return _select(path, content, weights, size)


@dataclass(frozen=True)
class TrainingState:
    """What a train.py dictionary holds besides the weights of one set.

    Attributes:
        step: Finished optimizer steps.
        ema: Averaged weights by name.
        moments: exp_avg and exp_avg_sq of AdamW by name, of the parameters that were trained.
        options: lr, betas, eps and weight_decay of AdamW.
    """

    step: int
    ema: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    options: dict[str, Any]


_MOMENTS = ("exp_avg", "exp_avg_sq")


def read_training_state(path: str | Path) -> TrainingState:
    """Read EMA and optimizer of a train.py dictionary {"model", "ema", "opt", ...} of DiT, SiT or REPA.

    AdamW numbers its parameters in the order of `model.parameters()`, which is that of the state dict: these models
    have no buffers. Parameters without a gradient, such as fixed positions, have no state.

    Raises:
        CheckpointError: As `read_weight_file`, or the optimizer is not an AdamW over the parameters of "model".
    """
    path = Path(path)
    ema = read_weight_file(path, "ema").state
    content = _read_torch(path, path.stat().st_size) if path.suffix != ".safetensors" else {}
    optimizer, model = content.get("opt"), content.get("model")
    where = f"{path}: --init-optimizer needs the dictionary of a train.py"
    if not isinstance(optimizer, Mapping) or not isinstance(model, Mapping) or "ema" not in content:
        raise CheckpointError(f"{where}, with model, ema and opt; this has {listed(list(content))}")
    names = [unwrapped(name) for name in model]
    groups, states = optimizer.get("param_groups"), optimizer.get("state")
    group = groups[0] if isinstance(groups, list) and len(groups) == 1 else None
    numbers = list(range(len(names)))
    if not isinstance(group, Mapping) or not isinstance(states, Mapping) or group.get("params") != numbers:
        raise CheckpointError(
            f"{where}, whose AdamW has one group of the {len(names)} parameters of the model"
        )
    if any(group.get(option) for option in ("amsgrad", "maximize")):
        raise CheckpointError(f"{path}: --init-optimizer: AdamW with amsgrad or maximize is not supported")
    moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in _MOMENTS}
    steps = set()
    for number in states.keys() & {*numbers}:
        name, state = names[number], states[number]
        tensors = state if isinstance(state, Mapping) else {}
        if not all(isinstance(tensors.get(key), Tensor) for key in _MOMENTS) or name not in ema:
            raise CheckpointError(f"{where}, whose AdamW has exp_avg and exp_avg_sq of every parameter")
        steps.add(int(tensors.get("step", 0)))
        for moment in _MOMENTS:
            if tensors[moment].shape != ema[name].shape:
                raise CheckpointError(
                    f"{path}: {moment} number {number} is {tuple(tensors[moment].shape)}, {name} is "
                    f"{tuple(ema[name].shape)}: the order of the parameters is not that of the model"
                )
            moments[moment][name] = tensors[moment].float()
    if len(steps) != 1:
        raise CheckpointError(f"{path}: its AdamW has {len(steps)} numbers of steps, expected one")
    options = {name: group.get(name) for name in ("lr", "betas", "eps", "weight_decay")}
    return TrainingState(steps.pop(), ema, moments, options)


def _read_safetensors(path: Path, size: int, head: bytes) -> dict[str, Tensor]:
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > size - 8:
        raise CheckpointError(
            f"{path}: truncated or not safetensors: its header claims {length} bytes, the file has {size}; "
            "copy or download it again"
        )
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: refused: a header of {length} bytes, expected at most {_MAX_HEADER_BYTES}"
        )
    try:
        with utf8_name(path) as name, safe_open(name, framework="pt") as file:
            number = len(file.keys())
        if number > _MAX_TENSORS:
            raise CheckpointError(f"{path}: refused: {number} tensors, expected at most {_MAX_TENSORS}")
        with utf8_name(path) as name:
            return load_file(name)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: not a valid safetensors file of {size} bytes ({one_line(error)})"
        ) from error


def _read_torch(path: Path, size: int) -> Any:
    _check_archive(path, size)
    try:
        # Files of the reference's train.py contain their argparse.Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Memory-mapped, so that the optimizer of a train.py dictionary is never read into memory.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # hostile bytes make the reader raise errors of any kind
        raise CheckpointError(
            f"{path}: refused: torch.load(weights_only=True) rejects it ({_torch_reason(error)})"
        ) from error


def _torch_reason(error: Exception) -> str:
    """The reason in an error of `torch.load`, whose first lines advise to try again without `weights_only`."""
    found = re.search(r"GLOBAL \S+|Unsupported operand \d+", str(error))
    return found[0] if found else one_line(error)


def _check_archive(path: Path, size: int) -> None:
    """Raise CheckpointError for an archive that is truncated, damaged, compressed, or larger inside than outside."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise CheckpointError(
                    f"{path}: refused: {packed[0]!r} is compressed; torch.save never compresses"
                )
            total = sum(m.file_size for m in members)
            if total > size:
                raise CheckpointError(
                    f"{path}: refused: its members claim {total} bytes, the file has {size}"
                )
            pickles = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointError(
                    f"{path}: a zip archive, but not one written by torch.save (no data.pkl)"
                )
            if pickles[0].file_size > _MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path}: refused: data.pkl of {pickles[0].file_size} bytes, expected at most {_MAX_PICKLE_BYTES}"
                )
            # Files written with torch.serialization.set_crc32_options(False) have no checksums.
            if any(m.CRC for m in members):
                _check_checksums(path, archive, members)
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: truncated, damaged or foreign: {size} bytes that are not a complete torch.save archive "
            "(copy or download it again; save files from torch before 1.6 again)"
        ) from error
    except (OSError, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: damaged archive ({one_line(error)}); copy or download it again"
        ) from error


def _check_checksums(path: Path, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    """Compare every member with its CRC, which torch does not do."""
    for member in members:
        try:
            with archive.open(member) as stream:
                while stream.read(2**20):
                    pass
        except zipfile.BadZipFile as error:
            raise CheckpointError(
                f"{path}: damaged: {member.filename} does not match its checksum; copy or download it again"
            ) from error


def _select(path: Path, content: Any, weights: str, size: int) -> WeightFile:
    """The requested set of weights in the content of a file."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, expected a state dict or a train.py dictionary"
        )
    arguments: dict[str, Any] = {}
    chosen = "only"
    notes: list[str] = []
    state: Any = content
    if any(isinstance(content.get(name), Mapping) for name in ("model", "ema")):
        chosen = (
            weights if isinstance(content.get(weights), Mapping) else ("model" if weights == "ema" else "ema")
        )
        if chosen != weights:
            notes.append(f"{path}: no {weights} weights in it, using {chosen!r}")
        state = content[chosen]
        arguments = _saved_arguments(content)
    tensors = _as_state_dict(path, state, size, notes)
    return WeightFile(path, tensors, chosen, arguments, tuple(notes))


def _saved_arguments(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Options saved beside the weights: an argparse.Namespace, or the transport in LightningDiT's "config"."""
    if isinstance(saved := content.get("args"), argparse.Namespace):
        return dict(vars(saved))
    config = content.get("config")
    transport = config.get("transport") if isinstance(config, Mapping) else None
    return dict(transport) if isinstance(transport, Mapping) else {}


def _as_state_dict(path: Path, state: Mapping[Any, Any], size: int, notes: list[str]) -> dict[str, Tensor]:
    """Copies as dense float32 tensors, under keys without wrapper prefixes."""
    wrong = [
        key
        for key, value in state.items()
        if not (isinstance(key, str) and key.isprintable() and isinstance(value, Tensor))
    ]
    if wrong or not state:
        what = f"entries that are not named tensors: {listed(wrong)}" if wrong else "no tensors at all"
        raise CheckpointError(f"{path}: not a state dict of a DiT: {what}")
    foreign = [
        f"{key} ({value.dtype}, {value.layout})".replace("torch.", "")
        for key, value in state.items()
        if value.dtype not in _FLOAT_DTYPES or value.layout is not torch.strided or value.is_quantized
    ]
    if foreign:
        raise CheckpointError(f"{path}: not dense floating-point weights: {listed(foreign)}")
    # A tensor expanded from one stored value can have any shape; the file size bounds what is copied.
    claimed = sum(value.numel() * value.element_size() for value in state.values())
    if claimed > size:
        raise CheckpointError(f"{path}: refused: its tensors claim {claimed} bytes, the file has {size}")
    casts = sorted({str(v.dtype).removeprefix("torch.") for v in state.values() if v.dtype != torch.float32})
    if casts:
        notes.append(f"{path}: {', '.join(casts)} weights cast to float32")
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = unwrapped(key)
        if name in tensors:
            raise CheckpointError(f"{path}: two entries for {name} once wrapper prefixes are removed")
        tensors[name] = value.detach().to(torch.float32, copy=True).contiguous()
    return tensors


def unwrapped(key: str) -> str:
    """`key` without the prefixes of DistributedDataParallel, torch.compile and FSDP."""
    for part in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        key = key.replace(part, "")
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def read_diffusers_weights(folder: Path) -> tuple[Path, dict[str, Tensor], tuple[str, ...]]:
    """Read the weights in a model folder of diffusers.

    They are one file or shards, safetensors or else `.bin`. A variant (`variant="fp16"`) is read where there are no
    others, and named in a note.

    Args:
        folder: The folder.

    Returns:
        The file or index, the tensors under their own keys, and notes for the user.

    Raises:
        CheckpointError: There are no weights, or they are damaged or unsafe.
    """
    found = [match for path in folder.iterdir() if (match := _DIFFUSERS_FILE.fullmatch(path.name))]
    if not found:
        raise CheckpointError(f"{folder}: no {DIFFUSERS_WEIGHTS}.safetensors beside config.json")
    chosen = min(found, key=_preference)
    path, variant = folder / chosen[0], chosen["file"] or chosen["index"]
    if path.suffix == ".json":
        state, notes = _read_shards(path, f".{chosen['kind']}")
    else:
        file = read_weight_file(path)
        state, notes = file.state, file.notes
    if variant:
        notes = (f"{folder}: only variants of the weights, using {variant!r}", *notes)
    return path, state, notes


_DIFFUSERS_FILE = re.compile(
    rf"{DIFFUSERS_WEIGHTS}(?:\.(?P<file>\w+))?\.(?P<kind>safetensors|bin)(?:\.index(?:\.(?P<index>\w+))?\.json)?"
)


def _preference(match: re.Match[str]) -> tuple[Any, ...]:
    """A key by which `min` chooses among the weights in a folder of diffusers."""
    variant = match["file"] or match["index"] or ""
    known = ("", "fp32", "fp16", "bf16")
    return (
        known.index(variant) if variant in known else len(known),
        match["kind"] == "bin",
        match[0].endswith(".json"),
        variant,
    )


def _read_shards(index: Path, suffix: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    names = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: no weight_map from tensors to files")
    shards = sorted(set(names.values()))
    # The names come from the file and must not lead out of its folder.
    outside = [name for name in shards if Path(name).name != name or not name.endswith(suffix)]
    if outside:
        raise CheckpointError(
            f"{index}: refused: {outside[0][:80]!r} is not a {suffix[1:]} file in this folder"
        )
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
