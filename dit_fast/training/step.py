"""One training step as work for the device alone: nothing in it waits for a value, so that it can be a CUDA graph.

Draws are functions of (seed, stream, global sample number), see `dit_fast.utils.keyed`: how the samples of a step are
shared among ranks or cut into micro-batches changes none of them. What the host wants to know is written to
`StepState.history`, a row a step, and read when a log line is due.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_fast.data import Posterior
from dit_fast.diffusion.objective import Objective
from dit_fast.diffusion.timesteps import TimestepSampling
from dit_fast.distributed.sharding import shard
from dit_fast.training.precision import LossScale
from dit_fast.utils import keyed
from dit_fast.utils.nvtx import OFF, Ranges

BUCKETS = 4
"""Equal parts of the timesteps, least noise first, that the loss is also averaged over."""

LEVELS = 16
"""Parts of the timesteps, of growing length, within which the losses of samples are much the same.

The k-th of them ends at (k / LEVELS)^3: the loss changes fastest where there is least noise, and of 1000 timesteps the
first, whose loss is a likelihood of pixels, is a part of its own.
"""


class StepValues(NamedTuple):
    """What a step left behind. bucket_sums, bucket_counts: of the samples' losses, by timestep; level_sums and
    level_counts the same, for `LEVELS` parts.

    applied: 1, or 0 where the update was not made because loss or gradient norm were not finite; loss_scale: 1 but
    for float16.
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
        loss, mse, vb, norm, applied, scale, *parts = row
        cuts = (0, BUCKETS, 2 * BUCKETS, 2 * BUCKETS + LEVELS, 2 * (BUCKETS + LEVELS))
        by_part = (tuple(parts[a:b]) for a, b in itertools.pairwise(cuts))
        return cls(loss, mse, vb, norm, applied, scale, *by_part)


@dataclass(frozen=True)
class StepOptions:
    """What is constant during a run. batch_size: of all ranks and micro-batches together; accumulate: micro-batches of
    this rank; skip_nonfinite: steps that may be left out because they are not finite before one ends the run.
    """

    seed: int
    batch_size: int
    num_classes: int
    class_dropout_prob: float
    accumulate: int = 1
    skip_nonfinite: int = 0


class StepState:
    """Tensors on the device that a step reads and writes in place.

    step: finished steps; skipped: steps left out so far; failed: number, from 1, of the step that ended the run, -1 if
    none did; found_inf: whether the present update is void; lr: the present rate; history (steps, columns).
    """

    def __init__(self, device: torch.device, history: int, lr_dtype: torch.dtype):
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.failed = torch.full((), -1, dtype=torch.int64, device=device)
        self.found_inf = torch.zeros((), device=device)
        self.lr = torch.zeros((), dtype=lr_dtype, device=device)
        self.history = torch.zeros(history, 6 + 2 * (BUCKETS + LEVELS), device=device)


class TrainStep:
    """Forward, backward, optimiser and moving average on one global batch, or on this rank's rows of it.

    denoise(x, t, y): the model in its precision, float32 out. optimizer: AdamWEma, or what has its interface; its
    `found_inf` is set here. positions: int64 (b,), the rows of the global batch that this process is given, on the
    device. accumulating(last): a context for each micro-batch, where gradients need not be synchronised before the
    last. agree(bad loss, bad norm): the same of all ranks together, () bool each. all_rows: a value for each of this
    process's rows, (b,), to those of all processes. before_update: called between the gradients and the optimiser, on
    the host. timesteps: how they are drawn; None: uniformly.
    """

    def __init__(
        self,
        denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
        optimizer: Any,
        objective: Objective,
        options: StepOptions,
        state: StepState,
        positions: Tensor,
        *,
        timesteps: TimestepSampling | None = None,
        all_rows: Callable[[Tensor], Tensor] = lambda rows: rows,
        posterior: Posterior | None = None,
        loss_scale: LossScale | None = None,
        accumulating: Callable[[bool], AbstractContextManager[Any]] = lambda last: nullcontext(),
        agree: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda loss, norm: (loss, norm),
        before_update: Callable[[], None] = lambda: None,
        ranges: Ranges = OFF,
    ):
        self.denoise = denoise
        self.optimizer = optimizer
        self.objective = objective
        self.timesteps = timesteps or TimestepSampling(objective, options.seed)
        self.all_rows = all_rows
        self.options = options
        self.state = state
        self.positions = positions
        self.posterior = posterior
        self.loss_scale = loss_scale
        self.accumulating = accumulating
        self.agree = agree
        self.before_update = before_update
        self.ranges = ranges
        # Whether gradients keep their addresses and are zeroed; otherwise the backward pass writes new ones.
        self.keep_gradients = False
        self.losses: Callable[..., dict[str, Tensor]] = objective.training_losses
        streams = ("noise", "label drop", "posterior")
        self._keys = {stream: keyed.key(options.seed, stream) for stream in streams}
        self._one = torch.ones((), device=positions.device)
        # Timesteps and weights of the last steps (steps, 2, b), where they follow from losses that are forgotten.
        self.drawn: Tensor | None = None
        if self.timesteps.history is not None:
            self.drawn = torch.zeros(len(state.history), 2, len(positions), device=positions.device)

    def __call__(self, samples: Tensor, labels: Tensor) -> None:
        """One step on samples (b, C, H, W), or moments (b, K, C, H, W) of posteriors, and labels (b,) or captions."""
        with self.ranges("draw"):
            samples, t, noise, labels, weights = self.draw(samples, labels)
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        terms = self._accumulate(samples, t, noise, labels, weights)
        with self.ranges("optimizer_ema"):
            loss = _mean(terms["loss"], weights)
            norm = self._gradient_norm()
            good = self._judge(loss, norm)
            self.before_update()
            self.optimizer.found_inf = self.state.found_inf
            self.optimizer.step()
        self._remember(loss, norm, good, terms, t, weights)
        if self.timesteps.history is not None:
            self.timesteps.update(self.all_rows(t), self.all_rows(terms["loss"]), good)
        if self.loss_scale is not None:
            self.loss_scale.update()
        self.state.step += 1

    @torch.no_grad()
    def draw(self, samples: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Samples, timesteps, noise, labels with some dropped and the losses' weights, of this step's rows."""
        index = self.state.step * self.options.batch_size + self.positions
        if samples.ndim == 5:
            assert self.posterior is not None
            shape = tuple(samples.shape[2:])
            drawn = keyed.normal(self._keys["posterior"], index, shape) if self.posterior.is_drawn else None
            samples = self.posterior.sample(samples, drawn)
        t, weights = self.timesteps.draw(index)
        noise = keyed.normal(self._keys["noise"], index, tuple(samples.shape[1:]))
        dropped = keyed.uniform(self._keys["label drop"], index) < self.options.class_dropout_prob
        if labels.ndim == 3:  # captions (b, S, E): zeros are the null caption
            return samples, t, noise, torch.where(dropped[:, None, None], 0, labels), weights
        return samples, t, noise, torch.where(dropped, self.options.num_classes, labels), weights

    def _accumulate(
        self, samples: Tensor, t: Tensor, noise: Tensor, labels: Tensor, weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Gradients of the mean loss over all micro-batches; the losses' terms (b,) by name."""
        parts: list[dict[str, Tensor]] = []
        count = self.options.accumulate
        cut = [tensor.chunk(count) for tensor in (samples, t, noise, labels)]
        shares = [None] * count if weights is None else weights.chunk(count)
        for number, (x, times, drawn, y, share) in enumerate(zip(*cut, shares, strict=True), start=1):
            with self.accumulating(number == count):
                with self.ranges("forward"):
                    terms = self.losses(self.denoise, x, times, {"y": y}, drawn)
                    loss = _mean(terms["loss"], share)
                    loss = loss if count == 1 else loss / count
                    if self.loss_scale is not None:
                        loss = loss * self.loss_scale.scale[0]
                with self.ranges("backward"):
                    loss.backward()
            parts.append({name: term.detach() for name, term in terms.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _gradient_norm(self) -> Tensor:
        if self.loss_scale is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.loss_scale.unscale([shard(p.grad) for p in parameters if p.grad is not None])
        return self.optimizer.grad_norm()

    def _judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Decide on the device whether the update is made: () bool. Overflow that a lower scale mends is no failure."""
        state = self.state
        bad_loss, bad_norm = self.agree(~loss.isfinite(), ~norm.isfinite())
        bad = bad_loss | bad_norm
        good = ~bad
        if self.loss_scale is not None:
            bad = bad & ~(~bad_loss & (self.loss_scale.scale[0] > 1))
        going = state.failed < 0
        state.skipped += bad & going
        ends = bad & going & (state.skipped > self.options.skip_nonfinite)
        state.failed.copy_(torch.where(ends, state.step + 1, state.failed))
        # The optimiser leaves everything as it is where this is not zero; so it stays once a step has ended the run.
        state.found_inf.copy_(~good | (state.failed >= 0))
        return state.found_inf == 0

    @torch.no_grad()
    def _remember(
        self,
        loss: Tensor,
        norm: Tensor,
        good: Tensor,
        terms: dict[str, Tensor],
        t: Tensor,
        weights: Tensor | None,
    ) -> None:
        noise = self.objective.noise_level(t)
        parts: list[Tensor] = []
        for count, place in ((BUCKETS, noise), (LEVELS, noise ** (1 / 3))):
            part = (place * count).long().clamp(max=count - 1)
            inside = part[:, None] == torch.arange(count, device=t.device)
            # A product would let one NaN into every part.
            sums = torch.where(inside, terms["loss"].float()[:, None], 0.0).sum(0)
            parts += [sums, inside.float().sum(0)]
        means = [terms[name].mean() if name in terms else torch.zeros_like(loss) for name in ("mse", "vb")]
        scale = self._one if self.loss_scale is None else self.loss_scale.scale[0]
        row = torch.cat([torch.stack([loss, *means, norm, good.float(), scale]), *parts])
        row_number = (self.state.step % len(self.state.history)).reshape(1)
        self.state.history.index_copy_(0, row_number, row.float()[None])
        if self.drawn is not None and weights is not None:
            self.drawn.index_copy_(0, row_number, torch.stack([t.float(), weights])[None])


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (losses * weights).mean()
