"""One operation at one shape, ready to be checked against the reference and to be timed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.static_report import DTYPES
from dit_fast.kernels.launch import Launch, record_launches
from dit_fast.kernels.registry import OpSpec


class Bench:
    """One operation at one shape and in one dtype setting: inputs, reference results and what to time."""

    def __init__(self, spec: OpSpec, shape: tuple[int, int, int], dtypes: str, device: str) -> None:
        self.spec, self.device = spec, device
        generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

        def make(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device, generator=generator)

        self.inputs = spec.make_inputs(shape, *DTYPES[dtypes], make)

    def run(
        self, function: Callable[..., Any], dtype: torch.dtype | None = None, **keywords: Any
    ) -> list[Tensor]:
        """Outputs and the gradients of all floating-point inputs, computed in `dtype` if one is given."""
        inputs = [
            value.detach().to(dtype or value.dtype).requires_grad_() if _wants_gradient(value) else value
            for value in self.inputs
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

    def passes(self, function: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
        """What to time: "forward" as training runs it, "backward" alone, and "both"."""
        inputs = [
            value.detach().clone().requires_grad_() if _wants_gradient(value) else value
            for value in self.inputs
        ]
        leaves = [value for value in inputs if _wants_gradient(value)]

        def forward() -> tuple[Tensor, ...]:
            result = function(*inputs)
            return result if isinstance(result, tuple) else (result,)

        outputs = forward()
        cotangents = [torch.full_like(output, 0.5) for output in outputs]
        return {
            "forward": forward,
            "backward": lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True),
            "both": lambda: torch.autograd.grad(forward(), leaves, cotangents),
        }

    def launches(self, name: str, capability: int) -> list[Launch]:
        """The launches of kernel `name`, recorded."""
        with record_launches(capability) as launches:
            self.kernel()
        return [launch for launch in launches if launch.kernel.fn.__name__ == name]

    def errors(self, found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
        return [
            float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
            for a, b in zip(found, exact, strict=True)
        ]

    def disagreement(self, function: Callable[..., Any] | None = None) -> str | None:
        """In words, where `function` is less exact than three times PyTorch in the same dtypes; None if nowhere.

        None is the operation itself. Both are compared with the reference in float64; a rounding of the result's own
        dtype is always allowed.
        """
        exact = self.run(self.spec.reference, torch.float64)
        found = self.kernel() if function is None else self.run(function)
        ours = self.run(self.spec.reference)
        limits = self.errors(ours, exact)
        for index, (error, limit) in enumerate(zip(self.errors(found, exact), limits, strict=True)):
            allowed = 3 * limit + torch.finfo(found[index].dtype).eps
            if not error <= allowed:
                return f"result {index} has a relative error of {error:.2e}, PyTorch {limit:.2e}"
        return None


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
