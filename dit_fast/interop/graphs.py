"""Models as graphs for programs without dit_fast: ONNX, torch.export and AOTInductor, each read back and compared."""

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_fast import __version__
from dit_fast.errors import ConfigError, MissingExtraError
from dit_fast.interop.load import ModelInfo
from dit_fast.model.dit import DiT
from dit_fast.utils.files import write_atomically
from dit_fast.utils.terminal import one_line

GraphFormat = Literal["onnx", "torch-export", "aot-inductor"]
FILES: dict[str, str] = {"onnx": "model.onnx", "torch-export": "model.pt2", "aot-inductor": "model.pt2"}
METADATA = "export.json"
Quantization = Literal["none", "int8", "int8-dynamic", "float8", "int4"]
# torchao's configuration, and the largest rounding error of a value relative to the largest of its group.
_QUANTIZED = {
    "int8": ("Int8WeightOnlyConfig", 2**-8),
    "int8-dynamic": ("Int8DynamicActivationInt8WeightConfig", 2**-8),
    "float8": ("Float8WeightOnlyConfig", 2**-4),
    "int4": ("Int4WeightOnlyConfig", 2**-4),
}
BATCHES = (1, 2, 5)
"""Batch sizes at which an export is compared; it is traced at the second."""
_CAPTION_TOKENS = 7
# Sizes 1 and 2 of captions take other paths of broadcasting, which a graph cannot hold beside the general one.
_LEAST_CAPTION = 3
# A protobuf message holds 2 GiB: larger weights are written beside the graph, as model.onnx.data.
_MOST_INSIDE = 1 << 30


@dataclass(frozen=True)
class Comparison:
    """An export against the model, in outputs relative to their largest value, at each of `BATCHES`.

    Attributes:
        graph: The file read back against the (quantized) model in eager mode: rounding.
        quantized: The quantized model against the model, in eager mode; empty without quantization.
        size: Bytes of all files.
    """

    graph: tuple[float, ...]
    quantized: tuple[float, ...]
    size: int


def check_graph_export(kind: str, quantize: Quantization) -> None:
    """Check what an export needs, before a model is loaded.

    Raises:
        MissingExtraError: A package is not installed.
        ConfigError: A combination without an implementation, or a machine without a C++ compiler.
    """
    if kind == "onnx":
        if quantize == "int8-dynamic":
            raise ConfigError(
                "--quantize int8-dynamic: torch.onnx has no operator for its integer products; give --quantize int8, "
                "or --format torch-export"
            )
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError:
            raise MissingExtraError(
                "--format onnx: onnx, with onnxscript and onnxruntime, is not installed; pip install 'dit-fast[onnx]'"
            ) from None
    if quantize != "none":
        with _quiet():
            try:
                import torchao.quantization  # noqa: F401
            except ImportError:
                raise MissingExtraError(
                    f"--quantize {quantize}: torchao is not installed; pip install 'dit-fast[quantize]'"
                ) from None
    if kind == "aot-inductor":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:  # InvalidCxxCompiler, RuntimeError, by version
            raise ConfigError(
                f"--format aot-inductor compiles C++ and finds no compiler ({one_line(error)}): install g++, or give "
                "--format torch-export"
            ) from None


def save_graph(
    model: DiT, info: ModelInfo, folder: Path, kind: GraphFormat, quantize: Quantization = "none"
) -> Comparison:
    """Write a model as a graph with `METADATA` into a folder, read it back and compare it with the model.

    Args:
        model: The model, in eval mode on the CPU; its weights are quantized, and its backends changed, in place.
        info: Metadata of its checkpoint.
        folder: An existing folder.
        kind: The format.
        quantize: Quantization of the linear layers.

    Returns:
        The comparison, within what rounding and quantization explain.

    Raises:
        ConfigError: A model that cannot be exported or quantized, or an export that differs from the model.
    """
    model.backends.kernels, model.backends.attention = "reference", "sdpa"
    model.float().requires_grad_(False)
    graph = _inputs_of(model)
    batches = [_example(model, batch, info.diffusion.get("objective") == "flow") for batch in BATCHES]
    exact = [graph(*inputs.values()) for inputs in batches]
    with _quiet():
        if quantize != "none":
            _quantize(model, quantize)
        try:
            run = _WRITERS[kind](_trace(graph, batches[1], quantize), folder / FILES[kind], list(batches[0]))
        except OSError:
            raise
        except Exception as error:  # whatever torch's exporters and compilers raise
            raise ConfigError(f"this model cannot be exported as {kind}: {one_line(error)[:300]}") from error
        with torch.no_grad():
            expected = [graph(*inputs.values()) for inputs in batches]
            found = [run(inputs) for inputs in batches]
    # 4 sqrt(terms) units of the last place of sums in another order, through all blocks one after another.
    widest = max(parameter.shape[-1] for parameter in model.parameters())
    rounding = 4 * math.sqrt(widest * (len(model.blocks) + 1)) * torch.finfo(torch.float32).eps
    # Errors of the blocks are independent of each other. An activation whose last bit differs may be quantized to the
    # next of 256 values.
    step = 0.0 if quantize == "none" else 4 * math.sqrt(len(model.blocks) + 1) * _QUANTIZED[quantize][1]
    against_eager = _compared(found, expected, step if quantize == "int8-dynamic" else rounding, kind)
    quantized = () if quantize == "none" else _compared(expected, exact, step, f"--quantize {quantize}")
    metadata = _metadata(model, info, kind, quantize, batches[0]) | {
        "compared": {
            "batches": list(BATCHES),
            "against_eager": against_eager,
            "quantized_against_float32": quantized,
        }
    }
    text = json.dumps(metadata, indent=2) + "\n"
    write_atomically(folder / METADATA, lambda path: path.write_text(text))
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Comparison(against_eager, quantized, size)


class _Graph(nn.Module):
    """The inputs that the model reads, under the names that the graph has."""

    def __init__(self, model: DiT):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, t, y)


class _Unconditional(_Graph):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return self.model(x, t)


def _inputs_of(model: DiT) -> _Graph:
    return _Unconditional(model) if model.y_embedder is None else _Graph(model)


def _example(model: DiT, batch: int, flow: bool) -> dict[str, Tensor]:
    """Inputs of the graph, the same in each call: noise, times from end to end, all classes in turn, the null class."""
    draw = torch.Generator().manual_seed(batch)
    times = torch.rand(batch, generator=draw) if flow else 1000 * torch.rand(batch, generator=draw)
    shape = (model.in_channels, *model.x_embedder.img_size)
    inputs = {"x": torch.randn(batch, *shape, generator=draw), "t": times}
    if model.caption_dim:
        y = torch.randn(batch, _CAPTION_TOKENS + batch, model.caption_dim, generator=draw)
        # Captions end in padding, and the last one is the null caption.
        y[:, -2:] = 0
        y[-1] = 0
        inputs["y"] = y
    elif model.y_embedder is not None:
        inputs["y"] = (model.num_classes - torch.arange(batch)) % (model.num_classes + model.has_null)
    return inputs


def _trace(graph: _Graph, inputs: dict[str, Tensor], quantize: Quantization) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    shapes: dict[str, dict[int, Any]] = {name: {0: batch} for name in inputs}
    if "y" in inputs and inputs["y"].ndim == 3:
        shapes["y"][1] = torch.export.Dim("tokens", min=_LEAST_CAPTION)
    program = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=shapes)
    if quantize != "none":
        # To operators of ATen on plain tensors: whoever reads the file needs no torchao.
        program = program.run_decompositions()
    foreign = {
        str(node.target)
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")
    }
    if foreign:
        raise ConfigError(f"operators outside of PyTorch: {', '.join(sorted(foreign))}")
    return program


Run = Callable[[dict[str, Tensor]], Tensor]


def _write_onnx(program: torch.export.ExportedProgram, path: Path, names: list[str]) -> Run:
    import onnxruntime

    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    torch.onnx.export(
        program, (), str(path), input_names=names, output_names=["output"], external_data=size > _MOST_INSIDE,
        dynamo=True, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(
            session.run(["output"], {name: each.numpy() for name, each in inputs.items()})[0]
        )

    return run


def _write_program(program: torch.export.ExportedProgram, path: Path, names: list[str]) -> Run:
    torch.export.save(program, path)
    module = torch.export.load(path).module()
    return lambda inputs: module(*inputs.values())


def _write_compiled(program: torch.export.ExportedProgram, path: Path, names: list[str]) -> Run:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    compiled = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: compiled(*inputs.values())


_WRITERS = {"onnx": _write_onnx, "torch-export": _write_program, "aot-inductor": _write_compiled}


def _has_scales(module: nn.Module) -> bool:
    """Whether it is a linear layer without a row of zeros, as untrained gates have: float8's scale of one is 0 / 0."""
    return isinstance(module, nn.Linear) and bool((module.weight != 0).any(1).all())


def _quantize(model: DiT, quantize: Quantization) -> None:
    import torchao.quantization

    name, _ = _QUANTIZED[quantize]
    try:
        configuration = getattr(torchao.quantization, name)()
        torchao.quantization.quantize_(model, configuration, filter_fn=lambda module, _: _has_scales(module))
        with torch.no_grad():
            _inputs_of(model)(*_example(model, 1, False).values())
    except Exception as error:  # a kernel, a dtype or a package that is not there
        raise ConfigError(
            f"--quantize {quantize}: torchao {torchao.__version__} cannot on this machine's CPU "
            f"({one_line(error)[:200]}); give --quantize int8"
        ) from error


def _compared(found: list[Tensor], expected: list[Tensor], allowed: float, what: str) -> tuple[float, ...]:
    """Largest differences relative to the largest value; ConfigError where one is beyond `allowed`."""
    differences = []
    for one, other, batch in zip(found, expected, BATCHES, strict=True):
        scale = other.abs().max().item() or 1.0
        difference = (one - other).abs().max().item() / scale if one.shape == other.shape else math.inf
        differences.append(difference)
        if not difference <= allowed:
            raise ConfigError(
                f"{what}: outputs at batch {batch} differ from the model's by {difference:.1e} of the largest, more "
                f"than the {allowed:.1e} of rounding; nothing was written"
            )
    return tuple(differences)


def _metadata(
    model: DiT, info: ModelInfo, kind: str, quantize: str, inputs: dict[str, Tensor]
) -> dict[str, Any]:
    """What a program needs to sample with the graph alone."""
    height, width = model.x_embedder.img_size
    flow = info.diffusion.get("objective") == "flow"
    signature: dict[str, Any] = {
        "x": {"shape": ["batch", model.in_channels, height, width], "dtype": "float32"},
        "t": {"shape": ["batch"], "dtype": "float32"},
    }
    if "y" in inputs:
        labels = {"shape": ["batch"], "dtype": "int64"}
        captions = {"shape": ["batch", "tokens", model.caption_dim], "dtype": "float32"}
        signature["y"] = captions if model.caption_dim else labels
    defaults = (
        {"objective": "flow", "path": "linear", "prediction": "velocity"}
        if flow
        else {
            "objective": "diffusion",
            "noise_schedule": "linear",
            "diffusion_steps": 1000,
            "prediction": "epsilon",
        }
    )
    predicted = {name: value for name, value in info.diffusion.items() if value is not None}
    if predicted.pop("predict_xstart", False):
        predicted.setdefault("prediction", "x0")
    return {
        "format": kind,
        "dit_fast": __version__,
        "file": FILES[kind],
        "weights": info.summary(),
        "quantize": quantize,
        "inputs": signature,
        "output": {"shape": ["batch", model.out_channels, height, width], "dtype": "float32"},
        "objective": defaults | predicted,
        "objective_recorded": bool(info.diffusion),
        "learned_sigma": model.learn_sigma,
        "num_classes": model.num_classes,
        "null_class": model.null_class,
        "class_names": info.class_names,
        "latent": {
            "is_latent": info.latent,
            "vae": info.vae,
            "shift": info.data.get("shift"),
            "scale": info.data.get("scale"),
        },
        "conventions": {
            "x": "latents (z - shift) * scale of the autoencoder, or pixels from -1 to 1",
            "t": "time from 0 (noise) to 1 (data)"
            if flow
            else "index of the training step, from 0 (data) to diffusion_steps - 1 (noise)",
            "y": f"embeddings of {_LEAST_CAPTION} or more tokens; zeros are padding, a caption of zeros the null one"
            if model.caption_dim
            else "class from 0 to num_classes - 1, or null_class; other values are undefined",
            "output": "the first channels, as many as x has, are the prediction; with learned_sigma the others "
            "are the variance",
        },
        "model": model.config,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings and logs, which are about themselves."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
