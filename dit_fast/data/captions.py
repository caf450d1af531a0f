"""Captions of images: their texts, and their embeddings on disk.

A folder with captions holds images, at any depth, and a text for each: in a `.txt` file of the same name beside it, or
in `metadata.jsonl` at the top, with lines {"file_name": ..., "text": ...} (the convention of the datasets library's
imagefolder). The embedding of a caption is (S, E): S tokens of a text encoder of width E, where a token of zeros is
padding. Embeddings are stored in a file at the top of the folder (`EMBEDDED`), to train on the images themselves, or in
the shards of a latent set.
"""

import functools
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_fast.data.base import Captions
from dit_fast.data.image_files import FORMATS, check_splits, find_images
from dit_fast.data.rows import Rows, open_tensors, read_samples
from dit_fast.data.shards import (
    MANIFEST,
    MANIFEST_CHECK,
    NAMES,
    TEXTS,
    caption_name,
    open_array,
    read_sealed,
)
from dit_fast.data.unreadable import raise_unreadable
from dit_fast.encoders.text import TextEncoder
from dit_fast.errors import ConfigError, DataError
from dit_fast.utils.files import (
    MOST_LIST_BYTES,
    file_facts,
    parse_json,
    parse_npy,
    read_bytes,
    read_json,
    read_text,
    utf8_name,
)
from dit_fast.utils.schema import anything, array, fields, integer, maybe, require, text

METADATA = "metadata.jsonl"
EMBEDDINGS = (".safetensors", ".npz")
"""Suffixes of files of embeddings: an array (S, E) per image under the image's name."""
EMBEDDED = ("embeddings.safetensors", "embeddings.npz")
"""File of embeddings at the top of a folder with captions."""
# Exceptions of zipfile, NumPy and safetensors for damaged files.
_READ_ERRORS = (
    OSError, ValueError, EOFError, SyntaxError, NotImplementedError, zipfile.BadZipFile, zlib.error, SafetensorError,
    struct.error,
)  # fmt: skip
_CAPTION = fields({"file_name": text(), "text": text()})
_ENCODER = fields({"name": text(), "sha256": text(), "tokens": integer(1), "width": integer(1)})


class CaptionEncoder(Protocol):
    """Source of caption embeddings: a text encoder (`dit_fast.encoders.text`) or a file of embeddings.

    Attributes:
        tokens: S, tokens per caption.
        width: E, width of a token.
        sha256: digest of everything that determines the embeddings.
        reads_texts: whether it needs the texts of the captions.
    """

    tokens: int
    width: int
    sha256: str
    reads_texts: bool

    def __call__(self, names: Sequence[str], texts: Sequence[str]) -> Tensor:
        """Embeddings float32 (B, S, E), padded with zeros, of the images `names` with the captions `texts`."""
        ...

    def identity(self) -> dict[str, Any]:
        """JSON-ready facts: name, sha256, tokens, width."""
        ...


def open_encoder(name: str | None, tokens: int | None, device: str) -> CaptionEncoder | None:
    """Open a text encoder or a file of embeddings.

    Args:
        name: hub name or folder of a text encoder, or a file of `EMBEDDINGS`; None for no captions.
        tokens: tokens per caption; None: the encoder's own number.
        device: device of the text encoder.

    Raises:
        ConfigError: `tokens` without an encoder, or fewer than a file's captions have.
        DataError: the file of embeddings is missing or damaged.
        CheckpointError: the text encoder cannot be loaded.
    """
    if name is None:
        if tokens is not None:
            raise ConfigError(
                f"--caption-tokens {tokens} applies only to captions: give --text-encoder, or remove it"
            )
        return None
    if Path(name).suffix in EMBEDDINGS:
        return EmbeddingFile(Path(name), tokens)
    return TextEncoder(name, tokens, device)


# Texts and names of a folder's images.


def list_captioned(root: Path, reads_texts: bool) -> tuple[list[Path], list[str]]:
    """List the images of a folder with captions.

    Args:
        root: the folder.
        reads_texts: whether to read the captions, which every image must then have.

    Returns:
        image files, and the caption of each; no captions unless `reads_texts`.

    Raises:
        DataError: the folder has no images, an image has no caption, or a caption is malformed.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give one of images with captions")
    found = find_images(root)
    check_splits(found)
    paths = list(found.paths)
    if not paths:
        raise DataError(f"{root} has no readable image ({FORMATS})")
    found.warn()
    if not reads_texts:
        return paths, []
    names = relative_names(root, paths)
    texts = _read_texts(root, names)
    if without := [name for name, caption in zip(names, texts, strict=True) if caption is None]:
        raise DataError(
            f"{root}: {len(without)} of {len(paths)} images have no caption: {', '.join(without[:5])}; put a .txt file "
            f"of the same name beside each, or list it in {METADATA}"
        )
    return paths, [caption or "" for caption in texts]


def relative_names(root: Path, paths: Sequence[Path]) -> tuple[str, ...]:
    """Names of images: their paths relative to `root`, with forward slashes."""
    return tuple(path.relative_to(root).as_posix() for path in paths)


def array_name(name: str) -> str:
    """Name of the array of an image: the image's name, with bytes that are not UTF-8 as escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _read_texts(root: Path, names: Sequence[str]) -> list[str | None]:
    """The caption of each image; None for an image without one. `metadata.jsonl` precedes `.txt` files."""
    listed = _read_metadata(root / METADATA)
    texts: list[str | None] = []
    for name in names:
        path = (root / name).with_suffix(".txt")
        if name not in listed and not os.path.lexists(path):
            texts.append(None)
            continue
        caption = listed[name] if name in listed else read_text(path, DataError, what="a caption")
        texts.append(caption.strip())
    return texts


def _read_metadata(path: Path) -> dict[str, str]:
    if not os.path.lexists(path):
        return {}
    captions: dict[str, str] = {}
    for number, line in enumerate(read_bytes(path, DataError, MOST_LIST_BYTES).splitlines(), start=1):
        if line.strip():
            source = f'{path}, line {number}: expected {{"file_name": ..., "text": ...}}'
            entry = parse_json(line, source, DataError)
            require(entry, _CAPTION, source, DataError)
            captions[entry["file_name"]] = entry["text"]
    return captions


# Embeddings in one file, and beside images.


class EmbeddingFile:
    """Embeddings in a .safetensors or .npz file, an array (S, E) per image, as a `CaptionEncoder`.

    Arrays are named as the images are, relative to their folder, and may have different numbers of tokens. Nothing is
    unpickled.

    Args:
        path: the file.
        tokens: S, to which shorter captions are padded; None: the encoder's number where the file states its encoder,
            else that of the longest caption.

    Raises:
        DataError: the file is missing, damaged, or its arrays are not finite embeddings of one width.
        ConfigError: a caption has more than `tokens` tokens.
    """

    reads_texts = False

    def __init__(self, path: Path, tokens: int | None = None) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._rows: dict[str, Rows] = {}
        encoder: Any = None
        try:
            self.sha256 = file_facts(path, DataError, "a file of embeddings")["sha256"]
            if path.suffix == ".npz":
                # Kept open, so that a file that is replaced during a run is read as it was.
                self._archive = zipfile.ZipFile(path)
                self.names = frozenset(
                    name.removesuffix(".npy") for name in self._archive.namelist() if name.endswith(".npy")
                )
            else:
                self._rows = open_tensors(path)
                self.names = frozenset(self._rows)
                with utf8_name(path) as name, safe_open(name, framework="pt") as tensors:
                    metadata = tensors.metadata() or {}
                encoder = parse_json(metadata.get("encoder", "null"), f"{path}: its metadata", DataError)
            shapes = {name: self._array(name).shape for name in self.names}
        except DataError:
            raise
        except (RecursionError, *_READ_ERRORS) as error:
            raise DataError(f"{path} is not a readable file of embeddings: {error}") from None
        widths = {shape[1] for shape in shapes.values()}
        if len(widths) != 1:
            raise DataError(f"{path}: embeddings of one width are required, found {sorted(widths)}")
        self.width, longest = widths.pop(), max(shape[0] for shape in shapes.values())
        require(encoder, maybe(_ENCODER), f"{path}: its metadata", DataError)
        if encoder is not None and (encoder["width"] != self.width or encoder["tokens"] < longest):
            raise DataError(
                f"{path}: its metadata states {encoder['tokens']} tokens of width {encoder['width']}, its embeddings "
                f"have up to {longest} of width {self.width}; encode the captions again"
            )
        self._encoder = encoder
        self.tokens = tokens or (longest if encoder is None else encoder["tokens"])
        if longest > self.tokens:
            raise ConfigError(
                f"--caption-tokens {tokens}: {path} has captions of {longest} tokens; give that many"
            )

    def _read(self, name: str) -> np.ndarray:
        if self._archive is None:
            rows = self._rows[name]
            return rows.file.read(rows.start, rows.shape, rows.dtype).float().numpy()
        member = self._archive.getinfo(f"{name}.npy")
        if member.file_size > MOST_LIST_BYTES:
            raise ValueError(f"refused: an array of {member.file_size} bytes")
        return parse_npy(bytearray(self._archive.read(member)), f"{self.path}: {name}", DataError)

    def _array(self, name: str) -> np.ndarray:
        try:
            values = self._read(name)
        except _READ_ERRORS as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.path} is not a readable file of embeddings: {name}: {reason}") from None
        if values.ndim != 2 or 0 in values.shape or values.dtype.kind != "f":
            raise DataError(
                f"{self.path}: {name} is {values.dtype} {values.shape}, expected floats (tokens, width)"
            )
        if not np.isfinite(values).all():
            raise DataError(f"{self.path}: {name} contains NaN or infinity")
        return values

    def match(self, names: Sequence[str]) -> None:
        """Raise DataError unless the file has exactly one embedding for each of the images `names`."""
        # Both directions: the embeddings of renamed images have no image.
        names = [array_name(name) for name in names]
        missing, others = [name for name in names if name not in self.names], self.names.difference(names)
        if missing or others:
            wrong = (
                f"no embedding of {', '.join(missing[:5])}"
                if missing
                else f"an embedding {min(others)} without an image"
            )
            raise DataError(
                f"{self.path} has {wrong} ({len(self.names)} embeddings, {len(names)} images): name arrays as the "
                "images"
            )

    def __call__(self, names: Sequence[str], texts: Sequence[str]) -> Tensor:
        names = [array_name(name) for name in names]
        if missing := [name for name in names if name not in self.names]:
            raise DataError(
                f"{self.path} has no embedding of {', '.join(missing[:5])}: name arrays as the images"
            )
        embeddings = torch.zeros(len(names), self.tokens, self.width)
        for row, name in enumerate(names):
            values = torch.from_numpy(self._array(name)).float()
            embeddings[row, : len(values)] = values
        return embeddings

    def identity(self) -> dict[str, Any]:
        """Identity of the encoder that the file states, else of the file itself."""
        known = self._encoder or {"name": self.path.name, "sha256": self.sha256, "width": self.width}
        return {**known, "tokens": self.tokens}


@dataclass(frozen=True)
class FileCaptions:
    """Captions of a folder of images: the embeddings `file` of the images `names`, relative to `root`."""

    root: Path
    names: tuple[str, ...]
    file: EmbeddingFile

    @property
    def shape(self) -> tuple[int, int]:
        return self.file.tokens, self.file.width

    @property
    def encoder(self) -> dict[str, Any]:
        return self.file.identity()

    @functools.cached_property
    def texts(self) -> Sequence[str]:
        return [
            name if caption is None else caption
            for name, caption in zip(self.names, _read_texts(self.root, self.names), strict=True)
        ]

    def read(self, members: Sequence[int]) -> Tensor:
        embeddings: list[Tensor] = []
        reasons: dict[int, str] = {}
        for member in members:
            try:
                embeddings.append(self.file([self.names[member]], []))
            except DataError as error:
                reasons[member] = str(error)
        raise_unreadable(reasons)
        return torch.cat(embeddings)


def find_captions(root: Path) -> FileCaptions | None:
    """The captions of a folder with a file of embeddings at its top; None for any other folder.

    Raises:
        DataError: there are two such files, or the embeddings are damaged or not those of the images.
    """
    files = [root / name for name in EMBEDDED if (root / name).is_file()]
    if not files:
        return None
    if len(files) > 1:
        raise DataError(f"{root} has {' and '.join(EMBEDDED)}: keep the one to train with")
    names, file = relative_names(root, list_captioned(root, False)[0]), EmbeddingFile(files[0])
    file.match(names)
    return FileCaptions(root, names, file)


# Embeddings in the shards of a latent set.


@dataclass(frozen=True)
class CaptionShards:
    """Captions of a latent set.

    Args:
        shards: embeddings (M, S, E), of equal length M except the last.
        encoder: identity of the text encoder.
        words: file of the texts, or of the images' names where the texts are unknown.
    """

    shards: tuple[Rows, ...]
    encoder: dict[str, Any]
    words: Path

    @property
    def shape(self) -> tuple[int, int]:
        _, tokens, width = self.shards[0].shape
        return tokens, width

    @functools.cached_property
    def texts(self) -> Sequence[str]:
        texts = read_json(self.words, DataError, MOST_LIST_BYTES)
        require(texts, array(anything, sum(map(len, self.shards))), self.words, DataError)
        return [str(caption) for caption in texts]

    def read(self, members: Sequence[int]) -> Tensor:
        length, width = len(self.shards[0]), self.shards[0].width
        places = (
            (shard.file, shard.start + member % length * width)
            for member in members
            for shard in (self.shards[member // length],)
        )
        return read_samples(places, members, self.shape, self.shards[0].dtype)


def open_captions(folder: Path, manifest: dict[str, Any]) -> Captions | None:
    """Open the captions of a latent set.

    Args:
        folder: folder of the set.
        manifest: its manifest, which `MANIFEST_CHECK` accepted.

    Returns:
        the captions; None in a set of classes.

    Raises:
        DataError: a file is missing or damaged.
    """
    if "captions" not in manifest:
        return None
    encoder, dtype = manifest["captions"], manifest["settings"]["dtype"]
    shards = tuple(
        open_array(
            folder / caption_name(number), (shard["images"], encoder["tokens"], encoder["width"]), dtype
        )
        for number, shard in enumerate(manifest["shards"])
    )
    return CaptionShards(shards, encoder, folder / (TEXTS if "texts" in manifest else NAMES))


def captions_of(source: str | Path) -> Captions | None:
    """The captions of a latent set or a folder; None if it has none. Raises DataError for damaged ones."""
    folder = Path(source)
    if (folder / MANIFEST).is_file():
        return open_captions(folder, read_sealed(folder / MANIFEST, MANIFEST_CHECK))
    return find_captions(folder)
