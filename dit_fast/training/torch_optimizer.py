"""PyTorch's and apex's fused AdamW with `AdamWEma`'s interface: clipping, moving average, steps that change nothing."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import ConfigError
from dit_fast.training.optimizer import AdamWEma

OPTIMIZERS = ("ours", "torch", "apex")


def make_optimizer(
    name: str, parameters: Iterable[Tensor], *, lr: Tensor, kernels: str = "auto", **options: Any
) -> "AdamWEma | TorchAdamWEma":
    """The optimiser `name` ("ours": AdamWEma, "torch", "apex"), whose rate is read from the tensor `lr` at each step.

    options: betas, weight_decay, ema_decay, max_grad_norm; the average warms up. Raises ConfigError where apex is not
    installed.
    """
    parameters = list(parameters)
    if name == "ours":
        return AdamWEma(parameters, lr=lr, ema_warmup=True, kernels=kernels, **options)
    return (ApexAdamWEma if name == "apex" else TorchAdamWEma)(parameters, lr=lr, **options)


class TorchAdamWEma(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`, then a moving average in passes of its own.

    Options, `found_inf`, `grad_norm`, `average` and `state` as in `AdamWEma` with ema_warmup; one parameter group,
    float32, whose gradients are scaled in place where they are clipped.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: Tensor,
        betas: tuple[float, float],
        weight_decay: float,
        ema_decay: float,
        max_grad_norm: float | None,
    ):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.ema_decay = ema_decay
        self.max_grad_norm = max_grad_norm
        self.found_inf: Tensor | None = None
        self._norm: Tensor | None = None
        for p in self._parameters:
            zero = torch.zeros((), device=p.device)
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p] = {"step": zero, **moments, "ema": p.detach().clone()}

    @property
    def _parameters(self) -> list[Tensor]:
        return self.param_groups[0]["params"]

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Norm of all gradients before clipping; a `step` that follows clips with it."""
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return self._norm

    def average(self, parameter: Tensor) -> Tensor:
        """The moving average of a parameter; live, not a copy."""
        return self.state[parameter]["ema"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on the parameters that have a gradient; `closure` must be None."""
        factor = self._clip_factor()
        self._update(factor)
        self._norm = None
        trained = [p for p in self._parameters if p.grad is not None]
        steps = torch.stack([self.state[p]["step"] for p in trained]).double()
        weights = 1 - ((1 + steps) / (10 + steps)).clamp(max=self.ema_decay)
        if self.found_inf is not None:
            weights = weights * (self.found_inf == 0)
        averages = [self.average(p) for p in trained]
        torch._foreach_lerp_(averages, trained, list(weights.float().unbind()))
        return None

    def _clip_factor(self) -> Tensor | None:
        if self.max_grad_norm is None:
            return None
        norm = self.grad_norm() if self._norm is None else self._norm
        return (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def _update(self, factor: Tensor | None) -> None:
        if factor is not None:
            torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], factor)
        super().step()


class ApexAdamWEma(TorchAdamWEma):
    """The same with NVIDIA apex's `FusedAdam` for the update. Raises ConfigError where apex is not installed."""

    def __init__(self, params: Iterable[Tensor], **options: Any):
        try:
            from apex.optimizers import FusedAdam
        except ImportError as error:
            raise ConfigError(
                "--optimizer apex: NVIDIA's apex is not installed (apex on PyPI is an unrelated package); "
                "build it from its repository, or give --optimizer ours or torch"
            ) from error
        super().__init__(params, **options)
        group = self.param_groups[0]
        self._apex = FusedAdam(
            self._parameters, lr=0.0, betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"], adam_w_mode=True, capturable=True,
        )  # fmt: skip

    def _update(self, factor: Tensor | None) -> None:
        p, group = self._parameters[0], self._apex.param_groups[0]
        for parameter in self._parameters:
            moments = {name: self.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")}
            self._apex.state[parameter] = moments
        found = torch.zeros(1, device=p.device) if self.found_inf is None else self.found_inf.reshape(1)
        done = (found == 0).float()
        for parameter in self._parameters:
            self.state[parameter]["step"] += done[0]
        # It adds one to the count before it knows whether this step is made.
        count = self.state[p]["step"].reshape(1).int()
        group["lr"], group["step"] = self.param_groups[0]["lr"].float(), count - 1
        self._apex._dummy_overflow_buf.zero_()
        # FusedAdam learns from a GradScaler that a step is void, and divides the gradients by its scale.
        scale = torch.ones(1, device=p.device) if factor is None else factor.reshape(1).reciprocal()
        self._apex.step(
            grad_scaler=SimpleNamespace(
                _check_inf_per_device=lambda optimizer: {p.device: found}, _get_scale_async=lambda: scale
            )
        )
