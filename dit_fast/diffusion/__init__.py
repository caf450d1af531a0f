"""Gaussian diffusion with the reference DiT's interface, `create_diffusion`, and flow matching, `FlowMatching`.

Sources named in this package: DDPM = Ho et al. 2020 (arXiv:2006.11239), Improved DDPM = Nichol & Dhariwal
    2021 (arXiv:2102.09672), DDIM = Song et al. 2020 (arXiv:2010.02502), ADM = Dhariwal & Nichol 2021
    (arXiv:2105.05233). Timesteps are counted from 0 here and from 1 in the papers.
"""

from collections.abc import Sequence
from typing import Any

from dit_fast.diffusion.beta_schedules import get_named_beta_schedule
from dit_fast.diffusion.flow_matching import FlowMatching
from dit_fast.diffusion.gaussian_diffusion import PREDICTIONS, GaussianDiffusion, LossType, ModelVarType
from dit_fast.diffusion.objective import OBJECTIVES
from dit_fast.diffusion.respace import SpacedDiffusion, space_timesteps
from dit_fast.errors import ConfigError

__all__ = [
    "FlowMatching",
    "GaussianDiffusion",
    "SpacedDiffusion",
    "create_diffusion",
    "create_objective",
    "space_timesteps",
]


def create_diffusion(
    timestep_respacing: str | Sequence[int] | int | None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
    prediction: str | None = None,
    min_snr_gamma: float | None = None,
    learned_range: bool = True,
) -> SpacedDiffusion:
    """Build the diffusion process that a DiT is trained or sampled with.

    Args:
        timestep_respacing: Steps to keep, as in `space_timesteps`; "" or None keeps all (training).
        noise_schedule: "linear" (DDPM) or "squaredcos_cap_v2" (Improved DDPM, eq. 17).
        use_kl: Train on the variational bound alone, times the number of steps.
        sigma_small: Without `learn_sigma`, use the posterior variance instead of beta (DDPM, section 3.2).
        predict_xstart: The model predicts x_0 instead of the noise.
        learn_sigma: The model also predicts the variance, in the form of `learned_range`.
        rescale_learned_sigmas: Multiply the variance's loss by steps / 1000.
        diffusion_steps: Number of steps before respacing.
        prediction: "epsilon", "x0" or "v" (Salimans & Ho 2022); None: as `predict_xstart` selects.
        min_snr_gamma: Weight the squared error by min-SNR (Hang et al. 2023), usually with 5; None: no weight.
        learned_range: A learned variance is a position between its two bounds (Improved DDPM, eq. 15); else the
            model predicts its logarithm, which is valid only for steps of this length.

    Raises:
        ConfigError: An unknown schedule or prediction, an impossible respacing, or too few steps.
    """
    if prediction is None:
        prediction = "x0" if predict_xstart else "epsilon"
    if prediction not in PREDICTIONS:
        raise ConfigError(
            f"prediction {prediction!r} does not apply to diffusion in discrete steps: choose {', '.join(PREDICTIONS)}"
        )
    betas = get_named_beta_schedule(noise_schedule, diffusion_steps)
    if timestep_respacing is None or (isinstance(timestep_respacing, str) and not timestep_respacing):
        timestep_respacing = [diffusion_steps]

    if use_kl:
        loss_type = LossType.RESCALED_KL
    elif rescale_learned_sigmas:
        loss_type = LossType.RESCALED_MSE
    else:
        loss_type = LossType.MSE

    if learn_sigma:
        model_var_type = ModelVarType.LEARNED_RANGE if learned_range else ModelVarType.LEARNED
    elif sigma_small:
        model_var_type = ModelVarType.FIXED_SMALL
    else:
        model_var_type = ModelVarType.FIXED_LARGE

    return SpacedDiffusion(
        use_timesteps=space_timesteps(diffusion_steps, timestep_respacing),
        betas=betas,
        model_mean_type=PREDICTIONS[prediction],
        model_var_type=model_var_type,
        loss_type=loss_type,
        min_snr_gamma=min_snr_gamma,
    )


def create_objective(objective: str = "diffusion", **options: Any) -> GaussianDiffusion | FlowMatching:
    """Build the training objective of that name.

    Args:
        objective: "diffusion" (`create_diffusion` with all timesteps) or "flow" (`FlowMatching`).
        options: Their arguments.

    Raises:
        ConfigError: An unknown name, or options that do not fit together.
    """
    if objective == "diffusion":
        return create_diffusion(None, **options)
    if objective == "flow":
        return FlowMatching(**options)
    raise ConfigError(f"objective {objective!r}: choose {' or '.join(OBJECTIVES)}")
