"""The microbenchmarks: what they time, what they say of it, and that a wrong operation is never timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_ops, clock, peers
from benchmarks.bench_ops import Prepared, figures, work
from benchmarks.clock import Ceiling
from benchmarks.op_bench import Bench
from dit_fast.kernels.registry import REGISTRY

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's shapes and peers")
ROOT = Path(__file__).resolve().parents[1]
SHAPE = (2, 4, 64)


def test_every_operation_has_every_pass_and_provider() -> None:
    found = {(p.values[0], p.values[3], p.values[4]) for p in bench_ops.CASES}
    directions = ("forward", "backward", "both")
    assert found == {(n, d, p) for n in REGISTRY for d in directions for p in peers.providers_of(n)}


@pytest.mark.parametrize("provider", ["ours", "eager", "compiled", "layer_norm"])
def test_providers_agree(provider: str) -> None:
    spec = REGISTRY["adaln_modulate"]
    function = peers.providers_of("adaln_modulate")[provider](spec)
    assert Bench(spec, SHAPE, "fp32", "cpu").disagreement(function) is None


def test_passes_are_those_of_the_operation() -> None:
    spec = REGISTRY["gated_residual"]
    bench = Bench(spec, SHAPE, "fp32", "cpu")
    passes = bench.passes(spec.reference)
    outputs, expected = passes["forward"](), bench.run(spec.reference)
    assert torch.equal(outputs[0], expected[0])
    for name in ("backward", "both"):
        assert all(torch.equal(a, b) for a, b in zip(passes[name](), expected[1:], strict=True))


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PROVIDERS, "eager", lambda spec: lambda *args: 1.01 * spec.reference(*args))
    prepared = Prepared()
    for _ in range(2):
        with pytest.raises(
            pytest.fail.Exception, match=r"not timed: result 0 has a relative error of 1.00e-02"
        ):
            prepared.of("gelu", SHAPE, "fp32", "eager")


def test_a_missing_peer_is_skipped_with_its_reason() -> None:
    with pytest.raises(pytest.skip.Exception, match="apex"):
        Prepared().of("adaln_modulate", SHAPE, "fp32", "apex")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(peers.Missing, match="flash_attn_interface is not installed"):
        peers.providers_of("attention")["flash-attn-3"](REGISTRY["attention"])


def test_figures() -> None:
    """Rates at the median, and the limit is the longer of memory and products."""
    found = figures(3_000_000, 2e9, 1e-3, Ceiling(copy=6e9, product=1e13))
    assert (found["GB/s"], found["TFLOP/s"]) == (pytest.approx(3), pytest.approx(2))
    assert found["share of the ceiling"] == pytest.approx(0.5)
    assert figures(3_000, 2e9, 1e-3, Ceiling(6e9, 4e12))["share of the ceiling"] == pytest.approx(0.5)


def test_work() -> None:
    B, T, D = 2, 64, 384
    tokens = B * T * D * 4
    assert work(REGISTRY["gated_residual_adaln"], (B, T, D), 4, "both") == (10 * tokens, 0)
    products = 16 * B * T * D * D
    assert work(REGISTRY["mlp"], (B, T, D), 4, "both")[1] == 3 * products
    assert work(REGISTRY["attention"], (B, T, D), 2, "backward") == (7 * tokens // 2, 10 * B * T * T * D)


def test_ceiling_is_of_work_that_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "seconds", lambda function, repeats: [1.0, 2.0, 4.0])
    clock.ceiling.cache_clear()
    assert clock.ceiling(torch.float32) == Ceiling(copy=2**23, product=2 * 1024**3 / 2)
    clock.ceiling.cache_clear()


def test_device_instants_subtract_to_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        passed = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.passed += 3
            self.at = Event.passed
            self.waited = False

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, later: "Event") -> float:
            assert later.waited
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    earlier = clock.DeviceInstant()
    assert clock.DeviceInstant() - earlier == pytest.approx(3e-3)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One case through pytest-benchmark; the JSON says what was measured, on what, and how far from the limit."""
    # pytest-benchmark times nothing in a worker of pytest-xdist, which it knows by this.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    out = tmp_path / "out.json"
    case = "test_op[gated_residual-2x64x384-fp32-forward-eager]"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        f"benchmarks/bench_ops.py::{case}",
        f"--benchmark-json={out}",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    data = json.loads(out.read_text())
    (found,) = data["benchmarks"]
    info = found["extra_info"]
    assert {key: info[key] for key in ("op", "shape", "dtypes", "direction", "provider", "bytes")} == {
        "op": "gated_residual",
        "shape": [2, 64, 384],
        "dtypes": "fp32",
        "direction": "forward",
        "provider": "eager",
        "bytes": 3 * 2 * 64 * 384 * 4,
    }
    assert info["GB/s"] == pytest.approx(info["bytes"] / found["stats"]["median"] * 1e-9)
    assert found["stats"]["rounds"] == bench_ops.ROUNDS
    assert data["machine_info"]["dit_fast"]["torch"] == torch.__version__
