"""An OpSpec for each public operation and variant of one: what tests, benchmarks and the roofline need to know of it.

A shape is (B, T, D) for token operations; `patch_embed` and `unpatchify` read it as batch, tokens (a square) and
width, with four latent channels and patches of two.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.adaln import adaln_modulate, gated_residual, gated_residual_adaln
from dit_fast.kernels.attention.attention import attention
from dit_fast.kernels.forward_mode import jvp
from dit_fast.kernels.mlp.gelu import gelu
from dit_fast.kernels.mlp.mlp import mlp
from dit_fast.kernels.mlp.swiglu import swiglu
from dit_fast.kernels.patchify import patch_embed, unpatchify
from dit_fast.kernels.qk_norm_rope import qk_norm_rope

Shape = tuple[int, int, int]
Make = Callable[..., Tensor]


@dataclass(frozen=True)
class OpSpec:
    """`op(*inputs, kernels=...)` and `reference(*inputs)` take what `make_inputs` returns.

    make_inputs(shape, stream, low, make): `stream` is the dtype of the residual stream, `low` that of branches and
    modulation (autocast mixes them), `make(*size, dtype=...)` a factory of tensors. `forward_elements(B, T, D)`,
    `backward_elements`: what has to be read and written, vectors of one row a sample left out. `products(B, T, D)`:
    multiplications and additions of the forward pass's matrix products, `backward_products` times as many backward.
    `constants`: inputs that get no gradient.
    variant: "" for the operation as it is called without keywords, else the word that tells which other one it is.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Shape, torch.dtype, torch.dtype, Make], tuple[Any, ...]]
    forward_elements: Callable[[int, int, int], int]
    backward_elements: Callable[[int, int, int], int]
    products: Callable[[int, int, int], int] = lambda B, T, D: 0
    backward_products: float = 2.0
    constants: tuple[str, ...] = ()
    variant: str = ""

    @property
    def key(self) -> str:
        """The entry's name in REGISTRY, in test ids and in results."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def differentiable(self, inputs: Sequence[Any]) -> list[bool]:
        """Which of `inputs` get a gradient: the tensors of floating point, but not `constants`."""
        names = inspect.signature(self.reference).parameters
        return [
            isinstance(value, Tensor) and value.is_floating_point() and name not in self.constants
            for name, value in zip(names, inputs, strict=False)
        ]

    def bytes_moved(self, shape: Shape, itemsize: int, backward: bool = False) -> int:
        """Unavoidable bytes to and from memory, forward or backward."""
        return (self.backward_elements if backward else self.forward_elements)(*shape) * itemsize


def _modulation(B: int, D: int, parts: int, dtype: torch.dtype, make: Make) -> tuple[Tensor, ...]:
    """Strided views of one modulation tensor, as the model's `chunk` makes them."""
    return make(B, parts * D, dtype=dtype).chunk(parts, dim=1)


def _adaln_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Any, ...]:
    B, T, D = shape
    return make(B, T, D, dtype=stream), *_modulation(B, D, 2, low, make)


def _residual_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Any, ...]:
    B, T, D = shape
    gate, _ = _modulation(B, D, 2, low, make)
    return make(B, T, D, dtype=stream), make(B, T, D, dtype=low), gate, make(D, dtype=stream)


def _fused_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Any, ...]:
    B, T, D = shape
    gate, shift, scale = _modulation(B, D, 3, low, make)
    return make(B, T, D, dtype=stream), make(B, T, D, dtype=low), gate, shift, scale, make(D, dtype=stream)


def _embed_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Any, ...]:
    B, T, D = shape
    side = 2 * int(T**0.5)
    pos = make(1, (side // 2) ** 2, D, dtype=stream)
    return make(B, 4, side, side, dtype=stream), make(D, 4, 2, 2, dtype=low), make(D, dtype=low), pos


def _unpatchify_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Any, ...]:
    B, T, _ = shape
    side = int(T**0.5)
    return make(B, side * side, 32, dtype=low), 2, side, side


def _gelu_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Any, ...]:
    return make(*shape, dtype=low), make(shape[2], dtype=stream)


def _swiglu_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Any, ...]:
    """A gate and a value for each of D features."""
    B, T, D = shape
    return make(B, T, 2 * D, dtype=low), make(2 * D, dtype=stream)


def _mlp_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Any, ...]:
    """Weights of the residual stream's dtype, as autocast leaves them, and of the size that initialization gives."""
    B, T, D = shape
    fc1, fc2 = make(4 * D, D, dtype=stream).mul_(D**-0.5), make(D, 4 * D, dtype=stream).mul_((4 * D) ** -0.5)
    return make(B, T, D, dtype=low), fc1, make(4 * D, dtype=stream), fc2


def _attention_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Any, ...]:
    """Heads of 72, 64 or 40 columns, the first that divides the width; at least one head."""
    B, T, D = shape
    K = next((K for K in (72, 64) if D % K == 0), 40)
    heads = max(D // K, 1)
    return make(B, T, 3 * heads * K, dtype=low), heads, make(3 * heads * K, dtype=stream)


def _qk_norm_rope_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Any, ...]:
    """Heads of 72 or 64 columns, else one head of up to 128; one rotation for all samples, float32 as in a model."""
    B, T, D = shape
    K = next((K for K in (72, 64) if D % K == 0), min(max(D // 4 * 4, 4), 128))
    heads = D // K if D % K == 0 else 1
    qkv, bias = make(B, T, 3 * heads * K, dtype=low), make(3 * heads * K, dtype=stream)
    rotation = make(1, T, K // 2, 2, dtype=torch.float32)
    return qkv, heads, bias, make(2, K, dtype=stream), rotation


def _tokens_and_weights(tokens: int, weights: int) -> Callable[[int, int, int], int]:
    return lambda B, T, D: tokens * B * T * D + weights * D * D


def _tokens(count: int) -> Callable[[int, int, int], int]:
    return lambda B, T, D: count * B * T * D


def _patches(B: int, T: int, D: int) -> int:
    return 2 * B * T * 32


REGISTRY: dict[str, OpSpec] = {
    spec.key: spec
    for spec in (
        OpSpec(
            "adaln_modulate", adaln_modulate, reference.adaln_modulate, _adaln_inputs, _tokens(2), _tokens(3)
        ),
        # Backward computes the scores again: five products of which the forward pass has two.
        OpSpec(
            "attention",
            attention,
            reference.attention,
            _attention_inputs,
            _tokens(4),
            _tokens(7),
            lambda B, T, D: 4 * B * T * T * D,
            2.5,
        ),
        OpSpec(
            "gated_residual",
            gated_residual,
            reference.gated_residual,
            _residual_inputs,
            _tokens(3),
            _tokens(3),
        ),
        OpSpec(
            "gated_residual_adaln",
            gated_residual_adaln,
            reference.gated_residual_adaln,
            _fused_inputs,
            _tokens(4),
            _tokens(6),
        ),
        OpSpec("gelu", gelu, reference.gelu, _gelu_inputs, _tokens(2), _tokens(3)),
        # x, out and pre; d_out, x, pre and d_x; the two weights and their gradients.
        OpSpec(
            "mlp",
            mlp,
            reference.mlp,
            _mlp_inputs,
            _tokens_and_weights(6, 8),
            _tokens_and_weights(7, 16),
            lambda B, T, D: 16 * B * T * D * D,
        ),
        OpSpec(
            "patch_embed",
            patch_embed,
            reference.patch_embed,
            _embed_inputs,
            _tokens(1),
            _tokens(1),
            lambda B, T, D: 32 * B * T * D,
        ),
        OpSpec(
            "qk_norm_rope",
            qk_norm_rope,
            reference.qk_norm_rope,
            _qk_norm_rope_inputs,
            _tokens(6),
            _tokens(8),
            constants=("rotation",),
        ),
        OpSpec("swiglu", swiglu, reference.swiglu, _swiglu_inputs, _tokens(3), _tokens(5)),
        OpSpec("unpatchify", unpatchify, reference.unpatchify, _unpatchify_inputs, _patches, _patches),
    )
}


def _with_rmsnorm(spec: OpSpec) -> OpSpec:
    """The operation with an RMSNorm in place of the layer norm."""
    op, text = partial(spec.op, norm="rmsnorm"), partial(spec.reference, centred=False)
    return replace(spec, variant="rmsnorm", op=op, reference=text)


_NORMED = (REGISTRY["adaln_modulate"], REGISTRY["gated_residual_adaln"])
REGISTRY |= {spec.key: spec for spec in map(_with_rmsnorm, _NORMED)}


def dual(spec: OpSpec, along: Sequence[str] | None = None) -> OpSpec:
    """The operation and its forward-mode derivative: outputs and their tangents, given tangents of the inputs `along`.

    None: of all that are differentiable. The reference is PyTorch's own forward mode on the operation's.
    """
    example = spec.make_inputs(
        (1, 4, 72), torch.float32, torch.float32, lambda *size, dtype: torch.ones(size)
    )
    parameters = list(inspect.signature(spec.reference).parameters.values())[: len(example)]
    names = [
        parameter.name
        for parameter, differentiable in zip(parameters, spec.differentiable(example), strict=True)
        if differentiable and (along is None or parameter.name in along)
    ]

    def make_inputs(shape: Shape, stream: torch.dtype, low: torch.dtype, make: Make) -> tuple[Any, ...]:
        values, others = (spec.make_inputs(shape, stream, low, make) for _ in range(2))
        places = [parameter.name for parameter in parameters]
        return *values, *(others[places.index(name)] for name in names)

    def dual_of(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **keywords: Any) -> tuple[Tensor, ...]:
            values, given = (
                inputs[: len(parameters)],
                dict(zip(names, inputs[len(parameters) :], strict=True)),
            )
            tangents = [given.get(parameter.name) for parameter in parameters]
            tangents = [None if x is None else x_t for x, x_t in zip(values, tangents, strict=True)]
            outputs, along = jvp(partial(function, **keywords), values, tangents)
            return *as_tuple(outputs), *as_tuple(along)

        # A default, since the values may have one; not None, which is that of what may be left out.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        added = [inspect.Parameter(f"{name}_t", kind, default=0) for name in names]
        named = [parameter.replace(kind=kind) for parameter in parameters]
        call.__signature__ = inspect.Signature([*named, *added])  # type: ignore[attr-defined]
        return call

    def twice(elements: Callable[[int, int, int], int]) -> Callable[[int, int, int], int]:
        return lambda B, T, D: 2 * elements(B, T, D)

    return replace(
        spec, variant=f"{spec.variant}-dual".lstrip("-"), op=dual_of(spec.op), reference=dual_of(spec.reference),
        make_inputs=make_inputs, forward_elements=twice(spec.forward_elements),
        products=lambda B, T, D: (3 if spec.name == "attention" else 2) * spec.products(B, T, D),
    )  # fmt: skip


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


ACTIVATIONS = ("x", "branch", "gate", "shift", "scale", "pre", "qkv", "tokens")
"""What has a tangent where an image and a timestep have one: all but parameters."""

DUALS: dict[str, OpSpec] = {
    spec.key: spec
    for spec in (
        dual(spec, ACTIVATIONS)
        for spec in REGISTRY.values()
        if hasattr(torch.ops.dit_fast, f"{spec.name}_dual")
    )
}
"""Each operation on values and tangents, as a pass of a model along a direction calls it."""

EVERY = REGISTRY | DUALS
