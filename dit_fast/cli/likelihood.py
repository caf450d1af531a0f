"""`dit-fast likelihood`: bits per dimension that a model of images needs for real ones."""

import argparse
import json
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from dit_fast.cli.sample_options import add_objective_options, asked_objective
from dit_fast.cli.sample_plan import images_as_trained
from dit_fast.data import ImageSet, Split
from dit_fast.diffusion import FlowMatching, GaussianDiffusion, create_objective
from dit_fast.diffusion.likelihood import GREY_LEVEL, bits_per_dim, log_likelihood
from dit_fast.distributed.world import choose_device
from dit_fast.errors import ConfigError, NonFiniteError
from dit_fast.interop import ModelInfo, load_model
from dit_fast.model.dit import DiT
from dit_fast.sampling.config import BATCH_SIZE
from dit_fast.utils import keyed
from dit_fast.utils.files import check_output, write_atomically
from dit_fast.utils.terminal import say
from dit_fast.utils.values import PATH, SEED, SOURCE, TEXT, Whole

_EPILOG = """A model of flow matching: the likelihood by its ODE (Heun's method; Hutchinson's estimate of the
divergence), of images that are dequantised, uniform within their grey levels: an upper bound of the bits.
A diffusion model: the variational bound over all its timesteps. Lower is better, 8 is no model at all.
Example: dit-fast likelihood --ckpt demo/run --num 64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ckpt", type=SOURCE, required=True, help="as of dit-fast sample; a model of pixels")
    parser.add_argument("--weights", type=TEXT, default="ema", help="ema, model or ema:WIDTH (default: ema)")
    add_objective_options(parser)
    parser.add_argument(
        "--data", type=SOURCE, metavar="SOURCE", help="labelled images (default: what it was trained on)"
    )
    parser.add_argument("--num", type=Whole(1), default=64, help="images, held-out ones first (default: 64)")
    parser.add_argument("--batch-size", type=BATCH_SIZE, default=16, help="images at a time (default: 16)")
    parser.add_argument("--steps", type=Whole(1, 1 << 20), default=100, help="of the ODE (default: 100)")
    parser.add_argument("--probes", type=Whole(1, 1 << 20), default=1, help="of the divergence (default: 1)")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=PATH, metavar="JSON", help="also write the figures to this file")


def run(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    model, info = load_model(args.ckpt, weights=args.weights, device=device, objective=asked_objective(args))
    data = _images(args, model, info)
    if args.out is not None:
        check_output(args.out)
    split, which = (data.heldout, "held-out") if len(data.heldout) else (data.train, "training")
    num = min(args.num, len(split))
    objective = create_objective(**info.diffusion)
    kind = "likelihood by the ODE" if isinstance(objective, FlowMatching) else "variational bound"
    say(f"{info.summary()}: {kind} of {num} {which} images of {data.name}")
    parts = []
    with tqdm(total=num, desc="likelihood", unit="image", disable=None) as bar:
        for numbers in _batches(split, num, args.batch_size):
            images, labels = split.batch(numbers).to(device), split.labels[numbers].to(device)
            parts.append(_bits(args, objective, model, images, labels, numbers))
            bar.update(len(numbers))
    bits = torch.cat(parts)
    if not bits.isfinite().all():
        raise NonFiniteError(
            f"{info.path}: the bits of {int((~bits.isfinite()).sum())} images are not finite"
        )
    error = float(bits.std(correction=1) / num**0.5) if num > 1 else None
    say(f"{bits.mean():.4f} bits per dimension" + (f" +- {error:.4f} (standard error)" if error else ""))
    if args.out is not None:
        figures = {
            "checkpoint": str(info.path),
            "data": data.name,
            "split": which,
            "images": num,
            "measured": kind,
            "bits_per_dimension": float(bits.mean()),
            "standard_error": error,
        }
        write_atomically(args.out, lambda path: path.write_text(json.dumps(figures, indent=2) + "\n"))
        say(f"wrote {args.out}")
    return 0


def _images(args: argparse.Namespace, model: DiT, info: ModelInfo) -> ImageSet:
    """The images to measure, of the model's size, channels and classes."""
    if info.latent or model.caption_dim:
        made = "latents of an autoencoder" if info.latent else "images of captions"
        raise ConfigError(f"--ckpt {args.ckpt}: it makes {made}, and bits are those of labelled 8-bit images")
    source = args.data or info.data.get("name")
    if source is None:
        raise ConfigError(f"{info.path} does not say what it was trained on: give --data SOURCE")
    buckets = tuple((height, width) for height, width in info.data.get("buckets", ()))
    size = None if buckets else model.x_embedder.img_size
    data = images_as_trained(
        source,
        info,
        model.in_channels,
        image_size=size,
        buckets=buckets,
        num_classes=None if model.num_classes else 0,
    )
    if model.num_classes not in (0, data.num_classes):
        raise ConfigError(
            f"--data {source} has {data.num_classes} classes, the model {model.num_classes}: give images of its classes"
        )
    return data


def _batches(split: Split, num: int, batch_size: int) -> Iterator[Tensor]:
    """The first `num` images of a split, those of one shape together."""
    buckets = torch.zeros(num) if split.buckets is None else split.buckets[:num]
    for bucket in buckets.unique():
        yield from (buckets == bucket).nonzero().flatten().split(batch_size)


def _bits(
    args: argparse.Namespace,
    objective: GaussianDiffusion | FlowMatching,
    model: DiT,
    images: Tensor,
    labels: Tensor,
    numbers: Tensor,
) -> Tensor:
    """Bits per dimension of images (N, C, H, W), float64 (N,) on the CPU; `numbers`: theirs, which key the draws."""
    told, shape = {"y": labels}, tuple(images.shape[1:])
    if not isinstance(objective, FlowMatching):

        def noise(timestep: int) -> Tensor:
            key = keyed.key(args.seed, f"bound at timestep {timestep}")
            return keyed.normal(key, numbers.to(images.device), shape)

        bound = objective.calc_bpd_loop(model, images, model_kwargs=told, noise=noise)
        return bound["total_bpd"].double().cpu()
    place = keyed.uniform(keyed.key(args.seed, "dequantise"), numbers, shape)
    spread = images + (place.to(images) - 0.5) * GREY_LEVEL
    nats = log_likelihood(
        objective,
        model,
        spread,
        steps=args.steps,
        probes=args.probes,
        seed=args.seed,
        numbers=numbers,
        model_kwargs=told,
    )
    return bits_per_dim(nats, images[0].numel()).cpu()
