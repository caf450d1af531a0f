"""Which timesteps are trained on: keyed draws, so that a run does not depend on how its batches are shared out."""

import torch
from torch import Tensor

from dit_fast.diffusion.objective import Objective
from dit_fast.diffusion.timestep_sampler import LossHistory
from dit_fast.errors import ConfigError
from dit_fast.utils import keyed

TIMESTEP_SAMPLING = ("uniform", "importance", "logit-normal")


class TimestepSampling:
    """Draws the timesteps of an objective.

    kind: "uniform"; "importance", in proportion to the root mean square of each timestep's recent losses (Nichol &
    Dhariwal 2021, equation 18), which are reported by `update` and kept in `state`; or "logit-normal", the sigmoid of a
    standard normal value, which prefers the middle of the way and is not weighed against (Esser et al. 2024,
    arXiv:2403.03206, section 3).

    Raises ConfigError for another kind, or importance sampling in continuous time.
    """

    def __init__(
        self,
        objective: Objective,
        seed: int,
        kind: str = "uniform",
        device: torch.device | str = "cpu",
    ) -> None:
        if kind not in TIMESTEP_SAMPLING:
            raise ConfigError(f"timestep sampling {kind!r}: choose {', '.join(TIMESTEP_SAMPLING)}")
        self.objective, self.kind = objective, kind
        self.key = keyed.key(seed, "timestep")
        self.history: LossHistory | None = None
        if kind == "importance":
            if objective.num_timesteps is None:
                raise ConfigError(
                    "timestep sampling 'importance' keeps a history for each timestep, and those of flow matching are "
                    "continuous: choose uniform or logit-normal"
                )
            self.history = LossHistory(objective.num_timesteps, device=device)

    def draw(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Timesteps (n,) of the samples with these numbers, int64 (n,), and the weights of their losses; None for 1."""
        if self.history is not None:
            return self.history.draw(keyed.uniform(self.key, index))
        if self.kind == "logit-normal":
            return self.objective.times_at(keyed.normal(self.key, index, ()).sigmoid()), None
        steps = self.objective.num_timesteps
        if steps is not None:
            return keyed.integers(self.key, index, steps), None
        return self.objective.times_at(keyed.uniform(self.key, index)), None

    def update(self, t: Tensor, losses: Tensor, good: Tensor | bool = True) -> None:
        """Learn from the losses (B,) of the whole batch at `t` (B,), in the order of the samples; not if not `good`."""
        if self.history is not None:
            self.history.update(t, losses, good)

    @property
    def state(self) -> dict[str, Tensor]:
        """What a continuation needs, by name; the tensors are live."""
        if self.history is None:
            return {}
        return {"timesteps.losses": self.history.losses, "timesteps.counts": self.history.counts}
