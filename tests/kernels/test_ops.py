"""Every operation of the registry against float64: forward, gradients, dtypes, layouts, determinism."""

import pytest
import torch
from torch import Tensor

from dit_fast.kernels.registry import REGISTRY, OpSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY.keys())
WIDTHS = (72, 384, 768, 1000, 1024, 1152)
# Every token count and every width, with batches of 8, 3 and 1; the interpreter's time goes with batch * tokens.
SHAPES = [(batch, tokens, width) for batch, tokens in ((8, 1), (3, 16), (1, 64)) for width in WIDTHS] + [
    (1, 255, 1000),
    (3, 255, 384),
    (1, 256, 768),
    (1, 256, 1152),
    (1, 1024, 72),
    (1, 1024, 1152),
]


def draw(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, dtype=torch.float64, device=DEVICE).to(dtype)


def as_tuple(value) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def evaluate(function, inputs, weights=None, **kwargs) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of sum(output * weight) in the inputs' own dtypes."""
    leaves = [
        value.detach().clone().as_strided(value.shape, value.stride()).requires_grad_()
        if isinstance(value, Tensor) and value.is_contiguous()
        else value.detach().requires_grad_() if isinstance(value, Tensor) else value
        for value in inputs
    ]  # fmt: skip
    outputs = as_tuple(function(*leaves, **kwargs))
    if weights is None:
        torch.manual_seed(1)
        weights = [draw(*output.shape, dtype=torch.float64) for output in outputs]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    grads = torch.autograd.grad(
        outputs, tensors, [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)]
    )
    return [output.detach() for output in outputs], list(grads)


def upcast(inputs):
    return [value.double() if isinstance(value, Tensor) else value for value in inputs]


def assert_as_accurate(ours: Tensor, torchs: Tensor, exact: Tensor, factor: float, floor: float) -> None:
    """|ours - exact| <= factor * |torch's - exact| + floor, the maxima over all elements."""
    error, allowed = (ours.double() - exact).abs().max(), (torchs.double() - exact).abs().max()
    scale = max(1.0, exact.abs().max().item())
    assert ours.isfinite().all()
    assert error <= factor * allowed + floor * scale, f"error {error:.3e}, PyTorch's {allowed:.3e}"


@OPS
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-D{}".format(*s))
def test_float64_agrees(spec: OpSpec, shape) -> None:
    inputs = spec.make_inputs(shape, torch.float64, torch.float64, draw)
    ours, our_grads = evaluate(spec.op, inputs, kernels="triton")
    exact, exact_grads = evaluate(spec.reference, inputs)
    for got, want in zip(ours + our_grads, exact + exact_grads, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= 1e-12 * max(1.0, want.abs().max().item())


@OPS
@pytest.mark.parametrize(
    ("stream", "low"),
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)]
    + ([(torch.bfloat16, torch.bfloat16)] if DEVICE == "cuda" else []),
    ids=["fp32", "fp16", "autocast"] + (["bf16"] if DEVICE == "cuda" else []),
)
@pytest.mark.parametrize("shape", [(3, 16, 1152), (2, 25, 72)], ids=["D1152", "D72"])
def test_as_accurate_as_torch(spec: OpSpec, shape, stream, low) -> None:
    """Error against float64 at most twice PyTorch's own in the same dtypes, three times for gradients."""
    inputs = spec.make_inputs(shape, stream, low, draw)
    exact, exact_grads = evaluate(spec.reference, upcast(inputs))
    torchs, torch_grads = evaluate(spec.reference, inputs)
    ours, our_grads = evaluate(spec.op, inputs, kernels="triton")
    floor = 1e-6 if low == torch.float32 else 1e-3
    for got, same, want in zip(ours, torchs, exact, strict=True):
        assert got.dtype == same.dtype
        assert_as_accurate(got, same, want, 2, floor)
    for got, same, want in zip(our_grads, torch_grads, exact_grads, strict=True):
        assert got.dtype == same.dtype
        assert_as_accurate(got, same, want, 3, floor)


@OPS
def test_gradcheck(spec: OpSpec) -> None:
    inputs = [
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value
        for value in spec.make_inputs((1, 4, 12), torch.float64, torch.float64, draw)
    ]
    assert torch.autograd.gradcheck(lambda *args: spec.op(*args, kernels="triton"), inputs, fast_mode=True)


@OPS
def test_opcheck(spec: OpSpec) -> None:
    inputs = [
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value
        for value in spec.make_inputs((2, 4, 24), torch.float32, torch.float32, draw)
    ]
    extra = {"adaln_modulate": [1e-6], "gated_residual_adaln": [1e-6]}.get(spec.name, [])
    results = torch.library.opcheck(getattr(torch.ops.dit_fast, spec.name).default, (*inputs, *extra))
    assert set(results.values()) == {"SUCCESS"}


@OPS
def test_two_runs_agree_to_the_bit(spec: OpSpec) -> None:
    inputs = spec.make_inputs((3, 64, 1152), torch.float32, torch.float32, draw)
    first, second = (sum(evaluate(spec.op, inputs, kernels="triton"), []) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@OPS
def test_layout_does_not_matter(spec: OpSpec) -> None:
    """Transposed, sliced and expanded inputs and gradients give what contiguous ones give, to the bit."""
    inputs = spec.make_inputs((2, 16, 72), torch.float32, torch.float32, draw)
    strided = [
        torch.stack([value, value], -1)[..., 0].detach() if isinstance(value, Tensor) else value
        for value in inputs
    ]
    plain = [value.contiguous() if isinstance(value, Tensor) else value for value in inputs]
    outputs = as_tuple(spec.op(*plain, kernels="triton"))
    ones = [torch.ones((), dtype=torch.float64, device=DEVICE).expand(output.shape) for output in outputs]
    contiguous = sum(evaluate(spec.op, plain, [w.contiguous() for w in ones], kernels="triton"), [])
    for values in (strided, inputs):
        other = sum(evaluate(spec.op, values, ones, kernels="triton"), [])
        assert all(torch.equal(a, b) for a, b in zip(contiguous, other, strict=True))


@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual", "gated_residual_adaln"])
@pytest.mark.parametrize("shape", [(0, 16, 72), (2, 0, 72)], ids=["B0", "T0"])
def test_empty(name, shape) -> None:
    """No rows: empty outputs, zero gradients of the vectors."""
    spec = REGISTRY[name]
    inputs = spec.make_inputs(shape, torch.float32, torch.float32, draw)
    ours, our_grads = evaluate(spec.op, inputs, kernels="triton")
    exact, exact_grads = evaluate(spec.reference, inputs)
    for got, want in zip(ours + our_grads, exact + exact_grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual_adaln"])
def test_hard_rows(name) -> None:
    """NaN and infinity stay in their row; a large offset, equal values and denormals keep PyTorch's accuracy."""
    spec = REGISTRY[name]
    inputs = list(spec.make_inputs((1, 8, 384), torch.float32, torch.float32, draw))
    x = inputs[0]
    x[0, 0, 3], x[0, 1, 5] = float("nan"), float("inf")
    x[0, 2] += 1e4
    x[0, 3], x[0, 4] = 2.5, x[0, 4] * 1e-40
    ours = as_tuple(spec.op(*inputs, kernels="triton"))[-1]
    torchs = as_tuple(spec.reference(*inputs))[-1]
    exact = as_tuple(spec.reference(*upcast(inputs)))[-1]
    assert torch.equal(ours.isnan(), torchs.isnan())
    assert_as_accurate(ours[:, 2:], torchs[:, 2:], exact[:, 2:], 2, 1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_gated_residual_without_bias(bias) -> None:
    """The bias is optional in both gated operations."""
    for name in ("gated_residual", "gated_residual_adaln"):
        inputs = REGISTRY[name].make_inputs((2, 5, 72), torch.float64, torch.float64, draw)
        inputs = inputs if bias else inputs[:-1]
        ours = sum(evaluate(REGISTRY[name].op, inputs, kernels="triton"), [])
        exact = sum(evaluate(REGISTRY[name].reference, inputs), [])
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize(
    ("channels", "patch", "size", "width"), [(3, 4, (8, 16), 40), (1, 8, (16, 8), 24), (4, 8, (16, 16), 72)]
)
def test_patches(channels, patch, size, width) -> None:
    """Other patch sizes, channel counts and non-square grids, and no image gradient when none is asked for."""
    height, columns = size[0] // patch, size[1] // patch
    x = draw(2, channels, *size, dtype=torch.float64)
    inputs = [
        x, draw(width, channels, patch, patch, dtype=torch.float64), draw(width, dtype=torch.float64),
        draw(1, height * columns, width, dtype=torch.float64),
    ]  # fmt: skip
    op, reference = REGISTRY["patch_embed"].op, REGISTRY["patch_embed"].reference
    ours, exact = sum(evaluate(op, inputs, kernels="triton"), []), sum(evaluate(reference, inputs), [])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, exact, strict=True))
    tokens = draw(2, height * columns, patch * patch * channels, dtype=torch.float64)
    op, reference = REGISTRY["unpatchify"].op, REGISTRY["unpatchify"].reference
    ours = sum(evaluate(op, (tokens, patch, height, columns), kernels="triton"), [])
    exact = sum(evaluate(reference, (tokens, patch, height, columns)), [])
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


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
def test_misshaped_argument_is_named(name, index, shape, message) -> None:
    inputs = list(REGISTRY[name].make_inputs((2, 4, 72), torch.float32, torch.float32, draw))
    inputs[index] = draw(*shape, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        REGISTRY[name].op(*inputs, kernels="triton")
