"""What the hardware allows: `python -m benchmarks.analysis.roofline [--model NAME] [--mode train|sample]`.

Counts operations of the matrix products and bytes that must move, divides them by the rates of a device, and prints the
limit of each part and of the whole step, with measured times beside them: of a result file (`--measured`; parts that
`--measure --results FOLDER` kept there, whole steps of the ladder), or of the parts, run here (`--measure`).
Operations are multiplications and additions apart: twice the MACs that the paper calls Gflops. Backward counts twice
the forward products; attention, which makes its scores again, 2.5 times. Unavoidable passes of a block, in token
tensors U: 8 forward, 15 backward, GELU in the epilogue of its product and the residual stream in bfloat16.
Rates of "h100" and "h200" are assumptions from published measurements; "here" measures a copy and a product.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import ceiling, seconds
from benchmarks.ops.registry import REGISTRY
from benchmarks.ops.rows import Recorder, Results, Row, read_results
from dit_fast.errors import DataError, DitFastError
from dit_fast.model.presets import SIZES
from dit_fast.utils.files import write_atomically

U_FORWARD, U_BACKWARD = 8, 15
OPTIMIZER_BYTES = 38
"""Of a parameter: weight, moments and average read and written in float32, gradient read, bfloat16 copy written."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of products and of attention, forward and backward, and bytes per second."""

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
    def block_modulation(self) -> int:
        """Parameters of the layer that makes a block's six modulation vectors."""
        return 6 * self.width**2 + 6 * self.width

    @property
    def final_modulation(self) -> int:
        return 2 * self.width**2 + 2 * self.width

    @property
    def block_parameters(self) -> int:
        """Of a block: the four linear layers, 12 D^2 and 9 D of biases, and its modulation."""
        return 12 * self.width**2 + 9 * self.width + self.block_modulation

    @property
    def root_parameters(self) -> int:
        """Patches, timesteps (256 waves), 1,001 labels and the final layer, which predicts noise and variance."""
        D, pixels = self.width, self.patch**2 * 4
        embedders = (pixels + 1) * D + (256 + 1) * D + (D + 1) * D + 1001 * D
        return embedders + self.final_modulation + (D + 1) * 2 * pixels

    @property
    def modulation_weights(self) -> int:
        """Of the layers that make modulation vectors, the final one's included."""
        return self.depth * self.block_modulation + self.final_modulation

    @property
    def parameters(self) -> int:
        return self.depth * self.block_parameters + self.root_parameters


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


def measured_parts(
    step: Step, heads: int, dtype: torch.dtype, device: str, repeats: int
) -> dict[str, list[float]]:
    """Seconds of the parts of a block, forward and backward, times the depth, run here one by one."""
    rows = step.batch * step.tokens
    shape = (step.batch, step.tokens, step.width)

    def make(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    def times(function: Callable[[], Any]) -> list[float]:
        return [step.depth * time for time in seconds(function, repeats)]

    def product(inputs: int, outputs: int) -> list[float]:
        x = make(rows, inputs, dtype=dtype).requires_grad_()
        weight = make(outputs, inputs, dtype=dtype).requires_grad_()
        grad = make(rows, outputs, dtype=dtype)
        return times(lambda: torch.autograd.grad(torch.nn.functional.linear(x, weight), (x, weight), grad))

    def operation(name: str, inputs: tuple[Any, ...]) -> list[float]:
        leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_leaf else x for x in inputs]
        wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]

        def run() -> Any:
            result = REGISTRY[name].op(*leaves)
            outputs = result if isinstance(result, tuple) else (result,)
            return torch.autograd.grad(outputs, wanted, [torch.ones_like(out) for out in outputs])

        return times(run)

    D = step.width
    fused = REGISTRY["gated_residual_adaln"].make_inputs(shape, dtype, dtype, make)
    gelu = REGISTRY["gelu"].make_inputs((*shape[:2], 4 * D), dtype, dtype, make)
    qkv = make(*shape[:2], 3 * D, dtype=dtype)
    norms, act = operation("gated_residual_adaln", fused), operation("gelu", gelu)
    return {
        "qkv": product(D, 3 * D),
        "proj": product(D, D),
        "fc1": product(D, 4 * D),
        "fc2": product(4 * D, D),
        "attention": operation("attention", (qkv, heads, make(3 * D, dtype=dtype))),
        "passes of the blocks": [2 * norm + one for norm, one in zip(norms, act, strict=True)],
    }


WHOLE = "whole step"


def rows_of(
    times: Mapping[str, list[float]], model: str, step: Step, dtype: torch.dtype, rates: Rates
) -> list[Row]:
    """Rows of measured parts of a training step, with the limits and rates that they are compared with."""
    name = str(dtype).removeprefix("torch.")
    measured_with = {"copy GB/s": rates.memory * 1e-9, "product TFLOP/s": rates.product * 1e-12}
    limits = {part.name: part.limit(rates) for part in training_parts(step)}
    return [
        Row.timed(
            *("roofline", model, (step.batch, step.image_size), name, "ours", part, found),
            {"limit ms": 1e3 * limits[part], **measured_with},
        )
        for part, found in times.items()
    ]


def measured_in(results: Results, model: str, step: Step, mode: str) -> tuple[dict[str, float], Rates]:
    """Seconds of the parts and of our fastest whole step in a result file, and the rates of its device.

    Whole steps are those of the ladder, in sampling guided ones for an even number of forwards. DataError where the
    file has no measured parts of this case.
    """
    mine = [row for row in results.rows if row.case == model and row.median is not None]
    parts = [
        row for row in mine if row.benchmark == "roofline" and row.shape == (step.batch, step.image_size)
    ]
    if not parts:
        raise DataError(
            f"the results of {results.device} hold no parts of {model}, {step.image_size} px, batch {step.batch}: "
            "python -m benchmarks.analysis.roofline --measure --results FOLDER"
        )
    forwards = {"step": 1, "guided step": 2}
    whole = [
        row.median or 0.0
        for row in mine
        if row.benchmark == mode
        and row.provider.startswith("ours")
        and row.direction in forwards
        and (forwards[row.direction] * row.shape[0], row.shape[1]) == (step.batch, step.image_size)
    ]
    found = {row.direction: row.median or 0.0 for row in parts} if mode == "train" else {}
    if whole:
        found[WHOLE] = min(whole)
    product, memory = parts[0].metrics["product TFLOP/s"] * 1e12, parts[0].metrics["copy GB/s"] * 1e9
    return found, Rates(product, product, product, memory)


def table(parts: Sequence[Part], rates: Rates, measured: Mapping[str, float], whole: float) -> str:
    """Limits in milliseconds, what makes them, and the measured times with the share of the limit reached."""
    lines = [
        f"{'part':26}{'GFLOP':>12}{'GB':>10}{'limit ms':>11}{'bound by':>10}{'measured ms':>13}{'share':>8}"
    ]

    def beside(name: str, limit: float) -> str:
        time = measured.get(name)
        return f"{time * 1e3:13.3f}{limit / time:8.0%}" if time else f"{'-':>13}{'-':>8}"

    for part in parts:
        limit = part.limit(rates)
        computing = Part(part.name, part.flops, attention=part.attention).limit(rates)
        bound = "products" if computing > 0.999 * limit else "memory"
        work = f"{part.name:26}{sum(part.flops) / 1e9:12.1f}{sum(part.bytes) / 1e9:10.2f}"
        lines.append(f"{work}{limit * 1e3:11.3f}{bound:>10}{beside(part.name, limit)}")
    return "\n".join([*lines, f"{WHOLE:26}{'':22}{whole * 1e3:11.3f}{'':10}{beside(WHOLE, whole)}"])


def draw(limits: Mapping[str, float], measured: Mapping[str, float], path: Path) -> None:
    """Bars of the limits, and of the measured times beside them, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    places = range(len(limits))
    axes.barh([p - 0.2 for p in places], [1e3 * limit for limit in limits.values()], 0.38, label="limit")
    if measured:
        times = [1e3 * measured.get(name, 0.0) for name in limits]
        axes.barh([p + 0.2 for p in places], times, 0.38, label="measured")
    axes.set_yticks(list(places), list(limits))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
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
    parser.add_argument(
        "--device", choices=("here", *DEVICES), help="(default: that of --measured, else h100)"
    )
    parser.add_argument("--measured", type=Path, metavar="FILE", help="result file with measured times")
    parser.add_argument(
        "--measure", action="store_true", help="run the parts on this machine (training only)"
    )
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="keep what --measure finds there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of the limits and measured times")
    args = parser.parse_args(arguments)
    name, _, patch = args.model.removeprefix("DiT-").partition("/")
    if name not in SIZES or not patch.isdecimal() or not int(patch):
        parser.error(f"--model {args.model}: give DiT-{{{','.join(SIZES)}}}/PATCH")
    if args.image_size < 8 * int(patch) or args.image_size % (8 * int(patch)):
        parser.error(f"--image-size {args.image_size} is not a multiple of 8 x patch {patch}")
    batch = args.batch or (256 if args.mode == "train" else 1)
    if batch < 1:
        parser.error(f"--batch {batch}: give at least 1")
    if args.measure and (args.mode != "train" or args.device not in (None, "here") or args.measured):
        parser.error(
            "--measure times training on this machine: give --mode train --device here, no --measured"
        )
    if args.results and not args.measure:
        parser.error("--results keeps what --measure finds: give both")
    size = SIZES[name]
    step = Step(size["depth"], size["hidden_size"], int(patch), args.image_size, batch)
    try:
        report(args, step, size["num_heads"])
    except DitFastError as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 1
    return 0


def report(args: argparse.Namespace, step: Step, heads: int) -> None:
    """Measure where asked, print the table and draw the plot."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    measured: dict[str, float] = {}
    where = args.device or ("here" if args.measure else "h100")
    if args.measured is not None:
        measured, rates = measured_in(results := read_results(args.measured), args.model, step, args.mode)
        where = args.device or results.device
    if where == "here":
        best = ceiling(dtype)
        rates = Rates(best.product, best.product, best.product, best.copy)
    elif where in DEVICES:
        rates = assumed_rates(where, step.tokens)
    if args.measure:
        recorder = Recorder(args.results) if args.results else None
        times = measured_parts(step, heads, dtype, "cuda" if on_gpu else "cpu", 20 if on_gpu else 3)
        measured = {part: statistics.median(found) for part, found in times.items()}
        if recorder is not None:
            recorder.add(*rows_of(times, args.model, step, dtype, rates))
    parts = training_parts(step) if args.mode == "train" else sampling_parts(step)
    whole = training_limit(step, rates) if args.mode == "train" else sampling_limit(step, rates)
    print(f"{args.model}, {args.image_size} px, batch {step.batch}, {args.mode}; {where}: {rates.describe()}")
    if where not in DEVICES:
        print("rates measured on the device; bytes are counted for bfloat16")
    print(table(parts, rates, measured, whole))
    print(f"{step.batch / whole:.3g} {'images' if args.mode == 'train' else 'forwards'} a second at most")
    if args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        draw({part.name: part.limit(rates) for part in parts} | {WHOLE: whole}, measured, args.plot)


if __name__ == "__main__":
    sys.exit(main())
