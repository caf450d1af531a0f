"""Reading files from untrusted sources, and writing files atomically.

Reading accepts only regular files of bounded size, and raises a one-line error at once for anything else: opening a
pipe would block, a device may never end, and a few bytes of JSON can nest deeper than the parser's stack. Writing
leaves either a complete file or none. Devices, pipes and the targets of links are written to, never replaced.
"""

import contextlib
import hashlib
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
from dit_fast.utils.terminal import one_line

MOST_JSON_BYTES = 64 * 2**20
"""Upper bound on manifests, configurations and requests; the manifest of XL/2 has 2 kB, that of 10^8 images 10 MB."""
MOST_LIST_BYTES = 4 * 2**30
"""Upper bound on files with an entry per image or step: captions, names, labels, log lines."""
TEMPORARY = ".tmp-"
"""Prefix of the names of unfinished files and folders."""
_MAX_JSON_DEPTH = 64
# The header exactly as NumPy writes it, so that no Python literal from a file is parsed.
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|]\w\d+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n"
)
# Names of open descriptors, such as /dev/fd/3; /dev/stdout links to one of them.
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
    """Check a file before a library that takes a path (`safe_open`, PIL) opens it. Links are followed.

    Args:
        path: File to be read.
        raises: Class of the error.
        most: Upper bound on its size in bytes; None for no bound.
        what: Description of the expected file, for the message.

    Returns:
        The size in bytes.

    Raises:
        raises: The file does not exist, is not a regular file, is larger than `most`, or is not readable.
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
        raise raises(f"{_shortened(path)}: cannot be read ({one_line(error)})") from None
    if most is not None and found.st_size > most:
        raise raises(f"{path}: refused: {found.st_size} bytes, expected at most {most}")
    return found.st_size


def open_file(
    path: str | Path, raises: type[DitFastError], most: int | None = None, what: str = "a regular file"
) -> BufferedReader:
    """Open `path` for reading, after `check_file`, whose arguments and errors it has."""
    check_file(path, raises, most, what)
    try:
        # Non-blocking, in case a pipe has replaced the file since the check.
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    except OSError as error:
        raise raises(f"{path}: cannot be read ({one_line(error)})") from None
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
    """Content of `path`, up to its size when it was opened; arguments and errors as in `check_file`."""
    with open_file(path, raises, most, what) as file:
        try:
            return file.read(min(os.fstat(file.fileno()).st_size, most))
        except OSError as error:
            raise raises(f"{path}: cannot be read ({one_line(error)})") from None


@contextlib.contextmanager
def utf8_name(path: Path) -> Iterator[Path]:
    """Context manager with a UTF-8 name for `path`, as safetensors needs: `path` itself or the name of a descriptor."""
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
    """Content of a UTF-8 text file; arguments and errors as in `check_file`."""
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
    """Value of a JSON file of bounded depth; arguments and errors as in `check_file`."""
    return parse_json(read_bytes(path, raises, most, what), str(path), raises)


def read_object(
    path: str | Path,
    raises: type[DitFastError],
    most: int = MOST_JSON_BYTES,
    what: str = "a JSON file",
) -> dict[str, Any]:
    """Value of a JSON file that must hold an object; arguments and errors as in `check_file`."""
    content = read_json(path, raises, most, what)
    if not isinstance(content, dict):
        raise raises(f"{path}: holds a JSON {_json_kind(content)}, expected an object")
    return content


def read_tensors(path: str | Path, raises: type[DitFastError]) -> dict[str, Any]:
    """Tensors of a safetensors file by name, on the CPU. Raises as `check_file`, also for a damaged file."""
    from safetensors.torch import load_file

    check_file(path, raises, what="a safetensors file")
    try:
        with utf8_name(Path(path)) as name:
            return load_file(name)
    except Exception as error:  # safetensors raises its own class, which is not public in every version
        raise raises(f"{path} is not a readable safetensors file: {error}") from None


def file_facts(path: str | Path, raises: type[DitFastError], what: str = "a regular file") -> dict[str, Any]:
    """Size and SHA-256 of a file, {"bytes", "sha256"}; Raises as `check_file`."""
    with open_file(path, raises, what=what) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": sha256}


def digest_json(content: Any) -> str:
    """SHA-256 of a JSON value: of the values, not of the bytes, so that reformatting a file does not change it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parse_json(text: str | bytes, source: str, raises: type[DitFastError]) -> Any:
    """Value of a UTF-8 JSON text of bounded depth; `source` names it in errors of class `raises`."""
    try:
        # utf-8-sig: some editors write a byte order mark.
        content = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise raises(f"{source}: damaged or not JSON ({one_line(error)})") from None
    # Breadth first, without recursion.
    level = [content]
    for _ in range(_MAX_JSON_DEPTH):
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, dict | list)]
        if not level:
            return content
    raise raises(f"{source}: refused: JSON nested deeper than {_MAX_JSON_DEPTH}")


def read_npy(path: str | Path, raises: type[DitFastError], most: int = MOST_LIST_BYTES) -> np.ndarray:
    """Read an array from a `.npy` file; thread-safe, unlike `np.load`.

    NumPy parses headers with `ast`. Before Python 3.11.9 and 3.12.3, two threads that do so, one of which may be
    Triton's compiler, raise `SystemError: AST constructor recursion depth mismatch` (CPython gh-106905).

    Args:
        path: The file.
        raises: Class of the error.
        most: Upper bound on its size in bytes.

    Returns:
        The array.

    Raises:
        raises: As in `check_file`, or the file is not an array of numbers in NumPy's format.
    """
    return parse_npy(read_bytes(path, raises, most, "an .npy file"), str(path), raises)


def parse_npy(content: bytes | bytearray | memoryview, source: str, raises: type[DitFastError]) -> np.ndarray:
    """Array in the bytes of a `.npy` file, without a copy; `source` names it in errors. As `read_npy`."""
    try:
        dtype, shape, fortran, start = npy_header(content)
        return np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError) as error:
        raise raises(f"{source} cannot be read ({len(content)} bytes): {one_line(error)}") from None


def npy_header(content: bytes | bytearray | memoryview) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """(dtype, shape, Fortran order, offset of the values) of the bytes of a `.npy` file; ValueError for other bytes."""
    head = bytes(content[:12])
    if head[:6] != b"\x93NUMPY":
        raise ValueError("not an .npy file")
    # Version 1 has a header length of 2 bytes, later versions of 4.
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
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: str | Path) -> None:
    """Check that `write_atomically` will be able to write to `path`; its folder is created where missing.

    Raises:
        OutputError: `path` is a folder, a block device or a socket, or its folder is not writable.
    """
    path = Path(path)
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"cannot write {_shortened(path)} ({one_line(error)}); choose another --out"
        ) from None
    if found is not None and not stat.S_ISREG(found.st_mode):
        # Not opened: opening and closing a pipe would end the input of its reader.
        _refuse_kind(path, found)
        return
    prepare_folder(Path(os.path.realpath(path)).parent)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file to a temporary path, flush it to disk and move it to `path`.

    A new file follows the umask; a replaced one keeps its permissions. Where `path` is a link, its target is replaced.
    Devices, pipes and the file to which stdout or stderr is redirected (`/dev/stdout`) receive the bytes in place.

    Args:
        path: Destination.
        write: Called with a temporary path, which has the suffix of `path`, to write the file there.

    Raises:
        OutputError: Writing failed; no partial file is left.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"cannot write {_shortened(path)} ({one_line(error)}); choose another --out"
        ) from error
    if found is not None and (_stream_of(path, found) is not None or not stat.S_ISREG(found.st_mode)):
        _write_through(path, found, write)
        return
    # In the folder of the target, since a rename is atomic only within a file system.
    final = Path(os.path.realpath(path))
    temporary = final.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{final.name}")
    try:
        # Created here, so that its permissions follow the umask: some libraries create files for the owner only.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = os.stat(temporary).st_mode if found is None else found.st_mode
        write(temporary)
        os.chmod(temporary, stat.S_IMODE(mode))
        sync(temporary)
        # The content before the name, and then the name: a crash leaves the old file or the new one.
        temporary.replace(final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write {_shortened(path)} ({one_line(error)}); free space or choose another --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write_through(path: Path, found: os.stat_result, write: Callable[[Path], object]) -> None:
    """Write to a file elsewhere and copy its bytes to the device, pipe or stream at `path`."""
    try:
        with tempfile.TemporaryDirectory(prefix="dit-fast-") as folder:
            temporary = Path(folder) / path.name
            write(temporary)
            with temporary.open("rb") as source, open(_open_existing(path, found), "wb") as target:
                shutil.copyfileobj(source, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write to {path} ({one_line(error)}); choose another --out") from error


def _open_existing(path: Path, found: os.stat_result) -> int:
    """A descriptor that writes to the device, pipe or stream at `path`."""
    _refuse_kind(path, found)
    try:
        if (stream := _stream_of(path, found)) is not None:
            return os.dup(stream)
        # Opened without blocking: a pipe without a reader is then an error (ENXIO) instead of a process that hangs.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        # Blocking again, or a write would fail when the pipe is full.
        os.set_blocking(descriptor, True)
        return descriptor
    except OSError as error:
        reason = "the pipe has no reader" if stat.S_ISFIFO(found.st_mode) else one_line(error)
        raise OutputError(f"cannot write to {path} ({reason}); choose another --out") from error


def _refuse_kind(path: Path, found: os.stat_result) -> None:
    kind = _kind(found.st_mode)
    if kind in ("a folder", "a block device", "a socket") and _stream_of(path, found) is None:
        raise OutputError(f"cannot write {path}: it is {kind}; choose another --out")


def _stream_of(path: Path, found: os.stat_result) -> int | None:
    """The descriptor that `path` names, or that of stdout or stderr where it is redirected to `path`."""
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
    """Kind of a file with this mode; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    return next((name for test, name in _KINDS if test(mode)), "a special file")


def _json_kind(content: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(content), "null")


def _shortened(path: str | Path) -> str:
    text = str(path)
    return text if len(text) <= 300 and text.isprintable() else f"{text[:100]!r}..."


@contextlib.contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """Context manager with the path of a folder beside `final`, to be made and renamed to it; removed if it is left."""
    temporary = final.with_name(f"{TEMPORARY}{os.getpid()}-{final.name}")
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare_folder(folder: Path, needed_bytes: int = 0) -> None:
    """Create `folder` where missing; OutputError where it is not writable or has less than `needed_bytes` free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({one_line(error)}); choose another --out") from error
    if needed_bytes:
        require_space(folder, needed_bytes)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise OutputError where the disk of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            f"no space in {folder}: {needed_bytes / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free; "
            "free some or choose another --out"
        )
