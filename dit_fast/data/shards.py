"""The files of a latent set on disk.

    encoding.json      the settings with which encoding began: autoencoder, sizes, dtype; a resumed command must match
    shard-00000.npy    posteriors of images 0 to M - 1, (M, flips, 2, C, H, W): plain or mirrored image, mean or
                       log-variance
    shard-00000.json   record of the shard: digest of its images, size and SHA-256
    labels.npy         int64 (N,)
    names.json         file name of each image, relative to its folder
    captions-00000.npy, texts.json   in a set with captions: embeddings (M, S, E), and the texts where they are known
    manifest.json      written last: class names, shapes, scaling, size and SHA-256 of every file

The arrays are plain .npy files: there is only a short header to parse, and reading one executes no code. The moments of
one sample are contiguous, so that a sample is one read, directly into the batch (`dit_fast.data.rows`). Each JSON file
contains the SHA-256 of its own content. Every file is written under a temporary name, synced and renamed.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from dit_fast.data.rows import Rows, open_npy
from dit_fast.errors import DataError
from dit_fast.utils.files import TEMPORARY, digest_json, read_object, write_atomically
from dit_fast.utils.schema import (
    Check,
    anything,
    array,
    fields,
    integer,
    maybe,
    number,
    one_of,
    require,
    table,
    text,
)

FORMAT = "dit_fast latents 1"
MANIFEST = "manifest.json"
SETTINGS = "encoding.json"
LABELS = "labels.npy"
NAMES = "names.json"
TEXTS = "texts.json"
StoredDtype = Literal["float16", "float32"]
DTYPES = get_args(StoredDtype)
_SHA = {"sha256": text(r"[0-9a-f]{64}")}
_FILE = fields({**_SHA, "bytes": integer()})
MANIFEST_CHECK = fields(
    {
        "images": integer(),
        "class_names": array(text()),
        "sample_shape": array(integer(1, 1 << 16), 5),
        "settings": fields({"image_size": integer(1, 1 << 16), "dtype": one_of(*DTYPES)}),
        "vae": fields(
            {name: maybe(text()) for name in ("name", "source", "sha256")}
            | {name: array(number(-1e9, 1e9)) for name in ("shift", "scale")}
        ),
        "shards": array(fields({"file": text(), "images": integer(), **_SHA}, {"captions": _FILE})),
        "labels": _FILE,
        "names": _FILE,
    },
    {
        "texts": _FILE,
        "captions": fields({"tokens": integer(1, 1 << 16), "width": integer(1, 1 << 24)}),
        "unreadable": array(integer()),
        "listing_sha256": text(),
    },
)
SETTINGS_CHECK = fields({"vae": fields({"name": text()}), "settings": fields({"vae_sha256": text()})})
RECORD_CHECK = fields(
    {"settings": fields({}), "images": anything, "file": _FILE},
    {"captions": _FILE, "unreadable": table(text(), r"\d+")},
)


def shard_name(index: int) -> str:
    """File name of the posteriors of a shard."""
    return f"shard-{index:05d}.npy"


def record_name(index: int) -> str:
    """File name of the record of a shard."""
    return f"shard-{index:05d}.json"


def caption_name(index: int) -> str:
    """File name of the caption embeddings of a shard."""
    return f"captions-{index:05d}.npy"


class HashingFile:
    """A file opened for writing, with the size and SHA-256 of what has been written."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        written = self._file.write(data)
        self._bytes += written
        return written

    def facts(self) -> dict[str, Any]:
        """Size and SHA-256 of the content, as manifests store them."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def publish(path: Path, write: Callable[[HashingFile], object]) -> dict[str, Any]:
    """Write the file `path` atomically.

    Args:
        path: the file.
        write: writes the content.

    Returns:
        size and SHA-256, as `HashingFile.facts`.

    Raises:
        OutputError: the file cannot be written; no partial file remains.
    """
    facts: dict[str, Any] = {}

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            hashing = HashingFile(file)
            write(hashing)
        facts.update(hashing.facts())

    write_atomically(path, fill)
    return facts


def remove_leftovers(folder: Path, names: Sequence[str], seconds: float = 0.0) -> None:
    """Delete temporary files that killed writers of `names` left in `folder`, if older than `seconds`."""
    wanted, latest = set(names), time.time() - seconds
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.name.removeprefix(TEMPORARY).partition("-")[2] in wanted:
            with contextlib.suppress(OSError):
                if path.stat().st_mtime <= latest:
                    path.unlink()


def write_npy_header(file: HashingFile | BinaryIO, shape: Sequence[int], dtype: str) -> None:
    """Write the header of a C-ordered .npy file; the array's bytes follow it."""
    description = {
        "descr": np.dtype(dtype).newbyteorder("<").str,
        "fortran_order": False,
        "shape": tuple(shape),
    }
    # Version 1.0, which every reader supports; NumPy pads the header so that the values are aligned to 64 bytes.
    np.lib.format.write_array_header_1_0(file, description)


def npy_bytes(shape: Sequence[int], dtype: str) -> int:
    """Size in bytes of the .npy file with an array of this shape and dtype."""
    header = io.BytesIO()
    write_npy_header(header, shape, dtype)
    return header.tell() + math.prod(shape) * np.dtype(dtype).itemsize


def open_array(path: Path, shape: Sequence[int], dtype: str) -> Rows:
    """Open the array of `path` without reading it. Raises DataError if its size, shape or dtype differs."""
    return open_npy(path, shape, dtype, npy_bytes(shape, dtype))


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object together with the SHA-256 of its content."""
    text = json.dumps({**content, "own_sha256": digest_json(content)}, indent=1) + "\n"
    publish(path, lambda file: file.write(text.encode()))


def read_sealed(path: Path, check: Check = anything) -> dict[str, Any]:
    """Read a JSON object that `write_sealed` wrote.

    Args:
        path: the file.
        check: schema of the object.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the content was changed or does not match the schema.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(path)
    content = read_object(path, DataError)
    if content.pop("own_sha256", None) != digest_json(content):
        raise DataError(
            f"{path} was changed or damaged: its content does not match its own SHA-256; encode the set again"
        )
    if content.get("format") != FORMAT:
        raise DataError(f"{path} has format {content.get('format')!r}; this version reads {FORMAT!r}")
    require(content, check, f"{path} is not as dit-fast encode writes it", DataError)
    return content
