"""`TrainStep`: one training step. The host waits for no value in it, so that it can be captured as a CUDA graph.

Draws are functions of (seed, stream, global sample number), see `dit_fast.utils.keyed`, so that they do not depend on
how a batch is split among ranks or micro-batches. Values for the log are written to `StepState.history`, one row per
step, and read when a log line is due.
"""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_fast.data import Posterior
from dit_fast.diffusion.objective import Objective
from dit_fast.diffusion.timestep_sampler import TimestepSampling
from dit_fast.distributed.agreement import Agreement
from dit_fast.distributed.sharding import micro_batch, shard
from dit_fast.distributed.world import World
from dit_fast.training.precision import LossScale
from dit_fast.utils import keyed
from dit_fast.utils.nvtx import OFF, Ranges

BUCKETS = 4
"""Equal ranges of the timesteps, least noise first, by which the loss is also logged."""

LEVELS = 16
"""Ranges of the timesteps, of growing length, within which the losses of samples are similar.

The k-th ends at (k / LEVELS)^3: the loss changes fastest where there is least noise. Of 1000 timesteps the first, whose
loss is a likelihood of pixels, is then a range of its own.
"""


class StepValues(NamedTuple):
    """Values of a finished step, for the log.

    Attributes:
        loss, mse, vb: Means over the batch.
        grad_norm: Norm of all gradients before clipping.
        applied: 1, or 0 where the update was skipped because loss or gradient norm were not finite.
        loss_scale: 1 except in float16.
        bucket_sums, bucket_counts: Sums and numbers of the samples' losses in each of `BUCKETS` ranges.
        level_sums, level_counts: The same in each of `LEVELS` ranges.
    """

    loss: float
    mse: float
    vb: float
    grad_norm: float
    applied: float
    loss_scale: float
    bucket_sums: tuple[float, ...]
    bucket_counts: tuple[float, ...]
    level_sums: tuple[float, ...]
    level_counts: tuple[float, ...]

    @classmethod
    def of_row(cls, row: Sequence[float]) -> "StepValues":
        loss, mse, vb, norm, applied, scale, *rest = row
        cuts = (0, BUCKETS, 2 * BUCKETS, 2 * BUCKETS + LEVELS, 2 * (BUCKETS + LEVELS))
        by_range = (tuple(rest[a:b]) for a, b in itertools.pairwise(cuts))
        return cls(loss, mse, vb, norm, applied, scale, *by_range)


@dataclass(frozen=True)
class StepOptions:
    """Constants of a run.

    Attributes:
        seed: Seed of all draws.
        batch_size: Samples of all ranks and micro-batches together.
        num_classes: Number of classes, which is the null label.
        class_dropout_prob: Fraction of labels or captions that are dropped.
        accumulate: Micro-batches of this rank.
        skip_nonfinite: Number of non-finite steps that are skipped before one ends the run.
        autocast: Dtype in which the model runs; None: that of its weights.
    """

    seed: int
    batch_size: int
    num_classes: int
    class_dropout_prob: float
    accumulate: int = 1
    skip_nonfinite: int = 0
    autocast: torch.dtype | None = None


class StepState:
    """Tensors on the device that a step reads and writes in place.

    Attributes:
        step: Number of finished steps.
        skipped: Number of skipped updates.
        failed: Number, from 1, of the step that ended the run; -1 if none did.
        found_inf: Nonzero where the optimizer must not apply this update.
        lr: Learning rate of this step.
        history: Rows of `StepValues` (steps, columns), overwritten in turn.
    """

    def __init__(self, device: torch.device, history: int, lr_dtype: torch.dtype):
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.failed = torch.full((), -1, dtype=torch.int64, device=device)
        self.found_inf = torch.zeros((), device=device)
        self.lr = torch.zeros((), dtype=lr_dtype, device=device)
        self.history = torch.zeros(history, 6 + 2 * (BUCKETS + LEVELS), device=device)


class TrainStep:
    """Forward, backward, optimizer and moving average on one global batch, or on this rank's rows of it.

    Args:
        model: The module that is called: the model as it is compiled, sharded or wrapped.
        optimizer: `AdamWEma`, or one with its interface; its `found_inf` is set here.
        objective: Adds noise and computes the loss.
        options: Constants of the run.
        state: Tensors on the device, read and written in place.
        positions: This process's rows of the global batch, int64 (b,), on the device.
        agreement: Exchange between ranks; None: one process.
        timesteps: Distribution of timesteps; None: uniform.
        posterior: Draws latents from moments, where batches hold moments.
        loss_scale: Loss scaling for float16.
        ranges: NVTX ranges.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        objective: Objective,
        options: StepOptions,
        state: StepState,
        positions: Tensor,
        *,
        agreement: Agreement | None = None,
        timesteps: TimestepSampling | None = None,
        posterior: Posterior | None = None,
        loss_scale: LossScale | None = None,
        ranges: Ranges = OFF,
    ):
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.options = options
        self.state = state
        self.positions = positions
        self.agreement = agreement or Agreement(World(device=positions.device))
        self.timesteps = timesteps or TimestepSampling(objective, options.seed)
        self.posterior = posterior
        self.loss_scale = loss_scale
        self.ranges = ranges
        # Attributes, so that `compile_step` can replace them.
        self.add_noise, self.loss = objective.add_noise, objective.loss
        # Whether gradients keep their addresses and are zeroed; otherwise the backward pass writes new ones.
        self.keep_gradients = False
        streams = ("noise", "label drop", "posterior")
        self._keys = {stream: keyed.key(options.seed, stream) for stream in streams}
        self._one = torch.ones((), device=positions.device)
        # Timesteps and weights of the last steps (steps, 2, b). Importance sampling depends on losses that are
        # overwritten, so that its draws cannot be repeated for the log.
        self.drawn: Tensor | None = None
        if self.timesteps.history is not None:
            self.drawn = torch.zeros(len(state.history), 2, len(positions), device=positions.device)

    def __call__(self, samples: Tensor, labels: Tensor) -> None:
        """One step.

        Args:
            samples: Images or latents (b, C, H, W), or moments (b, K, C, H, W) of posteriors.
            labels: Class labels (b,), or captions (b, S, E).
        """
        with self.ranges("draw"):
            x_start, t, noise, labels, weights = self.draw(samples, labels)
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        terms = self._accumulate(x_start, t, noise, labels, weights)
        with self.ranges("optimizer_ema"):
            loss = _mean(terms["loss"], weights)
            norm = self._gradient_norm()
            good = self._judge(loss, norm)
            self.optimizer.found_inf = self.state.found_inf
            self.optimizer.step()
        self._record(loss, norm, good, terms, t, weights)
        if self.timesteps.history is not None:
            gather_rows = self.agreement.world.gather_rows
            self.timesteps.update(gather_rows(t), gather_rows(terms["loss"]), good)
        if self.loss_scale is not None:
            self.loss_scale.update()
        self.state.step += 1

    @torch.no_grad()
    def draw(self, samples: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Samples, timesteps, noise, labels with some dropped, and weights of the losses (None: all 1), row by row."""
        # Global sample numbers: no draw depends on how the batch is split among ranks and micro-batches.
        index = self.state.step * self.options.batch_size + self.positions
        if samples.ndim == 5:
            assert self.posterior is not None
            shape = tuple(samples.shape[2:])
            drawn = keyed.normal(self._keys["posterior"], index, shape) if self.posterior.is_drawn else None
            samples = self.posterior.sample(samples, drawn)
        t, weights = self.timesteps.draw(index)
        noise = keyed.normal(self._keys["noise"], index, tuple(samples.shape[1:]))
        dropped = keyed.uniform(self._keys["label drop"], index) < self.options.class_dropout_prob
        if labels.ndim == 3:  # captions (b, S, E), of which zeros are the null caption
            return samples, t, noise, torch.where(dropped[:, None, None], 0, labels), weights
        return samples, t, noise, torch.where(dropped, self.options.num_classes, labels), weights

    def denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's output in float32. Only the model runs in low precision, the loss does not."""
        low = self.options.autocast
        with nullcontext() if low is None else torch.autocast(x.device.type, low):
            return self.model(x, t, y).float()

    def _accumulate(
        self, x_start: Tensor, t: Tensor, noise: Tensor, labels: Tensor, weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Gradients of the mean loss over all micro-batches; the losses' terms (b,) by name."""
        results: list[dict[str, Tensor]] = []
        count = self.options.accumulate
        chunks = [tensor.chunk(count) for tensor in (x_start, t, noise, labels)]
        weight_chunks = [None] * count if weights is None else weights.chunk(count)
        for number, (*inputs, y, weight) in enumerate(zip(*chunks, weight_chunks, strict=True), start=1):
            with micro_batch(self.model, number == count) if count > 1 else nullcontext():
                with self.ranges("forward"):
                    batch = self.add_noise(*inputs)
                    terms = self.loss(self.denoise(batch.x_t, batch.model_t, y), batch)
                    loss = _mean(terms["loss"], weight)
                    # The mean of the micro-batches' means, which have equal sizes, is that of the batch.
                    loss = loss if count == 1 else loss / count
                    if self.loss_scale is not None:
                        loss = loss * self.loss_scale.scale[0]
                with self.ranges("backward"):
                    loss.backward()
            results.append({name: term.detach() for name, term in terms.items()})
        return {name: torch.cat([result[name] for result in results]) for name in results[0]}

    def _gradient_norm(self) -> Tensor:
        if self.loss_scale is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.loss_scale.unscale([shard(p.grad) for p in parameters if p.grad is not None])
        return self.optimizer.grad_norm()

    def _judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Decide on the device whether the update is applied, () bool; counts skipped and failed steps."""
        state = self.state
        bad_loss, bad_norm = ~loss.isfinite(), ~norm.isfinite()
        if self.agreement.world.size > 1:
            with self.ranges("communication"):
                bad_loss, bad_norm = self.agreement.exchange(bad_loss, bad_norm)
        bad = bad_loss | bad_norm
        good = ~bad
        if self.loss_scale is not None:
            # A gradient overflow is not a failure as long as the scale can be lowered.
            bad = bad & ~(~bad_loss & (self.loss_scale.scale[0] > 1))
        running = state.failed < 0
        state.skipped += bad & running
        ends = bad & running & (state.skipped > self.options.skip_nonfinite)
        state.failed.copy_(torch.where(ends, state.step + 1, state.failed))
        # The optimizer changes nothing where this is not zero, and it stays so once a step has ended the run: the host
        # learns of it later, and the weights are then still those before the failed step.
        state.found_inf.copy_(~good | (state.failed >= 0))
        return state.found_inf == 0

    @torch.no_grad()
    def _record(
        self,
        loss: Tensor,
        norm: Tensor,
        good: Tensor,
        terms: dict[str, Tensor],
        t: Tensor,
        weights: Tensor | None,
    ) -> None:
        """Write this step's row of the history."""
        noise = self.objective.noise_level(t)
        by_range: list[Tensor] = []
        for count, position in ((BUCKETS, noise), (LEVELS, noise ** (1 / 3))):
            index = (position * count).long().clamp(max=count - 1)
            inside = index[:, None] == torch.arange(count, device=t.device)
            # A product with `inside` would carry a NaN into every range.
            sums = torch.where(inside, terms["loss"].float()[:, None], 0.0).sum(0)
            by_range += [sums, inside.float().sum(0)]
        means = [terms[name].mean() if name in terms else torch.zeros_like(loss) for name in ("mse", "vb")]
        scale = self._one if self.loss_scale is None else self.loss_scale.scale[0]
        row = torch.cat([torch.stack([loss, *means, norm, good.float(), scale]), *by_range])
        # The row number stays on the device, where a captured graph computes it anew in each replay.
        row_number = (self.state.step % len(self.state.history)).reshape(1)
        self.state.history.index_copy_(0, row_number, row.float()[None])
        if self.drawn is not None and weights is not None:
            self.drawn.index_copy_(0, row_number, torch.stack([t.float(), weights])[None])


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (losses * weights).mean()
