"""Models as graphs: every option exports, is compared, and says what a consumer needs; what cannot is refused."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_fast.cli import main
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError
from dit_fast.interop import graphs
from dit_fast.models import DiT
from tests.project.test_docs import ROOT, blocks
from tests.tolerance import relative, rounding

pytest.importorskip("onnxruntime")
PAGE = ROOT / "docs" / "serving.md"
TINY: dict[str, Any] = {
    "input_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 3,
}  # fmt: skip


def saved(folder: Path, **options: Any) -> DiT:
    """A model without zeros, whose every layer shows in the outputs, saved to `folder`."""
    torch.manual_seed(0)
    model = DiT(**TINY | options).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


def export(folder: Path, kind: str, *more: str) -> int:
    arguments = ["--ckpt", str(folder / "model"), "--out", str(folder / kind), "--format", kind, *more]
    return main(["export", *arguments])


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rotary positions, SwiGLU, RMSNorm": (
        "onnx",
        {"positions": "rope", "mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True, "class_dropout_prob": 0.0},
    ),
    "captions by cross-attention": ("onnx", {"conditioning": "cross_attention", "caption_dim": 6}),
    "captions in context": ("torch-export", {"conditioning": "in_context", "caption_dim": 6}),
    "unconditional": ("torch-export", {"num_classes": 0, "learn_sigma": False, "conditioning": "adaln"}),
}


@pytest.mark.parametrize(("kind", "options"), OTHERS.values(), ids=OTHERS)
def test_every_option_exports(kind, options, tmp_path, capsys) -> None:
    model = saved(tmp_path / "model", **options)
    assert export(tmp_path, kind) == 0, capsys.readouterr().err
    told = json.loads((tmp_path / kind / "export.json").read_text())
    assert ("y" in told["inputs"]) == (model.y_embedder is not None)
    assert told["null_class"] is model.null_class


def test_the_page_samples_as_dit_fast_does(tmp_path, monkeypatch, capsys) -> None:
    model = saved(tmp_path / "model", input_size=32, patch_size=8)
    monkeypatch.chdir(tmp_path)
    for kind, name in (("onnx", "served-onnx"), ("torch-export", "served-program")):
        assert export(tmp_path, kind) == 0
        (tmp_path / kind).rename(name)
        printed = capsys.readouterr().out
        assert re.search(
            r"difference from the model: \S+ at batch 1, \S+ at batch 2, \S+ at batch 5\n", printed
        )
    assert sorted(os.listdir("served-onnx")) == ["export.json", "model.onnx"]
    about = json.loads(Path("served-onnx/export.json").read_text())
    assert about["inputs"]["x"] == {"shape": ["batch", 4, 32, 32], "dtype": "float32"}
    assert about["inputs"]["y"] == {"shape": ["batch"], "dtype": "int64"}
    assert about["output"]["shape"] == ["batch", 8, 32, 32]
    assert (about["null_class"], about["learned_sigma"], about["objective_recorded"]) == (3, True, False)
    numpy_loop, torch_call = (code for _, code in blocks(PAGE, "python"))
    said: dict[str, Any] = {}
    exec(compile(numpy_loop, str(PAGE), "exec"), said)
    noise, y = torch.from_numpy(said["noise"]), torch.from_numpy(said["y"])
    with torch.no_grad():
        expected = create_diffusion("50").ddim_sample_loop(
            model.forward_with_cfg,
            (4, 4, 32, 32),
            torch.cat([noise, noise]),
            clip_denoised=False,
            model_kwargs={"y": y, "cfg_scale": 4.0, "cfg_channels": None},
            device="cpu",
        )
    # One step multiplies the error of eps by 1 / sqrt(alpha) of that step, about 1.5 at most.
    assert relative(np.load("latents.npy"), expected[:2]) <= rounding(50 * 50 * 256)
    called: dict[str, Any] = {}
    exec(compile(torch_call, str(PAGE), "exec"), called)
    assert relative(called["output"], model(called["x"], called["t"], called["y"])) <= rounding()


def test_a_quantized_program_holds_plain_tensors(tmp_path, capsys) -> None:
    pytest.importorskip("torchao")
    model = saved(tmp_path / "model")
    assert export(tmp_path, "torch-export", "--quantize", "int8") == 0
    float32 = float(re.findall(r"float32: (\S+) at batch 1", capsys.readouterr().out)[0])
    assert rounding() < float32 < 0.03
    program = torch.export.load(tmp_path / "torch-export" / "model.pt2")
    assert {type(value) for value in program.state_dict.values()} <= {torch.Tensor, torch.nn.Parameter}
    assert torch.int8 in {value.dtype for value in program.state_dict.values()}
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 500.5, 999.0]), torch.tensor([0, 3, 2])
    assert rounding() < relative(program.module()(*inputs), model(*inputs)) < 0.03


def test_what_is_refused(tmp_path, capsys, monkeypatch) -> None:
    saved(tmp_path / "model")
    refusals = (
        ("safetensors", ["--quantize", "int8"], "is for --format onnx, torch-export, aot-inductor"),
        ("onnx", ["--quantize", "int8-dynamic"], "no operator for its integer products"),
        ("torch-export", ["--quantize", "int4"], "cannot on this machine's CPU"),
    )
    if not torch.cuda.is_available():
        for kind, more, message in refusals:
            assert export(tmp_path, kind, *more) == 1
            error = capsys.readouterr().err
            assert message in error
            assert len(error.splitlines()) == 1
    for package, kind, more, extra in (
        ("onnxruntime", "onnx", [], "onnx"),
        ("torchao.quantization", "torch-export", ["--quantize", "int8"], "quantize"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert export(tmp_path, kind, *more) == 1
            assert re.search(rf"is not installed; pip install .*\[{extra}\]", capsys.readouterr().err)
    with monkeypatch.context() as patch:
        patch.setattr(torch._inductor.cpp_builder, "get_cpp_compiler", no_compiler)
        assert export(tmp_path, "aot-inductor") == 1
        assert "finds no compiler (none of clang, g++): install g++" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model"]


def no_compiler() -> str:
    raise RuntimeError("none of clang, g++")


def test_an_export_that_differs_is_not_written(tmp_path, capsys, monkeypatch) -> None:
    saved(tmp_path / "model")
    write = graphs._write_program

    def write_wrong(*arguments: Any) -> Any:
        run = write(*arguments)
        return lambda inputs: run(inputs) * 1.001

    monkeypatch.setitem(graphs._WRITERS, "torch-export", write_wrong)
    assert export(tmp_path, "torch-export") == 1
    assert "outputs at batch 1 differ from the model's" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("wrong", [torch.full((3, 4), torch.nan), torch.ones(3, 2), torch.ones(3, 4) * 1.1])
def test_values_and_shapes_are_compared(wrong: torch.Tensor) -> None:
    right = [torch.ones(3, 4)] * 3
    assert graphs._compared(right, right, 1e-6, "onnx") == (0.0, 0.0, 0.0)
    with pytest.raises(ConfigError, match="onnx: outputs at batch 5 differ"):
        graphs._compared([*right[:2], wrong], right, 1e-6, "onnx")


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    model = saved(tmp_path / "model")
    assert export(tmp_path, "aot-inductor") == 0
    compiled = torch._inductor.aoti_load_package(str(tmp_path / "aot-inductor" / "model.pt2"))
    inputs = torch.randn(6, 4, 8, 8), torch.linspace(0, 999, 6), torch.arange(6) % 4
    assert relative(compiled(*inputs), model(*inputs)) <= rounding()
    assert np.isfinite(compiled(*inputs).numpy()).all()


def test_float8_leaves_rows_of_zeros_alone() -> None:
    """The gates of a fresh model are zero: a scale of theirs would be 0 / 0."""
    model = DiT(**TINY).eval().requires_grad_(False)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    graphs._quantize(model, "float8")
    out = model(torch.ones(1, 4, 8, 8), torch.tensor([3.0]), torch.tensor([0]))
    assert out.isfinite().all()
    assert out.any()
    assert type(model.blocks[0].attn.qkv.weight).__name__ == "Float8Tensor"
    assert type(model.blocks[0].adaLN_modulation[1].weight) is torch.nn.Parameter
