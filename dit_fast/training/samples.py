"""Samples of the averaged weights while a run goes on, from noise that is a function of the sample's number alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dit_fast.data import LatentSet, Size
from dit_fast.interop.vae import LatentDecoder, check_autoencoder
from dit_fast.models import DiT, load_weights
from dit_fast.sampling import Guidance, Sampler, SamplerConfig, default_solver, sampling_nodes
from dit_fast.training.config import build_model
from dit_fast.training.parallel import whole
from dit_fast.training.precision import AUTOCAST
from dit_fast.training.trainer import Trainer


class AverageSampler:
    """Draws with the averaged weights as they are at the time, by `sample_steps` levels of the run's objective.

    `choices`: how many classes there are to draw, or captions of training samples; 1 where the model is told nothing.
    `sizes`: of what it draws, the run's buckets or the model's own.
    """

    def __init__(self, trainer: Trainer, guidance: float):
        config, data = trainer.config, trainer.data
        self.choices = len(data.train) if trainer.model.caption_dim else max(trainer.model.num_classes, 1)
        objective = config.objective_arguments()
        solver = default_solver(objective)
        steps = min(config.sample_steps, objective.get("diffusion_steps", config.sample_steps))
        self.trainer = trainer
        self.sizes: tuple[Size, ...] = data.buckets or (trainer.model.x_embedder.img_size,)
        self.nodes = sampling_nodes(objective, steps, solver, learn_sigma=bool(config.learn_sigma))
        self.config = SamplerConfig(
            solver=solver,
            guidance=Guidance(guidance if trainer.model.has_null else 1.0, channels=None),
            clip=not isinstance(data, LatentSet),
            graph="never",
        )
        self._samplers: list[Sampler] = []

    @contextmanager
    def averages(self, draws: bool = True) -> Iterator[None]:
        """Inside, `draw` has the averages. Each rank must enter, since it holds a part; those with `draws` can draw."""
        averages = {name: whole(tensor) for name, tensor in self.trainer.ema_state().items()}
        if not draws:
            yield
            return
        try:
            self._samplers = [
                Sampler(self._model(averages, size), self.nodes, self.config) for size in self.sizes
            ]
            yield
        finally:
            # Training goes on without the memory that they take.
            self._samplers = []

    def names(self, choices: Sequence[int]) -> list[str]:
        """What is drawn, in words."""
        data, model = self.trainer.data, self.trainer.model
        if not model.caption_dim:
            return [data.class_names[choice] if model.num_classes else "samples" for choice in choices]
        assert data.captions is not None
        return [data.captions.texts[member] for member in data.train.members[list(choices)].tolist()]

    def draw(self, choices: Tensor, numbers: Tensor | None = None, bucket: int = 0) -> Tensor:
        """Images, or latents as the model knows them, float32 (M, C, H, W) on the CPU, of `choices` int64 (M,).

        Of `sizes[bucket]`. Each size has a seed of its own, the run's and one more for each before it.
        """
        config, device = self.trainer.config, self.trainer.device
        told = self.trainer.data.train.told(choices) if self.trainer.model.caption_dim else choices
        low = AUTOCAST.get(config.precision)
        with torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None):
            return self._samplers[bucket](told, seed=config.seed + bucket, numbers=numbers).cpu()

    def _model(self, averages: dict[str, Tensor], size: Size) -> DiT:
        """Made on no device: the averages themselves become its parameters, but for the positions of another size."""
        with torch.device("meta"):
            model = build_model(self.trainer.config, self.trainer.data)
        load_weights(model, averages, "the averaged weights", assign=True)
        return model if size == model.x_embedder.img_size else model.regrid(size)


def open_decoder(trainer: Trainer) -> LatentDecoder | None:
    """The decoder of the autoencoder that made the run's latents; None for pixels. Raises as `LatentDecoder`."""
    data = trainer.data
    if not isinstance(data, LatentSet):
        return None
    name = str(data.vae.get("source") or data.vae.get("name"))
    decoder = LatentDecoder(name, data.channels, trainer.device)
    check_autoencoder(name, decoder, data.describe(), data.name)
    return decoder
