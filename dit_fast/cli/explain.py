"""`dit-fast explain`: pictures of how a model samples, and where it attends."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dit_fast.cli import sample
from dit_fast.cli.sample_plan import Plan, make_plan
from dit_fast.distributed.world import ranks
from dit_fast.errors import ConfigError
from dit_fast.sampling.explain import (
    attention_film,
    check_attention,
    film_strip,
    guidance_sweep,
    steps_sweep,
    thinned,
)
from dit_fast.sampling.guidance import SCALE
from dit_fast.utils.files import prepare_folder, write_atomically
from dit_fast.utils.images import save_grid, short_label
from dit_fast.utils.locks import FolderLock
from dit_fast.utils.terminal import say
from dit_fast.utils.values import Whole

_MOST_LABELS = 8
_MOST_LOOKED_AT = 4096
_EPILOG = """OUT/film.png       each image on its way from noise
OUT/guidance.png   the same noise under several guidance scales (not with --cfg-scale 1)
OUT/steps.png      the same noise with several numbers of steps
OUT/attention.png  what places --block and --head attend to, over the images on their way"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of dit-fast sample, of which those of its own files are not read, and the pictures' own."""
    sample.add_arguments(parser)
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    group = parser.add_argument_group(
        "pictures", f"Of one image a class or prompt, of the first {_MOST_LABELS}."
    )
    group.add_argument(
        "--frames", type=Whole(2, 1 << 12), default=10, help="points of a trajectory (default: 10)"
    )
    group.add_argument(
        "--scales",
        type=SCALE,
        nargs="+",
        default=(1.0, 1.5, 2.0, 4.0, 8.0),
        help="guidance scales to compare",
    )
    group.add_argument(
        "--step-counts",
        type=Whole(1, 1 << 20),
        nargs="+",
        help="numbers of steps to compare (default: all, 1/2, 1/5, 1/10)",
    )
    group.add_argument(
        "--block", type=Whole(0, 1 << 12), help="block of the attention maps (default: the middle one)"
    )
    group.add_argument("--head", type=Whole(0, 1 << 12), help="its head (default: the mean of all)")


def run(args: argparse.Namespace) -> int:
    """Draw the pictures; 0, or a DitFastError. All that can be refused is refused before sampling begins."""
    if ranks()[1] > 1:
        raise ConfigError("dit-fast explain runs in one process, not under torchrun")
    with tempfile.TemporaryDirectory(prefix="dit-fast-") as folder:
        # The plan keeps parts of many samples in its folder; here there are none, and those in OUT are another's.
        plan = make_plan(argparse.Namespace(**{**vars(args), "out": Path(folder)}))
    sampler, names = plan.sampler, plan.names
    shown = list(dict.fromkeys(plan.labels.first(_MOST_LOOKED_AT).tolist()))[:_MOST_LABELS]
    titles = [short_label(names[label]) if names else f"class {label}" for label in shown]
    labels = plan.told(torch.tensor(shown))
    steps = len(sampler.schedule)
    counts = args.step_counts or sorted({max(1, steps // part) for part in (1, 2, 5, 10)})
    if steps < 2:
        raise ConfigError(f"--steps {args.steps}: there is no way to show in one step; choose at least 2")
    for count in counts:
        thinned(sampler.schedule, count)
    for scale in args.scales:
        replace(sampler.config.guidance, scale=scale)
    block = len(plan.model.blocks) // 2 if args.block is None else args.block
    check_attention(plan.model, block, args.head)
    prepare_folder(args.out)
    with FolderLock(args.out, "explain"):  # the four are of one command

        def decode(states: Tensor) -> Tensor:
            return _shown(plan, states)

        film = film_strip(sampler, labels, titles, decode, args.seed, args.frames)
        _write(args.out / "film.png", film)
        if sampler.config.guidance.active:
            _write(args.out / "guidance.png", guidance_sweep(sampler, labels, args.scales, decode, args.seed))
        _write(args.out / "steps.png", steps_sweep(sampler, labels, counts, decode, args.seed))
        maps = attention_film(sampler, labels, titles, decode, block, args.head, args.seed, args.frames)
        _write(args.out / "attention.png", maps)
    return 0


def _shown(plan: Plan, states: Tensor) -> Tensor:
    """States as images in [-1, 1]: decoded, or their first three channels."""
    if plan.decoder is not None:
        return plan.decode(states)
    return states[:, : 1 if states.shape[1] < 3 else 3]


def _write(path: Path, picture: Image.Image) -> None:
    write_atomically(path, lambda temporary: save_grid(picture, temporary))
    say(f"wrote {path}")
