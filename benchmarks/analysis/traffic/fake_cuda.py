"""A CUDA device in name only, so that a CPU build of PyTorch compiles for CUDA; it changes the process it is in.

`load()` before `import torch`, `describe()` after it. Fake CUDA tensors then go through autocast, autograd and all
of torch.compile; nothing can be executed. The device is described as an H100 SXM.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.analysis.traffic import SUPPORTED_TORCH, TrafficError

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
CAPABILITY = (9, 0)

# What Inductor and Triton ask about a device before they generate code for it.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132,
    warp_size=32, max_threads_per_block=1024, max_threads_per_multi_processor=2048, total_memory=80 << 30,
    regs_per_multiprocessor=65536, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20, gcnArchName="", uuid="fake",
    is_integrated=0, is_multi_gpu_board=0,
)  # fmt: skip


def load() -> None:
    """Build the library once for this version of PyTorch, and load it. Raises TrafficError when that cannot be."""
    if "torch" in sys.modules:
        raise TrafficError("torch is imported already: the fake device must be loaded before it")
    ctypes.CDLL(str(_library(_torch_folder())), mode=ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    """PyTorch's folder; TrafficError for a version or a build whose internals are not the expected ones."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise TrafficError("torch is not installed")
    folder = Path(spec.submodule_search_locations[0])
    version: dict[str, Any] = {}
    exec((folder / "version.py").read_text(), version)
    if not version["__version__"].startswith(f"{SUPPORTED_TORCH}."):
        raise TrafficError(
            f"torch {version['__version__']} is installed; the count reads Inductor's internals as they are in "
            f"{SUPPORTED_TORCH}: use torch {SUPPORTED_TORCH}.*+cpu"
        )
    if version["cuda"] is not None:
        raise TrafficError(
            f"torch {version['__version__']} is built for CUDA; the count needs the CPU build: "
            f"use torch {SUPPORTED_TORCH}.*+cpu"
        )
    return folder


def _library(torch_folder: Path) -> Path:
    """The compiled library, in the user's cache."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise TrafficError("g++ is not on PATH; it builds the fake CUDA device (Debian: apt install g++)")
    key = hashlib.sha256(SOURCE.read_bytes() + (torch_folder / "version.py").read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_fast"
    library = cache / f"fake_cuda_{key}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        target = Path(scratch, library.name)
        lib = torch_folder / "lib"
        command = [compiler, "-std=c++20", "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(target)]
        command += [f"-I{torch_folder / 'include'}", f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            errors = [line for line in built.stderr.splitlines() if "error" in line]
            raise TrafficError(f"g++ could not build {SOURCE.name}: {(errors or ['no message'])[0]}")
        os.replace(target, library)
    return library


class _Driver:
    """Triton's driver as far as code generation asks it."""

    launcher_cls = None

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cuda", 0)


def describe() -> None:
    """Answer PyTorch's, Triton's and Inductor's questions about the device; nothing is compiled to machine code."""
    import torch
    import triton

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: CAPABILITY,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        # Dynamo looks the two functions up by identity.
        "_maybe_exchange_device": lambda index: 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    triton.runtime.driver.set_active(_Driver())

    # Only now: Dynamo keeps the functions of torch.cuda that it finds at import.
    import torch._dynamo.device_interface as interface
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, joint_graph
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch.utils._python_dispatch import TorchDispatchMode

    class OnCpu(TorchDispatchMode):
        """Makes on the CPU what is asked for on any device."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            place = {"device": "cpu"} if "device" in (kwargs or {}) else {}
            return func(*args, **{**(kwargs or {}), **place})

    attention_patterns = fuse_attention._sfdp_init
    folder = joint_graph.UniformValueConstantFolder
    deduce_value = folder._deduce_value

    def deduce_on_cpu(self: Any, node: Any) -> Any:
        with OnCpu():
            return deduce_value(self, node)

    replacements: list[tuple[Any, str, Any]] = [
        (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
        (interface, "get_cuda_stream", lambda device: 0),
        (interface.CudaInterface, "get_raw_stream", staticmethod(lambda device: 0)),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        # Attention patterns are traced from example tensors and constants folded by computing them: real tensors.
        (fuse_attention, "_sfdp_init", lambda input_device=None: attention_patterns(torch.device("cpu"))),
        (folder, "_deduce_value", deduce_on_cpu),
        (CachingAutotuner, "precompile", lambda self, *args, **kwargs: None),
    ]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    config.compile_threads = 1
    config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
