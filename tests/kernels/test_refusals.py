"""K8: what does not fit is refused before a launch, in one line that names the argument, under fake tensors too."""

import pytest
import torch

from benchmarks.ops.registry import REGISTRY, OpSpec
from dit_fast.kernels.library import MAX_WIDTH
from tests.kernels.proofs import (
    DEVICE,
    OPS,
    assert_refused,
    draw,
    limits_its_width,
    refuses_misfits,
    strangers,
)

HOLDS_A_ROW = ("adaln_modulate", "gated_residual", "gated_residual_adaln")


@OPS
def test_misfits_are_refused(spec: OpSpec) -> None:
    refuses_misfits(spec)


@OPS
@pytest.mark.parametrize("kind", ["dtype", "device"])
def test_strangers_are_refused(spec: OpSpec, kind: str) -> None:
    for what, name, inputs in strangers(spec):
        if what == kind:
            assert_refused(spec, inputs, f"{what} of {name}")


@OPS
def test_unknown_switch_is_refused(spec: OpSpec) -> None:
    inputs = spec.make_inputs((1, 4, 72), torch.float32, torch.float32, draw)
    with pytest.raises(ValueError, match=r"kernels='cuda': choose one of 'auto', 'triton', 'reference'"):
        spec.op(*inputs, kernels="cuda")


@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual_adaln"])
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_unknown_norm_is_refused(name: str, kernels: str) -> None:
    inputs = REGISTRY[name].make_inputs((1, 4, 72), torch.float32, torch.float32, draw)
    with pytest.raises(ValueError, match=r"norm='batchnorm': choose one of 'layernorm', 'rmsnorm'"):
        REGISTRY[name].op(*inputs, norm="batchnorm", kernels=kernels)


@OPS
def test_width_limit(spec: OpSpec) -> None:
    """Operations whose programs hold a whole row refuse one too wide; the others walk any width."""
    assert limits_its_width(spec) is (spec.name in HOLDS_A_ROW)


@pytest.mark.parametrize(
    ("name", "index", "shape", "message"),
    [
        ("adaln_modulate", 1, (2, 73), r"adaln_modulate: shift is \(2, 73\), expected \(2, 72\)"),
        ("adaln_modulate", 0, (2, 72), r"adaln_modulate: x is \(2, 72\), expected"),
        ("gated_residual", 1, (2, 4, 71), r"gated_residual: branch is"),
        ("gated_residual_adaln", 5, (71,), r"gated_residual_adaln: bias is \(71,\), expected \(72,\)"),
        ("patch_embed", 0, (2, 4, 5, 4), r"patch_embed: x is"),
        ("patch_embed", 3, (1, 5, 72), r"patch_embed: pos is"),
        ("unpatchify", 0, (2, 5, 32), r"unpatchify: tokens are"),
    ],
)
def test_misshaped_argument_is_named(name: str, index: int, shape: tuple[int, ...], message: str) -> None:
    inputs = list(REGISTRY[name].make_inputs((2, 4, 72), torch.float32, torch.float32, draw))
    inputs[index] = draw(*shape, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        REGISTRY[name].op(*inputs, kernels="triton")


@pytest.mark.parametrize("name", HOLDS_A_ROW)
def test_width_beyond_the_limit_names_the_way_out(name: str) -> None:
    inputs = REGISTRY[name].make_inputs((1, 1, MAX_WIDTH + 1), torch.float32, torch.float32, draw)
    with pytest.raises(ValueError, match=rf"width 8193 is not in 1..{MAX_WIDTH}; use kernels='reference'"):
        REGISTRY[name].op(*inputs, kernels="triton")
    assert REGISTRY[name].op(*inputs, kernels="reference")[0].device.type == DEVICE
