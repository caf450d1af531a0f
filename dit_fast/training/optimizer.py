"""Optimizers of the training loop: AdamW with the moving average of the weights and their low-precision copies.

`AdamWEma` updates all of them in one pass over memory; `TorchAdamWEma` and `ApexAdamWEma` have the same interface.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import is_
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from dit_fast.distributed.sharding import shard
from dit_fast.errors import ConfigError
from dit_fast.kernels import KERNEL_MODES, AdamWSettings, AdamWTensors, adamw_ema, grad_square_sum
from dit_fast.kernels.adamw_tensors import Gradients

LrSchedule = Literal["constant", "cosine"]


def learning_rate(step: int, *, lr: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of optimizer step number `step`, counted from 0.

    Linear warm-up to `lr` over `warmup_steps`; then `lr`, or half a cosine that ends at 0 after `total_steps`
    (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * lr * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class Layout:
    """Properties that the parameters of one launch share.

    copied: whether they have low-precision copies; shards: the process groups over which each is sharded.
    """

    group: int
    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    copied: bool
    shards: tuple[Any, ...]


class AdamWEma(torch.optim.Optimizer):
    """`torch.optim.AdamW` with clipping, moving average and low-precision copy (`dit_fast.kernels.adamw_ema`).

    Parameters are float32 or float64, plain or DTensor (`fully_shard`): each rank updates its shards, and the norm is
    summed over the ranks between which a parameter is sharded. A step does not wait for the device. `state[p]` holds
    step, exp_avg and exp_avg_sq as AdamW's does, and ema. State dicts are interchangeable with AdamW's; for one without
    ema, the average starts from the parameters at the next step.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate: a float, or a tensor on the parameters' device, which a CUDA graph reads at each replay.
        betas, eps: As in AdamW.
        weight_decay: As in AdamW; 0 by default, as in the DiT recipe (Peebles & Xie 2023, section 4).
        ema_decay: d of ema <- d ema + (1 - d) p; None: no average.
        ema_warmup: d = min(ema_decay, (1 + t) / (10 + t)) at step t.
        low_precision_copy: Dtype of the copies that `copy` returns, torch.bfloat16 or torch.float16; None: no copies.
        max_grad_norm: Clip the norm of all gradients as `clip_grad_norm_` does, but without changing `.grad`.
        kernels: "auto", "triton" or "reference".

    Attributes:
        found_inf: One element on the device, or None; while it is not zero, steps change nothing.

    Raises:
        ConfigError: Options, parameters or gradients that are not supported.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        low_precision_copy: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        kernels: str = "auto",
    ):
        if ema_decay is not None and not 0 <= ema_decay <= 1:
            raise ConfigError(f"ema_decay={ema_decay}: expected a number from 0 to 1, or None for no average")
        if low_precision_copy not in (None, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"low_precision_copy={low_precision_copy}: expected torch.bfloat16 or torch.float16"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm={max_grad_norm}: expected a positive number, or None")
        if kernels not in KERNEL_MODES:
            raise ConfigError(f"kernels={kernels!r}: choose one of {', '.join(map(repr, KERNEL_MODES))}")
        self.ema_decay = ema_decay
        self.ema_warmup = ema_warmup
        self.low_precision_copy = low_precision_copy
        self.max_grad_norm = max_grad_norm
        self.kernels = kernels
        self.found_inf: Tensor | None = None
        self._copies: dict[Tensor, Tensor] = {}
        self._rates: dict[tuple[int, torch.device], tuple[float, Tensor]] = {}
        # Tables of pointers for the kernels are built once, and again when these change: gradients' dtypes and
        # parameters' addresses (`_present`), or the tensors in `state` (`_held`).
        self._present: tuple[list[torch.dtype | None], list[int]] = ([], [])
        self._held: list[Any] = []
        self._buckets: list[tuple[Layout, list[int], AdamWTensors]] = []
        self._square_sum: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        lr = group["lr"]
        if not isinstance(lr, Tensor) and not lr >= 0:
            raise ConfigError(f"lr={lr}: expected a number from 0")
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ConfigError(f"lr has {lr.numel()} elements: expected one")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ConfigError(f"betas={group['betas']}: expected two numbers from 0 to below 1")
        for name in ("eps", "weight_decay"):
            if not group[name] >= 0:
                raise ConfigError(f"{name}={group[name]}: expected a number from 0")
        for index, p in enumerate(group["params"]):
            if p.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"parameter {index} of group {len(self.param_groups) - 1} is {p.dtype}: expected float32 or "
                    f"float64; low_precision_copy holds the weights in half precision"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on the parameters that have a gradient; `closure`, if given, computes them and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gathered = self._gather()
        square_sum = self._square_sum
        if square_sum is None and self.max_grad_norm is not None:
            square_sum = self._sum_squares(gathered)
        self._square_sum = None
        for (layout, _, tensors), grads in zip(self._buckets, gathered, strict=True):
            group = self.param_groups[layout.group]
            settings = AdamWSettings(
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                ema_decay=self.ema_decay or 0.0,
                ema_warmup=self.ema_warmup,
                max_norm=self.max_grad_norm,
            )
            adamw_ema(
                tensors,
                grads,
                self._rate(layout),
                settings,
                square_sum=square_sum if self.max_grad_norm is not None else None,
                found_inf=self.found_inf,
                kernels=self.kernels,
            )
        return loss

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Norm of all gradients before clipping, over all shards: one element on the device.

        The next `step` clips with this norm instead of computing it again, unless `zero_grad` is called before.
        """
        self._square_sum = self._sum_squares(self._gather())
        return self._square_sum.sum(dtype=torch.float64).sqrt().float()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._square_sum = None
        super().zero_grad(set_to_none)
        for copy in self._copies.values():
            if set_to_none:
                copy.grad = None
            elif copy.grad is not None:
                copy.grad.zero_()

    def average(self, parameter: Tensor) -> Tensor:
        """The moving average of a parameter, with the same sharding; live, not a copy."""
        if self.ema_decay is None:
            raise ConfigError("this optimizer keeps no average: give it ema_decay")
        return self._state_of(parameter)["ema"]

    def copy(self, parameter: Tensor) -> Tensor:
        """The low-precision copy of a parameter, with the same sharding; live, and up to date after each step.

        The first call for a parameter creates it. After `requires_grad_()` it is a leaf of autograd, and its gradient,
        in low precision, is used as the parameter's, which must then have none.
        """
        if self.low_precision_copy is None:
            raise ConfigError("this optimizer keeps no copy: give it low_precision_copy")
        if parameter not in self._copies:
            low = parameter.detach().to(self.low_precision_copy)
            self._copies[parameter] = torch.nn.Parameter(low, requires_grad=False)
            # The tables must be built again, with this copy.
            self._present = ([], [])
        return self._copies[parameter]

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient of a parameter, or of its copy if that has one, with the same sharding."""
        copy = self._copies.get(parameter)
        return parameter.grad if copy is None or copy.grad is None else copy.grad

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Update the copies after parameters changed outside of `step`, such as by loading a checkpoint."""
        for parameter, copy in self._copies.items():
            copy.copy_(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an AdamWEma or of a `torch.optim.AdamW` with any of its implementations."""
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ConfigError(
                        f"the state dict belongs to an AdamW with {option}=True, which AdamWEma does not support"
                    )
        super().load_state_dict(state_dict)
        self._square_sum = None
        self._present, self._held, self._buckets = ([], []), [], []

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter; missing entries are initialized."""
        state = self.state[p]
        step = state.get("step")
        if (
            not isinstance(step, Tensor)
            or step.device != p.device
            or step.dtype != torch.float32
            or step.ndim
        ):
            state["step"] = torch.tensor(float(step or 0), device=p.device)
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(p)
        if self.ema_decay is not None and "ema" not in state:
            state["ema"] = p.detach().clone()
        return state

    def _gather(self) -> list[Gradients]:
        """Local gradients by launch; rebuilds the tables where parameters, state or gradients' dtypes changed."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [shard(self.gradient(p)) for p in parameters]
        held = [value for state in self.state.values() for value in state.values()]
        present = [None if grad is None else grad.dtype for grad in gradients], addresses(parameters)
        if present != self._present or len(held) != len(self._held) or not all(map(is_, held, self._held)):
            self._make_tables(parameters, gradients)
            self._present = present
            self._held = [value for state in self.state.values() for value in state.values()]
        return [tensors.accept([gradients[i] for i in chosen]) for _, chosen, tensors in self._buckets]

    def _make_tables(self, parameters: list[Tensor], gradients: list[Tensor | None]) -> None:
        layouts: dict[Layout, list[int]] = {}
        steps: set[int] = set()
        groups = [index for index, group in enumerate(self.param_groups) for _ in group["params"]]
        for i, (group, p, grad) in enumerate(zip(groups, parameters, gradients, strict=True)):
            if grad is None:
                continue
            if (found := placements(self.gradient(p))) != placements(p):
                raise ConfigError(f"a gradient is {found} where its parameter is {placements(p)}")
            state = self._state_of(p)
            if state["step"].data_ptr() in steps:
                # Each parameter advances its own step: one shared tensor would be advanced several times.
                state["step"] = state["step"].clone()
            steps.add(state["step"].data_ptr())
            for name in ("exp_avg", "exp_avg_sq", "ema"):
                if name in state and shard(state[name]).stride() != shard(p).stride():
                    state[name] = torch.empty_like(p).copy_(state[name])
            copied = p in self._copies
            key = Layout(group, shard(p).device, p.dtype, grad.dtype, copied, sharing_groups(p))
            layouts.setdefault(key, []).append(i)
        devices = sorted({str(layout.device) for layout in layouts})
        if len(devices) > 1:
            raise ConfigError(f"parameters are on {' and '.join(devices)}: expected one device")
        self._buckets = [
            (layout, chosen, self._tensors([parameters[i] for i in chosen], layout.copied))
            for layout, chosen in layouts.items()
        ]

    def _tensors(self, parameters: list[Tensor], copied: bool) -> AdamWTensors:
        states = [self._state_of(p) for p in parameters]
        try:
            return AdamWTensors(
                [shard(p) for p in parameters],
                [shard(state["exp_avg"]) for state in states],
                [shard(state["exp_avg_sq"]) for state in states],
                [state["step"] for state in states],
                None if self.ema_decay is None else [shard(state["ema"]) for state in states],
                [shard(self.copy(p).detach()) for p in parameters] if copied else None,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _rate(self, layout: Layout) -> Tensor:
        """The learning rate as a tensor on the device, updated when a float changes."""
        lr = self.param_groups[layout.group]["lr"]
        if isinstance(lr, Tensor) and lr.device == layout.device:
            return lr
        value, key = float(lr), (layout.group, layout.device)
        if key not in self._rates:
            self._rates[key] = value, torch.full((), value, dtype=torch.float64, device=layout.device)
        held, rate = self._rates[key]
        if held != value:
            self._rates[key] = value, rate.fill_(value)
        return rate

    def _sum_squares(self, gathered: list[Gradients]) -> Tensor:
        sums = []
        for (layout, _, tensors), grads in zip(self._buckets, gathered, strict=True):
            partial = grad_square_sum(tensors, grads, kernels=self.kernels)
            for ranks in layout.shards:
                dist.all_reduce(partial, group=ranks)
            sums.append(partial)
        if not sums:
            return torch.zeros(1)
        return sums[0] if len(sums) == 1 else torch.cat(sums)


def addresses(tensors: list[Tensor]) -> list[int]:
    return [shard(tensor).data_ptr() for tensor in tensors]


def placements(tensor: Any) -> tuple[Any, ...]:
    """Placements of a DTensor on its mesh; () for another tensor."""
    return getattr(tensor, "placements", ())


def sharing_groups(parameter: Any) -> tuple[Any, ...]:
    """The process groups over which a DTensor is sharded; over replicas, the sum is complete on each rank."""
    return tuple(
        parameter.device_mesh.get_group(index)
        for index, placement in enumerate(placements(parameter))
        if placement.is_shard()
    )


OptimizerName = Literal["adamw_ema", "torch", "apex"]
OPTIMIZERS = get_args(OptimizerName)


def make_optimizer(
    name: str, parameters: Iterable[Tensor], *, lr: Tensor, kernels: str = "auto", **options: Any
) -> "AdamWEma | TorchAdamWEma":
    """The optimizer `name`, which reads its learning rate from the tensor `lr` at each step; the average warms up.

    Args:
        name: One of OPTIMIZERS.
        parameters: Parameters to train.
        lr: Learning rate, one element on the device.
        kernels: As in `AdamWEma`.
        options: betas, weight_decay, ema_decay, max_grad_norm, and others of `AdamWEma`.

    Raises:
        ConfigError: apex is not installed.
    """
    parameters = list(parameters)
    if name == "adamw_ema":
        return AdamWEma(parameters, lr=lr, ema_warmup=True, kernels=kernels, **options)
    return (ApexAdamWEma if name == "apex" else TorchAdamWEma)(parameters, lr=lr, **options)


class TorchAdamWEma(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`, and then the moving average in separate passes over memory.

    Options, `found_inf`, `grad_norm`, `average` and `state` as in `AdamWEma` with ema_warmup. One parameter group in
    float32; clipping scales gradients in place.
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
        """Norm of all gradients before clipping; the next `step` clips with it."""
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
                "build it from its repository, or give --optimizer adamw_ema or torch"
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
        # FusedAdam increments its count before it checks whether the step is skipped.
        count = self.state[p]["step"].reshape(1).int()
        group["lr"], group["step"] = self.param_groups[0]["lr"].float(), count - 1
        self._apex._dummy_overflow_buf.zero_()
        # FusedAdam takes from a GradScaler whether to skip the step, and a scale by which it divides the gradients.
        scale = torch.ones(1, device=p.device) if factor is None else factor.reshape(1).reciprocal()
        self._apex.step(
            grad_scaler=SimpleNamespace(
                _check_inf_per_device=lambda optimizer: {p.device: found}, _get_scale_async=lambda: scale
            )
        )
