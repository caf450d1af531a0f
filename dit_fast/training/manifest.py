"""What a checkpoint says of itself: manifest.json, with the SHA-256 of every other file and of its own content."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_fast.errors import CheckpointError

FORMAT = "dit_fast checkpoint 1"
MANIFEST = "manifest.json"
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with the digest of its own content in it."""
    sealed = {**manifest, "manifest_sha256": _seal(manifest)}
    (folder / MANIFEST).write_text(json.dumps(sealed, indent=2) + "\n")


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of the checkpoint folder `path`, checked against its own digest.

    Keys: step, samples_seen, seed, train_config, data (name, image_size, channels, num_classes, fingerprint,
    ...), class_names, diffusion (arguments of `create_diffusion`), ema_decay, files. Raises CheckpointError.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint of dit-fast train: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(manifest, dict) or not str(manifest.get("format", "")).startswith(
        "dit_fast checkpoint"
    ):
        raise CheckpointError(f"{file} is not the manifest of a dit-fast checkpoint")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {manifest['format']!r}; this version reads {FORMAT!r}")
    if manifest.pop("manifest_sha256", None) != _seal(manifest):
        raise CheckpointError(f"{file} is damaged: its content does not match its own SHA-256")
    if foreign := [name for name in manifest["files"] if not _PLAIN_NAME.fullmatch(name)]:
        raise CheckpointError(f"{file} names files outside its folder: {', '.join(map(repr, foreign))}")
    return manifest


def verify_files(path: str | Path, manifest: dict[str, Any], names: Sequence[str] | None = None) -> None:
    """Compare files with the manifest (all of them, or `names`); CheckpointError lists every difference."""
    problems = []
    for name in manifest["files"] if names is None else names:
        expected = manifest["files"][name]
        file = Path(path) / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}")
        elif digest(file) != expected:
            problems.append(f"{name} does not match its SHA-256")
    if names is None:
        present = (file.name for file in Path(path).glob("*.safetensors"))
        problems += [f"{name} is none of its files" for name in sorted(set(present) - set(manifest["files"]))]
    if problems:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)}")


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest holds them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
