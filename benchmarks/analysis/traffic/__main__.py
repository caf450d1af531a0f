"""`python -m benchmarks.analysis.traffic`: bytes that Inductor and ours move for a DiT block, counted.

    python -m benchmarks.analysis.traffic --out benchmarks/results/traffic.md
    python -m benchmarks.analysis.traffic --mode bf16 --ours "least traffic" attention=triton mlp_epilogue=triton
    python -m benchmarks.analysis.traffic --block lightningdit --out benchmarks/results/traffic_lightningdit.md
    python -m benchmarks.analysis.traffic --chains
    python -m benchmarks.analysis.traffic --memory

Each `--ours NAME key=value ...` is one more line, with these settings for the block of `--factory` and, for a key
`choice.OP`, what stands for the tuned table; without one, those of SETTINGS. Needs PyTorch's CPU build and g++.
"""

import argparse
import ast
import importlib.metadata
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.analysis.traffic import (
    COMPILED_MODES,
    MODES,
    Program,
    TrafficError,
    count,
    memory,
    prices,
    report,
    steady_state,
)

PLAIN = {
    "dit": "benchmarks.analysis.traffic.blocks:plain",
    "lightningdit": "benchmarks.analysis.traffic.blocks:plain_lightning",
}
OURS = {
    "dit": "benchmarks.analysis.traffic.blocks:dit_fast",
    "lightningdit": "benchmarks.analysis.traffic.blocks:lightning",
}

SETTINGS = {
    "dit": (
        ["dit_fast, defaults"],
        ["least traffic", "attention=triton", "mlp_epilogue=triton"],
        ["least traffic, standalone GELU", "attention=triton", "mlp_epilogue=separate"],
        ["with tangents", "attention=triton", "mlp_epilogue=separate", "tangents=True"],
        ["least memory", "attention=triton", "mlp_epilogue=triton", "recompute=cheap"],
        ["least memory, standalone GELU", "attention=triton", "mlp_epilogue=separate", "recompute=cheap"],
    ),
    "lightningdit": (
        ["dit_fast, defaults"],
        ["least traffic", "attention=triton"],
        ["least memory", "attention=triton", "recompute=cheap"],
    ),
}
"""Our blocks as they are counted for benchmarks/results."""


def parse_settings(words: list[str]) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(name, settings, choices) of `--ours NAME key=value ...`; a value is a Python literal or else a string."""
    name, *pairs = words
    settings: dict[str, Any] = {}
    choices: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.removeprefix("choice.").isidentifier():
            raise TrafficError(f"--ours {name}: {pair!r} is not key=value")
        if key.startswith("choice."):
            choices[key.removeprefix("choice.")] = value
            continue
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return name, settings, choices


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.analysis.traffic", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--mode", choices=MODES, action="append", help="default: all")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dim", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=2, help="a block is the difference to one block more")
    parser.add_argument("--block", choices=PLAIN, default="dit", help="the paper's, or LightningDiT's trunk")
    parser.add_argument("--factory", help="module:function that makes our chain of blocks")
    parser.add_argument("--ours", nargs="+", action="append", metavar=("NAME", "key=value"))
    parser.add_argument(
        "--chains", action="store_true", help="price what is not a block, against the least possible"
    )
    parser.add_argument(
        "--memory", action="store_true", help="whether a step of the whole model fits in 80 GB"
    )
    parser.add_argument("--out", type=Path, help="also write the table (.md) and the counts (.json) here")
    return parser.parse_args(arguments)


def versions() -> str:
    """PyTorch and Triton as installed."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton"))


def our_programs(args: argparse.Namespace, shape: Program) -> list[tuple[str, Program]]:
    """(name, program) of each `--ours`."""
    ours = [parse_settings(words) for words in args.ours or SETTINGS[args.block]]
    return [
        (name, replace(shape, factory=args.factory or OURS[args.block], settings=settings, choices=choices))
        for name, settings, choices in ours
    ]


def blocks(args: argparse.Namespace, shape: Program) -> tuple[str, dict[str, Any]]:
    """The comparison of a block as a document and as JSON values."""
    ours = our_programs(args, shape)
    labels, programs = [], []
    for mode in args.mode or MODES:
        counted_blocks = [("Inductor", shape)] * (mode in COMPILED_MODES) + ours
        labels += [(mode, name) for name, _ in counted_blocks]
        programs += [replace(program, mode=mode) for _, program in counted_blocks]
    counted = count([one for program in programs for one in steady_state(program)])
    steady = [longer - shorter for longer, shorter in zip(counted[::2], counted[1::2], strict=True)]
    rows = [(mode, name, traffic) for (mode, name), traffic in zip(labels, steady, strict=True)]
    found = {f"{mode}: {name}": traffic.as_json() for mode, name, traffic in rows}
    return report.comparison(args.block, shape, rows, versions()), {"unit": shape.unit, "blocks": found}


def main(arguments: list[str] | None = None) -> None:
    try:
        args = parse_arguments(arguments)
        sizes = {"batch": args.batch, "tokens": args.tokens, "width": args.dim, "heads": args.heads}
        shape = Program(PLAIN[args.block], blocks=args.blocks, **sizes)
        if args.chains:
            document, values = prices.document(args.batch, versions())
        elif args.memory:
            ours, modes = our_programs(args, shape), args.mode or COMPILED_MODES
            found = memory.measure(shape, ours, modes, prices.DEPTH)
            document, values = memory.document(shape, found, prices.DEPTH, versions())
        else:
            document, values = blocks(args, shape)
    except TrafficError as error:
        sys.exit(f"error: {error}")
    print(document, end="")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(document)
        args.out.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
