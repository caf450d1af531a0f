"""Attention: head widths, lengths, both sets of kernels, layouts, hard rows, errors; the rest is in test_ops.py."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dit_fast.kernels import attention, reference
from dit_fast.kernels.attention import long as attention_long
from dit_fast.kernels.attention import short as attention_short
from dit_fast.kernels.launch import record_launches
from tests.tolerance import assert_close

# The package's name `attention` is the function; the module is what is patched here.
module = importlib.import_module("dit_fast.kernels.attention.attention")
PATHS = pytest.mark.parametrize("path", [attention_short, attention_long], ids=["short", "long"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
# On a GPU the short kernels hold 16-bit operands only.
only_interpreted = pytest.mark.skipif(ON_GPU, reason="float64 in the short kernels is beyond shared memory")


def draw(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, dtype=torch.float64, device=DEVICE).to(dtype)


def inputs(
    B: int, T: int, H: int, K: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, bias, d_out."""
    return draw(B, T, 3 * H * K, dtype=dtype), draw(3 * H * K, dtype=dtype), draw(B, T, H * K, dtype=dtype)


def by_kernels(path, qkv: Tensor, H: int, bias: Tensor | None, dout: Tensor) -> list[Tensor]:
    """out, d_qkv and, with a bias, d_bias from one set of kernels."""
    out, lse = path.forward(qkv, H, bias)(qkv, H, bias)
    dqkv, dbias = path.backward(qkv, H, bias)(dout, qkv, H, bias, out, lse)
    return [out, dqkv] if bias is None else [out, dqkv, dbias]


def by_autograd(function, qkv: Tensor, H: int, bias: Tensor | None, dout: Tensor, **kwargs) -> list[Tensor]:
    """The same from a differentiable function."""
    leaves = [x.detach().requires_grad_() for x in (qkv, bias) if x is not None]
    out = function(leaves[0], H, leaves[1] if bias is not None else None, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_exact(got: list[Tensor], want: list[Tensor]) -> None:
    for ours, exact in zip(got, want, strict=True):
        assert ours.shape == exact.shape
        assert_close(ours, exact)


@only_interpreted
@PATHS
@pytest.mark.parametrize("K", range(8, 136, 8))
def test_every_head_width(path, K) -> None:
    qkv, bias, dout = inputs(2, 20, 2, K)
    assert_exact(by_kernels(path, qkv, 2, bias, dout), by_autograd(reference.attention, qkv, 2, bias, dout))


@pytest.mark.parametrize("T", [1, 16, 64, 255, 256, 257, 1024])
def test_every_length(T) -> None:
    """The public function, on either side of 256 tokens and off the tiles."""
    qkv, bias, dout = inputs(1, T, 1, 72)
    ours = by_autograd(attention, qkv, 1, bias, dout, kernels="triton")
    assert_exact(ours, by_autograd(reference.attention, qkv, 1, bias, dout))


@only_interpreted
@PATHS
@pytest.mark.parametrize("bias", [True, False])
def test_heads_and_samples_do_not_mix(path, bias) -> None:
    """Three samples, three heads, a length that fills no tile; each (sample, head) alone gives the same bits."""
    qkv, b, dout = inputs(3, 37, 3, 40)
    got = by_kernels(path, qkv, 3, b if bias else None, dout)
    assert_exact(got, by_autograd(reference.attention, qkv, 3, b if bias else None, dout))
    one = slice(40, 80)
    alone = qkv[1:2].view(1, 37, 3, 120)[..., one].reshape(1, 37, 120)
    alone_bias = b.view(3, 120)[:, one].reshape(120).contiguous() if bias else None
    out, dqkv = by_kernels(path, alone, 1, alone_bias, dout[1:2, :, one])[:2]
    assert torch.equal(got[0][1:2, :, one], out)
    assert torch.equal(got[1][1:2].view(1, 37, 3, 120)[..., one].reshape(1, 37, 120), dqkv)


@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (16, 16)])
def test_small_tiles(tile, monkeypatch) -> None:
    """Several tiles each way, masked at both ends: what the interpreter's large tiles would hide."""
    launch = attention_long.LongLaunch(*tile, 4, 1)
    monkeypatch.setattr(attention_long, "long_launch", lambda *_: launch)
    qkv, bias, dout = inputs(1, 41, 1, 24)
    assert_exact(
        by_kernels(attention_long, qkv, 1, bias, dout), by_autograd(reference.attention, qkv, 1, bias, dout)
    )


@only_interpreted
@pytest.mark.parametrize("T", [64, 61])
def test_tiles_of_keys_and_query_steps(T, monkeypatch) -> None:
    """The short kernels with four tiles of keys (d_q through the scratch) and with two query tiles a program."""
    qkv, bias, dout = inputs(2, T, 1, 72)
    exact = by_autograd(reference.attention, qkv, 1, bias, dout)
    one = by_kernels(attention_short, qkv, 1, bias, dout)
    monkeypatch.setattr(
        attention_short, "backward_launch", lambda *_: attention_short.ShortLaunch(32, 16, 4, 1)
    )
    monkeypatch.setattr(
        attention_short, "forward_launch", lambda *_: attention_short.ShortLaunch(16, 64, 4, 2)
    )
    several = by_kernels(attention_short, qkv, 1, bias, dout)
    assert_exact(one, exact)
    assert_exact(several, exact)


@only_interpreted
@pytest.mark.parametrize("T", [48, 64], ids=["odd", "even"])
def test_every_tile_that_a_search_tries(T, monkeypatch) -> None:
    """Warps aside, which the interpreter has none of."""
    qkv, bias, dout = inputs(1, T, 2, 24)
    exact = by_autograd(reference.attention, qkv, 2, bias, dout)
    forward, backward = attention_short.forward_launch(1, T, 2), attention_short.backward_launch(256, 24)
    tried = [(cfg, backward) for cfg in forward.candidates()] + [
        (forward, cfg) for cfg in backward.candidates()
    ]
    for cfg in dict.fromkeys((replace(a, num_warps=4), replace(b, num_warps=4)) for a, b in tried):
        monkeypatch.setattr(attention_short, "forward_launch", lambda *_, cfg=cfg: cfg[0])
        monkeypatch.setattr(attention_short, "backward_launch", lambda *_, cfg=cfg: cfg[1])
        assert_exact(by_kernels(attention_short, qkv, 2, bias, dout), exact)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_as_accurate_as_torch(path, dtype) -> None:
    """Error against float64 at most twice (gradients three times) that of PyTorch's fused attention, 16 bits."""
    qkv, bias, dout = inputs(1, 200, 1, 72, dtype)
    sdpa = by_autograd(attention, qkv, 1, bias, dout, backend="sdpa")
    exact = by_autograd(reference.attention, qkv.double(), 1, bias.double(), dout.double())
    for index, (ours, torchs, want) in enumerate(
        zip(by_kernels(path, qkv, 1, bias, dout), sdpa, exact, strict=True)
    ):
        error, allowed = (ours.double() - want).abs().max(), (torchs.double() - want).abs().max()
        assert ours.dtype == dtype
        assert error <= (3 if index else 2) * allowed + 1e-3 * want.abs().max(), (
            f"result {index}: {error:.2e}"
        )


def test_autocast_bias_keeps_its_dtype() -> None:
    """qkv of 16 bits, float32 bias: out and d_qkv in 16 bits, d_bias in float32."""
    qkv, bias, dout = inputs(1, 33, 2, 72, torch.float16)
    got = by_autograd(attention, qkv, 2, bias.float(), dout, kernels="triton")
    assert [x.dtype for x in got] == [torch.float16, torch.float16, torch.float32]


@PATHS
def test_two_runs_agree_to_the_bit(path) -> None:
    qkv, bias, dout = inputs(2, 130, 1, 72, torch.float16)
    first, second = (by_kernels(path, qkv, 1, bias, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_rows_are_read_in_place() -> None:
    """A view whose rows start at multiples of 8 elements is no copy; any other view gives the same bits."""
    wide = draw(3, 20, 256, dtype=torch.float16)
    dout = draw(3, 20, 72, dtype=torch.float16)
    aligned, odd = wide[..., 16 : 16 + 216], draw(3, 20, 217, dtype=torch.float16)[..., :216]
    for view in (aligned, odd, aligned.transpose(0, 1).contiguous().transpose(0, 1), wide[:1, :1, 8:224]):
        with record_launches() as launches:
            module._attention(view, 1, None)(view, 1, None)
        assert (launches[0].arguments["qkv_ptr"].data_ptr() == view.data_ptr()) == (view is not odd)
        dview = dout[: view.shape[0], : view.shape[1]]
        strided = by_autograd(attention, view, 1, None, dview, kernels="triton")
        plain = by_autograd(attention, view.contiguous(), 1, None, dview.contiguous(), kernels="triton")
        assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@PATHS
@pytest.mark.parametrize(("B", "T"), [(0, 16), (2, 0)])
def test_empty(path, B, T) -> None:
    """No tokens: empty outputs, a zero gradient of the bias."""
    qkv, bias, dout = inputs(B, T, 2, 72, torch.float16)
    out, dqkv, dbias = by_kernels(path, qkv, 2, bias, dout)
    assert out.shape == (B, T, 144)
    assert dqkv.shape == (B, T, 432)
    assert torch.equal(dbias, torch.zeros_like(bias))


def hard(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(qkv, bias, d_out) of 40 tokens, one head of 24, with one thing wrong."""
    qkv, bias, dout = inputs(1, 40, 1, 24)
    place, value = kind.split(" ")
    where = {"q": qkv[0, 5, 3:4], "k": qkv[0, 6, 27:28], "v": qkv[0, 7, 50:51], "dout": dout[0, 8, 2:3]}
    where |= {"b_q": bias[1:2], "b_k": bias[30:31], "b_v": bias[60:61], "row": qkv[0, 5, :24]}
    where["k_all"] = qkv[0, :, 24:25]
    where[place].fill_(float(value))
    return qkv, bias, dout


@only_interpreted
@PATHS
@pytest.mark.parametrize(
    "kind",
    [
        f"{place} {value}"
        for place in ("q", "k", "v", "b_q", "b_k", "b_v", "k_all")
        for value in ("nan", "inf")
    ]
    + ["q -inf", "k -inf", "row inf", "dout nan", "b_k -inf", "q 1e4", "row 0"],
)
def test_hard_rows(path, kind, monkeypatch) -> None:
    """Not finite exactly where PyTorch's softmax is not, forward; NaN of inputs reach the same gradients."""
    if path is attention_long:
        tile = attention_long.LongLaunch(16, 16, 4, 1)
        monkeypatch.setattr(attention_long, "long_launch", lambda *_: tile)
    qkv, bias, dout = hard(kind)
    ours = by_kernels(path, qkv, 1, bias, dout)
    exact = by_autograd(reference.attention, qkv, 1, bias, dout)
    assert torch.equal(ours[0].isfinite(), exact[0].isfinite())
    if "inf" not in kind:
        for got, want in zip(ours, exact, strict=True):
            assert torch.equal(got.isnan(), want.isnan())
    for got, want in zip(ours, exact, strict=True):
        both = got.isfinite() & want.isfinite()
        assert not both.any() or (got[both] - want[both]).abs().max() <= 1e-9 * want[both].abs().max()


@only_interpreted
def test_keys_at_minus_infinity_come_first(monkeypatch) -> None:
    """Rows whose first tiles of scores are all -inf are what the later tiles give, and NaN only if all are -inf."""
    tile = attention_long.LongLaunch(16, 16, 4, 1)
    monkeypatch.setattr(attention_long, "long_launch", lambda *_: tile)
    qkv, _, _ = inputs(1, 48, 1, 24)
    qkv[..., :24].abs_()
    qkv[0, :32, 24] = -math.inf
    out, lse = attention_long.forward(qkv, 1, None)(qkv, 1, None)
    assert_exact(
        [out, lse], [reference.attention(qkv, 1), reference.attention_probabilities(qkv, 1, None)[-1]]
    )
    qkv[0, :, 24] = -math.inf
    assert attention_long.forward(qkv, 1, None)(qkv, 1, None)[0].isnan().all()


@pytest.mark.parametrize(
    ("size", "heads", "dtype", "bias", "message"),
    [
        ((4, 216), 1, torch.float32, None, r"attention: qkv is \(4, 216\), expected \(batch, tokens"),
        ((1, 4, 216), 1, torch.int32, None, r"attention: qkv is torch.int32, expected float16"),
        ((1, 4, 216), 5, torch.float32, None, r"attention: num_heads 5 does not divide qkv's 216 columns"),
        ((1, 4, 216), 0, torch.float32, None, r"attention: num_heads 0 does not divide"),
        (
            (1, 4, 36),
            1,
            torch.float32,
            None,
            r"attention: head_dim 12 of qkv is not a multiple of 8 up to 128",
        ),
        ((1, 4, 408), 1, torch.float32, None, r"attention: head_dim 136 of qkv is not a multiple of 8"),
        ((1, 4, 216), 1, torch.float32, (72,), r"attention: bias is \(72,\), expected \(216,\)"),
        ((1, 4, 216), 1, torch.float32, (216, 1), r"attention: bias is \(216, 1\), expected \(216,\)"),
        ((1, 2**23, 3 * 128), 1, torch.float16, None, r"attention: a sample of 8388608 x 384 .* 32-bit"),
    ],
)
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_wrong_argument_is_named(size, heads, dtype, bias, message, fake) -> None:
    """The same words for tensors that hold data and for those that do not."""
    mode = FakeTensorMode()
    with mode if fake else torch.device("meta" if math.prod(size) > 2**30 else DEVICE):
        qkv = torch.empty(size, dtype=dtype)
        b = None if bias is None else torch.empty(bias)
        with pytest.raises(ValueError, match=message):
            attention(qkv, heads, b, backend="triton")


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    with FakeTensorMode():
        qkv, bias = torch.empty(2, 9, 216, dtype=torch.float16, requires_grad=True), torch.empty(216)
        out, lse = torch.ops.dit_fast.attention(qkv, 1, bias)
        dqkv, dbias = torch.ops.dit_fast.attention_backward(out, qkv, 1, bias, out, lse)
    assert (out.shape, out.dtype) == ((2, 9, 72), torch.float16)
    assert (lse.shape, lse.dtype) == ((2, 1, 9), torch.float32)
    assert (dqkv.shape, dqkv.dtype) == ((2, 9, 216), torch.float16)
    assert (dbias.shape, dbias.dtype) == ((216,), torch.float32)
