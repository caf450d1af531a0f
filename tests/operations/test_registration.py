"""How operations reach PyTorch: called directly where nothing listens, through the dispatcher where something does."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.ops.registry import REGISTRY
from dit_fast.kernels import attention, gated_residual_adaln, gelu, mlp, patch_embed, reference
from dit_fast.kernels.launch import record_launches
from dit_fast.kernels.library import IMPLEMENTATIONS, define_op
from tests.tolerance import assert_close


class Dispatched(TorchDispatchMode):
    """Counts the operations that pass the dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Counts the functions that are called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Logged(Tensor):
    """A subclass that reports what it meets."""

    met: ClassVar[Counter[str]] = Counter()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.met[str(func)] += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8), torch.randn(8)


@pytest.fixture
def dispatcher(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of the registered `gelu` by the dispatcher."""
    calls: Counter[str] = Counter()
    overload = torch.ops.dit_fast.gelu.default
    call = type(overload).__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[self.name()] += 1
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(overload), "__call__", counted)
    return calls


def test_plain_tensors_do_not_pass_the_dispatcher(dispatcher: Counter[str]) -> None:
    x, bias = inputs()
    exact = reference.gelu(x, bias)
    assert torch.equal(gelu(x, bias, kernels="triton"), exact)
    assert torch.equal(gelu(torch.nn.Parameter(x), torch.nn.Parameter(bias), kernels="triton"), exact)
    with torch.inference_mode():
        assert torch.equal(gelu(x, bias, kernels="triton"), exact)
    assert not dispatcher


def test_what_listens_hears_of_the_operation(dispatcher: Counter[str]) -> None:
    """Modes, subclasses, function transforms and profilers see `dit_fast::gelu`, forward and backward."""
    x, bias = inputs()
    x.requires_grad_()
    with Dispatched() as mode:
        gelu(x, bias, kernels="triton").sum().backward()
    assert mode.seen["dit_fast::gelu"] == mode.seen["dit_fast::gelu_backward"] == 1
    with Functions() as functions:
        gelu(x, bias, kernels="triton")
    assert any("gelu" in name for name in functions.seen)
    gelu(x.detach().as_subclass(Logged), bias, kernels="triton")
    assert any("gelu" in name for name in Logged.met)
    with torch.profiler.profile() as profile:
        gelu(x, bias, kernels="triton")
    assert "dit_fast::gelu" in {event.key for event in profile.key_averages()}
    dispatcher.clear()
    mapped = torch.func.vmap(lambda row: gelu(row, bias, kernels="triton"))(x.detach())
    assert dispatcher["dit_fast::gelu"] > 0
    assert torch.equal(mapped, torch.stack([reference.gelu(row, bias) for row in x.detach()]))


def test_both_ways_give_the_same_bits() -> None:
    """Outputs and gradients, called directly and through the dispatcher, of arguments that are left out."""
    x, w1, b1, w2 = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16), torch.randn(8, 16)
    results = []
    for run in (
        lambda *tensors: mlp(*tensors, kernels="triton"),
        lambda *tensors: torch.ops.dit_fast.mlp(*tensors)[0],
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w1, b1, w2)]
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_gradient_is_made_up_for_outputs_without_one() -> None:
    """`pre` of an MLP has four times the tokens' bytes: zeros of it were written in every backward pass."""
    leaves = [
        tensor.requires_grad_()
        for tensor in (torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16), torch.randn(8, 16))
    ]
    out = mlp(*leaves, kernels="triton")
    with Dispatched() as mode:
        torch.autograd.backward(out, torch.ones_like(out))
    assert not [name for name in mode.seen if "zero" in name or "fill" in name]


@pytest.mark.parametrize("used", ["out", "y", "both"])
def test_an_output_that_is_not_used(used: str) -> None:
    torch.manual_seed(0)
    plain = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(2)]
    plain += [torch.randn(2, 8, dtype=torch.float64) for _ in range(3)]
    weights = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    found = []
    for function in (gated_residual_adaln, reference.gated_residual_adaln):
        leaves = [value.clone().requires_grad_() for value in plain]
        keywords = {"kernels": "triton"} if function is gated_residual_adaln else {}
        outputs = function(*leaves, **keywords)
        kept = {"out": [0], "y": [1], "both": [0, 1]}[used]
        loss = sum((outputs[index] * weights[index]).sum() for index in kept)
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for ours, exact in zip(*found, strict=True):
        exact = torch.zeros_like(ours) if exact is None else exact
        assert (ours - exact).abs().max() <= 1e-12 * max(1.0, exact.abs().max().item())


def test_no_gradient_comes_back_where_none_arrives() -> None:
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    x, bias = inputs()
    x.requires_grad_()
    Cut.apply(gelu(x, bias, kernels="triton")).sum().backward()
    assert x.grad is None


def test_derivatives_that_do_not_exist_are_refused() -> None:
    """Not zero in silence: second order, and forward mode."""
    x, bias = inputs()
    x.requires_grad_()
    out = gelu(x, bias, kernels="triton")
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gelu_backward has no gradient; .*kernels='reference'"):
        gradient.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(
            RuntimeError, match=r"gelu_backward has no forward-mode derivative; .*'reference'"
        ):
            torch.ops.dit_fast.gelu_backward(dual, x, bias, True, True)
        # A tensor without a tangent is a constant.
        assert torch.equal(gelu(x, bias, kernels="triton"), out)
        tangent = torch.autograd.forward_ad.unpack_dual(gelu(dual, bias, kernels="triton")).tangent
    with pytest.raises(RuntimeError, match=r"the tangent of gelu has no gradient; .*kernels='reference'"):
        tangent.sum().backward()


def jvp_by_level(function: Callable[[Tensor], Tensor], x: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autograd.forward_ad.dual_level():
        out = function(torch.autograd.forward_ad.make_dual(x, x_t))
        value, tangent = torch.autograd.forward_ad.unpack_dual(out)
        return value, tangent.detach()


def jvp_by_transform(function: Callable[[Tensor], Tensor], x: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
    value, tangent = torch.func.jvp(function, (x,), (x_t,))
    return value, tangent.detach()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("jvp", [jvp_by_level, jvp_by_transform])
def test_forward_mode_of_pytorch(jvp: Callable[..., tuple[Tensor, Tensor]], compiled: bool) -> None:
    """Both of PyTorch's ways, eager and in one graph, with the ordinary gradient of the value."""
    x, bias = inputs()
    x.requires_grad_()
    run = functools.partial(jvp, functools.partial(gelu, bias=bias, kernels="triton"))
    out, tangent = (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)(
        x, x.detach()
    )
    exact, exact_t = torch.func.jvp(lambda x: reference.gelu(x, bias), (x,), (x.detach(),))
    assert_close(out, exact)
    assert_close(tangent, exact_t)
    ours, theirs = (torch.autograd.grad(value.sum(), x)[0] for value in (out, exact))
    assert_close(ours, theirs)


def test_functions_of_torch_func_are_refused_in_one_line() -> None:
    x, bias = inputs()
    with pytest.raises(RuntimeError, match=r"gelu has no derivative for torch.func.*kernels='reference'"):
        torch.func.grad(lambda x: gelu(x, bias, kernels="triton").sum())(x)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Replicate(), Shard(0)])
def test_shards_are_refused_in_one_line(mesh: DeviceMesh, placement: Placement) -> None:
    """The reference computes on them, where PyTorch has a rule for each of its operations."""
    x, bias = inputs()
    shards, whole = distribute_tensor(x, mesh, [placement]), distribute_tensor(bias, mesh, [Replicate()])
    expected = gelu(x, bias)
    local = gelu(shards.to_local(), whole.to_local(), kernels="triton")
    assert torch.equal(local, expected)
    assert torch.equal(gelu(shards, whole, kernels="reference").to_local(), expected)
    for given in ((shards, whole), (shards, bias), (x, whole)):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode(), pytest.raises(RuntimeError, match=r"^gelu has no rule for .*to_local\(\)") as caught:
                gelu(*given, kernels="triton")
            assert "\n" not in str(caught.value)
        with pytest.raises(RuntimeError, match=r"^gelu has no rule for the shards of a DTensor"):
            torch.ops.dit_fast.gelu(*given)


def test_an_output_can_be_changed_in_place() -> None:
    """What hooks and adapters do, called directly and through the dispatcher."""
    x, w1, b1, w2 = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16), torch.randn(8, 16)
    for run in (
        lambda *tensors: mlp(*tensors, kernels="triton"),
        lambda *tensors: torch.ops.dit_fast.mlp(*tensors)[0],
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w1, b1, w2)]
        out = run(*leaves)
        expected = torch.autograd.grad(2 * out.sum(), leaves, retain_graph=True)
        found = torch.autograd.grad(out.mul_(2).sum(), leaves)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:Anomaly", "ignore:Error detected")
def test_autograd_names_the_operation() -> None:
    x, bias = inputs()
    out = gelu(x.requires_grad_(), bias, kernels="triton")
    assert type(out.grad_fn).__name__ == "geluBackward"
    with (
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match="'geluBackward' returned nan"),
    ):
        gelu(x * torch.nan, bias, kernels="triton").sum().backward()


@pytest.mark.parametrize("key", REGISTRY)
def test_outputs_own_their_memory(key: str) -> None:
    """Autograd refuses to change a view that an operation returned in place, which hooks and adapters do."""
    spec = REGISTRY[key]
    given = spec.make_inputs((2, 4, 40), torch.float32, torch.float32, torch.randn)
    wanted = zip(given, spec.differentiable(given), strict=True)
    leaves = [value.detach().requires_grad_() if needed else value for value, needed in wanted]
    for inputs in (given, leaves):
        outputs = spec.op(*inputs, kernels="triton")
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            assert output._base is None


def test_the_kernels_outputs_own_their_memory() -> None:
    """As above, on the device: of the products, which are PyTorch's."""
    shapes = (2, 4, 64), (256, 64), (256,), (64, 256)
    with record_launches():
        out, *_ = IMPLEMENTATIONS["mlp"](*[torch.empty(shape, device="meta") for shape in shapes])
    assert out._base is None
    assert out.shape == (2, 4, 64)


def test_tensors_whose_memory_is_not_their_values_pass_the_dispatcher(dispatcher: Counter[str]) -> None:
    """A negated view, and the batches of `is_grads_batched`: a kernel that read their memory would be wrong."""
    x, bias = inputs()
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    assert torch.equal(gelu(negated, bias, kernels="triton"), reference.gelu(-x, bias))
    assert dispatcher["dit_fast::gelu"] > 0
    out = gelu(x.requires_grad_(), bias, kernels="triton")
    vectors = torch.randn(3, *out.shape)
    (found,) = torch.autograd.grad(out, x, vectors, is_grads_batched=True, retain_graph=True)
    assert dispatcher["dit_fast::gelu_backward"] > 0
    single = [torch.autograd.grad(out, x, vector, retain_graph=True)[0] for vector in vectors]
    assert torch.equal(found, torch.stack(single))


def test_flops_are_those_of_pytorchs_products() -> None:
    """`FlopCounterMode` knew none of the operations, and left most of a step out."""
    x, w1, b1, w2 = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16), torch.randn(8, 16)
    images, weight, bias, pos = (
        torch.randn(2, 4, 8, 8), torch.randn(16, 4, 2, 2), torch.randn(16), torch.zeros(1, 16, 16)
    )  # fmt: skip
    counts: dict[str, list[int]] = {}
    for kernels in ("triton", "reference"):
        for frozen in (False, True):
            for function, inputs in ((mlp, (x, w1, b1, w2)), (patch_embed, (images, weight, bias, pos))):
                leaves = [
                    tensor.detach().requires_grad_(i == 0 or not frozen) for i, tensor in enumerate(inputs)
                ]
                if function is patch_embed and frozen:
                    leaves[0].requires_grad_(False)
                    leaves[1].requires_grad_()
                with FlopCounterMode(display=False) as counter:
                    function(*leaves, kernels=kernels).sum().backward()
                counts.setdefault(kernels, []).append(counter.get_total_flops())
    assert counts["triton"] == counts["reference"]
    qkv = torch.randn(2, 5, 3 * 2 * 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attention(qkv, 2, backend="triton", kernels="triton").sum().backward()
    shape = (2, 2, 5, 8)
    expected = sdpa_flop_count(shape, shape, shape) + sdpa_backward_flop_count(shape, shape, shape, shape)
    assert counter.get_total_flops() == expected


def test_an_operation_without_a_gradient_takes_plain_tensors() -> None:
    def double(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor

    op = define_op("test_double", triton_impl=double, reference_impl=double, fake=double)
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(op(x.detach()), 2 * x.detach())
    with pytest.raises(RuntimeError, match="test_double has no gradient"):
        op(x).sum().backward()
