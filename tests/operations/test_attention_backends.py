"""Which implementation `attention` runs and why, in every branch; and those of other packages against the reference."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import _cur_sdpa_kernel_backends

from dit_fast.kernels import attention, choose_backend, reference
from dit_fast.kernels.attention import backends as attention_backends
from dit_fast.kernels.attention.attention import attention_backend
from dit_fast.kernels.attention.backends import Choice, cudnn_attention, flash_version, sdpa_attention
from tests.tolerance import assert_close

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch):
    """Sets the compute capability of the CUDA device that is not there, and which flash-attn packages import."""

    def pretend(capability: int, *installed: int) -> None:
        monkeypatch.setattr(attention_backends, "device_capability", lambda index: capability)
        monkeypatch.setattr(
            attention_backends,
            "_flash_function",
            lambda version: (lambda: None) if version in installed else f"no flash-attn {version}",
        )

    return pretend


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The tuned table's words by key; a key that is not there has not been measured."""
    words: dict[str, str] = {}
    monkeypatch.setattr(
        attention_backends,
        "_tuned_backend",
        lambda dtype, K, bucket, index: words.get(f"{dtype}-K{K}-T{bucket or 'more'}", ""),
    )
    return words


def test_unknown_word_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^attention: backend='fast': choose one of 'auto', 'triton', 'sdpa', 'cudnn', 'flash'$",
    ):
        choose_backend("fast", CPU, torch.float32, 256, 72)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("where", [CPU, CUDA])
def test_what_is_asked_for_runs(backend, where) -> None:
    assert choose_backend(backend, where, torch.bfloat16, 256, 72) == Choice(backend, "asked for")


@pytest.mark.parametrize(("where", "dtype"), [(CPU, torch.bfloat16), (CUDA, torch.float32)])
def test_flash_where_it_cannot_run_is_refused(where, dtype) -> None:
    expected = f"takes float16 or bfloat16 on CUDA, qkv is {dtype} on {where.type}$"
    with pytest.raises(ValueError, match=expected):
        choose_backend("flash", where, dtype, 256, 72)


def test_flash_without_a_package_names_the_extra_and_what_was_tried(device) -> None:
    device(90)
    with pytest.raises(ImportError) as caught:
        choose_backend("flash", CUDA, torch.bfloat16, 256, 72)
    assert str(caught.value) == (
        "attention: backend='flash' needs flash-attn, extra 'flash' of dit-fast "
        "(flash_attn_interface: no flash-attn 3; flash_attn.cute: no flash-attn 4; flash_attn: no flash-attn 2)"
    )


@pytest.mark.parametrize(
    ("capability", "installed", "version"),
    [
        (80, (2, 3, 4), 2),
        (89, (2,), 2),
        (90, (2, 3, 4), 3),
        (90, (2, 4), 4),
        (90, (2,), 2),
        (100, (2, 3, 4), 4),
        (103, (2, 3), 2),
        (120, (2, 4), 2),
    ],
)
def test_first_flash_attn_that_the_device_runs(device, capability, installed, version) -> None:
    device(capability, *installed)
    assert flash_version(0) == version
    choice = choose_backend("flash", CUDA, torch.float16, 256, 72)
    assert choice == Choice("flash", f"asked for; flash-attn {version} is installed")


def test_flash_attn_for_other_architectures_does_not_count(device) -> None:
    device(80, 3, 4)
    with pytest.raises(ImportError, match=r"flash_attn: no flash-attn 2\)$"):
        flash_version(0)


def test_auto_without_cuda() -> None:
    expected = Choice("sdpa", "auto on cpu: PyTorch's kernels are the ones made for it")
    assert choose_backend("auto", CPU, torch.bfloat16, 256, 72) == expected


def test_auto_without_a_measurement(device, table) -> None:
    device(90, 3)
    table["torch.bfloat16-K64-T256"] = "triton"
    expected = Choice("sdpa", "auto: no tuned table of this device has measured this shape")
    assert choose_backend("auto", CUDA, torch.bfloat16, 256, 72) == expected


@pytest.mark.parametrize(
    ("capability", "dtype", "K", "prefers", "expected"),
    [
        (90, torch.bfloat16, 72, False, "cudnn"),
        (100, torch.float16, 64, False, "cudnn"),
        (90, torch.bfloat16, 72, True, "sdpa"),  # PyTorch takes cuDNN's itself
        (80, torch.bfloat16, 72, False, "sdpa"),
        (90, torch.float32, 72, False, "sdpa"),
        (90, torch.bfloat16, 12, False, "sdpa"),
    ],
)
def test_auto_is_cudnn_s_on_hopper_until_measured(
    device, table, monkeypatch, capability, dtype, K, prefers, expected
):
    device(capability)
    monkeypatch.setattr(attention_backends, "_TORCH_PREFERS_CUDNN", prefers)
    assert choose_backend("auto", CUDA, dtype, 256, K).name == expected
    table[f"{dtype}-K{K}-T256"] = "triton"
    assert choose_backend("auto", CUDA, dtype, 256, K).name == "triton"


def test_cudnn_first_is_attention_and_traces_whole() -> None:
    """Without cuDNN it is what PyTorch runs otherwise; the priorities before it are those after it."""
    before = _cur_sdpa_kernel_backends(with_priority=True)
    for bias in (False, True):
        assert_is_attention(cudnn_attention, bias)
    qkv, heads, _, _ = draw(2, 9, 3, 24, False)
    compiled = torch.compile(cudnn_attention, fullgraph=True)
    assert_close(compiled(qkv, heads, None), cudnn_attention(qkv, heads, None))
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.parametrize(
    ("tokens", "bound"),
    [(1, "256"), (256, "256"), (257, "1024"), (1024, "1024"), (4096, "4096"), (4097, "more")],
)
def test_auto_follows_the_table(device, table, tokens, bound) -> None:
    device(90)
    table[f"torch.bfloat16-K72-T{bound}"] = "triton"
    expected = Choice("triton", "auto: fastest in this device's tuned table")
    assert choose_backend("auto", CUDA, torch.bfloat16, tokens, 72) == expected


def test_auto_takes_flash_only_where_it_imports(device, table) -> None:
    table["torch.bfloat16-K72-T256"] = table["torch.float32-K72-T256"] = "flash"
    device(90, 3)
    assert choose_backend("auto", CUDA, torch.bfloat16, 256, 72).name == "flash"
    # A table made by hand: flash-attn takes no float32.
    assert choose_backend("auto", CUDA, torch.float32, 256, 72).name == "sdpa"
    device(90)
    expected = Choice("sdpa", "auto: the tuned table says flash, which is not installed (extra 'flash')")
    assert choose_backend("auto", CUDA, torch.bfloat16, 256, 72) == expected


def test_a_package_that_does_not_import_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_backends._flash_function.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    try:
        assert "flash_attn" in attention_backends._flash_function(2)
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        attention_backends._flash_function.cache_clear()
        assert attention_backends._flash_function(2).endswith("has no attribute 'flash_attn_qkvpacked_func'")
    finally:
        attention_backends._flash_function.cache_clear()


@pytest.mark.parametrize(
    ("backend", "kernels", "K", "expected"),
    [
        ("auto", "auto", 72, "sdpa"),
        ("auto", "triton", 72, "triton"),
        # No Triton kernel takes 12 or 136 columns: "auto" then stays PyTorch's.
        ("auto", "triton", 12, "sdpa"),
        ("auto", "triton", 136, "sdpa"),
        ("sdpa", "triton", 72, "sdpa"),
        ("triton", "auto", 72, "triton"),
        ("triton", "reference", 72, "sdpa"),
        ("auto", "reference", 72, "sdpa"),
    ],
)
def test_backend_and_kernels_together(backend, kernels, K, expected) -> None:
    assert attention_backend(torch.empty(2, 16, K), K, backend, kernels) == expected


def draw(B: int, T: int, H: int, K: int, bias: bool) -> tuple[Tensor, int, Tensor | None, Tensor]:
    """qkv, heads, bias and d_out in float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, T, 3 * H * K), (3 * H * K,), (B, T, H * K))
    qkv, b, dout = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return qkv.requires_grad_(), H, b.requires_grad_() if bias else None, dout


def assert_is_attention(function, bias: bool) -> None:
    """Output and gradients of the reference."""
    qkv, H, b, dout = draw(2, 9, 3, 24, bias)
    leaves = [qkv] if b is None else [qkv, b]
    got, want = function(qkv, H, b), reference.attention(qkv, H, b)
    assert_close(got, want)
    for ours, exact in zip(
        torch.autograd.grad(got, leaves, dout), torch.autograd.grad(want, leaves, dout), strict=True
    ):
        assert_close(ours, exact)


@pytest.mark.parametrize("bias", [True, False])
def test_sdpa_is_the_reference(bias) -> None:
    assert_is_attention(sdpa_attention, bias)
    assert_is_attention(lambda *inputs: attention(*inputs, backend="sdpa"), bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("version", [2, 3])
def test_packed_flash_attn_is_called_as_it_wants(monkeypatch, version, bias) -> None:
    """Packed (B, T, 3, H, K), scale and determinism given; version 3 returns a tuple."""
    seen = []

    def qkvpacked(qkv: Tensor, *, softmax_scale: float, deterministic: bool):
        seen.append((tuple(qkv.shape), softmax_scale, deterministic))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)
        return (out, None) if version == 3 else out

    monkeypatch.setattr(attention_backends, "_index", lambda device: 0)
    monkeypatch.setattr(attention_backends, "flash_version", lambda index: version)
    monkeypatch.setattr(attention_backends, "_flash_function", lambda version: qkvpacked)
    assert_is_attention(attention_backends.flash_attention, bias)
    assert seen == [((2, 9, 3, 3, 24), 24**-0.5, True)]


@pytest.mark.parametrize("bias", [True, False])
def test_flash_attn_4_is_called_as_it_wants(monkeypatch, bias) -> None:
    """(B, T, H, K) views of the packed tensor, log-sum-exp kept, the deterministic backward."""

    def probabilities(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
        return scores.softmax(-1), scores.logsumexp(-1)

    def forward(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, return_lse: bool):
        p, lse = probabilities(q, k, softmax_scale)
        return torch.einsum("bhts,bshk->bthk", p, v), lse if return_lse else None

    def backward(q, k, v, out, dout, lse, *, softmax_scale: float, deterministic: bool):
        assert deterministic
        p, exact = probabilities(q, k, softmax_scale)
        assert_close(lse, exact)
        dp = torch.einsum("bthk,bshk->bhts", dout, v)
        delta = (dout * out).sum(-1).transpose(1, 2)
        ds = p * (dp - delta[..., None]) * softmax_scale
        dq, dk = torch.einsum("bhts,bshk->bthk", ds, k), torch.einsum("bhts,bthk->bshk", ds, q)
        return dq, dk, torch.einsum("bhts,bthk->bshk", p, dout)

    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    monkeypatch.setattr(attention_backends, "_index", lambda device: 0)
    monkeypatch.setattr(attention_backends, "flash_version", lambda index: 4)
    assert_is_attention(attention_backends.flash_attention, bias)
