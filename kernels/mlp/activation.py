"""How an activation between two products is registered: act = f(pre + bias), whose gradients need pre alone.

Shapes    pre (..., n F), bias (n F,) or None, act (..., F), n being `parts`: 1, or 2 for a gate and its value.
Backward  d_pre like pre, act once more on demand, d_bias the sum of d_pre over all rows on demand.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.library import Dual, Run, check_tensors, define_op


def define_activation(
    name: str,
    forward: Callable[[Tensor, int, int], Run],
    backward: Callable[[Tensor, int, int, bool, bool], Run],
    dual: Callable[[Tensor, int, int], Run],
    parts: int = 1,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Register `name` and `name`_backward, whose maths `reference` has under these names; returns `name`(pre, bias).

    forward(on, N, F), backward(on, N, F, activation, bias_gradient) and dual(on, N, F) prepare launches for N rows of F
    features like `on`: run(pre, bias) -> act; run(d_act, pre, bias) -> (d_pre, act, d_bias), the last two empty unless
    asked for; run(pre, bias, pre_t, bias_t) -> (act, act_t).
    """
    value, gradient = reference.ACTIVATIONS[name], reference.ACTIVATION_BACKWARDS[name]
    tangent = reference.ACTIVATION_TANGENTS[name]

    def sizes(pre: Tensor) -> tuple[int, int]:
        return pre.numel() // pre.shape[-1], pre.shape[-1] // parts

    def check(pre: Tensor, bias: Tensor | None) -> None:
        check_tensors(name, pre=pre, bias=bias)
        if pre.ndim == 0 or pre.shape[-1] == 0 or pre.shape[-1] % parts:
            columns = "features" if parts == 1 else f"{parts} * features"
            raise ValueError(
                f"{name}: pre is {tuple(pre.shape)}, expected (..., {columns}) with at least one feature"
            )
        if bias is not None and tuple(bias.shape) != (pre.shape[-1],):
            raise ValueError(f"{name}: bias is {tuple(bias.shape)}, expected ({pre.shape[-1]},)")

    def plan_forward(pre: Tensor, bias: Tensor | None) -> Run:
        return forward(pre, *sizes(pre))

    def reference_forward(pre: Tensor, bias: Tensor | None = None) -> Tensor:
        return value(pre, bias).contiguous()

    def plan_backward(
        dact: Tensor, pre: Tensor, bias: Tensor | None, activation: bool, bias_gradient: bool
    ) -> Run:
        launched = backward(pre, *sizes(pre), activation, bias_gradient)

        def run(dact: Tensor, pre: Tensor, bias: Tensor | None, *_: bool) -> tuple[Tensor, Tensor, Tensor]:
            return launched(dact, pre, bias)

        return run

    def reference_backward(
        dact: Tensor, pre: Tensor, bias: Tensor | None, activation: bool, bias_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dpre, act, dbias = gradient(dact, pre, bias)
        return (
            dpre.contiguous(),
            act.contiguous() if activation else act.new_empty(0),
            dbias if bias_gradient else dbias.new_empty(0),
        )

    backward_op = define_op(f"{name}_backward", plan=plan_backward, reference_impl=reference_backward)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def autograd(ctx: Any, dact: Tensor) -> tuple[Tensor | None, ...]:
        pre, bias = ctx.saved_tensors
        dpre, _, dbias = backward_op.in_backward(ctx, None, dact, pre, bias, False, bias is not None)
        return dpre, None if bias is None else dbias

    def plan_dual(pre: Tensor, *_: Any) -> Run:
        return dual(pre, *sizes(pre))

    def reference_dual(
        pre: Tensor, bias: Tensor | None, pre_t: Tensor, bias_t: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return reference_forward(pre, bias), tangent(pre, bias, pre_t, bias_t).contiguous()

    return define_op(
        name,
        plan=plan_forward,
        reference_impl=reference_forward,
        check=check,
        backward=autograd,
        setup_context=setup_context,
        dual=Dual(reference_dual, plan_dual),
    )
