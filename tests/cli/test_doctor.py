"""`dit-fast doctor` says what is there and which path runs, on any machine."""

import sys
import types

import pytest

from dit_fast.cli import doctor, main
from dit_fast.kernels import tuned
from dit_fast.kernels.mlp import cublaslt


def test_every_part_has_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert {
        "dit-fast",
        "PyTorch",
        "device",
        "kernels",
        "attention",
        "flash-attn",
        "diffusers",
    } <= lines.keys()
    assert all(text.strip() for text in lines.values())


def test_reason_of_the_attention_backend_is_told() -> None:
    findings = dict(doctor.report())
    assert findings["attention T=256"].split(":")[0] in ("sdpa", "cudnn", "triton", "flash")
    assert len(findings["attention T=256"].split(":")[1]) > 10


def test_reason_of_the_mlp_epilogue_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for, what the tuned table says, and what is missing for either."""
    on_cpu = "; the PyTorch reference runs here all the same (batch 256, width 1152, bfloat16)"

    def finding(epilogue: str = "auto") -> str:
        tuned.forget()
        return dict(doctor.report(epilogue=epilogue))["MLP epilogue"].removesuffix(on_cpu)

    assert finding() == "separate: auto: no tuned table of this device has measured this shape"
    assert finding("triton") == "triton: asked for"
    monkeypatch.setattr(tuned, "choice", lambda *_, **__: "triton")
    assert finding() == "triton: auto: fastest in this device's tuned table"
    monkeypatch.setattr(tuned, "choice", lambda *_, **__: "cublaslt")
    monkeypatch.setattr(cublaslt, "installed", lambda: True)
    assert finding() == "cublaslt: auto: fastest in this device's tuned table"
    monkeypatch.setattr(cublaslt, "installed", lambda: False)
    assert finding().startswith("separate: auto: the tuned table says cublaslt, whose nvmath-python")


def test_what_cannot_run_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise ImportError("mlp: epilogue='cublaslt' needs nvmath-python")

    monkeypatch.setattr(cublaslt, "bindings", missing)
    assert main(["doctor", "--attention", "flash", "--mlp-epilogue", "cublaslt"]) == 0
    out = capsys.readouterr().out
    assert "cannot run: mlp: epilogue='cublaslt' needs nvmath-python" in out
    assert "T=256  cannot run: attention: backend='flash'" in out
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--mlp-epilogue", "fast"])
    assert "expected one of auto, separate, triton, cublaslt, found 'fast'" in capsys.readouterr().err


def test_package_that_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "1.0")
    assert (
        doctor.installed("no-such", "no_such_module")
        == "1.0, but does not import: No module named 'no_such_module'"
    )


def test_foreign_apex_is_not_taken_for_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not installed" in doctor.apex()
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    assert "unrelated" in doctor.apex()
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    assert doctor.apex() == "installed"
