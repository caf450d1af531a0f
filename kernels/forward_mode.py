"""Forward-mode differentiation whose tangents are constants for reverse mode: `jvp`."""

from collections.abc import Callable
from typing import Any

import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def jvp(function: Callable[..., Any], values: Any, tangents: Any) -> tuple[Any, Any]:
    """function(*values) and its derivative along `tangents`, from one pass; the Jacobian-vector product.

    Other than that of `torch.func.jvp`, the derivative is detached: outputs have gradients as without it. Operations of
    this package compute values and tangents together, those of PyTorch one after the other.

    Args:
        function: Of tensors, or of nested tuples of tensors and other values.
        values: Its arguments.
        tangents: Nested as `values`; the tangent of each tensor, of its shape and dtype, or None for a constant.

    Returns:
        The outputs, and their tangents nested as they are, None for a constant.
    """
    flat, spec = tree_flatten(tuple(values))
    along, same = tree_flatten(tuple(tangents))
    assert spec == same, f"values are {spec}, tangents {same}"
    with fwAD.dual_level():
        duals = [x if x_t is None else fwAD.make_dual(x, x_t) for x, x_t in zip(flat, along, strict=True)]
        outputs, spec = tree_flatten(function(*tree_unflatten(duals, spec)))
        pairs = [fwAD.unpack_dual(x) if isinstance(x, Tensor) else (x, None) for x in outputs]
    # What has no tangent is returned as it came: a parameter as one, not as a view.
    outputs = [x if x_t is None else value for x, (value, x_t) in zip(outputs, pairs, strict=True)]
    constants = [None if x_t is None else x_t.detach() for _, x_t in pairs]
    return tree_unflatten(outputs, spec), tree_unflatten(constants, spec)
