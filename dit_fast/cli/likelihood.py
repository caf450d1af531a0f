"""`dit-fast likelihood`: bits per dimension that a model of images needs for real images."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dit_fast.cli.sample_options import CheckpointOptions
from dit_fast.cli.sample_request import images_as_trained
from dit_fast.data import ImageSet, Split
from dit_fast.diffusion import FlowMatching, GaussianDiffusion, create_objective
from dit_fast.diffusion.adaptive import ATOL, RTOL
from dit_fast.diffusion.likelihood import GREY_LEVEL, Method, bits_per_dim, log_likelihood
from dit_fast.distributed.world import DeviceName, choose_device
from dit_fast.errors import ConfigError, NonFiniteError
from dit_fast.interop import ModelInfo, load_model
from dit_fast.model.dit import DiT
from dit_fast.sampling.config import BATCH_SIZE, SamplerConfig
from dit_fast.utils import keyed
from dit_fast.utils.files import check_output, write_atomically
from dit_fast.utils.options import REQUIRED, add_options, option, read_options, same_option
from dit_fast.utils.terminal import say
from dit_fast.utils.values import PATH, SEED, SOURCE, Whole

EPILOG = """Flow matching: likelihood by the ODE (Heun's method, Hutchinson's estimate of the divergence) of images
that are dequantized uniformly within their gray levels: an upper bound of the bits.
Diffusion: variational bound over all timesteps. Lower is better; 8 bits need no model.
Example: dit-fast likelihood --ckpt demo/run --num 64"""


_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class LikelihoodOptions(CheckpointOptions):
    ckpt: str = same_option(CheckpointOptions, "ckpt", default=REQUIRED)
    data: str | None = option(
        None, "Labeled images", SOURCE, metavar="SOURCE", default_text="those of the training"
    )
    num: int = option(64, "Number of images, held-out ones first", Whole(1))
    batch_size: int = option(16, "Images per batch", BATCH_SIZE)
    solver: Method = option("heun", "Solver of the ODE: heun with --steps, or dopri5 with tolerances, SiT's")
    steps: int | None = option(None, "Steps of --solver heun", Whole(1, 1 << 20), default_text=str(_STEPS))
    atol: float | None = same_option(SamplerConfig, "atol")
    rtol: float | None = same_option(SamplerConfig, "rtol")
    probes: int = option(1, "Random probes per estimate of the divergence", Whole(1, 1 << 20))
    seed: int = option(0, "Seed of dequantization, noise and probes", SEED)
    device: DeviceName = option("auto", "Device to compute on")
    out: Path | None = option(None, "Also write the result to this file", PATH, metavar="JSON")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, LikelihoodOptions)


def run(args: argparse.Namespace) -> int:
    options = read_options(LikelihoodOptions, args)
    for name, value in (("--atol", options.atol), ("--rtol", options.rtol)):
        if value is not None and options.solver != "dopri5":
            raise ConfigError(f"{name} {value:g} applies only to --solver dopri5; remove it")
    if options.steps is not None and options.solver == "dopri5":
        raise ConfigError(f"--steps {options.steps} applies only to --solver heun; remove it")
    device = choose_device(options.device)
    model, info = load_model(
        str(options.ckpt),
        weights=options.weights,
        device=device,
        num_heads=options.num_heads,
        objective=options.given_objective(),
        adapter=options.lora,
    )
    data = _images(options, model, info)
    if options.out is not None:
        check_output(options.out)
    split, which = (data.heldout, "held-out") if len(data.heldout) else (data.train, "training")
    num = min(options.num, len(split))
    objective = create_objective(**info.diffusion)
    kind = "likelihood by the ODE" if isinstance(objective, FlowMatching) else "variational bound"
    say(f"{info.summary()}: {kind} of {num} {which} images of {data.name}")
    parts = []
    with tqdm(total=num, desc="likelihood", unit="image", disable=None) as bar:
        for numbers in _batches(split, num, options.batch_size):
            images, labels = split.batch(numbers).to(device), split.labels[numbers].to(device)
            parts.append(_bits(options, objective, model, images, labels, numbers))
            bar.update(len(numbers))
    bits = torch.cat(parts)
    if not bits.isfinite().all():
        raise NonFiniteError(
            f"{info.path}: the bits of {int((~bits.isfinite()).sum())} images are not finite"
        )
    error = float(bits.std(correction=1) / num**0.5) if num > 1 else None
    say(f"{bits.mean():.4f} bits per dimension" + (f" +- {error:.4f} (standard error)" if error else ""))
    if options.out is not None:
        figures = {
            "checkpoint": str(info.path),
            "data": data.name,
            "split": which,
            "images": num,
            "measured": kind,
            "bits_per_dimension": float(bits.mean()),
            "standard_error": error,
        }
        write_atomically(options.out, lambda path: path.write_text(json.dumps(figures, indent=2) + "\n"))
        say(f"wrote {options.out}")
    return 0


def _images(options: LikelihoodOptions, model: DiT, info: ModelInfo) -> ImageSet:
    """Images to measure, with the size, channels and classes of the model."""
    if info.latent or model.caption_dim:
        made = "latents of an autoencoder" if info.latent else "images of captions"
        raise ConfigError(
            f"--ckpt {options.ckpt}: the model generates {made}; bits are defined for labeled 8-bit images"
        )
    source = options.data or info.data.get("name")
    if source is None:
        raise ConfigError(f"{info.path} does not record its training data: give --data SOURCE")
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
    options: LikelihoodOptions,
    objective: GaussianDiffusion | FlowMatching,
    model: DiT,
    images: Tensor,
    labels: Tensor,
    numbers: Tensor,
) -> Tensor:
    """Bits per dimension of images (N, C, H, W), float64 (N,) on the CPU. `numbers` (N,) key the draws."""
    conditioning, shape = {"y": labels}, tuple(images.shape[1:])
    if not isinstance(objective, FlowMatching):

        def noise(timestep: int) -> Tensor:
            key = keyed.key(options.seed, f"bound at timestep {timestep}")
            return keyed.normal(key, numbers.to(images.device), shape)

        bound = objective.calc_bpd_loop(model, images, model_kwargs=conditioning, noise=noise)
        return bound["total_bpd"].double().cpu()
    place = keyed.uniform(keyed.key(options.seed, "dequantise"), numbers, shape)
    spread = images + (place.to(images) - 0.5) * GREY_LEVEL
    nats = log_likelihood(
        objective,
        model,
        spread,
        steps=options.steps or _STEPS,
        method=options.solver,
        atol=options.atol or ATOL,
        rtol=options.rtol or RTOL,
        probes=options.probes,
        seed=options.seed,
        numbers=numbers,
        model_kwargs=conditioning,
    )
    return bits_per_dim(nats, images[0].numel()).cpu()
