"""`dit-fast doctor` says what is there and which path runs, on any machine."""

import sys
import types

import pytest

from dit_fast.cli import doctor, main


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
    assert findings["attention T=256"].split(":")[0] in ("sdpa", "triton", "flash")
    assert len(findings["attention T=256"].split(":")[1]) > 10


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
