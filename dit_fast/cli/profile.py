"""`dit-fast profile`: a trace of chosen training steps, and which kernels take their time."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from dit_fast.cli import train
from dit_fast.errors import ConfigError, OutputError
from dit_fast.training import PRESETS, TrainConfig, Trainer
from dit_fast.training.config import apply_to_process, open_set
from dit_fast.training.prefetch import prefetch
from dit_fast.training.ranges import profiler_ranges

_OF_A_RUN = ("out", "results_dir", "resume")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dit-fast train`, and which of its steps are traced."""
    train.add_arguments(parser)
    parser.epilog = (
        "Takes the options of dit-fast train; writes no checkpoint. Open the trace at ui.perfetto.dev."
    )
    trace = parser.add_argument_group("trace")
    trace.add_argument("--trace", type=Path, default=Path("trace.json"), help="(default: trace.json)")
    trace.add_argument(
        "--first", type=int, default=10, metavar="N", help="steps before the traced ones (default: 10)"
    )
    trace.add_argument("--count", type=int, default=3, metavar="N", help="steps to trace (default: 3)")
    trace.add_argument("--top", type=int, default=20, metavar="N", help="kernels to print (default: 20)")


def run(args: argparse.Namespace) -> int:
    """Trace steps `first` to `first` + `count` of a run that is not kept."""
    options: dict[str, Any] = {
        name: value for name, value in vars(args).items() if name not in ("command", "run")
    }
    path, first, count, top = (options.pop(name) for name in ("trace", "first", "count", "top"))
    if given := [f"--{name.replace('_', '-')}" for name in _OF_A_RUN if options.pop(name, None) is not None]:
        raise ConfigError(f"dit-fast profile keeps no run: leave out {', '.join(given)}")
    for name, value, least in (("first", first, 0), ("count", count, 1), ("top", top, 1)):
        if value < least:
            raise ConfigError(f"--{name} {value}: give at least {least}")
    options = {**PRESETS.get(options.pop("preset", ""), {}), **options}
    if "data" not in options:
        raise ConfigError("--data is missing: name a built-in set (mnist, digits) or a folder of images")
    config = TrainConfig(**{**options, "epochs": None, "steps": first + count})
    apply_to_process(config)
    trainer = Trainer(config, open_set(config), ranges=profiler_ranges())
    print(trace_steps(trainer, first, count, path, top))
    print(f"{path}: {count} step{'s' if count > 1 else ''} after {first}")
    return 0


def trace_steps(trainer: Trainer, first: int, count: int, path: Path, top: int) -> str:
    """Write a Chrome trace of `count` steps after `first` others to `path`; returns a table of the `top` kernels.

    Raises OutputError where the trace cannot be written.
    """
    cuda = trainer.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    batches = prefetch(trainer.stream.read(0, first + count), trainer.device)
    for _ in range(first):
        trainer.train_step(*next(batches))
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(count):
            with trainer.ranges("data"):
                batch = next(batches)
            trainer.train_step(*batch)
        if cuda:
            torch.cuda.synchronize(trainer.device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    return kernel_table(profiler.key_averages(), cuda, count, top)


def kernel_table(events: Any, cuda: bool, steps: int, top: int) -> str:
    """The kernels (on a CPU: operators) that take most time themselves: ms a step, share of all, calls a step."""
    rows = []
    for event in events:
        if event.is_user_annotation or (cuda and event.device_type != DeviceType.CUDA):
            continue
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        rows.append((time / 1000 / steps, event.count / steps, event.key))
    total = sum(row[0] for row in rows) or 1.0
    lines = [f"{'ms a step':>10}  {'share':>6}  {'calls':>6}  kernel" if cuda else
             f"{'ms a step':>10}  {'share':>6}  {'calls':>6}  operator (of one CPU thread)"]  # fmt: skip
    for time, calls, name in sorted(rows, reverse=True)[:top]:
        lines.append(f"{time:10.3f}  {100 * time / total:5.1f}%  {calls:6.0f}  {name[:100]}")
    return "\n".join(lines)
