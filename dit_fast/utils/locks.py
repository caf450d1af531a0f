"""Folder locks: one process at a time writes to a folder. The kernel releases the lock when the process ends.

`flock(2)` on a file in the folder. Within one machine it works on every file system. Between machines it works where
the file system supports it: NFS (unless mounted with nolock or local_lock), SMB, Ceph, GFS2, OCFS2, and Lustre mounted
with flock. Otherwise, or where the file system is unknown, a warning is logged and the lock is local to the machine.

A child process does not keep the lock of its parent: the descriptor is closed on exec, and in the child after a fork.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from dit_fast.errors import OutputError
from dit_fast.utils.terminal import printable

_MOST_BYTES = 4096
_LOCAL = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay", "apfs", "bcachefs")
    + ("vfat", "exfat", "ntfs3", "squashfs", "ecryptfs", "rootfs", "jfs", "reiserfs")
)
_PASSED_ON = frozenset(("ceph", "gfs2", "ocfs2", "cifs", "smb3", "smbfs"))
logger = logging.getLogger(__name__)


class FolderLock:
    """Lock of a folder: `with FolderLock(folder, "train"):`. Readers need no lock.

    Args:
        folder: The folder.
        purpose: Name of the command.
        part: Number of a process among several that write to one folder by design, such as the ranks of an encoding.

    Raises:
        OutputError: On entry: another process holds the lock (the message names it), or the file cannot be created.
    """

    def __init__(self, folder: str | Path, purpose: str, part: int = 0):
        self.path = Path(folder) / f".{purpose}{f'-{part}' if part else ''}.lock"
        self.purpose = purpose
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock, or raise OutputError at once; does nothing where it is already held."""
        if self.held:
            return
        while True:
            descriptor = self._open()
            try:
                locked = self._lock(descriptor)
                if locked and not self._is_current(descriptor):
                    # The last holder removed the file between the opening and the locking: try again.
                    os.close(descriptor)
                    continue
                if locked:
                    _write_holder(descriptor, self.purpose)
            except BaseException:
                os.close(descriptor)
                raise
            break
        self._descriptor = descriptor
        _HELD.add(self)
        if reason := _reach(self.path) if locked else "the file system does not support locks":
            logger.warning(
                "%s: %s: do not write to it from other machines at the same time", self.path.parent, reason
            )

    def release(self) -> None:
        """Release the lock and remove its file."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                if self._is_current(self._descriptor):
                    self.path.unlink()
            self._close()

    @contextlib.contextmanager
    def releasing(self) -> Iterator[None]:
        """Context manager that releases the lock at its end, if it was acquired inside."""
        try:
            yield
        finally:
            self.release()

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            return os.open(self.path, flags, 0o666)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be locked ({error.strerror or error})") from None

    def _lock(self, descriptor: int) -> bool:
        """Lock the file; False where the file system does not support locks. OutputError where it is already locked."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.path.parent} is in use: {_holder(descriptor)}; wait for it, end it, or choose another --out"
            ) from None
        except OSError:
            return False
        return True

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


_HELD: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


def _forget() -> None:
    # In a forked child: closing the copy of a descriptor does not release the lock of the parent.
    for lock in list(_HELD):
        lock._close()


os.register_at_fork(after_in_child=_forget)


def _write_holder(descriptor: int, purpose: str) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "command": purpose}
    # Only for the message of another process; the lock does not depend on the content.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)


def _holder(descriptor: int) -> str:
    """Description of the holder of the lock, from the file."""
    try:
        holder: Any = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(holder["since"])))
        command, pid, host = (printable(holder[name])[:80] for name in ("command", "pid", "host"))
        return f"dit-fast {command}, process {pid} on {host}, is writing to it since {since}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "another process is writing to it"


def _reach(path: Path) -> str:
    """Why the lock may not work between machines; empty where it does, or where the disk is local."""
    try:
        device = os.stat(path).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            mounts = file.read()
    except OSError:
        return ""
    return next(_weakness(kind, options) for kind, options in _mounts(mounts, device))


def _mounts(mountinfo: str, device: int) -> Iterator[tuple[str, set[str]]]:
    """Type and options of the mounts of a device, then an empty pair; see proc_pid_mountinfo(5)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) > 5 and len(kinds) > 2 and fields[2] == number:
            yield kinds[0], {*fields[5].split(","), *kinds[2].split(",")}
    yield "", set()


def _weakness(kind: str, options: set[str]) -> str:
    if kind in _LOCAL or kind in _PASSED_ON or not kind:
        return ""
    if kind in ("nfs", "nfs4"):
        local = options & {"nolock", "local_lock=flock", "local_lock=all"}
        return (
            f"mounted by NFS with {', '.join(sorted(local))}, its lock works only within this machine"
            if local
            else ""
        )
    if kind == "lustre":
        return (
            ""
            if "flock" in options
            else "mounted by Lustre without flock, its lock works only within this machine"
        )
    return f"its lock may work only within this machine, the file system is {kind}"
