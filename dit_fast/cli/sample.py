"""`dit-fast sample`: draw images from a checkpoint, lay them out in a labelled grid, and score them."""

import argparse
import difflib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.data import open_images, to_pixels
from dit_fast.diffusion import GaussianDiffusion, create_diffusion
from dit_fast.download import fetch_model, pretrained_models
from dit_fast.errors import CheckpointError, ConfigError, OutputError
from dit_fast.evaluation import Scorer
from dit_fast.interop import ModelInfo, load_model, registry_size
from dit_fast.interop.vae import LATENT_FACTOR, LatentDecoder
from dit_fast.models import DiT
from dit_fast.sampling import MODES, SOLVERS, check_request, draw_grid, sample, to_pil, to_uint8
from dit_fast.sampling.output import prepare_folder, write_atomically

_OWN_DATA = "(the checkpoint's own data)"
# All classes of a small set are shown; of ImageNet's thousand, this many evenly spaced ones.
_ALL_CLASSES = 20
_SHOWN_CLASSES = 8
_PER_CLASS = 8
_STEPS = 250
_MOST_ROWS = 20
_DIFFUSION_OPTIONS = ("noise_schedule", "sigma_small", "predict_xstart", "diffusion_steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dit-fast sample`, the reference's sample.py options among them."""
    what = parser.add_argument_group("which model")
    published = ", ".join(sorted(pretrained_models))
    what.add_argument(
        "--ckpt",
        help="run folder, step folder, save_pretrained folder, .safetensors or .pt file, or a published name "
        f"({published})",
    )
    what.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="which weights, where there are both"
    )
    what.add_argument("--model", help="registry name, e.g. DiT-XL/2; the checkpoint must be of it")
    what.add_argument("--image-size", type=int, help="side of the images; the checkpoint must be of it")
    what.add_argument("--num-classes", type=int, help="number of classes; the checkpoint must have as many")
    what.add_argument("--num-heads", type=int, help="attention heads, where the checkpoint does not tell")
    what.add_argument("--vae", help="decoder of a latent model: ema, mse (the default), a folder, or none")

    how = parser.add_argument_group("what to draw")
    how.add_argument("--num", type=int, help=f"number of images (default: {_PER_CLASS} of each class)")
    how.add_argument("--classes", nargs="+", metavar="CLASS", help="class numbers or names (default: all, or "
                     f"{_SHOWN_CLASSES} evenly spaced of more than {_ALL_CLASSES})")  # fmt: skip
    how.add_argument("--cfg-scale", type=float, default=4.0, help="guidance scale; 1 is none (default: 4.0)")
    how.add_argument(
        "--cfg-channels", default="3", help="noise channels that are guided: a number, or all (default: 3)"
    )
    how.add_argument(
        "--steps",
        "--num-sampling-steps",
        dest="steps",
        help="sampling steps, or a respacing such as ddim50 or 10,20,30 (default: 250, or all if fewer)",
    )
    how.add_argument("--solver", choices=SOLVERS, default="ddpm")
    how.add_argument(
        "--eta", type=float, default=0.0, help="share of fresh noise with --solver ddim (default: 0)"
    )
    how.add_argument(
        "--mode",
        choices=MODES,
        default="reference",
        help="reference: the reference's draws for a seed; fast: none for the half that is thrown away",
    )
    how.add_argument(
        "--clip-denoised",
        action=argparse.BooleanOptionalAction,
        help="clamp the predicted image at each step (default: yes in pixel space)",
    )
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    how.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)"
    )

    out = parser.add_argument_group("what to write")
    out.add_argument(
        "--out", type=Path, default=Path("samples"), help="folder for sample.png (default: samples)"
    )
    out.add_argument(
        "--columns", type=int, default=10, help="most images of one class in the grid (default: 10)"
    )
    out.add_argument("--save-images", action="store_true", help="also write each image to OUT/images")
    out.add_argument(
        "--compare-to",
        nargs="?",
        const=_OWN_DATA,
        metavar="DATA",
        help="score the samples against the real images DATA (default: those that it was trained on)",
    )


@dataclass(frozen=True)
class _Plan:
    """A request that is known to be possible."""

    model: DiT
    info: ModelInfo
    diffusion: GaussianDiffusion
    labels: Tensor
    cfg_channels: int | None
    clip_denoised: bool
    decoder: LatentDecoder | None
    scorer: Scorer | None


def run(args: argparse.Namespace) -> int:
    """Run the command; 0, or a DitFastError. All that can be refused is refused before sampling begins."""
    plan = _plan(args)
    print(
        f"{plan.info.summary()}; {len(plan.labels)} images, "
        f"{plan.diffusion.num_timesteps} {args.solver} steps, "
        f"guidance {args.cfg_scale:g}, seed {args.seed}, on {plan.model.pos_embed.device}",
        flush=True,
    )

    started = time.perf_counter()
    samples = sample(
        plan.model,
        plan.diffusion,
        plan.labels,
        cfg_scale=args.cfg_scale,
        cfg_channels=plan.cfg_channels,
        solver=args.solver,
        eta=args.eta,
        clip_denoised=plan.clip_denoised,
        seed=args.seed,
        batch_size=args.batch_size,
        mode=args.mode,
    )
    seconds = time.perf_counter() - started
    print(
        f"drew {len(samples)} images in {seconds:.1f} s ({len(samples) / seconds:.2f} images/s)", flush=True
    )

    if plan.decoder is not None:
        samples = plan.decoder(samples)
    elif samples.shape[1] not in (1, 3):
        path = args.out / "latents.npy"
        latents = samples.numpy()
        write_atomically(path, lambda temporary: np.save(temporary, latents))
        print(
            f"wrote {path}: {samples.shape[1]} channels, not decoded; the grid shows the first three of them"
        )
        samples = samples[:, :3]
    images = to_uint8(samples)
    _write_pictures(args, images, plan.labels, plan.info)
    if plan.scorer is not None:
        _score(args, plan, plan.scorer, images)
    return 0


def _plan(args: argparse.Namespace) -> _Plan:
    """Load all that is needed and check it, cheapest first."""
    if args.num is not None and args.num < 1:
        raise ConfigError(f"--num {args.num}: ask for at least one image")
    if args.columns < 1:
        raise ConfigError(f"--columns {args.columns}: choose at least 1")
    cfg_channels = _guided_channels(args.cfg_channels)
    device = _device(args.device)
    if args.save_images and (args.out / "images").exists():
        raise OutputError(f"{args.out / 'images'} is there already; remove it or choose another --out")
    prepare_folder(args.out)

    model, info = load_model(
        _checkpoint(args),
        weights=args.weights,
        device=device,
        num_heads=args.num_heads,
        expected=_expected(args),
    )
    for note in info.notes:
        print(note, flush=True)
    vae = args.vae or ("mse" if info.latent else "none")
    _check_image_size(args, model, info, encoded=vae != "none" or info.latent)

    classes = _classes(args.classes, model.y_embedder.num_classes, info.class_names)
    num = _PER_CLASS * len(classes) if args.num is None else args.num
    labels = torch.tensor([classes[i % len(classes)] for i in range(num)])
    check_request(
        model, labels, args.cfg_scale, cfg_channels, args.solver, args.eta, args.seed, args.batch_size
    )
    options = {key: info.diffusion[key] for key in _DIFFUSION_OPTIONS if key in info.diffusion}
    steps = args.steps or str(min(_STEPS, options.get("diffusion_steps", _STEPS)))
    diffusion = create_diffusion(steps, learn_sigma=model.learn_sigma, **options)

    factor = 1 if vae == "none" else LATENT_FACTOR
    height, width = (side * factor for side in model.x_embedder.img_size)
    # Uncompressed pixels of the grid (small images are enlarged) and of the single files.
    prepare_folder(args.out, needed_bytes=3 * num * (height * width * 2 + 56 * 56))
    shape = (model.in_channels if vae == "none" else 3, height, width)
    scorer = _scorer(args, model, info, shape) if args.compare_to is not None else None
    decoder = LatentDecoder(vae, model.in_channels, device) if vae != "none" else None
    clip = args.clip_denoised if args.clip_denoised is not None else vae == "none" and not info.latent
    return _Plan(model, info, diffusion, labels, cfg_channels, clip, decoder, scorer)


def _guided_channels(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"--cfg-channels {text}: give a positive number, or all")
    return int(text)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no such kind of device; give auto, cpu or cuda") from error
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


def _check_image_size(args: argparse.Namespace, model: DiT, info: ModelInfo, encoded: bool) -> None:
    if args.image_size is None:
        return
    made = tuple(side * (LATENT_FACTOR if encoded else 1) for side in model.x_embedder.img_size)
    if made != (args.image_size, args.image_size):
        raise CheckpointError(
            f"{info.path} is of another configuration: it makes {made[0]}x{made[1]} images, "
            f"--image-size {args.image_size} expected"
        )


def _classes(requested: Sequence[str] | None, num_classes: int, names: tuple[str, ...] | None) -> list[int]:
    """Class numbers of what the user asked for: names, numbers, or either separated by commas."""
    if requested is None:
        if num_classes <= _ALL_CLASSES:
            return list(range(num_classes))
        return [round(i * (num_classes - 1) / (_SHOWN_CLASSES - 1)) for i in range(_SHOWN_CLASSES)]
    by_name = {name: number for number, name in enumerate(names or ())}
    parts: list[str] = []
    for word in requested:
        parts += [word] if word in by_name else [part.strip() for part in word.split(",") if part.strip()]
    return [_class_number(part, num_classes, by_name) for part in parts]


def _class_number(text: str, num_classes: int, by_name: dict[str, int]) -> int:
    if text in by_name:
        return by_name[text]
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
    source = args.compare_to
    if source == _OWN_DATA:
        source = info.data.get("name")
        if source is None:
            raise ConfigError(f"{info.path} does not say what it was trained on: give --compare-to DATA")
    if shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise ConfigError(
            f"--compare-to scores square grey or RGB images, not {shape}; leave it out or decode with --vae"
        )
    own = source == info.data.get("name")
    flip, holdout = (info.data.get("flip"), info.data.get("holdout")) if own else (None, None)
    images = open_images(source, shape[1], channels=shape[0], flip=flip, holdout=holdout)
    if images.num_classes != model.y_embedder.num_classes:
        raise ConfigError(
            f"--compare-to {source} has {images.num_classes} classes, "
            f"the model {model.y_embedder.num_classes}"
        )
    if own and images.fingerprint != info.data.get("fingerprint"):
        print(f"{source} has changed since this checkpoint was trained on it", flush=True)
    return Scorer(images)


def _write_pictures(args: argparse.Namespace, images: np.ndarray, labels: Tensor, info: ModelInfo) -> None:
    """OUT/sample.png and, if asked for, OUT/images/NNNNNN-classC.png."""
    rows: list[tuple[str, np.ndarray]] = []
    classes = list(dict.fromkeys(labels.tolist()))
    for number in classes:
        name = info.class_names[number] if info.class_names else f"class {number}"
        drawn = images[(labels == number).numpy()]
        if len(classes) > 1:
            rows.append((name, drawn[: args.columns]))
        else:
            parts = range(0, min(len(drawn), _MOST_ROWS * args.columns), args.columns)
            rows += [("" if first else name, drawn[first : first + args.columns]) for first in parts]
    path = args.out / "sample.png"
    picture = draw_grid(rows)
    write_atomically(path, picture.save)
    shown = sum(len(tiles) for _, tiles in rows)
    print(
        f"wrote {path} ({shown} of {len(images)} images)" if shown < len(images) else f"wrote {path}",
        flush=True,
    )
    if args.save_images:
        folder = args.out / "images"
        partial = Path(tempfile.mkdtemp(prefix=".tmp-images-", dir=args.out))
        try:
            for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                write_atomically(partial / f"{number:06d}-class{label}.png", to_pil(image).save)
            partial.chmod(0o755)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        print(f"wrote {len(images)} images to {folder}", flush=True)


def _score(args: argparse.Namespace, plan: _Plan, scorer: Scorer, images: np.ndarray) -> None:
    """Print the scores and write OUT/scores.json. The samples are scored as they were written, in 256
    levels.
    """
    pixels = to_pixels(torch.from_numpy(images).permute(0, 3, 1, 2))
    scores = scorer(pixels, plan.labels)
    for line in scores.lines():
        print(line, flush=True)
    request = {
        "checkpoint": str(plan.info.path),
        "weights": plan.info.weights,
        "step": plan.info.step,
        "cfg_scale": args.cfg_scale,
        "steps": plan.diffusion.num_timesteps,
        "solver": args.solver,
        "seed": args.seed,
    }
    path = args.out / "scores.json"
    text = json.dumps({**request, **scores.as_json()}, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(f"wrote {path}", flush=True)
