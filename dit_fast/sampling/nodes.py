"""Where a trajectory is evaluated: the nodes of a noise schedule, from noise to data.

Every schedule here is a Gaussian path x = alpha x_0 + sigma noise (Kingma et al. 2021, section 3.1), so that solvers
need not know what a model was trained on: alpha^2 + sigma^2 = 1 for diffusion, alpha + sigma = 1 for flow matching.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_fast.diffusion import GaussianDiffusion, SpacedDiffusion
from dit_fast.diffusion.gaussian_diffusion import ModelMeanType, ModelVarType
from dit_fast.errors import ConfigError

Array = NDArray[np.float64]

PREDICTIONS = ("noise", "data", "velocity")
"""What a model answers: the noise, x_0, or x_0 - noise on the path alpha + sigma = 1."""

_VARIANCES = {
    ModelVarType.LEARNED_RANGE: "learned",
    ModelVarType.FIXED_SMALL: "small",
    ModelVarType.FIXED_LARGE: "large",
}


@dataclass(frozen=True, eq=False)
class Nodes:
    """The points of a trajectory, the noisiest first; compared and hashed by identity.

    times       float64 (N,): what the model reads at each evaluation
    levels      float64 (N,): noise level of each evaluation, 1 pure noise, 0 data; guidance intervals mean these
    alphas      float64 (N + 1,): share of x_0, the last where the trajectory ends, usually 1
    sigmas      float64 (N + 1,): share of the noise, the last usually 0
    prediction  one of PREDICTIONS
    variance    of an ancestral step: "learned" (between its bounds), "small" (the posterior's) or "large" (beta)

    Raises ConfigError for arrays that do not fit each other or do not lead from noise to data.
    """

    times: Array
    levels: Array
    alphas: Array
    sigmas: Array
    prediction: str = "noise"
    variance: str = "large"

    def __post_init__(self) -> None:
        n = len(self.times)
        if not n or not len(self.levels) == n == len(self.alphas) - 1 == len(self.sigmas) - 1:
            raise ConfigError(
                f"{n} times, {len(self.levels)} levels, {len(self.alphas)} alphas and {len(self.sigmas)} sigmas: "
                "N, N, N + 1 and N + 1 are wanted, N at least 1"
            )
        if self.prediction not in PREDICTIONS:
            raise ConfigError(f"prediction {self.prediction!r}: choose {', '.join(PREDICTIONS)}")
        if (self.sigmas[:-1] <= 0).any() or (np.diff(self.sigmas / (self.alphas + self.sigmas)) >= 0).any():
            raise ConfigError("sigma / (alpha + sigma) must fall from node to node and be 0 only at the end")
        if self.prediction == "velocity" and not np.allclose(self.alphas + self.sigmas, 1):
            raise ConfigError("a model of the velocity needs the path alpha + sigma = 1")

    def __len__(self) -> int:
        return len(self.times)

    def data_coefficients(self) -> tuple[Array, Array]:
        """(a, b), each (N,), with x_0 = a x + b answer for the model's answer at each node."""
        alphas, sigmas = self.alphas[:-1], self.sigmas[:-1]
        if self.prediction == "noise":
            if (alphas == 0).any():
                raise ConfigError("a node without signal (alpha 0) cannot be sampled by a model of the noise")
            return 1 / alphas, -sigmas / alphas
        if self.prediction == "data":
            return np.zeros_like(alphas), np.ones_like(alphas)
        return np.ones_like(alphas), sigmas


def diffusion_nodes(diffusion: GaussianDiffusion) -> Nodes:
    """The nodes of a diffusion process, respaced or not, from its last step to its first."""
    if diffusion.model_mean_type is ModelMeanType.PREVIOUS_X or diffusion.model_var_type not in _VARIANCES:
        raise ConfigError(
            f"no solver for a model of {diffusion.model_mean_type.name} with {diffusion.model_var_type.name}"
        )
    steps = diffusion.num_timesteps
    if isinstance(diffusion, SpacedDiffusion):
        kept, steps = np.array(diffusion.timestep_map, dtype=np.float64), diffusion.original_num_steps
    else:
        kept = np.arange(steps, dtype=np.float64)
    times = kept[::-1].copy()
    return Nodes(
        times=times,
        levels=(times + 1) / steps,
        alphas=np.append(np.sqrt(diffusion.alphas_cumprod[::-1]), 1.0),
        sigmas=np.append(np.sqrt(1.0 - diffusion.alphas_cumprod[::-1]), 0.0),
        prediction="noise" if diffusion.model_mean_type is ModelMeanType.EPSILON else "data",
        variance=_VARIANCES[diffusion.model_var_type],
    )


def flow_nodes(steps: int, shift: float = 1.0) -> Nodes:
    """Nodes of flow matching on the path x = t x_0 + (1 - t) noise; the model reads t, from 0 (noise) to 1 (data).

    That is the convention of SiT (Ma et al. 2024). `shift` above 1 spends more steps on noise: sigma' = shift sigma /
    (1 + (shift - 1) sigma) (Esser et al. 2024, equation 23). Raises ConfigError for no step or a shift not above 0.
    """
    if steps < 1:
        raise ConfigError(f"{steps} steps: ask for at least one")
    if not shift > 0:
        raise ConfigError(f"shift {shift}: choose a number above 0 (1 is none)")
    sigmas = np.linspace(1.0, 0.0, steps + 1)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    alphas = 1 - sigmas
    return Nodes(alphas[:-1], sigmas[:-1], alphas, sigmas, prediction="velocity")
