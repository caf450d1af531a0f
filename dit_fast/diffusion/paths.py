"""Gaussian paths and the predictions on them: the algebra of losses and samplers.

A path joins noise and data, x = alpha x_0 + sigma noise. Every prediction is a combination of the same two,
prediction = of_data x_0 + of_noise noise, so that (x, prediction) gives x_0 and noise by solving two equations, and any
prediction can be converted to any other. Everything is elementwise; coefficients broadcast against the data.

    epsilon   noise                                     DDPM (Ho et al. 2020), equation 14
    x0        x_0
    v         alpha noise - sigma x_0                   Salimans & Ho 2022 (arXiv:2202.00512), appendix D
    velocity  dx/dt = alpha' x_0 + sigma' noise         SiT (Ma et al. 2024, arXiv:2401.08740), section 2
    score     grad log p(x) = -noise / sigma            SiT, section 2
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dit_fast.errors import ConfigError

Prediction = Literal["epsilon", "x0", "v", "velocity", "score"]
PREDICTIONS = get_args(Prediction)

# The least and greatest beta of the variance-preserving path (Song et al. 2021, appendix C; SiT has 20, too).
_LEAST_BETA, _GREATEST_BETA = 0.1, 20.0
_VP_END = 1e-12


class Point(NamedTuple):
    """Coefficients of x_0 and of noise at a time, and their derivatives by time where time is continuous."""

    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor | None = None
    sigma_rate: Tensor | None = None

    def rates(self) -> tuple[Tensor, Tensor]:
        """Both derivatives. Raises ConfigError where time is discrete."""
        if self.alpha_rate is None or self.sigma_rate is None:
            raise ConfigError("the velocity is a derivative by time, and these timesteps are discrete")
        return self.alpha_rate, self.sigma_rate


def linear_path(t: Tensor) -> Point:
    """x = t x_0 + (1 - t) noise (Liu et al. 2022, arXiv:2209.03003; SiT, section 2)."""
    one = torch.ones_like(t)
    return Point(t, 1 - t, one, -one)


def gvp_path(t: Tensor) -> Point:
    """The generalized variance-preserving path: sine and cosine of pi t / 2 (SiT, section 2)."""
    angle, rate = math.pi / 2 * t, math.pi / 2
    return Point(angle.sin(), angle.cos(), rate * angle.cos(), -rate * angle.sin())


def vp_path(t: Tensor) -> Point:
    """The variance-preserving diffusion with beta from 0.1 at data to 20 at noise (Song et al. 2021, equation 33).

    At t = 0, alpha is 0.0066 rather than 0; at t = 1 the derivative of sigma would be infinite, and the point just
    before is returned.
    """
    way = (1 - t).clamp(min=_VP_END)
    beta = _LEAST_BETA + way * (_GREATEST_BETA - _LEAST_BETA)
    log_alpha = -0.25 * way**2 * (_GREATEST_BETA - _LEAST_BETA) - 0.5 * way * _LEAST_BETA
    alpha = log_alpha.exp()
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()
    return Point(alpha, sigma, 0.5 * beta * alpha, -0.5 * beta * alpha**2 / sigma)


PathName = Literal["linear", "gvp", "vp"]
PATHS: dict[str, Callable[[Tensor], Point]] = {"linear": linear_path, "gvp": gvp_path, "vp": vp_path}
"""By name; each takes times t from 0 (noise) to 1 (data), as in SiT."""


def coefficients(prediction: str, point: Point) -> tuple[Tensor, Tensor]:
    """(of_data, of_noise) of one of PREDICTIONS. Raises ConfigError for another name, or a velocity without rates."""
    one, zero = torch.ones_like(point.alpha), torch.zeros_like(point.alpha)
    if prediction == "epsilon":
        return zero, one
    if prediction == "x0":
        return one, zero
    if prediction == "v":
        return -point.sigma, point.alpha
    if prediction == "velocity":
        return point.rates()
    if prediction == "score":
        return zero, -1 / point.sigma
    raise ConfigError(f"prediction {prediction!r}: choose {', '.join(PREDICTIONS)}")


def determinant(prediction: str, point: Point) -> Tensor:
    """Determinant of the equations for x_0 and noise: a prediction's error is x_0's times -determinant / sigma."""
    of_data, of_noise = coefficients(prediction, point)
    return point.alpha * of_noise - point.sigma * of_data


def target(prediction: str, data: Tensor, noise: Tensor, point: Point) -> Tensor:
    """The value of `prediction` for x_0 `data` and `noise`."""
    of_data, of_noise = coefficients(prediction, point)
    return of_data * data + of_noise * noise


def data_and_noise(prediction: str, output: Tensor, x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
    """x_0 and noise of a model's `output` for the state x."""
    of_data, of_noise = coefficients(prediction, point)
    scale = point.alpha * of_noise - point.sigma * of_data
    return (of_noise * x - point.sigma * output) / scale, (point.alpha * output - of_data * x) / scale


def velocity_coefficients(prediction: str, point: Point) -> tuple[Tensor, Tensor]:
    """(a, b) of velocity = a x + b output; not finite where the prediction does not determine the velocity."""
    alpha_rate, sigma_rate = point.rates()
    if prediction == "velocity":
        return torch.zeros_like(point.alpha), torch.ones_like(point.alpha)
    of_data, of_noise = coefficients(prediction, point)
    scale = point.alpha * of_noise - point.sigma * of_data
    return (
        (alpha_rate * of_noise - sigma_rate * of_data) / scale,
        (sigma_rate * point.alpha - alpha_rate * point.sigma) / scale,
    )
