"""Encode a folder of images to a latent set, or its captions to embeddings: the work of `dit-fast encode`.

The images, in the order of their names, are divided into shards of equal length; rank r of W encodes shards r, r + W,
... A complete shard of the same images is kept, so that a killed command resumes with any number of ranks. Ranks do not
communicate: each rank that finds all shards complete writes the manifest, and all write the same one. Batches do not
cross shards, so that the set depends neither on interruptions nor on the number of ranks.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dit_fast.data.captions import (
    CaptionEncoder,
    EmbeddingFile,
    array_name,
    list_captioned,
    open_encoder,
    relative_names,
)
from dit_fast.data.decode import Conversion, list_failures, read_each, read_first_frame
from dit_fast.data.image_files import list_classes, warn_of_frames
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
    caption_name,
    npy_bytes,
    publish,
    read_sealed,
    record_name,
    remove_leftovers,
    shard_name,
    write_npy_header,
    write_sealed,
)
from dit_fast.data.unreadable import UnreadableError
from dit_fast.encoders.autoencoder import LatentEncoder
from dit_fast.errors import ConfigError, DataError
from dit_fast.utils.files import check_output, digest_json, file_facts, prepare_folder, write_atomically
from dit_fast.utils.locks import FolderLock
from dit_fast.utils.options import REQUIRED, check_options, documented, option
from dit_fast.utils.schema import brief
from dit_fast.utils.values import SIDE, SOURCE, TEXT, Whole, check_memory

# A row of a shard holds the moments of the plain image, then those of the mirrored one.
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
        """Conversion of files to pixels."""
        return Conversion(self.background, self.raw_pixels)


@dataclass(frozen=True)
class Listing:
    """The images of a set, in the order of their `names` relative to the folder."""

    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    sizes: tuple[int, ...]
    texts: tuple[str, ...]
    shard_size: int

    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.paths) // self.shard_size)

    def rows(self, shard: int) -> range:
        """Images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.paths)))

    def digest(self, rows: range) -> str:
        """SHA-256 of the names, file sizes, labels and captions of `rows`."""
        part = slice(rows.start, rows.stop)
        texts = [self.texts[part]] if self.texts else []
        return digest_json([self.names[part], self.sizes[part], self.labels[part], *texts])

    def embeddings(
        self, captions: CaptionEncoder, rows: range, batch_size: int, dtype: str
    ) -> Iterator[Tensor]:
        """Yield embeddings (b, S, E) in `dtype` of the captions of `rows`, up to `batch_size` at a time.

        Raises:
            DataError: an embedding overflows `dtype`.
        """
        for start in range(rows.start, rows.stop, batch_size):
            part = slice(start, min(start + batch_size, rows.stop))
            stored = captions(self.names[part], self.texts[part]).to(getattr(torch, dtype))
            if not stored.isfinite().all():
                bad = (~stored.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
                raise DataError(
                    f"{self.paths[start + bad[0]]}: its caption's embedding is not finite in {dtype} ({len(bad)} in "
                    f"this batch); give --dtype float32"
                )
            yield stored


def list_images(
    root: Path, shard_size: int, captions: CaptionEncoder | None, labeled: bool = True
) -> Listing:
    """List the images below `root`, with classes, with `captions`, or neither.

    Raises:
        DataError: as `list_classes`, `list_captioned` and `EmbeddingFile.match`.
    """
    texts: list[str] = []
    if captions is None:
        class_names, paths, labels = list_classes(root, labeled)
    else:
        paths, texts = list_captioned(root, captions.reads_texts)
        class_names, labels = ["captions"], [0] * len(paths)
    names = relative_names(root, paths)
    if isinstance(captions, EmbeddingFile):
        captions.match(names)
    sizes = tuple(path.stat().st_size for path in paths)
    return Listing(tuple(class_names), tuple(paths), names, tuple(labels), sizes, tuple(texts), shard_size)


@dataclass(frozen=True)
class EncodeResult:
    """Result of `encode`.

    Args:
        out: folder of the set.
        images: images in the set.
        encoded: shards that this rank encoded.
        kept: shards of this rank that were complete before.
        missing: shards that other ranks have not encoded yet.
        unreadable: files that the set does not contain, and the reasons; of a complete set all, else those of this
            rank.
    """

    out: Path
    images: int
    encoded: int
    kept: int
    missing: int
    unreadable: dict[str, str]

    @property
    def complete(self) -> bool:
        """Whether the set is complete."""
        return self.missing == 0


def encode(config: EncodeConfig, rank: int = 0, world_size: int = 1) -> EncodeResult:
    """Encode the shards of one rank; a rank that finds the set complete writes its manifest.

    Args:
        config: the configuration, equal on all ranks.
        rank: rank of this process.
        world_size: number of ranks.

    Returns:
        what was encoded, kept and is still missing.

    Raises:
        DataError: images are missing or unreadable (shards without them are still encoded), or `out` holds another
            set.
        ConfigError: the size does not fit the autoencoder, or `rank` is out of range.
        CheckpointError: the autoencoder or the text encoder cannot be loaded.
        OutputError: the disk is full or not writable, or another process encodes to `out`.
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
            f"--image-size {config.image_size} is not a multiple of {encoder.factor}, the autoencoder's downsampling "
            f"factor; give {max(1, round(config.image_size / encoder.factor)) * encoder.factor}"
        )
    own = range(rank, listing.shards(), world_size)
    run = _Run(config, listing, encoder, captions, out, own)
    with FolderLock(out, "encode", rank):
        return _encode(run, rank, world_size)


def _encode(run: "_Run", rank: int, world_size: int) -> EncodeResult:
    out, listing, own = run.out, run.listing, run.own
    run.agree()
    # All ranks write these small files; a temporary file older than a minute belongs to a killed rank.
    remove_leftovers(out, (SETTINGS, LABELS, NAMES, TEXTS, MANIFEST), 0 if world_size == 1 else 60)
    remove_leftovers(out, [name for shard in own for name in _shard_files(shard)])
    done = [shard for shard in own if run.is_whole(shard)]
    todo = [shard for shard in own if shard not in set(done)]
    if todo:
        # The manifest guarantees every shard: remove it before the first of them is replaced.
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


@dataclass
class _Run:
    """The shards of one rank. `frames` collects the names of files with several frames or pages."""

    config: EncodeConfig
    listing: Listing
    encoder: LatentEncoder
    captions: CaptionEncoder | None
    out: Path
    own: range
    frames: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that all shards of a set have in common."""
        return {
            "vae_sha256": self.encoder.sha256,
            "image_size": self.config.image_size,
            "dtype": self.config.dtype,
            "precision": self.config.precision,
            "shard_size": self.config.shard_size,
            # Absent for raw pixels: sets that are older than the option were encoded so, and can be resumed.
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
        """Compare the settings with those that the set was begun with, or write them for a new set."""
        path = self.out / SETTINGS
        try:
            begun = read_sealed(path, SETTINGS_CHECK)
        except FileNotFoundError:
            write_sealed(path, {"format": FORMAT, "vae": self.encoder.identity(), "settings": self.settings})
            # Read back: of several ranks that start at once, each then compares with the file that stayed.
            begun = read_sealed(path, SETTINGS_CHECK)
        there, here = begun["settings"], self.settings
        if there["vae_sha256"] != here["vae_sha256"]:
            raise DataError(
                f"{self.out} was begun with the autoencoder {begun['vae']['name']} (SHA-256 "
                f"{there['vae_sha256'][:12]}), --vae {self.config.vae} is another (SHA-256 "
                f"{here['vae_sha256'][:12]}); give the first one or another --out"
            )
        if there != here:
            changed = [
                f"{key} is {brief(there.get(key))} there, {value} here"
                for key, value in here.items()
                if there.get(key) != value
            ]
            raise DataError(
                f"{self.out} was begun with other settings: {'; '.join(changed)}; give another --out"
            )
        if (self.out / MANIFEST).exists():
            whole = read_sealed(self.out / MANIFEST, MANIFEST_CHECK)
            if whole["listing_sha256"] != self._listing_digest():
                raise DataError(
                    f"{self.out} is a finished set of {whole['images']} images that are not those of "
                    f"{self.config.data} ({len(self.listing.paths)} images); give another --out"
                )

    def is_whole(self, shard: int) -> bool:
        """Whether the shard exists, with these images and settings, and matches the SHA-256 in its record."""
        record = self._record(shard)
        if record is None or len(record.get("unreadable", {})) > self.config.skip_unreadable:
            return False
        files = [(self.out / shard_name(shard), record["file"])]
        if self.captions is not None:
            files.append((self.out / caption_name(shard), record["captions"]))
        return all(
            file.is_file() and file.stat().st_size == facts["bytes"] and file_facts(file, DataError) == facts
            for file, facts in files
        )

    def bytes_to_come(self, todo: Sequence[int]) -> int:
        """Size of the shards `todo` and of those that other ranks will write: all ranks fill one disk."""
        absent = {shard for shard in range(self.listing.shards()) if self._record(shard) is None}
        shapes = [shape(shard) for shard in absent | set(todo) for shape in (self.shape, self.caption_shape)]
        return sum(npy_bytes(shape, self.config.dtype) for shape in shapes)

    def encode_all(self, shards: Sequence[int], kept: int, title: str) -> None:
        """Encode and publish `shards`.

        Up to `skip_unreadable` of this rank's images may be unreadable. Beyond that, their shards are not written, the
        other shards are, and all unreadable images are reported at the end.
        """
        failures: dict[int, str] = {}
        skipped = len(self.lost(set(self.own).difference(shards)))
        total = kept + sum(len(self.listing.rows(shard)) for shard in shards)
        with (
            ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader,
            tqdm(desc=title, total=total, initial=kept, unit="img", disable=None) as bar,
        ):
            for shard in shards:
                try:
                    skipped += self._encode_shard(shard, reader, bar, self.config.skip_unreadable - skipped)
                except UnreadableError as error:
                    failures |= error.reasons
        warn_of_frames(Path(self.config.data), self.frames, every_rank=True)
        if failures:
            count = len(failures) + skipped
            raise DataError(
                f"{self.config.data}: {count} of {total} images cannot be read: "
                f"{list_failures(self.listing.paths, failures)}; replace or remove them, or skip them with "
                f"--skip-unreadable {count}, and run the same command again (shards without them are kept)"
            )

    def lost(self, shards: Iterable[int]) -> dict[int, str]:
        """Rows of complete `shards` whose images could not be read, and the reasons."""
        records = {shard: self._record(shard) for shard in shards}
        return {
            self.listing.rows(shard)[int(place)]: reason
            for shard, record in records.items()
            if record is not None
            for place, reason in record.get("unreadable", {}).items()
        }

    def finish(self) -> int:
        """Write the manifest if all shards are complete; returns the number of those that are not."""
        records = [self._record(shard) for shard in range(self.listing.shards())]
        missing = sum(record is None for record in records)
        if missing:
            return missing
        lost = self.lost(range(self.listing.shards()))
        if len(lost) > self.config.skip_unreadable:
            raise DataError(
                f"{self.config.data}: {len(lost)} images cannot be read: {list_failures(self.listing.paths, lost)}; "
                f"replace or remove them, or skip them with --skip-unreadable {len(lost)}, and run the same "
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
        write_sealed(
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
        """The record of a shard, if it exists and has these images and settings."""
        try:
            record = read_sealed(self.out / record_name(shard), RECORD_CHECK)
        except (FileNotFoundError, DataError):
            return None
        return (
            record
            if {key: record.get(key) for key in ("settings", "images")} == self._identity(shard)
            else None
        )

    def _identity(self, shard: int) -> dict[str, Any]:
        return {"settings": self.settings, "images": self.listing.digest(self.listing.rows(shard))}

    def _encode_shard(self, shard: int, reader: ThreadPoolExecutor, bar: Any, allowed: int) -> int:
        """Encode and publish a shard; returns the number of its images that could not be read.

        Raises:
            UnreadableError: there are more than `allowed`.
        """
        lost: dict[int, str] = {}
        # Without its record, a shard that is only partly replaced is not taken for a complete one.
        (self.out / record_name(shard)).unlink(missing_ok=True)
        file = publish(
            self.out / shard_name(shard),
            lambda file: lost.update(self._write_shard(file, shard, reader, bar, allowed)),
        )
        facts = {"file": file}
        if self.captions is not None:
            facts["captions"] = publish(
                self.out / caption_name(shard), lambda file: self._write_captions(file, shard)
            )
        first = self.listing.rows(shard).start
        if lost:
            facts["unreadable"] = {str(row - first): reason for row, reason in lost.items()}
        write_sealed(self.out / record_name(shard), {"format": FORMAT, **self._identity(shard), **facts})
        return len(lost)

    def _write_captions(self, file: HashingFile, shard: int) -> None:
        assert self.captions is not None
        write_npy_header(file, self.caption_shape(shard), self.config.dtype)
        rows, config = self.listing.rows(shard), self.config
        for stored in self.listing.embeddings(self.captions, rows, config.batch_size, config.dtype):
            file.write(stored.numpy().data.cast("B"))

    def _write_shard(
        self, file: HashingFile, shard: int, reader: ThreadPoolExecutor, bar: Any, allowed: int
    ) -> dict[int, str]:
        """Write the moments of a shard, NaN for unreadable rows; returns those rows and the reasons."""
        shape = self.shape(shard)
        write_npy_header(file, shape, self.config.dtype)
        lost: dict[int, str] = {}
        for rows, images, failures in self._read(shard, reader):
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
        self, shard: int, reader: ThreadPoolExecutor
    ) -> Iterator[tuple[range, list[Tensor | None], dict[int, str]]]:
        """Yield batches of uint8 images; the next one is decoded while the caller processes the current one."""
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
            self.frames.extend(
                self.listing.names[row] for row, one in zip(batch, read, strict=True) if one and one[1]
            )
            return [None if one is None else one[0] for one in read], failures

        # One batch ahead: the decoder threads work while the autoencoder does, and memory holds two batches.
        ahead = reader.submit(load, batches[0])
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            images, failures = ahead.result()
            if following is not None:
                ahead = reader.submit(load, following)
            yield batch, images, failures

    def _moments(self, rows: Sequence[int], images: Tensor) -> Tensor:
        """Encode uint8 images (B, C, H, W) to moments (B, flips, 2, C, H, W) in the stored dtype, on the CPU."""
        # Transferred as uint8, a quarter of the bytes, and converted on the device.
        pixels = images.to(self.encoder.device).float().div_(127.5).sub_(1.0)
        moments = torch.stack([self.encoder(pixels.flip(-1) if flip else pixels) for flip in _FLIPS], dim=1)
        stored = moments.to(getattr(torch, self.config.dtype))
        bad = (~stored.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            path = self.listing.paths[rows[bad[0]]]
            # Finite before the conversion to the stored dtype, so that the dtype is at fault, not the autoencoder.
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
    """Write the embedding of each image's caption to the .safetensors file `config.out`.

    Arrays are (tokens, width), without padding, and named as the images; the metadata state the encoder. All embeddings
    are kept in memory until they are written.

    Args:
        config: the configuration.
        world_size: number of ranks, which must be 1.

    Returns:
        number of captions.

    Raises:
        ConfigError: `out` is not a .safetensors file, there is no text encoder, or several ranks.
        DataError: captions are missing or not finite.
        OutputError: the file cannot be written.
    """
    out = Path(config.out)
    if out.suffix != ".safetensors":
        raise ConfigError(
            f"--out {out}: --vae none writes only embeddings of captions, to a file that ends in .safetensors"
        )
    if world_size > 1:
        raise ConfigError("--vae none runs in one process, not under torchrun")
    captions = open_encoder(config.text_encoder, config.caption_tokens, config.device)
    if captions is None:
        raise ConfigError("--vae none writes only embeddings of captions: give --text-encoder")
    check_output(out)
    listing = list_images(Path(config.data), config.shard_size, captions)
    embeddings: dict[str, Tensor] = {}
    with tqdm(total=len(listing.names), desc="encoding captions", disable=None) as bar:
        rows = range(len(listing.names))
        for batch in listing.embeddings(captions, rows, config.batch_size, config.dtype):
            for tokens in batch:
                # Padding is at the end; a caption without any nonzero token keeps one, since arrays are not empty.
                used = (tokens != 0).any(dim=1).nonzero()
                length = int(used[-1]) + 1 if len(used) else 1
                embeddings[array_name(listing.names[len(embeddings)])] = tokens[:length].clone()
            bar.update(len(batch))
    prepare_folder(out.parent, sum(tokens.nbytes for tokens in embeddings.values()))
    encoder = json.dumps(captions.identity())
    write_atomically(out, lambda temporary: save_file(embeddings, temporary, metadata={"encoder": encoder}))
    return len(embeddings)
