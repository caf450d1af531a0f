"""Grids of samples of the averaged weights, from the same noise each time, so that they can be compared."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_fast.data import LatentSet
from dit_fast.errors import DitFastError
from dit_fast.files import write_atomically
from dit_fast.interop.vae import LatentDecoder
from dit_fast.sampling import draw_grid, save_grid, short_label, to_uint8
from dit_fast.sampling.grid import on_paper
from dit_fast.training.samples import AverageSampler, open_decoder
from dit_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)
MOST_ROWS, PER_ROW, GUIDANCE = 8, 8, 4.0


class SampleGrids:
    """Draws `PER_ROW` samples of up to `MOST_ROWS` classes or training captions, or of nothing, with the trainer's
    averaged weights.

    Of a run with buckets they are of all its shapes, at least one each, side by side.
    Latents are decoded by the autoencoder that made them, where it can be loaded; else their first three channels
    are shown.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.sampler = AverageSampler(trainer, GUIDANCE)
        count = min(MOST_ROWS, self.sampler.choices)
        self.choices = [row * self.sampler.choices // count for row in range(count)]
        self.names = self.sampler.names(self.choices)
        self.decoder: LatentDecoder | None = None
        try:
            self.decoder = open_decoder(trainer)
        except DitFastError as error:
            logger.warning("--sample-every: latents are shown without decoding them: %s", error)

    def draw(self, path: Path) -> None:
        """Write a labelled grid to the PNG `path`, and captions in full to captions.txt beside it.

        Each rank must call it, since it holds a part; the first draws.
        """
        first = self.trainer.world.is_first
        with self.sampler.averages(first):
            if not first:
                return
            count = max(1, PER_ROW // len(self.sampler.sizes))
            choices = torch.tensor(self.choices).repeat_interleave(count)
            drawn = [self.sampler.draw(choices, bucket=bucket) for bucket in range(len(self.sampler.sizes))]
        shapes = [to_uint8(self._decode(samples)) for samples in drawn]
        height, width = (max(images.shape[axis] for images in shapes) for axis in (1, 2))
        tiles = [on_paper(images, height, width) for images in shapes]
        rows = [
            (short_label(name), np.concatenate([images[row * count : (row + 1) * count] for images in tiles]))
            for row, name in enumerate(self.names)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_grid(draw_grid(rows), temporary))
        if self.trainer.model.caption_dim:
            lines = "".join(" ".join(name.split()) + "\n" for name in self.names)
            write_atomically(path.parent / "captions.txt", lambda file: file.write_text(lines, "utf-8"))

    def _decode(self, drawn: Tensor) -> Tensor:
        data = self.trainer.data
        if not isinstance(data, LatentSet):
            return drawn
        if self.decoder is not None:
            return self.decoder(drawn, data.posterior.shift, data.posterior.scale)
        # Latents have unit variance, hence lie within three.
        return drawn[:, :3] / 3 if drawn.shape[1] >= 3 else drawn[:, :1] / 3
