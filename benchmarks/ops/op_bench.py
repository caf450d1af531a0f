"""One operation at one shape, or an optimizer's step, ready to be checked against the reference and to be timed."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.clock import Timed
from benchmarks.compile.static_report import DTYPES
from benchmarks.ops.registry import OpSpec
from dit_fast.kernels.launch import Launch, record_launches
from dit_fast.models import DiT_models
from dit_fast.training.optimizer import AdamWEma, make_optimizer

SUMS = 2e-6
"""By how much sums over tokens in float32 may differ with the order, relative to the result."""


class Bench:
    """One operation at one shape and in one dtype setting: inputs, reference results and what to time."""

    def __init__(self, spec: OpSpec, shape: tuple[int, int, int], dtypes: str, device: str) -> None:
        self.spec, self.dtypes, self.device = spec, dtypes, device
        generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

        def make(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device, generator=generator)

        self.inputs = spec.make_inputs(shape, *DTYPES[dtypes], make)

    def run(
        self, function: Callable[..., Any], dtype: torch.dtype | None = None, **keywords: Any
    ) -> list[Tensor]:
        """Outputs and the gradients of all floating-point inputs, computed in `dtype` if one is given."""
        inputs = [
            value.detach().to(dtype or value.dtype).requires_grad_() if wanted else value
            for value, wanted in zip(self.inputs, self.spec.differentiable(self.inputs), strict=True)
        ]
        result = function(*inputs, **keywords)
        outputs = [out for out in (result if isinstance(result, tuple) else (result,)) if out.requires_grad]
        cotangents = [torch.full_like(out, 0.5) for out in outputs]
        torch.autograd.backward(outputs, cotangents)
        gradients = [value.grad for value in inputs if isinstance(value, Tensor) and value.grad is not None]
        return [out.detach() for out in outputs] + gradients

    def kernel(self, **keywords: Any) -> list[Tensor]:
        """`run` of the operation itself, as a model calls it on this device."""
        return self.run(self.spec.op, kernels="auto" if self.device == "cuda" else "triton", **keywords)

    def passes(self, function: Callable[..., Any]) -> dict[str, Timed]:
        """What to time: "forward" as training runs it, "backward" alone, and "both"."""
        inputs = [
            value.detach().clone().requires_grad_() if wanted else value
            for value, wanted in zip(self.inputs, self.spec.differentiable(self.inputs), strict=True)
        ]
        leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]

        def forward() -> tuple[Tensor, ...]:
            result = function(*inputs)
            return result if isinstance(result, tuple) else (result,)

        cotangents = [torch.full_like(output, 0.5) for output in forward()]

        def backward(*outputs: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, leaves, cotangents)

        return {
            "forward": Timed(forward),
            # Each time of a graph of its own: compiled ones give their buffers away.
            "backward": Timed(backward, before=forward),
            "both": Timed(lambda: backward(*forward())),
        }

    def launches(self, name: str, capability: int) -> list[Launch]:
        """The launches of kernel `name`, recorded."""
        with record_launches(capability) as launches:
            self.kernel()
        return [launch for launch in launches if launch.kernel.fn.__name__ == name]

    def disagreement(self, function: Callable[..., Any] | None = None) -> str | None:
        """In words, where `function` is less exact than three times PyTorch in the same dtypes; None if nowhere.

        None is the operation itself. Both are compared with the reference in float64; a rounding of the result's own
        dtype is always allowed, and sums over tokens in another order.
        """
        exact = self.run(self.spec.reference, torch.float64)
        found = self.kernel() if function is None else self.run(function)
        ours = self.run(self.spec.reference)
        limits = errors(ours, exact)
        for index, (error, limit) in enumerate(zip(errors(found, exact), limits, strict=True)):
            allowed = 3 * limit + torch.finfo(found[index].dtype).eps + SUMS
            if not error <= allowed:
                return f"result {index} has a relative error of {error:.2e}, PyTorch {limit:.2e}"
        return None


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative, by the norm of each tensor."""
    return [
        float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, exact, strict=True)
    ]


class OptimizerBench:
    """A step of AdamW and moving average on float32 parameters of the shapes of a model's."""

    BYTES = 36
    """Moved for a parameter at least: gradient read, weight, two moments and average read and written."""
    OPTIONS: ClassVar[dict[str, Any]] = dict(
        betas=(0.9, 0.999), weight_decay=0.01, ema_decay=0.9999, max_grad_norm=None
    )

    def __init__(self, model: str, device: str) -> None:
        self.device = device
        with torch.device("meta"):
            parameters = DiT_models[model]().parameters()
        self.shapes = [p.shape for p in parameters if p.requires_grad]
        self.count = sum(shape.numel() for shape in self.shapes)

    def _parameters(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: str) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        made = [torch.randn(*shape, device=device, generator=generator) for shape in shapes]
        for index, p in enumerate(made):
            p.grad = torch.randn(p.shape, device=device, generator=generator).mul_(10.0 ** (index % 3 - 1))
        parameters = [p.to(dtype) for p in made]
        for new, old in zip(parameters, made, strict=True):
            new.grad = old.grad.to(dtype) if old.grad is not None else None
        return parameters

    def step(self, provider: str) -> Timed:
        """What to time; ConfigError where the provider is not there."""
        rate = torch.tensor(1e-4, device=self.device)
        parameters = self._parameters(self.shapes, torch.float32, self.device)
        return Timed(make_optimizer(provider, parameters, lr=rate, **self.OPTIONS).step)

    def disagreement(self, provider: str) -> str | None:
        """In words, where two steps are less exact than three times PyTorch's AdamW; None if nowhere."""
        shapes = [(1,), (1000,), (64, 1153)]

        def run(name: str, dtype: torch.dtype) -> list[Tensor]:
            parameters = self._parameters(shapes, dtype, self.device)
            before = [p.clone() for p in parameters]
            rate = torch.tensor(1e-2, device=self.device)
            optimizer = (
                AdamWEma(parameters, lr=rate, ema_warmup=True, kernels="reference", **self.OPTIONS)
                if name == "exact"
                else make_optimizer(name, parameters, lr=rate, **self.OPTIONS)
            )
            for _ in range(2):
                optimizer.step()
            changes = [p.detach() - old for p, old in zip(parameters, before, strict=True)]
            return [*changes, *(optimizer.average(p) for p in parameters)]

        exact = run("exact", torch.float64)
        limits = errors(run("torch", torch.float32), exact)
        for index, (error, limit) in enumerate(
            zip(errors(run(provider, torch.float32), exact), limits, strict=True)
        ):
            if not error <= 3 * limit + torch.finfo(torch.float32).eps:
                return f"result {index} has a relative error of {error:.2e}, PyTorch {limit:.2e}"
        return None
