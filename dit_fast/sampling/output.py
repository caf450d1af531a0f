"""Results on disk: checked before the work that they hold is done, and never half written."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dit_fast.errors import OutputError


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


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file at a temporary sibling of `path` with its suffix, then rename it to `path`."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({error.strerror or error}); free space or choose another --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
