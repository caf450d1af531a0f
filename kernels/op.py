"""define_op: the one way an operation reaches PyTorch, and the one switch between kernel and reference."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import triton
from torch import _C, Tensor
from torch.autograd import Function, _profiler_enabled
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from dit_fast.kernels.launch import recording

KERNEL_MODES = ("auto", "triton", "reference")

NORMS = ("layernorm", "rmsnorm")
"""What `norm` of the modulated norms may be."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What the kernels compute on."""

MAX_WIDTH = 8192
"""Widest row that a program holds; beyond it registers spill whatever the number of warps."""


def uses_triton(kernels: str, x: Tensor) -> bool:
    """Whether `kernels` ("auto" | "triton" | "reference") means the registered operation for a tensor like `x`.

    "auto" is the Triton kernel on CUDA and the PyTorch reference elsewhere. "triton" is the registered operation
    on any device; on a CPU that runs the reference behind the same registration (Triton's interpreter, when on,
    runs the kernel itself). Raises ValueError for another word.
    """
    if kernels not in KERNEL_MODES:
        raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(map(repr, KERNEL_MODES))}")
    return kernels == "triton" or (kernels == "auto" and x.is_cuda)


def is_centred(norm: str) -> bool:
    """Whether a norm of NORMS subtracts the mean. Raises ValueError for another word."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: choose one of {', '.join(map(repr, NORMS))}")
    return norm == "layernorm"


_library = torch.library.Library("dit_fast", "FRAGMENT")

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The function that launches an operation's kernels, by the operation's name: for tools that count launches."""


_VMAP_MODE = _C._dispatch_key_parse("VmapMode")
"""Included while `torch.autograd.grad(is_grads_batched=True)` runs: its tensors look plain and have no memory."""


def define_op(
    name: str,
    *,
    triton_impl: Callable[..., Any],
    reference_impl: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Register `torch.ops.dit_fast.<name>` for CUDA (Triton), CPU (reference), fake tensors and autograd.

    The schema is read from the annotations of `triton_impl`; `reference_impl` and `fake` take the same arguments
    and return the same tensors. With Triton's interpreter on (TRITON_INTERPRET=1 when this is imported) the CPU
    runs `triton_impl`, which is how the tests prove the kernels on a machine without a GPU. While launches are
    recorded (`record_launches`), meta tensors go to `triton_impl` as well, forward and backward.

    What is returned calls the implementation itself where PyTorch's dispatcher would do nothing else: for plain
    tensors, outside of compilation, function transforms, modes and profilers. That saves most of the host's time.

    Args:
        name: The operation's name.
        triton_impl: Launches the kernels.
        reference_impl: The same in PyTorch.
        fake: Allocates the outputs.
        backward: backward(ctx, *gradients of the outputs) returns a gradient or None for each input; None for an
            operation that has no gradient.
        setup_context: setup_context(ctx, inputs, output) keeps what `backward` needs.
        flops: Multiplications and additions of the matrix products, of the arguments with shapes in the place of
            tensors, for PyTorch's `FlopCounterMode`; None for an operation without products.

    Returns:
        The operation, a function of the arguments of `triton_impl` by position.
    """
    cpu_impl = triton_impl if triton.knobs.runtime.interpret else _owning_outputs(reference_impl)
    schema = torch.library.infer_schema(triton_impl, mutates_args=())
    IMPLEMENTATIONS[name] = triton_impl
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    packet = getattr(torch.ops.dit_fast, name)
    overload = packet.default
    if flops is not None:
        # The counter adds `out_shape`, and leaves out arguments that are equal to their defaults.
        register_flop_formula(packet)(flops)
    # A backend's kernel called by code that torch.compile left alone is no code to compile.
    _library.impl(name, torch.compiler.disable(triton_impl), "CUDA")
    _library.impl(name, torch.compiler.disable(cpu_impl), "CPU")

    def on_meta(*args: Any, **kwargs: Any) -> Any:
        meta = any(isinstance(arg, Tensor) and arg.is_meta for arg in (*args, *kwargs.values()))
        return (triton_impl if recording() and meta else fake)(*args, **kwargs)

    torch.library.register_fake(f"dit_fast::{name}", on_meta, lib=_library)

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    parameters = inspect.signature(triton_impl).parameters.values()
    defaults = tuple(parameter.default for parameter in parameters)
    dispatched = _differentiable(name, below_autograd, backward, setup_context).apply
    # Without the wrapper of `apply`, which is for function transforms.
    on_cuda, on_cpu = (
        super(Function, _differentiable(name, run, backward, setup_context)).apply  # type: ignore[misc]
        for run in (triton_impl, cpu_impl)
    )

    def autograd(*args: Any) -> Any:
        # The dispatcher drops arguments that are equal to their defaults.
        args += defaults[len(args) :]
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        _refuse_shards(name, tensors)
        differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if differentiated and _C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{name} has no derivative for torch.func's transforms; use kernels='reference'"
            )
        if fwAD._current_level >= 0 and any(fwAD.unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(f"{name} has no forward-mode derivative; use kernels='reference'")
        return dispatched(*args) if differentiated else below_autograd(*args)

    _library.impl(name, autograd, "Autograd")

    def call(*args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or _C._len_torch_dispatch_stack()
            or _C._len_torch_function_stack()
            or _C._are_functorch_transforms_active()
            or _C._get_tracing_state() is not None
            or fwAD._current_level >= 0
            or _profiler_enabled()
            or _C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
        ):
            return overload(*args)
        gradient = cuda = False
        for arg in args:
            kind = type(arg)
            if kind is Tensor or kind is Parameter:
                if arg.is_cuda:
                    cuda = True
                elif not arg.is_cpu:
                    return overload(*args)
                if arg.is_neg():
                    # Half of a conjugate's view, whose memory holds the values with the other sign.
                    return overload(*args)
                gradient = gradient or arg.requires_grad
            elif isinstance(arg, Tensor):
                _refuse_shards(name, [arg])
                return overload(*args)
        if gradient and torch.is_grad_enabled():
            args += defaults[len(args) :]
            return (on_cuda if cuda else on_cpu)(*args)
        return (triton_impl if cuda else cpu_impl)(*args)

    return call


def _refuse_shards(name: str, tensors: Sequence[Tensor]) -> None:
    """RuntimeError for a DTensor, by its name: importing the class would import all of torch.distributed.tensor."""
    if any(type(x).__name__ == "DTensor" for x in tensors):
        raise RuntimeError(
            f"{name} has no rule for the shards of a DTensor; give it local tensors (to_local()) or use "
            "kernels='reference'"
        )


def _owning_outputs(reference_impl: Callable[..., Any]) -> Callable[..., Any]:
    """`reference_impl` whose outputs are views of nothing, as the kernels' are: autograd would refuse to change them
    in place.
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
    name: str,
    run: Callable[..., Any],
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None,
) -> type[Function]:
    """`run` with the gradient `backward`; without one, an error where a gradient is asked for."""

    def forward(ctx: Any, *args: Any) -> Any:
        # Else the engine fills the gradients of outputs that have none with zeros: a pass over `pre` of an MLP.
        ctx.set_materialize_grads(False)
        output = run(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    def run_backward(ctx: Any, *gradients: Any) -> Any:
        if backward is None:
            raise RuntimeError(f"{name} has no gradient; for one of second order use kernels='reference'")
        for gradient in gradients:
            if gradient is not None:
                return backward(ctx, *gradients)
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
