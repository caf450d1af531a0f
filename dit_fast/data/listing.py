"""The images that are encoded, in their order, with what is told of each: a class, or a caption."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dit_fast.data.captions import (
    EMBEDDINGS,
    CaptionEncoder,
    EmbeddingFile,
    list_captioned,
    relative_names,
)
from dit_fast.data.folder import list_classes
from dit_fast.data.shards import digest_json
from dit_fast.errors import ConfigError, DataError
from dit_fast.interop.text_encoder import TextEncoder


@dataclass(frozen=True)
class Listing:
    """The images of the set in their order, `names` relative to the folder."""

    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    sizes: tuple[int, ...]
    texts: tuple[str, ...]
    shard_size: int

    def shards(self) -> int:
        return -(-len(self.paths) // self.shard_size)

    def rows(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.paths)))

    def digest(self, rows: range) -> str:
        """SHA-256 of the names, file sizes, labels and captions of these images."""
        part = slice(rows.start, rows.stop)
        texts = [self.texts[part]] if self.texts else []
        return digest_json([self.names[part], self.sizes[part], self.labels[part], *texts])

    def embeddings(
        self, captions: CaptionEncoder, rows: range, batch_size: int, dtype: str
    ) -> Iterator[Tensor]:
        """Of the captions of these images, up to `batch_size` at a time, in `dtype`. Raises DataError for overflow."""
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


def open_encoder(name: str | None, tokens: int | None, device: str) -> CaptionEncoder | None:
    """A text encoder by name or folder, or a file of embeddings; None where `name` is. `tokens`: of a caption.

    Raises ConfigError, DataError and what `TextEncoder` raises.
    """
    if name is None:
        if tokens is not None:
            raise ConfigError(
                f"--caption-tokens {tokens} is of captions: give --text-encoder, or leave it out"
            )
        return None
    if Path(name).suffix in EMBEDDINGS:
        return EmbeddingFile(Path(name), tokens)
    return TextEncoder(name, tokens, device)


def list_images(
    root: Path, shard_size: int, captions: CaptionEncoder | None, labelled: bool = True
) -> Listing:
    """The images below `root`; of classes, or not `labelled`, or those that have `captions`."""
    texts: list[str] = []
    if captions is None:
        class_names, paths, labels = list_classes(root, labelled)
    else:
        paths, texts = list_captioned(root, captions.reads_texts)
        class_names, labels = ["captions"], [0] * len(paths)
    names = relative_names(root, paths)
    if isinstance(captions, EmbeddingFile):
        captions.match(names)
    sizes = tuple(path.stat().st_size for path in paths)
    return Listing(tuple(class_names), tuple(paths), names, tuple(labels), sizes, tuple(texts), shard_size)
