"""Likelihoods of a flow, by the change of variables along its path from data to noise.

d log p(x(t)) / dt = -div velocity(x(t), t) (Chen et al. 2018, Neural ODEs, equation 8; SiT, Ma et al. 2024,
arXiv:2401.08740, appendix; Song et al. 2021, appendix D.2). Diffusion models in discrete steps have the bound instead,
`GaussianDiffusion.calc_bpd_loop`.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_fast.diffusion.adaptive import ATOL, RTOL, dopri5
from dit_fast.diffusion.flow_matching import FlowMatching
from dit_fast.diffusion.objective import Model, ModelKwargs
from dit_fast.errors import ConfigError
from dit_fast.utils import keyed

# Distance of neighboring gray levels when 0..255 is mapped to [-1, 1].
GREY_LEVEL = 2 / 255

Method = Literal["heun", "dopri5"]
METHODS = get_args(Method)


def log_likelihood(
    flow: FlowMatching,
    model: Model,
    x: Tensor,
    *,
    steps: int = 100,
    method: str = "heun",
    atol: float = ATOL,
    rtol: float = RTOL,
    probes: int | None = 1,
    seed: int = 0,
    numbers: Tensor | None = None,
    model_kwargs: ModelKwargs = None,
    sample_eps: float | None = None,
) -> Tensor:
    """log p(x) in nats, float64 (N,), of data x (N, C, ...), by Heun's method in `steps` equal steps, or by dopri5.

    Args:
        flow: The objective of the model.
        model: `model(x, t, **model_kwargs)`, differentiable by x.
        x: Data (N, C, ...).
        steps: Number of steps of Heun's method.
        method: "heun", or "dopri5" with its tolerances, which needs torchdiffeq.
        probes: Rademacher vectors that estimate the divergence without bias (Hutchinson 1990), each of which costs a
            backward pass per evaluation; they are the same in every step, and keyed by (seed, sample number). None:
            the exact trace, by a backward pass per dimension.
        seed: Seed of the probes.
        numbers: Numbers of the samples, int64 (N,); None: 0, 1, ...
        model_kwargs: Further arguments of the model.
        sample_eps: As in `FlowMatching.encoding_interval`, along which the ODE is solved.

    Raises:
        ConfigError: No step or probe, or an objective in discrete time.
    """
    if steps < 1 or (probes is not None and probes < 1):
        raise ConfigError(
            f"steps {steps}, probes {probes}: at least one of each (or None for the exact trace)"
        )
    if method not in METHODS:
        raise ConfigError(f"method {method!r}: choose {' or '.join(METHODS)}")
    if not isinstance(flow, FlowMatching):
        raise ConfigError(
            "a likelihood by the ODE needs continuous time; for diffusion call calc_bpd_loop, the bound"
        )
    start, end = flow.encoding_interval(sample_eps)
    step = (end - start) / steps
    if numbers is None:
        numbers = torch.arange(len(x))
    directions = _directions(x, probes, seed, numbers.to(x.device))
    x, change = x.detach(), torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def slope(time: float, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
        return _velocity_and_divergence(flow, model, x, t, directions, model_kwargs)

    if method == "dopri5":
        x, change = dopri5(lambda t, state: slope(t, state[0].to(x)), (x, change), start, end, atol, rtol)
    for i in range(steps if method == "heun" else 0):
        here, spread = slope(start + i * step, x)
        ahead, ahead_spread = slope(start + (i + 1) * step, x + step * here)
        x = x + step / 2 * (here + ahead)
        change += step / 2 * (spread + ahead_spread)
    prior = -0.5 * (x.double().flatten(1) ** 2 + math.log(2 * math.pi)).sum(dim=1)
    return prior + change


def bits_per_dim(log_likelihood: Tensor, dims: int, bin_width: float = GREY_LEVEL) -> Tensor:
    """Bits per dimension of values in bins of this width, (N,), from the log density (N,) of `dims` of them.

    The values are those of 8-bit images in [-1, 1] unless `bin_width` is another; for a bound on the likelihood
    of such images x must be dequantized, uniform within its bins (Theis et al. 2016, arXiv:1511.01844, section 3.1).
    """
    return -log_likelihood / (dims * math.log(2)) - math.log2(bin_width)


def _directions(x: Tensor, probes: int | None, seed: int, numbers: Tensor) -> list[Tensor]:
    shape = tuple(x.shape[1:])
    if probes is None:
        unit = torch.eye(math.prod(shape), dtype=x.dtype, device=x.device)
        return [row.view(1, *shape).expand_as(x) for row in unit]
    signs = keyed.integers(keyed.key(seed, "likelihood"), numbers, 2, (probes, *shape)) * 2 - 1
    return [part.to(x.dtype) / math.sqrt(probes) for part in signs.unbind(1)]


def _velocity_and_divergence(
    flow: FlowMatching,
    model: Model,
    x: Tensor,
    t: Tensor,
    directions: list[Tensor],
    model_kwargs: ModelKwargs,
) -> tuple[Tensor, Tensor]:
    """The velocity, and the sum over directions e of e . (d velocity / d x) e, float64 (N,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        velocity = flow.velocity(model, x, t, model_kwargs)
        divergence = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for direction in directions:
            (product,) = torch.autograd.grad(velocity, x, direction, retain_graph=True)
            divergence += (product * direction).double().flatten(1).sum(dim=1)
    return velocity.detach(), divergence
