"""Folders of results, checked before the work that they hold is done."""

import shutil
import tempfile
from pathlib import Path

from dit_fast.errors import OutputError

GRID, IMAGES, ARCHIVE = "sample.png", "images", "samples.npz"
"""What `dit-fast sample` writes to its folder: a grid, single images and an archive of them, ..."""
SCORES, PARTS = "scores.json", "parts"
"""... scores and, until all of these are written, the shards, ..."""
WRITTEN = frozenset((GRID, IMAGES, ARCHIVE, "trajectory.gif", "latents.npy", SCORES, PARTS))
"""... and all that it may leave there."""


def prepare_folder(folder: Path, needed_bytes: int = 0) -> None:
    """Make `folder` and see that it takes files and has `needed_bytes` left; OutputError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder} ({error.strerror or error}); choose another --out"
        ) from error
    if free < needed_bytes:
        raise OutputError(
            f"no space in {folder}: {needed_bytes / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free; "
            "free some or choose another --out"
        )
