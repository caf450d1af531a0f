"""The options of `dit-fast sample`, those of the reference's sample.py and sample_ddp.py among them."""

import argparse
from pathlib import Path
from typing import Any

from dit_fast.diffusion.objective import OBJECTIVES
from dit_fast.diffusion.paths import PATHS, PREDICTIONS
from dit_fast.download import pretrained_models
from dit_fast.sampling import MODES, PRECISIONS, SOLVERS
from dit_fast.sampling.config import BATCH_SIZE, ETA
from dit_fast.sampling.guidance import LEVEL, SCALE, SCHEDULES
from dit_fast.sampling.schedule import SHIFT
from dit_fast.sampling.solvers import LAST_STEPS
from dit_fast.utils.values import PATH, SEED, SIDE, SOURCE, TEXT, Pair, Pattern, Whole

OWN_DATA = "(the checkpoint's own data)"
# All classes of a small set are shown; of ImageNet's thousand, this many evenly spaced ones.
CFG_SCALE = 4.0
"""Guidance of a model that has a null class."""
ALL_CLASSES = 20
SHOWN_CLASSES = 8
PER_CLASS = 8


RESPACING = Pattern(
    r"(ddim)?\d{1,7}|\d{1,7}(,\d{1,7})*",
    "a number, of diffusion also numbers with commas, or ddim and a number",
)
"""Steps of sampling, as `dit_fast.sampling.sampling_schedule` takes them."""


class ImageSize(Pair):
    """The side that "256" says, or the sides of "192x320"."""

    def accept(self, value: Any) -> Any:
        sides = super().accept(value)
        return sides if len(value) == 2 else sides[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options."""
    _model_options(parser.add_argument_group("which model"))
    _drawing_options(parser.add_argument_group("what to draw"))
    _machine_options(parser.add_argument_group("on what"))
    _output_options(parser.add_argument_group("what to write"))


def _model_options(group: argparse._ArgumentGroup) -> None:
    published = ", ".join(sorted(pretrained_models))
    group.add_argument(
        "--ckpt",
        type=SOURCE,
        help="run folder, step folder, save_pretrained folder, folder of diffusers, .safetensors or .pt file, id of "
        f"the Hugging Face hub (organization/name or organisation/name@revision), or a published name ({published})",
    )
    group.add_argument(
        "--weights",
        type=TEXT,
        default="ema",
        metavar="SET",
        help="ema, model, or ema:WIDTH, an average of any width of a run with --ema-snapshot-every (default: ema)",
    )
    group.add_argument(
        "--model", type=TEXT, help="registry name, e.g. DiT-XL/2; the checkpoint must be of it"
    )
    group.add_argument(
        "--image-size",
        type=ImageSize(SIDE),
        metavar="SIZE",
        help="side of the images, which the checkpoint must be of; or HEIGHTxWIDTH, whatever it is of",
    )
    group.add_argument(
        "--num-classes", type=Whole(0, 1 << 24), help="number of classes; the checkpoint must have as many"
    )
    group.add_argument(
        "--num-heads", type=Whole(1, 1 << 12), help="attention heads, where the checkpoint does not tell"
    )
    add_objective_options(group)
    group.add_argument(
        "--vae",
        type=SOURCE,
        help="decoder of a latent model: ema, mse, a folder, or none (default: the checkpoint's own, else mse)",
    )
    group.add_argument(
        "--latent-stats",
        type=PATH,
        metavar="FILE",
        help="LightningDiT's latents_stats.pt: mean and deviation of each channel that its latents were normalised by "
        "(default: the checkpoint's own, else the autoencoder's)",
    )


def add_objective_options(group: argparse._ActionsContainer) -> None:
    """What the model of a bare weight file was trained to predict; `asked_objective` reads it."""
    group.add_argument(
        "--objective", choices=OBJECTIVES, help="of a checkpoint that does not tell (default: diffusion)"
    )
    group.add_argument(
        "--prediction",
        choices=PREDICTIONS,
        help="of such a checkpoint (default: epsilon of diffusion, velocity of flow)",
    )
    group.add_argument("--path", choices=tuple(PATHS), help="of such a checkpoint, of flow (default: linear)")


def asked_objective(args: argparse.Namespace) -> dict[str, str]:
    """What of it was given, as `load_model` takes it."""
    asked = {name: getattr(args, name) for name in ("objective", "prediction", "path")}
    return {name: value for name, value in asked.items() if value is not None}


def _drawing_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num",
        "--num-samples",
        "--num-fid-samples",
        dest="num",
        type=Whole(1),
        help=f"number of images (default: {PER_CLASS} of each class); torchrun takes --num for its own --numa-binding, "
        "so write --num-samples there",
    )
    group.add_argument(
        "--classes",
        type=TEXT,
        nargs="+",
        metavar="CLASS",
        help="class numbers or names in turn; all; or random, as for FID (default: all, of more than "
        f"{ALL_CLASSES} classes {SHOWN_CLASSES} evenly spaced ones; with --npz random)",
    )
    group.add_argument(
        "--prompt",
        type=TEXT,
        nargs="+",
        metavar="TEXT",
        help="captions, of a model that was trained on them, in turn (with --npz default: random ones of its training)",
    )
    group.add_argument(
        "--text-encoder",
        type=SOURCE,
        metavar="NAME",
        help="what encodes them, as of dit-fast encode (default: what encoded the training's captions)",
    )
    group.add_argument(
        "--cfg-scale",
        type=SCALE,
        help="guidance scale; 1 is none (default: 4.0, or 1 of a model that is always told its class, or never)",
    )
    group.add_argument(
        "--cfg-channels",
        type=Pattern(r"all|[1-9]\d{0,5}", "a positive number, or all"),
        help="noise channels that are guided: a number, or all (default: 3; of diffusers' models all)",
    )
    group.add_argument(
        "--cfg-interval",
        type=LEVEL,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=(0.0, 1.0),
        help="noise levels between which there is guidance, 0 data, 1 noise; outside, one branch is run",
    )
    group.add_argument(
        "--cfg-schedule",
        choices=tuple(SCHEDULES),
        default="constant",
        help="how the scale rises towards data",
    )
    group.add_argument(
        "--steps",
        "--num-sampling-steps",
        dest="steps",
        type=RESPACING,
        help="sampling steps, or of diffusion a respacing such as ddim50 or 10,20,30 (default: 250, or all if fewer)",
    )
    group.add_argument(
        "--shift",
        type=SHIFT,
        default=1.0,
        help="of flow: above 1, more of the steps near noise (default: 1); LightningDiT's timestep_shift is 1 over it",
    )
    group.add_argument(
        "--solver", choices=SOLVERS, help="(default: ddpm of a diffusion model, euler of flow matching)"
    )
    group.add_argument(
        "--last-step",
        choices=LAST_STEPS,
        default="mean",
        help="of the sde solvers: without noise, along the flow, to the predicted image, or left out (default: mean)",
    )
    group.add_argument(
        "--eta", type=ETA, default=0.0, help="share of fresh noise with --solver ddim (default: 0)"
    )
    group.add_argument(
        "--mode",
        choices=MODES,
        help="reference: the reference's draws for a seed, which depend on the batch (the default); fast: each image's "
        "own draws (with --npz or several ranks)",
    )
    group.add_argument(
        "--clip-denoised",
        action=argparse.BooleanOptionalAction,
        help="clamp the predicted image at each step (default: yes in pixel space)",
    )
    group.add_argument("--seed", "--global-seed", dest="seed", type=SEED, default=0)


def _machine_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch-size",
        "--per-proc-batch-size",
        dest="batch_size",
        type=BATCH_SIZE,
        default=64,
        help="images at a time (default: 64)",
    )
    group.add_argument(
        "--device",
        type=Pattern(r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:NUMBER"),
        default="auto",
        help="cpu, cuda, cuda:1, ... (default: cuda if there is one)",
    )
    group.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="fp32",
        help="of weights; fp8: of the blocks' weights and tokens too, the rest bf16 (default: fp32)",
    )
    group.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="TF32 products on CUDA (default: yes)",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile each step's evaluation")
    group.add_argument("--no-graph", action="store_true", help="no CUDA graph")


def _output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        "--sample-dir",
        dest="out",
        type=PATH,
        default=Path("samples"),
        help="folder for sample.png (default: samples); killed, the same command goes on there",
    )
    group.add_argument(
        "--columns",
        type=Whole(1, 1 << 12),
        default=10,
        help="most images of one class in the grid (default: 10)",
    )
    group.add_argument("--save-images", action="store_true", help="also write each image to OUT/images")
    group.add_argument(
        "--npz", action="store_true", help="also write OUT/samples.npz, as ADM's evaluator reads it"
    )
    group.add_argument("--gif", action="store_true", help="also write OUT/trajectory.gif of the first images")
    group.add_argument(
        "--compare-to",
        type=SOURCE,
        nargs="?",
        const=OWN_DATA,
        metavar="DATA",
        help="score the samples against the real images DATA (default: those that it was trained on)",
    )
