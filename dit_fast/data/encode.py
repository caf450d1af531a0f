"""A folder of images into a latent set: what `dit-fast encode` does.

The images, in the order of their names, are cut into shards of equal length; rank r of W encodes shards r,
r + W, ... A shard that is there, whole and of the same images is kept, so a run that was killed goes on where
it was, with any number of ranks. Ranks do not talk to each other: whoever finds all shards done writes the
manifest, and several that do write the same one. Batches never cross a shard's edge, so that a set does not
depend on interruptions or on the number of ranks.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dit_fast.data.captions import (
    CaptionEncoder,
    Listing,
    array_name,
    caption_name,
    list_images,
    open_encoder,
)
from dit_fast.data.decode import Conversion, list_failures, read_each, read_first_frame
from dit_fast.data.image_files import warn_of_frames
from dit_fast.data.shards import (
    FORMAT,
    LABELS,
    MANIFEST,
    MANIFEST_CHECK,
    NAMES,
    RECORD_CHECK,
    SETTINGS,
    SETTINGS_CHECK,
    TEXTS,
    HashingFile,
    StoredDtype,
    digest_file,
    digest_json,
    npy_bytes,
    publish,
    read_json,
    record_name,
    remove_leftovers,
    shard_name,
    write_json,
    write_npy_header,
)
from dit_fast.data.unreadable import UnreadableError
from dit_fast.encoders.autoencoder import LatentEncoder
from dit_fast.errors import ConfigError, DataError
from dit_fast.utils.files import check_output, prepare_folder, write_atomically
from dit_fast.utils.locks import FolderLock
from dit_fast.utils.options import REQUIRED, check_options, documented, option
from dit_fast.utils.schema import brief
from dit_fast.utils.values import SIDE, SOURCE, TEXT, Whole, check_memory

_FLIPS = (False, True)


@documented
@dataclass(frozen=True)
class EncodeConfig:
    """Configuration of `encode`, which writes a folder of images as a set of latents.

    Raises:
        ConfigError: a value is out of range, or two exclude each other.
    """

    data: str = option(
        REQUIRED,
        "Folder of class sub-folders of images, or of images with captions (NAME.txt beside each, or metadata.jsonl)",
        SOURCE,
        group="data",
        metavar="FOLDER",
        aliases=("--data-path",),
    )
    out: str = option(
        REQUIRED,
        "Folder of the set, which an interrupted command continues; with --vae none a .safetensors file",
        SOURCE,
        group="data",
        metavar="DIR",
    )
    vae: str = option(
        "ema",
        "Autoencoder: ema or mse (stabilityai/sd-vae-ft-...), or a folder with a diffusers AutoencoderKL; none writes "
        "embeddings of captions alone, FOLDER/embeddings.safetensors for training on images",
        SOURCE,
        group="encoders",
        metavar="NAME",
    )
    image_size: int = option(
        256,
        "Scale and center-crop images to S x S, as ADM does",
        SIDE,
        group="data",
        metavar="S",
        aliases=("--size",),
    )
    dtype: StoredDtype = option(
        "float16",
        "Dtype of the stored moments; float16 has a relative error of at most 2**-11",
        group="encoders",
    )
    precision: Literal["fp32", "tf32", "bf16"] = option(
        "tf32", "Arithmetic of the autoencoder; tf32 is fp32 without a GPU", group="encoders"
    )
    batch_size: int = option(
        32,
        "Images per batch; each is encoded as it is and mirrored",
        Whole(1, 1 << 24),
        group="machine",
        metavar="B",
    )
    shard_size: int = option(4096, "Images per file", Whole(1, 1 << 24), group="machine", metavar="M")
    num_workers: int | None = option(
        None,
        "Threads that decode images",
        Whole(1, 1 << 12),
        group="machine",
        metavar="N",
        default_text="one per CPU core",
    )
    text_encoder: str | None = option(
        None,
        "Store embeddings of captions instead of classes: name or folder of a CLIP or T5 of transformers, or a "
        ".safetensors or .npz file of arrays (tokens, width) named as the images are",
        SOURCE,
        group="encoders",
        metavar="NAME",
    )
    caption_tokens: int | None = option(
        None,
        "Tokens per caption",
        Whole(1, 1 << 16),
        group="encoders",
        metavar="S",
        default_text="as many as the encoder takes, at most 120",
    )
    num_classes: int | None = option(
        None,
        "0 stores no classes, and the images need no sub-folders",
        Whole(0, 1 << 24),
        group="data",
        metavar="N",
        default_text="one class per sub-folder",
    )
    background: str = option(
        "white",
        "Color on which transparent images are composited, a name or #rrggbb",
        TEXT,
        group="data",
        metavar="COLOR",
    )
    raw_pixels: bool = option(
        False, "Ignore transparency and EXIF orientation, as the reference implementation does", group="data"
    )
    skip_unreadable: int = option(
        0, "Number of unreadable files that the set may leave out", Whole(0), group="data", metavar="N"
    )
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_options(self)
        images = 4 * 3 * self.batch_size * self.image_size**2
        check_memory(images, f"a batch with --image-size {self.image_size} --batch-size {self.batch_size}")
        if self.num_classes not in (None, 0):
            raise ConfigError(f"--num-classes {self.num_classes}: sub-folders are classes; give 0 for none")
        self.conversion()

    def conversion(self) -> Conversion:
        """How files become pixels."""
        return Conversion(self.background, self.raw_pixels)


@dataclass(frozen=True)
class EncodeResult:
    """Shards this rank `encoded` and `kept`, those that other ranks still owe, and whether the set is whole.

    unreadable: files that the set is without, and why; of a whole set all, else those of this rank.
    """

    out: Path
    images: int
    encoded: int
    kept: int
    missing: int
    unreadable: dict[str, str]

    @property
    def complete(self) -> bool:
        return self.missing == 0


def encode(config: EncodeConfig, rank: int = 0, world_size: int = 1) -> EncodeResult:
    """Encode the shards of this rank; the rank that finds the set complete writes its manifest.

    Raises DataError for images that are missing or unreadable (the shards without them are still made) and
    for an `out` that holds another set, ConfigError for sizes that do not fit the autoencoder, OutputError for
    a disk that is full or not writable, and what `LatentEncoder` raises.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK {rank} is outside 0..{world_size - 1} (WORLD_SIZE {world_size})")
    captions = open_encoder(config.text_encoder, config.caption_tokens, config.device)
    listing = list_images(Path(config.data), config.shard_size, captions, config.num_classes != 0)
    out = Path(config.out)
    prepare_folder(out)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    encoder = LatentEncoder(config.vae, config.device, dtype)
    if config.image_size % encoder.factor:
        raise ConfigError(
            f"--image-size {config.image_size} is not a multiple of {encoder.factor}, by which the autoencoder "
            f"shrinks images; give {max(1, round(config.image_size / encoder.factor)) * encoder.factor}"
        )
    own = range(rank, listing.shards(), world_size)
    run = _Run(config, listing, encoder, captions, out, own)
    with FolderLock(out, "encode", rank):
        return _encode(run, rank, world_size)


def _encode(run: "_Run", rank: int, world_size: int) -> EncodeResult:
    out, listing, own = run.out, run.listing, run.own
    run.agree()
    # What all ranks write takes a moment; a file older than a minute is of a rank that was killed.
    remove_leftovers(out, (SETTINGS, LABELS, NAMES, TEXTS, MANIFEST), 0 if world_size == 1 else 60)
    remove_leftovers(out, [name for shard in own for name in _shard_files(shard)])
    done = [shard for shard in own if run.is_whole(shard)]
    todo = [shard for shard in own if shard not in set(done)]
    if todo:
        # A manifest vouches for every shard: it goes before the first of them is replaced.
        (out / MANIFEST).unlink(missing_ok=True)
    prepare_folder(out, run.bytes_to_come(todo))
    run.encode_all(
        todo, sum(len(listing.rows(shard)) for shard in done), f"encoding, rank {rank}/{world_size}"
    )
    unreadable = run.lost(own)
    missing = run.finish()
    if not missing:
        unreadable = run.lost(range(listing.shards()))
    names = {listing.names[row]: reason for row, reason in unreadable.items()}
    return EncodeResult(out, len(listing.paths) - len(names), len(todo), len(done), missing, names)


def _shard_files(shard: int) -> tuple[str, ...]:
    return shard_name(shard), record_name(shard), caption_name(shard)


@dataclass(frozen=True)
class _Run:
    config: EncodeConfig
    listing: Listing
    encoder: LatentEncoder
    captions: CaptionEncoder | None
    out: Path
    own: range

    @property
    def settings(self) -> dict[str, Any]:
        """What all shards of a set must have in common."""
        return {
            "vae_sha256": self.encoder.sha256,
            "image_size": self.config.image_size,
            "dtype": self.config.dtype,
            "precision": self.config.precision,
            "shard_size": self.config.shard_size,
            **({} if self.config.raw_pixels else {"pixels": self.config.conversion().describe()}),
            **(
                {}
                if self.captions is None
                else {"captions": f"{self.captions.sha256} {self.captions.tokens}"}
            ),
        }

    def shape(self, shard: int) -> tuple[int, ...]:
        side = self.config.image_size // self.encoder.factor
        rows = len(self.listing.rows(shard))
        return (rows, len(_FLIPS), 2, self.encoder.latent_channels, side, side)

    def caption_shape(self, shard: int) -> tuple[int, ...]:
        tokens, width = (0, 0) if self.captions is None else (self.captions.tokens, self.captions.width)
        return len(self.listing.rows(shard)), tokens, width

    def agree(self) -> None:
        """Compare with how the set was begun, or write that down."""
        path = self.out / SETTINGS
        try:
            begun = read_json(path, SETTINGS_CHECK)
        except FileNotFoundError:
            write_json(path, {"format": FORMAT, "vae": self.encoder.identity(), "settings": self.settings})
            begun = read_json(path, SETTINGS_CHECK)
        there, here = begun["settings"], self.settings
        if there["vae_sha256"] != here["vae_sha256"]:
            raise DataError(
                f"{self.out} was begun with the autoencoder {begun['vae']['name']} (SHA-256 "
                f"{there['vae_sha256'][:12]}), --vae {self.config.vae} is another (SHA-256 "
                f"{here['vae_sha256'][:12]}); give the first one or another --out"
            )
        if there != here:
            changed = [
                f"{key} is {brief(there.get(key))} there and {value} here"
                for key, value in here.items()
                if there.get(key) != value
            ]
            raise DataError(f"{self.out} was begun otherwise: {'; '.join(changed)}; give another --out")
        if (self.out / MANIFEST).exists():
            whole = read_json(self.out / MANIFEST, MANIFEST_CHECK)
            if whole["listing_sha256"] != self._listing_digest():
                raise DataError(
                    f"{self.out} is a finished set of {whole['images']} images that are not those of "
                    f"{self.config.data} ({len(self.listing.paths)} images); give another --out"
                )

    def is_whole(self, shard: int) -> bool:
        """Whether the shard is there, of these images and settings, and hashes to what its record says."""
        record = self._record(shard)
        if record is None or len(record.get("unreadable", {})) > self.config.skip_unreadable:
            return False
        files = [(self.out / shard_name(shard), record["file"])]
        if self.captions is not None:
            files.append((self.out / caption_name(shard), record["captions"]))
        return all(
            file.is_file() and file.stat().st_size == facts["bytes"] and digest_file(file) == facts
            for file, facts in files
        )

    def bytes_to_come(self, todo: Sequence[int]) -> int:
        """Of `todo` and of the shards that other ranks still owe: all ranks fill one disk."""
        owed = {shard for shard in range(self.listing.shards()) if self._record(shard) is None}
        shapes = [shape(shard) for shard in owed | set(todo) for shape in (self.shape, self.caption_shape)]
        return sum(npy_bytes(shape, self.config.dtype) for shape in shapes)

    def encode_all(self, shards: Sequence[int], kept: int, title: str) -> None:
        """Encode and publish `shards`.

        Images that cannot be read are left out, up to `skip_unreadable` of this rank's; else their shards are not made,
        and all are named at the end.
        """
        failures: dict[int, str] = {}
        left_out = len(self.lost(set(self.own).difference(shards)))
        frames: list[str] = []
        total = kept + sum(len(self.listing.rows(shard)) for shard in shards)
        with (
            ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader,
            tqdm(desc=title, total=total, initial=kept, unit="img", disable=None) as bar,
        ):
            for shard in shards:
                try:
                    left_out += self._encode_shard(
                        shard, reader, bar, self.config.skip_unreadable - left_out, frames
                    )
                except UnreadableError as error:
                    failures |= error.reasons
        warn_of_frames(Path(self.config.data), frames, every_rank=True)
        if failures:
            count = len(failures) + left_out
            raise DataError(
                f"{self.config.data}: {count} of {total} images cannot be read: "
                f"{list_failures(self.listing.paths, failures)}; replace or remove them, or leave them out with "
                f"--skip-unreadable {count}, and run the same command again (shards without them are kept)"
            )

    def lost(self, shards: Iterable[int]) -> dict[int, str]:
        """The rows of finished `shards` whose images could not be read, and why."""
        records = {shard: self._record(shard) for shard in shards}
        return {
            self.listing.rows(shard)[int(place)]: reason
            for shard, record in records.items()
            if record is not None
            for place, reason in record.get("unreadable", {}).items()
        }

    def finish(self) -> int:
        """Write the manifest if all shards are there; otherwise the number of those that are not."""
        records = [self._record(shard) for shard in range(self.listing.shards())]
        missing = sum(record is None for record in records)
        if missing:
            return missing
        lost = self.lost(range(self.listing.shards()))
        if len(lost) > self.config.skip_unreadable:
            raise DataError(
                f"{self.config.data}: {len(lost)} images cannot be read: {list_failures(self.listing.paths, lost)}; "
                f"replace or remove them, or leave them out with --skip-unreadable {len(lost)}, and run the same "
                "command again"
            )
        if len(lost) == len(self.listing.paths):
            raise DataError(f"{self.config.data}: none of its {len(lost)} images can be read")
        labels = np.asarray(self.listing.labels, dtype="<i8")
        shards = [
            {
                "file": shard_name(shard),
                "images": len(self.listing.rows(shard)),
                **record["file"],
                **{key: value for key, value in record.items() if key == "captions"},
            }
            for shard, record in enumerate(records)
            if record is not None
        ]
        label_file = publish(self.out / LABELS, lambda file: _write_array(file, labels))
        names, texts = (json.dumps(lines).encode() for lines in (self.listing.names, self.listing.texts))
        name_file = publish(self.out / NAMES, lambda file: file.write(names))
        words = {}
        if self.listing.texts:
            words["texts"] = publish(self.out / TEXTS, lambda file: file.write(texts))
        write_json(
            self.out / MANIFEST,
            {
                "format": FORMAT,
                "images": len(labels),
                "class_names": list(self.listing.class_names),
                "sample_shape": list(self.shape(0)[1:]),
                "axes": ["image", "flip", "mean, log-variance", "channel", "row", "column"],
                "flips": list(_FLIPS),
                "vae": self.encoder.identity(),
                "settings": self.settings,
                **({} if self.captions is None else {"captions": self.captions.identity()}),
                "shards": shards,
                "labels": label_file,
                "names": name_file,
                **words,
                **({"unreadable": sorted(lost)} if lost else {}),
                "listing_sha256": self._listing_digest(),
            },
        )
        return 0

    def _listing_digest(self) -> str:
        return digest_json([self.listing.class_names, self.listing.digest(range(len(self.listing.paths)))])

    def _record(self, shard: int) -> dict[str, Any] | None:
        """The record of a shard of these images and settings, if there is one."""
        try:
            record = read_json(self.out / record_name(shard), RECORD_CHECK)
        except (FileNotFoundError, DataError):
            return None
        return record if {key: record.get(key) for key in ("settings", "images")} == self._of(shard) else None

    def _of(self, shard: int) -> dict[str, Any]:
        return {"settings": self.settings, "images": self.listing.digest(self.listing.rows(shard))}

    def _encode_shard(
        self, shard: int, reader: ThreadPoolExecutor, bar: Any, allowed: int, frames: list[str]
    ) -> int:
        """Encode and publish a shard; the number of images in it that could not be read.

        Raises UnreadableError for more than `allowed`.
        """
        lost: dict[int, str] = {}
        (self.out / record_name(shard)).unlink(missing_ok=True)
        file = publish(
            self.out / shard_name(shard),
            lambda file: lost.update(self._write_shard(file, shard, reader, bar, allowed, frames)),
        )
        facts = {"file": file}
        if self.captions is not None:
            facts["captions"] = publish(
                self.out / caption_name(shard), lambda file: self._write_captions(file, shard)
            )
        first = self.listing.rows(shard).start
        if lost:
            facts["unreadable"] = {str(row - first): reason for row, reason in lost.items()}
        write_json(self.out / record_name(shard), {"format": FORMAT, **self._of(shard), **facts})
        return len(lost)

    def _write_captions(self, file: HashingFile, shard: int) -> None:
        assert self.captions is not None
        write_npy_header(file, self.caption_shape(shard), self.config.dtype)
        rows, config = self.listing.rows(shard), self.config
        for stored in self.listing.embeddings(self.captions, rows, config.batch_size, config.dtype):
            file.write(stored.numpy().data.cast("B"))

    def _write_shard(
        self,
        file: HashingFile,
        shard: int,
        reader: ThreadPoolExecutor,
        bar: Any,
        allowed: int,
        frames: list[str],
    ) -> dict[int, str]:
        """The moments of a shard, NaN for the rows that could not be read, which it returns with their reasons."""
        shape = self.shape(shard)
        write_npy_header(file, shape, self.config.dtype)
        lost: dict[int, str] = {}
        for rows, images, failures in self._read(shard, reader, frames):
            lost |= {rows[place]: reason for place, reason in failures.items()}
            if len(lost) <= allowed:
                readable = [row for row, image in zip(rows, images, strict=True) if image is not None]
                moments = torch.full(
                    (len(rows), *shape[1:]), math.nan, dtype=getattr(torch, self.config.dtype)
                )
                if readable:
                    pixels = torch.stack([image for image in images if image is not None])
                    moments[[row - rows.start for row in readable]] = self._moments(readable, pixels)
                file.write(moments.numpy().data.cast("B"))
            bar.update(len(rows))
        if len(lost) > allowed:
            raise UnreadableError(f"shard {shard}", lost)
        return lost

    def _read(
        self, shard: int, reader: ThreadPoolExecutor, frames: list[str]
    ) -> Iterator[tuple[range, list[Tensor | None], dict[int, str]]]:
        """Batches of uint8 images; the next one is decoded while the caller processes this one.

        Names of files with several frames or pages are added to `frames`.
        """
        size, channels = self.config.image_size, self.encoder.image_channels
        workers = self.config.num_workers or os.cpu_count() or 1
        rows = self.listing.rows(shard)
        step = self.config.batch_size
        batches = [rows[start : start + step] for start in range(0, len(rows), step)]

        how = self.config.conversion()

        def load(batch: range) -> tuple[list[Tensor | None], dict[int, str]]:
            paths = self.listing.paths[batch.start : batch.stop]
            read, failures = read_each(
                paths, lambda path: read_first_frame(path, size, channels, how), workers
            )
            frames.extend(
                self.listing.names[row] for row, one in zip(batch, read, strict=True) if one and one[1]
            )
            return [None if one is None else one[0] for one in read], failures

        ahead = reader.submit(load, batches[0])
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            images, failures = ahead.result()
            if following is not None:
                ahead = reader.submit(load, following)
            yield batch, images, failures

    def _moments(self, rows: Sequence[int], images: Tensor) -> Tensor:
        """(B, flips, 2, C, H, W) in the stored type, on the CPU."""
        pixels = images.to(self.encoder.device).float().div_(127.5).sub_(1.0)
        moments = torch.stack([self.encoder(pixels.flip(-1) if flip else pixels) for flip in _FLIPS], dim=1)
        stored = moments.to(getattr(torch, self.config.dtype))
        bad = (~stored.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            path = self.listing.paths[rows[bad[0]]]
            overflow = bool(moments[bad].isfinite().all())
            advice = "give --dtype float32" if overflow else "give --precision fp32 or another --vae"
            raise DataError(
                f"{path}: its latent is not finite in {self.config.dtype} ({len(bad)} in this batch); {advice}"
            )
        return stored.cpu().contiguous()


def _write_array(file: HashingFile, array: np.ndarray) -> None:
    write_npy_header(file, array.shape, array.dtype.name)
    file.write(array.data.cast("B"))


def embed(config: EncodeConfig, world_size: int = 1) -> int:
    """Write an array (tokens, width) for each image, padding left out, to the .safetensors `config.out`; their number.

    The metadata name the encoder. All embeddings are in memory until they are written. Raises ConfigError, and what
    `dit_fast.data.encode.encode` raises of captions.
    """
    out = Path(config.out)
    if out.suffix != ".safetensors":
        raise ConfigError(
            f"--out {out}: --vae none writes embeddings of captions alone, to a file that ends in .safetensors"
        )
    if world_size > 1:
        raise ConfigError("--vae none runs in one process, not under torchrun")
    captions = open_encoder(config.text_encoder, config.caption_tokens, config.device)
    if captions is None:
        raise ConfigError("--vae none writes embeddings of captions alone: give --text-encoder")
    check_output(out)
    listing = list_images(Path(config.data), config.shard_size, captions)
    every: dict[str, Tensor] = {}
    with tqdm(total=len(listing.names), desc="encoding captions", disable=None) as bar:
        rows = range(len(listing.names))
        for batch in listing.embeddings(captions, rows, config.batch_size, config.dtype):
            for tokens in batch:
                used = (tokens != 0).any(dim=1).nonzero()
                length = int(used[-1]) + 1 if len(used) else 1
                every[array_name(listing.names[len(every)])] = tokens[:length].clone()
            bar.update(len(batch))
    prepare_folder(out.parent, sum(tokens.nbytes for tokens in every.values()))
    encoder = json.dumps(captions.identity())
    write_atomically(out, lambda temporary: save_file(every, temporary, metadata={"encoder": encoder}))
    return len(every)
