"""Climbing: every rung of a case is built, compared with the plain model, timed in turn with the others, and a row."""

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.analysis.roofline import Rates, Step, sampling_limit, training_limit
from benchmarks.clock import ceiling, now
from benchmarks.models.ladder.rungs import Case, Climber, Rung
from benchmarks.models.ladder.sampling import Sampling
from benchmarks.models.ladder.training import Training
from benchmarks.models.plain_dit import random_model
from benchmarks.ops.rows import Row
from dit_fast.kernels import tuned
from dit_fast.models import DiT, DiT_models
from dit_fast.training.log import peak_flops

WHOLE_SAMPLING = 250
"""Steps of the sampling that images a second are given for."""

Say = Callable[[str], None]
Keep = Callable[[Row], None]


@dataclass
class Found:
    """What the visits of one rung have found so far."""

    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    launches: float | None = None
    failed: str | None = None


def climb(
    case: Case,
    rungs: Sequence[Rung],
    repeats: int,
    steps: int,
    say: Say,
    keep: Keep,
    known: Mapping[Any, Row],
) -> list[Row]:
    """A row for each rung; `keep` is given each as soon as it has changed.

    Every rung is timed 2 x `repeats` times. Where all fit the device together, a round is one time of each; training
    steps on a GPU do not, and are timed upwards and downwards again. A rung has a row from its first time on: what is
    killed leaves the times until then. `steps`: of a sampled trajectory. `known`: rows of before by key; a rung that
    has its figures there is left out. `repeats` 0: every rung is only built, so that all its compilers have run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = {rung.name: row_of(case, rung.on(device, case.bf16), Found(failed="not begun")) for rung in rungs}
    rows |= {name: known[row.key] for name, row in rows.items() if _is_whole(known.get(row.key), repeats)}
    missing = [rung for rung in rungs if rows[rung.name].failed is not None or repeats == 0]
    if not missing:
        say(f"{case}: known from before")
        return list(rows.values())

    def found(rung: Rung) -> None:
        add(rung)
        row = rows[rung.name]
        said = f"{1e3 * row.median:.1f} ms" if row.median else row.failed
        say(f"{rung.name}: {'built' if repeats == 0 and not kept[rung.name].failed else said}")

    def add(rung: Rung) -> None:
        rows[rung.name] = row = row_of(case, rung.on(device, case.bf16), kept[rung.name], model, device)
        if repeats > 0:
            keep(row)

    kept = {rung.name: Found() for rung in missing}
    model: DiT | None = None
    with tempfile.TemporaryDirectory(prefix="ladder-") as folder:
        try:
            model, work = prepare(case, device, steps, Path(folder))
        # Of whatever kind: a failure is a row, and the other cases go on.
        except Exception as error:
            for rung in missing:
                kept[rung.name].failed = reason(error)
                found(rung)
            return list(rows.values())
        for rung in missing:
            kept[rung.name].failed = lacks(rung, device)
            if kept[rung.name].failed is not None:
                found(rung)
        able = [rung for rung in missing if kept[rung.name].failed is None]
        alone = case.trains and device.type == "cuda"
        visits = [[rung] for rung in (*able, *(able[::-1] if repeats > 0 else ()))] if alone else [able]
        for visit in visits:
            build = lambda rung: work.build(rung.on(device, case.bf16))  # noqa: E731
            time_together(build, visit, kept, repeats if alone else 2 * repeats, device, add)
            for rung in visit:
                found(rung)
            clear()
    return list(rows.values())


def lacks(rung: Rung, device: torch.device) -> str | None:
    """Why a rung has no sense on `device`; None where it has one."""
    if rung.needs_gpu and device.type != "cuda":
        return "needs a CUDA device"
    tuned.use_tables(True)
    if rung.tuned and tuned.table(tuned.current_capability()) is None:
        return "no tuned table fits this device: python -m benchmarks.ops.tune attention mlp"
    return None


def prepare(case: Case, device: torch.device, steps: int, folder: Path) -> tuple[DiT, Training | Sampling]:
    """The model of a case, and what builds its rungs. ValueError for a case that there is none of."""
    if case.model not in DiT_models:
        raise ValueError(f"unknown model {case.model}: choose {', '.join(DiT_models)}")
    patch = int(case.model.rpartition("/")[2])
    if case.image_size < 1 or case.image_size % (8 * patch):
        raise ValueError(f"{case.image_size} pixels are not a multiple of 8 x patch {patch}")
    set_tf32(False)
    sizes = {} if case.depth is None else {"depth": case.depth}
    model = random_model(case.model, case.image_size, **sizes)
    if case.trains:
        return model, Training(case, model, device, folder)
    return model, Sampling(case, model, device, steps)


def time_together(
    build: Callable[[Rung], Climber],
    rungs: Sequence[Rung],
    kept: dict[str, Found],
    repeats: int,
    device: torch.device,
    add: Callable[[Rung], None],
) -> None:
    """Build the rungs, then time them in rounds, one of each in turn; `add` is called for each that has a new time.

    The first round is made rung by rung, as each is built.
    """

    def attempt(rung: Rung, work: Callable[[], None]) -> None:
        if kept[rung.name].failed is None:
            set_tf32(rung.on(device).tf32)
            tuned.use_tables(rung.tuned)
            try:
                work()
            # A compiler's, Triton's and a library's errors have no common class, and the other rungs go on.
            except Exception as error:
                kept[rung.name] = Found(failed=reason(error))

    built: dict[str, Climber] = {}

    def make(rung: Rung) -> None:
        before = _most_memory(device)
        climber = build(rung)
        # Not "greater than": NaN is no small difference.
        if not climber.gap <= climber.most:
            what = f"{climber.gap:.2g} off the plain model in float32, where {climber.most:g} is rounding"
            raise RuntimeError(f"another model: its first results are {what}")
        built[rung.name] = climber
        found = kept[rung.name]
        found.launches = launches_of(climber.run, device, climber.steps)
        found.memory = None if before is None else torch.cuda.max_memory_allocated() - before

    def once(rung: Rung) -> None:
        climber = built[rung.name]
        start = now()
        climber.run()
        kept[rung.name].seconds.append((now() - start) / climber.steps)

    for rung in rungs:
        attempt(rung, lambda rung=rung: make(rung))  # type: ignore[misc]
        if repeats > 0:
            attempt(rung, lambda rung=rung: once(rung))  # type: ignore[misc]
            add(rung)
    for _ in range(repeats - 1):
        for rung in rungs:
            attempt(rung, lambda rung=rung: once(rung))  # type: ignore[misc]
        for rung in rungs:
            add(rung)
    tuned.use_tables(True)


def _most_memory(device: torch.device) -> int | None:
    """Bytes in use on a CUDA device, from which on the most is counted anew."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def launches_of(run: Callable[[], Any], device: torch.device, steps: int) -> float | None:
    """Kernels and copies on the device in one step; None without a CUDA device."""
    if device.type != "cuda":
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) / steps


def row_of(
    case: Case, rung: Rung, found: Found, model: DiT | None = None, device: torch.device | None = None
) -> Row:
    """The row of a rung as it has run on `device`."""
    place = case.place(rung)
    if found.failed is not None or not found.seconds:
        return Row(*place, failed=found.failed or "not timed")
    assert model is not None
    assert device is not None
    median = Row.timed(*place, found.seconds).median
    assert median is not None
    passes = case.forwards * (3 if case.trains else 1)
    rate, of_steps = (
        ("images/s", 1) if case.trains else (f"images/s at {WHOLE_SAMPLING} steps", WHOLE_SAMPLING)
    )
    metrics = {
        rate: case.batch / median / of_steps,
        "of the roofline": limit(case, model, device) / median,
    }
    if (peak := peak_flops(device)) is not None:
        metrics["MFU"] = passes * 2 * model.macs() / median / peak
    if found.memory is not None:
        metrics["peak GB"] = found.memory / 1e9
    if found.launches is not None:
        metrics["launches"] = found.launches
    return Row.timed(*place, found.seconds, metrics)


def limit(case: Case, model: DiT, device: torch.device) -> float:
    """Seconds that the roofline allows a step, at the rates of this device."""
    best = ceiling(torch.bfloat16 if device.type == "cuda" else torch.float32)
    rates = Rates(best.product, best.product, best.product, best.copy)
    width = model.config["hidden_size"]
    step = Step(len(model.blocks), width, model.patch_size, case.image_size, case.forwards)
    return training_limit(step, rates) if case.trains else sampling_limit(step, rates)


def set_tf32(on: bool) -> None:
    """Whether float32 products on tensor cores are rounded to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def clear() -> None:
    """Leave nothing of the rungs before on the device."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """The error's first line, with its last where that announces it, or its class where it says nothing."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[-1]}" if more and first.endswith(":") else first


def _is_whole(row: Row | None, repeats: int) -> bool:
    return row is not None and row.failed is None and row.repeats >= 2 * repeats
