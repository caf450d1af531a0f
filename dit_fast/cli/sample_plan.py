"""What `dit-fast sample` is asked for, loaded and checked before anything is drawn."""

import argparse
import contextlib
import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast.cli.classes import Labels, Prompts, open_prompts
from dit_fast.cli.sample_options import (
    ALL_CLASSES,
    CFG_SCALE,
    OWN_DATA,
    PER_CLASS,
    SHOWN_CLASSES,
    asked_objective,
)
from dit_fast.data import Conversion, ImageSet, Size, open_images, relocate
from dit_fast.data.caches import read_statistics
from dit_fast.data.decode import read_each, read_header
from dit_fast.data.image_files import SUFFIXES, name_some
from dit_fast.distributed.world import local_rank, ranks
from dit_fast.download import fetch_model, pretrained_models
from dit_fast.encoders.autoencoder import (
    LATENT_FACTOR,
    SD_CHANNELS,
    LatentDecoder,
    check_autoencoder,
    weights_digest,
)
from dit_fast.errors import CheckpointError, ConfigError, OutputError
from dit_fast.evaluation import Scorer
from dit_fast.interop import ModelInfo, load_model, registry_size
from dit_fast.interop.diffusers import conventions_of
from dit_fast.model.dit import DiT
from dit_fast.sampling import Guidance, Sampler, SamplerConfig, default_solver, sampling_schedule
from dit_fast.sampling.guidance import INTERVAL
from dit_fast.sampling.schedule import NoiseSchedule
from dit_fast.sampling.shards import ARCHIVE, IMAGES, OUTPUTS, SCORES, SHARDS, SampleShards
from dit_fast.utils.files import prepare_folder
from dit_fast.utils.terminal import say


@dataclass(frozen=True)
class Plan:
    """A request that is known to be possible.

    labels: the class of each sample, or the place of its caption among `prompts`; names: of the classes,
    where they are known, or the captions.
    """

    model: DiT
    info: ModelInfo
    sampler: Sampler
    labels: Labels
    prompts: Prompts | None
    names: Sequence[str] | None
    decoder: LatentDecoder | None
    scorer: Scorer | None
    parts: SampleShards
    rank: int
    world: int

    def told(self, labels: Tensor) -> Tensor:
        """What the model is told of `labels` (M,): themselves, or captions (M, S, E)."""
        return labels if self.prompts is None else self.prompts.read(labels)

    def decode(self, samples: Tensor) -> Tensor:
        """Images float32 (M, 3, H, W) of latents (M, C, h, w), as scaled by the set that the model was trained on."""
        assert self.decoder is not None
        return self.decoder(samples, self.info.data.get("shift"), self.info.data.get("scale"))


def _refuse_other_results(args: argparse.Namespace) -> None:
    """Raise OutputError for results of an earlier command that would lie beside this one's as if they were its own."""
    if args.save_images and args.out.is_dir():
        others = sorted(
            path.name for path in args.out.iterdir() if path.is_dir() and path.name not in OUTPUTS
        )
        classes = [name for name in others if _holds_an_image(args.out / name)]
        if classes:
            raise OutputError(
                f"--out {args.out} holds folders of images ({name_some(classes)}), of which {IMAGES} would become one "
                "more class; choose another --out"
            )
    # In the folder of a command that did not end, they may be its own; it is continued, and writes them again.
    if (args.out / SHARDS).exists():
        return
    replaced = {ARCHIVE: args.npz, SCORES: args.compare_to is not None, IMAGES: False}
    left = [
        str(args.out / name) for name, again in replaced.items() if not again and (args.out / name).exists()
    ]
    if left:
        raise OutputError(
            f"{' and '.join(left)} of an earlier command {'is' if len(left) == 1 else 'are'} there already; remove "
            f"{'it' if len(left) == 1 else 'them'} or choose another --out"
        )


def _holds_an_image(folder: Path) -> bool:
    """Whether images lie directly in `folder` that are no grids of samples."""
    if folder.name.startswith("."):
        return False
    with contextlib.suppress(OSError):
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:8]
        headers, _ = read_each(paths, lambda path: read_header(path, Conversion()), 1)
        return any(header is not None and not header.grid for header in headers)
    return False


def make_plan(args: argparse.Namespace) -> Plan:
    """Load all that is needed and check it, cheapest first."""
    interval = INTERVAL.check("--cfg-interval", args.cfg_interval)
    rank, world = ranks()
    if world > 1 and args.compare_to is not None:
        raise ConfigError(
            "--compare-to scores in one process: sample first, then score with dit-fast evaluate"
        )
    mode = args.mode or ("fast" if args.npz or world > 1 else "reference")
    device = _device(args.device, world)
    _refuse_other_results(args)

    model, info = load_model(
        _checkpoint(args),
        weights=args.weights,
        device=device,
        num_heads=args.num_heads,
        expected=_expected(args),
        objective=asked_objective(args),
    )
    for note in info.notes:
        say(note)
    if args.cfg_scale is None:
        args.cfg_scale = CFG_SCALE if model.has_null else 1.0
    guidance = Guidance(
        args.cfg_scale,
        _guided_channels(args.cfg_channels, model),
        interval,
        args.cfg_schedule,
    )
    trained = info.vae and relocate(info.vae, info.working_directory, info.path)
    vae = args.vae or (trained or _published_vae(model) if info.latent else "none")
    if args.latent_stats is not None:
        info = _with_statistics(args.latent_stats, model, info, vae)
    solver = args.solver or default_solver(info.diffusion)
    schedule = sampling_schedule(
        info.diffusion, args.steps, solver, learn_sigma=model.learn_sigma, shift=args.shift
    )
    clip = args.clip_denoised if args.clip_denoised is not None else vae == "none" and not info.latent
    config = SamplerConfig(
        solver=solver,
        eta=args.eta,
        last_step=args.last_step,
        guidance=guidance,
        clip=clip,
        mode=mode,
        precision=args.precision,
        graph="never" if args.no_graph else "auto",
        compile=args.compile,
    )
    sampler = Sampler(model, schedule, config)
    prompts = open_prompts(args, model, info, device)
    names: Sequence[str] | None = info.class_names if prompts is None else prompts.names
    labels = _labels(args, model.num_classes, info.class_names) if prompts is None else prompts.labels
    num = len(labels)
    first = labels.first(1)
    sampler.check(first if prompts is None else prompts.read(first), args.seed, args.batch_size)

    if vae != "none" and info.data.get("image_size") and not info.latent:
        raise ConfigError(f"--vae {vae}: {info.path} was trained on pixels, not on latents; leave it out")
    decoder = LatentDecoder(vae, model.in_channels, device) if vae != "none" else None
    if decoder is not None:
        check_autoencoder(vae, decoder, info.data, str(info.path))
    factor = 1 if decoder is None else decoder.factor
    _settle_image_size(args, model, info, LATENT_FACTOR if decoder is None and info.latent else factor)
    height, width = (side * factor for side in model.x_embedder.img_size)
    shape = (model.in_channels if vae == "none" else 3, height, width)
    scorer = _scorer(args, model, info, shape) if args.compare_to is not None else None
    if args.npz and shape[0] not in (1, 3):
        raise ConfigError(
            f"--npz holds images, these are {shape[0]} channels of latents: decode them with --vae"
        )
    # Uncompressed pixels of the parts, the archive and the single files, and of the grid (small images are enlarged).
    copies = 2 + args.npz + args.save_images
    prepare_folder(args.out, needed_bytes=3 * (num * height * width * copies + min(num, 4096) * 56 * 56))

    pixels = shape[0] in (1, 3)
    request = {
        "weights": weights_digest(model.state_dict()),
        "model": {**model.config, **asdict(conventions_of(model))},
        "noise_schedule": _noise_schedule_digest(schedule),
        "objective": info.diffusion,
        "solver": [solver, args.last_step if solver.startswith("sde") else args.eta],
        "guidance": [guidance.scale, guidance.channels, *guidance.interval, guidance.schedule],
        "clip_denoised": clip,
        "mode": mode,
        "precision": args.precision,
        "tf32": args.tf32,
        "seed": args.seed,
        "labels": hashlib.sha256(labels.rule.encode()).hexdigest(),
        "prompts": prompts and prompts.sha256,
        "vae": decoder
        and {
            "weights": decoder.sha256,
            "shift": list(info.data.get("shift") or decoder.shift),
            "scale": list(info.data.get("scale") or decoder.scale),
        },
    }
    kept = (height, width, shape[0]) if pixels else shape
    parts = SampleShards(args.out, request, num, args.batch_size, kept, "uint8" if pixels else "float32")
    parts.open()
    return Plan(model, info, sampler, labels, prompts, names, decoder, scorer, parts, rank, world)


def _noise_schedule_digest(schedule: NoiseSchedule) -> str:
    """SHA-256 of everything that a solver reads of the noise schedule."""
    digest = hashlib.sha256(f"{schedule.prediction} {schedule.variance}".encode())
    for values in (
        schedule.times,
        schedule.levels,
        schedule.alphas,
        schedule.sigmas,
        *(schedule.rates or ()),
    ):
        digest.update(values.tobytes())
    return digest.hexdigest()


def _published_vae(model: DiT) -> str:
    """The decoder of a weight file that tells none."""
    if model.in_channels != SD_CHANNELS:
        raise ConfigError(
            f"--vae is missing: the model makes latents of {model.in_channels} channels; give the folder of their "
            "autoencoder, or none to write the latents"
        )
    return "mse"


def _with_statistics(path: Path, model: DiT, info: ModelInfo, vae: str) -> ModelInfo:
    """`info` with the shift and scale that --latent-stats says."""
    if "shift" in info.data or vae == "none":
        reason = "tells its own" if "shift" in info.data else "is not decoded, with --vae none"
        raise ConfigError(f"--latent-stats {path}: {info.path} {reason}; leave it out")
    mean, deviation = read_statistics(path, model.in_channels)
    return replace(info, data={**info.data, "shift": mean, "scale": [1 / value for value in deviation]})


def _guided_channels(text: str | None, model: DiT) -> int | None:
    if text is None:
        return conventions_of(model).cfg_channels
    return None if text == "all" else int(text)


def _device(name: str, world: int) -> torch.device:
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank() if world > 1 else 0)
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def _checkpoint(args: argparse.Namespace) -> Path:
    """--ckpt; or, as in the reference, the published weights of --model DiT-XL/2."""
    name = args.ckpt
    if name is None:
        size = args.image_size or 256
        if args.model != "DiT-XL/2" or size not in (256, 512):
            raise ConfigError(
                "--ckpt is missing: give a run folder or a weight file (only DiT-XL/2 at 256 or 512 has "
                "published weights, which --model DiT-XL/2 fetches)"
            )
        name = f"DiT-XL-2-{size}x{size}.pt"
    if name in pretrained_models and not Path(name).exists():
        return fetch_model(name)
    return Path(name)


def _expected(args: argparse.Namespace) -> dict[str, Any]:
    expected: dict[str, Any] = registry_size(args.model) if args.model else {}
    if args.num_classes is not None:
        expected["num_classes"] = args.num_classes
    if args.num_heads is not None:
        expected["num_heads"] = args.num_heads
    return expected


def _settle_image_size(args: argparse.Namespace, model: DiT, info: ModelInfo, factor: int) -> None:
    """See that the model makes images of --image-size, or, of a height and a width, that it does from now on."""
    if args.image_size is None:
        return
    if isinstance(args.image_size, tuple):
        unit = model.patch_size * factor
        if any(side < 1 or side % unit for side in args.image_size):
            near = "x".join(str(unit * max(1, round(side / unit))) for side in args.image_size)
            raise ConfigError(
                f"--image-size {'x'.join(map(str, args.image_size))} is not a multiple of {unit}, the pixels of a "
                f"patch: the nearest is {near}"
            )
        model.regrid((args.image_size[0] // factor, args.image_size[1] // factor))
        return
    made = tuple(side * factor for side in model.x_embedder.img_size)
    if made != (args.image_size, args.image_size):
        raise CheckpointError(
            f"{info.path} is of another configuration: it makes {made[0]}x{made[1]} images, "
            f"--image-size {args.image_size} expected; leave the option out, or save DiT.regrid's model of that size"
        )


def _labels(args: argparse.Namespace, num_classes: int, names: tuple[str, ...] | None) -> Labels:
    """The label of each sample; zeros for an unconditional model."""
    if not num_classes:
        if args.classes:
            raise ConfigError(f"--classes {' '.join(args.classes)}: the model is unconditional; leave it out")
        return Labels.in_turn(PER_CLASS if args.num is None else args.num, [0])
    requested = args.classes or (["random"] if args.npz else None)
    if requested == ["random"]:
        if args.num is None:
            raise ConfigError("--classes random: say how many images with --num")
        return Labels.random(args.num, args.seed, num_classes)
    classes = list(range(num_classes)) if requested == ["all"] else numbers_of(requested, num_classes, names)
    return Labels.in_turn(PER_CLASS * len(classes) if args.num is None else args.num, classes)


def numbers_of(requested: Sequence[str] | None, num_classes: int, names: tuple[str, ...] | None) -> list[int]:
    """Class numbers of what the user asked for: names, numbers, or either separated by commas."""
    if requested is None:
        if num_classes <= ALL_CLASSES:
            return list(range(num_classes))
        return [round(i * (num_classes - 1) / (SHOWN_CLASSES - 1)) for i in range(SHOWN_CLASSES)]
    by_name = _numbers_by_name(names or ())
    parts: list[str] = []
    for word in requested:
        parts += [word] if word in by_name else [part.strip() for part in word.split(",") if part.strip()]
    return [_class_number(part, num_classes, by_name) for part in parts]


def _numbers_by_name(names: Sequence[str]) -> dict[str, list[int]]:
    """Classes of each name, and of each part of names such as ImageNet's "tench, Tinca tinca"."""
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        for part in {name, *(part.strip() for part in name.split(","))}:
            numbers.setdefault(part, []).append(number)
    # A whole name is one class's, whatever other names it is a part of.
    return {**numbers, **{name: [number] for number, name in enumerate(names)}}


def _class_number(text: str, num_classes: int, by_name: dict[str, list[int]]) -> int:
    if text in by_name:
        if len(by_name[text]) > 1:
            raise ConfigError(
                f"--classes {text}: the name of classes {' and '.join(map(str, by_name[text]))}; give the number"
            )
        return by_name[text][0]
    try:
        number = int(text)
    except ValueError:
        near = difflib.get_close_matches(text, by_name, n=3, cutoff=0.4)
        known = f"; near it: {', '.join(near)}" if near else f"; give a number from 0 to {num_classes - 1}"
        raise ConfigError(f"--classes {text}: the checkpoint has no class of that name{known}") from None
    if not 0 <= number < num_classes:
        raise ConfigError(f"--classes {number}: the model has {num_classes} classes, 0 to {num_classes - 1}")
    return number


def _scorer(args: argparse.Namespace, model: DiT, info: ModelInfo, shape: tuple[int, int, int]) -> Scorer:
    """A scorer against real images of the samples' `shape` (C, H, W)."""
    if model.caption_dim:
        raise ConfigError(
            "--compare-to asks whether samples show their class, and the model is told captions: score it with "
            "dit-fast evaluate --ckpt"
        )
    source = args.compare_to
    if source == OWN_DATA:
        source = info.data.get("name")
        if source is None:
            raise ConfigError(f"{info.path} does not say what it was trained on: give --compare-to DATA")
    if shape[0] not in (1, 3):
        raise ConfigError(
            f"--compare-to scores grey or RGB images, not {shape}; leave it out or decode with --vae"
        )
    images = images_as_trained(source, info, shape[0], image_size=shape[1:])
    if images.num_classes != model.num_classes:
        raise ConfigError(
            f"--compare-to {source} has {images.num_classes} classes, the model {model.num_classes}"
        )
    return Scorer(images)


def images_as_trained(
    source: str,
    info: ModelInfo,
    channels: int,
    *,
    image_size: Size | None = None,
    buckets: tuple[Size, ...] = (),
    num_classes: int | None = None,
) -> ImageSet:
    """The images of `source` in one size, or in the nearest of several, with pixels made as for the model's training;
    those that it was trained on are split as they were then, or a line says not. num_classes: as of `open_images`.
    """
    own = source == info.data.get("name")
    facts = info.data.get("pixels")
    conversion = Conversion() if facts is None and not own else Conversion.of(facts)
    flip, holdout = (info.data.get("flip"), info.data.get("holdout")) if own else (None, None)
    images = open_images(
        relocate(source, info.working_directory, info.path) if own else source,
        image_size,
        channels=channels,
        num_classes=num_classes,
        flip=flip,
        holdout=holdout,
        buckets=buckets,
        conversion=conversion,
    )
    if own and images.fingerprint != info.data.get("fingerprint"):
        say(f"{source} has changed since this checkpoint was trained on it")
    return images
