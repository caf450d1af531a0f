"""The microbenchmarks: what they time, what they say of it, and that a wrong operation is never timed."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import clock, conftest
from benchmarks.clock import Ceiling, Timed, in_turn
from benchmarks.ops import bench_ops, op_bench, operations, peers
from benchmarks.ops.bench_ops import Measured, report
from benchmarks.ops.op_bench import Bench, OptimizerBench
from benchmarks.ops.operations import Wrong, figures, time_operation, time_optimizers, work
from benchmarks.ops.peers import Missing
from benchmarks.ops.registry import REGISTRY
from benchmarks.ops.rows import Recorder, Row, read_results
from dit_fast.models import DiT_models
from tests.patience import PATIENCE

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's shapes and peers")
ROOT = Path(__file__).resolve().parents[2]
SHAPE = (2, 4, 64)


def test_every_operation_has_every_pass_and_provider() -> None:
    found = {(p.values[0], p.values[3], p.values[4]) for p in bench_ops.CASES}
    directions = ("forward", "backward", "both")
    assert found == {(n, d, p) for n in REGISTRY for d in directions for p in peers.providers_of(n)}


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        *(("adaln_modulate", provider) for provider in ("ours", "eager", "compiled", "layer_norm")),
        ("adaln_modulate-rmsnorm", "compiled"),
        ("adaln_modulate-rmsnorm", "rms_norm"),
    ],
)
def test_providers_agree(name: str, provider: str) -> None:
    spec = REGISTRY[name]
    function = peers.providers_of(name)[provider](spec)
    assert Bench(spec, SHAPE, "fp32", "cpu").disagreement(function) is None


def test_passes_are_those_of_the_operation() -> None:
    spec = REGISTRY["gated_residual"]
    bench = Bench(spec, SHAPE, "fp32", "cpu")
    passes = bench.passes(spec.reference)
    outputs, expected = passes["forward"].run(), bench.run(spec.reference)
    assert torch.equal(outputs[0], expected[0])
    for name in ("backward", "backward", "both"):
        found = passes[name].run(*passes[name].before())
        assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True))


FORWARD = [("eager", "forward")]


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PROVIDERS, "eager", lambda spec: lambda *args: 1.01 * spec.reference(*args))
    found = time_operation("gelu", SHAPE, "fp32", [("ours", "forward"), *FORWARD], rounds=2)
    assert len(found["ours", "forward"]) == 2
    assert isinstance(found["eager", "forward"], Wrong)
    assert str(found["eager", "forward"]).startswith("not timed: result 0 has a relative error of 1.00e-02")


def test_cases_are_timed_in_turn() -> None:
    """Every case in every round, each with what it needs made before; one that fails does not stop the others."""
    done: list[str] = []

    def fail() -> None:
        done.append("b")
        if done.count("b") == 3:
            raise RuntimeError("third")

    cases = {
        "a": Timed(done.append, before=lambda: ("a",)),
        "b": Timed(fail),
        "c": Timed(lambda: done.append("c")),
    }
    found = in_turn(cases, rounds=3, warmup=1)
    assert "".join(done) == "abcabcabcac"
    assert [len(found[key]) for key in "ac"] == [3, 3]
    assert isinstance(found["b"], RuntimeError)
    done.clear()
    with pytest.raises(RuntimeError, match="third"):
        clock.seconds(fail, 5)


def item(test: str, **params: object) -> SimpleNamespace:
    return SimpleNamespace(originalname=test, callspec=SimpleNamespace(params=params))


def test_what_pytest_has_selected_is_measured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(bench_ops, "time_operation", lambda *a: asked.append(a) or {"operation": a})
    monkeypatch.setattr(bench_ops, "time_optimizers", lambda wanted: asked.append(wanted) or {})
    case = {"shape": SHAPE, "dtypes": "fp32", "direction": "both"}
    items = [item("test_op", name=n, provider=p, **case) for n in ("gelu", "mlp") for p in ("ours", "eager")]
    measured = Measured([*items, item("test_adamw_ema", provider="ours"), SimpleNamespace()])
    for _ in range(2):
        measured.operation("mlp", SHAPE, "fp32")
    measured.optimizers()
    assert asked == [("mlp", SHAPE, "fp32", [("ours", "both"), ("eager", "both")]), ["ours"]]


CASE = ("gelu", SHAPE, "fp32", "eager", "forward")


class Benchmark:
    """pytest-benchmark's fixture, as far as it is used."""

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}
        self.times: list[float] = []

    def pedantic(self, function, rounds: int) -> None:
        for _ in range(rounds):
            start = bench_ops.REPLAY()
            function()
            self.times.append(bench_ops.REPLAY() - start)


def test_a_case_leaves_a_row() -> None:
    rows: list[Row] = []
    benchmark = Benchmark()
    report(CASE, [1e-3, 2e-3, 4e-3], 4_000_000, 0.0, benchmark, rows.append)
    (row,) = rows
    assert row.key == ("op", *CASE)
    assert (row.median, row.repeats, row.failed) == (2e-3, 3, None)
    assert row.metrics["GB/s"] == pytest.approx(2)
    assert benchmark.times == [1e-3, 2e-3, 4e-3]
    assert benchmark.extra_info["GB/s"] == row.metrics["GB/s"]


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (Missing("no such peer"), pytest.skip.Exception, "no such peer"),
        (
            torch.OutOfMemoryError("out of memory: 1 GB\nlong story"),
            pytest.skip.Exception,
            "out of memory: 1 GB",
        ),
        (Wrong("not timed: result 0"), pytest.fail.Exception, "not timed: result 0"),
        (RuntimeError("launch failed"), RuntimeError, "launch failed"),
        (KeyError(), KeyError, "KeyError"),
    ],
)
def test_a_case_that_fails_leaves_its_reason_and_no_figure(error, outcome, reason: str) -> None:
    rows: list[Row] = []
    benchmark = Benchmark()
    with pytest.raises(outcome):
        report(CASE, error, 1, 0.0, benchmark, rows.append)
    (row,) = rows
    assert (row.failed, row.median, dict(row.metrics)) == (reason, None, {})
    assert "GB/s" not in benchmark.extra_info


def test_a_missing_peer_has_its_reason() -> None:
    found = time_operation("adaln_modulate", SHAPE, "fp32", [("apex", "forward"), ("apex", "both")])
    assert {str(error) for error in found.values()} == {"apex needs a CUDA device"}
    assert str(time_optimizers(["apex"])["apex"]).startswith("--optimizer apex")


@pytest.mark.parametrize("provider", ["ours", "torch"])
def test_optimizers_agree(provider: str) -> None:
    assert OptimizerBench("DiT-S/8", "cpu").disagreement(provider) is None


def test_a_wrong_optimiser_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, make = OptimizerBench("DiT-S/8", "cpu"), op_bench.make_optimizer

    def other(name, parameters, **options):
        return make("torch", parameters, **{**options, "weight_decay": 0.02 if name == "ours" else 0.01})

    monkeypatch.setattr(op_bench, "make_optimizer", other)
    assert bench.disagreement("torch") is None
    assert "relative error" in bench.disagreement("ours")


def test_optimiser_step_counts_the_parameters_of_the_model() -> None:
    bench = OptimizerBench("DiT-S/8", "cpu")
    assert bench.count == sum(p.numel() for p in DiT_models["DiT-S/8"]().parameters() if p.requires_grad)
    bench.shapes = bench.shapes[:3]
    bench.step("torch").run()


@pytest.mark.parametrize(
    ("operation", "provider", "module", "function"),
    [
        ("mlp", "apex", "apex.fused_dense.fused_dense", "fused_dense_gelu_dense_function"),
        ("mlp", "quack", "quack.mlp", "mlp_func"),
    ],
)
def test_products_of_peers(
    operation: str, provider: str, module: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PyTorch in the package's place: its function is given what makes it the operation."""

    def apex(x, fc1, bias1, fc2, bias2):
        return F.linear(F.gelu(F.linear(x, fc1, bias1), approximate="tanh"), fc2, bias2)

    def quack(x, fc1, fc2, activation: str, bias1):
        assert activation == "gelu_tanh_approx"
        return apex(x, fc1, bias1, fc2, None)

    stand_in = SimpleNamespace(**{function: {"apex": apex, "quack": quack}[provider]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, module, stand_in)
    built = peers.providers_of(operation)[provider](REGISTRY[operation])
    monkeypatch.undo()
    assert Bench(REGISTRY[operation], SHAPE, "fp32", "cpu").disagreement(built) is None


def test_swiglu_of_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(apply=lambda gate, value: F.silu(gate) * value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(
        sys.modules, "liger_kernel.ops.swiglu", SimpleNamespace(LigerSiLUMulFunction=stand_in)
    )
    built = peers.providers_of("swiglu")["liger"](REGISTRY["swiglu"])
    monkeypatch.undo()
    assert Bench(REGISTRY["swiglu"], SHAPE, "fp32", "cpu").disagreement(built) is None


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
    assert clock.ceiling(torch.float32) == Ceiling(copy=2 * 2**23, product=2 * 1024**3)
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
    missing = "test_op[attention-2x64x384-fp32-forward-flash-attn-2]"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        f"benchmarks/ops/bench_ops.py::{case}",
        f"benchmarks/ops/bench_ops.py::{missing}",
        f"--benchmark-json={out}",
        f"--results={tmp_path}",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE)
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
    assert found["stats"]["rounds"] == operations.ROUNDS
    assert data["machine_info"]["dit_fast"]["torch"] == torch.__version__
    (path,) = tmp_path.glob("*/*.json")
    timed, failed = read_results(path).rows
    assert (timed.case, timed.median) == ("gated_residual", found["stats"]["median"])
    assert timed.metrics["GB/s"] == info["GB/s"]
    assert failed.failed == "flash_attn needs a CUDA device"


def test_a_file_that_is_none_is_refused_before_anything_is_timed(tmp_path: Path) -> None:
    path = Recorder(tmp_path).path
    path.write_text("{")
    config = SimpleNamespace(getoption=lambda *_: tmp_path, stash={})
    with pytest.raises(pytest.UsageError, match=f"{path} is no result file"):
        conftest.pytest_configure(config)
    path.unlink()
    conftest.pytest_configure(config)
    assert config.stash[conftest.RECORDER].path == path


def test_the_host_has_a_lead_over_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is emptied first, then the device waits: what is timed finds it neither warm nor idle."""
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(clock, "_flush_buffer", lambda: SimpleNamespace(zero_=lambda: done.append("flush")))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(cycles), raising=False)
    clock.cold()
    assert done == ["flush", clock.LEAD_CYCLES]
