"""Every kernel compiled for GPUs that this machine does not have: the hard lines, and that breaking one is noticed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.compile import static_report
from benchmarks.compile.aot import Compiled, compile_launch
from benchmarks.compile.static_report import CASES, STEPS, Case, broken_lines, examine, main, small_settings
from benchmarks.compile.static_table import Row, Traffic, markdown
from benchmarks.ops.registry import EVERY, REGISTRY, OpSpec
from dit_fast.kernels.launch import Launch, launch, record_launches
from tests.architectures import sm_90_first

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="interpreted functions cannot be compiled"
)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


SETTINGS = small_settings((*REGISTRY, *STEPS))


@pytest.mark.parametrize(
    ("capability", "setting"),
    sm_90_first((setting.capability, setting) for setting in SETTINGS),
    ids=[setting.describe(CASES.get(setting.op, (Case(),))[setting.case]) for setting in SETTINGS],
)
def test_hard_lines(capability, setting) -> None:
    """No spills, no float64, shared memory that fits, 128-bit accesses to token tensors, tensor cores for products."""
    rows, _ = examine(setting)
    assert {row.direction for row in rows} == ({"step"} if setting.op in STEPS else {"forward", "backward"})
    assert static_report.failures(rows) == []


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x - tl.sum(x, axis=0))


@triton.jit
def _float64_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y_ptr + offsets, (tl.load(x_ptr + offsets) * tl.full([SIZE], 1e-6, tl.float64)).to(tl.float32))


@triton.jit
def _narrow_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets + 2))


@triton.jit
def _product_kernel(x_ptr, y_ptr, K, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, K, SIZE):
        left = tl.load(x_ptr + rows * K + start + columns)
        right = tl.load(y_ptr + (start + rows) * SIZE + columns)
        total = tl.dot(left, right, total)
    tl.store(y_ptr + rows * SIZE + columns, total.to(y_ptr.dtype.element_ty))


def compiled(kernel, x, y, capability: int = 90, num_warps: int = 4, **arguments) -> tuple[Compiled, Launch]:
    with record_launches(capability) as launches:
        launch(kernel, (1,), on=x, num_warps=num_warps, x_ptr=x, y_ptr=y, **arguments)
    return compile_launch(launches[0], capability), launches[0]


def vector(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def test_a_spill_is_noticed() -> None:
    kernel, recorded = compiled(_spilling_kernel, vector(16384), vector(16384), num_warps=1, SIZE=16384)
    assert kernel.spills > 0
    assert list(broken_lines(kernel, recorded)) == [f"spills {kernel.spills} bytes a thread"]


def test_float64_is_noticed() -> None:
    kernel, recorded = compiled(_float64_kernel, vector(4096), vector(4096), SIZE=1024)
    (line,) = broken_lines(kernel, recorded)
    assert line.startswith("computes in float64: ")
    assert "DMUL" in line


def test_a_narrow_access_is_noticed() -> None:
    kernel, recorded = compiled(_narrow_kernel, vector(4096), vector(4096), SIZE=1024)
    assert kernel.accesses_by_tensor() == {"x_ptr": {"ld64": 4}, "y_ptr": {"st128": 2}}
    assert list(broken_lines(kernel, recorded)) == ["moves x by ld64, expected 128 bits"]


def test_oversized_shared_memory_is_noticed() -> None:
    x, y = vector(128 * 1024, torch.bfloat16), vector(1024 * 128, torch.bfloat16)
    kernel, recorded = compiled(_product_kernel, x, y, num_warps=8, num_stages=5, K=1024, SIZE=128)
    assert kernel.shared > 227 * 1024
    assert list(broken_lines(kernel, recorded)) == [
        f"takes {kernel.shared} bytes of shared memory, a block has 232448"
    ]


def test_a_block_that_fits_no_multiprocessor_is_noticed() -> None:
    """255 registers on 16 warps are twice the 64 Ki of a multiprocessor: such a kernel compiles and cannot run."""
    kernel, recorded = compiled(_narrow_kernel, vector(4096), vector(4096), SIZE=1024)
    lines = broken_lines(replace(kernel, registers=255, num_warps=16), recorded)
    assert next(lines) == "fits no multiprocessor: 255 registers a thread on 16 warps"


def test_exempt_kernels_are_named_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's scalars may be float64; without the exemption they break the line, so it is still needed."""
    setting = static_report.Setting("adamw_ema", 0, "fp32", 384, 90)
    rows, _ = examine(setting)
    doubles = {row.kernel for row in rows if row.float64}
    assert doubles == static_report.FLOAT64.keys()
    assert static_report.failures(rows) == []
    monkeypatch.setattr(static_report, "FLOAT64", {})
    monkeypatch.setattr(static_report, "NARROW", {})
    broken = {row.kernel: row.broken for row in examine(setting)[0]}
    assert any("computes in float64" in line for line in broken["_adamw_scalars_kernel"])
    assert all("128 bits" in " ".join(lines) for lines in broken.values())


@pytest.mark.parametrize(("capability", "name"), sm_90_first([(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")]))
def test_a_product_without_tensor_cores_is_noticed(capability, name) -> None:
    x, y = vector(64 * 256, torch.bfloat16), vector(256 * 64, torch.bfloat16)
    kernel, recorded = compiled(_product_kernel, x, y, capability, K=256, SIZE=64)
    assert kernel.products() == {"bf16"}
    assert kernel.tensor_core().keys() == {name}
    assert list(broken_lines(kernel, recorded)) == []
    other, _ = compiled(_narrow_kernel, x, y, capability, SIZE=1024)
    lines = list(broken_lines(replace(kernel, cubin=other.cubin), recorded))
    assert lines[-1].startswith("multiplies with tensor-core instructions none, expected ")
    assert lines[0].startswith("was assembled to ")


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "capability", "occupancy"),
    [
        (32, 0, 4, 90, 1.0),
        # 255 registers are allocated as 256: 8 warps of 8192 registers.
        (255, 0, 4, 90, 8 / 64),
        # 72 registers are 2304 a warp: 7 warps on each of the four schedulers, so 7 blocks of 4.
        (72, 0, 4, 80, 28 / 64),
        # 100 KiB and 1 KiB for the driver: two blocks in 228 KiB, one in 164 KiB.
        (32, 100 * 1024, 4, 90, 8 / 64),
        (32, 100 * 1024, 4, 80, 4 / 64),
        # 32 blocks a multiprocessor.
        (32, 0, 1, 100, 32 / 64),
    ],
)
def test_occupancy(registers, shared, num_warps, capability, occupancy) -> None:
    kernel = Compiled("k", capability, num_warps, registers, 0, shared, (), "", "", b"")
    assert kernel.occupancy() == occupancy


def planted(x: torch.Tensor, kernels: str) -> torch.Tensor:
    """An operation whose kernel reads its tokens 64 bits at a time."""
    launch(_narrow_kernel, (1,), on=x, num_warps=4, x_ptr=x, y_ptr=torch.empty_like(x), SIZE=1024)
    return x * 2


@pytest.fixture
def with_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = OpSpec(
        "planted",
        planted,
        lambda x: x * 2,
        lambda shape, stream, low, make: (make(*shape, dtype=torch.float32),),
        lambda B, T, D: 2 * B * T * D,
        lambda B, T, D: 0,
    )
    monkeypatch.setitem(EVERY, "planted", spec)


@pytest.mark.usefixtures("with_planted")
def test_check_names_each_broken_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--op", "planted", "--width", "384", "--dtypes", "fp32", "--jobs", "1", "--check"]
    assert main(command) == 1
    expected = "planted forward, narrow_kernel, fp32, D = 384, sm_{}: moves x by ld64, expected 128 bits"
    assert capsys.readouterr().out.splitlines() == [expected.format(sm) for sm in (80, 90, 100)]


def test_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "--op gated_residual --width 384 --dtypes bf16 --capability 90 --jobs 1 --check --out"
    assert main([*command.split(), str(tmp_path)]) == 0
    assert capsys.readouterr().out == "2 kernels, no hard line broken\n"
    data = json.loads((tmp_path / "static_report.json").read_text())
    forward, backward = data["traffic"]
    tokens = 256 * 256 * 384 * 2
    assert (forward["least"], backward["least"]) == (3 * tokens, 3 * tokens)
    # The gate (a strided view of the modulation) and the bias come on top.
    assert forward["moved"] == 3 * tokens + 256 * 384 * 2 + 384 * 2
    table = (tmp_path / "static_report.md").read_text()
    assert "2 kernels compiled, 0 break a hard line." in table
    assert "| gated_residual | forward | gated_residual_fwd | 1 |" in table
    assert "| gated_residual | forward | gated_residual_fwd | bf16 | 384 | 1 |" in table


def test_committed_table_is_that_of_the_committed_figures() -> None:
    data = json.loads((RESULTS / "static_report.json").read_text())
    rows = [Row(**{**row, "broken": tuple(row["broken"])}) for row in data["kernels"]]
    traffic = [Traffic(**item) for item in data["traffic"]]
    assert (RESULTS / "static_report.md").read_text() == markdown(rows, traffic, data["versions"]["triton"])
    assert {row.capability for row in rows} == {80, 90, 100}
    assert {row.width for row in rows} == {384, 768, 1024, 1152}
    assert {row.op for row in rows} == {*EVERY, *STEPS}
    assert static_report.failures(rows) == []
