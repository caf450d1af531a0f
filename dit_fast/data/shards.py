"""The files of a latent set on disk.

    encoding.json      with what the set was begun: autoencoder, sizes, type; a continuation must agree
    shard-00000.npy    posteriors of images 0 to M - 1, (M, flips, 2, C, H, W): plain or mirrored image, mean
                       or log-variance
    shard-00000.json   the shard's record: which images it is of, size and SHA-256
    labels.npy         int64 (N,)
    names.json         the file of each image, relative to its folder
    captions-00000.npy, texts.json   of a set of captions: embeddings (M, S, E), and the words where they are known
    manifest.json      written last: class names, shapes, scaling, size and SHA-256 of every file

Plain .npy, because there is nothing to parse beyond a short header, several processes share the page cache, and
reading one runs no code. One sample's moments lie together, so a sample is one contiguous read, straight into the
batch (`dit_fast.data.rows`).

Every file is written under a temporary name, synced and renamed: it is whole or not there.
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
from dit_fast.utils.files import TEMPORARY, open_file, read_object, write_atomically
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
        "listing_sha256": text(),
    },
)
SETTINGS_CHECK = fields({"vae": fields({"name": text()}), "settings": fields({"vae_sha256": text()})})
RECORD_CHECK = fields({"settings": fields({}), "images": anything, "file": _FILE}, {"captions": _FILE})


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.npy"


def record_name(index: int) -> str:
    return f"shard-{index:05d}.json"


class HashingFile:
    """What is written to a file, with the size and SHA-256 of it so far."""

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
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def publish(path: Path, write: Callable[[HashingFile], object]) -> dict[str, Any]:
    """Have `write` fill the file `path` by `write_atomically`; its bytes and SHA-256.

    Raises OutputError when the disk does not take it. Nothing partial stays behind an exception.
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
    """Delete what killed writers of the files `names` left in `folder` and nobody touched for `seconds`."""
    wanted, latest = set(names), time.time() - seconds
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.name.removeprefix(TEMPORARY).partition("-")[2] in wanted:
            with contextlib.suppress(OSError):
                if path.stat().st_mtime <= latest:
                    path.unlink()


def write_npy_header(file: HashingFile | BinaryIO, shape: Sequence[int], dtype: str) -> None:
    """The header of a C-ordered .npy file; the array's bytes follow it."""
    description = {
        "descr": np.dtype(dtype).newbyteorder("<").str,
        "fortran_order": False,
        "shape": tuple(shape),
    }
    np.lib.format.write_array_header_1_0(file, description)


def npy_bytes(shape: Sequence[int], dtype: str) -> int:
    """Size of the .npy file that `write_npy_header` and the array's bytes make."""
    header = io.BytesIO()
    write_npy_header(header, shape, dtype)
    return header.tell() + math.prod(shape) * np.dtype(dtype).itemsize


def open_array(path: Path, shape: Sequence[int], dtype: str) -> Rows:
    """The array of `path`, not read. Raises DataError when its size, shape or type is not the one expected."""
    return open_npy(path, shape, dtype, npy_bytes(shape, dtype))


def digest_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open_file(path, DataError) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": sha256}


def digest_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with the SHA-256 of itself in it."""
    text = json.dumps({**content, "own_sha256": digest_json(content)}, indent=1) + "\n"
    publish(path, lambda file: file.write(text.encode()))


def read_json(path: Path, check: Check = anything) -> dict[str, Any]:
    """The content that `write_json` wrote. Raises FileNotFoundError, and DataError if it was changed or not as `check`
    expects.
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
