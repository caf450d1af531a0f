"""How an activation between two products is registered: act = f(pre + bias), whose gradients need pre alone.

Shapes    pre (..., n F), bias (n F,) or None, act (..., F), n being `parts`: 1, or 2 for a gate and its value.
Backward  d_pre like pre, act once more on demand, d_bias the sum of d_pre over all rows on demand.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.op import check_tensors, define_op


def define_activation(
    name: str,
    forward: Callable[[Tensor, Tensor | None], Tensor],
    backward: Callable[[Tensor, Tensor, Tensor | None, bool, bool], tuple[Tensor, Tensor, Tensor]],
    parts: int = 1,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Register `name` and `name`_backward, whose maths `reference` has under these names; returns `name`(pre, bias).

    forward(pre, bias) and backward(d_act, pre, bias, activation, bias_gradient) launch the kernels; the latter returns
    d_pre, act and d_bias, the last two empty unless asked for. What is returned raises ValueError for tensors that do
    not fit.
    """
    value, gradient = reference.ACTIVATIONS[name], reference.ACTIVATION_BACKWARDS[name]

    def triton_forward(pre: Tensor, bias: Tensor | None = None) -> Tensor:
        return forward(pre, bias)

    def reference_forward(pre: Tensor, bias: Tensor | None = None) -> Tensor:
        return value(pre, bias).contiguous()

    def fake_forward(pre: Tensor, bias: Tensor | None = None) -> Tensor:
        return pre.new_empty(*pre.shape[:-1], pre.shape[-1] // parts)

    def triton_backward(
        dact: Tensor, pre: Tensor, bias: Tensor | None, activation: bool, bias_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward(dact, pre, bias, activation, bias_gradient)

    def reference_backward(
        dact: Tensor, pre: Tensor, bias: Tensor | None, activation: bool, bias_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dpre, act, dbias = gradient(dact, pre, bias)
        return (
            dpre.contiguous(),
            act.contiguous() if activation else act.new_empty(0),
            dbias if bias_gradient else dbias.new_empty(0),
        )

    def fake_backward(
        dact: Tensor, pre: Tensor, bias: Tensor | None, activation: bool, bias_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        like = pre if bias is None else bias
        return (
            pre.new_empty(pre.shape),
            pre.new_empty(dact.shape if activation else 0),
            like.new_empty(pre.shape[-1] if bias_gradient else 0),
        )

    backward_op = define_op(
        f"{name}_backward",
        triton_impl=triton_backward,
        reference_impl=reference_backward,
        fake=fake_backward,
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def autograd(ctx: Any, dact: Tensor) -> tuple[Tensor | None, ...]:
        pre, bias = ctx.saved_tensors
        dpre, _, dbias = backward_op(dact, pre, bias, False, bias is not None)
        return dpre, None if bias is None else dbias

    op = define_op(
        name,
        triton_impl=triton_forward,
        reference_impl=reference_forward,
        fake=fake_forward,
        backward=autograd,
        setup_context=setup_context,
    )

    def checked(pre: Tensor, bias: Tensor | None) -> Tensor:
        check_tensors(name, pre=pre, bias=bias)
        if pre.ndim == 0 or pre.shape[-1] == 0 or pre.shape[-1] % parts:
            columns = "features" if parts == 1 else f"{parts} * features"
            raise ValueError(
                f"{name}: pre is {tuple(pre.shape)}, expected (..., {columns}) with at least one feature"
            )
        if bias is not None and tuple(bias.shape) != (pre.shape[-1],):
            raise ValueError(f"{name}: bias is {tuple(bias.shape)}, expected ({pre.shape[-1]},)")
        return op(pre, bias)

    return checked
