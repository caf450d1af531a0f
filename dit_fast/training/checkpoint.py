"""Checkpoints that either exist whole or not at all.

A checkpoint is a folder `step-0001000` with

    config.json, model.safetensors   what `DiT.save_pretrained` writes
    ema.safetensors                  the averaged weights, same tensors
    optimizer.safetensors            AdamW's moments: `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`
    manifest.json                    the step, the run's configuration, size and SHA-256 of every other file

It is written to a temporary sibling, synced to disk and renamed, so that a kill at any moment leaves the
older checkpoints as they were. A step counts only if its manifest verifies; nothing in it is unpickled.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_fast.errors import CheckpointError, OutputError
from dit_fast.models import DiT

FORMAT = "dit_fast checkpoint 1"
MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d+)")
_TEMPORARY = ".tmp-"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` returns: the manifest, two state dicts and the optimiser's moments by name."""

    path: Path
    manifest: dict[str, Any]
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def checkpoints_folder(run: str | Path) -> Path:
    return Path(run) / "checkpoints"


def step_folders(run: str | Path) -> list[Path]:
    """The run's step folders, oldest first, verified or not; leftovers of killed saves are not among them."""
    folder = checkpoints_folder(run)
    if not folder.is_dir():
        return []
    steps = [(match, path) for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for match, path in sorted(steps, key=lambda step: int(step[0][1])) if path.is_dir()]


def save_checkpoint(
    run: str | Path,
    model: DiT,
    ema: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    manifest: dict[str, Any],
    keep: int = 0,
) -> Path:
    """Write `RUN/checkpoints/step-N`, N = manifest["step"], then remove all but the newest `keep` (0: none).

    Raises OutputError when the disk is too full or does not take the files; the older checkpoints are then
    untouched and nothing partial stays behind.
    """
    folder = checkpoints_folder(run)
    final = folder / f"step-{manifest['step']:07d}"
    temporary = folder / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_space(folder, checkpoint_bytes(model.state_dict(), ema, optimizer))
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        save_file(_on_cpu(ema), temporary / "ema.safetensors", metadata={"format": "pt"})
        save_file(_on_cpu(optimizer), temporary / "optimizer.safetensors", metadata={"format": "pt"})
        files = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        write_manifest(temporary, {"format": FORMAT, **manifest, "files": files})
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        # A folder of this step can only be one that did not verify, or that equals the new one.
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"checkpoint {final} could not be written: {error}") from error
    for old in step_folders(run)[:-keep] if keep else []:
        try:
            shutil.rmtree(old)
        except OSError as error:
            logger.warning("old checkpoint %s could not be removed: %s", old, error)
    return final


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
        elif _digest(file) != expected:
            problems.append(f"{name} does not match its SHA-256")
    if problems:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)}")


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Verify and read one checkpoint folder, tensors on the CPU. Raises CheckpointError."""
    path = Path(path)
    manifest = read_manifest(path)
    verify_files(path, manifest)
    model, ema, optimizer = (
        load_file(path / f"{name}.safetensors") for name in ("model", "ema", "optimizer")
    )
    return Checkpoint(path, manifest, model, ema, optimizer)


def latest_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint of a run folder that verifies; a damaged newer one is passed over with a warning.

    Raises CheckpointError when there is none.
    """
    folders = step_folders(run)
    if not folders:
        raise CheckpointError(f"{run} holds no checkpoint (looked for {checkpoints_folder(run)}/step-N)")
    refused = []
    for folder in reversed(folders):
        try:
            verify_files(folder, read_manifest(folder))
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            logger.warning("%s; using %s instead", reason, folder.name)
        return folder
    raise CheckpointError(
        f"none of the {len(folders)} checkpoints of {run} can be used: {'; '.join(refused)}"
    )


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder from what a user names: the folder itself, or a run (its newest that verifies)."""
    path = Path(path)
    if (path / MANIFEST).exists() or _STEP_FOLDER.fullmatch(path.name):
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run or checkpoint folder")
    return latest_checkpoint(path)


def remove_leftovers(run: str | Path) -> None:
    """Delete what killed saves left behind."""
    for path in checkpoints_folder(run).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def checkpoint_bytes(*states: dict[str, Tensor]) -> int:
    """Bytes on disk of these state dicts, headers and JSON included (rounded up)."""
    return sum(t.numel() * t.element_size() for state in states for t in state.values()) + (1 << 20)


def require_space(folder: Path, needed: int) -> None:
    """Raise OutputError when the disk of `folder` has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"no space for a checkpoint in {folder}: it needs {needed / 2**20:.1f} MiB, "
            f"{free / 2**20:.1f} MiB are free; free some or choose another --out"
        )


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
