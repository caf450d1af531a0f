"""Pretrained weights by name, with the reference's functions: `find_model` and `download_model`.

The published weights are licensed by Meta under CC-BY-NC-4.0.
"""

import contextlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from torch import Tensor
from tqdm import tqdm

from dit_fast.checkpoint.weight_file import read_weight_file
from dit_fast.errors import CheckpointError, OutputError
from dit_fast.utils.terminal import say

pretrained_models = {"DiT-XL-2-512x512.pt", "DiT-XL-2-256x256.pt"}

_FOLDER = Path("pretrained_models")
_ADDRESS = "https://dl.fbaipublicfiles.com/DiT/models/"
_TIMEOUT_SECONDS = 30
_CHUNK = 1 << 20


def find_model(model_name: str | Path) -> dict[str, Tensor]:
    """Load the weights of a published model or of a local file.

    Args:
        model_name: one of `pretrained_models`, downloaded if missing, or a path. Of a checkpoint of the reference's
            train.py, the EMA weights are loaded.

    Returns:
        state dict, float32 on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or unsafe, or cannot be downloaded.
        OutputError: the download cannot be written.
    """
    if str(model_name) in pretrained_models:
        return download_model(str(model_name))
    if not Path(model_name).is_file():
        known = ", ".join(sorted(pretrained_models))
        raise CheckpointError(f"{model_name}: no such file, and not a published model ({known})")
    return read_weight_file(model_name).state


def download_model(model_name: str) -> dict[str, Tensor]:
    """Load the weights of a published model, downloaded to `pretrained_models/` if missing; as `find_model`."""
    return read_weight_file(fetch_model(model_name)).state


def fetch_model(model_name: str) -> Path:
    """Download a published model if it is missing. An interrupted download leaves no file.

    Args:
        model_name: one of `pretrained_models`.

    Returns:
        its local path.

    Raises:
        CheckpointError: the model is unknown or cannot be downloaded.
        OutputError: it cannot be written.
    """
    if model_name not in pretrained_models:
        known = ", ".join(sorted(pretrained_models))
        raise CheckpointError(f"{model_name}: not a published model; choose {known}")
    path = _FOLDER / model_name
    if path.is_file():
        return path
    part = path.with_name(f".tmp-{os.getpid()}-{model_name}")
    address = _ADDRESS + model_name
    try:
        _FOLDER.mkdir(exist_ok=True)
        with part.open("wb") as file:
            _fetch(address, file)
        part.replace(path)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise CheckpointError(
            f"cannot download {address} ({reason}); download it on a machine with a network connection and put it "
            f"at {path}"
        ) from error
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({error.strerror or error}); free space or change folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path


def _fetch(address: str, file: BinaryIO) -> None:
    with urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS) as response:
        size = int(response.headers.get("Content-Length") or 0)
        terminal = sys.stderr.isatty()
        if not terminal:
            say(f"fetching {address} ({size / 2**20:.1f} MiB)", error=True)
        received = 0
        name = address.rpartition("/")[2]
        with tqdm(total=size or None, desc=name, unit="B", unit_scale=True, disable=not terminal) as bar:
            while chunk := response.read(_CHUNK):
                received += file.write(chunk)
                bar.update(len(chunk))
        if size and received != size:
            raise ConnectionError(f"connection closed after {received} of {size} bytes")
