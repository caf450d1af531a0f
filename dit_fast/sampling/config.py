"""Configuration of a `Sampler`."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from dit_fast.errors import ConfigError
from dit_fast.sampling.guidance import Guidance
from dit_fast.sampling.solvers import LastStep, Solver
from dit_fast.utils.options import check_options, documented, option
from dit_fast.utils.values import Number, Whole

SamplePrecision = Literal["fp32", "bf16", "fp16", "fp8"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}

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
    last_step: LastStep = option(
        "mean",
        "Last step of the sde solvers: the mean without noise, an Euler step, the predicted image, or no step",
    )
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
