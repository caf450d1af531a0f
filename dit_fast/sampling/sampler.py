"""Class-conditional sampling with classifier-free guidance (Ho & Salimans 2022).

Shapes: labels (M,); images or latents (M, C, H, W). Solvers are the DDPM's ancestral steps (Ho et al. 2020,
algorithm 2) and DDIM (Song et al. 2020, equation 12), both over the respaced process of `diffusion`.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dit_fast.diffusion import GaussianDiffusion
from dit_fast.errors import ConfigError, NonFiniteError
from dit_fast.models import DiT

SOLVERS = ("ddpm", "ddim")
MODES = ("reference", "fast")
_LOG_SECONDS = 10.0


def check_request(
    model: DiT,
    labels: Tensor,
    cfg_scale: float,
    cfg_channels: int | None = 3,
    solver: str = "ddpm",
    eta: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> None:
    """ConfigError when `sample` cannot do what these arguments ask for."""
    num_classes = model.y_embedder.num_classes
    if labels.ndim != 1 or labels.numel() == 0 or labels.dtype.is_floating_point:
        raise ConfigError(f"labels are {labels.dtype} {tuple(labels.shape)}, expected one integer per image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ConfigError(
            f"label {low if low < 0 else high} is out of range: the model has {num_classes} classes, "
            f"0 to {num_classes - 1}"
        )
    if not math.isfinite(cfg_scale) or cfg_scale < 0:
        raise ConfigError(
            f"guidance scale {cfg_scale}: choose a finite number of at least 0 (1 is no guidance)"
        )
    if cfg_scale != 1 and model.y_embedder.dropout_prob == 0:
        raise ConfigError(
            f"guidance scale {cfg_scale} needs a model trained with label dropout, this one was trained "
            "without it (class_dropout_prob 0): use scale 1"
        )
    if cfg_channels is not None and cfg_channels < 1:
        raise ConfigError(f"guided channels {cfg_channels}: choose at least 1, or all")
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}: choose {' or '.join(SOLVERS)}")
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta {eta}: choose a number from 0 (deterministic) to 1")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed {seed}: choose a number from 0 to 2**63 - 1")
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: choose at least 1")


def batch_seed(seed: int, first: int) -> int:
    """Seed of the batch whose first image has index `first`; the first batch has `seed` itself."""
    if first == 0:
        return seed
    return int(np.random.SeedSequence((seed, first)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sample(
    model: DiT,
    diffusion: GaussianDiffusion,
    labels: Tensor | Iterable[int],
    *,
    cfg_scale: float = 4.0,
    cfg_channels: int | None = 3,
    solver: str = "ddpm",
    eta: float = 0.0,
    clip_denoised: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    mode: str = "reference",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Tensor:
    """Draw one image (or latent) for each label; float32 (M, C, H, W) on the CPU.

    cfg_scale      eps = uncond + scale * (cond - uncond); at 1 only the conditional branch is run
    cfg_channels   how many noise channels are guided: the reference's 3, None for all
    solver, eta    "ddpm", or "ddim" with its share of fresh noise (0: deterministic)
    clip_denoised  clamp the predicted image to [-1, 1] at every step: for pixel space, not for latents
    seed           of the global generators, which are put back afterwards; a full batch gives the same images
                   whatever is asked for after it
    mode           "reference" draws noise for both guidance branches at every step, as the reference's
    sample.py
                   does after `torch.manual_seed(seed)`; "fast" draws and updates one half only, which gives
                   other images of the same distribution and, with DDIM at eta 0, the same ones

    The model is run in eval mode and left in the mode it was in. Raises ConfigError for a request that the
    model cannot meet and NonFiniteError when it answers NaN or infinity.
    """
    labels = torch.as_tensor(labels if isinstance(labels, Tensor) else list(labels))
    check_request(model, labels, cfg_scale, cfg_channels, solver, eta, seed, batch_size)
    if mode not in MODES:
        raise ConfigError(f"unknown sampling mode {mode!r}: choose {' or '.join(MODES)}")
    device = model.pos_embed.device if device is None else torch.device(device)

    chunks = labels.split(batch_size)
    was_training = model.training
    model.eval()
    images = []
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            steps = _Progress(diffusion.num_timesteps, len(labels), progress)
            for number, chunk in enumerate(chunks):
                torch.manual_seed(batch_seed(seed, number * batch_size))
                run = _trajectory(
                    model,
                    diffusion,
                    chunk.to(device),
                    cfg_scale,
                    cfg_channels,
                    solver,
                    eta,
                    clip_denoised,
                    mode,
                )
                images.append(steps.follow(run, len(chunk)).float().cpu())
            steps.close()
    finally:
        model.train(was_training)
    result = torch.cat(images)
    broken = int((~result.isfinite()).flatten(1).any(dim=1).sum())
    if broken:
        raise NonFiniteError(
            f"{broken} of {len(result)} samples have NaN or infinite values: damaged weights or too low a "
            "precision"
        )
    return result


def _trajectory(
    model: DiT,
    diffusion: GaussianDiffusion,
    labels: Tensor,
    cfg_scale: float,
    cfg_channels: int | None,
    solver: str,
    eta: float,
    clip_denoised: bool,
    mode: str,
) -> Iterator[Tensor]:
    """The states of one batch, (n, C, H, W), after each step from noise to image."""
    n = len(labels)
    noise = torch.randn(n, model.in_channels, *model.x_embedder.img_size, device=labels.device)
    model_kwargs: dict[str, Any] = {"y": labels}
    denoiser: Callable[..., Tensor] = model.forward
    if cfg_scale != 1:
        null = torch.full_like(labels, model.y_embedder.num_classes)
        model_kwargs = {"y": torch.cat([labels, null]), "cfg_scale": cfg_scale, "cfg_channels": cfg_channels}
        if mode == "reference":
            denoiser = model.forward_with_cfg
            noise = torch.cat([noise, noise])
        else:

            def denoiser(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
                return model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), **kwargs)[:n]

    loop = diffusion.p_sample_loop_progressive if solver == "ddpm" else diffusion.ddim_sample_loop_progressive
    options: dict[str, Any] = {} if solver == "ddpm" else {"eta": eta}
    for state in loop(
        denoiser,
        noise.shape,
        noise,
        clip_denoised=clip_denoised,
        model_kwargs=model_kwargs,
        device=labels.device,
        progress=False,
        **options,
    ):
        yield state["sample"][:n]


class _Progress:
    """A bar over image-steps on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, num_steps: int, num_images: int, show: bool) -> None:
        self.num_steps = num_steps
        self.num_images = num_images
        self.finished = 0
        self.started = self.logged = time.monotonic()
        self.show = show
        terminal = show and sys.stderr.isatty()
        self.bar = tqdm(total=num_images * num_steps, desc="sampling", unit="step", disable=not terminal)

    def follow(self, trajectory: Iterator[Tensor], n: int) -> Tensor:
        """Run one batch of `n` images to its end and return its last state."""
        for step, latest in enumerate(trajectory, start=1):
            state = latest
            self.bar.update(n)
            now = time.monotonic()
            if self.show and self.bar.disable and now - self.logged > _LOG_SECONDS:
                self.logged = now
                done = (self.finished + n * step / self.num_steps) / self.num_images
                left = (now - self.started) * (1 - done) / done
                print(
                    f"sampling: {self.finished} of {self.num_images} images done, "
                    f"step {step} of {self.num_steps}, {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )
        self.finished += n
        return state

    def close(self) -> None:
        self.bar.close()
