"""`dit-fast train`: start a run, or resume one."""

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_fast.distributed.world import World, join_world
from dit_fast.errors import ConfigError
from dit_fast.training.config import TrainConfig
from dit_fast.training.presets import PRESETS
from dit_fast.training.run import TrainResult, device_of, resume, train_or_resume
from dit_fast.utils.option_files import read_option_files
from dit_fast.utils.options import Options, add_options, flag_of, given_options, option, read_options
from dit_fast.utils.terminal import say
from dit_fast.utils.values import PATH, SOURCE, OneOf, Several

EPILOG = """The flags of the reference (--data-path, --results-dir, --global-batch-size, --global-seed) are accepted.
Example: dit-fast train --data photos --image-size 64 --model DiT-S/4 --out runs/photos"""


_GROUPS = ("run", "model", "data", "objective", "recipe", "start", "machine", "checkpoints", "logging")


@dataclass(frozen=True)
class RunOptions(Options):
    """Options of `dit-fast train` besides those of `TrainConfig`."""

    out: str | None = option(
        None,
        "Folder of the new run",
        SOURCE,
        group="run",
        metavar="RUN",
        default_text="results/NNN-MODEL",
    )
    results_dir: str | None = option(
        None,
        "Parent of numbered run folders, instead of --out",
        SOURCE,
        group="run",
        metavar="FOLDER",
        default_text="results",
    )
    resume: str | None = option(
        None,
        "Continue the run in this folder from its newest checkpoint",
        SOURCE,
        group="run",
        metavar="RUN",
    )
    preset: str | None = option(
        None,
        "Defaults for this run; options that are given replace them",
        OneOf(tuple(PRESETS)),
        group="run",
    )
    config: tuple[Path, ...] = option(
        (),
        "YAML files with options of this run by their names; they replace those of --preset, flags replace theirs",
        Several(PATH),
        group="run",
        metavar="FILE",
        default_text="none",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # --data is checked later: a preset or the resumed run may have it.
    add_options(parser, RunOptions)
    add_options(parser, TrainConfig, _GROUPS, required=False)


def preset_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `TrainConfig` from --preset, replaced by those of --config, and these by those that were given.

    Raises ConfigError without data.
    """
    named = PRESETS.get(getattr(args, "preset", ""), {})
    files = read_option_files(getattr(args, "config", ()), TrainConfig)
    options = {**named, **files, **given_options(TrainConfig, args)}
    if "data" not in options:
        raise ConfigError("--data is missing: name a built-in set (mnist, digits) or a folder of images")
    return options


def run(args: argparse.Namespace) -> int:
    """Train; status 0 at the end of the run, 130 when Ctrl-C and 143 when SIGTERM ended it early."""
    place = read_options(RunOptions, args)
    if place.resume is not None:
        if others := [flag_of(name) for name in given_options(RunOptions, args) if name != "resume"]:
            raise ConfigError(f"--resume continues a run in its folder: remove {', '.join(others)}")
        changes = given_options(TrainConfig, args)
        with join_world(changes.get("device") or device_of(place.resume)) as world:
            return _conclude(resume(place.resume, changes, world), world)
    config = TrainConfig(**preset_options(args))
    with join_world(config.device) as world:
        folder = world.first(
            lambda: _run_folder(place.out, place.results_dir, config.model, world.attempt > 0)
        )
        return _conclude(train_or_resume(config, folder, world), world)


def _run_folder(out: str | None, results: str | None, model: str, again: bool) -> Path:
    """Folder of the run; with `again`, the folder that an earlier attempt of this run made."""
    if out is not None and results is not None:
        raise ConfigError(f"--out {out} and --results-dir {results} both set the run folder: give one")
    if out is not None:
        return Path(out)
    parent = Path(results or "results")
    taken = [int(match[1]) for path in parent.glob("*") if (match := re.match(r"(\d{3,})-", path.name))]
    number = max(taken, default=-1) + (0 if again and taken else 1)
    return parent / f"{number:03d}-{model.replace('/', '-')}"


def _conclude(result: TrainResult, world: World) -> int:
    if result.was_finished:
        if world.is_first:
            say(
                f"{result.run} is finished already: step {result.step} of {result.total_steps}, checkpoint "
                f"{result.checkpoint}; give more --steps to continue"
            )
        return 0
    log = result.run / "log.jsonl"
    files = [f"checkpoint {result.checkpoint}"]
    files += [f"log {log}"] if log.exists() else []
    files += [] if result.curve is None else [f"loss curve {result.curve}"]
    lines = [", ".join(files)]
    if result.unreadable:
        lost = "; ".join(f"{name} ({reason})" for name, reason in sorted(result.unreadable.items()))
        lines.append(f"left out, because they could not be read: {len(result.unreadable)} files: {lost}")
    status = 0
    if result.stopped_by is not None and result.step < result.total_steps:
        status = 128 + result.stopped_by
        lines.append(
            f"{result.stopped_by.name}: stopped and saved at step {result.step} of {result.total_steps}; "
            f"continue with: dit-fast train --resume {shlex.quote(str(result.run))}"
        )
    if world.is_first:
        say(*lines)
    return status
