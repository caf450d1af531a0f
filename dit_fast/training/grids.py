"""Grids of samples of the averaged weights, from the same noise each time, so that they can be compared."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from dit_fast.data import LatentSet
from dit_fast.errors import DitFastError
from dit_fast.interop.vae import LatentDecoder
from dit_fast.models import load_weights
from dit_fast.sampling import (
    Guidance,
    Sampler,
    SamplerConfig,
    default_solver,
    draw_grid,
    sampling_nodes,
    to_uint8,
)
from dit_fast.training.config import build_model
from dit_fast.training.parallel import whole
from dit_fast.training.precision import AUTOCAST
from dit_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)
MOST_CLASSES, PER_CLASS, GUIDANCE = 8, 8, 4.0


class SampleGrids:
    """Draws `PER_CLASS` samples of up to `MOST_CLASSES` classes, or of none, with the trainer's averaged weights.

    Latents are decoded by the autoencoder that made them, where it can be loaded; else their first three channels
    are shown.
    """

    def __init__(self, trainer: Trainer):
        config, data = trainer.config, trainer.data
        self.trainer = trainer
        classes = trainer.model.num_classes
        self.names = data.class_names if classes else ("samples",)
        count = min(MOST_CLASSES, len(self.names))
        self.classes = [index * len(self.names) // count for index in range(count)]
        objective = config.objective_arguments()
        self.solver = default_solver(objective)
        steps = min(config.sample_steps, objective.get("diffusion_steps", config.sample_steps))
        self.nodes = sampling_nodes(objective, steps, self.solver, learn_sigma=bool(config.learn_sigma))
        self.decoder = self._open_decoder(data) if isinstance(data, LatentSet) else None

    def draw(self, path: Path) -> None:
        """Write a labelled grid to the PNG `path`. Each rank must call it, since it holds a part; the first draws."""
        trainer = self.trainer
        config, data = trainer.config, trainer.data
        averages = {name: whole(tensor) for name, tensor in trainer.ema_state().items()}
        if not trainer.world.is_first:
            return
        # Made on no device: the averages themselves become its parameters.
        with torch.device("meta"):
            model = build_model(config, data)
        load_weights(model, averages, "the averaged weights", assign=True)
        labels = torch.tensor(self.classes).repeat_interleave(PER_CLASS)
        sampler = Sampler(
            model,
            self.nodes,
            SamplerConfig(
                solver=self.solver,
                guidance=Guidance(1.0 if model.null_class is None else GUIDANCE, channels=None),
                clip=not isinstance(data, LatentSet),
                graph="never",
            ),
        )
        low = AUTOCAST.get(config.precision)
        with torch.autocast(trainer.device.type, low or torch.bfloat16, enabled=low is not None):
            drawn = sampler(labels, seed=config.seed).cpu()
        images = to_uint8(self._decode(drawn))
        rows = [
            (self.names[label], images[row * PER_CLASS : (row + 1) * PER_CLASS])
            for row, label in enumerate(self.classes)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(rows).save(path)

    def _decode(self, drawn: Tensor) -> Tensor:
        if self.decoder is not None:
            return self.decoder(drawn)
        if isinstance(self.trainer.data, LatentSet):
            # Latents have unit variance, hence lie within three.
            return drawn[:, :3] / 3 if drawn.shape[1] >= 3 else drawn[:, :1] / 3
        return drawn

    def _open_decoder(self, data: LatentSet) -> LatentDecoder | None:
        source = data.vae.get("source") or data.vae.get("name")
        try:
            return LatentDecoder(str(source), data.channels, self.trainer.device)
        except DitFastError as error:
            logger.warning("--sample-every: latents are shown without decoding them: %s", error)
            return None
