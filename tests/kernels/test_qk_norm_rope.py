"""What `qk_norm_rope` has beside other operations: its options, widths of heads, layouts of the rotation, the model."""

import dataclasses
import importlib

import pytest
import torch
from torch import Tensor, nn

from benchmarks.ops.registry import REGISTRY
from dit_fast.kernels import qk_norm_rope
from dit_fast.model.blocks import CONDITIONING
from dit_fast.model.layers import Attention, RMSNorm
from dit_fast.models import DiT
from tests.kernels.proofs import DEVICE, draw, evaluate, fused, leaves_of, same_bits, upcast
from tests.tolerance import assert_as_accurate, assert_close

SPEC = REGISTRY["qk_norm_rope"]
F64 = torch.float64


def inputs(
    K: int, heads: int, B: int = 2, T: int = 3, options: tuple[bool, bool, bool] = (True, True, True)
) -> list[Tensor | int | None]:
    """qkv, heads and, where `options` say so, bias, weight and a rotation of each sample, in float64."""
    made = [draw(3 * heads * K, dtype=F64), draw(2, K, dtype=F64), None]
    if options[2]:
        angles = draw(B, T, K // 2, dtype=F64)
        made[2] = torch.stack([angles.cos(), angles.sin()], -1)
    given = [tensor if wanted else None for tensor, wanted in zip(made, options, strict=True)]
    return [draw(B, T, 3 * heads * K, dtype=F64), heads, *given]


def agrees(args: list[Tensor | int | None]) -> None:
    for ours, exact in zip(fused(SPEC, args), evaluate(SPEC.reference, args), strict=True):
        assert_close(ours, exact)


@pytest.mark.parametrize(("K", "heads"), [(6, 1), (20, 4), (80, 2), (104, 1), (128, 1)])
def test_widths_of_heads(K: int, heads: int) -> None:
    agrees(inputs(K, heads))


@pytest.mark.parametrize("options", [(b, w, r) for b in (0, 1) for w in (0, 1) for r in (0, 1)])
def test_each_part_is_optional(options: tuple[bool, bool, bool]) -> None:
    agrees(inputs(12, 1, options=options))


def test_an_odd_width_without_rotation() -> None:
    agrees(inputs(7, 2, options=(True, True, False)))


def test_programs_that_walk_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("dit_fast.kernels.qk_norm_rope")
    choose = module.head_launch
    monkeypatch.setattr(
        module, "head_launch", lambda *shape: dataclasses.replace(choose(*shape), tokens=4, splits=2)
    )
    agrees(inputs(12, 2, B=1, T=13))


def test_one_rotation_for_all_samples_is_that_of_each() -> None:
    args = inputs(8, 1, B=2)
    one = args[4][:1]
    strided = torch.cat([one, one], 2)[:, :, : one.shape[2]]
    weights = [draw(*args[0].shape, dtype=F64)]
    results = [
        fused(SPEC, [*args[:4], rotation], weights)[:4]
        for rotation in (one.expand(2, -1, -1, -1).contiguous(), one, one.expand(2, -1, -1, -1), strided)
    ]
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_turning_keeps_lengths_and_values_are_copied(dtype: torch.dtype) -> None:
    """The norm, whatever qkv's scale; and v goes through untouched to the bit."""
    qkv = 100 * draw(1, 5, 3 * 2 * 16, dtype=torch.float32).to(dtype)
    angles = draw(1, 5, 8, dtype=torch.float32)
    rotation = torch.stack([angles.cos(), angles.sin()], -1)
    out = qk_norm_rope(qkv, 2, None, torch.ones(2, 16, device=DEVICE), rotation, kernels="triton")
    q, k, v = out.unflatten(2, (3, 2, 16)).unbind(2)
    for heads in (q, k):
        assert (heads.double().square().mean(-1) - 1).abs().max() < 4 * torch.finfo(dtype).eps
    assert torch.equal(v.flatten(2), qkv[..., 64:])


@pytest.mark.parametrize("options", [(True, True, False), (True, False, True), (False, True, True)])
def test_as_accurate_as_torch_without_a_part(options: tuple[bool, bool, bool]) -> None:
    args = [
        value.to(torch.bfloat16) if index == 0 else value.float() if isinstance(value, Tensor) else value
        for index, value in enumerate(inputs(72, 2, options=options))
    ]
    exact, torchs = evaluate(SPEC.reference, upcast(args)), evaluate(SPEC.reference, args)
    for index, (got, same, want) in enumerate(zip(fused(SPEC, args), torchs, exact, strict=True)):
        assert_as_accurate(got, same, want, 3 if index else 2, torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize(("norm", "kept"), [(True, 1), (False, 0)])
def test_the_projection_is_kept_for_a_norm_alone(norm: bool, kept: int) -> None:
    args = leaves_of(inputs(8, 2, options=(True, norm, True)))
    shapes = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        qk_norm_rope(*args, kernels="triton")
    assert shapes.count(args[0].shape) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": (2, 3, 3 * 132)}, "head_dim 132 of qkv is beyond 128; use kernels='reference'"),
        ({"weight": (8,)}, r"weight is \(8,\) with eps 1e-06, expected \(2, 8\) and more than 0"),
        ({"rotation": (1, 3, 8, 2)}, r"rotation is \(1, 3, 8, 2\), expected \(2 or 1, 3, 8 / 2, 2\)"),
        ({"rotation": (3, 3, 4, 2)}, r"rotation is \(3, 3, 4, 2\)"),
        ({"bias": (8,)}, r"bias is \(8,\), expected \(24,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    args = {"qkv": draw(2, 3, 24, dtype=F64), "num_heads": 1}
    args |= {name: draw(*shape, dtype=F64) for name, shape in change.items()}
    with pytest.raises(ValueError, match=f"qk_norm_rope: {message}"):
        qk_norm_rope(**args, kernels="triton")


def test_eps_is_positive() -> None:
    qkv, weight = draw(1, 1, 24, dtype=F64), draw(2, 8, dtype=F64)
    with pytest.raises(ValueError, match="eps 0"):
        qk_norm_rope(qkv, 1, None, weight, eps=0.0, kernels="triton")


@pytest.mark.parametrize(
    "change", ["none", "hook", "another norm", "another eps", "no weight", "a wide head"]
)
def test_norms_that_are_not_as_built_are_called(change: str) -> None:
    """Only norms as they were built, of a width that the kernels take, become the operation; the others stay theirs."""
    attention = Attention(*((264, 2) if change == "a wide head" else (16, 2)), qk_norm=True).to(DEVICE)
    called: list[nn.Module] = []
    if change == "another norm":
        attention.k_norm = nn.LayerNorm(8, device=DEVICE)
    elif change == "another eps":
        attention.k_norm.eps = 1.0
    elif change == "no weight":
        attention.q_norm = RMSNorm(8, eps=1e-6, elementwise_affine=False)
    if change in ("hook", "another norm"):
        attention.k_norm.register_forward_hook(lambda module, *_: called.append(module))
    tokens = draw(1, 3, attention.qkv.in_features, dtype=torch.float32)
    found, plain = (attention.project(tokens, kernels=mode) for mode in ("triton", "reference"))
    assert (attention.fused_norm() is not None) == (change == "none")
    assert torch.equal(found, plain) or change == "none"
    assert_close(found, plain)
    assert called == [attention.k_norm] * 2 * (change in ("hook", "another norm"))


def trained(conditioning: str, kernels: str, recompute: str = "none") -> tuple[Tensor, dict[str, Tensor]]:
    """The answers of a small model with rotation and QK-norm, weights drawn anew, and its gradients."""
    sizes = dict(
        input_size=4, patch_size=2, in_channels=2, hidden_size=24, depth=1, num_heads=2, num_classes=3
    )
    options = dict(positions="rope", qk_norm=True, conditioning=conditioning, recompute=recompute)
    model = DiT(**sizes, **options, kernels=kernels).to(DEVICE).eval()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 1.0 if "_norm" in name else 0.0, 0.3)
    x = torch.randn(1, 2, 4, 4).to(DEVICE)
    out = model(x, torch.tensor([700], device=DEVICE), torch.tensor([2], device=DEVICE))
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_the_model_on_the_kernels_is_the_plain_one(conditioning: str) -> None:
    expected, slopes = trained(conditioning, "reference")
    out, grads = trained(conditioning, "triton", "cheap")
    assert_close(out, expected)
    assert grads.keys() == slopes.keys()
    assert {"blocks.0.attn.q_norm.weight", "blocks.0.attn.qkv.bias"} < grads.keys()
    for name, slope in slopes.items():
        assert_close(grads[name], slope, what=name)


def test_the_model_under_autocast() -> None:
    expected, slopes = trained("adaln_zero", "reference")
    with torch.autocast(DEVICE, torch.bfloat16):
        out, grads = trained("adaln_zero", "triton")
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()
    for name in ("q_norm.weight", "k_norm.weight", "qkv.bias"):
        name = f"blocks.0.attn.{name}"
        assert (grads[name] - slopes[name]).abs().max() < 0.1 * slopes[name].abs().max()
