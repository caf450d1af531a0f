"""What is particular to `gelu`, `swiglu` and `mlp`: activations and who applies them, what is kept, tiles, refusals."""

import functools
import importlib
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fast.kernels import gelu, mlp, reference, swiglu
from tests.kernels.proofs import FLOAT64, FLOOR

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = ("separate", "triton")
WAYS = pytest.mark.parametrize(
    ("provider", "activation"), [("separate", "gelu"), ("triton", "gelu"), ("separate", "swiglu")]
)
LOW = (torch.float32, torch.float16, torch.bfloat16)
gemm = importlib.import_module("dit_fast.kernels.mlp.gemm")
module = importlib.import_module("dit_fast.kernels.mlp.mlp")


def draw(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, dtype=torch.float64, device=DEVICE).to(dtype)


def mlp_inputs(
    rows: tuple[int, ...],
    D: int,
    hidden: int,
    E: int,
    dtype: torch.dtype = torch.float64,
    activation: str = "gelu",
):
    """x, fc1_weight, fc1_bias, fc2_weight that require gradients, weights as large as initialisation makes them."""
    torch.manual_seed(0)
    outputs = 2 * hidden if activation == "swiglu" else hidden
    inputs = (
        draw(*rows, D, dtype=dtype), (draw(outputs, D) * D**-0.5).to(dtype), draw(outputs, dtype=dtype),
        (draw(E, hidden) * hidden**-0.5).to(dtype),
    )  # fmt: skip
    return [tensor.requires_grad_() for tensor in inputs]


def with_gradients(function, inputs, **kwargs) -> list[Tensor]:
    """The output and the gradients of a fixed weighted sum of it."""
    out = function(*inputs, **kwargs)
    torch.manual_seed(1)
    wanted = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.requires_grad]
    grads = torch.autograd.grad(out, wanted, draw(*out.shape, dtype=out.dtype))
    return [out.detach(), *grads]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float = FLOAT64) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max().item())


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(7,), (3, 1), (2, 5, 600), (2, 1, 3, 520)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("op", [gelu, swiglu], ids=["gelu", "swiglu"])
def test_activation_of_any_rank_and_width(op, shape, biased) -> None:
    """Widths below, above and across a block of columns, with and without bias."""
    width = shape[-1] * (2 if op is swiglu else 1)
    inputs = [draw(*shape[:-1], width).requires_grad_(), draw(width).requires_grad_() if biased else None]
    assert_close(*(with_gradients(op, inputs, kernels=kernels) for kernels in ("triton", "reference")))


@pytest.mark.parametrize("dtype", LOW)
def test_gelu_keeps_what_is_not_finite(dtype) -> None:
    """NaN where PyTorch has NaN, nowhere else, in the activation and in the gradient; signs of zero do not matter."""
    special = [float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 1e20, -1e20, 1e-40, 0.0, -0.5, 2.5]
    pre = torch.tensor(special, device=DEVICE).to(dtype).repeat(3, 1).requires_grad_()
    ours = with_gradients(gelu, [pre], kernels="triton")
    torchs = with_gradients(lambda pre: F.gelu(pre, approximate="tanh"), [pre])
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("dtype", LOW)
def test_swiglu_keeps_what_is_not_finite(dtype) -> None:
    """Any gate with any value: what PyTorch has in float32, rounded once."""
    special = [float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 1e20, -1e20, 1e-40, 0.0, -0.5, 2.5]
    pairs = torch.tensor(list(itertools.product(special, special)), device=DEVICE).to(dtype)
    pre = pairs.t().reshape(1, -1).requires_grad_()

    def formula(pre: Tensor) -> Tensor:
        gate, value = pre.float().chunk(2, dim=-1)
        return (F.silu(gate) * value).to(dtype)

    ours, torchs = with_gradients(swiglu, [pre], kernels="triton"), with_gradients(formula, [pre])
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_gelu_gradients_against_float64_tails() -> None:
    """Far from zero, where 1 + tanh(u) cancels, the error against float64 is at most PyTorch's twice."""
    pre = torch.linspace(-8, 8, 4001, device=DEVICE).reshape(1, -1).requires_grad_()
    exact = with_gradients(reference.gelu, [pre.detach().double().requires_grad_()])
    ours, torchs = with_gradients(gelu, [pre], kernels="triton"), with_gradients(reference.gelu, [pre])
    for got, same, want, factor in zip(ours, torchs, exact, (2, 3), strict=True):
        assert (got - want).abs().max() <= factor * (same - want).abs().max() + 1e-7


@WAYS
@pytest.mark.parametrize("keep", [False, True], ids=["again", "kept"])
@pytest.mark.parametrize(
    ("rows", "D", "hidden", "E"),
    [((2, 5), 24, 96, 24), ((7,), 13, 51, 9), ((1, 2, 3), 8, 40, 16), ((3, 50), 72, 288, 72)],
    ids=["even", "odd", "rank 4", "tiles"],
)
def test_mlp_agrees_in_float64(provider, activation, keep, rows, D, hidden, E) -> None:
    inputs = mlp_inputs(rows, D, hidden, E, activation=activation)
    ours = with_gradients(
        mlp, inputs, activation=activation, keep_activation=keep, epilogue=provider, kernels="triton"
    )
    assert_close(ours, with_gradients(reference.mlp, inputs, activation=activation))


@WAYS
@pytest.mark.parametrize("dtype", LOW)
def test_mlp_is_as_accurate_as_torch(provider, activation, dtype) -> None:
    """Error against float64 at most twice that of PyTorch in the same dtype, three times for gradients."""
    inputs = mlp_inputs((2, 25), 72, 288, 72, dtype, activation)
    double = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = with_gradients(reference.mlp, double, activation=activation)
    torchs = with_gradients(reference.mlp, inputs, activation=activation)
    ours = with_gradients(mlp, inputs, activation=activation, epilogue=provider, kernels="triton")
    floor = max(FLOOR, torch.finfo(dtype).eps / 2)
    for got, same, want, factor in zip(ours, torchs, exact, (2, 3, 3, 3, 3), strict=True):
        error, allowed = (got.double() - want).abs().max(), (same.double() - want).abs().max()
        assert error <= factor * allowed + floor * max(1.0, want.abs().max().item())


@WAYS
@pytest.mark.parametrize("dtype", LOW)
def test_activation_kept_or_computed_again_to_the_bit(provider, activation, dtype) -> None:
    inputs = mlp_inputs((3, 11), 40, 160, 40, dtype, activation)
    kept, again, repeated = (
        with_gradients(
            mlp, inputs, activation=activation, keep_activation=keep, epilogue=provider, kernels="triton"
        )
        for keep in (True, False, False)
    )
    assert same_bits(again, repeated)
    assert same_bits(kept, again)


def test_what_the_backward_pass_keeps() -> None:
    """Without the activation: x, pre and the weights. Where no gradient is asked for: nothing."""
    inputs = mlp_inputs((2, 3), 8, 32, 8)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        mlp(*inputs, kernels="triton")
        assert sorted(sizes) == sorted([(2, 3, 8), (6, 32), (32, 8), (8, 32)])
        sizes.clear()
        mlp(*inputs, keep_activation=True, kernels="triton")
        assert sorted(sizes) == sorted([(2, 3, 8), (6, 32), (6, 32), (32, 8), (8, 32)])
        for keep in (False, True):
            sizes.clear()
            gated = mlp_inputs((2, 3), 8, 24, 8, activation="swiglu")
            mlp(*gated, activation="swiglu", keep_activation=keep, kernels="triton")
            assert sorted(sizes) == sorted([(2, 3, 8), (6, 48), (48, 8), (8, 24)] + [(6, 24)] * keep)
    op = torch.ops.dit_fast.mlp
    detached = [tensor.detach() for tensor in inputs]
    for provider in PROVIDERS:
        out, pre, act = op(*detached, True, False, provider)
        assert pre.numel() == act.numel() == 0
        assert torch.equal(out, op(*detached, False, True, provider)[0])


@WAYS
def test_frozen_weights(provider, activation, monkeypatch) -> None:
    """Only x needs a gradient: no weight gradient and no activation is computed, and d_x is the same."""
    inputs = mlp_inputs((2, 5), 24, 96, 24, activation=activation)
    want = with_gradients(mlp, inputs, activation=activation, epilogue=provider, kernels="triton")[:2]
    asked = []

    def watch(original, *args):
        asked.append(args[3:5])
        return original(*args)

    # The last of their five arguments: whether to compute the activation, and the gradient of the bias.
    for owner, name in (
        (module, "plan_gelu_backward"), (module, "plan_swiglu_backward"), (gemm, "gemm_gelu_backward"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, functools.partial(watch, getattr(owner, name)))
    x, *weights = inputs
    frozen = [x, *(weight.detach() for weight in weights)]
    found = with_gradients(mlp, frozen, activation=activation, epilogue=provider, kernels="triton")
    assert same_bits(found, want)
    assert asked == [(False, False)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_descriptors_and_pointers_agree_to_the_bit(dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = draw(150, 72, dtype=dtype), draw(288, 72, dtype=dtype), draw(288, dtype=dtype)
    wide, narrow = (gemm.gemm_gelu(x, weight, bias, True, descriptors=way) for way in (True, False))
    assert same_bits(wide, narrow)
    pre, out_weight = wide[0], draw(72, 288, dtype=dtype)
    wide, narrow = (
        gemm.gemm_gelu_backward(x, out_weight, pre, True, True, descriptors=way) for way in (True, False)
    )
    assert same_bits(wide, narrow)


@pytest.mark.parametrize(
    ("size", "offset", "descriptors"),
    [((16, 16), 0, True), ((16, 12), 0, False), ((12, 16), 0, False), ((16, 16), 1, False)],
    ids=["aligned", "odd K", "odd N", "odd start"],
)
def test_tiles_are_copied_by_descriptor_only_where_rows_are_aligned(size, offset, descriptors) -> None:
    """TMA takes rows and starts that are multiples of 16 bytes; anything else goes through pointers."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no descriptors before sm_90")
    N, K = size
    a = draw(4 * K + offset, dtype=torch.float16)[offset:].view(4, K)
    cfg = gemm._configuration(gemm.KERNELS[0], a, draw(N, K, dtype=torch.float16), 4, N, K, None)
    assert cfg.descriptors is descriptors


def test_no_sum_depends_on_the_number_of_programs(monkeypatch) -> None:
    """Each output tile is one program's, whoever it is; a tile's bias sum goes to its own row of partial sums."""
    torch.manual_seed(0)
    dout, weight, pre = draw(300, 40), draw(40, 200), draw(300, 200)
    results = []
    for programs in (1, 3, 100):
        monkeypatch.setattr(gemm, "_programs", lambda on, arch, programs=programs: programs)
        results.append(gemm.gemm_gelu_backward(dout, weight, pre, True, True))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("descriptors", [True, False])
def test_every_tile_is_computed_once(descriptors) -> None:
    """More than 8 rows of tiles, a last group that is not full, and columns that do not fill their tile."""
    torch.manual_seed(0)
    cfg = gemm.gemm_launch(1300, 136, 16, 8, 0, True, descriptors)
    assert 1300 / cfg.block_m > 16
    x, weight, bias = draw(1300, 16), draw(136, 16), draw(136)
    pre, act = gemm.gemm_gelu(x, weight, bias, True, descriptors=descriptors)
    assert_close([pre, act], [F.linear(x, weight, bias), reference.gelu(F.linear(x, weight, bias))])


@WAYS
def test_nan_and_infinity_stay_where_torch_has_them(provider, activation) -> None:
    """A row's NaN stays in its row."""
    inputs = mlp_inputs((5,), 16, 64, 16, torch.float32, activation)
    with torch.no_grad():
        inputs[0][1, 3], inputs[0][2, 0] = float("nan"), float("inf")
    ours = with_gradients(mlp, inputs, activation=activation, epilogue=provider, kernels="triton")
    torchs = with_gradients(reference.mlp, inputs, activation=activation)
    assert ours[0].isnan().any(dim=1).tolist() == [False, True, True, False, False]
    assert all(torch.equal(one.isnan(), other.isnan()) for one, other in zip(ours, torchs, strict=True))


def test_an_infinite_weight_stays_in_its_column() -> None:
    """It does not reach the bias gradient through rows beyond M."""
    dout, weight, pre = (draw(*size, dtype=torch.float32) for size in ((5, 16), (16, 64), (5, 64)))
    dout[:, 2], weight[2, 7] = dout[:, 2].abs() + 1, float("inf")
    _, _, dbias = gemm.gemm_gelu_backward(dout, weight, pre.abs(), False, True)
    assert dbias[7] == float("inf")
    assert dbias.isfinite().sum() == 63


@WAYS
@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 4)], ids=str)
def test_no_rows(provider, activation, rows) -> None:
    inputs = mlp_inputs(rows, 8, 32, 8, torch.float32, activation)
    ours = with_gradients(mlp, inputs, activation=activation, epilogue=provider, kernels="triton")
    assert same_bits(ours, with_gradients(reference.mlp, inputs, activation=activation))


@WAYS
def test_layout_does_not_matter(provider, activation) -> None:
    """Transposed, expanded and sliced tensors give what contiguous ones give."""
    x, fc1, bias, fc2 = (tensor.detach() for tensor in mlp_inputs((6,), 24, 96, 24, activation=activation))
    strided = (
        x[:1].expand(6, 24), fc1.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0],
        torch.cat([fc2, fc2], 1)[:, :96],
    )  # fmt: skip
    leaves = [[tensor.requires_grad_() for tensor in group] for group in (
        [tensor.detach() for tensor in strided], [tensor.detach().contiguous() for tensor in strided],
    )]  # fmt: skip
    one, other = (
        with_gradients(mlp, group, activation=activation, epilogue=provider, kernels="triton")
        for group in leaves
    )
    # PyTorch's own products may sum transposed operands in another order.
    assert_close(one, other)


@WAYS
def test_autocast_dtypes(provider, activation) -> None:
    """Weights in float32 are cast to the dtype of x; their gradients come back in float32."""
    x, fc1, bias, fc2 = mlp_inputs((3,), 16, 64, 16, torch.float32, activation)
    low = x.detach().bfloat16().requires_grad_()
    out, dx, *weights = with_gradients(
        mlp, [low, fc1, bias, fc2], activation=activation, epilogue=provider, kernels="triton"
    )
    assert out.dtype == dx.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in weights} == {torch.float32}


@WAYS
@pytest.mark.parametrize("keep", [False, True])
def test_gradcheck_and_opcheck(provider, activation, keep) -> None:
    inputs = mlp_inputs((4,), 12, 48, 12, activation=activation)
    assert torch.autograd.gradcheck(
        lambda *args: mlp(
            *args, activation=activation, keep_activation=keep, epilogue=provider, kernels="triton"
        ),
        inputs,
        fast_mode=True,
    )
    results = torch.library.opcheck(
        torch.ops.dit_fast.mlp.default, (*inputs, keep, True, provider, activation)
    )
    assert set(results.values()) == {"SUCCESS"}


@WAYS
def test_compiles_without_graph_breaks(provider, activation) -> None:
    """The same numbers through torch.compile(fullgraph=True), with rows of any number."""
    function = torch.compile(
        lambda *args: mlp(*args, activation=activation, epilogue=provider, kernels="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    for rows in (5, 9):
        inputs = mlp_inputs((rows,), 12, 48, 12, activation=activation)
        torch._dynamo.mark_dynamic(inputs[0], 0)
        assert_close(
            with_gradients(function, inputs),
            with_gradients(mlp, inputs, activation=activation, epilogue=provider, kernels="triton"),
        )


def test_auto_follows_the_table(monkeypatch) -> None:
    """epilogue="auto" is what `mlp_epilogue` says, which is the separate pass until a GPU has measured another.

    SwiGLU's pass is separate whatever the table says of GELU.
    """
    inputs = mlp_inputs((4,), 12, 48, 12)
    assert module.mlp_epilogue((4, 12, 48), torch.float64, inputs[0].device) == "separate"
    used, original = [], gemm.gemm_gelu
    monkeypatch.setattr(gemm, "gemm_gelu", lambda *args: used.append(1) or original(*args))
    mlp(*inputs, kernels="triton")
    assert not used
    monkeypatch.setattr(module, "mlp_epilogue", lambda *_: "triton")
    mlp(*inputs, kernels="triton")
    assert used
    used.clear()
    mlp(*mlp_inputs((4,), 12, 48, 12, activation="swiglu"), activation="swiglu", kernels="triton")
    assert not used


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (12,), "mlp: x is (12,), expected (..., width)"),
        (1, (48, 13), "mlp: fc1_weight is (48, 13), expected (outputs, 12)"),
        (1, (48,), "mlp: fc1_weight is (48,), expected (outputs, 12)"),
        (2, (47,), "mlp: fc1_bias is (47,), expected (48,)"),
        (3, (12, 47), "mlp: fc2_weight is (12, 47), expected (outputs, 48)"),
    ],
)
def test_misshaped_argument_is_named(index, shape, message) -> None:
    inputs = mlp_inputs((4,), 12, 48, 12)
    inputs[index] = draw(*shape)
    with pytest.raises(ValueError, match=re.escape(message)):
        mlp(*inputs, kernels="triton")


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (1, (95, 12), "mlp: fc1_weight is (95, 12), expected (2 * outputs, 12)"),
        (2, (48,), "mlp: fc1_bias is (48,), expected (96,)"),
        (3, (12, 96), "mlp: fc2_weight is (12, 96), expected (outputs, 48)"),
    ],
)
def test_misshaped_argument_of_swiglu_is_named(index, shape, message) -> None:
    inputs = mlp_inputs((4,), 12, 48, 12, activation="swiglu")
    inputs[index] = draw(*shape)
    with pytest.raises(ValueError, match=re.escape(message)):
        mlp(*inputs, activation="swiglu", kernels="triton")


def test_other_refusals() -> None:
    inputs = mlp_inputs((4,), 12, 48, 12)
    with pytest.raises(ValueError, match="epilogue='fused', choose one of 'auto', 'separate'"):
        mlp(*inputs, epilogue="fused")
    with pytest.raises(ValueError, match=r"gelu: bias is \(3,\), expected \(4,\)"):
        gelu(draw(2, 4), draw(3), kernels="triton")
    with pytest.raises(ValueError, match=r"gelu: pre is \(2, 0\)"):
        gelu(draw(2, 0), kernels="triton")
    with pytest.raises(ValueError, match="activation='relu', choose one of 'gelu', 'swiglu'"):
        mlp(*inputs, activation="relu")
    for epilogue in ("triton", "cublaslt"):
        with pytest.raises(
            ValueError, match=f"epilogue='{epilogue}' applies a GELU, give 'auto' or 'separate'"
        ):
            mlp(*inputs, activation="swiglu", epilogue=epilogue)
    for width in (0, 5):
        with pytest.raises(
            ValueError, match=rf"swiglu: pre is \(2, {width}\), expected \(\.\.\., 2 \* features\)"
        ):
            swiglu(draw(2, width), kernels="triton")
