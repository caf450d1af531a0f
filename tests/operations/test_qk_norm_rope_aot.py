"""`qk_norm_rope` compiled for GPUs that this machine does not have: registers, spills, widths of accesses."""

import pytest
import torch
import triton

from benchmarks.compile.aot import Compiled, ahead_of_time
from dit_fast.kernels import qk_norm_rope

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="interpreted functions cannot be compiled"
)
STREAMS = ("qkv_ptr", "out_ptr", "dout_ptr", "dqkv_ptr")


def compiled(capability: int, H: int, K: int, dtype: torch.dtype, norm: bool, turn: bool) -> list[Compiled]:
    """Forward and backward kernel, with a bias."""

    def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta").requires_grad_()

    def run() -> None:
        packed, rotation = 3 * H * K, meta(1, 256, K // 2, 2) if turn else None
        qkv = meta(256, 256, packed, dtype=dtype)
        out = qk_norm_rope(qkv, H, meta(packed), meta(2, K) if norm else None, rotation, kernels="triton")
        out.backward(torch.empty_like(out))

    return ahead_of_time(run, capability)


@pytest.mark.parametrize(
    ("capability", "H", "K", "dtype", "norm", "turn"),
    [
        (90, 16, 72, torch.bfloat16, True, True),
        (100, 12, 64, torch.bfloat16, True, True),
        (90, 6, 64, torch.bfloat16, False, True),
        (90, 5, 96, torch.float32, True, True),
        (90, 8, 128, torch.bfloat16, True, False),
    ],
)
def test_hard_lines(capability: int, H: int, K: int, dtype: torch.dtype, norm: bool, turn: bool) -> None:
    """No spills; 128-bit accesses but for the 8 columns that 72 has beyond 64, in 16 bits; no float64."""
    kernels = compiled(capability, H, K, dtype, norm, turn)
    assert [kernel.kernel for kernel in kernels] == ["_qk_norm_rope_fwd_kernel", "_qk_norm_rope_bwd_kernel"]
    for kernel in kernels:
        assert kernel.spills == 0
        assert kernel.occupancy() > 0
        assert not kernel.float64()
        accesses = kernel.accesses_by_tensor()
        assert "?" not in accesses
        for name in accesses.keys() & set(STREAMS):
            counts = {int(width[2:]): count for width, count in accesses[name].items()}
            tail = K == 72 and dtype.itemsize == 2
            assert counts.keys() == ({128, 64} if tail else {128}), (kernel.kernel, name, counts)
            assert not tail or counts[128] == 4 * counts[64]
