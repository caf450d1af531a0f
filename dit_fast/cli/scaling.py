"""`dit-fast scaling`: how the loss of models of several sizes follows their compute."""

import argparse
import json
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path

from dit_fast.cli import train
from dit_fast.distributed.world import join_world
from dit_fast.errors import ConfigError, MissingExtraError, OutputError
from dit_fast.training.config import TrainConfig
from dit_fast.training.scaling_study import LADDER, Ladder, Rung, Study
from dit_fast.utils.files import write_atomically
from dit_fast.utils.options import Options, add_options, flag_of, given_options, option, read_options
from dit_fast.utils.terminal import say
from dit_fast.utils.values import TEXT, Number, Several

EPILOG = """Takes the options of dit-fast train, which apply to all models; --out is the folder (default: scaling).
Example, on the demo's data and recipe:
dit-fast scaling --preset demo --out study --budget 2e13"""
_OF_A_RUN = ("results_dir", "resume", "model", "hidden_size", "depth", "num_heads")
# Options of a preset, which is for one model, that the ladder sets itself.
_OF_A_PRESET = ("model", "hidden_size", "depth", "num_heads", "log_every")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LadderOptions(Options):
    sizes: tuple[str, ...] = option(
        tuple(LADDER),
        "Models to train: WIDTHxDEPTH, or sizes of the paper such as DiT-S/8",
        Several(TEXT),
        group="models",
        metavar="SIZE",
    )
    budget: float | None = option(
        None,
        "Training compute of all models together, instead of --steps",
        Number(0, 1e36, above=True),
        group="models",
        metavar="FLOP",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dit-fast train`, the sizes, and the training compute."""
    add_options(parser, LadderOptions)
    train.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train the models that are not trained yet, measure, and write STUDY/scaling.json and STUDY/scaling.png."""
    ladder_options = read_options(LadderOptions, args)
    sizes, budget, out = ladder_options.sizes, ladder_options.budget, Path(getattr(args, "out", "scaling"))
    if given := [flag_of(name) for name in _OF_A_RUN if name in vars(args)]:
        raise ConfigError(f"dit-fast scaling trains one model for each of --sizes: remove {', '.join(given)}")
    asked = given_options(TrainConfig, args)
    if budget is not None and asked.keys() & {"steps", "epochs"}:
        raise ConfigError(f"--budget {budget:g} sets the length: give neither --steps nor --epochs")
    options = {
        name: value
        for name, value in train.preset_options(args).items()
        if name in asked or name not in _OF_A_PRESET
    }
    if budget is not None or "epochs" in asked:
        options.pop("steps", None)
    elif "steps" not in options:
        raise ConfigError("the length is missing: give --budget FLOP, --steps N or --epochs N")
    with join_world(options.get("device", "auto")) as world:
        ladder = Ladder(options, [Rung.of(name) for name in sizes], out, budget)
        for number, (rung, counts) in enumerate(zip(ladder.rungs, ladder.counts, strict=True)):
            if world.is_first:
                say(
                    f"== {rung.name} ({number + 1} of {len(sizes)}): {counts.trained / 1e6:.3g} M parameters, "
                    f"{counts.macs / 1e9:.3g} GMAC an image, {ladder.steps} steps of {ladder.batch_size}",
                )
            result = ladder.train(number, world)
            if result is not None and result.stopped_by is not None and result.step < ladder.steps:
                if world.is_first:
                    say(
                        f"{result.stopped_by.name}: stopped and saved at step {result.step} of {ladder.steps}; the "
                        f"same command continues there, with --out {shlex.quote(str(out))}"
                    )
                return 128 + result.stopped_by
        study = world.first(lambda: ladder.study(world.device))
        if world.is_first:
            _write(study, out)
    return 0


def _write(study: Study, out: Path) -> None:
    say(*table(study).splitlines())
    try:
        text = json.dumps(study.as_json(), indent=1) + "\n"
        write_atomically(out / "scaling.json", lambda path: path.write_text(text))
        draw(study, out / "scaling.png")
    except MissingExtraError as error:
        logger.warning("%s", error)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write to {out}: {error}") from error
    say(f"wrote {out / 'scaling.json'} and {out / 'scaling.png'}")


def table(study: Study) -> str:
    """The models, a line each, and the two fits."""
    lines = [
        f"{'size':>10}  {'parameters':>11}  {'GMAC':>8}  {'training FLOP':>13}  {'train':>7}  {'metric':>7}"
    ]
    for model in study.models:
        flops = model.losses[-1][1]
        lines.append(
            f"{model.name:>10}  {model.counts.trained:>11,}  {model.counts.macs / 1e9:>8.3g}  {flops:>13.3g}  "
            f"{model.final_loss:>7.4f}  {model.metric:>7.4f}"
        )
    size, compute = study.over_model, study.over_compute
    lines += [
        f"metric: {study.metric}",
        f"metric over GMAC: correlation {size.correlation:+.3f} (of logarithms), metric ~ GMAC^{size.exponent:.3f}",
        f"smallest training loss over training FLOP: correlation {compute.correlation:+.3f}, "
        f"loss ~ FLOP^{compute.exponent:.3f}",
    ]
    return "\n".join(lines)


def draw(study: Study, target: Path) -> None:
    """The paper's three pictures, side by side, as PNG. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator
    except ImportError as error:
        raise MissingExtraError(
            "no plot: matplotlib is not installed; pip install 'dit-fast[plot]'"
        ) from error
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    over_steps, over_compute, over_model = figure.subplots(1, 3)
    colours = colormaps["viridis"]([index / len(study.models) for index in range(len(study.models))])
    for model, colour in zip(study.models, colours, strict=True):
        steps, flops, losses = zip(*model.losses, strict=True)
        over_steps.plot(steps, losses, color=colour, label=model.name)
        over_compute.plot(flops, losses, color=colour)
        over_model.plot(model.counts.macs / 1e9, model.metric, "o", color=colour, label=model.name)
    compute, size = study.over_compute, study.over_model
    frontier = [flops for flops, _ in study.frontier()]
    macs = sorted(model.counts.macs for model in study.models)
    over_compute.plot(
        frontier,
        [compute(flops) for flops in frontier],
        "k--",
        label=f"smallest ~ FLOP^{compute.exponent:.3f}",
    )
    over_model.plot(
        [value / 1e9 for value in macs],
        [size(value) for value in macs],
        "k--",
        label=f"~ GMAC^{size.exponent:.3f}",
    )
    over_steps.set(xlabel="optimiser step", ylabel="training loss, smoothed", title="loss over steps")
    over_compute.set(xlabel="training compute, FLOP", ylabel="training loss, smoothed", xscale="log")
    over_compute.set_title("loss over training compute")
    over_model.set(
        xlabel="forward pass, GMAC (the paper's Gflops)", ylabel="loss of the averaged weights", xscale="log"
    )
    over_model.set_title(f"metric over model size: correlation {size.correlation:+.3f}")
    over_model.set_xticks(
        [value / 1e9 for value in macs], [f"{value / 1e9:.2g}" for value in macs], minor=False
    )
    over_model.xaxis.set_minor_locator(NullLocator())
    for axes in (over_steps, over_compute, over_model):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    write_atomically(target, lambda path: figure.savefig(path, dpi=150, format="png"))
