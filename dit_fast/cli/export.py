"""`dit-fast export`: the weights of a run, or of any checkpoint, for other programs."""

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from dit_fast.cli.sample_options import CheckpointOptions
from dit_fast.errors import ConfigError, OutputError
from dit_fast.interop import DIFFUSERS, load_model, save_diffusers
from dit_fast.interop.graphs import BATCHES, FILES, METADATA, Quantization, check_graph_export, save_graph
from dit_fast.interop.lightningdit import state_to_lightningdit
from dit_fast.interop.load import ModelInfo
from dit_fast.interop.objective import OBJECTIVE_FIELDS
from dit_fast.model.config import beyond_the_paper
from dit_fast.model.dit import DiT
from dit_fast.utils.files import temporary_folder, write_atomically
from dit_fast.utils.options import REQUIRED, Options, add_options, option, read_options, same_option
from dit_fast.utils.terminal import say
from dit_fast.utils.values import PATH, SOURCE

EPILOG = """safetensors  a folder with config.json and model.safetensors, for DiT.from_pretrained
pt           one file as the reference publishes them: torch.load gives the state dict that its DiT loads, or SiT's
lightningdit one such file for LightningDiT's class, built with the model's options
diffusers    a folder for diffusers' DiTTransformer2DModel.from_pretrained
onnx         a folder with model.onnx (and model.onnx.data above 1 GiB) and export.json, for onnxruntime
torch-export a folder with model.pt2 and export.json: torch.export.load(...).module()
aot-inductor the same, compiled for this machine's CPU: torch._inductor.aoti_load_package

The last three compute in float32 without dit_fast, for any batch; they are read back and compared with the model."""


@dataclass(frozen=True)
class ExportOptions(Options):
    ckpt: str = option(
        REQUIRED,
        "Run folder (its newest complete checkpoint), step folder, or any file that dit-fast sample reads",
        SOURCE,
    )
    out: Path = option(REQUIRED, "Folder or file to write, which must not exist", PATH)
    format: Literal[
        "safetensors", "pt", "lightningdit", "diffusers", "onnx", "torch-export", "aot-inductor"
    ] = option("safetensors", "Format to write")
    quantize: Quantization = option(
        "none", "Quantize the weights of linear layers by torchao, in a graph (int8-dynamic: activations too)"
    )
    weights: str = same_option(CheckpointOptions, "weights")
    lora: str | None = same_option(CheckpointOptions, "lora")
    num_heads: int | None = same_option(CheckpointOptions, "num_heads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, ExportOptions)


def run(args: argparse.Namespace) -> int:
    """Write the export, completely or not at all, and print a summary."""
    options = read_options(ExportOptions, args)
    if options.out.exists():
        raise OutputError(f"--out {options.out} exists already: give another, or remove it")
    one_file = options.format in ("pt", "lightningdit")
    if one_file and options.out.suffix != ".pt":
        raise ConfigError(f"--out {options.out}: a file of --format {options.format} is named *.pt")
    if options.format in FILES:
        check_graph_export(options.format, options.quantize)
    elif options.quantize != "none":
        raise ConfigError(
            f"--quantize {options.quantize} is for --format {', '.join(FILES)}: --format {options.format} writes the "
            "weights as they are"
        )
    model, info = load_model(
        options.ckpt, weights=options.weights, num_heads=options.num_heads, adapter=options.lora
    )
    for note in info.notes:
        say(f"note: {note}")
    if options.format == "pt" and (others := beyond_the_paper(model.config)):
        raise ConfigError(
            f"--format pt is for the reference's DiT, this model has {others}: give --format safetensors"
        )
    state = state_to_lightningdit(model) if options.format == "lightningdit" else model.state_dict()
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if one_file:
            write_atomically(options.out, lambda path: torch.save(dict(state), path))
        else:
            _write_folder(model, info, options)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {options.out}: {error}; give another --out") from error
    if options.format == "diffusers":
        say(
            "note: diffusers' own model has other timestep frequencies and another epsilon than the reference, with "
            "which this one was trained: its outputs differ by more than rounding. "
            "dit_fast.FastDiT is exact in DiTPipeline"
        )
    if options.format not in FILES and info.diffusion.get("objective") == "flow":
        recorded = {name: info.diffusion[name] for name in OBJECTIVE_FIELDS if name in info.diffusion}
        flags = " ".join(f"--{name} {value}" for name, value in recorded.items())
        say(f"note: the weights do not record what they predict: sample them with {flags}")
    say(f"wrote {options.out}: {info.summary()}")
    return 0


def _write_folder(model: DiT, info: ModelInfo, options: ExportOptions) -> None:
    folder, kind = options.out, options.format
    with temporary_folder(folder) as temporary:
        if kind == "safetensors":
            model.save_pretrained(temporary)
        elif kind == "diffusers":
            with warnings.catch_warnings(record=True, action="always") as caught:
                save_diffusers(model, temporary, conventions=DIFFUSERS)
            for warning in caught:
                say(f"note: {warning.message}")
        else:
            temporary.mkdir()
            _write_graph(model, info, temporary, options)
        try:
            temporary.rename(folder)
        except OSError as error:
            if not folder.exists():
                raise
            raise OutputError(
                f"--out {folder} was written by another process in the meantime; give another"
            ) from error


def _write_graph(model: DiT, info: ModelInfo, folder: Path, options: ExportOptions) -> None:
    assert options.format in ("onnx", "torch-export", "aot-inductor")
    compared = save_graph(model, info, folder, options.format, options.quantize)
    if not info.diffusion:
        say(
            f"note: the weights do not record what they predict: {METADATA} says DDPM with linear betas and epsilon"
        )
    against = [("the model", compared.graph)]
    if compared.quantized:
        against = [("the quantized model", compared.graph), ("float32", compared.quantized)]
    for name, differences in against:
        figures = ", ".join(
            f"{each:.1e} at batch {batch}" for batch, each in zip(BATCHES, differences, strict=True)
        )
        say(f"largest relative difference from {name}: {figures}")
    say(f"{compared.size / 1e6:.1f} MB in {FILES[options.format]}, inputs and conventions in {METADATA}")
