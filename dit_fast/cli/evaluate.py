"""`dit-fast evaluate`: FID, sFID, Inception score, precision and recall of samples against real images."""

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dit_fast.checkpoint.folder import find_checkpoint, step_folders
from dit_fast.checkpoint.manifest import MANIFEST, read_manifest
from dit_fast.cli import sample
from dit_fast.cli.sample_options import RESPACING
from dit_fast.cli.train import add_conversion_options
from dit_fast.data import Conversion, Size, apportion, parse_buckets
from dit_fast.distributed.world import choose_device, ranks
from dit_fast.errors import ConfigError
from dit_fast.evaluation import (
    FEATURES,
    METRICS,
    Activations,
    FeatureExtractor,
    ImageSource,
    Reference,
    collect,
    open_extractor,
    open_reference,
    open_source,
    score,
    write_statistics,
)
from dit_fast.evaluation.images import Archive, JoinedImages, archive_images
from dit_fast.sampling import PRECISIONS, SOLVERS
from dit_fast.sampling.config import BATCH_SIZE
from dit_fast.sampling.guidance import SCALE
from dit_fast.utils.files import check_output, write_atomically
from dit_fast.utils.terminal import say
from dit_fast.utils.values import PATH, SEED, SIDE, SOURCE, TEXT, Whole, check_memory

_EPILOG = """inception     torch-fidelity's Inception-v3 (extra 'evaluation'), that of FID; --weights is its weight file
efficientnet  proxy: EfficientNet-Lite0, whose weights come with the extra 'evaluation'
classifier    proxy: principal components of the labelled reference images (extra 'demo')

A proxy's scores are not comparable with published ones, and are printed and saved as proxies."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "samples",
        type=SOURCE,
        nargs="?",
        help="folder of images or of dit-fast sample, or .npz archive with arr_0 (or give --ckpt)",
    )
    parser.add_argument(
        "--against",
        type=SOURCE,
        metavar="REFERENCE",
        help="real images: a folder, an .npz with arr_0, statistics (mu, sigma) or both as ADM's, or mnist, digits",
    )
    parser.add_argument("--features", choices=FEATURES, default="inception", help="default: inception")
    parser.add_argument("--weights", type=PATH, metavar="PATH", help="weight file of --features inception")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="default: all that can be had")
    parser.add_argument(
        "--splits",
        type=Whole(1, 1 << 16),
        default=10,
        help="parts of the Inception score (default: 10, as published)",
    )
    parser.add_argument(
        "--neighbours",
        type=Whole(1, 1 << 16),
        default=3,
        metavar="K",
        help="of precision and recall (default: 3)",
    )
    parser.add_argument(
        "--image-size", type=SIDE, metavar="S", help="scale and crop all images to S x S, as in training"
    )
    parser.add_argument(
        "--buckets",
        type=TEXT,
        metavar="SIZES",
        help="scale and crop each image to the nearest of HEIGHTxWIDTH,..., as dit-fast train --buckets does (default: "
        "the checkpoint's own, in their proportion in its training)",
    )
    add_conversion_options(parser)
    parser.set_defaults(raw_pixels=None)
    parser.add_argument("--batch-size", type=BATCH_SIZE, default=64, help="images at a time (default: 64)")
    parser.add_argument(
        "--num-workers",
        type=Whole(1, 1 << 12),
        metavar="N",
        help="threads that decode images (default: one a core)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=PATH, metavar="JSON", help="also write the scores to this file")
    parser.add_argument(
        "--save-statistics", type=PATH, metavar="NPZ", help="write the samples' statistics, for --against"
    )
    group = parser.add_argument_group(
        "samples of a checkpoint", "For more options, dit-fast sample --npz first."
    )
    group.add_argument(
        "--ckpt", type=SOURCE, help="draw the samples from this checkpoint, as dit-fast sample does"
    )
    group.add_argument("--num", type=Whole(2), help="number of samples, of random classes or captions")
    group.add_argument("--cfg-scale", type=SCALE, default=1.0, help="guidance scale (default: 1, none)")
    group.add_argument("--steps", type=RESPACING, help="sampling steps (default: 250, or all if fewer)")
    group.add_argument(
        "--solver", choices=SOLVERS, help="(default: ddpm of diffusion, euler of flow matching)"
    )
    group.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32")
    group.add_argument(
        "--vae", type=SOURCE, help="decoder of a latent model: ema, mse (the default) or a folder"
    )
    group.add_argument("--seed", type=SEED, default=0)
    group.add_argument(
        "--sample-dir", type=PATH, help="keep the samples here; killed, the same command goes on there"
    )


def run(args: argparse.Namespace) -> int:
    """Score; 0, or a DitFastError. All that can be refused is refused before images are drawn or read in full."""
    _check(args)
    device = choose_device(args.device)
    mixture = {} if args.ckpt is None else _mixture(args.ckpt)
    buckets = tuple(mixture) if args.buckets is None else parse_buckets(args.buckets)
    if args.image_size is not None:
        buckets = ()
    elif buckets and args.features == "classifier":
        raise ConfigError(
            "--features classifier knows images of one size, these are of several: give --image-size"
        )
    conversion = _conversion(args)
    opened = (args.image_size, _workers(args), buckets, conversion)
    reference = None if args.against is None else open_reference(args.against, *opened)
    # A folder of samples is opened before a network is loaded: what is wrong with it is cheaper to find.
    given = None if args.samples is None else open_source(args.samples, *opened)
    if given is not None and reference is not None and not buckets:
        _check_sizes(given, reference)
    extractor = open_extractor(
        args.features,
        device,
        weights=args.weights,
        labelled=args.against,
        image_size=args.image_size,
        conversion=conversion,
    )
    for path in (args.out, args.save_statistics):
        if path is not None:
            check_output(path)
    with contextlib.ExitStack() as stack:
        source = given or stack.enter_context(_drawn(args, mixture))
        if given is None and reference is not None and not buckets:
            _check_sizes(source, reference)
        samples = _collect(source, extractor, args.batch_size, "samples")
    if args.save_statistics is not None:
        write_atomically(
            args.save_statistics, lambda temporary: write_statistics(temporary, samples.statistics)
        )
        say(f"wrote {args.save_statistics} (statistics of {source.num} images)")
    if reference is not None:
        _score(args, source.name, samples, reference, extractor, device)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.image_size is not None:
        check_memory(4 * 3 * args.image_size**2, f"an image with --image-size {args.image_size}")
    if (args.samples is None) == (args.ckpt is None):
        raise ConfigError("give either a folder or archive of samples, or --ckpt")
    if args.buckets is not None and (args.image_size is not None or args.ckpt is not None):
        other = "--ckpt, which says itself what it was trained on" if args.ckpt else "--image-size, one size"
        raise ConfigError(f"--buckets {args.buckets} does not go with {other}: leave one out")
    if args.ckpt is not None and (args.num is None or args.num < 2):
        raise ConfigError(f"--ckpt {args.ckpt}: say how many images to draw with --num, at least 2")
    if ranks()[1] > 1:
        raise ConfigError(
            "dit-fast evaluate runs in one process: draw samples under torchrun with dit-fast sample --npz first"
        )
    if args.against is None and args.save_statistics is None:
        raise ConfigError("--against is missing: give real images or statistics (or --save-statistics)")
    if args.against is None and args.out is not None:
        raise ConfigError("--out holds scores, which need --against")
    if args.features == "inception" and args.weights is None:
        raise ConfigError(
            "--features inception: give torch-fidelity's weights-inception-2015-12-05-6726825d.pth with --weights "
            "(or take a proxy: efficientnet, classifier)"
        )
    if args.features != "inception" and args.weights is not None:
        raise ConfigError(f"--weights is for --features inception, not {args.features}")


def _check_sizes(source: ImageSource, reference: Reference) -> None:
    if reference.images is not None and reference.images.sizes != source.sizes:
        ((height, width),), ((real_height, real_width),) = source.sizes, reference.images.sizes
        raise ConfigError(
            f"{source.name} has images of {width}x{height}, {reference.name} of {real_width}x{real_height}; "
            "give --image-size to scale and crop both"
        )


def _manifest(checkpoint: str) -> dict[str, Any]:
    """What a run says of itself; {} for any other model."""
    path = Path(checkpoint)
    if not (path / MANIFEST).is_file() and not step_folders(path):
        return {}
    return read_manifest(find_checkpoint(path))


def _conversion(args: argparse.Namespace) -> Conversion:
    """How images become pixels: as asked for, else as for the training of --ckpt."""
    data = (_manifest(args.ckpt) if args.ckpt else {}).get("data") or {}
    trained = Conversion.of(data["pixels"]) if "pixels" in data else Conversion()
    raw = trained.raw if args.raw_pixels is None else args.raw_pixels
    return Conversion(args.background or trained.background, raw)


def _mixture(checkpoint: str) -> dict[Size, int]:
    """The buckets, in pixels, that a run was trained on, and how many images each had; {} for any other model."""
    manifest = _manifest(checkpoint)
    config, data = manifest.get("train_config") or {}, manifest.get("data") or {}
    if not config.get("buckets"):
        return {}
    if "bucket_images" not in data:
        raise ConfigError(
            f"--ckpt {checkpoint} does not say how many images its buckets had: draw with dit-fast sample --image-size "
            "HEIGHTxWIDTH --save-images, and score the folder"
        )
    return dict(zip(parse_buckets(config["buckets"]), data["bucket_images"], strict=True))


@contextlib.contextmanager
def _drawn(args: argparse.Namespace, mixture: dict[Size, int]) -> Iterator[ImageSource]:
    """Samples of the checkpoint, in --sample-dir or for the time of this command.

    Of a mixture each shape is a request of its own, with the seeds that `dit_fast.training.callbacks` takes.
    """
    with contextlib.ExitStack() as stack:
        folder = args.sample_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dit-fast-")))
        if not mixture:
            yield _sampled(args, folder, args.num, args.seed)
            return
        parts = []
        for bucket, (size, num) in enumerate(
            zip(mixture, apportion(args.num, list(mixture.values())), strict=True)
        ):
            if num:
                shape = "x".join(map(str, size))
                parts.append(_sampled(args, folder / shape, num, args.seed + bucket, "--image-size", shape))
        yield JoinedImages(str(folder), tuple(parts))


def _sampled(args: argparse.Namespace, folder: Path, num: int, seed: int, *more: str) -> ImageSource:
    words = ["--ckpt", args.ckpt, "--npz", "--out", folder, "--num", num, "--seed", seed, *more]
    words += ["--cfg-scale", args.cfg_scale, "--precision", args.precision]
    words += ["--batch-size", args.batch_size, "--device", choose_device(args.device).type]
    for name in ("steps", "solver", "vae"):
        if getattr(args, name) is not None:
            words += [f"--{name}", getattr(args, name)]
    parser = argparse.ArgumentParser(prog="dit-fast sample", allow_abbrev=False)
    sample.add_arguments(parser)
    sample.run(parser.parse_args([str(word) for word in words]))
    return archive_images(Archive(folder / "samples.npz"), args.image_size)


def _collect(source: ImageSource, extractor: FeatureExtractor, batch_size: int, what: str) -> Activations:
    say(f"{extractor.name}: {source.num} {what} from {source.name}")
    with tqdm(total=source.num, desc=what, unit="image", disable=None) as bar:
        return collect(source, extractor, batch_size, bar.update)


def _score(
    args: argparse.Namespace,
    name: str,
    samples: Activations,
    reference: Reference,
    extractor: FeatureExtractor,
    device: torch.device,
) -> None:
    statistics, features = reference.statistics, None
    compared = args.metrics is None or bool({"precision", "recall"} & set(args.metrics))
    if reference.images is not None and (statistics is None or compared):
        real = _collect(reference.images, extractor, args.batch_size, "reference images")
        statistics, features = statistics or real.statistics, real.features
    assert statistics is not None
    quality = score(
        samples, statistics, features, extractor.proxy, args.metrics,
        splits=args.splits, k=args.neighbours, device=device,
    )  # fmt: skip
    for line in quality.lines():
        say(line)
    if args.out is not None:
        request = {"samples": args.ckpt or name, "against": reference.name}
        text = json.dumps({**request, **quality.as_json()}, indent=2) + "\n"
        write_atomically(args.out, lambda temporary: temporary.write_text(text))
        say(f"wrote {args.out}")


def _workers(args: argparse.Namespace) -> int:
    return args.num_workers or os.cpu_count() or 1
