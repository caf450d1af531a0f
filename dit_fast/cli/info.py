"""`dit-fast info`: what a model costs, before it is trained."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_fast.cli.train import add_model_options
from dit_fast.errors import ConfigError
from dit_fast.interop import load_model
from dit_fast.model.blocks import ADAPTIVE
from dit_fast.model.cost import PRECISIONS, Counts, count, kept_bytes, table
from dit_fast.model.dit import DiT
from dit_fast.model.presets import DiT_models
from dit_fast.training.config import TrainConfig, build_model
from dit_fast.training.precision import RESIDUALS
from dit_fast.utils.terminal import say
from dit_fast.utils.values import SIDE, SOURCE, Whole

_EPILOG = """Conventions: a multiply-add (MAC) is two FLOPs, and the paper's "Gflops" are MACs. Counted are linear
layers, patch projection and attention's two products. Training is three times the forward pass. GB are 10^9 bytes.
Example: dit-fast info DiT-XL/2 --input-size 64 --batch-size 32"""


@dataclass(frozen=True)
class Inputs:
    """The samples of a model that has no data yet."""

    image_size: int
    channels: int
    num_classes: int
    caption_dim: int = 0
    buckets: tuple[tuple[int, int], ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "source",
        type=SOURCE,
        nargs="?",
        metavar="MODEL",
        help="size and patch, e.g. DiT-XL/2, or anything that dit-fast sample takes as --ckpt",
    )
    add_model_options(parser.add_argument_group("model, where MODEL is no checkpoint"))
    inputs = parser.add_argument_group("its inputs")
    inputs.add_argument(
        "--input-size", type=SIDE, metavar="S", help="side of latents or images (default: 32)"
    )
    inputs.add_argument("--in-channels", type=Whole(1, 1 << 12), metavar="C", help="(default: 4, of latents)")
    inputs.add_argument(
        "--caption-dim", type=Whole(0, 1 << 16), metavar="E", help="captions of this width, not classes"
    )
    inputs.add_argument(
        "--caption-tokens",
        type=Whole(1, 1 << 16),
        default=77,
        metavar="S",
        help="tokens of a caption (default: 77)",
    )
    step = parser.add_argument_group("training step")
    step.add_argument(
        "--batch-size", type=Whole(1, 1 << 24), default=256, metavar="B", help="on one GPU (default: 256)"
    )
    step.add_argument(
        "--precision", choices=tuple(PRECISIONS), default="bf16", help="of the arithmetic (default: bf16)"
    )
    step.add_argument("--residual", choices=RESIDUALS, default="fp32", help="(default: fp32)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", default=False, help="JSON instead of text")
    output.add_argument(
        "--table",
        action="store_true",
        default=False,
        help="the paper's twelve sizes with each of its four blocks",
    )


def run(args: argparse.Namespace) -> int:
    """Print the counts of a model, or the table of the paper's."""
    options = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    step = {name: options.pop(name) for name in ("batch_size", "precision", "residual")}
    as_json, whole_table = options.pop("json"), options.pop("table")
    tokens = options.pop("caption_tokens")
    if whole_table:
        if options:
            raise ConfigError(f"--table is of the paper's models: leave out {_flags(options)}")
        say(*(_table_json() if as_json else _table_text()).splitlines())
        return 0
    name, model = _open(options)
    try:
        counts = count(model, tokens)
        kept = kept_bytes(
            model.config,
            step["batch_size"],
            precision=step["precision"],
            residual=step["residual"],
            caption_tokens=tokens,
        )
    except ValueError as error:  # Kernels refuse tensors beyond their offsets.
        raise ConfigError(f"{name}: {error}; give a smaller --input-size or a larger --patch-size") from None
    told = 0 if model.conditioning in ADAPTIVE else model.condition_tokens(tokens)
    text = (_as_json if as_json else _as_text)(name, model, counts, told, kept, step)
    say(*text.splitlines())
    return 0


def _open(options: dict[str, Any]) -> tuple[str, DiT]:
    """What the model is called, and the model: of a checkpoint, or of the options without memory."""
    source = options.pop("source", None)
    if source is not None and source not in DiT_models and Path(source).exists():
        if options:
            raise ConfigError(f"{source} says what its model is: leave out {_flags(options)}")
        return source, load_model(source)[0]
    if source is not None and "model" in options:
        raise ConfigError(f"{source} and --model {options['model']} both name the model: give one")
    shape = Inputs(
        options.pop("input_size", 32),
        options.pop("in_channels", 4),
        options.pop("num_classes", 1000),
        options.pop("caption_dim", 0),
    )
    config = TrainConfig(data="(none)", **({"model": source} if source is not None else {}), **options)
    with torch.device("meta"):
        return "of the options" if options.keys() - {"model"} else config.model, build_model(config, shape)


def _flags(options: dict[str, Any]) -> str:
    named = (f"--{name.replace('_', '-')}" if name != "source" else str(options[name]) for name in options)
    return ", ".join(named)


def _as_json(
    name: str, model: DiT, counts: Counts, told: int, kept: dict[str, int], step: dict[str, Any]
) -> str:
    memory = {"state_bytes": counts.state_bytes, "kept_for_backward_bytes": kept}
    return json.dumps(
        {
            "model": name,
            "config": model.config,
            **counts.as_json(),
            "condition_tokens": told,
            "training_step": {**step, **memory},
        },
        indent=2,
    )


def _as_text(
    name: str, model: DiT, counts: Counts, told: int, kept: dict[str, int], step: dict[str, Any]
) -> str:
    config = model.config
    height, width = config["input_size"]
    state = ", ".join(f"{part} {size / 1e9:.3g}" for part, size in counts.state_bytes.items())
    held = ", ".join(f"{recompute} {size / 1e9:.3g}" for recompute, size in kept.items())
    lines = [
        (
            "model",
            f"{name}: width {config['hidden_size']}, depth {config['depth']}, heads {config['num_heads']}, "
            f"{model.conditioning}, "
            + (
                f"captions of width {model.caption_dim}"
                if model.caption_dim
                else f"{config['num_classes']} classes"
            ),
        ),
        (
            "input",
            f"{config['in_channels']} x {height} x {width}, patch {config['patch_size']}: {counts.tokens} tokens"
            + (f", and {told} of the condition" if told else ""),
        ),
        ("parameters", f"{counts.parameters:,} ({counts.fixed:,} of them fixed)"),
        ("forward", f"{counts.macs / 1e9:.4g} GMAC an image = {counts.forward_flops / 1e9:.4g} GFLOP"),
        ("training", f"{counts.training_flops / 1e9:.4g} GFLOP an image, 3 times the forward pass"),
        ("memory, GB", f"{state}: {sum(counts.state_bytes.values()) / 1e9:.3g} in all, optimiser ours"),
        (
            "activations, GB",
            f"{held}, kept for the backward pass by --recompute "
            f"(batch {step['batch_size']}, {step['precision']}, residual stream {step['residual']}, fused kernels)",
        ),
    ]
    return "\n".join(f"{label:<17}{text}" for label, text in lines)


def _table_text() -> str:
    lines = [
        "# The paper's twelve sizes with each of its four blocks",
        "",
        "Written by `dit-fast info --table`: latents of 32 x 32 x 4 (256 px), 1000 classes, learned variance. GMAC: "
        "multiply-adds of one image's forward pass,",
        "which the paper's table 4 calls Gflops. Parameters with the fixed positions, which that table leaves out.",
        "",
        "| model | block | parameters | trained | tokens | GMAC | training, GFLOP |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, conditioning, counts in table():
        lines.append(
            f"| {name} | {conditioning} | {counts.parameters:,} | {counts.trained:,} | {counts.tokens} | "
            f"{counts.macs / 1e9:.2f} | {counts.training_flops / 1e9:.1f} |"
        )
    return "\n".join(lines)


def _table_json() -> str:
    rows = [
        {"model": name, "conditioning": conditioning, **counts.as_json()}
        for name, conditioning, counts in table()
    ]
    return json.dumps(rows, indent=1)
