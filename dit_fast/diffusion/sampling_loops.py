"""Whole sampling trajectories: DDPM and DDIM loops over the single steps of `reverse_process`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast.diffusion.reverse_process import CondFn, DenoisedFn, Model, ModelKwargs, ReverseProcess
from dit_fast.errors import ConfigError


class SamplingLoops(ReverseProcess):
    """Loops from noise to data over all timesteps, the last first, without gradients.

    Arguments that the four loops share:
        model, clip_denoised, denoised_fn, cond_fn, model_kwargs: as for `p_sample`.
        shape: shape (N, C, ...) of the data.
        noise: x_T of that shape; drawn as float32 when None. Its type is the type of the result.
        device: where to sample; None means `noise`'s device, or else that of the model's parameters.
        progress: show a tqdm bar.
    All of them raise ConfigError when noise and shape differ or no device can be found.
    """

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples (N, C, ...) by ancestral sampling (DDPM, algorithm 2)."""
        steps = self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress
        )
        return _last_sample(steps)

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what `p_sample` returns, for each step."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        return self._trajectory(step, model, shape, noise, device, progress)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Samples (N, C, ...) by DDIM with noise `eta` from 0 to 1 (DDIM, eq. 12)."""
        steps = self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta
        )
        return _last_sample(steps)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what `ddim_sample` returns, for each step."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.ddim_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)

        return self._trajectory(step, model, shape, noise, device, progress)

    def _trajectory(
        self,
        step: Callable[[Tensor, Tensor], dict[str, Tensor]],
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        if noise is not None and tuple(noise.shape) != tuple(shape):
            raise ConfigError(
                f"noise {tuple(noise.shape)} must have the shape {tuple(shape)} that was asked for"
            )
        if device is None:
            device = noise.device if noise is not None else _device_of(model)
        x = torch.randn(*shape, device=device) if noise is None else noise
        # Rows are views: no step makes a tensor of timesteps on the host.
        timesteps = self._all_timesteps(shape[0], device)
        for i in _reversed_range(self.num_timesteps, progress):
            with torch.no_grad():
                out = step(x, timesteps[i])
            yield out
            x = out["sample"]

    def _all_timesteps(self, batch: int, device: torch.device | str) -> Tensor:
        """Every timestep, repeated for the batch: int64 (steps, batch)."""
        return torch.arange(self.num_timesteps, device=device)[:, None].repeat(1, batch)


def _last_sample(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    for out in steps:
        sample = out["sample"]
    return sample


def _reversed_range(steps: int, progress: bool) -> Any:
    indices = range(steps - 1, -1, -1)
    if not progress:
        return indices
    from tqdm.auto import tqdm

    return tqdm(indices)


def _device_of(model: Model) -> torch.device:
    """The device of a module, or of the module that a bound method belongs to."""
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if parameter is None:
        raise ConfigError("the model has no parameters to tell its device: pass device=... or noise=...")
    return parameter.device
