"""What the GPU suite runs: the stages of its parts, in order of what they tell, and what each of them needs.

Part 1 takes 7 minutes, part 2 takes 5, for one slot of 15 minutes on one GPU with the way there and back; part 3 is the
rest, for a GPU of one's own. A dry run has the same stages with tiny sizes.
"""

import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton

from benchmarks.environment import ROOT
from benchmarks.ops.registry import REGISTRY

MINUTES = {1: 7.0, 2: 5.0, 3: 30.0}
"""Of each part."""

MODULE = (sys.executable, "-m")
SIZE = ("256", "256", "1152")
FIRST = ("ours", "+ torch.compile", "ours + CUDA graph")
OPTIONS = ("ours, tuned", "ours, attention triton", "ours, epilogue triton", "ours, epilogue cublaslt")
BASELINES = ("+ SDPA", "+ bf16", "+ TF32", "plain fp32", "diffusers", "diffusers + torch.compile")
ROW_KERNELS = ("gated_residual_adaln", "adaln_modulate", "gated_residual")
TELLING = ("attention", "gated_residual_adaln", "mlp", "gelu", *ROW_KERNELS[1:])
OPERATIONS = (*TELLING, *(name for name in REGISTRY if name not in TELLING))
PEERS = ("ours", "compiled", "sdpa-cudnn", "sdpa-flash", "flash-attn-2", "flash-attn-3", "apex", "quack")
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "Occupancy",
    "LaunchStats",
    "SchedulerStats",
    "WarpStateStats",
)


@dataclass(frozen=True)
class Stage:
    """A command; "{out}" in it is the folder of the results.

    seconds: its share of a part; least: with fewer left it is not begun. beside: it runs at the same time as the stage
    before it. capability, gib: what the GPU has to be and to hold. wrapper: a tool, with its options, that runs the
    command where there is a GPU. interpreted: the command runs Triton's interpreter.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 5.0
    beside: bool = False
    capability: int = 80
    gib: float = 0.0
    wrapper: tuple[str, ...] = ()
    interpreted: bool = False


@dataclass(frozen=True)
class Machine:
    """What there is: the GPU (capability 0 for none), versions, and tools by name, None where one is missing."""

    capability: int = 0
    gib: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str | None] = field(default_factory=dict)

    def lacks(self, stage: Stage) -> str | None:
        """Why a stage cannot run here, in words; None where it can. Without a GPU, only versions are looked at."""
        for package, least in supported().items():
            if stage.capability and _numbers(here := self.versions.get(package, least)) < _numbers(least):
                return f"needs {package} {least}, here is {here}"
        if not self.capability:
            return None
        if self.capability < stage.capability:
            return f"needs sm_{stage.capability}, this GPU is sm_{self.capability}"
        if self.gib < stage.gib:
            return f"needs {stage.gib:g} GiB of GPU memory, this GPU has {self.gib:.0f}"
        if stage.wrapper and self.tools.get(stage.wrapper[0]) is None:
            return f"{stage.wrapper[0]} is not installed"
        return None

    def command(self, stage: Stage) -> tuple[str, ...]:
        """What runs a stage: its command, behind its tool where there is a GPU."""
        if not self.capability or not stage.wrapper:
            return stage.command
        tool, *options = stage.wrapper
        return (self.tools[tool] or tool, *options, *stage.command)

    def notes(self) -> list[str]:
        """What is missing and costs something, a line each."""
        what = {
            "nvcc": "nothing here needs it: Triton brings its own assembler",
            "compute-sanitizer": "the race check is left out",
            "ncu": "the profile by Nsight Compute is left out",
        }
        return [f"{name} is not installed: {what[name]}" for name in what if self.tools.get(name) is None]


TOOLS = ("nvcc", "compute-sanitizer", "ncu")


def this_machine() -> Machine:
    """The machine that this runs on."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    tools = {name: _tool(name) for name in TOOLS}
    if not torch.cuda.is_available():
        return Machine(versions=versions, tools=tools)
    properties = torch.cuda.get_device_properties(0)
    capability = 10 * properties.major + properties.minor
    return Machine(capability, properties.total_memory / 2**30, versions, tools)


def _tool(name: str) -> str | None:
    """Where a tool of the CUDA toolkit lies: in the path, or where the toolkit puts it."""
    places = [Path("/usr/local/cuda/bin"), *sorted(Path("/usr/local").glob("cuda-*/bin"), reverse=True)]
    places += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    return shutil.which(name) or shutil.which(name, path=":".join(map(str, places)))


def supported() -> dict[str, str]:
    """The oldest versions of PyTorch and Triton that the package takes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = (line.partition(">=") for line in project["dependencies"])
    return {name: least for name, _, least in parts if name in ("torch", "triton")}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def stages(part: int, dry: bool, cores: int) -> list[Stage]:
    """The stages of a part on a machine of so many cores; `dry`: the same with tiny sizes."""
    return {1: _part1, 2: _part2, 3: _part3}[part](dry, cores)


def _ladder(kinds: Sequence[str], only: Sequence[str], *options: str, dry: bool) -> tuple[str, ...]:
    tiny = ("--models", "DiT-S/8", "--depth", "1", "--image-sizes", "64", "--batch", "1", "--images", "1")
    size = (*tiny, "--repeats", "1", "--steps", "1") if dry else options
    flags = tuple(option for option in options if option == "--compile-only") if dry else ()
    # A dry run on a CPU looks at one dtype.
    size = (*size, "--dtypes", "fp32")
    return (
        *MODULE,
        "benchmarks.models.ladder",
        "--out",
        "{out}",
        "--kinds",
        *kinds,
        *size,
        *flags,
        "--only",
        *only,
    )


def _operations(names: Sequence[str], *options: str, dry: bool) -> tuple[str, ...]:
    size = ("2", "16", "64") if dry else SIZE
    dtypes = "fp32" if dry else "bf16"
    return (
        *(*MODULE, "benchmarks.ops.operations", "--shape", *size, "--dtypes", dtypes, "--ops", *names),
        *("--providers", *PEERS, *options),
    )


def _tune(names: Sequence[str], dtypes: Sequence[str], cores: int, dry: bool) -> tuple[str, ...]:
    tiny = ("--dry-run", "--out", "{out}/tuned/sm90.json")
    size = ("2", "64", "384") if dry else SIZE
    command = (*MODULE, "benchmarks.ops.tune", *names, "--shape", *size, "--missing", "--jobs", str(cores))
    return (*command, "--dtypes", *(dtypes[:1] if dry else dtypes), *(tiny if dry else ()))


def _part1(dry: bool, cores: int) -> list[Stage]:
    workers = ("--workers", str(max(1, min(8, cores // 2))), "--log", "{out}/correctness.jsonl")
    # Everything that a GPU has to show, but for any_size, which is minutes of examples, and a page of the docs.
    tests: tuple[str, ...] = ("--ignore=tests/kernels/test_adding_a_kernel.py", "-k", "not any_size")
    if dry:
        tests = ("-k", "gpu or cuda_graphs or (test_runs_agree and unpatchify)")
    proofs = (*MODULE, "benchmarks.gpu.parallel_tests", *workers, "--limit", "60", "--")
    some = ("gelu",) if dry else OPERATIONS
    # A compiler for CPUs takes most of a dry run's time.
    rungs = (FIRST[0], FIRST[2]) if dry else FIRST
    sampling = ("--compile-only", "--images", "1", "8")
    # Of the sizes that are timed afterwards, since the compilers' caches hold nothing else.
    compiled = _ladder(["train"], rungs[:1] if dry else FIRST[:2], "--compile-only", dry=dry)
    return [
        Stage("correctness", (*proofs, *_gpu_tests(), *tests), 110, gib=8, interpreted=dry),
        Stage("environment", (*MODULE, "dit_fast.cli", "doctor"), 110, beside=True, capability=0),
        Stage("compile: training", compiled, 110, beside=True, gib=70),
        Stage(
            "compile: sampling",
            _ladder(["sample-cfg"], FIRST[1:2] if dry else FIRST[:2], *sampling, dry=dry),
            110,
            beside=True,
            gib=16,
        ),
        Stage("compile: operations", _operations(some, "--once", dry=dry), 110, beside=True, gib=40),
        Stage("ladder: training", _ladder(["train"], rungs, dry=dry), 85, gib=70),
        Stage(
            "tune: attention, mlp",
            _tune(["attention"] if dry else ["attention", "mlp"], ("bf16", "autocast"), cores, dry),
            70,
            gib=40,
        ),
        Stage("ladder: tuned, options", _ladder(["train"], OPTIONS, "--repeats", "3", dry=dry), 70, gib=70),
        Stage(
            "operations",
            _operations(some, "--out", "{out}", "--rounds", "2" if dry else "20", dry=dry),
            60,
            gib=40,
        ),
        Stage("ladder: baselines", _ladder(["train"], BASELINES[:4], "--repeats", "2", dry=dry), 20, gib=120),
    ]


def _gpu_tests() -> tuple[str, ...]:
    from benchmarks.gpu.parallel_tests import KERNELS, gpu_files

    return (*gpu_files(), KERNELS)


def _part2(dry: bool, cores: int) -> list[Stage]:
    backward = (*MODULE, "pytest", "-v", "-p", "no:cacheprovider", "tests/kernels/test_attention.py", "-x")
    short = "test_two_runs_agree and short" if dry else "(test_as_accurate or test_two_runs_agree) and short"
    racecheck = ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9")
    sections = [word for section in SECTIONS for word in ("--section", section)]
    ncu = ("ncu", "--clock-control", "none", "--kernel-name", "regex:^_", "--launch-count", "40", *sections)
    once = _operations(("gelu",) if dry else TELLING, "--once", dry=dry)
    once = (*once[: once.index("--providers")], "--providers", "ours", "--once")
    rungs = (FIRST[2], FIRST[1], FIRST[0])
    sampling = _ladder(["sample-cfg"], rungs[:2] if dry else rungs, "--images", "1", "8", dry=dry)
    return [
        Stage("ladder: sampling", sampling, 100, gib=16),
        Stage(
            "tune: row kernels",
            _tune(ROW_KERNELS[2:] if dry else ROW_KERNELS, ("bf16", "autocast"), cores, dry),
            90,
            gib=16,
        ),
        Stage("racecheck", (*backward, "-k", short), 60, wrapper=racecheck, interpreted=dry),
        Stage("ncu", once, 40, gib=16, wrapper=ncu),
    ]


def _part3(dry: bool, cores: int) -> list[Stage]:
    def profile(kind: str, *options: str) -> Stage:
        size = ("--batch-size", "8", "--first", "2", "--count", "1", "--trace", f"{{out}}/{kind}-trace.json")
        command = (
            *MODULE,
            "dit_fast.cli",
            "profile",
            "--data",
            "digits",
            "--patch-size",
            "2",
            *size,
            *options,
        )
        return Stage(f"profile: {kind}", command, 60)

    size = ("--model", "DiT-S/8", "--image-size", "64", "--batch", "1") if dry else ("--batch", "128")
    sizes = ("--models", "DiT-XL/2", "DiT-L/2", "DiT-B/2", "DiT-S/2", "--image-sizes", "256", "512")
    every = (*FIRST, *BASELINES, "ours, eager", "ours, least memory", "ours + CUDA graph + fp8")
    roofline = (*MODULE, "benchmarks.analysis.roofline", "--measure", "--results", "{out}", *size)
    few = ("ours, eager", "plain fp32")
    return [
        Stage("roofline", roofline, 60, gib=40),
        profile("training"),
        profile("sampling", "--sample"),
        Stage(
            "operations: optimizer, every peer",
            (
                *MODULE,
                "benchmarks.ops.operations",
                "--optimizer",
                "--out",
                "{out}",
                "--ops",
                *(() if dry else OPERATIONS),
            )
            + (("--providers", "torch", "ours", "--rounds", "1") if dry else ("--dtypes", "autocast")),
            240,
            gib=40,
        ),
        Stage(
            "ladder: every rung",
            _ladder(["train", "sample-cfg"], few if dry else every, dry=dry),
            400,
            gib=70,
        ),
        Stage(
            "ladder: from disk",
            _ladder(["train-disk", "sample"], few if dry else FIRST, dry=dry),
            240,
            gib=70,
        ),
        Stage(
            "ladder: every size",
            _ladder(["train", "sample-cfg"], few if dry else FIRST, *sizes, dry=dry),
            700,
            gib=70,
        ),
    ]
