"""Pretrained weights by name, with the reference's functions: `find_model` and `download_model`.

The published weights are under CC-BY-NC-4.0, Meta's licence for them.
"""

import urllib.error
import urllib.request
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from dit_fast.errors import CheckpointError, OutputError
from dit_fast.interop.weight_file import read_weight_file

pretrained_models = {"DiT-XL-2-512x512.pt", "DiT-XL-2-256x256.pt"}

_FOLDER = Path("pretrained_models")
_ADDRESS = "https://dl.fbaipublicfiles.com/DiT/models/"
_TIMEOUT_SECONDS = 30
_CHUNK = 1 << 20


def find_model(model_name: str | Path) -> dict[str, Tensor]:
    """The state dict of a published model (see `pretrained_models`, fetched when missing) or of a local file.

    Of a dictionary saved by the reference's train.py the EMA weights are taken. Float32 on the CPU. Raises
    CheckpointError for a file that is missing, damaged or unsafe.
    """
    if str(model_name) in pretrained_models:
        return download_model(str(model_name))
    if not Path(model_name).is_file():
        known = ", ".join(sorted(pretrained_models))
        raise CheckpointError(f"{model_name}: no such file, and not a published model ({known})")
    return read_weight_file(model_name).state


def download_model(model_name: str) -> dict[str, Tensor]:
    """The state dict of a published model, fetched into `pretrained_models/` unless it is there."""
    return read_weight_file(fetch_model(model_name)).state


def fetch_model(model_name: str) -> Path:
    """The local path of a published model, after fetching it if it is missing.

    An interrupted download leaves no file behind. Raises CheckpointError when the model is unknown or
    cannot be reached, OutputError when it cannot be written.
    """
    if model_name not in pretrained_models:
        known = ", ".join(sorted(pretrained_models))
        raise CheckpointError(f"{model_name}: not a published model; those are {known}")
    path = _FOLDER / model_name
    if path.is_file():
        return path
    part = path.with_suffix(".part")
    address = _ADDRESS + model_name
    try:
        _FOLDER.mkdir(exist_ok=True)
        with part.open("wb") as file:
            _fetch(address, file)
        part.replace(path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise CheckpointError(
            f"cannot fetch {address} ({reason}); fetch it on a machine with a network connection and put it "
            f"at {path}"
        ) from error
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({error.strerror or error}); free space or change folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _fetch(address: str, file) -> None:
    with urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS) as response:
        size = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, desc=address.rpartition("/")[2], unit="B", unit_scale=True) as bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            if size and bar.n != size:
                raise ConnectionError(f"connection closed after {bar.n} of {size} bytes")
