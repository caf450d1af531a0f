"""`dit-fast explain`: pictures of how a model samples, and where it attends."""

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dit_fast.cli.sample_options import SampleOptions
from dit_fast.cli.sample_request import SampleRequest, load_request
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
from dit_fast.utils.options import Options, add_options, option, read_options
from dit_fast.utils.terminal import say
from dit_fast.utils.values import Several, Whole

_MAX_SHOWN = 8
_MAX_SEARCHED = 4096
"""Samples among whose labels the first distinct ones are looked for."""
EPILOG = """OUT/film.png       each image on its way from noise
OUT/guidance.png   the same noise under several guidance scales (not with --cfg-scale 1)
OUT/steps.png      the same noise with several numbers of steps
OUT/attention.png  where --block and --head attend, over the images on their way"""


@dataclass(frozen=True)
class ExplainOptions(Options):
    """Options of the pictures. One image per class or prompt is shown, of the first ones."""

    frames: int = option(10, "States of a trajectory to show", Whole(2, 1 << 12), group="pictures")
    scales: tuple[float, ...] = option(
        (1.0, 1.5, 2.0, 4.0, 8.0), "Guidance scales to compare", Several(SCALE), group="pictures"
    )
    step_counts: tuple[int, ...] = option(
        (),
        "Numbers of steps to compare",
        Several(Whole(1, 1 << 20)),
        group="pictures",
        default_text="all, 1/2, 1/5 and 1/10 of the steps",
    )
    block: int | None = option(
        None,
        "Block of the attention maps",
        Whole(0, 1 << 12),
        group="pictures",
        default_text="the middle one",
    )
    head: int | None = option(
        None,
        "Attention head of the maps",
        Whole(0, 1 << 12),
        group="pictures",
        default_text="the mean of all",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the pictures, and of dit-fast sample, whose other output options have no effect."""
    add_options(parser, ExplainOptions)
    add_options(parser, SampleOptions)


def run(args: argparse.Namespace) -> int:
    """Draw the pictures. Everything that can be refused is refused before sampling begins."""
    options, sampling = read_options(ExplainOptions, args), read_options(SampleOptions, args)
    if ranks()[1] > 1:
        raise ConfigError("dit-fast explain runs in one process, not under torchrun")
    with tempfile.TemporaryDirectory(prefix="dit-fast-") as folder:
        # A request opens the shards in its folder; there are none here, and those in OUT belong to another command.
        request = load_request(replace(sampling, out=Path(folder)))
    sampler, names = request.sampler, request.names
    shown = list(dict.fromkeys(request.labels.first(_MAX_SEARCHED).tolist()))[:_MAX_SHOWN]
    titles = [short_label(names[label]) if names else f"class {label}" for label in shown]
    labels = request.conditions(torch.tensor(shown))
    steps = len(sampler.schedule)
    counts = options.step_counts or sorted({max(1, steps // divisor) for divisor in (1, 2, 5, 10)})
    if steps < 2:
        raise ConfigError(f"--steps {sampling.steps}: one step has no trajectory to show; choose at least 2")
    for count in counts:
        thinned(sampler.schedule, count)
    for scale in options.scales:
        replace(sampler.config.guidance, scale=scale)
    block = len(request.model.blocks) // 2 if options.block is None else options.block
    check_attention(request.model, block, options.head)
    prepare_folder(sampling.out)
    with FolderLock(sampling.out, "explain"):  # so that the four files come from one command

        def decode(states: Tensor) -> Tensor:
            return _shown(request, states)

        film = film_strip(sampler, labels, titles, decode, sampling.seed, options.frames)
        _write(sampling.out / "film.png", film)
        if sampler.config.guidance.active:
            _write(
                sampling.out / "guidance.png",
                guidance_sweep(sampler, labels, options.scales, decode, sampling.seed),
            )
        _write(sampling.out / "steps.png", steps_sweep(sampler, labels, counts, decode, sampling.seed))
        maps = attention_film(
            sampler, labels, titles, decode, block, options.head, sampling.seed, options.frames
        )
        _write(sampling.out / "attention.png", maps)
    return 0


def _shown(request: SampleRequest, states: Tensor) -> Tensor:
    """States as images in [-1, 1]: decoded, or their first three channels."""
    if request.decoder is not None:
        return request.decode(states)
    return states[:, : 1 if states.shape[1] < 3 else 3]


def _write(path: Path, picture: Image.Image) -> None:
    write_atomically(path, lambda temporary: save_grid(picture, temporary))
    say(f"wrote {path}")
