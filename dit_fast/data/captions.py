"""Images with captions: where their texts lie, and their embeddings on disk.

A folder of captions has images (PNG and JPEG, at any depth) and for each a text: in a `.txt` of its name beside it, or
in `metadata.jsonl` at the top, lines {"file_name": ..., "text": ...} (the convention of datasets' imagefolder).
Embeddings are (S, E) for each image: S tokens of a text encoder of width E; a token of zeros is padding.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_fast.data.folder import image_files
from dit_fast.data.shards import map_npy
from dit_fast.errors import ConfigError, DataError

METADATA = "metadata.jsonl"
EMBEDDINGS = (".safetensors", ".npz")
"""Files of embeddings, an array (S, E) for each image under its name."""


class CaptionEncoder(Protocol):
    """What makes embeddings: a text encoder (`dit_fast.interop.text_encoder`) or a file of them.

    tokens, width: S and E; sha256: of all that decides what comes out; reads_texts: whether it needs captions.
    """

    tokens: int
    width: int
    sha256: str
    reads_texts: bool

    def __call__(self, names: Sequence[str], texts: Sequence[str]) -> Tensor:
        """Embeddings float32 (B, S, E), padded with zeros, of images `names` with captions `texts`."""
        ...

    def identity(self) -> dict[str, Any]:
        """JSON-ready facts: name, sha256, tokens, width."""
        ...


def list_captioned(root: Path, reads_texts: bool) -> tuple[list[Path], list[str]]:
    """The images below `root` and, where texts are read, the caption of each.

    Raises DataError for a folder without images, for images without a caption and for what is no caption.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give one of images with captions")
    paths = image_files(root)
    if not paths:
        raise DataError(f"{root} has no PNG or JPEG image")
    if not reads_texts:
        return paths, []
    listed = _metadata(root / METADATA)
    texts, without = [], []
    for path in paths:
        name = path.relative_to(root).as_posix()
        text = listed.get(name)
        try:
            text = path.with_suffix(".txt").read_text(encoding="utf-8") if text is None else text
        except FileNotFoundError:
            without.append(name)
        except (OSError, ValueError) as error:
            raise DataError(f"{path.with_suffix('.txt')} is no text in UTF-8: {error}") from None
        texts.append((text or "").strip())
    if without:
        raise DataError(
            f"{root}: {len(without)} of {len(paths)} images have no caption: {', '.join(without[:5])}; put a .txt of "
            f"the same name beside each, or name it in {METADATA}"
        )
    return paths, texts


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    captions: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            entry = json.loads(line) if line.strip() else None
            if entry is not None:
                name, text = entry["file_name"], entry["text"]
                if not isinstance(name, str) or not isinstance(text, str):
                    raise TypeError("file_name and text must be strings")
                captions[name] = text
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f'{path}, line {number}: expected {{"file_name": ..., "text": ...}}: {error!r}'
            ) from None
    return captions


class EmbeddingFile:
    """Embeddings that were made elsewhere: a .safetensors or .npz with an array (S, E) for each image.

    Arrays are named as the images are, relative to their folder; each may have tokens of its own number. tokens: S that
    shorter ones are padded to; None: the longest's. Nothing is unpickled. Raises DataError.
    """

    reads_texts = False

    def __init__(self, path: Path, tokens: int | None = None) -> None:
        self.path = path
        self._read: Callable[[str], np.ndarray]
        try:
            with path.open("rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if path.suffix == ".npz":
                archive = np.load(path, allow_pickle=False)
                self.names, self._read = frozenset(archive.files), archive.__getitem__
            else:
                tensors = safe_open(path, framework="pt")
                self.names = frozenset(tensors.keys())
                self._read = lambda name: tensors.get_tensor(name).float().numpy()
            shapes = {name: self._array(name).shape for name in self.names}
        except DataError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
            raise DataError(f"{path} is no readable file of embeddings: {error}") from None
        widths = {shape[1] for shape in shapes.values()}
        if len(widths) != 1:
            raise DataError(f"{path}: embeddings of one width are needed, found {sorted(widths)}")
        self.width, longest = widths.pop(), max(shape[0] for shape in shapes.values())
        self.tokens = tokens or longest
        if longest > self.tokens:
            raise ConfigError(
                f"--caption-tokens {tokens}: {path} has captions of {longest} tokens; give that many"
            )

    def _array(self, name: str) -> np.ndarray:
        array = self._read(name)
        if array.ndim != 2 or 0 in array.shape or array.dtype.kind != "f":
            raise DataError(
                f"{self.path}: {name} is {array.dtype} {array.shape}, expected floats (tokens, width)"
            )
        return array

    def __call__(self, names: Sequence[str], texts: Sequence[str]) -> Tensor:
        if missing := [name for name in names if name not in self.names]:
            raise DataError(
                f"{self.path} has no embedding of {', '.join(missing[:5])}: name arrays as the images"
            )
        made = torch.zeros(len(names), self.tokens, self.width)
        for row, name in enumerate(names):
            array = torch.from_numpy(self._array(name)).float()
            made[row, : len(array)] = array
        return made

    def identity(self) -> dict[str, Any]:
        return {"name": self.path.name, "sha256": self.sha256, "tokens": self.tokens, "width": self.width}


@dataclass(frozen=True)
class CaptionShards:
    """The memory-mapped embeddings of a set: `arrays` (M, S, E), all but the last equally long.

    encoder: what made them, see `CaptionEncoder.identity`.
    """

    arrays: tuple[np.ndarray, ...]
    encoder: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """(S, E)."""
        return self.arrays[0].shape[1:]

    def read(self, members: Sequence[int]) -> Tensor:
        """Embeddings (B, S, E) of samples `members`, as stored."""
        made = np.empty((len(members), *self.shape), self.arrays[0].dtype)
        for row, member in enumerate(members):
            shard, place = divmod(member, len(self.arrays[0]))
            made[row] = self.arrays[shard][place]
        return torch.from_numpy(made)


def caption_name(shard: int) -> str:
    return f"captions-{shard:05d}.npy"


def open_captions(folder: Path, manifest: dict[str, Any]) -> CaptionShards | None:
    """The captions of a latent set, None where it has none. Raises DataError for damaged ones."""
    if "captions" not in manifest:
        return None
    try:
        encoder = manifest["captions"]
        shape = (int(encoder["tokens"]), int(encoder["width"]))
        arrays = tuple(
            map_npy(folder / caption_name(number), (shard["images"], *shape), manifest["settings"]["dtype"])
            for number, shard in enumerate(manifest["shards"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: the manifest says nothing usable of its captions: {error!r}") from None
    return CaptionShards(arrays, encoder)
