"""`dit-fast export`: the weights of a run, or of any checkpoint, for other programs."""

import argparse
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from dit_fast.errors import ConfigError, OutputError
from dit_fast.interop import DIFFUSERS, load_model, save_diffusers
from dit_fast.interop.lightningdit import state_to_lightningdit
from dit_fast.interop.objective import ASKED
from dit_fast.model.config import beyond_the_paper
from dit_fast.model.dit import DiT
from dit_fast.utils.files import write_atomically
from dit_fast.utils.terminal import say
from dit_fast.utils.values import PATH, SOURCE, TEXT, Whole

_EPILOG = """safetensors  a folder with config.json and model.safetensors, for DiT.from_pretrained
pt           one file as the reference publishes them: torch.load gives the state dict that its DiT loads, or SiT's
lightningdit one such file for LightningDiT's class, built with the model's options
diffusers    a folder for diffusers' DiTTransformer2DModel.from_pretrained"""
FORMATS = ("safetensors", "pt", "lightningdit", "diffusers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--ckpt",
        type=SOURCE,
        required=True,
        help="run folder (its newest whole checkpoint), step folder, or any file that dit-fast sample takes",
    )
    parser.add_argument("--out", required=True, type=PATH, help="folder or file to write; must not exist")
    parser.add_argument("--format", choices=FORMATS, default="safetensors", help="(default: safetensors)")
    parser.add_argument(
        "--weights",
        type=TEXT,
        default="ema",
        metavar="SET",
        help="ema, model, or ema:WIDTH, an average of any width of a run with --ema-snapshot-every (default: ema)",
    )
    parser.add_argument(
        "--num-heads", type=Whole(1, 1 << 12), help="attention heads, where the checkpoint does not tell"
    )


def run(args: argparse.Namespace) -> int:
    """Write the export, whole or not at all, and say what it is."""
    if args.out.exists():
        raise OutputError(f"--out {args.out} exists already: give another, or remove it")
    one_file = args.format in ("pt", "lightningdit")
    if one_file and args.out.suffix != ".pt":
        raise ConfigError(f"--out {args.out}: a file of --format {args.format} is named *.pt")
    model, info = load_model(args.ckpt, weights=args.weights, num_heads=args.num_heads)
    for note in info.notes:
        say(f"note: {note}")
    if args.format == "pt" and (others := beyond_the_paper(model.config)):
        raise ConfigError(
            f"--format pt is for the reference's DiT, this model has {others}: give --format safetensors"
        )
    state = state_to_lightningdit(model) if args.format == "lightningdit" else model.state_dict()
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if one_file:
            write_atomically(args.out, lambda path: torch.save(dict(state), path))
        else:
            _write_folder(model, args.out, args.format)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {args.out}: {error}; give another --out") from error
    if args.format == "diffusers":
        say(
            "note: diffusers' own model has other timestep frequencies and another epsilon than the reference, with "
            "which this one was trained: its outputs differ by more than rounding. "
            "dit_fast.FastDiT is exact in DiTPipeline"
        )
    if info.diffusion.get("objective") == "flow":
        told = {name: info.diffusion[name] for name in ASKED if name in info.diffusion}
        flags = " ".join(f"--{name} {value}" for name, value in told.items())
        say(f"note: weights alone do not tell what they predict: sample them with {flags}")
    say(f"wrote {args.out}: {info.summary()}")
    return 0


def _write_folder(model: DiT, folder: Path, kind: str) -> None:
    temporary = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    try:
        if kind == "safetensors":
            model.save_pretrained(temporary)
        else:
            save_diffusers(model, temporary, conventions=DIFFUSERS)
        try:
            temporary.rename(folder)
        except OSError as error:
            if not folder.exists():
                raise
            raise OutputError(
                f"--out {folder} was written by another process in the meantime; give another"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
