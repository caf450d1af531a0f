"""Read one weight file (`.pt` or `.safetensors`) that may come from anyone.

Nothing is ever unpickled freely. A `.pt` file is first checked as a zip archive (members stored, not
compressed; their sizes add up; checksums hold) and its pickle is scanned, not run, for every name it
asks for; only then `torch.load(weights_only=True)` builds the tensors. There is no second, laxer try.
"""

import argparse
import os
import pickletools
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

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"

# XL/2 with EMA and optimiser needs 0.3 MB of pickle in 50,000 instructions, and 0.04 MB of safetensors header for
# 292 tensors (560 in diffusers' layout). Many small entries cost seconds long before they cost memory.
_MAX_PICKLE_BYTES = 16 * 2**20
_MAX_PICKLE_INSTRUCTIONS = 250_000
_MAX_HEADER_BYTES = 4 * 2**20
_MAX_TENSORS = 10_000

_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_ALLOWED_GLOBALS = {
    "collections OrderedDict",
    "argparse Namespace",
    "torch Size",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}Storage" for name in _STORAGES),
}
_FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class WeightFile:
    """The weights taken from one file.

    `state` has float32 tensors on the CPU under the reference's keys. `weights` says which set of the
    file it is: "ema" or "model" of a training dictionary, "only" where the file has one set.
    `arguments` are the `argparse` options that the reference's and SiT's train.py save, or those of
    LightningDiT's transport; `notes` are the lines that a user should see.
    """

    path: Path
    state: dict[str, Tensor]
    weights: str = "only"
    arguments: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_weight_file(path: str | Path, weights: str = "ema") -> WeightFile:
    """Read `path`, a `.safetensors` file or a file written by `torch.save`.

    A dictionary of the reference's train.py ({"model", "ema", "opt", "args"}) gives the set named by
    `weights` ("ema" or "model"); a bare state dict is returned whole. Wrapper prefixes are stripped and
    half or double precision is cast to float32. Raises CheckpointError for anything else.
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


def _read_safetensors(path: Path, size: int, head: bytes) -> dict[str, Tensor]:
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > size - 8:
        raise CheckpointError(
            f"{path}: truncated or not safetensors: header says {length} bytes, the file has {size}; "
            "copy or download it again"
        )
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: refused: a header of {length} bytes is no model of ours")
    try:
        with utf8_name(path) as name, safe_open(name, framework="pt") as file:
            number = len(file.keys())
        if number > _MAX_TENSORS:
            raise CheckpointError(f"{path}: refused: {number} tensors are no model of ours")
        with utf8_name(path) as name:
            return load_file(name)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: not a valid safetensors file of {size} bytes ({first_line(error)})"
        ) from error


def _read_torch(path: Path, size: int) -> Any:
    _check_archive(path, size)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, so that the optimiser of a train.py dictionary is never read into memory.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever hostile bytes make the reader raise is one kind of fault here
        raise CheckpointError(
            f"{path}: torch cannot read these weights safely ({first_line(error)})"
        ) from error


def _check_archive(path: Path, size: int) -> None:
    """Refuse an archive that is truncated, compressed, larger inside than outside, or not just weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise CheckpointError(
                    f"{path}: refused: {packed[0]!r} is compressed, torch.save never does that"
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
                    f"{path}: refused: data.pkl of {pickles[0].file_size} bytes is no model of ours"
                )
            if any(m.CRC for m in members):
                _check_checksums(path, archive, members)
            else:
                # Written with torch.serialization.set_crc32_options(False): there is nothing to compare with.
                del pickles[0].CRC
            _check_globals(path, archive.read(pickles[0]))
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: truncated, damaged or foreign: {size} bytes that are no complete torch.save archive "
            "(copy or download it again; save files from torch before 1.6 anew)"
        ) from error
    except (OSError, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: damaged archive ({first_line(error)}); copy or download it again"
        ) from error


def _check_checksums(path: Path, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    """Read every member once against its CRC; torch itself ignores them and would load a flipped bit."""
    for member in members:
        try:
            with archive.open(member) as stream:
                while stream.read(2**20):
                    pass
        except zipfile.BadZipFile as error:
            raise CheckpointError(
                f"{path}: damaged: {member.filename} does not match its checksum; copy or download it again"
            ) from error


def _check_globals(path: Path, pickled: bytes) -> None:
    """Scan the pickle, without running it, for names beyond those that a state dict needs."""
    names: set[str] = set()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        if number > _MAX_PICKLE_INSTRUCTIONS:
            raise CheckpointError(
                f"{path}: refused: a pickle of over {_MAX_PICKLE_INSTRUCTIONS} instructions is no model of ours"
            )
        if opcode.name == "GLOBAL":
            names.add(str(argument))
        elif opcode.name == "PROTO" and argument != 2:
            raise CheckpointError(
                f"{path}: refused: pickle protocol {argument}; save it anew with torch.save's default, 2"
            )
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise CheckpointError(
                f"{path}: refused: its pickle uses {opcode.name}, torch.save's default protocol does not"
            )
    foreign = sorted(name.replace(" ", ".") for name in names - _ALLOWED_GLOBALS)
    if foreign:
        raise CheckpointError(
            f"{path}: refused: it asks for {_listed(foreign)}; weights alone need none of that"
        )


def _select(path: Path, content: Any, weights: str, size: int) -> WeightFile:
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
            notes.append(f"{path}: no {weights} weights in it, took {chosen!r}")
        state = content[chosen]
        arguments = _saved_arguments(content)
    tensors = _as_state_dict(path, state, size, notes)
    return WeightFile(path, tensors, chosen, arguments, tuple(notes))


def _saved_arguments(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The options beside the weights: an argparse.Namespace, or those of the transport in LightningDiT's "config"."""
    if isinstance(saved := content.get("args"), argparse.Namespace):
        return dict(vars(saved))
    config = content.get("config")
    transport = config.get("transport") if isinstance(config, Mapping) else None
    return dict(transport) if isinstance(transport, Mapping) else {}


def _as_state_dict(path: Path, state: Mapping[Any, Any], size: int, notes: list[str]) -> dict[str, Tensor]:
    """Own, float32, dense tensors under unwrapped keys."""
    wrong = [
        key
        for key, value in state.items()
        if not (isinstance(key, str) and key.isprintable() and isinstance(value, Tensor))
    ]
    if wrong or not state:
        what = f"entries that are no named tensors: {_listed(wrong)}" if wrong else "no tensors at all"
        raise CheckpointError(f"{path}: not a state dict of a DiT: {what}")
    foreign = [
        f"{key} ({value.dtype}, {value.layout})".replace("torch.", "")
        for key, value in state.items()
        if value.dtype not in _FLOAT_DTYPES or value.layout is not torch.strided or value.is_quantized
    ]
    if foreign:
        raise CheckpointError(f"{path}: not dense floating-point weights: {_listed(foreign)}")
    # A tensor expanded from one stored value can claim any shape; the real file cannot.
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
            raise CheckpointError(f"{path}: two entries for {name} once wrapper prefixes are stripped")
        tensors[name] = value.detach().to(torch.float32, copy=True).contiguous()
    return tensors


def unwrapped(key: str) -> str:
    """`key` without what DistributedDataParallel, torch.compile and FSDP put into it."""
    for part in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        key = key.replace(part, "")
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _listed(names: list[Any], most: int = 8) -> str:
    # A name from a hostile file may be long or hold control characters; the message stays one plain line.
    plain = [text if (text := str(name)[:80]).isprintable() else repr(text) for name in names[:most]]
    return ", ".join(plain) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """What an error says, shortened to one line; its class where it says nothing."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return text[:200]


def read_diffusers_weights(folder: Path) -> tuple[Path, dict[str, Tensor], tuple[str, ...]]:
    """(file or index, tensors, notes) of the model's folder: safetensors, whole or sharded, before `.bin`."""
    for name in (f"{DIFFUSERS_WEIGHTS}.safetensors", f"{DIFFUSERS_WEIGHTS}.fp16.safetensors"):
        if (folder / name).is_file():
            file = read_weight_file(folder / name)
            return file.path, file.state, file.notes
    index = folder / f"{DIFFUSERS_WEIGHTS}.safetensors.index.json"
    if index.is_file():
        return index, *_read_shards(index)
    if (folder / f"{DIFFUSERS_WEIGHTS}.bin").is_file():
        file = read_weight_file(folder / f"{DIFFUSERS_WEIGHTS}.bin")
        return file.path, file.state, file.notes
    raise CheckpointError(f"{folder}: no {DIFFUSERS_WEIGHTS}.safetensors beside config.json")


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
