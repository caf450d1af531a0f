"""What is in a folder of images, and what deserves a look before training on it."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dit_fast.data.base import DataSet
from dit_fast.data.decode import Conversion, ImageFacts, read_each, read_facts
from dit_fast.data.image_files import FORMATS, Found, find_images, name_some
from dit_fast.data.images import to_pixels
from dit_fast.data.latents import EncodingSource, LatentSet, latents_as_pixels
from dit_fast.data.unreadable import UnreadableError
from dit_fast.errors import DataError
from dit_fast.utils.files import file_facts
from dit_fast.utils.images import draw_grid, on_paper, short_label, to_pil, to_uint8

UNEVEN = 10
"""Ratio of the largest to the smallest class from which a survey points it out."""
PREVIEW_ROWS, PREVIEW_COLUMNS, PREVIEW_SIDE = 8, 8, 128


@dataclass(frozen=True)
class Survey:
    """Content of a folder of images.

    Args:
        root: the folder.
        classes: number of images by class sub-folder; empty for a folder without sub-folders.
        loose: images beside the class sub-folders.
        facts: of each image that was decoded, by its path below `root`.
        failures: reason by path of each file that cannot be read.
        copies: groups of files with the same content.
        found: the listing that it was made from.
    """

    root: Path
    classes: dict[str, int]
    loose: int
    facts: dict[str, ImageFacts]
    failures: dict[str, str]
    copies: tuple[tuple[str, ...], ...]
    found: Found

    @property
    def transparent(self) -> list[str]:
        """Images of which some pixels are transparent."""
        return [name for name, facts in self.facts.items() if facts.transparent]

    @property
    def across(self) -> list[tuple[str, ...]]:
        """Groups of copies that are in more than one class."""
        if not self.classes:
            return []
        return [group for group in self.copies if len({name.split("/")[0] for name in group}) > 1]

    def as_json(self) -> dict[str, Any]:
        """JSON-ready content, with every file that the text only counts."""
        sides = [min(facts.width, facts.height) for facts in self.facts.values()]
        others = [path.relative_to(self.root).as_posix() for path in self.found.others]
        return {
            "folder": str(self.root),
            "images": len(self.found.paths),
            "classes": self.classes,
            "outside_classes": self.loose if self.classes else 0,
            "short_side": {"min": min(sides), "median": median(sides), "max": max(sides)} if sides else None,
            "sizes": [
                {"width": width, "height": height, "images": count}
                for (width, height), count in self._sizes().most_common()
            ],
            "grayscale": sum(facts.gray for facts in self.facts.values()),
            "transparent": self.transparent,
            "unreadable": self.failures,
            "copies": [list(group) for group in self.copies],
            "other_formats": others,
            "splits": list(self.found.splits or ()),
        }

    def lines(self) -> list[str]:
        """The content in words, and one line for each finding."""
        return [*self._content(), *(f"note: {text}" for text in self._findings())]

    def _sizes(self) -> Counter[tuple[int, int]]:
        return Counter((facts.width, facts.height) for facts in self.facts.values())

    def _content(self) -> list[str]:
        lines = [f"{self.root}: {len(self.found.paths)} images{describe_classes(self.classes)}"]
        sizes = self._sizes()
        if len(sizes) == 1:
            ((width, height),) = sizes
            lines.append(f"size: {width} x {height}, all of them")
        elif sizes:
            sides = sorted(min(size) for size in sizes.elements())
            lines.append(
                f"sizes: {len(sizes)} different; short side {sides[0]} to {sides[-1]}, median {median(sides):g}"
            )
        gray = sum(facts.gray for facts in self.facts.values())
        if self.facts:
            color = "all grayscale" if gray == len(self.facts) else f"{len(self.facts) - gray} in color"
            lines.append(f"pixels: {color}" + (f", {gray} grayscale" if 0 < gray < len(self.facts) else ""))
        return lines

    def _findings(self) -> list[str]:
        found, notes = self.found, []
        if self.failures:
            named = name_some([f"{name} ({reason})" for name, reason in self.failures.items()])
            notes.append(f"{_count(self.failures, 'file')} cannot be read: {named}")
        if found.splits:
            training, held = found.splits
            notes.append(f"{training}/ and {held}/ are splits of a data set: train on {self.root / training}")
        if not self.classes:
            notes.append("no class sub-folders: train without classes, --num-classes 0")
        elif self.loose:
            notes.append(
                f"outside the class sub-folders, and not trained on with classes: {_count(self.found.loose, 'image')}"
            )
        if empty := [name for name, count in self.classes.items() if not count]:
            notes.append(f"sub-folders without an image: {name_some(empty)}")
        counts = [count for count in self.classes.values() if count]
        if counts and max(counts) >= UNEVEN * min(counts):
            largest, smallest = (pick(self.classes, key=self.classes.__getitem__) for pick in (max, min))
            notes.append(
                f"classes differ in size: {largest} has {max(counts)} images, {smallest} "
                f"{self.classes[smallest]}; each is drawn as often as it has images"
            )
        if self.copies:
            extra = [name for group in self.copies for name in group[1:]]
            named = name_some([" = ".join(group[:2]) for group in self.across or self.copies], 3)
            among = ", also in other classes" if self.across else ""
            notes.append(f"{_count(extra, 'copy', 'copies')} of other images{among}: {named}")
        if transparent := self.transparent:
            notes.append(
                f"{_count(transparent, 'image')} with transparent pixels, which --background replaces (white unless "
                f"given): {name_some(transparent, 3)}"
            )
        if found.others:
            names = [path.relative_to(self.root).as_posix() for path in found.others]
            notes.append(
                f"not read, though they look like images: {name_some(names)}; convert them to {FORMATS}"
            )
        return notes


def survey_folder(root: Path, conversion: Conversion, num_workers: int) -> Survey:
    """Decode all images below `root`, with a progress bar.

    Raises:
        DataError: there is no such folder, or it has no images.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    found = find_images(root)
    if not found.paths:
        raise DataError(f"{root} has no image ({FORMATS})")
    names = [path.relative_to(root).as_posix() for path in found.paths]
    facts, failures = read_each(
        found.paths, lambda path: read_facts(path, conversion), num_workers, f"reading {root.name}"
    )
    # Folders of images alone: the names of classes are those of the sub-folders.
    classes = dict.fromkeys(found.folders, 0)
    for name in names:
        if "/" in name:
            classes[name.split("/")[0]] += 1
    return Survey(
        root,
        classes,
        len(found.loose),
        {name: each for name, each in zip(names, facts, strict=True) if each is not None},
        {names[position]: reason for position, reason in sorted(failures.items())},
        _copies(found.paths, names),
        found,
    )


def _copies(paths: Sequence[Path], names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Groups of files with equal content. Only files that share their size with another one are read."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for position, path in enumerate(paths):
        by_size[path.stat().st_size].append(position)
    by_content: dict[str, list[str]] = defaultdict(list)
    for group in by_size.values():
        # A link to a file and the file are listed twice and have one content, too.
        for position in group if len(group) > 1 else ():
            digest = file_facts(paths[position], DataError)["sha256"]
            by_content[digest].append(names[position])
    return tuple(tuple(group) for group in by_content.values() if len(group) > 1)


def _count(things: Collection[Any], one: str, many: str = "") -> str:
    """Their number with the noun: "1 file", "2 files"."""
    return f"{len(things)} {one if len(things) == 1 else many or one + 's'}"


def describe_classes(counts: dict[str, int]) -> str:
    """Number of classes, the smallest and the largest: ", 3 classes: 12 (cat) to 340 (dog)"; "" without classes."""
    if not counts:
        return ""
    smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[smallest] == counts[largest]:
        return f", {len(counts)} classes of {counts[largest]}"
    return (
        f", {len(counts)} classes: {counts[smallest]} ({short_label(smallest)}) to {counts[largest]} "
        f"({short_label(largest)})"
    )


def preview(data: DataSet) -> Image.Image:
    """Draw up to 64 training images as the model receives them, those of a class in one row.

    Of latents the first three channels are shown, or one. Images that cannot be read are left out; nothing of the
    training stream changes.

    Args:
        data: the set; shapes of different buckets are drawn in their own rows.
    """
    split = data.train
    rows: list[tuple[str, np.ndarray]] = []
    groups = split.labels if split.buckets is None else split.labels * len(data.buckets) + split.buckets
    present = groups.unique()
    # Evenly over all classes and shapes; a set with one of them fills all rows with it.
    chosen = [int(present[row * len(present) // PREVIEW_ROWS]) for row in range(PREVIEW_ROWS)]
    for row, group in enumerate(chosen):
        repeated = chosen[:row].count(group)
        members = (groups == group).nonzero().flatten()
        members = members[repeated * PREVIEW_COLUMNS : (repeated + 1) * PREVIEW_COLUMNS]
        images = [image for member in members if (image := _shown(data, member[None])) is not None]
        if images:
            label = int(split.labels[members[0]])
            name = "" if data.captions is not None or data.num_classes < 2 else data.class_names[label]
            rows.append((short_label(name), np.stack(images)))
    if not rows:
        raise DataError(f"{data.name}: none of the images that were tried can be read")
    height, width = (max(images.shape[axis] for _, images in rows) for axis in (1, 2))
    return draw_grid([(name, on_paper(images, height, width)) for name, images in rows])


def _shown(data: DataSet, member: Tensor) -> np.ndarray | None:
    """One sample as uint8 (H, W, 1 or 3), at most PREVIEW_SIDE on its longer side; None if it cannot be read."""
    source = data.train.source
    try:
        # Of images that are encoded as they are read, the pixels: an autoencoder takes seconds on a CPU.
        if isinstance(source, EncodingSource):
            sample = to_pixels(source.images.read(data.train.members[member].tolist()))
        else:
            sample = data.train.batch(member)
    except UnreadableError:
        return None
    if isinstance(data, LatentSet) and not isinstance(source, EncodingSource):
        sample = latents_as_pixels(sample)
    image = to_uint8(sample)[0]
    longest = max(image.shape[:2])
    if longest <= PREVIEW_SIDE:
        return image
    size = tuple(round(side * PREVIEW_SIDE / longest) for side in image.shape[1::-1])
    return np.asarray(to_pil(image).resize(size, Image.Resampling.BOX)).reshape(*size[::-1], image.shape[2])


def describe_set(data: DataSet) -> list[str]:
    """A set as training reads it, in one line each: its samples and classes, their size, what was left out."""
    split, counts = data.train, {}
    if data.captions is None and data.num_classes > 1:
        found = split.labels.bincount(minlength=data.num_classes).tolist()
        counts = dict(zip(data.class_names, found, strict=True))
    kind = "latents" if isinstance(data, LatentSet) else "images"
    held = f", {len(data.heldout)} held out" if len(data.heldout) else ""
    captions = f", captions of {data.caption_tokens} tokens" if data.captions is not None else ""
    channels, height, width = split.sample_shape
    shapes = [f"{size[0]} x {size[1]} ({count})" for size, count in data.shapes.items()]
    mirrored = ", mirrored at random" if data.flip else ""
    lines = [
        f"data: {data.name}: {len(split)} {kind}{describe_classes(counts)}{captions}{held}",
        f"samples: {channels} channels of {', '.join(shapes) or f'{height} x {width}'}{mirrored}",
    ]
    if lost := data.unreadable.known:
        lines.append(f"left out, because they cannot be read: {name_some(list(lost))}")
    return lines
