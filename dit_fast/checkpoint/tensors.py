"""Sharded tensors in safetensors files, loaded into tensors with any other sharding.

A checkpoint has the parts "model", "ema" and "optimizer". A single process writes a part to one file, such as
`ema.safetensors`; several ranks write `ema-00001-of-00004.safetensors` and so on, each with the pieces of tensors that
it holds. The header stores the offset of each piece in its tensor, under the keys of PyTorch's
`HuggingFaceStorageReader` (torch.distributed.checkpoint), which can read the files too. Unlike PyTorch's `.distcp`
format, the files contain no pickle, so that nothing in a checkpoint can execute code.
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_fast.errors import CheckpointError
from dit_fast.utils.files import check_file, parse_json, utf8_name, write_atomically
from dit_fast.utils.schema import array, fields, integer, require, table
from dit_fast.utils.terminal import listed

PARTS = ("model", "ema", "optimizer")
_FILE = re.compile(r"(\w+?)(?:-(\d{5})-of-(\d{5}))?\.safetensors")
_OFFSETS_KEY, _OFFSET_KEY = "DCP_SHARDING_INFO", "saved_offsets"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_OFFSETS = table(fields({_OFFSET_KEY: array(integer())}))


@dataclass(frozen=True)
class Piece:
    """Contiguous block of a tensor, held by one rank.

    Attributes:
        tensor: The values.
        offset: Index of its first element in the whole tensor; () for a scalar.
    """

    tensor: Tensor
    offset: tuple[int, ...]


def part_file(part: str, rank: int = 0, size: int = 1) -> str:
    """Name of the file with the pieces of a part that `rank` of `size` ranks holds."""
    return f"{part}.safetensors" if size == 1 else f"{part}-{rank + 1:05d}-of-{size:05d}.safetensors"


def part_files(names: Iterable[str], part: str) -> list[str]:
    """Those of `names` that belong to a part."""
    return sorted(name for name in names if (match := _FILE.fullmatch(name)) and match[1] == part)


def own_pieces(tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Piece]:
    """Choose the pieces that this rank writes, so that every element is written once.

    Args:
        tensors: DTensors, of which a rank writes its shard (the first of several replicas), and plain tensors, which
            every rank holds whole and which are divided evenly among the ranks.
        rank: This rank.
        size: Number of ranks.

    Returns:
        The pieces by name.
    """
    # Whole tensors go to the rank with the least so far, largest first. Every rank computes the same assignment.
    loads = [0] * size
    pieces = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        if (mesh := getattr(tensor, "device_mesh", None)) is not None:
            coordinate = mesh.get_coordinate()
            placements = zip(tensor.placements, coordinate, strict=True)  # type: ignore[attr-defined]
            # Replicated over an axis of the mesh: only the first rank along it writes.
            if any(not placement.is_shard() and place for placement, place in placements):
                continue
            piece = local_piece(tensor)
            # A small tensor may leave a rank without rows.
            if piece.tensor.numel():
                pieces[name] = piece
            continue
        owner = loads.index(min(loads))
        loads[owner] += tensor.numel()
        if owner == rank:
            pieces[name] = local_piece(tensor)
    return pieces


def local_piece(tensor: Tensor) -> Piece:
    """The piece of a tensor that this rank holds; all of a plain tensor."""
    if not hasattr(tensor, "device_mesh"):
        return Piece(tensor.detach(), (0,) * tensor.ndim)
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    return Piece(tensor.detach().to_local(), tuple(chunk.offsets))  # type: ignore[attr-defined]


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, as every rank has it, into a plain tensor or into the local shard of a DTensor."""
    piece = local_piece(tensor)
    ends = (start + size for start, size in zip(piece.offset, piece.tensor.shape, strict=True))
    piece.tensor.copy_(whole[tuple(map(slice, piece.offset, ends))])


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write pieces, contiguous and on the CPU, to one safetensors file."""
    # A single key: safetensors writes several in random order, and equal states should give equal bytes.
    metadata = {"format": "pt"}
    if "-of-" in path.name:
        offsets = {name: {_OFFSET_KEY: list(piece.offset)} for name, piece in pieces.items()}
        metadata = {_OFFSETS_KEY: json.dumps(offsets)}
    tensors = {name: piece.tensor for name, piece in pieces.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


@dataclass
class _Stored:
    """A tensor in the files: its dtype, and (file, offset, sizes) of each piece."""

    dtype: torch.dtype
    pieces: list[tuple[Any, tuple[int, ...], tuple[int, ...]]]

    @property
    def shape(self) -> tuple[int, ...]:
        ends = [[o + s for o, s in zip(offset, sizes, strict=True)] for _, offset, sizes in self.pieces]
        return tuple(max(axis) for axis in zip(*ends, strict=True))

    @property
    def is_whole(self) -> bool:
        """Whether no piece is missing; pieces never overlap, so that counting elements is enough."""
        held = sum(torch.Size(sizes).numel() for _, _, sizes in self.pieces)
        return held == torch.Size(self.shape).numel()


class StoredPart:
    """Reader of one part of a checkpoint: `with StoredPart(folder, "ema", files) as part:`.

    Args:
        folder: Checkpoint folder.
        part: "model", "ema" or "optimizer".
        files: Names of the files of the checkpoint.

    Raises:
        CheckpointError: On entry: a file is not safetensors, or pieces are missing.
    """

    def __init__(self, folder: Path, part: str, files: Iterable[str]):
        self.folder = folder
        self.part = part
        self.files = part_files(files, part)
        self._stack = ExitStack()
        self._tensors: dict[str, _Stored] = {}

    def __enter__(self) -> "StoredPart":
        if not self.files:
            raise CheckpointError(f"checkpoint {self.folder} has no {self.part} weights")
        for name in self.files:
            check_file(self.folder / name, CheckpointError, what="a safetensors file")
        try:
            for name in self.files:
                with utf8_name(self.folder / name) as readable:
                    self._open(self._stack.enter_context(safe_open(readable, framework="pt")))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            self._stack.close()
            raise CheckpointError(
                f"{self.folder / name} is not a readable safetensors file: {error}"
            ) from error
        torn = sorted(name for name, stored in self._tensors.items() if not stored.is_whole)
        if torn:
            self._stack.close()
            raise CheckpointError(
                f"checkpoint {self.folder}: {self.part} is missing pieces of {listed(torn)}"
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _open(self, file: Any) -> None:
        offsets = parse_json((file.metadata() or {}).get(_OFFSETS_KEY, "{}"), _OFFSETS_KEY, CheckpointError)
        require(offsets, _OFFSETS, _OFFSETS_KEY, CheckpointError)
        for name in file.keys():  # noqa: SIM118 (no mapping)
            box = file.get_slice(name)
            sizes = tuple(box.get_shape())
            offset = tuple(offsets[name][_OFFSET_KEY]) if offsets else (0,) * len(sizes)
            if len(offset) != len(sizes):
                raise ValueError(f"{_OFFSETS_KEY} of {name} has {len(offset)} dimensions, not {len(sizes)}")
            stored = self._tensors.setdefault(name, _Stored(_DTYPES[box.get_dtype()], []))
            stored.pieces.append((file, offset, sizes))

    def read(self) -> dict[str, Tensor]:
        """All tensors, whole, on the CPU."""
        whole = {
            name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in self._tensors.items()
        }
        for name, tensor in whole.items():
            self._fill(name, tensor, (0,) * tensor.ndim)
        return whole

    def differences(self, tensors: Mapping[str, Tensor], cast: bool = False) -> list[str]:
        """The reasons why the part cannot be read into `tensors`; `cast` allows other dtypes."""
        problems = []
        if missing := sorted(tensors.keys() - self._tensors.keys()):
            problems.append(f"{self.part} lacks {listed(missing)}")
        if unexpected := sorted(self._tensors.keys() - tensors.keys()):
            problems.append(f"{self.part} has unexpected {listed(unexpected)}")
        common = sorted(tensors.keys() & self._tensors.keys())
        shapes = [
            f"{name} is {self._tensors[name].shape}, expected {tuple(tensors[name].shape)}"
            for name in common
            if self._tensors[name].shape != tuple(tensors[name].shape)
        ]
        dtypes = [
            f"{name} is {self._tensors[name].dtype}, expected {tensors[name].dtype}"
            for name in common
            if not cast and self._tensors[name].dtype != tensors[name].dtype
        ]
        return problems + [f"{self.part}: {listed(found)}" for found in (shapes, dtypes) if found]

    @torch.no_grad()
    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Load into plain tensors and the local shards of DTensors, whatever sharding the part was written with."""
        for name, tensor in tensors.items():
            piece = local_piece(tensor)
            self._fill(name, piece.tensor, piece.offset)

    def _fill(self, name: str, tensor: Tensor, first: tuple[int, ...]) -> None:
        """Copy the overlap of every stored piece with the block of a tensor that starts at `first`."""
        for file, offset, sizes in self._tensors[name].pieces:
            starts = [max(a, b) for a, b in zip(first, offset, strict=True)]
            stops = [min(a + n, b + m) for a, n, b, m in zip(first, tensor.shape, offset, sizes, strict=True)]
            if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, offset, strict=True))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, first, strict=True))
            # A slice reads only its bytes; a scalar has no axis to slice.
            values = file.get_slice(name)[there] if there else file.get_tensor(name)
            tensor[here].copy_(values)
