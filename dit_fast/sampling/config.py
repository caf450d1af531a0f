"""Configuration of a `Sampler`."""

from dataclasses import dataclass, field

import torch

from dit_fast.errors import ConfigError
from dit_fast.sampling.guidance import Guidance
from dit_fast.sampling.solvers import LAST_STEPS, SOLVERS
from dit_fast.utils.values import FLAG, Number, OneOf, Value, Whole, check_fields

MODES = ("fast", "reference")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
GRAPHS = ("auto", "never")


ETA = Number(0, 1)
BATCH_SIZE = Whole(1, 1 << 24)
_RANGES: dict[str, Value] = {
    "solver": OneOf(SOLVERS),
    "eta": ETA,
    "last_step": OneOf(LAST_STEPS),
    "clip": FLAG,
    "mode": OneOf(MODES),
    "precision": OneOf(tuple(PRECISIONS)),
    "graph": OneOf(GRAPHS),
    "compile": FLAG,
    "offload": FLAG,
    "table_bytes": Whole(1),
}


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are drawn.

    solver, eta  one of SOLVERS; eta is DDIM's share of fresh noise (0: deterministic)
    last_step    of SDEs: one of `solvers.LAST_STEPS`
    guidance     classifier-free guidance; scale 1 runs the conditional branch alone
    clip         clamp the predicted x_0 to [-1, 1] at every step: for pixels, not for latents
    mode         "fast": noise of sample i is a function of (seed, i); "reference": the draws of the reference's
                 sample.py after `torch.manual_seed(seed)`, which depend on the batch
    precision    "fp32", "bf16", "fp16" for a copy of the model in it; "fp8" for one in bfloat16 whose blocks have
                 weights and tokens in float8 (`Float8Linear`; worth it with `compile`, which fuses the scaling of
                 tokens into what makes them); None for the model as it is. States are float32 in any case
    graph        "auto": a CUDA graph where there can be one; "never"
    compile      torch.compile of each step's evaluation
    offload      keep the adaLN weights in the CPU's memory (of the model itself, or of its copy in `precision`)
    table_bytes  most memory for modulation vectors and noise; longer trajectories are cut into segments

    Raises ConfigError for values out of range.
    """

    solver: str = "ddpm"
    eta: float = 0.0
    last_step: str = "mean"
    guidance: Guidance = field(default_factory=Guidance)
    clip: bool = False
    mode: str = "fast"
    precision: str | None = None
    graph: str = "auto"
    compile: bool = False
    offload: bool = False
    table_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        check_fields(self, _RANGES, str)
        if not isinstance(self.guidance, Guidance):
            raise ConfigError(f"guidance {self.guidance!r}: give a Guidance, for example Guidance(4.0)")
