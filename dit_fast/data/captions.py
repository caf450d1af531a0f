"""Images with captions: where their texts lie, and their embeddings on disk.

A folder of captions has images (at any depth) and for each a text: in a `.txt` of its name beside it, or
in `metadata.jsonl` at the top, lines {"file_name": ..., "text": ...} (the convention of datasets' imagefolder).
Embeddings are (S, E) for each image: S tokens of a text encoder of width E; a token of zeros is padding. They lie in a
file at the folder's top (`EMBEDDED`), for training on the images themselves, or beside latents.
"""

import functools
import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_fast.data.conditions import Captions
from dit_fast.data.image_files import FORMATS, find_images, list_classes, refuse_splits
from dit_fast.data.rows import Rows, open_tensors, raise_unreadable, read_samples
from dit_fast.data.shards import MANIFEST, MANIFEST_CHECK, NAMES, TEXTS, digest_json, open_array, read_json
from dit_fast.encoders.text import TextEncoder
from dit_fast.errors import ConfigError, DataError
from dit_fast.utils.files import (
    MOST_LIST_BYTES,
    open_file,
    parse_json,
    parse_npy,
    read_bytes,
    read_text,
    utf8_name,
)

METADATA = "metadata.jsonl"
EMBEDDINGS = (".safetensors", ".npz")
"""Files of embeddings, an array (S, E) for each image under its name."""
EMBEDDED = ("embeddings.safetensors", "embeddings.npz")
"""At the top of a folder of captions."""
_READ_ERRORS = (
    OSError, ValueError, EOFError, SyntaxError, NotImplementedError, zipfile.BadZipFile, zlib.error, SafetensorError,
    struct.error,
)  # fmt: skip
_ENCODER = {"name": str, "sha256": str, "tokens": int, "width": int}


class CaptionEncoder(Protocol):
    """What makes embeddings: a text encoder (`dit_fast.encoders.text`) or a file of them.

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
    found = find_images(root)
    refuse_splits(found)
    paths = list(found.paths)
    if not paths:
        raise DataError(f"{root} has no image that is read ({FORMATS})")
    found.warn()
    if not reads_texts:
        return paths, []
    names = relative_names(root, paths)
    texts = _texts(root, names)
    if without := [name for name, text in zip(names, texts, strict=True) if text is None]:
        raise DataError(
            f"{root}: {len(without)} of {len(paths)} images have no caption: {', '.join(without[:5])}; put a .txt of "
            f"the same name beside each, or name it in {METADATA}"
        )
    return paths, [text or "" for text in texts]


def array_name(name: str) -> str:
    """What the array of an image is called: as the image, with bytes that are no UTF-8 as escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def relative_names(root: Path, paths: Sequence[Path]) -> tuple[str, ...]:
    """What images are called: their paths from `root` on."""
    return tuple(path.relative_to(root).as_posix() for path in paths)


def _texts(root: Path, names: Sequence[str]) -> list[str | None]:
    """The caption of each image, None of one without."""
    listed = _metadata(root / METADATA)
    texts: list[str | None] = []
    for name in names:
        path = (root / name).with_suffix(".txt")
        if name not in listed and not os.path.lexists(path):
            texts.append(None)
            continue
        text = listed[name] if name in listed else read_text(path, DataError, what="a caption")
        texts.append(text.strip())
    return texts


def _metadata(path: Path) -> dict[str, str]:
    if not os.path.lexists(path):
        return {}
    captions: dict[str, str] = {}
    for number, line in enumerate(read_bytes(path, DataError, MOST_LIST_BYTES).splitlines(), start=1):
        try:
            entry = parse_json(line, "it", DataError) if line.strip() else None
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
    """Embeddings in a file: a .safetensors or .npz with an array (S, E) for each image.

    Arrays are named as the images are, relative to their folder; each may have tokens of its own number. tokens: S that
    shorter ones are padded to; None: their encoder's where the file says what made it, else the
    longest's. Nothing is unpickled. Raises DataError.
    """

    reads_texts = False

    def __init__(self, path: Path, tokens: int | None = None) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._rows: dict[str, Rows] = {}
        said = None
        try:
            with open_file(path, DataError, what="a file of embeddings") as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if path.suffix == ".npz":
                self._archive = zipfile.ZipFile(path)
                self.names = frozenset(
                    name.removesuffix(".npy") for name in self._archive.namelist() if name.endswith(".npy")
                )
            else:
                self._rows = open_tensors(path)
                self.names = frozenset(self._rows)
                with utf8_name(path) as name, safe_open(name, framework="pt") as tensors:
                    metadata = tensors.metadata() or {}
                said = parse_json(metadata.get("encoder", "null"), f"{path}: its metadata", DataError)
            shapes = {name: self._array(name).shape for name in self.names}
        except DataError:
            raise
        except (RecursionError, *_READ_ERRORS) as error:
            raise DataError(f"{path} is no readable file of embeddings: {error}") from None
        widths = {shape[1] for shape in shapes.values()}
        if len(widths) != 1:
            raise DataError(f"{path}: embeddings of one width are needed, found {sorted(widths)}")
        self.width, longest = widths.pop(), max(shape[0] for shape in shapes.values())
        if said is not None and (
            not isinstance(said, dict)
            or {key: type(value) for key, value in said.items()} != _ENCODER
            or said["width"] != self.width
            or said["tokens"] < longest
        ):
            raise DataError(f"{path}: its metadata does not fit what it holds; make it again")
        self._encoder = said
        self.tokens = tokens or (longest if said is None else said["tokens"])
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
            array = self._read(name)
        except _READ_ERRORS as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.path} is no readable file of embeddings: {name}: {reason}") from None
        if array.ndim != 2 or 0 in array.shape or array.dtype.kind != "f":
            raise DataError(
                f"{self.path}: {name} is {array.dtype} {array.shape}, expected floats (tokens, width)"
            )
        if not np.isfinite(array).all():
            raise DataError(f"{self.path}: {name} holds NaN or infinity")
        return array

    def match(self, names: Sequence[str]) -> None:
        """Raise DataError unless there is one embedding for each of the images `names`, and no other."""
        names = [array_name(name) for name in names]
        missing, others = [name for name in names if name not in self.names], self.names.difference(names)
        if missing or others:
            wrong = "no embedding of " + ", ".join(missing[:5]) if missing else f"{min(others)} of no image"
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
        made = torch.zeros(len(names), self.tokens, self.width)
        for row, name in enumerate(names):
            array = torch.from_numpy(self._array(name)).float()
            made[row, : len(array)] = array
        return made

    def identity(self) -> dict[str, Any]:
        """Of the encoder that the file says made it, else of the file."""
        known = self._encoder or {"name": self.path.name, "sha256": self.sha256, "width": self.width}
        return {**known, "tokens": self.tokens}


@dataclass(frozen=True)
class FileCaptions:
    """The embeddings `file` of the images `names`, relative to the folder `root`, as `conditions.Captions`."""

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
            name if text is None else text
            for name, text in zip(self.names, _texts(self.root, self.names), strict=True)
        ]

    def read(self, members: Sequence[int]) -> Tensor:
        made: list[Tensor] = []
        reasons: dict[int, str] = {}
        for member in members:
            try:
                made.append(self.file([self.names[member]], []))
            except DataError as error:
                reasons[member] = str(error)
        raise_unreadable(reasons)
        return torch.cat(made)


def find_captions(root: Path) -> FileCaptions | None:
    """The captions of a folder with a file of embeddings at its top, None of any other.

    Raises DataError where they are not of the images, and what `EmbeddingFile` and `list_captioned` raise.
    """
    files = [root / name for name in EMBEDDED if (root / name).is_file()]
    if not files:
        return None
    if len(files) > 1:
        raise DataError(f"{root} has {' and '.join(EMBEDDED)}: leave the one to train with")
    names, file = relative_names(root, list_captioned(root, False)[0]), EmbeddingFile(files[0])
    file.match(names)
    return FileCaptions(root, names, file)


@dataclass(frozen=True)
class CaptionShards:
    """The embeddings of a latent set: `shards` (M, S, E), all but the last equally long; words: the file of their
    texts, or of the images' names. As `dit_fast.data.conditions.Captions`.
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
        texts = parse_json(read_bytes(self.words, DataError, MOST_LIST_BYTES), str(self.words), DataError)
        if not isinstance(texts, list) or len(texts) != sum(map(len, self.shards)):
            raise DataError(f"{self.words} does not have one line for each caption; encode the set again")
        return [str(text) for text in texts]

    def read(self, members: Sequence[int]) -> Tensor:
        length, width = len(self.shards[0]), self.shards[0].width
        places = (
            (shard.file, shard.start + member % length * width)
            for member in members
            for shard in (self.shards[member // length],)
        )
        return read_samples(places, members, self.shape, self.shards[0].dtype)


def caption_name(shard: int) -> str:
    return f"captions-{shard:05d}.npy"


def open_captions(folder: Path, manifest: dict[str, Any]) -> Captions | None:
    """The captions of a latent set, None where it has none. Raises DataError for damaged ones."""
    if "captions" not in manifest:
        return None
    try:
        encoder = manifest["captions"]
        shape = (int(encoder["tokens"]), int(encoder["width"]))
        shards = tuple(
            open_array(
                folder / caption_name(number), (shard["images"], *shape), manifest["settings"]["dtype"]
            )
            for number, shard in enumerate(manifest["shards"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: the manifest says nothing usable of its captions: {error!r}") from None
    return CaptionShards(shards, encoder, folder / (TEXTS if "texts" in manifest else NAMES))


def captions_of(source: str | Path) -> Captions | None:
    """The captions of a latent set or a folder, None of one without. Raises DataError."""
    folder = Path(source)
    if (folder / MANIFEST).is_file():
        return open_captions(folder, read_json(folder / MANIFEST, MANIFEST_CHECK))
    return find_captions(folder)


@dataclass(frozen=True)
class Listing:
    """The images of the set in their order, `names` relative to the folder."""

    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    sizes: tuple[int, ...]
    texts: tuple[str, ...]
    shard_size: int

    def shards(self) -> int:
        return -(-len(self.paths) // self.shard_size)

    def rows(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.paths)))

    def digest(self, rows: range) -> str:
        """SHA-256 of the names, file sizes, labels and captions of these images."""
        part = slice(rows.start, rows.stop)
        texts = [self.texts[part]] if self.texts else []
        return digest_json([self.names[part], self.sizes[part], self.labels[part], *texts])

    def embeddings(
        self, captions: CaptionEncoder, rows: range, batch_size: int, dtype: str
    ) -> Iterator[Tensor]:
        """Of the captions of these images, up to `batch_size` at a time, in `dtype`. Raises DataError for overflow."""
        for start in range(rows.start, rows.stop, batch_size):
            part = slice(start, min(start + batch_size, rows.stop))
            stored = captions(self.names[part], self.texts[part]).to(getattr(torch, dtype))
            if not stored.isfinite().all():
                bad = (~stored.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
                raise DataError(
                    f"{self.paths[start + bad[0]]}: its caption's embedding is not finite in {dtype} ({len(bad)} in "
                    f"this batch); give --dtype float32"
                )
            yield stored


def open_encoder(name: str | None, tokens: int | None, device: str) -> CaptionEncoder | None:
    """A text encoder by name or folder, or a file of embeddings; None where `name` is. `tokens`: of a caption.

    Raises ConfigError, DataError and what `TextEncoder` raises.
    """
    if name is None:
        if tokens is not None:
            raise ConfigError(
                f"--caption-tokens {tokens} is of captions: give --text-encoder, or leave it out"
            )
        return None
    if Path(name).suffix in EMBEDDINGS:
        return EmbeddingFile(Path(name), tokens)
    return TextEncoder(name, tokens, device)


def list_images(
    root: Path, shard_size: int, captions: CaptionEncoder | None, labelled: bool = True
) -> Listing:
    """The images below `root`; of classes, or not `labelled`, or those that have `captions`."""
    texts: list[str] = []
    if captions is None:
        class_names, paths, labels = list_classes(root, labelled)
    else:
        paths, texts = list_captioned(root, captions.reads_texts)
        class_names, labels = ["captions"], [0] * len(paths)
    names = relative_names(root, paths)
    if isinstance(captions, EmbeddingFile):
        captions.match(names)
    sizes = tuple(path.stat().st_size for path in paths)
    return Listing(tuple(class_names), tuple(paths), names, tuple(labels), sizes, tuple(texts), shard_size)
