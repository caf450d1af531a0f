"""Configuration of a `Sampler`."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from dit_fast.diffusion.adaptive import ATOL, RTOL
from dit_fast.errors import ConfigError
from dit_fast.sampling.guidance import Guidance
from dit_fast.sampling.schedule import VELOCITY_SOLVERS
from dit_fast.sampling.solvers import SDE, LastStep, SdeMethod, Solver
from dit_fast.utils.options import check_options, documented, option
from dit_fast.utils.values import Number, Whole

SamplePrecision = Literal["fp32", "bf16", "fp16", "fp8"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}

TOLERANCE = Number(0, 1, above=True)
BATCH_SIZE = Whole(1, 1 << 24)


@documented
@dataclass(frozen=True)
class SamplerConfig:
    """Configuration of a `Sampler`.

    With mode "fast" the noise of sample i is a function of (seed, i); "reference" repeats the draws of the reference's
    sample.py after `torch.manual_seed(seed)`, which depend on the batch. States are float32 in every precision; fp8 is
    worth it with `compile`, which fuses the scaling of activations into the operation before.

    Raises:
        ConfigError: a value is out of range.
    """

    solver: Solver = option("ddpm", "Solver; ddpm applies only to diffusion, sde-* only to flow matching")
    eta: float = option(0.0, "Fraction of fresh noise in each step of --solver ddim", Number(0, 1))
    atol: float | None = option(None, "Absolute tolerance of dopri5", TOLERANCE, default_text=f"{ATOL:g}")
    rtol: float | None = option(None, "Relative tolerance of dopri5", TOLERANCE, default_text=f"{RTOL:g}")
    last_step: LastStep = option(
        "mean",
        "Last step of the sde solvers: the mean without noise, an Euler step, the predicted image, or no step",
    )
    sde_method: SdeMethod = option("euler", "Method of the sde solvers: Euler-Maruyama, or SiT's of Heun")
    diffusion_norm: float = option(1.0, "Factor of the noise of the sde solvers", Number(0, 1e6))
    guidance: Guidance = field(default_factory=Guidance)
    clip: bool = option(
        False, "Clamp the predicted image to [-1, 1] at each step, for images rather than latents"
    )
    mode: Literal["fast", "reference"] = option(
        "fast",
        "Random draws: fast draws per image, reference repeats those of the reference implementation, per batch",
    )
    precision: SamplePrecision | None = option(
        None, "Dtype of the weights; fp8 applies to weights and tokens of the blocks, the rest is bf16"
    )
    graph: Literal["auto", "never"] = option("auto", "Capture trajectories as CUDA graphs where possible")
    compile: bool = option(False, "Compile the evaluation of the model with torch.compile")
    offload: bool = option(False, "Keep the adaLN weights in CPU memory")
    table_bytes: int = option(
        1 << 30,
        "Memory limit for modulation vectors and noise; longer trajectories are cut into segments",
        Whole(1),
    )

    def __post_init__(self) -> None:
        check_options(self, str)
        if not isinstance(self.guidance, Guidance):
            raise ConfigError(f"guidance {self.guidance!r}: give a Guidance, for example Guidance(4.0)")
        adaptive, in_time, sde = (
            self.solver == "dopri5",
            self.solver in VELOCITY_SOLVERS,
            self.solver.startswith(SDE),
        )
        for name, default, allowed, where in (
            ("atol", None, adaptive, "dopri5, whose steps adapt"),
            ("rtol", None, adaptive, "dopri5, whose steps adapt"),
            ("sde_method", "euler", sde, "the sde solvers"),
            ("diffusion_norm", 1.0, sde, "the sde solvers"),
            ("clip", False, not in_time, "solvers that predict the image, for example ddim"),
        ):
            value = getattr(self, name)
            if value != default and not allowed:
                raise ConfigError(
                    f"{name} {value} applies only to {where}, and the solver is {self.solver}: remove it"
                )

    def tolerances(self) -> tuple[float, float]:
        """(atol, rtol) of dopri5."""
        return self.atol or ATOL, self.rtol or RTOL
