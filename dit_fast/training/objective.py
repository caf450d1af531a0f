"""What a run is trained to do: the part of `TrainConfig` that says so, checked when it is built."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dit_fast.diffusion import GaussianDiffusion, create_objective
from dit_fast.diffusion.flow_matching import FLOW_WEIGHTINGS
from dit_fast.diffusion.objective import OBJECTIVES
from dit_fast.diffusion.paths import PATHS, PREDICTIONS
from dit_fast.diffusion.timestep_sampler import TIMESTEP_SAMPLING, TimestepSampling
from dit_fast.errors import ConfigError
from dit_fast.sampling.schedule import diffusion_schedule

_OF_FLOW = FLOW_WEIGHTINGS[1:]
OBJECTIVE_CHOICES = {
    "objective": OBJECTIVES,
    "prediction": PREDICTIONS,
    "path": tuple(PATHS),
    "loss_weighting": ("none", "min-snr", *_OF_FLOW),
    "timestep_sampling": TIMESTEP_SAMPLING,
}


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Fields that say what a model is trained to predict, and how.

    objective            "diffusion" or "flow" (docs/objectives.md has the equations of all that follows)
    prediction           what the model answers: "epsilon", "x0" (better where runs are short and patches large) or "v"
                         of diffusion; "velocity", "score", "epsilon" or "x0" of flow; None: the first of these
    loss_weighting       "none"; "min-snr" of diffusion, with min_snr_gamma; "velocity" or "likelihood" of flow
    direction_loss       of flow's velocity: also the angle between answer and velocity
    timestep_sampling    "uniform", "importance" (by recent losses, of diffusion) or "logit-normal"
    learn_sigma          learn the variance too, by the hybrid loss (arXiv:2102.09672, eq. 16); None: of diffusion yes
    learned_range        a learned variance is a place between its bounds (eq. 15 there); else its logarithm
    sigma_small, use_kl  without learn_sigma, the posterior's variance instead of beta; the bound alone as the loss
    noise_schedule       of diffusion: "linear" or "squaredcos_cap_v2"
    path                 of flow: "linear", "gvp" or "vp"
    diffusion_steps      noise levels of diffusion
    """

    objective: str = "diffusion"
    prediction: str | None = None
    path: str = "linear"
    loss_weighting: str = "none"
    min_snr_gamma: float = 5.0
    direction_loss: bool = False
    timestep_sampling: str = "uniform"
    learn_sigma: bool | None = None
    learned_range: bool = True
    sigma_small: bool = False
    use_kl: bool = False
    noise_schedule: str = "linear"
    diffusion_steps: int = 1000

    def choose_defaults(self) -> None:
        """Fill in what depends on the objective and was not given."""
        flow = self.objective == "flow"
        if self.prediction is None:
            object.__setattr__(self, "prediction", "velocity" if flow else "epsilon")
        if self.learn_sigma is None:
            object.__setattr__(self, "learn_sigma", not flow)

    def check_objective(self) -> None:
        """Raise ConfigError for options that are not of the objective, or do not go together."""
        flow = self.objective == "flow"
        of_diffusion = (
            "noise_schedule", "learn_sigma", "learned_range", "sigma_small", "use_kl", "min_snr_gamma",
        )  # fmt: skip
        fixed = of_diffusion if flow else ("path", "direction_loss")
        usual = {field.name: field.default for field in dataclasses.fields(self)} | {"learn_sigma": False}
        for field in fixed:
            if getattr(self, field) != usual[field]:
                raise ConfigError(
                    f"--{field.replace('_', '-')} {getattr(self, field)} is of --objective "
                    f"{'diffusion, flow matching has no such thing' if flow else 'flow'}: leave it out"
                )
        if flow != (self.loss_weighting in _OF_FLOW) and self.loss_weighting != "none":
            raise ConfigError(
                f"--loss-weighting {self.loss_weighting} is not of --objective {self.objective}: give none"
                + (" or " + " or ".join(_OF_FLOW) if flow else " or min-snr")
            )
        if self.sigma_small and self.learn_sigma:
            raise ConfigError("--sigma-small is a variance that is not learned: give --no-learn-sigma too")
        if not (self.learned_range or self.learn_sigma):
            raise ConfigError("--no-learned-range is of a learned variance: leave out --no-learn-sigma")
        objective = create_objective(**self.objective_arguments())
        TimestepSampling(objective, 0, self.timestep_sampling)
        if isinstance(objective, GaussianDiffusion):
            try:
                diffusion_schedule(objective)
            except ConfigError as error:
                raise ConfigError(
                    f"--diffusion-steps {self.diffusion_steps}: the model could be trained but never sampled, {error}; "
                    "give more steps, or --prediction x0 or v"
                ) from None

    def objective_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `create_objective`, which checkpoints keep.

        The hybrid loss is mse + 0.001 * (sum of the bound's terms over all steps), whatever their number.
        """
        common = {"objective": self.objective, "prediction": self.prediction}
        if self.objective == "flow":
            return {
                **common,
                "path": self.path,
                "loss_weighting": self.loss_weighting,
                "direction_loss": self.direction_loss,
            }
        return {
            **common,
            "noise_schedule": self.noise_schedule,
            "learn_sigma": self.learn_sigma,
            "learned_range": self.learned_range,
            "sigma_small": self.sigma_small,
            "use_kl": self.use_kl,
            "rescale_learned_sigmas": self.learn_sigma,
            "min_snr_gamma": self.min_snr_gamma if self.loss_weighting == "min-snr" else None,
            "diffusion_steps": self.diffusion_steps,
        }
