"""What the hardware allows: `python -m benchmarks.roofline [--model DiT-XL/2] [--mode train|sample] [--measure]`.

Counts operations of the matrix products and bytes that must move, divides them by the rates of a device, and prints the
limit of each part and of the whole step, with the measured time beside it where `--measure` runs the parts here.
Operations are multiplications and additions apart: twice the MACs that the paper calls Gflops. Backward counts twice
the forward products; attention, which makes its scores again, 2.5 times. Unavoidable passes of a block, in token
tensors U: 8 forward, 15 backward, GELU in the epilogue of its product and the residual stream in bfloat16.
Rates of "h100" and "h200" are assumptions from published measurements; "here" measures a copy and a product.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import ceiling, seconds
from benchmarks.environment import environment
from dit_fast.kernels.registry import REGISTRY
from dit_fast.models import SIZES

U_FORWARD, U_BACKWARD = 8, 15
OPTIMIZER_BYTES = 38
"""Of a parameter: weight, moments and average read and written in float32, gradient read, bfloat16 copy written."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of products and of attention, forward and backward, and bytes a second."""

    product: float
    attention_forward: float
    attention_backward: float
    memory: float

    def describe(self) -> str:
        forward, backward = self.attention_forward * 1e-12, self.attention_backward * 1e-12
        return (
            f"{self.product * 1e-12:.3g} TFLOP/s, attention {forward:.3g} and {backward:.3g}, "
            f"{self.memory * 1e-9:.4g} GB/s"
        )


DEVICES = {"h100": (800e12, 3.0e12), "h200": (790e12, 4.3e12)}
"""Products of 8192 squared, and a copy."""


def assumed_rates(device: str, tokens: int) -> Rates:
    """Rates of a device of DEVICES; attention of heads of 72 is faster from 1,024 tokens on."""
    product, memory = DEVICES[device]
    attention = (400e12, 300e12) if tokens < 1024 else (450e12, 350e12)
    return Rates(product, *attention, memory)


@dataclass(frozen=True)
class Step:
    """A DiT on latents of image_size / 8 squared with four channels, `batch` forwards of it at once."""

    depth: int
    width: int
    patch: int
    image_size: int
    batch: int

    @property
    def tokens(self) -> int:
        return (self.image_size // 8 // self.patch) ** 2

    @property
    def unit(self) -> int:
        """Bytes of one bfloat16 token tensor."""
        return 2 * self.batch * self.tokens * self.width

    @property
    def block_weights(self) -> int:
        """Of the four linear layers of all blocks: 12 D^2 each, and their biases."""
        return self.depth * (12 * self.width**2 + 9 * self.width)

    @property
    def modulation_weights(self) -> int:
        """Of the layers that make modulation vectors, the final one's included."""
        D = self.width
        return self.depth * (6 * D * D + 6 * D) + 2 * D * D + 2 * D

    @property
    def other_weights(self) -> int:
        """Patches, timesteps (256 waves), 1,001 labels and the final layer, which predicts noise and variance."""
        D, pixels = self.width, self.patch**2 * 4
        return (pixels + 1) * D + (256 + 1) * D + (D + 1) * D + 1001 * D + (D + 1) * 2 * pixels

    @property
    def parameters(self) -> int:
        return self.block_weights + self.modulation_weights + self.other_weights


@dataclass(frozen=True)
class Part:
    """One kind of work of a step: operations and bytes, forward and backward, of all blocks together."""

    name: str
    flops: tuple[float, float] = (0.0, 0.0)
    bytes: tuple[float, float] = (0.0, 0.0)
    attention: bool = False

    def limit(self, rates: Rates) -> float:
        """Seconds: in each direction the longer of computing and moving."""
        speeds = (
            (rates.attention_forward, rates.attention_backward) if self.attention else (rates.product,) * 2
        )
        return sum(
            max(flops / speed, moved / rates.memory)
            for flops, moved, speed in zip(self.flops, self.bytes, speeds, strict=True)
        )


def training_parts(step: Step) -> list[Part]:
    """Forward, backward and update."""
    B, T, D, L, U = step.batch, step.tokens, step.width, step.depth, step.unit

    def product(name: str, inputs: int, outputs: int, rows: int, count: int) -> Part:
        flops = 2.0 * rows * inputs * outputs * count
        moved = 2.0 * count * (rows * (inputs + outputs) + inputs * outputs)
        return Part(name, (flops, 2 * flops), (moved, 2 * moved))

    scores = 4.0 * B * T * T * D * L
    return [
        product("qkv", D, 3 * D, B * T, L),
        product("proj", D, D, B * T, L),
        product("fc1", D, 4 * D, B * T, L),
        product("fc2", 4 * D, D, B * T, L),
        Part("attention", (scores, 2.5 * scores), (4.0 * U * L, 8.0 * U * L), attention=True),
        Part("passes of the blocks", bytes=(float(U_FORWARD * U * L), float(U_BACKWARD * U * L))),
        product("modulation", D, 6 * D, B, L),
        product("patches and final layer", 3 * step.patch**2 * 4, D, B * T, 1),
        Part("optimizer and average", bytes=(0.0, float(OPTIMIZER_BYTES * step.parameters))),
    ]


def sampling_parts(step: Step, hoisted: bool = True) -> list[Part]:
    """One denoising step; `hoisted`: modulation vectors were made before the loop, and their weights are not read."""
    forward = [
        Part(p.name, (p.flops[0], 0.0), (p.bytes[0], 0.0), p.attention)
        for p in training_parts(step)
        if p.name != "optimizer and average"
    ]
    return [part for part in forward if not (hoisted and part.name == "modulation")]


def training_limit(step: Step, rates: Rates) -> float:
    """Seconds of a training step, its parts one after the other."""
    return sum(part.limit(rates) for part in training_parts(step))


def sampling_limit(step: Step, rates: Rates, hoisted: bool = True) -> float:
    """Seconds of a denoising step: weights stream in while products run; the blocks' passes come on top."""
    parts = {part.name: part for part in sampling_parts(step, hoisted)}
    passes = parts.pop("passes of the blocks")
    weights = 2 * (step.parameters - (step.modulation_weights if hoisted else 0) - 1001 * step.width)
    computing = sum(part.flops[0] for part in parts.values()) / rates.product
    return max(computing, weights / rates.memory) + passes.limit(rates)


def measured_parts(step: Step, heads: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, float]:
    """Seconds of the parts of a block, forward and backward, times the depth, run here one by one."""
    rows = step.batch * step.tokens
    shape = (step.batch, step.tokens, step.width)

    def make(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    def median(function: Callable[[], Any]) -> float:
        return step.depth * statistics.median(seconds(function, repeats))

    def product(inputs: int, outputs: int) -> float:
        x = make(rows, inputs, dtype=dtype).requires_grad_()
        weight = make(outputs, inputs, dtype=dtype).requires_grad_()
        grad = make(rows, outputs, dtype=dtype)
        return median(lambda: torch.autograd.grad(torch.nn.functional.linear(x, weight), (x, weight), grad))

    def operation(name: str, inputs: tuple[Any, ...]) -> float:
        leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_leaf else x for x in inputs]
        wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]

        def run() -> Any:
            result = REGISTRY[name].op(*leaves)
            outputs = result if isinstance(result, tuple) else (result,)
            return torch.autograd.grad(outputs, wanted, [torch.ones_like(out) for out in outputs])

        return median(run)

    D = step.width
    fused = REGISTRY["gated_residual_adaln"].make_inputs(shape, dtype, dtype, make)
    gelu = REGISTRY["gelu"].make_inputs((*shape[:2], 4 * D), dtype, dtype, make)
    qkv = make(*shape[:2], 3 * D, dtype=dtype)
    return {
        "qkv": product(D, 3 * D),
        "proj": product(D, D),
        "fc1": product(D, 4 * D),
        "fc2": product(4 * D, D),
        "attention": operation("attention", (qkv, heads, make(3 * D, dtype=dtype))),
        "passes of the blocks": 2 * operation("gated_residual_adaln", fused) + operation("gelu", gelu),
    }


def table(parts: Sequence[Part], rates: Rates, measured: dict[str, float], whole: float) -> str:
    """Limits in milliseconds, what makes them, and the measured times with the share of the limit reached."""
    lines = [
        f"{'part':26}{'GFLOP':>12}{'GB':>10}{'limit ms':>11}{'bound by':>10}{'measured ms':>13}{'share':>8}"
    ]
    for part in parts:
        limit = part.limit(rates)
        computing = Part(part.name, part.flops, attention=part.attention).limit(rates)
        bound = "products" if computing > 0.999 * limit else "memory"
        time = measured.get(part.name)
        work = f"{part.name:26}{sum(part.flops) / 1e9:12.1f}{sum(part.bytes) / 1e9:10.2f}"
        beside = f"{time * 1e3:13.3f}{limit / time:8.0%}" if time else f"{'-':>13}{'-':>8}"
        lines.append(f"{work}{limit * 1e3:11.3f}{bound:>10}{beside}")
    return "\n".join([*lines, f"{'whole step':26}{'':22}{whole * 1e3:11.3f}"])


def draw(parts: Sequence[Part], rates: Rates, measured: dict[str, float], path: Path) -> None:
    """Bars of the limits, and of the measured times beside them, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    places = range(len(parts))
    axes.barh([p - 0.2 for p in places], [1e3 * p.limit(rates) for p in parts], 0.38, label="limit")
    if measured:
        times = [1e3 * measured.get(p.name, 0.0) for p in parts]
        axes.barh([p + 0.2 for p in places], times, 0.38, label="measured here")
    axes.set_yticks(list(places), [p.name for p in parts])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The limit that the hardware sets to a step of DiT.")
    parser.add_argument(
        "--model", default="DiT-XL/2", help="a size and patch of the paper (default: DiT-XL/2)"
    )
    parser.add_argument("--mode", choices=("train", "sample"), default="train")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument(
        "--batch", type=int, help="images, in sampling forwards (default: 256, in sampling 1)"
    )
    parser.add_argument("--device", choices=("here", *DEVICES), default="h100")
    parser.add_argument(
        "--measure", action="store_true", help="run the parts on this machine (training only)"
    )
    parser.add_argument("--out", type=Path, help="folder for roofline.json and roofline.png")
    args = parser.parse_args(arguments)
    name, _, patch = args.model.removeprefix("DiT-").partition("/")
    if name not in SIZES or not patch.isdecimal() or not int(patch):
        parser.error(f"--model {args.model}: give DiT-{{{','.join(SIZES)}}}/PATCH")
    if args.image_size < 8 * int(patch) or args.image_size % (8 * int(patch)):
        parser.error(f"--image-size {args.image_size} is not a multiple of 8 x patch {patch}")
    batch = args.batch or (256 if args.mode == "train" else 1)
    if batch < 1:
        parser.error(f"--batch {batch}: give at least 1")
    if args.measure and (args.mode, args.device) != ("train", "here"):
        parser.error("--measure times training on this machine: give --mode train --device here")
    size = SIZES[name]
    step = Step(size["depth"], size["hidden_size"], int(patch), args.image_size, batch)

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    measured: dict[str, float] = {}
    if args.device == "here":
        best = ceiling(dtype)
        rates = Rates(best.product, best.product, best.product, best.copy)
        if args.measure:
            where = "cuda" if on_gpu else "cpu"
            measured = measured_parts(step, size["num_heads"], dtype, where, 20 if on_gpu else 3)
    else:
        rates = assumed_rates(args.device, step.tokens)
    parts = training_parts(step) if args.mode == "train" else sampling_parts(step)
    whole = training_limit(step, rates) if args.mode == "train" else sampling_limit(step, rates)
    print(
        f"{args.model}, {args.image_size} px, batch {batch}, {args.mode}; {args.device}: {rates.describe()}"
    )
    if args.device == "here":
        print(f"rates measured here in {dtype}; bytes are counted for bfloat16")
    print(table(parts, rates, measured, whole))
    print(f"{batch / whole:.3g} {'images' if args.mode == 'train' else 'forwards'} a second at most")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        result = {
            "arguments": {key: str(value) for key, value in vars(args).items()},
            "environment": environment(),
            "rates": asdict(rates),
            "limit_seconds": {part.name: part.limit(rates) for part in parts},
            "whole_seconds": whole,
            "measured_seconds": measured,
        }
        (args.out / "roofline.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(parts, rates, measured, args.out / "roofline.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
