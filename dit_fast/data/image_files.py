"""The image files of a folder, at any depth: the one listing that every command reads.

Hidden files and folders, and what systems leave behind (`LITTER`), are no data. Links are followed, to files and to
folders, so that a folder that two links lead to counts twice; one that leads back to a folder above it is not
followed. Whatever else looks like an image is counted and named in one warning.
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
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".pjpeg", ".pjp")
    + (".webp", ".bmp", ".dib", ".tif", ".tiff")
)
"""Of the files that are read, in lower case: PNG, JPEG, WebP, BMP and TIFF."""
FORMATS = "PNG, JPEG, WebP, BMP or TIFF"
LITTER = frozenset(
    ("__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information", "lost+found")
    + ("thumbs.db", "desktop.ini", "__pycache__")
)
"""Names, in lower case, of what systems put beside files."""
_OTHERS = frozenset(
    (
        ".gif",
        ".heic",
        ".heif",
        ".hif",
        ".avif",
        ".avifs",
        ".jxl",
        ".jxr",
        ".hdp",
        ".wdp",
        ".jp2",
        ".j2k",
        ".jpf",
        ".jpx",
    )
    + (
        ".jpm",
        ".jpc",
        ".svg",
        ".svgz",
        ".psd",
        ".psb",
        ".xcf",
        ".kra",
        ".ico",
        ".icns",
        ".cur",
        ".tga",
        ".pcx",
        ".ppm",
    )
    + (
        ".pgm",
        ".pbm",
        ".pnm",
        ".pam",
        ".pfm",
        ".exr",
        ".hdr",
        ".dds",
        ".qoi",
        ".sgi",
        ".xbm",
        ".xpm",
        ".eps",
        ".dcm",
    )
    + (
        ".dng",
        ".cr2",
        ".cr3",
        ".crw",
        ".nef",
        ".nrw",
        ".arw",
        ".sr2",
        ".srf",
        ".orf",
        ".rw2",
        ".raf",
        ".pef",
        ".srw",
    )
    + (".x3f", ".raw", ".3fr", ".iiq", ".erf", ".kdc", ".dcr", ".mos", ".mrw", ".rwl", ".gpr")
)
# Of files whose first bytes are not looked at.
_NO_IMAGES = frozenset(
    (
        ".txt",
        ".caption",
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".md",
        ".xml",
        ".yaml",
        ".yml",
        ".toml",
        ".html",
        ".log",
    )
    + (
        ".npy",
        ".npz",
        ".pt",
        ".pth",
        ".bin",
        ".ckpt",
        ".safetensors",
        ".parquet",
        ".arrow",
        ".h5",
        ".pkl",
        ".mat",
    )
    + (
        ".zip",
        ".tar",
        ".gz",
        ".xz",
        ".bz2",
        ".7z",
        ".py",
        ".ipynb",
        ".sh",
        ".pdf",
        ".mp4",
        ".mov",
        ".avi",
        ".mkv",
    )
)
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
# Folders that hold one part of a data set each.
_TRAINING = frozenset(("train", "training", "trn", "train_set", "trainset"))
_HELD = frozenset(
    (
        "val",
        "valid",
        "validation",
        "test",
        "testing",
        "dev",
        "eval",
        "heldout",
        "holdout",
        "val_set",
        "test_set",
    )
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What lies below `root`: `paths` of the images in the order of their names' parts, `folders` directly in it.

    others: images of formats that are not read; absent: names of images that are no files; loops: links back to a
    folder above.
    """

    root: Path
    paths: tuple[Path, ...]
    folders: tuple[str, ...]
    others: tuple[Path, ...] = ()
    absent: tuple[Path, ...] = ()
    loops: tuple[Path, ...] = ()

    @property
    def loose(self) -> tuple[Path, ...]:
        """The images directly in `root`."""
        depth = len(self.root.parts) + 1
        return tuple(path for path in self.paths if len(path.parts) == depth)

    @property
    def splits(self) -> tuple[str, str] | None:
        """Two folders of which one is for training and the other is not, such as train and val."""
        training = [name for name in self.folders if name.lower() in _TRAINING]
        held = [name for name in self.folders if name.lower() in _HELD]
        return (training[0], held[0]) if training and held else None

    def warn(self, more: Iterable[str] = ()) -> None:
        """One line of all that was found and is not read, and of `more`, from the first rank and once."""
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
                f"{len(self.absent)} names of images are no files (broken links or the like): {self._name(self.absent)}"
            )
        if self.loops:
            lines.append(
                f"{len(self.loops)} links lead back to a folder above them and are not followed: "
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
            f"{root}: of {len(names)} files with several frames or pages the first of each is read: {name_some(names)}"
        )


@functools.lru_cache(maxsize=256)
def _warn_once(line: str) -> None:
    """A run opens its folder more than once: for training, as a reference, for a classifier."""
    logger.warning("%s", line)


def name_some(names: Sequence[str], most: int = _NAMED) -> str:
    """The first `most` of some names, for a message."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def find_images(root: Path) -> Found:
    """List what lies below `root`, a folder. Raises DataError for a folder that cannot be listed."""
    paths: list[Path] = []
    others: list[Path] = []
    absent: list[Path] = []
    loops: list[Path] = []
    folders: list[str] = []
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
            except OSError:  # a link to itself
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
    ordered = (tuple(sorted(found, key=lambda path: path.parts)) for found in (paths, others, absent, loops))
    images, *rest = ordered
    return Found(root, images, tuple(sorted(folders)), *rest)


def image_files(folder: Path) -> list[Path]:
    """The images below `folder`, in the order of their names' parts; what looks like one and is not read is named."""
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
    """By the first bytes of a file, whose suffix says nothing."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    if head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return True
    brands = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"crx ")
    return (head[4:8] == b"ftyp" and head[8:12] in brands) or (head[:2] == b"BM" and head[6:10] == bytes(4))


def refuse_splits(found: Found) -> None:
    """Raise DataError for a folder that holds a data set's parts, of which each would be taken for a class."""
    if found.splits is not None:
        one, other = found.splits
        raise DataError(
            f"{found.root} holds {one}/ and {other}/, parts of a data set, not classes: give {found.root / one} (and "
            f"{found.root / other} for scores; rename them if they are classes)"
        )


def list_classes(root: Path, labelled: bool = True) -> tuple[list[str], list[Path], list[int]]:
    """Class names (sorted sub-folder names), files, and the label of each file; DataError where a class has none.

    labelled: False for images that no class is told of, in sub-folders or not.
    """
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if not root.is_dir():
        raise DataError(f"{root} is a file; give a folder with one sub-folder of images for each class")
    found = find_images(root)
    refuse_splits(found)
    loose = len(found.loose)
    classes = dict.fromkeys(found.folders, 0)
    depth = len(root.parts)
    for path in found.paths:
        if len(path.parts) > depth + 1:
            classes[path.parts[depth]] += 1
    empty = [name for name, count in classes.items() if not count]
    if not labelled and (loose or empty or len(classes) < 2):
        if not found.paths:
            raise DataError(f"{root} has no image that is read ({FORMATS}){_instead(found)}")
        found.warn()
        return ["images"], list(found.paths), [0] * len(found.paths)
    if loose and ((root / "metadata.jsonl").exists() or any(root.glob("*.txt"))):
        raise DataError(
            f"{root} has captions and no embeddings of them: make them with dit-fast encode --text-encoder NAME, "
            f"for its latents or with --vae none --out {root / 'embeddings.safetensors'}"
        )
    if not classes:
        has = f"{loose} images but no sub-folders" if loose else f"no sub-folders{_instead(found)}"
        raise DataError(
            f"{root} has {has}; put the images of each class into a sub-folder of its own"
            + (", or train without classes: --num-classes 0" if loose else "")
        )
    if len(found.paths) == loose:
        raise DataError(
            f"{root} has {len(classes)} sub-folders and no image that is read ({FORMATS}) in any of them"
            + _instead(found)
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
            f"{root}: {len(empty)} of {len(classes)} class sub-folders have no image that is read ({FORMATS}): "
            f"{', '.join(empty[:5])}; fill or remove them{_instead(found)}"
        )
    names = [path.name for path in found.loose]
    found.warn(
        [f"{loose} images are in no class sub-folder and are left out: {name_some(names)}"] if loose else []
    )
    label = {name: number for number, name in enumerate(classes)}
    paths = [path for path in found.paths if len(path.parts) > depth + 1]
    return list(classes), paths, [label[path.parts[depth]] for path in paths]


def _instead(found: Found) -> str:
    """What is there of formats that are not read, for the end of a message."""
    if not found.others:
        return ""
    names = [path.relative_to(found.root).as_posix() for path in found.others]
    return f" (not read: {name_some(names)}; convert them)"
