"""MLP with training epilogues: out = f(x fc1_weight^T + fc1_bias) fc2_weight^T, f the GELU of Peebles & Xie 2023
(section 3.2) or SwiGLU, SiLU(g) * v of the pre-activation [g; v] (Shazeer 2020, equation 6).

Shapes    x (..., D), fc1_weight (F, D), fc1_bias (F,), fc2_weight (E, F); out (..., E), usually E = D and F = 4 D.
          SwiGLU: fc1_weight (2 F, D), fc1_bias (2 F,), usually F = 8/3 D.
          fc2's bias is left to the gated residual that follows, which adds it and gives its gradient.
Backward  pre = x fc1_weight^T + fc1_bias is saved, and act = f(pre) if kept, else recomputed:
          d_act = d_out fc2_weight, d_pre = f'(pre) d_act, d_fc2_weight = d_out^T act,
          d_fc1_weight = d_pre^T x, d_fc1_bias = sum(d_pre), d_x = d_pre fc1_weight.
Tangents  pre_t = x_t fc1_weight^T, act_t = f'(pre) pre_t in one pass with act, out_t = act_t fc2_weight^T; whatever the
          epilogue, products are PyTorch's and values and tangents have one each, as stacking them would keep the
          tangents with every value that the backward pass needs.
Traffic   beside the products, in U = one (B, T, D) token tensor, F = 4 D: a GELU pass of its own moves 8 forward and
          16 backward (12 with act kept); epilogues 4 forward (writing pre) and 4 backward (reading it), and 4 for act
          again. Keeping act costs 4 U of memory. SwiGLU's pass: 8 and 16 (13.3), act 2.7 U.
Numerics  products in the dtype of x, sums in float32; f as in gelu.py and swiglu.py, from the pre-activation as it was
          rounded, so that act is the same whether kept or recomputed.

Who applies the GELU is the `epilogue`: "separate", products by PyTorch (cuBLAS) and the pass of gelu.py; "triton",
the products of gemm.py; "cublaslt", cuBLASLt's own epilogues (cublaslt.py, the extra `epilogues`). SwiGLU, which joins
columns that are F apart, has a pass of its own always.
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fast.kernels import reference, tuned
from dit_fast.kernels.attention.backends import Choice
from dit_fast.kernels.launch import cast, device_capability
from dit_fast.kernels.library import DTYPES, Dual, Run, check_tensors, define_op, uses_triton
from dit_fast.kernels.mlp import cublaslt, gemm
from dit_fast.kernels.mlp.gelu import plan_gelu, plan_gelu_backward, plan_gelu_dual
from dit_fast.kernels.mlp.swiglu import plan_swiglu, plan_swiglu_backward, plan_swiglu_dual
from dit_fast.kernels.recompute import NormRecipe, adaln_from_moments

Activation = Literal["gelu", "swiglu"]
ACTIVATIONS = get_args(Activation)
MlpEpilogue = Literal["auto", "separate", "triton", "cublaslt"]
EPILOGUES = get_args(MlpEpilogue)


def choose_epilogue(
    epilogue: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Choice:
    """What `mlp(..., epilogue=epilogue)` runs, given (rows, D, F), the dtype and the device of x; nothing is launched.

    "auto" is "separate" until the tuned table of the device, measured by `benchmarks.ops.tune`, says otherwise; rows
    count in powers of two. Raises ValueError for an unknown value, ImportError where "cublaslt" is not installed.
    """
    if epilogue not in EPILOGUES:
        raise ValueError(f"mlp: epilogue={epilogue!r}, choose one of {', '.join(map(repr, EPILOGUES))}")
    if epilogue == "cublaslt":
        cublaslt.bindings()
    if epilogue != "auto":
        return Choice(epilogue, "asked for")
    rows, width, hidden = shape
    capability = device_capability(device.index or 0) if device.type == "cuda" else 0
    measured = _measured_epilogue(1 << max(rows, 1).bit_length() - 1, width, hidden, dtype, capability)
    if measured == "":
        return Choice("separate", "auto: no tuned table of this device has measured this shape")
    if measured == "cublaslt" and not tuned.require(cublaslt.installed(), "nvmath-python"):
        return Choice(
            "separate",
            "auto: the tuned table says cublaslt, whose nvmath-python is not installed (extra 'epilogues')",
        )
    return Choice(measured, "auto: fastest in this device's tuned table")


@tuned.per_launch
def _measured_epilogue(rows: int, width: int, hidden: int, dtype: torch.dtype, capability: int) -> str:
    """The tuned table's word for a power of two of rows, "" without one."""
    key = f"D={width} F={hidden} rows={rows} {str(dtype).removeprefix('torch.')}"
    return tuned.choice("mlp", key, "", options=EPILOGUES[1:], kernels=gemm.KERNELS, capability=capability)


def mlp_epilogue(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> str:
    """What epilogue="auto" stands for, given (rows, D, F), the dtype and the device of x; see `choose_epilogue`."""
    return choose_epilogue("auto", shape, dtype, device).name


def _provider(epilogue: str, x: Tensor, hidden: int) -> str:
    """The provider that `epilogue` names. Asked where the products run, so that a compiled graph reads no table."""
    if epilogue != "auto":
        return epilogue
    return mlp_epilogue((math.prod(x.shape[:-1]), x.shape[-1], hidden), x.dtype, x.device)


def check_mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, activation: str = "gelu"
) -> None:
    """ValueError naming the first argument of `mlp` that does not fit the ones before it."""
    check_tensors("mlp", x=x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"mlp: x is {tuple(x.shape)}, expected (..., width)")
    parts = 2 if activation == "swiglu" else 1
    _check_weight("fc1_weight", fc1_weight, x.shape[-1], parts)
    outputs = fc1_weight.shape[0]
    _check_weight("fc2_weight", fc2_weight, outputs // parts)
    if tuple(fc1_bias.shape) != (outputs,):
        raise ValueError(f"mlp: fc1_bias is {tuple(fc1_bias.shape)}, expected ({outputs},)")


def _check(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, *rest: Any) -> None:
    _, _, _, activation, *_ = rest
    check_mlp(x, fc1_weight, fc1_bias, fc2_weight, activation)


def _check_weight(name: str, weight: Tensor, columns: int, parts: int = 1) -> None:
    """ValueError unless `weight` is (outputs, columns), its outputs a multiple of `parts`."""
    rows = "outputs" if parts == 1 else f"{parts} * outputs"
    if weight.ndim != 2 or weight.shape[1] != columns or weight.shape[0] == 0 or weight.shape[0] % parts:
        raise ValueError(f"mlp: {name} is {tuple(weight.shape)}, expected ({rows}, {columns})")


def _separate(activation: str, x: Tensor, outputs: int) -> tuple[int, int, Any, Any]:
    """Rows and features of the activation of x (..., D) after `outputs` outputs, and what plans its two passes."""
    rows = math.prod(x.shape[:-1])
    if activation == "swiglu":
        return rows, outputs // 2, plan_swiglu, plan_swiglu_backward
    return rows, outputs, plan_gelu, plan_gelu_backward


def _mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    keep_activation: bool,
    training: bool,
    epilogue: str,
    activation: str,
    *_: Tensor | None,
) -> Run:
    epilogue = _provider(epilogue, x, fc1_weight.shape[0])
    lead, width = x.shape[:-1], x.shape[-1]
    kept = training and keep_activation
    if epilogue != "separate":
        fused = gemm.gemm_gelu if epilogue == "triton" else cublaslt.gemm_gelu
    else:
        rows, features, plan_forward, _ = _separate(activation, x, fc1_weight.shape[0])
        activate = plan_forward(x, rows, features)
        # Where pre is not kept, a GELU takes its place.
        in_place = activation == "gelu" and not training

    def run(
        x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x.reshape(-1, width).contiguous()
        # A BLAS may add the terms of a product with a transposed matrix in another order.
        fc1_weight, fc2_weight = fc1_weight.contiguous(), fc2_weight.contiguous()
        if epilogue != "separate":
            pre, act = fused(x, fc1_weight, fc1_bias, training)
        else:
            pre = F.linear(x, fc1_weight, fc1_bias)
            act = activate(pre, None, pre) if in_place else activate(pre, None)
        # A product of this shape owns its memory; a view of one could not be changed in place by who called.
        out = F.linear(act.view(*lead, act.shape[-1]), fc2_weight)
        return out, pre if training else x.new_empty(0), act if kept else x.new_empty(0)

    return run


def _mlp_reference(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    keep_activation: bool = False,
    training: bool = True,
    epilogue: str = "auto",
    activation: str = "gelu",
    stream: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, and for the backward pass pre (empty unless `training`) and act (empty unless kept as well).

    `stream` to `scale` are a `NormRecipe` of x, which the backward pass then does not keep.
    """
    rows = x.reshape(-1, x.shape[-1])
    pre = torch.addmm(fc1_bias, rows, fc1_weight.t())
    act = reference.ACTIVATIONS[activation](pre)
    out = act @ fc2_weight.t()
    empty = x.new_empty(0)
    kept = act if training and keep_activation else empty
    return out.view(*x.shape[:-1], out.shape[-1]), pre if training else torch.empty_like(empty), kept


def _mlp_dual(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    keep_activation: bool,
    training: bool,
    epilogue: str,
    activation: str,
    *_: Tensor | None,
) -> Run:
    """Products by PyTorch, of values and of tangents, and one pass for the activations of both."""
    lead, width = x.shape[:-1], x.shape[-1]
    rows, features, _, _ = _separate(activation, x, fc1_weight.shape[0])
    activate = (plan_swiglu_dual if activation == "swiglu" else plan_gelu_dual)(x, rows, features)

    def run(
        x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, keep_activation: bool, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *_, x_t, fc1_weight_t, fc1_bias_t, fc2_weight_t = rest
        x, x_t = x.reshape(rows, width).contiguous(), x_t.reshape(rows, width).contiguous()
        fc1_weight, fc2_weight = fc1_weight.contiguous(), fc2_weight.contiguous()
        pre = F.linear(x, fc1_weight, fc1_bias)
        pre_t = reference.linear_tangent(x, fc1_weight, x_t, fc1_weight_t, fc1_bias_t)
        act, act_t = activate(pre, None, pre_t, None)
        act_t = reference.linear_tangent(act, fc2_weight, act_t, fc2_weight_t)
        out = F.linear(act.view(*lead, features), fc2_weight)
        return out, pre, act if keep_activation else x.new_empty(0), act_t.view(out.shape)

    return run


def _mlp_dual_reference(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    keep_activation: bool,
    training: bool,
    epilogue: str,
    activation: str,
    stream: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    x_t: Tensor,
    fc1_weight_t: Tensor | None,
    fc1_bias_t: Tensor | None,
    fc2_weight_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_mlp_reference`, with pre always: a transform of torch.func hides whether there is a gradient to come."""
    out, pre, kept = _mlp_reference(
        x, fc1_weight, fc1_bias, fc2_weight, keep_activation, True, epilogue, activation
    )
    rows, rows_t = x.reshape(-1, x.shape[-1]), x_t.reshape(-1, x.shape[-1])
    pre_t = reference.linear_tangent(rows, fc1_weight, rows_t, fc1_weight_t, fc1_bias_t)
    act = reference.ACTIVATIONS[activation](pre)
    act_t = reference.ACTIVATION_TANGENTS[activation](pre, None, pre_t, None)
    out_t = reference.linear_tangent(act, fc2_weight, act_t, fc2_weight_t)
    return out, pre, kept, out_t.view(out.shape)


def _mlp_backward(
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
    act: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    weights: bool,
    epilogue: str,
    activation: str,
) -> Run:
    epilogue = _provider(epilogue, x, fc1_weight.shape[0])
    shape, again = x.shape, weights and act is None
    if epilogue != "separate":
        fused = gemm.gemm_gelu_backward if epilogue == "triton" else cublaslt.gemm_gelu_backward
    else:
        rows, features, _, plan_backward = _separate(activation, x, fc1_weight.shape[0])
        launched = plan_backward(x, rows, features, again, weights)
        in_place = activation == "gelu"

    def run(
        dout: Tensor, x: Tensor, pre: Tensor, act: Tensor | None, fc1_weight: Tensor, fc2_weight: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        x, dout = x.reshape(-1, shape[-1]), dout.reshape(-1, dout.shape[-1]).contiguous()
        fc1_weight, fc2_weight = fc1_weight.contiguous(), fc2_weight.contiguous()
        if epilogue != "separate":
            dpre, made, dbias = fused(dout, fc2_weight, pre, again, weights)
        else:
            dact = torch.mm(dout, fc2_weight)
            dpre, made, dbias = launched(dact, pre, None, dact) if in_place else launched(dact, pre, None)
        dx = torch.mm(dpre, fc1_weight).view(shape)
        if not weights:
            return dx, x.new_empty(0), x.new_empty(0), x.new_empty(0)
        return dx, torch.mm(dpre.t(), x), dbias, torch.mm(dout.t(), made if act is None else act)

    return run


def _mlp_backward_reference(
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
    act: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    weights: bool,
    epilogue: str,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_x, d_fc1_weight, d_fc1_bias, d_fc2_weight, the last three empty unless `weights`; act None: recomputed."""
    rows, dout = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
    dpre, again, dbias = reference.ACTIVATION_BACKWARDS[activation](dout @ fc2_weight, pre, None)
    dx = (dpre @ fc1_weight).view(x.shape)
    if not weights:
        return dx, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    return dx, dpre.t() @ rows, dbias, dout.t() @ (again if act is None else act)


def _mlp_flops(
    x: tuple[int, ...], fc1: tuple[int, ...], _: Any, fc2: tuple[int, ...], *rest: Any, **kw: Any
) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(fc1) + math.prod(fc2))


def _mlp_backward_flops(
    dout: Any, x: tuple[int, ...], pre: Any, act: Any, fc1: tuple[int, ...], fc2: tuple[int, ...], weights: bool,
    *rest: Any, **kw: Any,
) -> int:  # fmt: skip
    return (1 + weights) * _mlp_flops(x, fc1, None, fc2)


_mlp_backward_op = define_op(
    "mlp_backward",
    plan=_mlp_backward,
    reference_impl=_mlp_backward_reference,
    flops=_mlp_backward_flops,
)


def _mlp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, fc1_weight, _, fc2_weight, ctx.keep_activation, _, ctx.epilogue, ctx.activation, *recipe = inputs
    _, pre, act = output
    # With the recipe of x (stream, mean, rstd, shift, scale), x is recomputed in the backward pass.
    kept = x if recipe[0] is None else None, pre, act if ctx.keep_activation else None
    ctx.save_for_backward(*kept, fc1_weight, fc2_weight, *recipe)
    ctx.mark_non_differentiable(pre, act)


def _mlp_autograd(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    weights = any(ctx.needs_input_grad[1:4])
    x, pre, act, fc1_weight, fc2_weight, *recipe = ctx.saved_tensors
    if x is None:
        x = adaln_from_moments(*recipe)
    dx, *rest = _mlp_backward_op.in_backward(
        ctx, weights, dout, x, pre, act, fc1_weight, fc2_weight, weights, ctx.epilogue, ctx.activation
    )
    return dx, *(rest if weights else (None, None, None)), *[None] * 9


def _mlp_dual_flops(
    x: tuple[int, ...], fc1: tuple[int, ...], _: Any, fc2: tuple[int, ...], *rest: Any, **kw: Any
) -> int:
    """Of values and of tangents, those of weights aside."""
    return 2 * _mlp_flops(x, fc1, None, fc2)


_mlp_op = define_op(
    "mlp",
    plan=_mlp,
    reference_impl=_mlp_reference,
    check=_check,
    backward=_mlp_autograd,
    setup_context=_mlp_context,
    flops=_mlp_flops,
    dual=Dual(_mlp_dual_reference, _mlp_dual, _mlp_dual_flops),
)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    *,
    activation: str = "gelu",
    keep_activation: bool = False,
    epilogue: str = "auto",
    recipe: NormRecipe | None = None,
    kernels: str = "auto",
) -> Tensor:
    """f(x fc1_weight^T + fc1_bias) fc2_weight^T without fc2's bias, f the `activation`: "gelu" (tanh) or "swiglu".

    x (..., D), fc1_weight (F, D), fc1_bias (F,), fc2_weight (E, F) -> (..., E); for "swiglu" fc1_weight is (2 F, D),
    the gate's rows and then the value's, and fc1_bias (2 F,). The weights are cast to the dtype of `x`, as autocast
    would. `keep_activation` saves the activation (rows x F) instead of computing it again in the backward pass;
    `recipe`, that of x, is kept in place of x. `epilogue`: "auto", "separate", "triton" or "cublaslt" (see the module;
    "swiglu" takes the first two); `kernels`: "auto", "triton" or "reference". Raises ValueError for arguments that do
    not fit, ImportError where "cublaslt" is not installed.
    """
    if epilogue not in EPILOGUES:
        raise ValueError(f"mlp: epilogue={epilogue!r}, choose one of {', '.join(map(repr, EPILOGUES))}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: activation={activation!r}, choose one of {', '.join(map(repr, ACTIVATIONS))}")
    if activation == "swiglu":
        if epilogue not in ("auto", "separate"):
            raise ValueError(
                f"mlp: epilogue={epilogue!r} applies a GELU, give 'auto' or 'separate' for 'swiglu'"
            )
        epilogue = "separate"
    if not uses_triton(kernels, x):
        return reference.mlp(x, fc1_weight, fc1_bias, fc2_weight, activation)
    dtype = x.dtype
    # Before the casts, which would hide integers.
    if not {dtype, fc1_weight.dtype, fc1_bias.dtype, fc2_weight.dtype}.issubset(DTYPES) or x.ndim == 0:
        check_mlp(x, fc1_weight, fc1_bias, fc2_weight, activation)
    fc1_weight, fc1_bias, fc2_weight = cast(fc1_weight, dtype), cast(fc1_bias, dtype), cast(fc2_weight, dtype)
    training = torch.is_grad_enabled() and (
        x.requires_grad or fc1_weight.requires_grad or fc1_bias.requires_grad or fc2_weight.requires_grad
    )
    # Detached: the gradient reaches them through x.
    parts = () if recipe is None or not training else [part.detach() for part in recipe]
    return _mlp_op(
        x, fc1_weight, fc1_bias, fc2_weight, keep_activation, training, epilogue, activation, *parts
    )[0]
