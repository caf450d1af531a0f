"""Checkpoint folders of a run: written atomically, verified when read, and removed by a retention rule.

A checkpoint is a folder `step-0001000` with

    config.json           configuration of the model, as written by `DiT.save_pretrained`
    model.safetensors     weights
    ema.safetensors       averaged weights, same tensors
    optimizer.safetensors moments of AdamW: `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`
    manifest.json         step, configuration of the run, size and SHA-256 of every other file

Several ranks write one file each: `ema-00001-of-00004.safetensors` (`dit_fast.checkpoint.tensors`). The folder is
written under a temporary name, flushed to disk and renamed, so that a kill at any moment leaves the older checkpoints
unchanged. A step is valid only if its manifest verifies; nothing in it is unpickled.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from dit_fast import __version__
from dit_fast.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    read_manifest,
    verify_files,
    write_manifest,
)
from dit_fast.checkpoint.tensors import (
    PARTS,
    Piece,
    StoredPart,
    part_file,
    write_pieces,
)
from dit_fast.distributed.world import World
from dit_fast.errors import CheckpointError, OutputError
from dit_fast.model.dit import DiT
from dit_fast.utils.files import TEMPORARY, file_facts, require_space, sync, write_atomically

_STEP_FOLDER = re.compile(r"step-(\d+)")
_REPLACED = f"{TEMPORARY}replaced-"
_REMOVED = f"{TEMPORARY}removed-"
_MOST_LISTED = 8
logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        path: The folder.
        manifest: Content of manifest.json.
        model: Weights by name, whole tensors on the CPU.
        ema: Averaged weights by name.
        optimizer: Moments of AdamW by name.
    """

    path: Path
    manifest: dict[str, Any]
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a run are kept.

    Args:
        keep: Number of complete checkpoints, counted from the newest; 0 keeps all.
        milestone_every: Steps divisible by this are always kept; 0 for none.
    """

    keep: int = 0
    milestone_every: int = 0

    def stays(self, step: int) -> bool:
        """Whether `step` is a milestone."""
        return self.milestone_every > 0 and step % self.milestone_every == 0


def checkpoints_folder(run: str | Path) -> Path:
    return Path(run) / "checkpoints"


def step_folder(run: str | Path, step: int) -> Path:
    return checkpoints_folder(run) / f"step-{step:07d}"


def step_folders(run: str | Path) -> list[Path]:
    """Step folders of a run, oldest first, verified or not, without leftovers of killed saves."""
    folder = checkpoints_folder(run)
    if not folder.is_dir():
        return []
    steps = [(match, path) for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for match, path in sorted(steps, key=lambda step: int(step[0][1])) if path.is_dir()]


def model_config(model: DiT) -> dict[str, Any]:
    """Content of `config.json` for a model."""
    return {"_class_name": "DiT", "_dit_fast_version": __version__, **model.config}


def write_checkpoint(
    run: str | Path,
    config: dict[str, Any],
    pieces: Mapping[str, Mapping[str, Piece]],
    needed: int,
    manifest: dict[str, Any],
    retention: Retention,
    world: World | None = None,
) -> Path:
    """Write `RUN/checkpoints/step-N`, N = manifest["step"], and remove older checkpoints.

    A collective operation over the background group: every rank calls it.

    Args:
        run: Run folder.
        config: Configuration of the model.
        pieces: By part, the pieces that this rank writes, on the CPU.
        needed: Size of the whole checkpoint in bytes.
        manifest: Content of manifest.json, without the files.
        retention: Which checkpoints are kept.
        world: The ranks; None for a single process.

    Returns:
        The checkpoint folder.

    Raises:
        OutputError: A rank could not write. It is raised on all ranks; the older checkpoints are unchanged, and no
            partial checkpoint is left.
    """
    world = world or World()
    final = step_folder(run, manifest["step"])
    folder = final.parent
    temporary = folder / f"{TEMPORARY}{final.name}-{world.attempt}"

    def begin() -> None:
        if world.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            # A leftover of a killed attempt at the same step.
            shutil.rmtree(temporary, ignore_errors=True)
            require_space(folder, needed)
            temporary.mkdir()

    def write() -> dict[str, dict[str, Any]]:
        names = []
        for part, held in pieces.items():
            if held:
                names.append(part_file(part, world.rank, world.size))
                write_pieces(temporary / names[-1], held)
        if world.is_first:
            names.append("config.json")
            text = json.dumps(config, indent=2) + "\n"
            write_atomically(temporary / names[-1], lambda path: path.write_text(text))
        for name in names:
            sync(temporary / name)
        return {name: file_facts(temporary / name, CheckpointError) for name in names}

    def publish() -> None:
        if world.is_first:
            files = {name: digest for written in digests for name, digest in written.items()}
            write_manifest(temporary, {"format": FORMAT, **manifest, "files": dict(sorted(files.items()))})
            # Files before the rename, so that a crash cannot leave a renamed folder without content.
            sync(temporary / MANIFEST)
            sync(temporary)
            _swap(temporary, final)
            sync(folder)

    try:
        _together(begin, world)
        digests = _together(write, world)
        _together(publish, world)
    except OutputError as error:
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(f"checkpoint {final} could not be written: {error}") from error
    if world.is_first:
        remove_old(run, retention)
    return final


def _together(action: Callable[[], Result], world: World) -> list[Result]:
    """The results of an action on all ranks; OutputError on each rank where the action failed on any."""
    result: Any = None
    problem: str | None = None
    try:
        result = action()
    except (OSError, SafetensorError) as error:
        problem = str(error)
    except Exception as error:
        # Not raised yet: the other ranks wait in `gather`.
        if world.size == 1:
            raise
        problem = f"{type(error).__name__}: {error}"
    outcomes = world.gather((result, problem), background=True)
    problems = [
        f"rank {rank}: {problem}" if world.size > 1 else problem
        for rank, (_, problem) in enumerate(outcomes)
        if problem is not None
    ]
    if problems:
        raise OutputError("; ".join(problems[:_MOST_LISTED]))
    return [result for result, _ in outcomes]


def _swap(temporary: Path, final: Path) -> None:
    """Rename into place. An existing folder is renamed first; `remove_leftovers` restores it after an interruption."""
    aside = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(temporary, final)
    shutil.rmtree(aside, ignore_errors=True)


def remove_old(run: str | Path, retention: Retention) -> None:
    """Remove the checkpoints that `retention` does not keep, each under another name, so that none is left partial."""
    if not retention.keep:
        return
    folders = step_folders(run)
    whole = [folder for folder in folders if is_complete(folder)]
    if len(whole) <= retention.keep:
        return
    # Incomplete folders do not count, and those older than the oldest kept checkpoint are removed too.
    oldest = whole[-retention.keep]
    for folder in folders[: folders.index(oldest)]:
        if retention.stays(_step_of(folder)):
            continue
        try:
            removed = folder.with_name(f"{_REMOVED}{folder.name}")
            shutil.rmtree(removed, ignore_errors=True)
            os.rename(folder, removed)
            shutil.rmtree(removed)
        except OSError as error:
            logger.warning("old checkpoint %s could not be removed: %s", folder, error)


def is_complete(folder: Path) -> bool:
    """Whether the manifest verifies and every file exists with its size; contents are not read."""
    try:
        files = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (CheckpointError, OSError):
        return False


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Verify and read a checkpoint folder, written by any number of ranks.

    Args:
        path: The folder.

    Returns:
        The checkpoint, with whole tensors on the CPU.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged.
    """
    path = Path(path)
    manifest = read_manifest(path)
    verify_files(path, manifest)
    return Checkpoint(path, manifest, *(read_part(path, manifest, part) for part in PARTS))


def read_part(path: Path, manifest: dict[str, Any], part: str) -> dict[str, Tensor]:
    """The whole tensors of one part ("model", "ema" or "optimizer") of a verified checkpoint, on the CPU."""
    with StoredPart(path, part, manifest["files"]) as stored:
        return stored.read()


def load_into(
    path: Path, manifest: dict[str, Any], state: Mapping[str, Mapping[str, Tensor]], cast: bool = False
) -> None:
    """Load a verified checkpoint, written by any number of ranks, into existing tensors.

    Args:
        path: Checkpoint folder.
        manifest: Its manifest.
        state: Tensors to fill, by part and name. Tensors may be sharded (DTensor): each rank reads its shard.
        cast: Allow other dtypes.

    Raises:
        CheckpointError: Lists every missing, unexpected or misshaped tensor and, without `cast`, every other dtype.
            Nothing is changed then.
    """
    parts = {part: StoredPart(path, part, manifest["files"]) for part in state}
    problems: list[str] = []
    for part, stored in parts.items():
        with stored:
            problems += stored.differences(state[part], cast)
    if problems:
        raise CheckpointError(f"checkpoint {path} belongs to another model: {'; '.join(problems)}")
    for part in parts:
        with StoredPart(path, part, manifest["files"]) as stored:
            stored.read_into(state[part])


def latest_checkpoint(run: str | Path, world: World | None = None) -> Path:
    """Find the newest checkpoint of a run that verifies; a damaged newer one is skipped with a warning.

    Args:
        run: Run folder.
        world: The ranks, which divide the hashing and get the decision of rank 0; None for a single process.

    Returns:
        The checkpoint folder.

    Raises:
        CheckpointError: There is no valid checkpoint.
    """
    world = world or World()
    folders = world.broadcast(step_folders(run) if world.is_first else None)
    if not folders:
        raise CheckpointError(f"{run} has no checkpoint (looked for {checkpoints_folder(run)}/step-N)")
    refused = []
    for folder in reversed(folders):
        problem = _verify_together(folder, world)
        if problem is not None:
            refused.append(problem)
            continue
        for reason in refused if world.is_first else []:
            logger.warning("%s; using %s instead", reason, folder.name)
        return folder
    raise CheckpointError(
        f"none of the {len(folders)} checkpoints of {run} can be used: {'; '.join(refused)}"
    )


def _verify_together(folder: Path, world: World) -> str | None:
    """Problems of a checkpoint, the same text on all ranks; each rank hashes a part of the files."""
    problem = None
    try:
        manifest = read_manifest(folder)
        # Largest first, so that every rank hashes about as many bytes.
        names = sorted(manifest["files"], key=lambda name: -manifest["files"][name]["bytes"])
        verify_files(folder, manifest, names[world.rank :: world.size])
    except CheckpointError as error:
        problem = str(error)
    found = [problem for problem in world.gather(problem) if problem is not None]
    return "; ".join(dict.fromkeys(found)) or None


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder at `path`: a step folder itself, or the newest valid checkpoint of a run."""
    path = Path(path)
    if (path / MANIFEST).exists() or _STEP_FOLDER.fullmatch(path.name):
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run or checkpoint folder")
    return latest_checkpoint(path)


def remove_leftovers(run: str | Path) -> None:
    """Delete the leftovers of killed saves, and restore a step that was renamed but not replaced."""
    folder = checkpoints_folder(run)
    for aside in folder.glob(f"{_REPLACED}*"):
        final = aside.with_name(aside.name.removeprefix(_REPLACED))
        if not final.exists():
            os.rename(aside, final)
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def checkpoint_bytes(*states: Mapping[str, Tensor]) -> int:
    """Size of these state dicts on disk in bytes, with 1 MiB for headers and JSON."""
    return sum(t.numel() * t.element_size() for state in states for t in state.values()) + (1 << 20)


def _step_of(folder: Path) -> int:
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else -1
