"""`dit-fast profile`: a trace of chosen training or sampling steps, and which ranges and kernels take their time."""

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import triton
from torch.autograd import DeviceType

from dit_fast.cli import train
from dit_fast.data import LatentSet
from dit_fast.distributed.world import choose_device
from dit_fast.errors import ConfigError, OutputError
from dit_fast.interop.guidance import default_guidance
from dit_fast.sampling import Sampler, SamplerConfig, default_solver, sampling_schedule
from dit_fast.sampling.config import SamplePrecision
from dit_fast.sampling.schedule import VELOCITY_SOLVERS
from dit_fast.training import TrainConfig, Trainer
from dit_fast.training.config import apply_to_process, build_model, open_set
from dit_fast.training.precision import choose_precision
from dit_fast.training.run import prefetch
from dit_fast.utils.nvtx import mark_blocks, profiler_ranges
from dit_fast.utils.options import Options, add_options, flag_of, option, read_options
from dit_fast.utils.terminal import say
from dit_fast.utils.values import PATH, Whole

EPILOG = "Takes the options of dit-fast train; writes no checkpoint. Open the trace at ui.perfetto.dev."
_OF_A_RUN = ("out", "results_dir", "resume")
Steps = Callable[[Callable[[], None]], None]
"""steps(after): makes all steps and calls `after` behind each."""


@dataclass(frozen=True)
class TraceOptions(Options):
    trace: Path = option(Path("trace.json"), "Chrome trace to write", PATH, group="trace", metavar="JSON")
    first: int = option(10, "Steps before the traced ones", Whole(0), group="trace", metavar="N")
    count: int = option(3, "Steps to trace", Whole(1, 1 << 20), group="trace", metavar="N")
    top: int = option(20, "Kernels to print", Whole(1, 1 << 20), group="trace", metavar="N")
    sample: bool = option(
        False,
        "Trace sampling steps (DDPM, guidance scale 4) of a batch with untrained weights instead of training steps",
        group="trace",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dit-fast train`, and the steps to trace."""
    add_options(parser, TraceOptions)
    train.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trace steps `first` to `first` + `count` of a run that is not kept, or of a sampling trajectory."""
    options = read_options(TraceOptions, args)
    if given := [flag_of(name) for name in _OF_A_RUN if name in vars(args)]:
        raise ConfigError(f"dit-fast profile keeps no run: remove {', '.join(given)}")
    length = {"epochs": None, "steps": options.first + options.count}
    config = TrainConfig(**{**train.preset_options(args), **length})
    if config.init_from is not None:
        raise ConfigError("--init-from changes no time: leave it out")
    apply_to_process(config)
    device = choose_device(config.device)
    steps = (sampling_steps if options.sample else training_steps)(config, device)
    tables = trace_steps(steps, device, options.first, options.count, options.trace, options.top)
    kind = f"{'sampling ' if options.sample else ''}step{'s' if options.count > 1 else ''}"
    say(*tables.splitlines(), f"{options.trace}: {options.count} {kind} after {options.first}")
    return 0


def training_steps(config: TrainConfig, device: torch.device) -> Steps:
    """The steps of a new run."""
    trainer = Trainer(config, open_set(config), ranges=profiler_ranges())

    def steps(after: Callable[[], None]) -> None:
        batches = prefetch(trainer.stream.read(0, trainer.total_steps), trainer.device)
        for _ in range(trainer.total_steps):
            with trainer.ranges("step"):
                with trainer.ranges("data"):
                    batch = next(batches)
                trainer.train_step(*batch)
            after()

    return steps


def sampling_steps(config: TrainConfig, device: torch.device) -> Steps:
    """The steps of one trajectory of `batch_size` samples, by a model of new weights."""
    data = open_set(config)
    model = build_model(config, data).to(device).eval()
    if not config.compile:  # Compiled, a step's evaluation is one graph, in which no range can stand.
        mark_blocks(model.blocks, profiler_ranges())
    low: dict[str, SamplePrecision] = {"fp16": "fp16", "bf16": "bf16"}
    objective = config.objective_arguments()
    solver = default_solver(objective)
    sampler = Sampler(
        model,
        sampling_schedule(objective, config.steps, solver, learn_sigma=bool(config.learn_sigma)),
        SamplerConfig(
            solver=solver,
            guidance=default_guidance(model, trained_here=True),
            clip=not isinstance(data, LatentSet) and solver not in VELOCITY_SOLVERS,
            precision=low.get(choose_precision(config.precision, device)),
            graph="auto" if config.cuda_graph else "never",
            compile=config.compile,
        ),
    )
    numbers = torch.arange(config.batch_size)
    conditions = numbers % max(model.num_classes, 1)
    if model.caption_dim:
        conditions = data.train.conditioning(numbers % len(data.train))

    def steps(after: Callable[[], None]) -> None:
        sampler(conditions, batch_size=len(conditions), on_step=lambda step: after())

    return steps


def trace_steps(steps: Steps, device: torch.device, first: int, count: int, path: Path, top: int) -> str:
    """Write a Chrome trace of `count` steps after `first` others to `path`; returns tables of ranges and of kernels.

    Raises OutputError where the trace cannot be written.
    """
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=max(first - 1, 0), warmup=min(first, 1), active=count, repeat=1)
    done = 0
    with (
        torch.profiler.profile(activities=activities, schedule=schedule) as profiler,
        LaunchBytes() as launched,
    ):

        def after() -> None:
            nonlocal done
            done += 1
            # The device is behind the host: what it has yet to do belongs to the steps before.
            if cuda and done in (first, first + count):
                torch.cuda.synchronize(device)
            profiler.step()

        steps(after)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    events = profiler.key_averages()
    return range_table(events, cuda, count) + "\n\n" + kernel_table(events, cuda, count, top, launched)


class LaunchBytes:
    """While active, notes what each launch of a Triton kernel of ours moves: every tensor of its arguments once."""

    def __init__(self) -> None:
        self.launches: defaultdict[str, int] = defaultdict(int)
        self.bytes: defaultdict[str, int] = defaultdict(int)

    def __call__(self, metadata: Any) -> None:
        found = metadata.get()
        if "bytes" in found:
            name = found["name"].partition("[")[0]
            self.launches[name] += 1
            self.bytes[name] += found["bytes"]

    def of(self, kernel: str) -> float | None:
        """Mean bytes of a launch of the kernel that a trace calls `kernel`; None for a kernel of others.

        Of all launches, not of the traced ones alone: a CUDA graph's were made when it was captured.
        """
        name = kernel.strip("_").removesuffix("_kernel")
        return self.bytes[name] / self.launches[name] if name in self.launches else None

    def __enter__(self) -> "LaunchBytes":
        triton.knobs.runtime.launch_enter_hook.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        triton.knobs.runtime.launch_enter_hook.remove(self)


def range_table(events: Sequence[Any], cuda: bool, steps: int) -> str:
    """The ranges of a step, of the device's time or of a CPU's: ms and calls a step; blocks together."""
    times: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        on_device = event.device_type == DeviceType.CUDA
        # PyTorch's own: ProfilerStep*, Optimizer.step#AdamWEma.step.
        if event.is_user_annotation and on_device == cuda and event.key.isidentifier():
            name = "block_*" if event.key.startswith("block_") else event.key
            times[name][0] += (event.device_time_total if cuda else event.cpu_time_total) / 1000 / steps
            times[name][1] += event.count / steps
    lines = [f"{'ms a step':>10}  {'calls':>6}  range"]
    for name, (time, calls) in sorted(times.items(), key=lambda item: -item[1][0]):
        lines.append(f"{time:10.3f}  {calls:6.0f}  {name}")
    return "\n".join(lines)


def kernel_table(events: Sequence[Any], cuda: bool, steps: int, top: int, launched: LaunchBytes) -> str:
    """The kernels (on a CPU: operators) that take most time themselves: ms, share and calls a step, achieved GB/s.

    GB/s are the bytes of a launch's tensors over the device's time, of the Triton kernels; of others no one knows what
    they move, and a CPU's operators have no times of their own device.
    """
    rows = []
    for event in events:
        if event.is_user_annotation or (cuda and event.device_type != DeviceType.CUDA):
            continue
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        rows.append((time / 1000 / steps, event.count / steps, event.key))
    total = sum(row[0] for row in rows) or 1.0
    kind = "kernel" if cuda else "operator of one CPU thread (GB/s: on CUDA only)"
    lines = [f"{'ms a step':>10}  {'share':>6}  {'calls':>6}  {'GB/s':>6}  {kind}"]
    for time, calls, name in sorted(rows, reverse=True)[:top]:
        moved = launched.of(name) if cuda else None
        speed = "-" if moved is None or not time else f"{moved * calls / time / 1e6:.0f}"
        lines.append(f"{time:10.3f}  {100 * time / total:5.1f}%  {calls:6.0f}  {speed:>6}  {name[:100]}")
    return "\n".join(lines)
