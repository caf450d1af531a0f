"""define_op: the one way an operation reaches PyTorch, and the one switch between kernel and reference."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast, get_args

import torch
import torch.autograd.forward_ad as fwAD
import triton
from torch import _C, Tensor
from torch.autograd import Function, _profiler_enabled
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from dit_fast.kernels import tuned
from dit_fast.kernels.launch import recording

T = TypeVar("T")

KernelMode = Literal["auto", "triton", "reference"]
KERNEL_MODES = get_args(KernelMode)

Norm = Literal["layernorm", "rmsnorm"]
NORMS = get_args(Norm)
"""What `norm` of the modulated norms may be."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What the kernels compute on."""

MAX_WIDTH = 8192
"""Widest row that a program holds; beyond it registers spill whatever the number of warps."""


def uses_triton(kernels: str, x: Tensor) -> bool:
    """Whether `kernels` ("auto" | "triton" | "reference") means the registered operation for a tensor like `x`.

    "auto" is the Triton kernel on CUDA and the PyTorch reference elsewhere. "triton" is the registered operation
    on any device; on a CPU that runs the reference behind the same registration (Triton's interpreter, when on,
    runs the kernel itself). Raises ValueError for an unknown value.
    """
    if kernels not in KERNEL_MODES:
        raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(map(repr, KERNEL_MODES))}")
    return kernels == "triton" or (kernels == "auto" and x.is_cuda)


def is_centred(norm: str) -> bool:
    """Whether a norm of NORMS subtracts the mean. Raises ValueError for an unknown value."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: choose one of {', '.join(map(repr, NORMS))}")
    return norm == "layernorm"


_library = torch.library.Library("dit_fast", "FRAGMENT")

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The function that launches an operation's kernels, by the operation's name: for tools that count launches."""


Run = Callable[..., Any]
"""What a plan returns: a function of the operation's arguments that allocates the outputs and launches."""


class Operation(Protocol):
    """A registered operation: a function of its arguments by position."""

    in_backward: Callable[..., Any]
    """in_backward(ctx, word, *arguments): the same within the backward pass of `ctx`, at less cost."""

    def __call__(self, *args: Any) -> Any: ...


class Plan(NamedTuple):
    """`run` for calls of one signature; `backward` keeps the same for its backward pass, None where nothing is kept."""

    run: Run
    backward: dict[Any, Run] | None


class Dual(NamedTuple):
    """An operation on dual numbers: values and tangents in, values and tangents out, in one pass.

    reference_impl(*arguments, *tangents) takes an operation's arguments and then, named `<argument>_t`, the tangent of
    each one that may have one, None where it has none and the annotation allows it, else zeros. It returns the
    operation's outputs and then the tangents of the first of them. The gradient goes through the values alone: it is
    that of the operation, and tangents are constants for reverse mode. `plan` and `flops` as in `define_op`.
    """

    reference_impl: Callable[..., Any]
    plan: Callable[..., Run]
    flops: Callable[..., int] | None = None


MOST_PLANS = 4096
"""Signatures that an operation keeps before it forgets them all: a bound for shapes without end."""

_VMAP_MODE = _C._dispatch_key_parse("VmapMode")
"""Included while `torch.autograd.grad(is_grads_batched=True)` runs: its tensors look plain and have no memory."""


def is_observed() -> object:
    """True if a compiler, mode, transform, tracer or profiler is to see each operation: the dispatcher calls them."""
    return (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state() is not None
        or fwAD._current_level >= 0
        or _profiler_enabled()
        or _C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
    )


def signature(args: Sequence[Any]) -> tuple[Any, ...]:
    """What decides how a call with `args` runs: all but strides, addresses and values of tensors."""
    return tuple(
        [
            (type(x), x.shape, x.dtype, x.device, x.requires_grad, x.is_neg()) if isinstance(x, Tensor) else x
            for x in args
        ]
    )


def define_op(
    name: str,
    *,
    reference_impl: Callable[..., Any],
    plan: Callable[..., Callable[..., Any]] | None = None,
    triton_impl: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    fake: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    flops: Callable[..., int] | None = None,
    dual: Dual | None = None,
) -> Operation:
    """Register `torch.ops.dit_fast.<name>` for CUDA (Triton), CPU (reference), fake tensors and autograd.

    The schema is read from the annotations of `reference_impl`. With Triton's interpreter on (TRITON_INTERPRET=1 when
    this is imported) the CPU runs the kernels, which is how the tests prove them on a machine without a GPU. While
    launches are recorded (`record_launches`), meta tensors go to the kernels as well, forward and backward.

    The returned function calls the implementation itself where PyTorch's dispatcher would do nothing else: for plain
    tensors, outside of compilation, function transforms, modes and profilers. What follows from shapes, dtypes and
    devices is kept for the next call with the same ones (`signature`); strides are read at each launch. Together that
    saves most of the host's time.

    Args:
        name: The operation's name.
        reference_impl: The operation in PyTorch.
        plan: plan(*arguments) prepares launches for arguments like these and returns the function of the arguments
            that allocates the outputs and launches. Give either this or `triton_impl`.
        triton_impl: Launches the kernels, with nothing prepared.
        check: check(*arguments) raises ValueError for arguments that do not fit.
        fake: Allocates the outputs for fake tensors; None derives them from `reference_impl`.
        backward: backward(ctx, *gradients of the outputs) returns a gradient or None for each input; None for an
            operation that has no gradient.
        setup_context: setup_context(ctx, inputs, output) keeps what `backward` needs.
        flops: Multiplications and additions of the matrix products, of the arguments with shapes in the place of
            tensors, for PyTorch's `FlopCounterMode`; None for an operation without products.
        dual: The operation on values and tangents, registered as `<name>_dual`, which forward-mode differentiation
            calls; None for an operation that has no forward-mode derivative.

    Returns:
        The operation, a function of the arguments of `reference_impl` by position.
    """
    parameters = inspect.signature(reference_impl).parameters.values()
    defaults = tuple(parameter.default for parameter in parameters)
    runs, calls = tuned.plan_cache(), tuned.plan_cache()

    def prepared(args: tuple[Any, ...]) -> Callable[..., Any]:
        return triton_impl if plan is None else plan(*args)  # type: ignore[return-value]

    def implementation(args: tuple[Any, ...]) -> Run:
        """What runs for plain tensors on one device."""
        on_cuda = any(isinstance(x, Tensor) and x.is_cuda for x in args)
        return prepared(args) if on_cuda or cpu_impl is launch_impl else cpu_impl

    def launch_impl(*args: Any) -> Any:
        # The dispatcher drops arguments that are equal to their defaults.
        args += defaults[len(args) :]
        key = signature(args)
        run = runs.get(key)
        if run is None:
            run = _keep(runs, key, prepared(args))
        index = next((x.get_device() for x in args if isinstance(x, Tensor) and x.is_cuda), -1)
        if index < 0 or index == torch.cuda.current_device():
            return run(*args)
        with torch.cuda.device(index):
            return run(*args)

    cpu_impl = launch_impl if triton.knobs.runtime.interpret else _owning_outputs(reference_impl)
    IMPLEMENTATIONS[name] = launch_impl
    _library.define(
        name + torch.library.infer_schema(reference_impl, mutates_args=()),
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    packet = getattr(torch.ops.dit_fast, name)
    overload = packet.default
    if flops is not None:
        # The counter adds `out_shape`, and leaves out arguments that are equal to their defaults.
        register_flop_formula(packet)(flops)
    # A backend's kernel called by code that torch.compile left alone is not code to compile.
    _library.impl(name, torch.compiler.disable(launch_impl), "CUDA")
    _library.impl(name, torch.compiler.disable(cpu_impl), "CPU")
    allocate = fake or functools.partial(_reference_outputs, reference_impl)

    def on_meta(*args: Any, **kwargs: Any) -> Any:
        meta = any(isinstance(arg, Tensor) and arg.is_meta for arg in (*args, *kwargs.values()))
        return (launch_impl if recording() and meta else allocate)(*args, **kwargs)

    torch.library.register_fake(f"dit_fast::{name}", on_meta, lib=_library)

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    push_forward = None
    if dual is not None:
        outputs = len(overload._schema.returns)
        push_forward = _push_forward(
            name, tuple(parameters), dual, outputs, backward=backward, setup_context=setup_context
        )

    # Without the wrapper of `apply`, which is for function transforms.
    differentiable = _differentiable(name, backward, setup_context)
    apply = super(Function, differentiable).apply  # type: ignore[misc]

    def autograd(*args: Any) -> Any:
        args += defaults[len(args) :]
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        _refuse_shards(name, tensors)
        if any(tangent_of(x) is not None for x in tensors):
            if push_forward is None:
                raise RuntimeError(f"{name} has no forward-mode derivative; use kernels='reference'")
            return push_forward(args)
        differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if differentiated and _C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{name} has no derivative for torch.func's transforms; use kernels='reference'"
            )
        return (
            differentiable.apply(*args, Plan(below_autograd, None))
            if differentiated
            else below_autograd(*args)
        )

    _library.impl(name, autograd, "Autograd")

    def first_call(key: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Plan, bool, int]:
        """What `call` keeps: what runs, whether a gradient may be wanted, and the index of the CUDA device or -1."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        _refuse_shards(name, tensors)
        if check is not None:
            check(*args)
        # Half of a conjugate's view is "negative": its memory holds the values with the other sign.
        plain = all(
            type(x) in (Tensor, Parameter) and x.device.type in ("cpu", "cuda") and not x.is_neg()
            for x in tensors
        )
        if not plain:
            found = Plan(overload, None), False, -1
        else:
            index = next((x.get_device() for x in tensors if x.is_cuda), -1)
            found = Plan(implementation(args), {}), any(x.requires_grad for x in tensors), index
        return _keep(calls, key, found)

    def call(*args: Any) -> Any:
        if is_observed():
            if check is not None:
                check(*args)
            return overload(*args)
        args += defaults[len(args) :]
        key = signature(args)
        try:
            found = calls.get(key)
        except TypeError:
            # Sizes that are symbols have no hash.
            return overload(*args)
        plan, differentiated, index = found or first_call(key, args)
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return call(*args)
        if differentiated and torch.is_grad_enabled():
            return apply(*args, plan)
        return plan.run(*args)

    def in_backward(ctx: Any, word: Any, *args: Any) -> Any:
        """`call` within the backward pass of `ctx`, of which `args` follow but for `word`: nothing is looked at again.

        Autograd gives the gradient the shape, dtype and device of the output, and saved tensors those they had.
        """
        plans = ctx.plan.backward
        gradient = args[0]
        if (
            plans is None
            or type(gradient) is not Tensor
            or gradient.is_neg()
            or torch.is_grad_enabled()
            or recording()
            or is_observed()
        ):
            return call(*args)
        run = plans.get(word)
        if run is None:
            if any(type(x) not in (Tensor, Parameter) for x in args if isinstance(x, Tensor)):
                return call(*args)
            run = plans[word] = implementation(args)
        return run(*args)

    operation = cast(Operation, call)
    operation.in_backward = in_backward
    return operation


def tangent_of(x: Tensor) -> Tensor | None:
    """The forward-mode tangent of `x`, None without one.

    Not `forward_ad.unpack_dual`, which asks Python whether there is a level: a compiled graph enters one in C++ alone.
    """
    return torch._VF._unpack_dual(x, level=0)[1]


def _push_forward(
    name: str,
    parameters: tuple[inspect.Parameter, ...],
    dual: Dual,
    outputs: int,
    *,
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None,
) -> Callable[[tuple[Any, ...]], Any]:
    """Register `<name>_dual`; the function of an operation's arguments, some of them dual tensors, that calls it."""
    count = len(parameters)
    extra = tuple(inspect.signature(dual.reference_impl).parameters.values())[count:]
    names = [parameter.name for parameter in parameters]
    differentiated = [names.index(parameter.name.removesuffix("_t")) for parameter in extra]
    required = [parameter.annotation is Tensor for parameter in extra]

    def dual_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        if setup_context is not None:
            setup_context(ctx, inputs[:count], output[0] if outputs == 1 else output[:outputs])

    def dual_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(gradient is not None for gradient in gradients[outputs:]):
            raise RuntimeError(
                f"the tangent of {name} has no gradient; detach it, as dit_fast.kernels.jvp does, or use "
                "kernels='reference'"
            )
        found = backward(ctx, *gradients[:outputs])  # type: ignore[misc]
        return *(found if type(found) is tuple else (found,)), *[None] * len(extra)

    operation = define_op(
        f"{name}_dual", reference_impl=dual.reference_impl, plan=dual.plan, flops=dual.flops,
        backward=dual_backward if backward is not None else None, setup_context=dual_context,
    )  # fmt: skip

    def push_forward(args: tuple[Any, ...]) -> Any:
        values, tangents = list(args), []
        for index, wanted in zip(differentiated, required, strict=True):
            value, tangent = args[index], None
            if value is not None:
                value, tangent = torch._VF._unpack_dual(value, level=0)
            if tangent is None and wanted:
                tangent = torch.zeros_like(value)
            values[index] = value
            tangents.append(tangent)
        if any(isinstance(value, Tensor) and value.requires_grad for value in values):
            # Else the gradient of the values would keep and walk through the graphs of the tangents, for nothing.
            tangents = [None if tangent is None else tangent.detach() for tangent in tangents]
        results = operation(*values, *tangents)
        duals = [
            torch._VF._make_dual(value, tangent, level=0)
            for value, tangent in zip(results, results[outputs:], strict=False)
        ]
        return duals[0] if outputs == 1 else (*duals, *results[len(duals) : outputs])

    return push_forward


def _keep(plans: dict[Any, T], key: Any, plan: T) -> T:
    """`plan`, kept under `key` among at most MOST_PLANS."""
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def _reference_outputs(reference_impl: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Contiguous outputs of the shapes and dtypes that the reference gives, as the kernels' are."""
    with torch._C._DisableAutocast(), torch.no_grad():
        outputs = reference_impl(*args, **kwargs)
    if isinstance(outputs, Tensor):
        return outputs.new_empty(outputs.shape)
    return tuple(output.new_empty(output.shape) for output in outputs)


def _refuse_shards(name: str, tensors: Sequence[Tensor]) -> None:
    """RuntimeError for a DTensor, by its name: importing the class would import all of torch.distributed.tensor."""
    if any(type(x).__name__ == "DTensor" for x in tensors):
        raise RuntimeError(
            f"{name} has no rule for the shards of a DTensor; give it local tensors (to_local()) or use "
            "kernels='reference'"
        )


def _owning_outputs(reference_impl: Callable[..., Any]) -> Callable[..., Any]:
    """`reference_impl` with outputs that own their memory, as those of the kernels do: autograd would refuse to change
    a view in place.
    """

    @functools.wraps(reference_impl)
    def run(*args: Any, **kwargs: Any) -> Any:
        outputs = reference_impl(*args, **kwargs)
        if isinstance(outputs, Tensor):
            return _owned(outputs)
        return tuple(_owned(output) for output in outputs)

    return run


def _owned(output: Tensor) -> Tensor:
    return output if output._base is None else output.clone()


def _differentiable(
    name: str, backward: Callable[..., Any] | None, setup_context: Callable[..., None] | None
) -> type[Function]:
    """A function of an operation's arguments and of what runs it, with the gradient `backward`.

    Without one, an error where a gradient is asked for.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        # Else the engine fills the gradients of outputs that have none with zeros: a pass over `pre` of an MLP.
        ctx.set_materialize_grads(False)
        inputs = args[:-1]
        ctx.plan = args[-1]
        output = ctx.plan.run(*inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    def run_backward(ctx: Any, *gradients: Any) -> Any:
        if backward is None:
            raise RuntimeError(f"{name} has no gradient; for one of second order use kernels='reference'")
        for gradient in gradients:
            if gradient is not None:
                found = backward(ctx, *gradients)
                # None for what runs the operation.
                return (*found, None) if type(found) is tuple else (found, None)
        return (None,) * len(ctx.needs_input_grad)

    # Autograd's errors and gradient functions bear the name of the class.
    return type(name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(run_backward)})


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """ValueError naming the first tensor that is not of floating point, or not on the first one's device."""
    first = device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype}, expected float16, bfloat16, float32 or float64"
            )
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {device}")


def check_shapes(op: str, x: Tensor, **others: tuple[Tensor, tuple[int, ...]]) -> torch.Size:
    """The shape of the (B, T, D) tensor `x`; ValueError naming the first argument that does not fit beside it."""
    check_tensors(op, x=x, **{name: tensor for name, (tensor, _) in others.items()})
    size = x.shape
    if len(size) != 3:
        raise ValueError(f"{op}: x is {tuple(size)}, expected (batch, tokens, width)")
    _, tokens, width = size
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"{op}: width {width} is not in 1..{MAX_WIDTH}; use kernels='reference'")
    if tokens * width >= 2**31:
        raise ValueError(f"{op}: a sample of {tokens} x {width} elements is beyond 32-bit offsets")
    for name, (tensor, shape) in others.items():
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, expected {shape}")
    return size
