"""Samples of the averaged weights while a run goes on, from noise that is a function of the sample's number alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dit_fast.data import LatentSet, Size
from dit_fast.errors import ConfigError
from dit_fast.interop.vae import LatentDecoder
from dit_fast.models import DiT, load_weights
from dit_fast.sampling import Guidance, Sampler, SamplerConfig, default_solver, sampling_nodes
from dit_fast.training.config import build_model
from dit_fast.training.parallel import whole
from dit_fast.training.precision import AUTOCAST
from dit_fast.training.trainer import Trainer


class AverageSampler:
    """Draws with the averaged weights as they are at the time, by `sample_steps` levels of the run's objective.

    `sizes`: what it draws, the run's buckets or the model's own size.
    """

    def __init__(self, trainer: Trainer, guidance: float):
        config = trainer.config
        if trainer.model.caption_dim:
            raise ConfigError(
                "--sample-every and --evaluate-every draw classes, and the model is told captions: leave them out "
                "and use dit-fast sample --prompt"
            )
        objective = config.objective_arguments()
        solver = default_solver(objective)
        steps = min(config.sample_steps, objective.get("diffusion_steps", config.sample_steps))
        self.trainer = trainer
        self.sizes: tuple[Size, ...] = trainer.data.buckets or (trainer.model.x_embedder.img_size,)
        self.nodes = sampling_nodes(objective, steps, solver, learn_sigma=bool(config.learn_sigma))
        self.config = SamplerConfig(
            solver=solver,
            guidance=Guidance(guidance if trainer.model.has_null else 1.0, channels=None),
            clip=not isinstance(trainer.data, LatentSet),
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

    def draw(self, labels: Tensor, numbers: Tensor | None = None, bucket: int = 0) -> Tensor:
        """Images, or latents as the model knows them, float32 (M, C, H, W) on the CPU, of labels (M,).

        Of `sizes[bucket]`. Each size has a seed of its own, the run's and one more for each before it.
        """
        config, device = self.trainer.config, self.trainer.device
        low = AUTOCAST.get(config.precision)
        with torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None):
            return self._samplers[bucket](labels, seed=config.seed + bucket, numbers=numbers).cpu()

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
    return LatentDecoder(str(data.vae.get("source") or data.vae.get("name")), data.channels, trainer.device)
