"""One reader and one writer for files from outside.

Reading: a regular file of bounded size, or one line at once. A pipe would be waited for, a device may never end, and a
few bytes of JSON nest deeper than the parser's stack; none of them is opened, or believed. Writing: a file is whole or
not there, a device, a pipe or the target of a link is written to and never replaced.
"""

import contextlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from dit_fast.errors import DitFastError, OutputError

MOST_JSON_BYTES = 64 * 2**20
"""Upper bound on a manifest, a configuration or a request: XL/2's manifest has 2 kB, a set of 10^8 images' 10 MB."""
MOST_LIST_BYTES = 4 * 2**30
"""Upper bound on a list with an entry per image or step: captions, names, labels, log lines."""
TEMPORARY = ".tmp-"
"""Prefix of everything that is not finished."""
_DEEPEST_JSON = 64
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|]\w\d+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n"
)
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


def check_file(
    path: str | Path, raises: type[DitFastError], most: int | None = None, what: str = "a regular file"
) -> int:
    """Check a file before a reader that takes a path (`np.load`, `safe_open`, PIL) opens it; links are followed.

    Args:
        path: file to be read
        raises: class of the error
        most: bytes that it may have; None: any number
        what: what is expected there, for the message

    Returns:
        its size in bytes

    Raises:
        raises: nothing is there, it is not a regular file, it is larger than `most`, or may not be read
    """
    try:
        found = os.stat(path)
        if (kind := _kind(found.st_mode)) is not None:
            raise raises(f"{path}: {kind}, expected {what}")
        if not os.access(path, os.R_OK):
            raise raises(f"{path}: cannot be read (Permission denied)")
    except FileNotFoundError:
        raise raises(f"{path}: no such file, expected {what}") from None
    except DitFastError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise raises(f"{_shortened(path)}: cannot be read ({_reason(error)})") from None
    if most is not None and found.st_size > most:
        raise raises(f"{path}: refused: {found.st_size} bytes, expected at most {most}")
    return found.st_size


def open_file(
    path: str | Path, raises: type[DitFastError], most: int | None = None, what: str = "a regular file"
) -> BufferedReader:
    """`path` opened for reading, after `check_file`; Args and Raises as there."""
    check_file(path, raises, most, what)
    try:
        # Nothing is waited for even where a pipe has taken the file's place since.
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    except OSError as error:
        raise raises(f"{path}: cannot be read ({_reason(error)})") from None
    if (kind := _kind(os.fstat(file.fileno()).st_mode)) is not None:
        file.close()
        raise raises(f"{path}: {kind}, expected {what}")
    return file


def read_bytes(
    path: str | Path,
    raises: type[DitFastError],
    most: int = MOST_JSON_BYTES,
    what: str = "a regular file",
) -> bytes:
    """Content of `path` as it was when it was opened, however fast it grows; Args and Raises as `check_file`."""
    with open_file(path, raises, most, what) as file:
        try:
            return file.read(min(os.fstat(file.fileno()).st_size, most))
        except OSError as error:
            raise raises(f"{path}: cannot be read ({_reason(error)})") from None


@contextlib.contextmanager
def utf8_name(path: Path) -> Iterator[Path]:
    """`path`, for a reader that takes names in UTF-8 alone, as safetensors does: for others, one of the open file."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield Path(f"/dev/fd/{file.fileno()}")
    else:
        yield path


def read_text(
    path: str | Path,
    raises: type[DitFastError],
    most: int = MOST_JSON_BYTES,
    what: str = "a text file",
) -> str:
    """Content of a text file in UTF-8; Args and Raises as `check_file`."""
    try:
        return read_bytes(path, raises, most, what).decode()
    except UnicodeDecodeError as error:
        raise raises(f"{path}: not text in UTF-8 (byte {error.start})") from None


def read_json(
    path: str | Path,
    raises: type[DitFastError],
    most: int = MOST_JSON_BYTES,
    what: str = "a JSON file",
) -> Any:
    """Value in a JSON file, of bounded depth; Args and Raises as `check_file`."""
    return parse_json(read_bytes(path, raises, most, what), str(path), raises)


def read_object(
    path: str | Path,
    raises: type[DitFastError],
    most: int = MOST_JSON_BYTES,
    what: str = "a JSON file",
) -> dict[str, Any]:
    """As `read_json`, of a file that must hold an object."""
    content = read_json(path, raises, most, what)
    if not isinstance(content, dict):
        raise raises(f"{path}: holds a JSON {_json_kind(content)}, expected an object")
    return content


def parse_json(text: str | bytes, source: str, raises: type[DitFastError]) -> Any:
    """Value of a JSON text in UTF-8; `source` names it in errors. Raises `raises` for anything else, however deep."""
    try:
        content = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise raises(f"{source}: damaged or not JSON ({_reason(error)})") from None
    level = [content]
    for _ in range(_DEEPEST_JSON):
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, dict | list)]
        if not level:
            return content
    raise raises(f"{source}: refused: JSON nested deeper than {_DEEPEST_JSON}")


def read_npy(path: str | Path, raises: type[DitFastError], most: int = MOST_LIST_BYTES) -> np.ndarray:
    """Array of a `.npy` file; safe in threads, which `np.load` is not.

    NumPy parses a header with `ast`, and before Python 3.11.9 and 3.12.3 two threads that do so at once end in
    `SystemError: AST constructor recursion depth mismatch` (CPython gh-106905), be the other one Triton's compiler.

    Raises:
        raises: as `check_file`, or the file is not an array of numbers as NumPy writes them
    """
    return parse_npy(read_bytes(path, raises, most, "an .npy file"), str(path), raises)


def parse_npy(content: bytes | bytearray | memoryview, source: str, raises: type[DitFastError]) -> np.ndarray:
    """Array, over the same memory, of the bytes of a `.npy` file; `source` names it in errors. As `read_npy`."""
    try:
        dtype, shape, fortran, start = npy_header(content)
        return np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError) as error:
        raise raises(f"{source} cannot be read ({len(content)} bytes): {_reason(error)}") from None


def npy_header(content: bytes | bytearray | memoryview) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """(dtype, shape, whether Fortran-ordered, start of the values) of a `.npy` file; ValueError for another."""
    head = bytes(content[:12])
    if head[:6] != b"\x93NUMPY":
        raise ValueError("not an .npy file")
    start = 10 if head[6:7] == b"\x01" else 12
    stop = start + int.from_bytes(head[8:start], "little")
    text = bytes(content[start:stop])
    header = _NPY_HEADER.fullmatch(text)
    if header is None:
        if b"'|O" in text:
            raise ValueError("Object arrays are not unpickled")
        raise ValueError(f"header {text[:80]!r}")
    shape = tuple(int(size) for size in header[3].decode().split(",") if size.strip())
    try:
        return np.dtype(header[1].decode()), shape, header[2] == b"True", stop
    except TypeError as error:
        raise ValueError(str(error)) from None


def _members(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: str | Path) -> None:
    """Check, before the work, that `write_atomically` can write to `path`; the folder is made when missing.

    Raises:
        OutputError: `path` is a folder, a block device, a socket or a pipe that nobody reads, or its folder takes no
            files
    """
    path = Path(path)
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"cannot write {_shortened(path)} ({_reason(error)}); choose another --out"
        ) from None
    if found is not None and not stat.S_ISREG(found.st_mode):
        # Not opened: a reader at the other end of a pipe would take that for all it gets.
        _refuse_kind(path, found)
        return
    folder = Path(os.path.realpath(path)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({_reason(error)}); choose another --out") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file at a temporary path with the suffix of `path`, then put it in place, synced to disk.

    The file follows the umask, or keeps the permissions of the one that it replaces. Where `path` is a link, its
    target is replaced and the link stays. A device or a pipe gets the bytes, and so does the file that stdout or
    stderr goes to (`/dev/stdout`).

    Raises:
        OutputError: the disk or the device does not take it; nothing partial stays behind in a file
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"cannot write {_shortened(path)} ({_reason(error)}); choose another --out"
        ) from error
    if found is not None and (_stream_of(path, found) is not None or not stat.S_ISREG(found.st_mode)):
        _write_through(path, found, write)
        return
    final = Path(os.path.realpath(path))
    temporary = final.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{final.name}")
    try:
        # Made here, so that its permissions follow the umask: some libraries make theirs for the owner alone.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = os.stat(temporary).st_mode if found is None else found.st_mode
        write(temporary)
        os.chmod(temporary, stat.S_IMODE(mode))
        sync(temporary)
        temporary.replace(final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write {_shortened(path)} ({_reason(error)}); free space or choose another --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write_through(path: Path, found: os.stat_result, write: Callable[[Path], object]) -> None:
    """Have `write` make a file elsewhere and copy its bytes to what is at `path`."""
    try:
        with tempfile.TemporaryDirectory(prefix="dit-fast-") as folder:
            temporary = Path(folder) / path.name
            write(temporary)
            with temporary.open("rb") as source, open(_open_existing(path, found), "wb") as target:
                shutil.copyfileobj(source, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write to {path} ({_reason(error)}); choose another --out") from error


def _open_existing(path: Path, found: os.stat_result) -> int:
    """A descriptor that writes to what is at `path` and leaves it in place."""
    _refuse_kind(path, found)
    try:
        if (stream := _stream_of(path, found)) is not None:
            return os.dup(stream)
        # Not waiting: a pipe without a reader is an error (ENXIO), not a process that hangs.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        os.set_blocking(descriptor, True)
        return descriptor
    except OSError as error:
        reason = "nobody reads from this pipe" if stat.S_ISFIFO(found.st_mode) else _reason(error)
        raise OutputError(f"cannot write to {path} ({reason}); choose another --out") from error


def _refuse_kind(path: Path, found: os.stat_result) -> None:
    kind = _kind(found.st_mode)
    if kind in ("a folder", "a block device", "a socket") and _stream_of(path, found) is None:
        raise OutputError(f"cannot write {path}: it is {kind}; choose another --out")


def _stream_of(path: Path, found: os.stat_result) -> int | None:
    """The open descriptor that `path` names, or stdout or stderr that go to it: what is there already must stay."""
    if named := _DESCRIPTOR.fullmatch(str(path)):
        return int(named[1])
    for stream, file in ((1, sys.stdout), (2, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            if os.path.samestat(found, os.fstat(stream)):
                if file is not None:
                    file.flush()
                return stream
    return None


def _kind(mode: int) -> str | None:
    """What a file of this mode is, None of a regular one."""
    if stat.S_ISREG(mode):
        return None
    return next((name for test, name in _KINDS if test(mode)), "a special file")


def _json_kind(content: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(content), "null")


def _reason(error: BaseException) -> str:
    """What an error says, on one line; its class where it says nothing."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def _shortened(path: str | Path) -> str:
    text = str(path)
    return text if len(text) <= 300 and text.isprintable() else f"{text[:100]!r}..."


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
