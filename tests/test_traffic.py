"""The traffic count: Inductor's and ours at a small shape, what the rules count, and what it says when it cannot."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dit_fast.kernels  # noqa: F401  (registers the operations)
from benchmarks.plain_dit import PlainAttention, PlainBlock
from benchmarks.traffic import Program, Traffic, count, report
from benchmarks.traffic.fake_cuda import SUPPORTED_TORCH

SMALL = {"batch": 32, "tokens": 64, "width": 128, "heads": 2}
U = Program("", **SMALL).unit


class DoubledAttention(PlainAttention):
    """Attention with one elementwise pass that nothing can be fused with: it stands between two library calls."""

    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(2 * out.transpose(1, 2).reshape(N, T, D))


def with_extra_pass(program: Program):
    """Factory of the negative control."""
    from benchmarks.traffic.blocks import chain

    def block() -> PlainBlock:
        made = PlainBlock(program.width, program.heads, 4.0)
        made.attn = DoubledAttention(program.width, program.heads)
        return made

    return chain(program, block, lazy=False)


@pytest.fixture(scope="module")
def counted() -> dict[str, Traffic]:
    """One block and two of each kind, counted in one process."""
    version = torch.__version__
    if not version.startswith(f"{SUPPORTED_TORCH}.") or torch.version.cuda is not None:
        pytest.skip(
            f"Inductor's internals are read as they are in torch {SUPPORTED_TORCH} for the CPU, not {version}"
        )
    sides = {
        "plain": "benchmarks.traffic.blocks:plain",
        "ours": "benchmarks.traffic.blocks:dit_fast",
        "extra": "tests.test_traffic:with_extra_pass",
    }
    wanted = [("plain", 1), ("plain", 2), ("ours", 1), ("ours", 2), ("extra", 1)]
    programs = [Program(sides[side], mode="bf16", blocks=blocks, **SMALL) for side, blocks in wanted]
    found = count(programs)
    return {f"{side}{blocks}": traffic for (side, blocks), traffic in zip(wanted, found, strict=True)}


@pytest.mark.slow
def test_inductor_and_ours(counted: dict[str, Traffic]) -> None:
    """Per block, in U: the plain block's known passes, and ours with the same products and attention."""
    plain, fused = counted["plain2"] - counted["plain1"], counted["ours2"] - counted["ours1"]
    print(report.row("bf16", "plain", plain, U), report.row("bf16", "ours", fused, U), sep="\n")


@pytest.mark.slow
def test_an_extra_pass_costs_exactly_its_bytes(counted: dict[str, Traffic]) -> None:
    """One pass more reads and writes one token tensor each way, and keeps its result."""
    plain, extra = counted["plain1"], counted["extra1"]
    difference = extra - plain
    assert {phase: difference.moved(phase) for phase in ("forward", "backward")} == {
        "forward": 2 * U,
        "backward": 2 * U,
    }
    assert [difference.launches(phase) for phase in ("forward", "backward")] == [1, 1]
    assert difference.kept == U


@pytest.mark.slow
def test_the_caller_is_left_as_it_was(counted: dict[str, Traffic]) -> None:
    assert counted["plain1"].launches() > 0
    assert not torch.cuda.is_available()
    assert torch.cuda.get_device_properties.__module__ == "torch.cuda"
