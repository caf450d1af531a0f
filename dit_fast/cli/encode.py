"""`dit-fast encode`: a folder of images into a set of latents, or its captions into embeddings, to train on."""

import argparse

import torch

from dit_fast.cli.train import add_conversion_options
from dit_fast.data.encode import PRECISIONS, RANGES, EncodeConfig, embed, encode
from dit_fast.data.shards import DTYPES
from dit_fast.distributed.world import choose_device, local_rank, ranks
from dit_fast.utils.terminal import say

_EPILOG = """Several GPUs: torchrun --nproc-per-node 8 -m dit_fast.cli encode --data ... --out ...
A run that was interrupted goes on with the same command, on any number of GPUs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of `EncodeConfig`."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--data",
        "--data-path",
        type=RANGES["data"],
        required=True,
        metavar="FOLDER",
        help="folder of class sub-folders, or of images with captions (NAME.txt beside each, or metadata.jsonl)",
    )
    parser.add_argument(
        "--out",
        type=RANGES["out"],
        required=True,
        metavar="DIR",
        help="folder of the latent set; with --vae none a .safetensors file",
    )
    parser.add_argument(
        "--vae",
        type=RANGES["vae"],
        default="ema",
        help="ema, mse (published), or a folder with a diffusers AutoencoderKL (default: ema); none: embeddings of "
        "captions alone, FOLDER/embeddings.safetensors of training on the images themselves",
    )
    parser.add_argument(
        "--size", "--image-size", dest="image_size", type=RANGES["image_size"], default=256, metavar="S",
        help="images are scaled and cropped to S x S (default: 256)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="of the stored moments (default: float16)"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="tf32", help="of the autoencoder (default: tf32)"
    )
    parser.add_argument(
        "--batch-size",
        type=RANGES["batch_size"],
        default=32,
        metavar="B",
        help="images at a time (default: 32)",
    )
    parser.add_argument(
        "--shard-size",
        type=RANGES["shard_size"],
        default=4096,
        metavar="M",
        help="images in a file (default: 4096)",
    )
    parser.add_argument(
        "--text-encoder",
        type=RANGES["text_encoder"],
        metavar="NAME",
        help="store embeddings of captions in place of classes, by a CLIP or T5 of transformers (hub name or folder), "
        "or from a .safetensors or .npz of arrays (tokens, width) named as the images are",
    )
    parser.add_argument(
        "--caption-tokens",
        type=RANGES["caption_tokens"],
        metavar="S",
        help="tokens of a caption (default: as many as the encoder takes, at most 120)",
    )
    parser.add_argument(
        "--num-classes",
        type=RANGES["num_classes"],
        metavar="N",
        help="0: images need no sub-folders, and no class is told of them (default: a class for each sub-folder)",
    )
    add_conversion_options(parser)
    parser.set_defaults(background=EncodeConfig.background)
    parser.add_argument(
        "--skip-unreadable",
        type=RANGES["skip_unreadable"],
        default=0,
        metavar="N",
        help="go on without up to N images that cannot be read (default: 0)",
    )
    parser.add_argument(
        "--num-workers",
        type=RANGES["num_workers"],
        metavar="N",
        help="threads that decode images (default: one a core)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="cuda is the GPU of LOCAL_RANK (default: auto)",
    )


def run(args: argparse.Namespace) -> int:
    """Encode what falls to this rank; 0, or a DitFastError."""
    options = {name: value for name, value in vars(args).items() if name not in ("command", "run", "device")}
    rank, world_size = ranks()
    config = EncodeConfig(**options, device=str(choose_device(args.device, local_rank())))
    # Stated both ways: torch allows TF32 in convolutions by default and forbids it in matrix products.
    torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if config.vae == "none":
        say(f"wrote {config.out}: embeddings of {embed(config, world_size)} captions")
        return 0
    try:
        result = encode(config, rank, world_size)
    except KeyboardInterrupt:
        say(
            f"dit-fast: interrupted; the same command goes on from the whole shards in {config.out}",
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
