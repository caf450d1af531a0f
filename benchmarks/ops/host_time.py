"""What a call of an operation costs the host, here and at another commit: `python -m benchmarks.ops.host_time BEFORE`.

A process for each tree, its kernels launched nowhere (the stub takes their arguments and returns), on CPU tensors so
small that PyTorch's own work is little. The two take turns, forward and forward + backward of each operation; of each
turn the processor time of a call counts, which other programs disturb less than time on the clock, and the median of
all turns. The backward pass of a batch of calls starts once, as it does in training.
"""

import argparse
import inspect
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OPS = (
    "adaln_modulate", "gated_residual", "gated_residual_adaln", "gelu", "attention", "mlp", "qk_norm_rope", "swiglu",
)  # fmt: skip
PASSES = ("forward", "forward + backward")
SHAPE = (1, 4, 8)
BATCH = 16
"""Calls before one backward pass."""


def calls() -> dict[tuple[str, str], Callable[[], Any]]:
    """BATCH calls of each operation, by (operation, pass), with launches stubbed."""
    import triton

    # Before the kernels are imported: a CPU then takes the way that a GPU takes, up to the launch.
    triton.knobs.runtime.interpret = True
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    from benchmarks.ops.registry import REGISTRY

    torch.set_num_threads(1)
    InterpretedFunction.__getitem__ = lambda self, grid: lambda *_, **arguments: None

    def make(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    def both_of(name: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        spec = REGISTRY[name]
        inputs = spec.make_inputs(SHAPE, torch.float32, torch.float32, make)
        names = list(inspect.signature(spec.op).parameters)
        # Of each call its own, else their sums would be timed.
        leaves = [
            [
                value.detach().requires_grad_(key not in spec.constants)
                if isinstance(value, torch.Tensor)
                else value
                for key, value in zip(names, inputs, strict=False)
            ]
            for _ in range(BATCH)
        ]
        tensors = [value for values in leaves for value in values if isinstance(value, torch.Tensor)]

        def run(arguments: Sequence[Any]) -> tuple[Any, ...]:
            out = spec.op(*arguments, kernels="triton")
            return out if isinstance(out, tuple) else (out,)

        gradients = tuple(torch.zeros_like(x) for x in run(inputs)) * BATCH

        class Loss(torch.autograd.Function):
            """One scalar of all outputs, whose gradients are there already."""

            @staticmethod
            def forward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
                return outputs[0].new_zeros(())

            @staticmethod
            def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return gradients

        def forward() -> None:
            with torch.no_grad():
                for _ in range(BATCH):
                    run(inputs)

        def backward() -> None:
            for tensor in tensors:
                tensor.grad = None
            Loss.apply(*[x for values in leaves for x in run(values)]).backward()

        return forward, backward

    return {(name, word): run for name in OPS for word, run in zip(PASSES, both_of(name), strict=True)}


def work() -> None:
    """Answer each line `[operation, pass, repeats]` with the processor time of a call, in microseconds."""
    cases = calls()
    print("ready", flush=True)
    for line in sys.stdin:
        name, word, repeats = json.loads(line)
        run = cases[name, word]
        start = time.process_time_ns()
        for _ in range(repeats):
            run()
        print((time.process_time_ns() - start) / repeats / BATCH / 1e3, flush=True)


class Worker:
    """A process that times calls with the package of the tree `root`."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ops.host_time", "--worker"], cwd=root, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if self.answer() != "ready":
            raise RuntimeError(f"the worker in {root} did not start")

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def microseconds(self, name: str, word: str, repeats: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, word, repeats]) + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def measure(
    before: Path, after: Path, turns: int, repeats: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """Median microseconds of a call at both trees, by (operation, pass); both take turns."""
    workers = [Worker(before), Worker(after)]
    times: dict[tuple[str, str], tuple[list[float], list[float]]] = {
        (name, word): ([], []) for name in OPS for word in PASSES
    }
    try:
        # The first turn warms up.
        for turn in range(turns + 1):
            for (name, word), found in times.items():
                for worker, kept in zip(workers, found, strict=True):
                    elapsed = worker.microseconds(name, word, repeats)
                    if turn:
                        kept.append(elapsed)
    finally:
        for worker in workers:
            worker.close()
    return {key: (statistics.median(a), statistics.median(b)) for key, (a, b) in times.items()}


def extract(commit: str, folder: Path) -> None:
    """The package of a commit, and this file, below `folder`."""
    archive = subprocess.run(
        ["git", "archive", commit, "kernels", "dit_fast", "benchmarks"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="tar")
    target = folder / "benchmarks" / "ops"
    target.mkdir(exist_ok=True)
    shutil.copy(__file__, target)


def document(before: str, times: dict[tuple[str, str], tuple[float, float]], turns: int) -> str:
    from benchmarks.environment import commit, environment

    machine = environment()
    lines = [
        "# What a call of an operation costs the host",
        "",
        f"`python -m benchmarks.ops.host_time {before}`: microseconds of processor time per call, the launch stubbed; "
        f"medians of {turns} turns, in which both commits alternate. No kernel ran.",
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']}, Python {machine['python']}, "
        f"torch {machine['torch']}, triton {machine['triton']}, {time.strftime('%Y-%m-%d')}, commit {commit()}.",
        "",
        f"| operation | pass | {before} | here | here / {before} |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {word} | {old:.1f} | {new:.1f} | {new / old:.2f} |"
            for (name, word), (old, new) in times.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", help="commit to compare with")
    parser.add_argument("--turns", type=int, default=15, help="turns of each side (default 15)")
    parser.add_argument(
        "--repeats", type=int, default=8, help=f"batches of {BATCH} calls in a turn (default 8)"
    )
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        extract(args.before, Path(folder))
        times = measure(Path(folder), ROOT, args.turns, args.repeats)
    text = document(args.before, times, args.turns)
    print(text, end="")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--worker"] else main()
