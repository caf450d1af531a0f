"""The attention kernels compiled for GPUs that are not there: the configurations that are closest to spilling.

benchmarks/results/static_report.md has all head widths, lengths and architectures; here is one of each kind of tile.
"""

import pytest
import torch
import triton

from benchmarks.compile.aot import Compiled, compile_launch
from benchmarks.compile.static_report import broken_lines
from dit_fast.kernels import attention
from dit_fast.kernels.attention import long as attention_long
from dit_fast.kernels.attention import short as attention_short
from dit_fast.kernels.launch import Launch, record_launches
from tests.architectures import sm_90_first

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="interpreted functions cannot be compiled"
)
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
FORWARD, QUERIES, KEYS = "long_fwd", "long_bwd_queries", "long_bwd_keys"


def recorded(
    capability: int, dtype: torch.dtype, T: int, K: int, B: int = 8, H: int = 16
) -> dict[str, Launch]:
    """What forward and backward pass launch, by the kernels' short names."""
    qkv = torch.empty(B, T, 3 * H * K, dtype=dtype, device="meta", requires_grad=True)
    bias = torch.empty(3 * H * K, device="meta", requires_grad=True)
    with record_launches(capability) as launches:
        out = attention(qkv, H, bias, kernels="triton")
        torch.autograd.backward(out, torch.empty_like(out))
    return {
        launch.kernel.fn.__name__.removeprefix("_attention_").removesuffix("_kernel"): launch
        for launch in launches
    }


def compiled(capability: int, dtype: torch.dtype, T: int, K: int, name: str) -> Compiled:
    launch = recorded(capability, dtype, T, K)[name]
    kernel = compile_launch(launch, capability)
    assert list(broken_lines(kernel, launch)) == []
    return kernel


@pytest.mark.parametrize(
    ("capability", "dtype", "T", "K", "name", "instructions"),
    sm_90_first(
        [
            # 200 and 1000 tokens fill no tile: masks take registers.
            (80, BF16, 1000, 80, KEYS, {"HMMA"}),
            (80, BF16, 1000, 128, FORWARD, {"HMMA"}),
            (80, BF16, 1000, 128, KEYS, {"HMMA"}),
            (90, BF16, 64, 72, "short_bwd", {"HGMMA"}),
            # 32 queries are fewer rows than wgmma and tcgen05 have: d_q is a product by HMMA.
            (90, BF16, 200, 96, "short_bwd", {"HGMMA", "HMMA"}),
            (100, BF16, 200, 72, "short_bwd", {"UTCHMMA", "HMMA"}),
            (90, BF16, 1000, 128, KEYS, {"HGMMA"}),
            (100, FP32, 200, 128, KEYS, set()),
        ]
    ),
    ids=lambda value: str(value).removeprefix("torch.") if isinstance(value, (int, str, torch.dtype)) else "",
)
def test_hard_lines(capability, dtype, T, K, name, instructions) -> None:
    """No spills, shared memory that fits, a block that fits, and the tensor cores of the architecture."""
    kernel = compiled(capability, dtype, T, K, name)
    assert kernel.spills == 0
    assert kernel.occupancy() > 0
    assert kernel.tensor_core().keys() == instructions


@pytest.mark.parametrize(
    ("capability", "dtype", "T", "K", "short"),
    [
        (90, BF16, 256, 72, True),
        (100, torch.float16, 1, 96, True),
        (90, BF16, 257, 72, False),
        (90, BF16, 256, 104, False),
        (100, FP32, 64, 72, False),
        (90, FP64, 64, 72, False),
        (80, BF16, 256, 72, False),
        (120, BF16, 256, 72, False),
    ],
)
def test_short_kernels_run_where_their_operands_are_in_shared_memory(capability, dtype, T, K, short) -> None:
    names = recorded(capability, dtype, T, K).keys()
    assert names == ({"short_fwd", "short_bwd"} if short else {FORWARD, QUERIES, KEYS})


@pytest.mark.parametrize("K", range(8, 136, 8))
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_launch_covers_all_tokens_and_splits_the_head(capability, K) -> None:
    """Grids times tiles are the tokens, parts of a head its columns; no compilation."""
    for T in (1, 64, 200, 256, 1000, 16384):
        for name, launch in recorded(capability, BF16, T, K, B=3, H=5).items():
            values = launch.arguments
            assert values["MAIN"] + values["TAIL"] >= K > values["MAIN"] * (values["TAIL"] > 0)
            assert values["MAIN"] + values["TAIL"] <= max(16, triton.next_power_of_2(K))
            side = {FORWARD: "BLOCK_M", QUERIES: "BLOCK_M", KEYS: "BLOCK_N"}.get(name)
            if name == "short_bwd":
                assert launch.grid == (3 * 5,)
                assert values["KEY_TILES"] * values["BLOCK_N"] >= T
            else:
                tile = values[side] if side else values["BLOCK_M"] * values["STEPS"]
                assert launch.grid == (3 * 5 * triton.cdiv(T, tile),)
                assert values["TILES"] == triton.cdiv(T, tile)


def test_a_launch_is_a_function_of_the_shape() -> None:
    """The order of every sum is: two recordings give the same tiles, and the batch has no say in the backward pass."""
    for capability in (80, 90, 100):
        for T in (256, 1024):
            first, second = (recorded(capability, BF16, T, 72, B=B) for B in (8, 64))
            for name in first.keys() - {"short_fwd"}:
                tiles = [
                    {key: launch.arguments[key] for key in ("BLOCK_M", "BLOCK_N", "EVEN")}
                    for launch in (first[name], second[name])
                ]
                assert tiles[0] == tiles[1]
    assert attention_long.long_launch("keys", BF16, 1024, 72, 90) == attention_long.LongLaunch(64, 128, 8, 2)
    assert attention_short.backward_launch(256, 72) == attention_short.ShortLaunch(32, 128, 8, 1)


def test_a_view_beyond_32_bit_offsets_is_copied() -> None:
    """Rows far apart: offsets within a sample are 32-bit, so the kernels must not read such a view in place."""
    base = torch.empty(1, device="meta")
    for stride, copied in ((2**28, True), (2**28 - 2**10, False)):
        view = base.as_strided((1, 9, 216), (9 * stride, stride, 1))
        got, strides = attention_long.read_in_place(view)
        assert (got is not view) == copied
        assert strides["stride_t8"] * 8 == (216 if copied else stride)
