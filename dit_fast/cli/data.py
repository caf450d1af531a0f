"""`dit-fast data`: what is in a folder of images, and what deserves a look before training on it."""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

from dit_fast.data import Conversion, holds_latents, open_data
from dit_fast.data.base import DataSet
from dit_fast.data.survey import describe_set, preview, survey_folder
from dit_fast.errors import ConfigError
from dit_fast.training.config import TrainConfig
from dit_fast.utils.files import check_output, write_atomically
from dit_fast.utils.images import save_grid
from dit_fast.utils.options import REQUIRED, Options, add_options, option, read_options, same_option
from dit_fast.utils.terminal import say
from dit_fast.utils.values import SOURCE

EPILOG = """Reported are unreadable files, copies of one image, transparency, splits such as train/ and val/, and
classes of very different size. Nothing is changed.
Example: dit-fast data photos --image-size 64 --preview photos.png"""


@dataclass(frozen=True)
class DataOptions(Options):
    source: str = option(
        REQUIRED,
        "Folder of images, or whatever else dit-fast train --data reads",
        SOURCE,
        metavar="SOURCE",
        positional=True,
    )
    json: bool = option(False, "Print JSON, which names every file, instead of text", group="output")
    preview: str | None = option(
        None,
        "Draw 64 training images as the model receives them, to this PNG",
        SOURCE,
        group="output",
        metavar="FILE",
    )
    image_size: int | None = same_option(TrainConfig, "image_size", group="images")
    channels: int | None = same_option(TrainConfig, "channels", group="images")
    num_classes: int | None = same_option(TrainConfig, "num_classes", group="images")
    background: str = same_option(TrainConfig, "background", group="images")
    raw_pixels: bool = same_option(TrainConfig, "raw_pixels", group="images")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, DataOptions)


def run(args: argparse.Namespace) -> int:
    """Print the report; with --preview, draw the picture."""
    options = read_options(DataOptions, args)
    picture = options.preview and Path(options.preview)
    if picture:
        if picture.suffix.lower() != ".png":
            raise ConfigError(f"--preview {picture}: give a name that ends in .png")
        check_output(picture)
    conversion = Conversion(options.background, options.raw_pixels)
    folder = Path(options.source)
    survey = None
    if folder.is_dir() and not holds_latents(folder):
        survey = survey_folder(folder, conversion, os.cpu_count() or 1)
    data: DataSet | None = None
    if survey is not None:
        facts, lines = survey.as_json(), survey.lines()
    else:
        data = open_data(
            options.source, options.image_size, channels=options.channels, num_classes=options.num_classes
        )
        facts, lines = data.describe(), describe_set(data)
    say(*(json.dumps(facts, indent=2).splitlines() if options.json else lines))
    if picture:
        flat = survey is not None and not survey.classes
        drawn = preview(
            data
            or open_data(
                options.source,
                options.image_size,
                channels=options.channels,
                num_classes=0 if flat else options.num_classes,
                conversion=conversion,
                skip_unreadable=len(survey.failures) if survey is not None else 0,
            )
        )
        write_atomically(picture, lambda temporary: save_grid(drawn, temporary))
        say(f"wrote {picture}", error=options.json)
    return 0
