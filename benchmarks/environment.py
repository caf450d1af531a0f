"""What a figure depends on: device, processor, load, versions and the state of the code."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
import triton

from dit_fast import __version__

ROOT = Path(__file__).resolve().parents[1]
PEERS = (
    "apex", "diffusers", "flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel", "nvmath-python",
    "quack-kernels", "torchao",
)  # fmt: skip
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"


def environment() -> dict[str, object]:
    """Processor with its vector instructions, threads, load, versions; the CUDA device with driver and clocks."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    found: dict[str, object] = {
        "cpu": fields.get("model name") or platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dit_fast": __version__,
        "peers": {name: version for name in PEERS if (version := _version(name))},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"sm_{properties.major}{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _said("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"),
        }
    return found


def commit() -> str:
    """The checkout's commit, "-dirty" behind it where code differs from it; "" where it is not known.

    What benchmarks write themselves, results and the README, does not count as code. In a tree that was copied
    without its repository, the file COMMIT says it.
    """
    # Not any repository that the tree may lie in.
    head = _said("git", "rev-parse", "--short", "HEAD") if (ROOT / ".git").exists() else ""
    if not head:
        told = ROOT / "COMMIT"
        return told.read_text().strip() if told.is_file() else ""
    code = (".", ":!benchmarks/results", ":!README.md")
    changes = _said("git", "status", "--porcelain", "--untracked-files=no", "--", *code)
    return f"{head}-dirty" if changes else head


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _said(*command: str) -> str:
    """What a program prints; "" where it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
