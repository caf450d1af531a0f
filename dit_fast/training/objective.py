"""Training objective of a run, the part of `TrainConfig` that defines prediction, path and loss."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from dit_fast.diffusion import GaussianDiffusion, create_objective
from dit_fast.diffusion.beta_schedules import DIFFUSION_STEPS, NoiseSchedule
from dit_fast.diffusion.flow_matching import FLOW_WEIGHTINGS, TRAIN_EPS
from dit_fast.diffusion.objective import ObjectiveName
from dit_fast.diffusion.paths import PathName, Prediction
from dit_fast.diffusion.timestep_sampler import TimestepDistribution, TimestepSampling
from dit_fast.errors import ConfigError
from dit_fast.sampling.schedule import diffusion_schedule
from dit_fast.utils.options import flag_of, option
from dit_fast.utils.values import Number

_OF_FLOW = FLOW_WEIGHTINGS[1:]
LossWeighting = Literal["none", "min-snr", "velocity", "likelihood"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Training objective: prediction, path and loss (equations: docs/objectives.md)."""

    objective: ObjectiveName = option(
        "diffusion", "Diffusion in discrete steps, or flow matching in continuous time", group="objective"
    )
    prediction: Prediction | None = option(
        None,
        "Quantity that the model predicts; v applies only to diffusion, velocity and score only to flow",
        default_text="epsilon for diffusion, velocity for flow",
        constants={"--predict-xstart": "x0"},
        group="objective",
    )
    path: PathName = option(
        "linear", "Path between noise and data; applies only to --objective flow", group="objective"
    )
    loss_weighting: LossWeighting = option(
        "none",
        "Weights of the loss over time; min-snr applies only to diffusion, velocity and likelihood only to flow "
        "matching that predicts something else than the velocity",
        group="objective",
    )
    min_snr_gamma: float = option(
        5.0,
        "Upper bound of the signal-to-noise ratio in --loss-weighting min-snr",
        Number(0, 1e6, above=True),
        group="objective",
    )
    direction_loss: bool = option(
        False,
        "Add the cosine distance to the velocity to the loss; applies only to --objective flow",
        group="objective",
    )
    train_eps: float | None = option(
        None,
        "Distance in t of training from the ends where the equations of flow matching are singular",
        TRAIN_EPS,
        default_text="SiT's: 0.001, on the path vp 0.00001",
        group="objective",
    )
    timestep_sampling: TimestepDistribution = option(
        "uniform",
        "Distribution of training timesteps; importance follows recent losses, for diffusion only",
        group="objective",
    )
    learn_sigma: bool | None = option(
        None,
        "Learn the variance with the hybrid loss (arXiv:2102.09672, eq. 16)",
        group="model",
        default_text="on for diffusion, off for flow",
    )
    learned_range: bool = option(
        True,
        "Learn the variance as a position between its bounds; with --no-learned-range, as a logarithm",
        group="objective",
    )
    sigma_small: bool = option(
        False, "Use the variance of the posterior instead of beta; needs --no-learn-sigma", group="objective"
    )
    use_kl: bool = option(False, "Train on the variational bound alone", group="objective")
    noise_schedule: NoiseSchedule = option("linear", "Noise schedule of diffusion", group="objective")
    diffusion_steps: int = option(
        1000, "Timesteps of diffusion", DIFFUSION_STEPS, metavar="T", group="objective"
    )

    def choose_defaults(self) -> None:
        """Fill in the defaults that depend on the objective."""
        flow = self.objective == "flow"
        if self.prediction is None:
            object.__setattr__(self, "prediction", "velocity" if flow else "epsilon")
        if self.learn_sigma is None:
            object.__setattr__(self, "learn_sigma", not flow)

    def check_objective(self) -> None:
        """Raise ConfigError for options that the objective does not have, or that exclude each other."""
        flow = self.objective == "flow"
        of_diffusion = (
            "noise_schedule", "learn_sigma", "learned_range", "sigma_small", "use_kl", "min_snr_gamma",
        )  # fmt: skip
        fixed = of_diffusion if flow else ("path", "direction_loss", "train_eps")
        usual = {field.name: field.default for field in dataclasses.fields(self)} | {"learn_sigma": False}
        for field in fixed:
            if getattr(self, field) != usual[field]:
                raise ConfigError(
                    f"{flag_of(field)} {getattr(self, field)} applies only to --objective "
                    f"{'diffusion' if flow else 'flow'}; remove it"
                )
        if flow != (self.loss_weighting in _OF_FLOW) and self.loss_weighting != "none":
            raise ConfigError(
                f"--loss-weighting {self.loss_weighting} does not apply to --objective {self.objective}: give none"
                + (" or " + " or ".join(_OF_FLOW) if flow else " or min-snr")
            )
        if self.sigma_small and self.learn_sigma:
            raise ConfigError("--sigma-small is a variance that is not learned: give --no-learn-sigma too")
        if not (self.learned_range or self.learn_sigma):
            raise ConfigError(
                "--no-learned-range applies only to a learned variance; remove --no-learn-sigma"
            )
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
                # Left out by default, as in checkpoints from before the option existed.
                **({} if self.train_eps is None else {"train_eps": self.train_eps}),
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
