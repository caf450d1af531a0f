"""`dit-fast encode`: encode a folder of images to latents, or its captions to embeddings, for training."""

import argparse
from dataclasses import dataclass

import torch

from dit_fast.data.encode import EncodeConfig, embed, encode
from dit_fast.distributed.world import DeviceName, choose_device, local_rank, ranks
from dit_fast.utils.options import Options, add_options, given_options, option, read_options
from dit_fast.utils.terminal import say

EPILOG = """Several GPUs: torchrun --nproc-per-node 8 -m dit_fast.cli encode --data ... --out ...
The same command continues an interrupted one, on any number of GPUs."""


@dataclass(frozen=True)
class DeviceOptions(Options):
    device: DeviceName = option("auto", "Device to encode on; cuda is the GPU of LOCAL_RANK", group="machine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, EncodeConfig)
    add_options(parser, DeviceOptions)


def run(args: argparse.Namespace) -> int:
    """Encode the shards of this rank; 0, or a DitFastError."""
    rank, world_size = ranks()
    device = choose_device(read_options(DeviceOptions, args).device, local_rank())
    config = EncodeConfig(**given_options(EncodeConfig, args), device=str(device))
    # Set both ways: torch allows TF32 in convolutions by default and forbids it in matrix products.
    torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if config.vae == "none":
        say(f"wrote {config.out}: embeddings of {embed(config, world_size)} captions")
        return 0
    try:
        result = encode(config, rank, world_size)
    except KeyboardInterrupt:
        say(
            f"dit-fast: interrupted; the same command continues from the complete shards in {config.out}",
            error=True,
        )
        return 130
    done = f"shards: {result.encoded} encoded, {result.kept} kept"
    if result.complete:
        say(f"{result.out} is complete: {result.images} images; {done}")
        if result.unreadable:
            files = "; ".join(f"{name} ({reason})" for name, reason in sorted(result.unreadable.items()))
            say(f"left out, because they could not be read: {len(result.unreadable)} files: {files}")
    else:
        say(f"rank {rank}/{world_size}: {done}, {result.missing} still to come from other ranks")
    return 0
