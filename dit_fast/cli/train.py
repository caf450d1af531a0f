"""`dit-fast train`: a new run, or the continuation of one."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from dit_fast.distributed.world import World, join_world
from dit_fast.errors import ConfigError
from dit_fast.training.config import CHOICES, RANGES, TrainConfig
from dit_fast.training.presets import PRESETS
from dit_fast.training.run import TrainResult, device_of, resume, train_or_resume
from dit_fast.utils.terminal import say
from dit_fast.utils.values import SOURCE

_EPILOG = """The reference's flags --data-path, --results-dir, --global-batch-size and --global-seed work too.
Example: dit-fast train --data photos --image-size 64 --model DiT-S/4 --out runs/photos"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of `TrainConfig`, and where the run goes."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    # A flag that is not given leaves no trace, so that a preset or a resumed run can fill it in.
    parser.argument_default = argparse.SUPPRESS

    place = parser.add_argument_group("where")
    place.add_argument(
        "--data",
        "--data-path",
        type=RANGES["data"],
        metavar="SOURCE",
        help="mnist, digits, a folder of class sub-folders, or latents (dit-fast encode)",
    )
    place.add_argument(
        "--out", type=SOURCE, metavar="RUN", help="folder of the new run (default: results/NNN-MODEL)"
    )
    place.add_argument("--results-dir", type=SOURCE, metavar="FOLDER", help="parent of numbered run folders")
    place.add_argument(
        "--resume",
        type=SOURCE,
        metavar="RUN",
        help="continue the run in this folder from its newest checkpoint",
    )
    place.add_argument(
        "--preset", choices=sorted(PRESETS), help="start from these options; flags given here win"
    )

    add_model_options(parser.add_argument_group("model"))
    add_data_options(parser.add_argument_group("data"))
    add_recipe_options(parser.add_argument_group("recipe"))
    add_objective_options(parser.add_argument_group("objective"))
    add_machine_options(parser.add_argument_group("machine"))
    add_watch_options(parser.add_argument_group("watching"))


def add_model_options(model: argparse._ArgumentGroup) -> None:
    """The model; `dit-fast info` takes them too."""
    model.add_argument(
        "--model",
        type=RANGES["model"],
        metavar="NAME",
        help="size and patch, e.g. DiT-XL/2 (default: DiT-S/2)",
    )
    model.add_argument(
        "--hidden-size", type=RANGES["hidden_size"], metavar="D", help="width instead of the model's"
    )
    model.add_argument(
        "--depth", type=RANGES["depth"], metavar="N", help="number of blocks instead of the model's"
    )
    model.add_argument(
        "--num-heads", type=RANGES["num_heads"], metavar="N", help="attention heads instead of the model's"
    )
    model.add_argument(
        "--patch-size", type=RANGES["patch_size"], metavar="P", help="patch side instead of the model's"
    )
    model.add_argument(
        "--mlp-ratio", type=RANGES["mlp_ratio"], metavar="R", help="hidden width of the MLP over the width"
    )
    _choice(model, "--conditioning", "how blocks learn of timestep and class (default: adaln_zero)")
    _choice(model, "--positions", "sines, a learned table, rotary, or sines and rotary (default: sincos)")
    _choice(model, "--norm", "layer norm or RMSNorm (default: layernorm)")
    _choice(model, "--mlp", "GELU or SwiGLU (default: gelu)")
    _switch(model, "--qk-norm", "RMSNorm of each head's queries and keys (default: off)")
    model.add_argument(
        "--num-classes",
        type=RANGES["num_classes"],
        metavar="N",
        help="checked against the data; 0: the model is told no class, and images need no sub-folders",
    )
    _switch(model, "--learn-sigma", "learn the variance with the hybrid loss (default: on)")


def add_data_options(data: argparse._ArgumentGroup) -> None:
    """How the data are read."""
    data.add_argument(
        "--vae",
        type=RANGES["vae"],
        metavar="NAME",
        help="make latents of the images as they are read: ema, mse, or a folder with a diffusers AutoencoderKL",
    )
    data.add_argument(
        "--image-size", type=RANGES["image_size"], metavar="S", help="images are scaled and cropped to S x S"
    )
    data.add_argument(
        "--buckets",
        type=RANGES["buckets"],
        metavar="SIZES",
        help="shapes of images of many aspect ratios, HEIGHTxWIDTH,...: each has the nearest, a batch is of one",
    )
    data.add_argument(
        "--channels", type=RANGES["channels"], metavar="C", help="1 grey, 3 RGB (default: as the files are)"
    )
    data.add_argument(
        "--holdout", type=RANGES["holdout"], metavar="F", help="share of each class that is never trained on"
    )
    add_conversion_options(data)
    data.add_argument(
        "--skip-unreadable",
        type=RANGES["skip_unreadable"],
        metavar="N",
        help="go on without up to N files that cannot be read (default: 0, the first ends the run, saved)",
    )
    _switch(data, "--flip", "mirror half of the images (default: folders yes, digits no)")
    data.add_argument(
        "--num-workers",
        type=RANGES["num_workers"],
        metavar="N",
        help="threads that decode images (default: one a core)",
    )


def add_conversion_options(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """How image files become pixels, see `dit_fast.data.Conversion`."""
    group.add_argument(
        "--background",
        type=RANGES["background"],
        metavar="COLOUR",
        help="what transparent images lie on, a name or #rrggbb (default: white)",
    )
    group.add_argument(
        "--raw-pixels",
        action="store_true",
        help="ignore transparency and EXIF orientation, as the reference does",
    )


def add_recipe_options(recipe: argparse._ArgumentGroup) -> None:
    """Length, optimiser, loss and draws."""
    recipe.add_argument(
        "--steps", type=RANGES["steps"], metavar="N", help="optimiser steps (default: 400000)"
    )
    recipe.add_argument(
        "--epochs", type=RANGES["epochs"], metavar="N", help="passes over the images, instead of --steps"
    )
    recipe.add_argument(
        "--batch-size",
        "--global-batch-size",
        type=RANGES["batch_size"],
        metavar="B",
        help="images a step (default: 256)",
    )
    recipe.add_argument("--lr", type=RANGES["lr"], help="learning rate of AdamW (default: 1e-4)")
    _choice(recipe, "--lr-schedule", "constant, or half a cosine to 0 at the last step (default: constant)")
    recipe.add_argument(
        "--warmup-steps",
        type=RANGES["warmup_steps"],
        metavar="N",
        help="steps of linear warm-up (default: 0)",
    )
    recipe.add_argument("--beta1", type=RANGES["beta1"], help="AdamW's first decay (default: 0.9)")
    recipe.add_argument("--beta2", type=RANGES["beta2"], help="AdamW's second decay (default: 0.999)")
    recipe.add_argument(
        "--weight-decay", type=RANGES["weight_decay"], help="AdamW's weight decay (default: 0)"
    )
    recipe.add_argument(
        "--max-grad-norm",
        type=RANGES["max_grad_norm"],
        metavar="N",
        help="clip the gradients' norm to N (default: not clipped)",
    )
    recipe.add_argument(
        "--skip-nonfinite",
        type=RANGES["skip_nonfinite"],
        metavar="N",
        help="leave out up to N steps whose loss or gradient is not finite (default: 0, the first ends the run)",
    )
    recipe.add_argument(
        "--ema-decay", type=RANGES["ema_decay"], help="decay of the averaged weights (default: 0.9999)"
    )
    recipe.add_argument(
        "--ema-snapshot-every",
        type=RANGES["ema_snapshot_every"],
        metavar="N",
        help="keep snapshots of two more averages, for --weights ema:WIDTH of dit-fast sample (default: none)",
    )
    recipe.add_argument(
        "--class-dropout-prob",
        type=RANGES["class_dropout_prob"],
        metavar="P",
        help="share of labels dropped (default: 0.1)",
    )
    recipe.add_argument(
        "--noise-schedule",
        type=RANGES["noise_schedule"],
        metavar="NAME",
        help="linear or squaredcos_cap_v2 (default: linear)",
    )
    recipe.add_argument(
        "--diffusion-steps", type=RANGES["diffusion_steps"], metavar="T", help="noise levels (default: 1000)"
    )
    recipe.add_argument(
        "--seed", "--global-seed", type=RANGES["seed"], help="of initial weights and all draws (default: 0)"
    )


def add_objective_options(objective: argparse._ArgumentGroup) -> None:
    """What the model is trained to predict, and how that is weighed."""
    _choice(objective, "--objective", "diffusion in discrete steps, or flow matching (default: diffusion)")
    _choice(
        objective,
        "--prediction",
        "what the model answers (default: epsilon of diffusion, velocity of flow)",
    )
    objective.add_argument(
        "--predict-xstart",
        dest="prediction",
        action="store_const",
        const="x0",
        help="the reference's spelling of --prediction x0",
    )
    _choice(objective, "--path", "between noise and data, of flow (default: linear)")
    _choice(
        objective,
        "--loss-weighting",
        "min-snr of diffusion; velocity or likelihood of flow's other predictions (default: none)",
    )
    objective.add_argument(
        "--min-snr-gamma",
        type=RANGES["min_snr_gamma"],
        metavar="G",
        help="of --loss-weighting min-snr (default: 5)",
    )
    _switch(objective, "--direction-loss", "also the angle to the velocity, of flow (default: off)")
    _choice(objective, "--timestep-sampling", "uniform, by recent losses, or logit-normal (default: uniform)")
    _switch(
        objective,
        "--learned-range",
        "a learned variance is a place between its bounds; with no-, its logarithm (default: on)",
    )
    _switch(
        objective, "--sigma-small", "the posterior's variance, where none is learned (default: off, beta's)"
    )
    _switch(objective, "--use-kl", "train on the variational bound alone (default: off)")


def add_machine_options(machine: argparse._ArgumentGroup) -> None:
    """How it is computed, and what is kept."""
    _choice(machine, "--device", "(default: auto)")
    _choice(
        machine,
        "--precision",
        "of the model's arithmetic; weights stay float32 (default: auto, bf16 where CUDA has it, else fp32)",
    )
    _choice(machine, "--residual", "dtype of the residual stream; bf16 with bf16 or fp8 (default: fp32)")
    machine.add_argument(
        "--accumulate",
        type=RANGES["accumulate"],
        metavar="K",
        help="micro-batches that a batch is cut into (default: 1)",
    )
    _choice(
        machine,
        "--recompute",
        "made again in the backward pass: norm outputs and GELU, or blocks (default: cheap)",
    )
    _choice(machine, "--attention", "(default: auto)")
    _choice(machine, "--mlp-epilogue", "who applies the GELU where the kernels run (default: auto)")
    _choice(machine, "--kernels", "auto is Triton on CUDA, PyTorch elsewhere (default: auto)")
    _choice(
        machine, "--optimizer", "AdamW and averaging: in one pass, PyTorch's fused, apex's (default: ours)"
    )
    _switch(machine, "--compile", "compile each block with torch.compile (default: off)")
    _switch(machine, "--cuda-graph", "replay the whole step as one CUDA graph (default: off)")
    _choice(
        machine,
        "--parallel",
        "how the ranks of torchrun share the model (default: auto, fsdp for several)",
    )
    machine.add_argument(
        "--timeout",
        type=RANGES["timeout"],
        metavar="S",
        help="seconds to wait for a rank that hangs (default: 600)",
    )
    machine.add_argument("--threads", type=RANGES["threads"], metavar="N", help="CPU threads of PyTorch")
    machine.add_argument(
        "--ckpt-every",
        type=RANGES["ckpt_every"],
        metavar="N",
        help="steps between checkpoints (default: 5000)",
    )
    machine.add_argument(
        "--keep-checkpoints",
        type=RANGES["keep_checkpoints"],
        metavar="N",
        help="newest checkpoints to keep, 0 for all (default: 2)",
    )

    machine.add_argument(
        "--milestone-every",
        type=RANGES["milestone_every"],
        metavar="N",
        help="also keep the steps that N divides (default: none)",
    )
    _switch(machine, "--async-checkpoint", "write checkpoints beside the training (default: on)")
    _switch(
        machine,
        "--stop-on-save-failure",
        "end the run when a checkpoint cannot be written (default: off, go on to the next one)",
    )


def add_watch_options(watch: argparse._ArgumentGroup) -> None:
    """What the run says about itself."""
    watch.add_argument(
        "--log-every", type=RANGES["log_every"], metavar="N", help="steps between log lines (default: 100)"
    )
    watch.add_argument(
        "--sample-every",
        type=RANGES["sample_every"],
        metavar="N",
        help="steps between grids of samples (default: none)",
    )
    watch.add_argument(
        "--sample-steps",
        type=RANGES["sample_steps"],
        metavar="N",
        help="noise levels of all sampling (default: 50)",
    )
    watch.add_argument(
        "--evaluate-every",
        type=RANGES["evaluate_every"],
        metavar="N",
        help="steps between Frechet distances (FID) of samples of the averaged weights (default: none)",
    )
    watch.add_argument(
        "--evaluate-samples",
        type=RANGES["evaluate_samples"],
        metavar="K",
        help="samples for each (default: 1000)",
    )
    watch.add_argument(
        "--evaluate-against",
        type=RANGES["evaluate_against"],
        metavar="REFERENCE",
        help="as dit-fast evaluate --against: a folder, an .npz of images or statistics (default: the --data)",
    )
    _choice(watch, "--evaluate-features", "efficientnet and classifier are proxies (default: inception)")
    watch.add_argument(
        "--evaluate-weights", type=RANGES["evaluate_weights"], metavar="PATH", help="weight file of inception"
    )
    _switch(watch, "--tensorboard", "also log to RUN/tensorboard (default: off)")
    _switch(watch, "--wandb", "also log to Weights & Biases (default: off)")
    _switch(watch, "--nvtx", "NVTX ranges around the parts of a step, for nsys and ncu (default: off)")


def run(args: argparse.Namespace) -> int:
    """Train; status 0 at the end of the run, 130 when Ctrl-C and 143 when SIGTERM ended it early."""
    asked = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    place = {name: asked.pop(name, None) for name in ("out", "results_dir", "resume", "preset")}
    if place["resume"] is not None:
        if others := [
            f"--{name.replace('_', '-')}" for name, value in place.items() if value and name != "resume"
        ]:
            raise ConfigError(f"--resume continues a run where it is: leave out {', '.join(others)}")
        with join_world(asked.get("device") or device_of(place["resume"])) as world:
            return _conclude(resume(place["resume"], asked, world), world)
    options: dict[str, Any] = {**PRESETS.get(place["preset"] or "", {}), **asked}
    if "data" not in options:
        raise ConfigError("--data is missing: name a built-in set (mnist, digits) or a folder of images")
    config = TrainConfig(**options)
    with join_world(config.device) as world:
        folder = world.first(
            lambda: _run_folder(place["out"], place["results_dir"], config.model, world.attempt > 0)
        )
        return _conclude(train_or_resume(config, folder, world), world)


def _choice(group: argparse._ArgumentGroup, flag: str, text: str) -> None:
    group.add_argument(flag, choices=CHOICES[flag.removeprefix("--").replace("-", "_")], help=text)


def _switch(group: argparse._ArgumentGroup, flag: str, text: str) -> None:
    group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)


def _run_folder(out: str | None, results: str | None, model: str, again: bool) -> Path:
    """Where the run goes; `again`: where the one goes that is there already."""
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
                f"{result.checkpoint}; give more --steps to go on"
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
