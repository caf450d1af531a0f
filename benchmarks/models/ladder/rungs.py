"""What is climbed: the rungs, the cases, and what a built rung can do."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

KINDS = {
    "train": ("train", "step"),
    "train-disk": ("train", "step from disk"),
    "sample": ("sample", "step"),
    "sample-cfg": ("sample", "guided step"),
}
"""Benchmark and direction of the rows of each kind."""


@dataclass(frozen=True)
class Rung:
    """How a step is made. model: "plain" PyTorch, "diffusers", or "ours" with dit_fast's step or sampler.

    bf16: autocast in training and for others' models, our sampler's copy of the weights. attention, epilogue: `DiT`'s
    options. tuned: launches follow the device's tuned table; without it they follow the heuristics, even
    where there is a table.
    """

    name: str
    model: str = "plain"
    tf32: bool = False
    bf16: bool = False
    sdpa: bool = True
    compile: bool = False
    graph: bool = False
    fp8: bool = False
    recompute: str = "none"
    attention: str = "auto"
    epilogue: str = "auto"
    tuned: bool = False
    needs_gpu: bool = False

    @property
    def dtype(self) -> str:
        """What products are made in."""
        return "fp8" if self.fp8 else "bf16" if self.bf16 else "tf32" if self.tf32 else "fp32"

    @property
    def training_only(self) -> bool:
        """Whether the rung differs from the others in training alone."""
        return self.tuned or (self.recompute, self.attention, self.epilogue) != ("none", "auto", "auto")

    def on(self, device: torch.device, bf16: bool = False) -> "Rung":
        """The rung as it runs there: on a CPU in float32 unless `bf16`. One that needs a GPU stays as it is."""
        as_it_is = device.type == "cuda" or self.needs_gpu
        return self if as_it_is else replace(self, tf32=False, bf16=self.bf16 and bf16, fp8=False)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16 (AMX or AVX-512 BF16); PyTorch emulates it elsewhere."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _low(name: str, model: str = "plain", **settings: object) -> Rung:
    return Rung(name, model, tf32=True, bf16=True, **settings)  # type: ignore[arg-type]


# In the order of tables; another rung is a line. What a call runs first, `--only` says.
RUNGS = (
    Rung("plain fp32", sdpa=False),
    Rung("+ TF32", tf32=True, sdpa=False, needs_gpu=True),
    _low("+ bf16", sdpa=False, needs_gpu=True),
    _low("+ SDPA"),
    _low("+ torch.compile", compile=True),
    _low("diffusers", "diffusers"),
    _low("diffusers + torch.compile", "diffusers", compile=True),
    _low("ours, eager", "ours"),
    _low("ours", "ours", compile=True),
    _low("ours, tuned", "ours", compile=True, tuned=True, needs_gpu=True),
    _low("ours, attention triton", "ours", compile=True, attention="triton", needs_gpu=True),
    _low("ours, epilogue triton", "ours", compile=True, epilogue="triton", needs_gpu=True),
    _low("ours, epilogue cublaslt", "ours", compile=True, epilogue="cublaslt", needs_gpu=True),
    _low("ours, least memory", "ours", compile=True, recompute="cheap", needs_gpu=True),
    _low("ours + CUDA graph", "ours", compile=True, graph=True, needs_gpu=True),
    _low("ours + CUDA graph + fp8", "ours", compile=True, graph=True, fp8=True, needs_gpu=True),
)


@dataclass(frozen=True)
class Case:
    """What is timed: one of KINDS, of a model of `DiT_models` at a number of pixels; batch: images.

    depth: blocks in place of the model's own, for a look in seconds. bf16: on a CPU, bfloat16 in place of float32.
    """

    kind: str
    model: str
    image_size: int
    batch: int
    depth: int | None = None
    bf16: bool = False

    @property
    def name(self) -> str:
        """The model as rows name it: one of another depth is not taken for the model's own."""
        return self.model if self.depth is None else f"{self.model}, depth {self.depth}"

    def place(self, rung: Rung) -> tuple[str, str, tuple[int, ...], str, str, str]:
        """What begins its row in `benchmarks.ops.rows`."""
        benchmark, direction = KINDS[self.kind]
        return benchmark, self.name, (self.batch, self.image_size), rung.dtype, rung.name, direction

    @property
    def trains(self) -> bool:
        return self.kind.startswith("train")

    @property
    def guided(self) -> bool:
        return self.kind == "sample-cfg"

    @property
    def forwards(self) -> int:
        """Images that go through the model in a step."""
        return self.batch * (1 + self.guided)

    def rungs(self, names: list[str] | None = None) -> tuple[Rung, ...]:
        """Those of RUNGS that differ from the others here; of these, those of `names`, in their order."""
        here = {
            rung.name: rung
            for rung in RUNGS
            if (self.trains or not rung.training_only) and (rung.bf16 or not self.bf16)
        }
        return tuple(here[name] for name in (here if names is None else names) if name in here)


@dataclass(frozen=True)
class Climber:
    """A rung that has been built and has made its first results.

    run: makes `steps` steps; gap: how far those first results are from the plain model's in float32, relatively;
    most: beyond that it is another model.
    """

    run: Callable[[], object]
    steps: int
    gap: float
    most: float
