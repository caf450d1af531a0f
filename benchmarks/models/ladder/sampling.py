"""Sampling on every rung: a loop of the reference's structure, and `Sampler`; all draw the same random numbers."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.models.ladder.rungs import Case, Climber, Rung
from benchmarks.models.ladder.training import others_model
from benchmarks.models.plain_sampling import plain_sampling
from dit_fast.diffusion import create_diffusion
from dit_fast.models import DiT
from dit_fast.sampling import Guidance, Sampler, SamplerConfig

SCALE = 4.0
ROUNDING = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 0.1, "fp8": 0.3}
"""Largest root mean square difference of samples from those in float32, relative to theirs."""


class Sampling:
    """The rungs of a case of sampling on `device`: trajectories of `steps` steps."""

    def __init__(self, case: Case, model: DiT, device: torch.device, steps: int):
        self.case, self.model, self.device, self.steps = case, model.to(device).eval(), device, steps
        self.labels = torch.arange(case.batch, device=device) * 37 % model.config["num_classes"]
        self.expected = self._others(Rung("plain"))()

    def build(self, rung: Rung) -> Climber:
        """A trajectory that has been drawn once, so that all is compiled and captured. Raises what the rung raises."""
        run = (self._ours if rung.model == "ours" else self._others)(rung)
        difference = (run() - self.expected).square().mean().sqrt()
        gap = float(difference / self.expected.square().mean().sqrt())
        return Climber(run, self.steps, gap, ROUNDING[rung.dtype])

    def _others(self, rung: Rung) -> Callable[[], Tensor]:
        called = others_model(self.model, rung, self.device).eval()
        diffusion = create_diffusion(str(self.steps))

        def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=rung.bf16):
                return called(x, t, y).float()

        def run() -> Tensor:
            # As in training: without a fused kernel, scores are tensors of their own.
            with nullcontext() if rung.sdpa else sdpa_kernel(SDPBackend.MATH):
                return plain_sampling(
                    denoise,
                    diffusion,
                    self.labels,
                    (self.model.in_channels, *self.model.config["input_size"]),
                    scale=SCALE if self.case.guided else None,
                    null=self.model.config["num_classes"],
                    seed=0,
                )

        return run

    def _ours(self, rung: Rung) -> Callable[[], Tensor]:
        config = SamplerConfig(
            mode="reference",
            guidance=Guidance(SCALE if self.case.guided else 1.0),
            precision="fp8" if rung.fp8 else "bf16" if rung.bf16 else None,
            graph="auto" if rung.graph else "never",
            compile=rung.compile,
        )
        sampler = Sampler(self.model, create_diffusion(str(self.steps)), config)

        def run() -> Tensor:
            samples = sampler(self.labels, seed=0, batch_size=self.case.batch)
            if rung.graph and sampler.eager_reason is not None:
                raise RuntimeError(f"no CUDA graph: {sampler.eager_reason}")
            return samples

        return run
