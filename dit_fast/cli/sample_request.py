"""Loading and checking of a request to `dit-fast sample`, before anything is drawn."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.cli.labels import Labels, Prompts, choose_labels, open_prompts
from dit_fast.cli.sample_options import OWN_DATA, SampleOptions
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
from dit_fast.errors import CheckpointError, ConfigError, DataError, OutputError
from dit_fast.evaluation import Scorer
from dit_fast.interop import ModelInfo, load_model, registry_size
from dit_fast.interop.diffusers import conventions_of
from dit_fast.interop.guidance import default_guidance
from dit_fast.model.dit import DiT
from dit_fast.sampling import Guidance, Sampler, SamplerConfig, Step, default_solver, sampling_schedule
from dit_fast.sampling.schedule import VELOCITY_SOLVERS, NoiseSchedule
from dit_fast.sampling.shards import ARCHIVE, IMAGES, OUTPUTS, SCORES, SHARDS, SampleShards
from dit_fast.utils.files import prepare_folder
from dit_fast.utils.terminal import one_line, say


@dataclass(frozen=True)
class SampleRequest:
    """A loaded and checked request of `dit-fast sample`.

    Args:
        options: what was given.
        model: the model, on the device.
        info: what its checkpoint records.
        sampler: draws from the model.
        labels: class of each sample, or index of its caption among `prompts`.
        prompts: captions; None for a model without.
        names: names of the classes if known, or the captions.
        decoder: decodes latents; None for images, and for latents that are kept.
        scorer: scores samples for --compare-to.
        parts: shards on disk.
        start: images to encode, of --reverse.
        rank, world: rank of this process, and number of ranks.
    """

    options: SampleOptions
    model: DiT
    info: ModelInfo
    sampler: Sampler
    labels: Labels
    prompts: Prompts | None
    names: Sequence[str] | None
    decoder: LatentDecoder | None
    scorer: Scorer | None
    parts: SampleShards
    start: Tensor | None
    rank: int
    world: int

    def draw(
        self,
        numbers: Tensor,
        batch_size: int,
        on_step: Callable[[Step], None] | None = None,
        every: int = 1,
    ) -> Tensor:
        """Draw the samples with these numbers (M,), as the model outputs them: (M, C, H, W)."""
        return self.sampler(
            self.conditions(self.labels.of(numbers)),
            seed=self.options.seed,
            numbers=numbers,
            batch_size=batch_size,
            on_step=on_step,
            every=every,
            start=None if self.start is None else self.start[numbers],
        )

    def conditions(self, labels: Tensor) -> Tensor:
        """Conditioning of the model for `labels` (M,): the labels, or their captions (M, S, E)."""
        return labels if self.prompts is None else self.prompts.read(labels)

    def decode(self, samples: Tensor) -> Tensor:
        """Images float32 (M, 3, H, W) of latents (M, C, h, w), unscaled as in the training set of the model."""
        assert self.decoder is not None
        return self.decoder(samples, self.info.data.get("shift"), self.info.data.get("scale"))


def _refuse_other_results(options: SampleOptions) -> None:
    """Raise OutputError for results of an earlier command that this one would not replace, and seem to belong to it."""
    if options.save_images and options.out.is_dir():
        others = sorted(
            path.name for path in options.out.iterdir() if path.is_dir() and path.name not in OUTPUTS
        )
        classes = [name for name in others if _holds_an_image(options.out / name)]
        if classes:
            raise OutputError(
                f"--out {options.out} holds folders of images ({name_some(classes)}), and {IMAGES} would become one "
                "more class of them; choose another --out"
            )
    # Results beside shards are those of the interrupted command, which this one continues and which are written again.
    if (options.out / SHARDS).exists():
        return
    replaced = {ARCHIVE: options.npz, SCORES: options.compare_to is not None, IMAGES: False}
    left = [
        str(options.out / name)
        for name, again in replaced.items()
        if not again and (options.out / name).exists()
    ]
    if left:
        raise OutputError(
            f"{' and '.join(left)} of an earlier command {'is' if len(left) == 1 else 'are'} there already; remove "
            f"{'it' if len(left) == 1 else 'them'} or choose another --out"
        )


def _holds_an_image(folder: Path) -> bool:
    """Whether `folder` directly holds images other than grids of samples."""
    if folder.name.startswith("."):
        return False
    with contextlib.suppress(OSError):
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:8]
        headers, _ = read_each(paths, lambda path: read_header(path, Conversion()), 1)
        return any(header is not None and not header.grid for header in headers)
    return False


def load_request(options: SampleOptions) -> SampleRequest:
    """Load model, decoder and scorer, and check the request, cheapest checks first."""
    rank, world = ranks()
    if world > 1 and options.compare_to is not None:
        raise ConfigError(
            "--compare-to scores in one process: sample first, then score with dit-fast evaluate"
        )
    mode = options.mode or ("fast" if options.npz or world > 1 else "reference")
    device = _device(options.device, world)
    _refuse_other_results(options)
    start = None
    if options.reverse is not None:
        start = _encoded_images(options.reverse, options)
        options = replace(options, num=len(start), vae="none")

    model, info = load_model(
        _checkpoint(options),
        weights=options.weights,
        device=device,
        num_heads=options.num_heads,
        expected=_expected(options),
        objective=options.given_objective(),
        adapter=options.lora,
    )
    for note in info.notes:
        say(note)
    default = default_guidance(model, trained_here=info.step is not None)
    guidance = Guidance(
        default.scale if options.cfg_scale is None else options.cfg_scale,
        default.channels if options.cfg_channels is None else _guided_channels(options.cfg_channels),
        options.cfg_interval,
        options.cfg_schedule,
    )
    trained = info.vae and relocate(info.vae, info.working_directory, info.path)
    vae = options.vae or (trained or _published_vae(model) if info.latent else "none")
    if options.latent_stats is not None:
        info = _with_statistics(options.latent_stats, model, info, vae)
    solver = options.solver or default_solver(info.diffusion)
    schedule = sampling_schedule(
        info.diffusion,
        options.steps,
        solver,
        learn_sigma=model.learn_sigma,
        shift=options.shift,
        last_step=options.last_step,
        last_step_size=options.last_step_size,
        sample_eps=options.sample_eps,
        reverse=options.reverse is not None,
    )
    clip = options.clip_denoised
    if clip is None:
        clip = vae == "none" and not info.latent and solver not in VELOCITY_SOLVERS
    config = SamplerConfig(
        solver=solver,
        eta=options.eta,
        atol=options.atol,
        rtol=options.rtol,
        last_step=options.last_step,
        sde_method=options.sde_method,
        diffusion_norm=options.diffusion_norm,
        guidance=guidance,
        clip=clip,
        mode=mode,
        precision=options.precision,
        graph=options.graph,
        compile=options.compile,
    )
    sampler = Sampler(model, schedule, config)
    prompts = open_prompts(options, model, info, device)
    names: Sequence[str] | None = info.class_names if prompts is None else prompts.names
    labels = (
        choose_labels(options, model.num_classes, info.class_names) if prompts is None else prompts.labels
    )
    num = len(labels)
    first = labels.first(1)
    sampler.check(first if prompts is None else prompts.read(first), options.seed, options.batch_size)

    if vae != "none" and info.data.get("image_size") and not info.latent:
        raise ConfigError(f"--vae {vae}: {info.path} was trained on pixels, not on latents; leave it out")
    decoder = LatentDecoder(vae, model.in_channels, device) if vae != "none" else None
    if decoder is not None:
        check_autoencoder(vae, decoder, info.data, str(info.path))
    factor = 1 if decoder is None else decoder.factor
    _settle_image_size(options, model, info, LATENT_FACTOR if decoder is None and info.latent else factor)
    height, width = (side * factor for side in model.x_embedder.img_size)
    shape = (model.in_channels if vae == "none" else 3, height, width)
    scorer = _scorer(options, model, info, shape) if options.compare_to is not None else None
    if options.npz and shape[0] not in (1, 3):
        raise ConfigError(
            f"--npz holds images, these are {shape[0]} channels of latents: decode them with --vae"
        )
    # Uncompressed pixels of the shards, the archive and the single files, and of the grid (small images are enlarged).
    copies = 2 + options.npz + options.save_images
    prepare_folder(options.out, needed_bytes=3 * (num * height * width * copies + min(num, 4096) * 56 * 56))

    pixels = shape[0] in (1, 3) and start is None
    if start is not None and start.shape[1:] != shape:
        raise ConfigError(
            f"--reverse {options.reverse} holds {tuple(start.shape[1:])} per image, the model makes {shape}"
        )
    # Everything that determines a pixel: shards of another identity are not continued.
    identity = {
        "weights": weights_digest(model.state_dict()),
        "model": {**model.config, **asdict(conventions_of(model))},
        "noise_schedule": _noise_schedule_digest(schedule),
        "objective": info.diffusion,
        "solver": [
            solver,
            *(
                [config.last_step, config.sde_method, config.diffusion_norm]
                if solver.startswith("sde")
                else ()
            ),
            *([options.eta] if solver == "ddim" else ()),
            *(config.tolerances() if solver == "dopri5" else ()),
        ],
        "start": start is not None and hashlib.sha256(start.numpy().tobytes()).hexdigest(),
        "guidance": [
            guidance.scale,
            guidance.guided(model.in_channels),
            *guidance.interval,
            guidance.schedule,
        ],
        "clip_denoised": clip,
        "mode": mode,
        "precision": options.precision,
        "tf32": options.tf32,
        "seed": options.seed,
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
    parts = SampleShards(
        options.out, identity, num, options.batch_size, kept, "uint8" if pixels else "float32"
    )
    parts.open()
    return SampleRequest(
        options, model, info, sampler, labels, prompts, names, decoder, scorer, parts, start, rank, world
    )


def _encoded_images(path: Path, options: SampleOptions) -> Tensor:
    """Images or latents float32 (M, C, H, W) of --reverse."""
    for flag, given in (
        ("--npz", options.npz),
        ("--save-images", options.save_images),
        ("--compare-to", options.compare_to is not None),
        (f"--vae {options.vae}", options.vae not in (None, "none")),
    ):
        if given:
            raise ConfigError(f"{flag} is for images, and --reverse encodes them to noise: remove it")
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"--reverse {path}: cannot read it as a .npy file ({one_line(error)})") from error
    if not isinstance(values, np.ndarray) or values.ndim != 4 or values.dtype.kind != "f" or not values.size:
        found = getattr(values, "dtype", "an archive"), getattr(values, "shape", ())
        raise DataError(f"--reverse {path} holds {found[0]} {found[1]}, expected floats (M, C, H, W)")
    if not np.isfinite(values).all():
        raise DataError(f"--reverse {path} has NaN or infinite values")
    if options.num not in (None, len(values)):
        raise ConfigError(f"--num {options.num}: --reverse {path} holds {len(values)} images; remove --num")
    return torch.from_numpy(values.astype(np.float32))


def _noise_schedule_digest(schedule: NoiseSchedule) -> str:
    """SHA-256 of all values of the noise schedule that a solver reads."""
    facts = f"{schedule.prediction} {schedule.variance} {schedule.path} {schedule.end}"
    digest = hashlib.sha256(facts.encode())
    for values in (
        schedule.times,
        schedule.levels,
        schedule.alphas,
        schedule.sigmas,
    ):
        digest.update(values.tobytes())
    return digest.hexdigest()


def _published_vae(model: DiT) -> str:
    """Decoder for a weight file that does not record one."""
    if model.in_channels != SD_CHANNELS:
        raise ConfigError(
            f"--vae is missing: the model makes latents of {model.in_channels} channels; give the folder of their "
            "autoencoder, or none to write the latents"
        )
    return "mse"


def _with_statistics(path: Path, model: DiT, info: ModelInfo, vae: str) -> ModelInfo:
    """`info` with the shift and scale from --latent-stats."""
    if "shift" in info.data or vae == "none":
        reason = "records its own" if "shift" in info.data else "is not decoded, with --vae none"
        raise ConfigError(f"--latent-stats {path}: {info.path} {reason}; leave it out")
    mean, deviation = read_statistics(path, model.in_channels)
    return replace(info, data={**info.data, "shift": mean, "scale": [1 / value for value in deviation]})


def _guided_channels(text: str) -> int | None:
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


def _checkpoint(options: SampleOptions) -> Path:
    """--ckpt; or, as in the reference, the published weights of --model DiT-XL/2."""
    name = options.ckpt
    if name is None:
        size = options.image_size or 256
        if options.model != "DiT-XL/2" or size not in (256, 512):
            raise ConfigError(
                "--ckpt is missing: give a run folder or a weight file (only DiT-XL/2 at 256 or 512 has "
                "published weights, which --model DiT-XL/2 fetches)"
            )
        name = f"DiT-XL-2-{size}x{size}.pt"
    if name in pretrained_models and not Path(name).exists():
        return fetch_model(name)
    return Path(name)


def _expected(options: SampleOptions) -> dict[str, Any]:
    expected: dict[str, Any] = registry_size(options.model) if options.model else {}
    if options.num_classes is not None:
        expected["num_classes"] = options.num_classes
    if options.num_heads is not None:
        expected["num_heads"] = options.num_heads
    return expected


def _settle_image_size(options: SampleOptions, model: DiT, info: ModelInfo, factor: int) -> None:
    """Check that the model makes images of --image-size; given height and width, change the model to that size."""
    if options.image_size is None:
        return
    if isinstance(options.image_size, tuple):
        unit = model.patch_size * factor
        if any(side < 1 or side % unit for side in options.image_size):
            near = "x".join(str(unit * max(1, round(side / unit))) for side in options.image_size)
            raise ConfigError(
                f"--image-size {'x'.join(map(str, options.image_size))} is not a multiple of {unit}, the pixels of a "
                f"patch: the nearest is {near}"
            )
        model.regrid((options.image_size[0] // factor, options.image_size[1] // factor))
        return
    made = tuple(side * factor for side in model.x_embedder.img_size)
    if made != (options.image_size, options.image_size):
        raise CheckpointError(
            f"{info.path} has another configuration: it makes {made[0]}x{made[1]} images, "
            f"--image-size {options.image_size} expected; leave the option out, or save DiT.regrid's model of that size"
        )


def _scorer(options: SampleOptions, model: DiT, info: ModelInfo, shape: tuple[int, int, int]) -> Scorer:
    """A scorer against real images of the samples' `shape` (C, H, W)."""
    if model.caption_dim:
        raise ConfigError(
            "--compare-to scores whether samples show their class, and the model is conditioned on captions: score "
            "it with dit-fast evaluate --ckpt"
        )
    source: Any = options.compare_to
    if source == OWN_DATA:
        source = info.data.get("name")
        if source is None:
            raise ConfigError(f"{info.path} does not record its training data: give --compare-to DATA")
    if shape[0] not in (1, 3):
        raise ConfigError(
            f"--compare-to scores grayscale or RGB images, not {shape}; leave it out or decode with --vae"
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
    """Open real images to compare a model with.

    Args:
        source: data set. That of the training is split as it was then; a line is printed if it has changed.
        info: what the checkpoint records, such as the conversion of image files to pixels.
        channels: channels of the model's images.
        image_size: scale and crop all images to this (height, width).
        buckets: scale and crop each image to the nearest of these sizes.
        num_classes: as in `open_images`.
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
