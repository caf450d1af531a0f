"""The proofs of a kernel, functions of an OpSpec that raise AssertionError: real and planted operations pass here.

The numbers K1 to K10 are the cases of the tests that use them.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from benchmarks.ops.registry import REGISTRY, OpSpec, Shape
from dit_fast.kernels import tuned
from dit_fast.kernels.launch import record_launches
from dit_fast.kernels.library import MAX_WIDTH
from tests.kernels.guarded import Side, fenced_run, last_programs_agree, reaches
from tests.kernels.interpreter import INTERPRETED
from tests.tolerance import assert_as_accurate, rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = pytest.mark.parametrize(
    "spec",
    [pytest.param(s, id=s.key, marks=pytest.mark.nightly if s.variant else ()) for s in REGISTRY.values()],
)
"""Every operation and, nightly, every variant of one."""
VARIANTS_TOO = pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY.keys())
"""For what a variant has of its own: its formula and its gradient."""
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.bfloat16),
    "autocast-fp16": (torch.float32, torch.float16),
}
REPEATS = 2 if INTERPRETED else 50
FLOAT64 = 1e-12
"""4,500 units of float64's last place, which is `rounding` of sums of 1.2 million terms: no shape of a test has those,
and what is rounded to float32 anywhere on its way is wrong by 1e-8 or more."""
FLOOR = rounding(4)
"""What a value of size 1 may be wrong by in float32 however few its terms are: 8 units of the last place, 9.5e-7."""


def draw(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, dtype=torch.float64, device=DEVICE).to(dtype)


def meta(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def leaves_of(inputs: Any) -> list[Any]:
    """The inputs in their own layouts, their tensors detached and ready for gradients."""
    return [value.detach().requires_grad_() if isinstance(value, Tensor) else value for value in inputs]


def evaluate(function: Callable[..., Any], inputs: Any, weights: Any = None, **kwargs: Any) -> list[Tensor]:
    """Outputs, and the gradients of sum(output * weight) in the inputs' own dtypes."""
    leaves = leaves_of(inputs)
    outputs = as_tuple(function(*leaves, **kwargs))
    if weights is None:
        torch.manual_seed(1)
        weights = [draw(*output.shape, dtype=torch.float64) for output in outputs]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    # A tangent has no gradient.
    pairs = [(o, w.to(o.dtype)) for w, o in zip(weights, outputs, strict=True) if o.requires_grad]
    # What an operation holds constant has a gradient of zeros.
    roots, weights = zip(*pairs, strict=True)
    grads = torch.autograd.grad(roots, tensors, weights, materialize_grads=True)
    return [output.detach() for output in outputs] + list(grads)


def fused(spec: OpSpec, inputs: Any, weights: Any = None) -> list[Tensor]:
    """Outputs and gradients from the kernels."""
    return evaluate(spec.op, inputs, weights, kernels="triton")


def upcast(inputs: Any) -> list[Any]:
    return [value.double() if isinstance(value, Tensor) else value for value in inputs]


def outputs_of(spec: OpSpec) -> int:
    """How many outputs the operation has."""
    return len(as_tuple(spec.reference(*spec.make_inputs((1, 4, 72), torch.float64, torch.float64, draw))))


def values_of(spec: OpSpec) -> int:
    """How many of them are no tangents, which are derivatives as gradients are."""
    return outputs_of(spec) // (2 if spec.variant.endswith("dual") else 1)


def names_of(spec: OpSpec, inputs: Any) -> dict[str, Any]:
    """The inputs by the names of the operation's parameters."""
    return dict(zip(inspect.signature(spec.op).parameters, inputs, strict=False))


def same_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def agrees_in_float64(spec: OpSpec, shape: Shape) -> None:
    """Outputs and gradients within FLOAT64 of the reference; K6 as well, since unwritten elements are NaN."""
    inputs = spec.make_inputs(shape, torch.float64, torch.float64, draw)
    for got, want in zip(fused(spec, inputs), evaluate(spec.reference, inputs), strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= FLOAT64 * max(1.0, want.abs().max().item())


def is_as_accurate_as_torch(spec: OpSpec, shape: Shape, dtypes: str) -> None:
    """K1: error against float64 at most twice PyTorch's own in the same dtypes, three times for gradients."""
    stream, low = DTYPES[dtypes]
    torch.manual_seed(0)
    inputs = spec.make_inputs(shape, stream, low, draw)
    exact, torchs = evaluate(spec.reference, upcast(inputs)), evaluate(spec.reference, inputs)
    # Of few values PyTorch may meet each by luck: rounding the exact one, half a unit of its last place, always passes.
    floor = max(FLOOR, torch.finfo(low).eps / 2)
    for index, (got, same, want) in enumerate(zip(fused(spec, inputs), torchs, exact, strict=True)):
        assert_as_accurate(got, same, want, 2 if index < outputs_of(spec) else 3, floor)


def takes_no_rows(spec: OpSpec, shape: Shape) -> None:
    """K2: empty outputs; the gradient of an empty input is empty, of any other one zero."""
    inputs = spec.make_inputs(shape, torch.float32, torch.float32, draw)
    results = fused(spec, inputs)
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    outputs, grads = results[: -len(tensors)], results[-len(tensors) :]
    assert all(output.numel() == 0 for output in outputs)
    for grad, value in zip(grads, tensors, strict=True):
        assert grad.shape == value.shape
        assert torch.equal(grad, torch.zeros_like(value))


def layouts(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values transposed, as every other column, of every other row, and one element off alignment."""
    yield "transposed", value.transpose(0, -1).contiguous().transpose(0, -1)
    yield "columns apart", torch.stack([value, value], -1)[..., 0]
    yield "rows apart", torch.stack([value, value], 1)[:, 0]
    shifted = value.new_empty(value.numel() + 1)[1:].view(value.shape).copy_(value)
    yield "misaligned", shifted
    padded = value.new_empty(*value.shape[:-1], value.shape[-1] + 1)
    yield "rows longer", padded[..., : value.shape[-1]].copy_(value)


def is_the_same_in_any_layout(spec: OpSpec, shape: Shape) -> None:
    """K3: inputs and gradients in any layout, stride 0 included, give what contiguous ones give, to the bit."""
    inputs = spec.make_inputs(shape, torch.float32, torch.float32, draw)
    plain = [value.contiguous() if isinstance(value, Tensor) else value for value in inputs]
    weights = [draw(*output.shape, dtype=torch.float32) for output in as_tuple(spec.reference(*plain))]
    expected = fused(spec, plain, weights)
    assert same_bits(expected, fused(spec, inputs, weights)), "the inputs as they are made"
    others = [dict(layouts(value)) if isinstance(value, Tensor) else None for value in plain]
    grads = [dict(layouts(weight)) for weight in weights]
    for name in ("transposed", "columns apart", "rows apart", "misaligned", "rows longer"):
        changed = [
            value if other is None else other[name] for value, other in zip(plain, others, strict=True)
        ]
        assert same_bits(expected, fused(spec, changed, [grad[name] for grad in grads])), name
    ones = [torch.ones((), dtype=torch.float32, device=DEVICE).expand(weight.shape) for weight in weights]
    flat = [
        value.flatten()[:1].expand(value.shape) if isinstance(value, Tensor) else value for value in plain
    ]
    full = [value.contiguous() if isinstance(value, Tensor) else value for value in flat]
    assert same_bits(fused(spec, full, [one.contiguous() for one in ones]), fused(spec, flat, ones)), (
        "stride 0"
    )


HARD_ROWS: dict[str, Callable[[Tensor], Any]] = {
    "NaN": lambda row: row[3:4].fill_(math.nan),
    "+Inf": lambda row: row[5:6].fill_(math.inf),
    "-Inf": lambda row: row[5:6].fill_(-math.inf),
    "mean 1e4": lambda row: row.add_(1e4),
    "equal": lambda row: row.fill_(2.5),
    "zero": lambda row: row.fill_(0.0),
    "denormal": lambda row: row.mul_(1e-40),
}


def survives_hard_rows(spec: OpSpec, kind: str) -> None:
    """K7: one odd row, in each input in turn. NaN and infinities where PyTorch has them, its accuracy elsewhere.

    Of gradients of infinite inputs it is asked only that they are finite where PyTorch's are: whether a sum of
    infinities is one or NaN depends on how a formula is grouped, and closed forms group otherwise than autograd.
    """
    plain = spec.make_inputs((1, 4, 72), torch.float32, torch.float32, draw)
    for position, chosen in enumerate(plain):
        if not isinstance(chosen, Tensor):
            continue
        inputs = [value.clone() if isinstance(value, Tensor) else value for value in plain]
        HARD_ROWS[kind](inputs[position].reshape(-1, inputs[position].shape[-1])[0] if chosen.is_contiguous()
                        else inputs[position][0])  # fmt: skip
        torchs = evaluate(spec.reference, inputs)
        exact = evaluate(spec.reference, upcast(inputs))
        for index, (got, same, want) in enumerate(zip(fused(spec, inputs), torchs, exact, strict=True)):
            where = f"{kind} in input {position}, result {index}"
            assert torch.equal(got.isfinite(), same.isfinite()), f"{where}: finite elsewhere than PyTorch"
            if index < values_of(spec) or "Inf" not in kind:
                assert torch.equal(got.isnan(), same.isnan()), f"{where}: NaN elsewhere than PyTorch"
            finite = same.isfinite() & want.isfinite()
            factor = 2 if index < values_of(spec) else 3
            assert_as_accurate(got[finite], same[finite], want[finite], factor, FLOOR)


def is_beyond_int32(spec: OpSpec, shape: Shape, folder: Path, exempt: dict[str, str]) -> list[str]:
    """K4: the last programs of launches that pass 2^31 elements, forward and backward, compute what small ones do.

    `shape` is the large one; the small one has its last samples, whole tiles of them. Returns what is wrong.
    """
    samples = 64 if shape[-1] < 2**16 else 8
    recorded = []
    for batch in (samples, shape[0]):
        with record_launches(capability=0) as launches:
            evaluate_meta(spec, (batch, *shape[1:]))
        recorded.append(launches)
    faults, checked = [], 0
    for index, (small, large) in enumerate(zip(*recorded, strict=True)):
        name = large.kernel.__name__
        assert large.kernel is small.kernel
        if name in exempt:
            continue
        assert reaches(large) > 2**31, f"{name} stays within 32-bit offsets"
        (folder / str(index)).mkdir(parents=True)
        faults += last_programs_agree(large, small, folder / str(index))
        checked += 1
    assert checked, "nothing was launched"
    return faults


def evaluate_meta(spec: OpSpec, shape: Shape) -> None:
    """Forward and backward on meta tensors in float16."""
    inputs = spec.make_inputs(shape, torch.float16, torch.float16, meta)
    leaves = leaves_of(inputs)
    outputs = as_tuple(spec.op(*leaves, kernels="triton"))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    torch.autograd.grad(outputs, tensors, [torch.empty_like(output) for output in outputs], allow_unused=True)


def stays_inside_its_tensors(spec: OpSpec, shape: Shape, side: Side) -> None:
    """K5: protected pages beside every argument of every launch, canaries in the gaps of strided ones."""
    inputs = spec.make_inputs(shape, torch.float32, torch.float32, draw)
    assert not fenced_run(lambda: fused(spec, inputs), side)


def passes_gradcheck(spec: OpSpec) -> None:
    """K9: gradients against finite differences in float64, the same at every call."""
    inputs = leaves_of(spec.make_inputs((1, 4, 12), torch.float64, torch.float64, draw))
    for value, wanted in zip(inputs, spec.differentiable(inputs), strict=True):
        if isinstance(value, Tensor):
            value.requires_grad_(wanted)
    assert torch.autograd.gradcheck(lambda *args: spec.op(*args, kernels="triton"), inputs, fast_mode=True)


class Calls(TorchDispatchMode):
    """The calls of registered operations of a namespace, below autograd."""

    def __init__(self, namespace: str):
        super().__init__()
        self.namespace = namespace
        self.seen: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            self.seen.setdefault(func.name(), (func, args))
        return func(*args, **(kwargs or {}))


def registered_calls(spec: OpSpec, namespace: str = "dit_fast") -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The registered operations that a forward and a backward call, by name, with their arguments."""
    inputs = spec.make_inputs((2, 4, 24), torch.float32, torch.float32, draw)
    with Calls(namespace) as calls:
        fused(spec, inputs)
    return calls.seen


def passes_opcheck(spec: OpSpec, namespace: str = "dit_fast") -> None:
    """K9: schema, fake tensors, autograd registration and dynamic shapes, of the forward and of the backward op."""
    calls = registered_calls(spec, namespace)
    assert calls
    for name, (op, args) in calls.items():
        # A backward operation has no gradient of its own, and the tangent of a dual one has none.
        with_gradient = not name.endswith(("_backward", "_dual"))
        results = torch.library.opcheck(op, [
            value.detach().requires_grad_(with_gradient and value.is_floating_point())
            if isinstance(value, Tensor)
            else value
            for value in args
        ])  # fmt: skip
        assert set(results.values()) == {"SUCCESS"}, name


def repeats_to_the_bit(spec: OpSpec, shape: Shape) -> None:
    """K10: the same bits from every run."""
    inputs = spec.make_inputs(shape, torch.float32, torch.float32, draw)
    first = fused(spec, inputs)
    assert all(same_bits(first, fused(spec, inputs)) for _ in range(REPEATS - 1))


def misfits(spec: OpSpec) -> Iterator[tuple[str, list[Any]]]:
    """Inputs of which one does not fit, with a word for what is wrong with it."""
    plain = list(spec.make_inputs((2, 4, 72), torch.float32, torch.float32, draw))
    for position, value in enumerate(plain):
        if not isinstance(value, Tensor):
            continue

        def put(other: Any, position: int = position) -> list[Any]:
            return [*plain[:position], other, *plain[position + 1 :]]

        yield "one dimension more", put(value[None])
        yield "one dimension less", put(value[..., 0])
        for dim in range(value.ndim):
            yield f"dimension {dim} longer", put(torch.cat([value, value.narrow(dim, 0, 1)], dim))


def strangers(spec: OpSpec) -> Iterator[tuple[str, str, list[Any]]]:
    """(what, argument, inputs): one tensor of integers, or on another device than the rest."""
    plain = list(spec.make_inputs((2, 4, 72), torch.float32, torch.float32, draw))
    alone = sum(isinstance(value, Tensor) for value in plain) == 1
    for position, (name, value) in enumerate(names_of(spec, plain).items()):
        if isinstance(value, Tensor):
            yield "dtype", name, [*plain[:position], value.int(), *plain[position + 1 :]]
            if not alone:
                yield "device", name, [*plain[:position], value.to("meta"), *plain[position + 1 :]]


def message_of(spec: OpSpec, inputs: list[Any]) -> str | None:
    """What the operation's ValueError says; None without one."""
    try:
        spec.op(*inputs, kernels="triton")
    except ValueError as error:
        return str(error)
    return None


@contextmanager
def faked(inputs: list[Any]) -> Iterator[list[Any]]:
    """The inputs under FakeTensorMode."""
    with FakeTensorMode() as mode:
        yield [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in inputs]


@contextmanager
def no_launches() -> Iterator[None]:
    """A launch fails."""

    def refuse(self: Any, grid: Any) -> None:
        raise AssertionError("launched")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", refuse)
        tuned.drop_plans()
        yield
    tuned.drop_plans()


def assert_refused(spec: OpSpec, inputs: list[Any], what: str) -> None:
    """K8: one line that begins with the operation and names an argument; no launch; the same under fake tensors."""
    with no_launches():
        message = message_of(spec, inputs)
    assert message is not None, f"{what}: accepted"
    assert message.startswith(f"{spec.name}: "), message
    assert "\n" not in message
    words = set(re.findall(r"\w+", message))
    assert words & {*inspect.signature(spec.op).parameters, "width"}, f"{what}: names no argument: {message}"
    with faked(inputs) as fakes:
        assert message_of(spec, fakes) == message


def refuses_misfits(spec: OpSpec) -> None:
    """K8: what does not fit is refused, or is right after all: PyTorch's broadcasting may make sense of it."""
    refused = 0
    for what, inputs in misfits(spec):
        if message_of(spec, inputs) is None:
            ours, torchs = as_tuple(spec.op(*inputs, kernels="triton")), as_tuple(spec.reference(*inputs))
            assert all(torch.allclose(a, b, 1e-4, 1e-4) for a, b in zip(ours, torchs, strict=True)), what
        else:
            assert_refused(spec, inputs, what)
            refused += 1
    assert refused


def limits_its_width(spec: OpSpec) -> bool:
    """Whether a width beyond MAX_WIDTH is refused; if so, in one line that names the width, under fake tensors too."""
    inputs = list(spec.make_inputs((1, 1, MAX_WIDTH + 8), torch.float32, torch.float32, meta))
    message = message_of(spec, inputs)
    if message is not None:
        assert re.match(rf"{spec.name}: width {MAX_WIDTH + 8} is not in", message), message
        assert_refused(spec, inputs, "width")
    return message is not None
