"""Every kernel compiled for GPUs this machine does not have: no spills, wide accesses, tensor cores where meant."""

import pytest
import torch

from benchmarks.aot import CAPABILITIES, DTYPES, compile_all
from dit_fast.kernels.registry import REGISTRY

pytestmark = pytest.mark.skipif(
    __import__("triton").knobs.runtime.interpret, reason="interpreted functions cannot be compiled"
)
TOKEN_OPS = ("adaln_modulate", "gated_residual", "gated_residual_adaln")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", REGISTRY)
def test_compiles_without_spills(name, dtypes, capability) -> None:
    """At DiT-XL/2's shape: no local memory, little shared memory, and token tensors in 128-bit accesses.

    A row of 1152 is 1024 + 128 columns; the narrow accesses that remain are vectors of one row a sample, row
    statistics and partial sums, so they are few beside those of the tile, which are exactly counted.
    """
    kernels = compile_all(name, dtypes, capability)
    assert len(kernels) >= 2
    for kernel in kernels:
        assert kernel.spills == 0, f"{kernel.kernel} spills {kernel.spills} bytes"
        assert kernel.shared <= 64 * 1024
    if name in TOKEN_OPS:
        for kernel, tiles in zip(kernels, token_accesses(name, dtypes), strict=True):
            accesses = kernel.accesses()
            assert accesses.get("ld128", 0) >= tiles["ld"], (kernel.kernel, accesses)
            assert accesses.get("st128", 0) >= tiles["st"], (kernel.kernel, accesses)
            assert not {"st16", "st64", "ld64"} & accesses.keys(), (kernel.kernel, accesses)


def token_accesses(name: str, dtypes: str) -> list[dict[str, int]]:
    """128-bit accesses that a thread needs for the token tensors of one tile, forward and backward.

    8 rows (4 in float32) of 1152 columns on 128 threads are 9 accesses of 16-bit or of 4-row float32 tensors, 18 of
    8-row float32 tensors. The backward of the norm walks half of the main part at a time (4 + 1) and twice.
    """
    wide = {torch.bfloat16: 9, torch.float32: 9 if dtypes == "fp32" else 18}
    half = {torch.bfloat16: 5, torch.float32: 5 if dtypes == "fp32" else 10}
    stream, low = DTYPES[dtypes]
    if dtypes == "fp32":
        half = {torch.float32: 3}
    if name == "adaln_modulate":
        return [
            {"ld": wide[stream], "st": wide[low]},
            {"ld": 2 * (half[stream] + half[low]), "st": half[stream]},
        ]
    if name == "gated_residual":
        return [
            {"ld": wide[stream] + wide[low], "st": wide[stream]},
            {"ld": wide[stream] + wide[low], "st": wide[low]},
        ]
    return [
        {"ld": wide[stream] + wide[low], "st": wide[stream] + wide[low]},
        {"ld": 2 * (half[stream] + half[low]) + half[stream] + half[low], "st": half[stream] + half[low]},
    ]


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "mma"), (100, "tcgen05.mma")])
def test_patch_projection_uses_tensor_cores(capability, instruction) -> None:
    forward = compile_all("patch_embed", "bf16", capability)[0]
    assert instruction in forward.ptx
