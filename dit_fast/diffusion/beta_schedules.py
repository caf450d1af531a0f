"""Noise schedules: the variance beta_t that each step of the forward process adds, in float64."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dit_fast.errors import ConfigError
from dit_fast.utils.values import Whole

# DDPM, section 4: the range of the linear schedule for 1000 steps.
_LINEAR_STEPS = 1000
_LINEAR_START = 0.0001
_LINEAR_END = 0.02
# Improved DDPM, eq. 17: the offset that keeps beta from vanishing near t = 0.
_COSINE_OFFSET = 0.008

DIFFUSION_STEPS = Whole(1, 1 << 20)
NoiseSchedule = Literal["linear", "squaredcos_cap_v2"]
NOISE_SCHEDULES = get_args(NoiseSchedule)
_WARMUP_FRACTIONS = {"warmup10": 0.1, "warmup50": 0.5}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> NDArray[np.float64]:
    """The betas (steps,) of a schedule that is defined for any number of steps.

    Args:
        schedule_name: "linear" (DDPM, section 4; scaled so that the last alpha-bar hardly depends on the
            number of steps) or "squaredcos_cap_v2" (Improved DDPM, eq. 17, each beta at most 0.999).
        num_diffusion_timesteps: Number of steps.

    Raises:
        ConfigError: An unknown name, or too few steps for the schedule.
    """
    _check_steps(num_diffusion_timesteps)
    if schedule_name == "linear":
        scale = _LINEAR_STEPS / num_diffusion_timesteps
        if scale * _LINEAR_END > 1:
            least = math.ceil(_LINEAR_STEPS * _LINEAR_END)
            raise ConfigError(
                f"the linear schedule with {num_diffusion_timesteps} diffusion steps has a beta above 1; "
                f"use at least {least} steps, or squaredcos_cap_v2"
            )
        return get_beta_schedule(
            "linear",
            beta_start=scale * _LINEAR_START,
            beta_end=scale * _LINEAR_END,
            num_diffusion_timesteps=num_diffusion_timesteps,
        )
    if schedule_name == "squaredcos_cap_v2":
        return betas_for_alpha_bar(
            num_diffusion_timesteps,
            lambda u: math.cos((u + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2,
        )
    raise ConfigError(f"unknown noise schedule {schedule_name!r}; known: {', '.join(NOISE_SCHEDULES)}")


def get_beta_schedule(
    beta_schedule: str, *, beta_start: float, beta_end: float, num_diffusion_timesteps: int
) -> NDArray[np.float64]:
    """The betas (steps,) of an older schedule, between two given values.

    Args:
        beta_schedule: "linear"; "quad" (linear in the square root); "const" (`beta_end` throughout);
            "warmup10" and "warmup50" (a linear rise over the first 10 % or 50 %, then constant); "jsd" (1/T,
            1/(T-1), ..., 1).
        beta_start: First value where the schedule has one.
        beta_end: Last value where the schedule has one.
        num_diffusion_timesteps: Number of steps.

    Raises:
        ConfigError: An unknown name or number of steps.
    """
    _check_steps(num_diffusion_timesteps)
    steps = num_diffusion_timesteps
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, steps, dtype=np.float64)
    if beta_schedule == "quad":
        return np.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=np.float64) ** 2
    if beta_schedule == "const":
        return np.full(steps, beta_end, dtype=np.float64)
    if beta_schedule == "jsd":
        return 1.0 / np.arange(steps, 0, -1, dtype=np.float64)
    if beta_schedule in _WARMUP_FRACTIONS:
        rising = int(steps * _WARMUP_FRACTIONS[beta_schedule])
        betas = np.full(steps, beta_end, dtype=np.float64)
        betas[:rising] = np.linspace(beta_start, beta_end, rising, dtype=np.float64)
        return betas
    known = ("linear", "quad", "const", "jsd", *_WARMUP_FRACTIONS)
    raise ConfigError(f"unknown beta schedule {beta_schedule!r}; known: {', '.join(known)}")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> NDArray[np.float64]:
    """The betas (steps,) whose products follow a given curve: beta_t = 1 - alpha_bar(t+1) / alpha_bar(t).

    Args:
        num_diffusion_timesteps: Number of steps.
        alpha_bar: The product of (1 - beta) up to time u, for u from 0 to 1.
        max_beta: Upper limit, below 1, against the singularity at the end (Improved DDPM, section 3.2).
    """
    _check_steps(num_diffusion_timesteps)
    steps = num_diffusion_timesteps
    return np.array(
        [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta) for i in range(steps)],
        dtype=np.float64,
    )


def _check_steps(steps: int) -> None:
    DIFFUSION_STEPS.check("diffusion steps", steps)
