"""What a run is about to do, in a few lines and one picture."""

from pathlib import Path

import torch

from dit_fast import __version__
from dit_fast.data.survey import describe_set, preview
from dit_fast.model.cost import count
from dit_fast.training.trainer import Trainer
from dit_fast.utils.files import write_atomically
from dit_fast.utils.images import save_grid
from dit_fast.utils.option_files import as_yaml
from dit_fast.utils.terminal import say

PREVIEW = "preview.png"
"""Picture of training images in a run folder."""
CONFIG = "config.yaml"
"""All options of a run in its folder, as `--config` reads them."""


def describe_run(trainer: Trainer, run: Path) -> list[str]:
    """Data, model, steps, device and folder of a run, in one line each."""
    config, data, model, world = trainer.config, trainer.data, trainer.model, trainer.world
    counts = count(model, data.caption_tokens, data.shapes)
    sizes = model.config
    passes = trainer.total_steps * config.batch_size / len(data.train)
    resumed = f"resumed at step {trainer.step}: " if trainer.step else ""
    device = f"{torch.get_num_threads()} threads of the CPU"
    if trainer.device.type == "cuda":
        device = torch.cuda.get_device_name(trainer.device)
    processes = f", {world.size} processes ({trainer.parallel})" if world.size > 1 else ""
    return [
        *describe_set(data),
        f"model: {sizes['depth']} {config.conditioning} blocks of width {sizes['hidden_size']}, patches of "
        f"{sizes['patch_size']}: {counts.parameters / 1e6:.1f} M parameters, {counts.macs / 1e9:.2f} G multiply-adds "
        "an image",
        f"training: {resumed}{trainer.total_steps} steps of {config.batch_size} images ({passes:.3g} passes over the "
        f"data), {config.objective}, learning rate {config.lr:g}",
        f"machine: {device}{processes}, {config.precision}{', compiled' if trainer.compiles else ''}",
        f"run: {run}, a checkpoint every {config.ckpt_every} steps, a log line every {config.log_every}",
    ]


def announce(trainer: Trainer, run: Path) -> None:
    """Print the description of a run and write its configuration; draw training images, unless that was done."""
    say(*describe_run(trainer, run))
    text = f"# dit-fast {__version__}: dit-fast train --config {CONFIG} --out ANOTHER trains the same model again.\n"
    text += as_yaml(trainer.config)
    write_atomically(run / CONFIG, lambda temporary: temporary.write_text(text, "utf-8"))
    picture = run / PREVIEW
    if not picture.exists():
        drawn = preview(trainer.data)
        write_atomically(picture, lambda temporary: save_grid(drawn, temporary))
        say(f"training images as the model receives them: {picture}")
