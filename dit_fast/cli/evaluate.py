"""`dit-fast evaluate`: FID, sFID, Inception score, precision and recall of samples against real images."""

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dit_fast.checkpoint.folder import find_checkpoint, step_folders
from dit_fast.checkpoint.manifest import MANIFEST, read_manifest
from dit_fast.cli import sample
from dit_fast.cli.sample_options import SampleOptions
from dit_fast.data import Conversion, Size, apportion, parse_buckets
from dit_fast.data.encode import EncodeConfig
from dit_fast.distributed.world import DeviceName, choose_device, ranks
from dit_fast.errors import ConfigError
from dit_fast.evaluation import (
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
from dit_fast.evaluation.evaluate import Metric
from dit_fast.evaluation.features import FeatureName
from dit_fast.evaluation.images import Archive, JoinedImages, archive_images
from dit_fast.sampling.config import BATCH_SIZE, SamplePrecision
from dit_fast.sampling.solvers import Solver
from dit_fast.utils.files import check_output, write_atomically
from dit_fast.utils.options import Options, add_options, option, read_options, same_option
from dit_fast.utils.terminal import say
from dit_fast.utils.values import PATH, SIDE, SOURCE, TEXT, OneOf, Several, Whole, check_memory

EPILOG = """inception     torch-fidelity's Inception-v3 (extra 'evaluation'), that of FID; --weights is its weight file
efficientnet  proxy: EfficientNet-Lite0, whose weights come with the extra 'evaluation'
classifier    proxy: principal components of the labeled reference images (extra 'demo')

Scores of a proxy are not comparable with published ones, and are printed and saved as proxies.
dit-fast sample --npz draws samples with more options than --ckpt."""
_DRAWN = "samples of --ckpt"


@dataclass(frozen=True)
class EvaluateOptions(Options):
    samples: str | None = option(
        None,
        "Folder of images or of dit-fast sample, or .npz archive with arr_0; --ckpt draws them instead",
        SOURCE,
        positional=True,
    )
    against: str | None = option(
        None,
        "Real images: a folder, an .npz of images (arr_0), of statistics (mu, sigma) or of both, mnist or digits",
        SOURCE,
        metavar="REFERENCE",
    )
    features: FeatureName = option("inception", "Feature network")
    weights: Path | None = option(None, "Weight file of --features inception", PATH)
    metrics: tuple[Metric, ...] = option(
        (),
        "Metrics to compute",
        Several(OneOf(METRICS)),
        default_text="all that the features and the reference allow",
    )
    splits: int = option(10, "Splits of the Inception score", Whole(1, 1 << 16), metavar="N")
    neighbours: int = option(3, "Nearest neighbors of precision and recall", Whole(1, 1 << 16), metavar="K")
    image_size: int | None = option(
        None,
        "Scale and center-crop all images to S x S, as in training",
        SIDE,
        metavar="S",
        group="images",
        default_text="sizes as they are",
    )
    buckets: str | None = option(
        None,
        "Scale and crop each image to the nearest of HEIGHTxWIDTH,..., as in dit-fast train --buckets",
        TEXT,
        metavar="SIZES",
        group="images",
        default_text="those of the checkpoint, in the proportions of its training",
    )
    background: str | None = same_option(
        EncodeConfig,
        "background",
        group="images",
        default=None,
        default_text="white, or as in the training of --ckpt",
    )
    raw_pixels: bool | None = same_option(
        EncodeConfig,
        "raw_pixels",
        group="images",
        default=None,
        default_text="off, or as in the training of --ckpt",
    )
    num_workers: int | None = same_option(EncodeConfig, "num_workers", group="images")
    batch_size: int = option(64, "Images per batch", BATCH_SIZE, group="machine")
    device: DeviceName = option("auto", "Device to compute on", group="machine")
    out: Path | None = option(
        None, "Also write the scores to this file", PATH, metavar="JSON", group="output"
    )
    save_statistics: Path | None = option(
        None, "Write the statistics of the samples, for --against", PATH, metavar="NPZ", group="output"
    )
    ckpt: str | None = same_option(SampleOptions, "ckpt", group=_DRAWN)
    num: int | None = option(None, "Number of samples, of random classes or captions", Whole(2), group=_DRAWN)
    cfg_scale: float = same_option(SampleOptions, "cfg_scale", group=_DRAWN, default=1.0, default_text=None)
    steps: str | None = same_option(SampleOptions, "steps", group=_DRAWN, aliases=())
    solver: Solver | None = same_option(SampleOptions, "solver", group=_DRAWN)
    precision: SamplePrecision = same_option(SampleOptions, "precision", group=_DRAWN)
    vae: str | None = same_option(SampleOptions, "vae", group=_DRAWN)
    seed: int = same_option(SampleOptions, "seed", group=_DRAWN, aliases=())
    sample_dir: Path | None = option(
        None,
        "Folder to keep the samples in; the same command continues one that was killed",
        PATH,
        group=_DRAWN,
        default_text="a temporary folder",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, EvaluateOptions)


def run(args: argparse.Namespace) -> int:
    """Score the samples. Everything that can be refused is refused before images are drawn or read completely."""
    options = read_options(EvaluateOptions, args)
    _check(options)
    device = choose_device(options.device)
    mixture = {} if options.ckpt is None else _mixture(options.ckpt)
    buckets = tuple(mixture) if options.buckets is None else parse_buckets(options.buckets)
    if options.image_size is not None:
        buckets = ()
    elif buckets and options.features == "classifier":
        raise ConfigError(
            "--features classifier needs images of one size, these have several: give --image-size"
        )
    conversion = _conversion(options)
    opened = (options.image_size, _workers(options), buckets, conversion)
    reference = None if options.against is None else open_reference(options.against, *opened)
    # A folder of samples is opened before a network is loaded: what is wrong with it is cheaper to find.
    given = None if options.samples is None else open_source(options.samples, *opened)
    if given is not None and reference is not None and not buckets:
        _check_sizes(given, reference)
    extractor = open_extractor(
        options.features,
        device,
        weights=options.weights,
        labeled=options.against,
        image_size=options.image_size,
        conversion=conversion,
    )
    for path in (options.out, options.save_statistics):
        if path is not None:
            check_output(path)
    with contextlib.ExitStack() as stack:
        source = given or stack.enter_context(_drawn(options, mixture))
        if given is None and reference is not None and not buckets:
            _check_sizes(source, reference)
        samples = _collect(source, extractor, options.batch_size, "samples")
    if options.save_statistics is not None:
        write_atomically(
            options.save_statistics, lambda temporary: write_statistics(temporary, samples.statistics)
        )
        say(f"wrote {options.save_statistics} (statistics of {source.num} images)")
    if reference is not None:
        _score(options, source.name, samples, reference, extractor, device)
    return 0


def _check(options: EvaluateOptions) -> None:
    if options.image_size is not None:
        check_memory(4 * 3 * options.image_size**2, f"an image with --image-size {options.image_size}")
    if (options.samples is None) == (options.ckpt is None):
        raise ConfigError("give either a folder or archive of samples, or --ckpt")
    if options.buckets is not None and (options.image_size is not None or options.ckpt is not None):
        other = "--ckpt, which has buckets of its own" if options.ckpt else "--image-size, one size"
        raise ConfigError(f"--buckets {options.buckets} does not go with {other}: leave one out")
    if options.ckpt is not None and (options.num is None or options.num < 2):
        raise ConfigError(f"--ckpt {options.ckpt}: say how many images to draw with --num, at least 2")
    if ranks()[1] > 1:
        raise ConfigError(
            "dit-fast evaluate runs in one process: draw samples under torchrun with dit-fast sample --npz first"
        )
    if options.against is None and options.save_statistics is None:
        raise ConfigError("--against is missing: give real images or statistics (or --save-statistics)")
    if options.against is None and options.out is not None:
        raise ConfigError("--out holds scores, which need --against")
    if options.features == "inception" and options.weights is None:
        raise ConfigError(
            "--features inception: give torch-fidelity's weights-inception-2015-12-05-6726825d.pth with --weights "
            "(or take a proxy: efficientnet, classifier)"
        )
    if options.features != "inception" and options.weights is not None:
        raise ConfigError(f"--weights is for --features inception, not {options.features}")


def _check_sizes(source: ImageSource, reference: Reference) -> None:
    if reference.images is not None and reference.images.sizes != source.sizes:
        ((height, width),), ((real_height, real_width),) = source.sizes, reference.images.sizes
        raise ConfigError(
            f"{source.name} has images of {width}x{height}, {reference.name} of {real_width}x{real_height}; "
            "give --image-size to scale and crop both"
        )


def _manifest(checkpoint: str) -> dict[str, Any]:
    """Manifest of a run; {} for any other model."""
    path = Path(checkpoint)
    if not (path / MANIFEST).is_file() and not step_folders(path):
        return {}
    return read_manifest(find_checkpoint(path))


def _conversion(options: EvaluateOptions) -> Conversion:
    """Conversion of image files to pixels: that of the options, else that of the training of --ckpt."""
    data = (_manifest(options.ckpt) if options.ckpt else {}).get("data") or {}
    trained = Conversion.of(data["pixels"]) if "pixels" in data else Conversion()
    raw = trained.raw if options.raw_pixels is None else options.raw_pixels
    return Conversion(options.background or trained.background, raw)


def _mixture(checkpoint: str) -> dict[Size, int]:
    """The buckets, in pixels, that a run was trained on, and how many images each had; {} for any other model."""
    manifest = _manifest(checkpoint)
    config, data = manifest.get("train_config") or {}, manifest.get("data") or {}
    if not config.get("buckets"):
        return {}
    if "bucket_images" not in data:
        raise ConfigError(
            f"--ckpt {checkpoint} does not record how many images its buckets had: draw with dit-fast sample "
            "--image-size HEIGHTxWIDTH --save-images, and score the folder"
        )
    return dict(zip(parse_buckets(config["buckets"]), data["bucket_images"], strict=True))


@contextlib.contextmanager
def _drawn(options: EvaluateOptions, mixture: dict[Size, int]) -> Iterator[ImageSource]:
    """Samples of the checkpoint, in --sample-dir or in a temporary folder.

    Each shape of a mixture is a request of its own, with the seeds that `dit_fast.training.callbacks` takes.
    """
    assert options.num is not None
    with contextlib.ExitStack() as stack:
        folder = options.sample_dir or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="dit-fast-"))
        )
        if not mixture:
            yield _sampled(options, folder, options.num, options.seed)
            return
        parts = []
        for bucket, (size, num) in enumerate(
            zip(mixture, apportion(options.num, list(mixture.values())), strict=True)
        ):
            if num:
                parts.append(
                    _sampled(options, folder / "x".join(map(str, size)), num, options.seed + bucket, size)
                )
        yield JoinedImages(str(folder), tuple(parts))


def _sampled(
    options: EvaluateOptions, folder: Path, num: int, seed: int, image_size: Size | None = None
) -> ImageSource:
    sample.sample(
        SampleOptions(
            ckpt=options.ckpt,
            image_size=image_size,
            vae=options.vae,
            num=num,
            seed=seed,
            steps=options.steps,
            solver=options.solver,
            cfg_scale=options.cfg_scale,
            batch_size=options.batch_size,
            device=choose_device(options.device).type,
            precision=options.precision,
            out=folder,
            npz=True,
        )
    )
    return archive_images(Archive(folder / "samples.npz"), options.image_size)


def _collect(source: ImageSource, extractor: FeatureExtractor, batch_size: int, what: str) -> Activations:
    say(f"{extractor.name}: {source.num} {what} from {source.name}")
    with tqdm(total=source.num, desc=what, unit="image", disable=None) as bar:
        return collect(source, extractor, batch_size, bar.update)


def _score(
    options: EvaluateOptions,
    name: str,
    samples: Activations,
    reference: Reference,
    extractor: FeatureExtractor,
    device: torch.device,
) -> None:
    statistics, features = reference.statistics, None
    compared = not options.metrics or bool({"precision", "recall"} & set(options.metrics))
    if reference.images is not None and (statistics is None or compared):
        real = _collect(reference.images, extractor, options.batch_size, "reference images")
        statistics, features = statistics or real.statistics, real.features
    assert statistics is not None
    quality = score(
        samples, statistics, features, extractor.proxy, options.metrics or None,
        splits=options.splits, k=options.neighbours, device=device,
    )  # fmt: skip
    for line in quality.lines():
        say(line)
    if options.out is not None:
        request = {"samples": options.ckpt or name, "against": reference.name}
        text = json.dumps({**request, **quality.as_json()}, indent=2) + "\n"
        write_atomically(options.out, lambda temporary: temporary.write_text(text))
        say(f"wrote {options.out}")


def _workers(options: EvaluateOptions) -> int:
    return options.num_workers or os.cpu_count() or 1
