"""Grids of samples of the averaged weights, from the same noise each time, so that they can be compared."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_fast.data import LatentSet
from dit_fast.errors import DitFastError
from dit_fast.interop.vae import LatentDecoder
from dit_fast.sampling import draw_grid, to_uint8
from dit_fast.sampling.grid import on_paper
from dit_fast.training.samples import AverageSampler, open_decoder
from dit_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)
MOST_CLASSES, PER_CLASS, GUIDANCE = 8, 8, 4.0


class SampleGrids:
    """Draws `PER_CLASS` samples of up to `MOST_CLASSES` classes, or of none, with the trainer's averaged weights.

    Of a run with buckets they are of all its shapes, at least one each, side by side.
    Latents are decoded by the autoencoder that made them, where it can be loaded; else their first three channels
    are shown.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.names = trainer.data.class_names if trainer.model.num_classes else ("samples",)
        count = min(MOST_CLASSES, len(self.names))
        self.classes = [index * len(self.names) // count for index in range(count)]
        self.sampler = AverageSampler(trainer, GUIDANCE)
        self.decoder: LatentDecoder | None = None
        try:
            self.decoder = open_decoder(trainer)
        except DitFastError as error:
            logger.warning("--sample-every: latents are shown without decoding them: %s", error)

    def draw(self, path: Path) -> None:
        """Write a labelled grid to the PNG `path`. Each rank must call it, since it holds a part; the first draws."""
        first = self.trainer.world.is_first
        with self.sampler.averages(first):
            if not first:
                return
            count = max(1, PER_CLASS // len(self.sampler.sizes))
            labels = torch.tensor(self.classes).repeat_interleave(count)
            drawn = [self.sampler.draw(labels, bucket=bucket) for bucket in range(len(self.sampler.sizes))]
        shapes = [to_uint8(self._decode(samples)) for samples in drawn]
        height, width = (max(images.shape[axis] for images in shapes) for axis in (1, 2))
        tiles = [on_paper(images, height, width) for images in shapes]
        rows = [
            (self.names[label], np.concatenate([images[row * count : (row + 1) * count] for images in tiles]))
            for row, label in enumerate(self.classes)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(rows).save(path)

    def _decode(self, drawn: Tensor) -> Tensor:
        data = self.trainer.data
        if not isinstance(data, LatentSet):
            return drawn
        if self.decoder is not None:
            return self.decoder(drawn, data.posterior.shift, data.posterior.scale)
        # Latents have unit variance, hence lie within three.
        return drawn[:, :3] / 3 if drawn.shape[1] >= 3 else drawn[:, :1] / 3
