"""Sizes, differences and CPU times of `dit-fast export`'s graphs: `python -m benchmarks.studies.exports`.

Exports a model of random weights in every format by the command and writes OUT/exports.json and OUT/exports.md. The
formats' evaluations alternate with the model's own in one run; times are medians.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import commit, environment
from dit_fast.cli import main as dit_fast
from dit_fast.models import DiT, DiT_models

VARIANTS = (
    ("torch-export", "none"), ("onnx", "none"), ("aot-inductor", "none"),
    ("torch-export", "int8"), ("onnx", "int8"), ("aot-inductor", "int8"),
    ("torch-export", "int8-dynamic"),
)  # fmt: skip
BUSY = ": other programs ran beside it, so that times compare with each other only"
Call = Callable[[Tensor, Tensor, Tensor], Any]


def reader(folder: Path, kind: str) -> Call:
    """The export as a function of x, t, y."""
    if kind == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        return lambda x, t, y: session.run(None, {"x": x.numpy(), "t": t.numpy(), "y": y.numpy()})
    if kind == "torch-export":
        return torch.export.load(folder / "model.pt2").module()
    return torch._inductor.aoti_load_package(str(folder / "model.pt2"))


def measure(name: str, batch: int, rounds: int, work: Path) -> dict[str, Any]:
    """Export and time all variants of a model of the registry; exports that are in `work` are taken from there."""
    torch.manual_seed(0)
    model: DiT = DiT_models[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    inputs = torch.randn(batch, 4, 32, 32), torch.linspace(0, 999, batch), torch.arange(batch)
    rows: list[dict[str, Any]] = []
    load = [os.getloadavg()[0]]
    source = work / "model"
    folders = [work / f"{kind}-{quantize}" for kind, quantize in VARIANTS]
    with torch.no_grad():
        if not source.exists():
            model.save_pretrained(source)
        for (kind, quantize), out in zip(VARIANTS, folders, strict=True):
            arguments = ["--ckpt", str(source), "--out", str(out), "--format", kind, "--quantize", quantize]
            if not out.exists() and dit_fast(["export", *arguments]):
                raise SystemExit(f"{kind} {quantize}: not exported")
            compared = json.loads((out / "export.json").read_text())["compared"]
            rows.append(
                {
                    "format": kind,
                    "quantize": quantize,
                    "bytes": sum(path.stat().st_size for path in out.iterdir()),
                    "graph": max(compared["against_eager"]),
                    "quantized": max(compared["quantized_against_float32"], default=None),
                }
            )
        readers = [reader(out, kind) for (kind, _), out in zip(VARIANTS, folders, strict=True)]
        calls: list[Call] = [model, *readers]
        times: list[list[float]] = [[] for _ in calls]
        for turn in range(rounds + 1):
            for call, taken in zip(calls, times, strict=True):
                began = time.perf_counter()
                call(*inputs)
                if turn:  # the first warms up
                    taken.append(1000 * (time.perf_counter() - began))
    load.append(os.getloadavg()[0])
    rows.insert(
        0, {"format": "eager", "quantize": "none", "bytes": (source / "model.safetensors").stat().st_size}
    )
    for row, taken in zip(rows, times, strict=True):
        row |= {"ms": statistics.median(taken), "least_ms": min(taken)}
    return {
        "model": name, "batch": batch, "rounds": rounds, "load_average": load, "commit": commit(),
        "environment": environment(), "rows": rows,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The result in Markdown."""
    about = found["environment"]
    before, after = found["load_average"]
    lines = [
        f"{found['model']}, latents 4x32x32, random weights, batch {found['batch']}, float32 inputs; {about['cpu']}, "
        f"{about['threads']} threads, PyTorch {about['torch']}, commit {found['commit']}. Medians of "
        f"{found['rounds']} evaluations of each, which alternate. Load average {before:.1f} before and {after:.1f} "
        f"after, on {about['cores']} cores{BUSY if after > 1.5 else ''}.",
        "",
        "| format | quantize | MB | from the model exported | quantized from float32 | ms | fastest ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        graph, quantized = (
            f"{row[key]:.1e}" if row.get(key) is not None else "" for key in ("graph", "quantized")
        )
        lines.append(
            f"| {row['format']} | {row['quantize']} | {row['bytes'] / 1e6:.1f} | {graph} | {quantized} | "
            f"{row['ms']:.0f} | {row['least_ms']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, help="folder for the exports, kept and used again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options.model, options.batch, options.rounds, options.work or Path(temporary))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "exports.json").write_text(json.dumps(found, indent=2) + "\n")
    (options.out / "exports.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
