"""List the image files below a folder, for every command in the same way.

Hidden files and folders, and those that operating systems create (`LITTER`), are ignored. Links to files and folders
are followed, so that a folder with two links to it counts twice; a link to a parent folder is not followed. Files of
other image formats are counted and named in one warning.
"""

import functools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dit_fast.errors import DataError

SUFFIXES = frozenset(
    (
        ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".pjpeg", ".pjp", ".webp", ".bmp",
        ".dib", ".tif", ".tiff",
    )
)  # fmt: skip
"""Suffixes, in lower case, of the files that are read: PNG, JPEG, WebP, BMP and TIFF."""
FORMATS = "PNG, JPEG, WebP, BMP or TIFF"
LITTER = frozenset(
    ("__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information", "lost+found")
    + ("thumbs.db", "desktop.ini", "__pycache__")
)
"""Names, in lower case, of files and folders that operating systems create."""
# Suffixes of image formats that are not read: common ones, and the raw formats of cameras.
_OTHERS = frozenset(
    (
        ".gif", ".heic", ".heif", ".hif", ".avif", ".avifs", ".jxl", ".jxr", ".hdp", ".wdp", ".jp2", ".j2k",
        ".jpf", ".jpx", ".jpm", ".jpc", ".svg", ".svgz", ".psd", ".psb", ".xcf", ".kra", ".ico", ".icns",
        ".cur", ".tga", ".pcx", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm", ".exr", ".hdr", ".dds",
        ".qoi", ".sgi", ".xbm", ".xpm", ".eps", ".dcm", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw",
        ".arw", ".sr2", ".srf", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f", ".raw", ".3fr", ".iiq",
        ".erf", ".kdc", ".dcr", ".mos", ".mrw", ".rwl", ".gpr",
    )
)  # fmt: skip
# Suffixes of files whose first bytes are not examined.
_NO_IMAGES = frozenset(
    (
        ".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".md", ".xml", ".yaml", ".yml", ".toml",
        ".html", ".log", ".npy", ".npz", ".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".parquet", ".arrow",
        ".h5", ".pkl", ".mat", ".zip", ".tar", ".gz", ".xz", ".bz2", ".7z", ".py", ".ipynb", ".sh", ".pdf",
        ".mp4", ".mov", ".avi", ".mkv",
    )
)  # fmt: skip
# First bytes of PNG, JPEG, GIF, TIFF in both byte orders, PSD, JPEG XL bare and in its container, JPEG 2000.
_MAGIC = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"8BPS",
    b"\xff\x0a",
    b"\0\0\0\x0cJXL ",
    b"\0\0\0\x0cjP",
)
_NAMED = 5
# Names of folders that hold one split of a data set each.
_TRAINING = frozenset(("train", "training", "trn", "train_set", "trainset"))
_HELD = frozenset(
    (
        "val", "valid", "validation", "test", "testing", "dev", "eval", "heldout", "holdout", "val_set",
        "test_set",
    )
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Files below a folder.

    Args:
        root: the folder.
        paths: image files, sorted by the components of their paths.
        folders: names of the folders directly in `root`.
        others: images of formats that are not read.
        absent: image names that are not files, such as broken links.
        loops: links to a parent folder.
    """

    root: Path
    paths: tuple[Path, ...]
    folders: tuple[str, ...]
    others: tuple[Path, ...] = ()
    absent: tuple[Path, ...] = ()
    loops: tuple[Path, ...] = ()

    @property
    def loose(self) -> tuple[Path, ...]:
        """Images directly in `root`."""
        depth = len(self.root.parts) + 1
        return tuple(path for path in self.paths if len(path.parts) == depth)

    @property
    def splits(self) -> tuple[str, str] | None:
        """Names of two folders that hold splits of a data set, such as train and val; None if there are none."""
        training = [name for name in self.folders if name.lower() in _TRAINING]
        held = [name for name in self.folders if name.lower() in _HELD]
        return (training[0], held[0]) if training and held else None

    def warn(self, more: Iterable[str] = ()) -> None:
        """Log one line about the files that are not read, and `more`; once, on rank 0."""
        lines = list(more)
        if self.others:
            kinds = Counter(path.suffix.lower() or "no suffix" for path in self.others)
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            lines.append(
                f"{len(self.others)} files look like images and are not read ({counts}): "
                f"{self._name(self.others)}; convert them to {FORMATS}"
            )
        if self.absent:
            lines.append(
                f"{len(self.absent)} image names are not files (such as broken links): {self._name(self.absent)}"
            )
        if self.loops:
            lines.append(
                f"{len(self.loops)} links lead to a parent folder and are not followed: "
                f"{self._name(self.loops)}"
            )
        if lines and os.environ.get("RANK", "0") == "0":
            _warn_once(f"{self.root}: {'; '.join(lines)}")

    def _name(self, paths: Sequence[Path]) -> str:
        return name_some([path.relative_to(self.root).as_posix() for path in paths])


def warn_of_frames(root: Path, names: Sequence[str], every_rank: bool = False) -> None:
    """Log the files below `root` of which only the first frame or page is read.

    Args:
        root: Folder of the images.
        names: Files with several frames or pages.
        every_rank: Log on all ranks, where each reads other files; else on rank 0.
    """
    if names and (every_rank or os.environ.get("RANK", "0") == "0"):
        _warn_once(
            f"{root}: {len(names)} files have several frames or pages; only the first is read: {name_some(names)}"
        )


@functools.lru_cache(maxsize=256)
def _warn_once(line: str) -> None:
    # Cached: a run opens its folder several times, for training, as the reference and for a classifier.
    logger.warning("%s", line)


def name_some(names: Sequence[str], most: int = _NAMED) -> str:
    """The first `most` names and the number of the others, for a message."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def find_images(root: Path) -> Found:
    """List the files below the folder `root`. Raises DataError if a folder cannot be listed."""
    paths: list[Path] = []
    others: list[Path] = []
    absent: list[Path] = []
    loops: list[Path] = []
    folders: list[str] = []
    # Device and inode of each folder on the path from the root: a link to one of them would never end.
    home = root.resolve()
    above = frozenset(_identity(folder) for folder in (home, *home.parents))
    waiting = [(root, above)]
    while waiting:
        folder, above = waiting.pop()
        for entry in _entries(folder):
            path = folder / entry.name
            if entry.name.startswith(".") or entry.name.lower() in LITTER:
                continue
            suffix = path.suffix.lower()
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # ELOOP: a link to itself
                is_folder = is_file = False
            if is_folder:
                identity = _identity(path)
                if identity in above:
                    loops.append(path)
                    continue
                waiting.append((path, above | {identity}))
                if folder is root:
                    folders.append(entry.name)
            elif suffix in SUFFIXES:
                (paths if is_file else absent).append(path)
            elif suffix in _OTHERS or (is_file and suffix not in _NO_IMAGES and _looks_like_image(path)):
                others.append(path)
    # Sorted by path components, not by strings: "a/b" precedes "a-b/c", as in a walk of sorted folders.
    ordered = (tuple(sorted(found, key=lambda path: path.parts)) for found in (paths, others, absent, loops))
    images, *rest = ordered
    return Found(root, images, tuple(sorted(folders)), *rest)


def image_files(folder: Path) -> list[Path]:
    """Image files below `folder`, sorted by the components of their paths; others are named in a warning."""
    found = find_images(folder)
    splits = found.splits
    found.warn([f"{' and '.join(splits)} are scored together; give one of them"] if splits else [])
    return list(found.paths)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror or error}") from None


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror or error}") from None
    return status.st_dev, status.st_ino


def _looks_like_image(path: Path) -> bool:
    """Detect an image by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    if head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return True
    # Containers: the ISO base media format (AVIF, HEIC, CR3) names its brand after "ftyp"; BMP has reserved zeros.
    brands = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"crx ")
    return (head[4:8] == b"ftyp" and head[8:12] in brands) or (head[:2] == b"BM" and head[6:10] == bytes(4))


def check_splits(found: Found) -> None:
    """Raise DataError for a folder that contains splits of a data set, which would be read as classes."""
    if found.splits is not None:
        training, held = found.splits
        raise DataError(
            f"{found.root} contains {training}/ and {held}/, splits of a data set, not classes: give "
            f"{found.root / training} (and {found.root / held} for scores; rename them if they are classes)"
        )


def list_classes(root: Path, labeled: bool = True) -> tuple[list[str], list[Path], list[int]]:
    """List a folder with one sub-folder of images per class.

    Args:
        root: the folder.
        labeled: False for images without class conditioning, which need no sub-folders.

    Returns:
        class names, which are the sorted sub-folder names; files; and the label of each file. Unlabeled images that
        are not in two or more sub-folders have one class, "images".

    Raises:
        DataError: there is no such folder, it contains splits of a data set, or a class has no images.
    """
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if not root.is_dir():
        raise DataError(f"{root} is a file; give a folder with one sub-folder of images per class")
    found = find_images(root)
    check_splits(found)
    loose = len(found.loose)
    classes = dict.fromkeys(found.folders, 0)
    depth = len(root.parts)
    for path in found.paths:
        if len(path.parts) > depth + 1:
            classes[path.parts[depth]] += 1
    empty = [name for name, count in classes.items() if not count]
    if not labeled and (loose or empty or len(classes) < 2):
        if not found.paths:
            raise DataError(f"{root} has no readable image ({FORMATS}){_instead(found)}")
        found.warn()
        return ["images"], list(found.paths), [0] * len(found.paths)
    if loose and ((root / "metadata.jsonl").exists() or any(root.glob("*.txt"))):
        raise DataError(
            f"{root} has captions but no embeddings: encode them with dit-fast encode --text-encoder NAME, together "
            f"with latents or with --vae none --out {root / 'embeddings.safetensors'}"
        )
    if not classes:
        has = f"{loose} images but no sub-folders" if loose else f"no sub-folders{_instead(found)}"
        raise DataError(
            f"{root} has {has}; put the images of each class into their own sub-folder"
            + (", or train without classes: --num-classes 0" if loose else "")
        )
    if len(found.paths) == loose:
        raise DataError(
            f"{root} has {len(classes)} sub-folders without any readable image ({FORMATS})" + _instead(found)
        )
    if len(classes) == 1:
        (name,) = classes
        deeper = any(len(path.parts) > depth + 2 for path in found.paths)
        raise DataError(
            f"{root} has one class, {name}; class-conditional training needs at least 2"
            + (f" (are they in {root / name}?)" if deeper else "; without classes, give --num-classes 0")
        )
    if empty:
        raise DataError(
            f"{root}: {len(empty)} of {len(classes)} class sub-folders have no readable image ({FORMATS}): "
            f"{', '.join(empty[:5])}; fill or remove them{_instead(found)}"
        )
    names = [path.name for path in found.loose]
    found.warn(
        [f"{loose} images outside the class sub-folders are ignored: {name_some(names)}"] if loose else []
    )
    label = {name: number for number, name in enumerate(classes)}
    paths = [path for path in found.paths if len(path.parts) > depth + 1]
    return list(classes), paths, [label[path.parts[depth]] for path in paths]


def _instead(found: Found) -> str:
    """Images of other formats, for the end of a message."""
    if not found.others:
        return ""
    names = [path.relative_to(found.root).as_posix() for path in found.others]
    return f" (not read: {name_some(names)}; convert them)"
