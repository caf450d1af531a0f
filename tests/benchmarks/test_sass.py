"""What is read off machine code: barriers and instructions of the main loop, loads that are in flight."""

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.compile.aot import compile_launch
from benchmarks.compile.sass import Figures, figures
from dit_fast.kernels.launch import launch, record_launches

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000e300000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x0 */
        /*0020*/              @!P0 BRA 0x00b0 ;                          /* 0x0 */
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ; /* 0x0 */
        /*0040*/                   LDG.E.128 R12, desc[UR4][R2.64] ;     /* 0x0 */
        /*0050*/                   FADD R16, R5, R5 ;                    /* 0x0 */
        /*0060*/                   LDG.E.128 R20, desc[UR4][R2.64] ;     /* 0x0 */
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;         /* 0x0 */
        /*0080*/                   FADD R16, R11, R12 ;                  /* 0x0 */
        /*0090*/                   FADD R16, R16, R20 ;                  /* 0x0 */
        /*00a0*/               @P1 BRA 0x30 ;                            /* 0x0 */
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;         /* 0x0 */
        /*00c0*/                   EXIT ;                                /* 0x0 */
        /*00d0*/                   FADD R16, R16, R16 ;                  /* 0x0 */
        /*00e0*/                   BRA 0x20 ;                            /* 0x0 */
        /*00f0*/                   BRA 0xf0;                             /* 0x0 */
        /*0100*/                   NOP;                                  /* 0x0 */
"""


def test_of_a_listing() -> None:
    """The loop goes from 0x30 to 0xa0; the branch back behind the exit is none of it."""
    assert figures(LISTING) == Figures(tile=8, once=8, barriers=1, loads_in_flight=3)


def test_without_a_loop_the_code_is_one_tile() -> None:
    straight = LISTING.replace("@P1 BRA 0x30", "@P1 BRA 0xb0")
    assert figures(straight) == Figures(tile=0, once=16, barriers=2, loads_in_flight=3)


def test_asynchronous_copies_are_in_flight_until_they_are_waited_for() -> None:
    copy = "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]"
    code = [copy, copy, "LDGDEPBAR", copy, "LDGDEPBAR", "DEPBAR.LE SB0, 0x1", copy, "EXIT"]
    lines = (f"/*{16 * number:04x}*/ {one} ; /* 0x0 */" for number, one in enumerate(code))
    assert figures("\n".join(lines)).loads_in_flight == 3


@triton.jit
def _walking_kernel(x_ptr, y_ptr, tiles, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    for tile in range(tiles):
        x = tl.load(x_ptr + tile * SIZE + offsets)
        tl.store(y_ptr + tile * SIZE + offsets, x - tl.sum(x, axis=0))


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="interpreted functions cannot be compiled")
@pytest.mark.parametrize(("num_warps", "crosses_warps"), [(1, False), (4, True)])
def test_of_a_kernel(num_warps: int, crosses_warps: bool) -> None:
    """A sum over one warp needs no barrier; every thread has 8 values, two loads of 128 bits, in flight at once."""
    x = torch.empty(1 << 20, device="meta")
    with record_launches(90) as launches:
        launch(
            _walking_kernel, (1,), on=x, num_warps=num_warps, x_ptr=x, y_ptr=x, tiles=32, SIZE=256 * num_warps
        )  # fmt: skip
    found = compile_launch(launches[0], 90).figures()
    assert (found.barriers > 0) == crosses_warps
    assert found.loads_in_flight >= 2
    assert found.tile > 8
    assert found.once > 0
