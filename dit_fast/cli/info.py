"""`dit-fast info`: parameters, multiply-adds and memory of a model, without building it in memory."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_fast.checkpoint.folder import find_checkpoint
from dit_fast.checkpoint.manifest import read_manifest
from dit_fast.errors import ConfigError
from dit_fast.interop import load_model
from dit_fast.model.blocks import ADAPTIVE
from dit_fast.model.config import SIZES
from dit_fast.model.cost import CostPrecision, Counts, count, kept_bytes, table
from dit_fast.model.dit import DiT
from dit_fast.model.presets import DiT_models
from dit_fast.training.config import TrainConfig, build_model, resumed_config
from dit_fast.training.precision import ResidualDtype
from dit_fast.utils.option_files import as_yaml
from dit_fast.utils.options import Options, add_options, flag_of, given_options, option, read_options
from dit_fast.utils.terminal import say
from dit_fast.utils.values import SIDE, SOURCE, Whole

EPILOG = """Conventions: a multiply-add (MAC) is two FLOPs, and the paper's "Gflops" are MACs. Linear layers, the patch
projection and the two products of attention are counted; a training step is three forward passes; a GB is 10^9 bytes.
Example: dit-fast info DiT-XL/2 --input-size 64 --batch-size 32"""

_GROUPS = ("model",)


@dataclass(frozen=True)
class Inputs:
    """Shape of the samples of a model without data."""

    image_size: int
    channels: int
    num_classes: int
    caption_dim: int = 0
    buckets: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class InfoOptions(Options):
    source: str | None = option(
        None,
        "Size and patch size, e.g. DiT-XL/2, or any checkpoint that dit-fast sample --ckpt reads",
        SOURCE,
        metavar="MODEL",
        positional=True,
    )
    input_size: int = option(32, "Side of the latents or images", SIDE, group="inputs", metavar="S")
    in_channels: int = option(
        4, "Channels of the latents or images", SIZES["in_channels"], group="inputs", metavar="C"
    )
    caption_dim: int = option(
        0, "Width of captions, 0 for classes", SIZES["caption_dim"], group="inputs", metavar="E"
    )
    caption_tokens: int = option(77, "Tokens per caption", Whole(1, 1 << 16), group="inputs", metavar="S")
    batch_size: int = option(
        256, "Images per step on one GPU", Whole(1, 1 << 24), group="training step", metavar="B"
    )
    precision: CostPrecision = option("bf16", "Arithmetic of the model", group="training step")
    residual: ResidualDtype = option("fp32", "Dtype of the residual stream", group="training step")
    json: bool = option(False, "Print JSON instead of text", group="output")
    config: bool = option(
        False, "Print the options of a run as YAML, which dit-fast train --config reads", group="output"
    )
    table: bool = option(
        False, "Print the twelve sizes of the paper with each of its four blocks", group="output"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, InfoOptions)
    add_options(parser, TrainConfig, _GROUPS)


def run(args: argparse.Namespace) -> int:
    """Print the counts of a model, or the table of the paper's models."""
    options = read_options(InfoOptions, args)
    # Options of the model itself, which a checkpoint and the table have already.
    model_options = given_options(TrainConfig, args, _GROUPS)
    chosen = [flag_of(name) for name in model_options]
    chosen += [flag_of(name) for name in ("input_size", "in_channels", "caption_dim") if name in vars(args)]
    if options.table:
        if options.source is not None or chosen:
            names = ", ".join(filter(None, (options.source, *chosen)))
            raise ConfigError(f"--table prints the models of the paper: remove {names}")
        say(*(_table_json() if options.json else _table_text()).splitlines())
        return 0
    if options.config:
        if options.source is None or chosen or options.json:
            raise ConfigError("--config prints the options of a run: give its folder, and no other option")
        say(*_run_config(options.source).splitlines())
        return 0
    name, model = _open(options, model_options, chosen)
    try:
        counts = count(model, options.caption_tokens)
        kept = kept_bytes(
            model.config,
            options.batch_size,
            precision=options.precision,
            residual=options.residual,
            caption_tokens=options.caption_tokens,
        )
    except ValueError as error:  # Kernels refuse tensors beyond their offsets.
        raise ConfigError(f"{name}: {error}; give a smaller --input-size or a larger --patch-size") from None
    tokens = 0 if model.conditioning in ADAPTIVE else model.condition_tokens(options.caption_tokens)
    step = {"batch_size": options.batch_size, "precision": options.precision, "residual": options.residual}
    text = (_as_json if options.json else _as_text)(name, model, counts, tokens, kept, step)
    say(*text.splitlines())
    return 0


def _run_config(source: str) -> str:
    """All options of the run in a folder, from its newest checkpoint, or of one checkpoint."""
    path = find_checkpoint(source)
    saved = read_manifest(path).get("train_config")
    if saved is None:
        raise ConfigError(f"{source}: its manifest has no options of a run")
    return as_yaml(resumed_config(saved, {}, str(path)))


def _open(options: InfoOptions, model_options: dict[str, Any], chosen: list[str]) -> tuple[str, DiT]:
    """Name and model: of a checkpoint, or of the options, without memory for its weights."""
    source = options.source
    if source is not None and source not in DiT_models and Path(source).exists():
        if chosen:
            raise ConfigError(f"{source} defines its own model: remove {', '.join(chosen)}")
        return source, load_model(source)[0]
    if source is not None and "model" in model_options:
        raise ConfigError(f"{source} and --model {model_options['model']} both name the model: give one")
    classes = model_options.pop("num_classes", 1000)
    shape = Inputs(options.input_size, options.in_channels, classes, options.caption_dim)
    named = {**model_options, **({} if source is None else {"model": source})}
    config = TrainConfig(data="(none)", **named)
    with torch.device("meta"):
        return config.model if named.keys() <= {"model"} else "of the options", build_model(config, shape)


def _as_json(
    name: str, model: DiT, counts: Counts, condition_tokens: int, kept: dict[str, int], step: dict[str, Any]
) -> str:
    memory = {"state_bytes": counts.state_bytes, "kept_for_backward_bytes": kept}
    return json.dumps(
        {
            "model": name,
            "config": model.config,
            **counts.as_json(),
            "condition_tokens": condition_tokens,
            "training_step": {**step, **memory},
        },
        indent=2,
    )


def _as_text(
    name: str, model: DiT, counts: Counts, condition_tokens: int, kept: dict[str, int], step: dict[str, Any]
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
            + (f", and {condition_tokens} of the condition" if condition_tokens else ""),
        ),
        ("parameters", f"{counts.parameters:,} ({counts.fixed:,} of them fixed)"),
        ("forward", f"{counts.macs / 1e9:.4g} GMAC an image = {counts.forward_flops / 1e9:.4g} GFLOP"),
        ("training", f"{counts.training_flops / 1e9:.4g} GFLOP an image, 3 times the forward pass"),
        ("memory, GB", f"{state}: {sum(counts.state_bytes.values()) / 1e9:.3g} in all, optimizer adamw_ema"),
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
