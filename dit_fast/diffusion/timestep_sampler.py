"""Distributions of training timesteps: the reference's samplers, and the keyed draws of the training step.

Uniform, by importance (more often where the loss is large), or logit-normal.
"""

from abc import ABC, abstractmethod
from typing import Literal, Protocol, get_args

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from dit_fast.diffusion.objective import Objective
from dit_fast.errors import ConfigError
from dit_fast.utils import keyed

TimestepDistribution = Literal["uniform", "importance", "logit-normal"]
TIMESTEP_SAMPLING = get_args(TimestepDistribution)


class HasTimesteps(Protocol):
    """Anything with a number of timesteps, such as `GaussianDiffusion`."""

    num_timesteps: int


def create_named_schedule_sampler(name: str, diffusion: HasTimesteps) -> "ScheduleSampler":
    """The sampler "uniform" or "loss-second-moment" for the timesteps of `diffusion`.

    Raises:
        ConfigError: Another name.
    """
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    raise ConfigError(f"unknown timestep sampler {name!r}; known: uniform, loss-second-moment")


class ScheduleSampler(ABC):
    """A distribution over timesteps for importance sampling: it leaves the mean of weight * loss alone."""

    @abstractmethod
    def weights(self) -> NDArray[np.float64]:
        """Unnormalized positive probabilities (steps,)."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Draw timesteps from NumPy's global generator.

        Returns:
            Timesteps, int64 (batch_size,), and the weights 1 / (steps * p) of their losses, float32
            (batch_size,).
        """
        weights = self.weights()
        probabilities = weights / weights.sum()
        steps = len(probabilities)
        indices = np.random.choice(steps, size=(batch_size,), p=probabilities)
        importance = 1 / (steps * probabilities[indices])
        return (
            torch.from_numpy(indices).long().to(device),
            torch.from_numpy(importance).float().to(device),
        )


class UniformSampler(ScheduleSampler):
    """All timesteps equally likely, with weight 1."""

    def __init__(self, diffusion: HasTimesteps) -> None:
        self.diffusion = diffusion
        self._weights = np.ones(diffusion.num_timesteps)

    def weights(self) -> NDArray[np.float64]:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that is updated with the losses of all ranks, and is then the same on each."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Report this rank's losses; every rank calls it at the same time, with a batch of any size.

        Args:
            local_ts: Timesteps (N,), integer.
            local_losses: Their losses (N,).

        Losses are exchanged when torch.distributed is initialized. The update reads the values, so it waits
        for the device.
        """
        pairs = torch.stack([local_ts.detach().double(), local_losses.detach().double()])
        if dist.is_available() and dist.is_initialized():
            pairs = _gather_columns(pairs)
        timesteps, losses = pairs.tolist()
        self.update_with_all_losses([int(t) for t in timesteps], losses)

    @abstractmethod
    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        """Update with the timesteps and losses of all ranks, in the same order on each rank."""


class LossHistory:
    """The last losses of each timestep, and importance sampling by them, on the device and without waiting for it.

    losses: float64 (steps + 1, kept), a ring per timestep; writes that must not count go to the extra last row.
    counts: int64 (steps,), losses seen so far.
    """

    def __init__(
        self,
        steps: int,
        kept: int = 10,
        uniform_prob: float = 0.001,
        device: torch.device | str = "cpu",
    ) -> None:
        if kept < 1:
            raise ConfigError(f"history_per_term must be at least 1, not {kept}")
        if not 0.0 <= uniform_prob <= 1.0:
            raise ConfigError(f"uniform_prob must lie between 0 and 1, not {uniform_prob}")
        self.uniform_prob = uniform_prob
        self.losses = torch.zeros(steps + 1, kept, dtype=torch.float64, device=device)
        self.counts = torch.zeros(steps, dtype=torch.int64, device=device)

    def complete(self) -> Tensor:
        """Whether every timestep has all the losses that are kept, () bool."""
        return (self.counts >= self.losses.shape[1]).all()

    def probabilities(self) -> Tensor:
        """Probability of each timestep, float64 (steps,) (Improved DDPM, eq. 18); uniform until the history is full."""
        uniform = torch.full_like(self.losses[:-1, 0], 1 / len(self.counts))
        weights = self.losses[:-1].square().mean(dim=1).sqrt()
        mixed = weights / weights.sum() * (1 - self.uniform_prob) + uniform * self.uniform_prob
        return torch.where(self.complete(), mixed, uniform)

    def draw(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps, int64, of uniform `places` in [0, 1), and the weights 1 / (steps * p) of their losses, float32."""
        probabilities = self.probabilities()
        ends = probabilities.cumsum(0)
        t = torch.searchsorted(ends, places.double() * ends[-1], right=True).clamp(max=len(ends) - 1)
        return t, (1 / (len(ends) * probabilities[t])).float()

    def update(self, t: Tensor, losses: Tensor, good: Tensor | bool = True) -> None:
        """Record the losses (N,) of timesteps t (N,) over the oldest ones; nothing unless `good`."""
        kept = self.losses.shape[1]
        order = t.argsort(stable=True)
        t, losses = t[order], losses[order].detach().double()
        # Number of losses of the same timestep before each one, and after it (`last - first - before - 1`).
        first = torch.searchsorted(t, t, right=False)
        last = torch.searchsorted(t, t, right=True)
        before = torch.arange(len(t), device=t.device) - first
        place = (self.counts[t] + before) % kept
        # No two losses may be written to one place, in an order that is undefined: the older goes to the extra row.
        row = torch.where((last - first - before <= kept) & torch.as_tensor(good), t, len(self.counts))
        self.losses.index_put_((row, place), losses)
        self.counts.scatter_add_(0, t, torch.ones_like(t) * good)


class LossSecondMomentResampler(LossAwareSampler):
    """Timesteps in proportion to the root mean square of their recent losses (Improved DDPM, eq. 18).

    Args:
        diffusion: The process whose timesteps are drawn.
        history_per_term: Losses kept for each timestep; drawing is uniform until all have that many.
        uniform_prob: Part of the probability that stays uniform.
    """

    def __init__(
        self, diffusion: HasTimesteps, history_per_term: int = 10, uniform_prob: float = 0.001
    ) -> None:
        self.diffusion = diffusion
        self.history = LossHistory(diffusion.num_timesteps, history_per_term, uniform_prob)

    def weights(self) -> NDArray[np.float64]:
        if not self.history.complete():
            return np.ones(self.diffusion.num_timesteps, dtype=np.float64)
        return self.history.probabilities().numpy()

    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        self.history.update(torch.tensor(ts), torch.tensor(losses, dtype=torch.float64))


class TimestepSampling:
    """Draws training timesteps as a function of seed and sample number, on the device.

    Args:
        objective: The objective whose timesteps are drawn.
        seed: Seed of the run.
        kind: "uniform"; "importance", in proportion to the root mean square of each timestep's recent losses (Improved
            DDPM, eq. 18), which are reported by `update`; or "logit-normal", the sigmoid of a standard normal value,
            which prefers the middle of the path, without a weight against it (Esser et al. 2024, arXiv:2403.03206,
            section 3).
        device: Device of the history of losses.

    Raises:
        ConfigError: Another kind, or importance sampling in continuous time.
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
        """Timesteps (n,) of samples number `index`, int64 (n,), and weights (n,) of their losses; None: all 1."""
        if self.history is not None:
            return self.history.draw(keyed.uniform(self.key, index))
        if self.kind == "logit-normal":
            return self.objective.times_at(keyed.normal(self.key, index, ()).sigmoid()), None
        steps = self.objective.num_timesteps
        if steps is not None:
            return keyed.integers(self.key, index, steps), None
        return self.objective.times_at(keyed.uniform(self.key, index)), None

    def update(self, t: Tensor, losses: Tensor, good: Tensor | bool = True) -> None:
        """Record the losses (B,) of a whole batch at `t` (B,), in the order of its samples; nothing unless `good`."""
        if self.history is not None:
            self.history.update(t, losses, good)

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors by name that a checkpoint needs in order to resume; live, not copies."""
        if self.history is None:
            return {}
        return {"timesteps.losses": self.history.losses, "timesteps.counts": self.history.counts}


def _gather_columns(pairs: Tensor) -> Tensor:
    """Every rank's (2, N) tensor side by side, in the order of ranks; N may differ between them."""
    size = torch.tensor([pairs.shape[1]], dtype=torch.int64, device=pairs.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = [int(n) for n in torch.cat(sizes).tolist()]
    # Collectives want equal shapes: pad to the largest batch and cut the padding off again.
    padded = pairs.new_zeros(2, max(counts))
    padded[:, : pairs.shape[1]] = pairs
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:, :count] for part, count in zip(gathered, counts, strict=True)], dim=1)
