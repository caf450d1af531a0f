"""Frechet distance between samples of the averaged weights and real images, while a run goes on."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast import keyed
from dit_fast.data import LatentSet, apportion
from dit_fast.errors import ConfigError, DitFastError
from dit_fast.evaluation import (
    Activations,
    Quality,
    SavedStatistics,
    StreamingStatistics,
    check_reference,
    collect,
    open_extractor,
    open_reference,
    score,
)
from dit_fast.sampling import to_uint8
from dit_fast.training.samples import AverageSampler, open_decoder
from dit_fast.training.trainer import Trainer
from dit_fast.training.world import is_lost_connection

_BATCH = 64


class EvaluationError(DitFastError):
    """Samples that could not be drawn, are not finite, or could not be measured."""


class Evaluation:
    """Scores `evaluate_samples` unguided samples of random classes, or of random captions of training samples, with the
    trainer's averaged weights.

    Of a run with buckets they have the buckets' shapes, in the proportion of the training images, and are compared with
    all real images in theirs.
    What is drawn and its noise are functions of seed and sample number, the same each time and for any number of ranks,
    which share the samples. Nothing that training draws is touched. Every rank has one; the first has the reference.
    Raises the errors of `open_reference`, `open_extractor` and `LatentDecoder`, and ConfigError for latents without
    images to compare them with.
    """

    def __init__(self, trainer: Trainer):
        config, world = trainer.config, trainer.world
        self.trainer = trainer
        if config.evaluate_samples < world.size:
            raise ConfigError(
                f"--evaluate-samples {config.evaluate_samples}: give one for each rank, {world.size}"
            )
        if config.evaluate_against is None and isinstance(trainer.data, LatentSet) and config.vae is None:
            raise ConfigError(
                f"--evaluate-every: {config.data} holds latents; give real images or their statistics with "
                "--evaluate-against"
            )
        against = config.evaluate_against or config.data
        # As the training images were read, by the run or by dit-fast encode.
        self.conversion = trainer.data.conversion or config.conversion()
        self.decoder = open_decoder(trainer)
        size = trainer.data.image_size * (1 if self.decoder is None else self.decoder.factor)
        weights = config.evaluate_weights and Path(config.evaluate_weights)
        self.extractor = open_extractor(
            config.evaluate_features,
            trainer.device,
            weights=weights or None,
            labelled=against,
            image_size=size,
            conversion=self.conversion,
        )
        self.sampler = AverageSampler(trainer, guidance=1.0)
        self.reference: SavedStatistics = world.first(lambda: self._reference(against, size))
        shares = apportion(config.evaluate_samples, list(trainer.data.shapes.values()) or [1])
        # In the order of the buckets; samples of one are numbered from 0.
        self.bucket_of = torch.arange(len(shares)).repeat_interleave(torch.tensor(shares))[
            world.rank :: world.size
        ]
        self.numbers = torch.cat([torch.arange(share) for share in shares])[world.rank :: world.size]

    def score(self) -> Quality:
        """The distance now. Raises EvaluationError on every rank where one could not draw or measure its samples."""
        world = self.trainer.world
        with self.sampler.averages():
            try:
                features: Tensor | str = self._features()
            except Exception as error:
                if isinstance(error, RuntimeError) and is_lost_connection(error):
                    raise
                # The other ranks wait in the exchange below.
                features = " ".join(str(error).split()) or type(error).__name__
        found = world.gather(features)
        for rank, other in enumerate(found):
            if isinstance(other, str):
                raise EvaluationError(f"rank {rank}: {other}" if world.size > 1 else other)
        # In the order of the samples' numbers, whatever rank drew them.
        every = torch.empty(sum(map(len, found)), found[0].shape[1])
        for rank, own in enumerate(found):
            every[rank :: world.size] = own
        moments = StreamingStatistics()
        moments.update(every)
        statistics = SavedStatistics(moments.finish(), None, self.extractor.name)
        samples = Activations(statistics, every, None)
        return score(samples, self.reference, None, self.extractor.proxy, ["fid"])

    def _features(self) -> Tensor:
        """Of this rank's samples, (m, D) on the CPU."""
        kept = []
        for bucket in range(len(self.sampler.sizes)):
            for numbers in self.numbers[self.bucket_of == bucket].split(_BATCH):
                if len(numbers):
                    images = torch.from_numpy(self._draw(numbers, bucket)).permute(0, 3, 1, 2)
                    kept.append(
                        self.extractor(images.expand(-1, 3, -1, -1).contiguous()).pooled.float().cpu()
                    )
        return torch.cat(kept)

    def _draw(self, numbers: Tensor, bucket: int) -> np.ndarray:
        """Samples of a bucket as uint8 (m, H, W, C)."""
        data = self.trainer.data
        key = keyed.key(self.trainer.config.seed + bucket, "sampling labels")
        choices = keyed.integers(key, numbers, self.sampler.choices)
        drawn = self.sampler.draw(choices, numbers, bucket)
        if self.decoder is not None and isinstance(data, LatentSet):
            drawn = self.decoder(drawn, data.posterior.shift, data.posterior.scale)
        return to_uint8(drawn)

    def _reference(self, against: str, size: int) -> SavedStatistics:
        config = self.trainer.config
        opened = open_reference(
            against, size, config.num_workers or os.cpu_count() or 1, config.bucket_sizes(), self.conversion
        )
        if opened.statistics is not None:
            check_reference(opened.statistics, self.extractor.name, self.extractor.proxy)
            return opened.statistics
        assert opened.images is not None
        return collect(opened.images, self.extractor).statistics


def score_line(step: int, quality: Quality) -> dict[str, Any]:
    """What log.jsonl says of a score: step, extractor, numbers of images, and fid, or proxy_fid by other features."""
    kept = {name: value for name, value in quality.as_json().items() if value is not None and name != "notes"}
    return {"step": step, **kept}
