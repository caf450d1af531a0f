"""Norms, self-attention and MLPs of a block, and linear layers that leave their bias to a later kernel."""

from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as every_module

from dit_fast.kernels import attention, qk_norm_rope, uses_triton
from dit_fast.kernels.attention.attention import MAX_HEAD_DIM, attention_backend
from dit_fast.kernels.attention.backends import scaled_dot_product
from dit_fast.kernels.recompute import NormRecipe, linear
from dit_fast.kernels.reference import rotate
from dit_fast.model.backends import Backends

Kind = TypeVar("Kind", bound=nn.Module)


def matrix_size(module: nn.Module) -> int:
    """Elements of a module's matrices: its multiply-adds per token, if a token passes through each matrix once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


# Any other tensor, such as a quantized weight, may compute a linear layer in its own way. torch.export replaces plain
# tensors by the last two.
_PLAIN_TENSORS = (Tensor, nn.Parameter, type(None), FakeTensor, FunctionalTensor)
# Hooks on all modules.
_GLOBAL_HOOKS = (
    every_module._global_forward_hooks,
    every_module._global_forward_pre_hooks,
    every_module._global_backward_hooks,
    every_module._global_backward_pre_hooks,
)
# Modules whose hooks only observe, or only gather parameters: operation counters, sharding, ranges for profilers.
_OBSERVERS = ("torch.utils.", "torch.distributed.fsdp", "torch.distributed._composable", "dit_fast.")


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether the module is exactly a `kind`, so that a fused operation may read its weights instead of calling it.

    False for a subclass or another module in its place (adapters, parametrizations), for hooks (offloading, casting,
    pruning), for a replaced forward, and for tensor subclasses (quantized weights).
    """
    return (
        type(module) is kind
        and is_original(kind)
        and is_untouched(module)
        and all(type(parameter) in _PLAIN_TENSORS for parameter in module._parameters.values())
    )


@torch.compiler.assume_constant_result
def is_original(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class was not replaced by another function."""
    owner = next(each for each in kind.__mro__ if "forward" in vars(each))
    forward = kind.forward
    name = forward.__module__, forward.__qualname__
    return name == (owner.__module__, f"{owner.__qualname__}.forward") and not hasattr(forward, "__wrapped__")


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs only its class's forward: no hooks, no forward on the instance."""
    return not ("forward" in vars(module) or any(hooks_of(module)) or has_global_hooks())


def is_seen(module: nn.Module) -> bool:
    """Whether hooks, or a forward on the instance, see what the module is called with.

    Not those that only observe: sharding, profiling ranges, operation counters, and a compiled forward.
    """
    return (
        forward_of(module) is not type(module).forward
        or has_global_hooks()
        or any(map(sees_values, hooks_of(module)))
    )


def forward_of(module: nn.Module) -> Any:
    """The function that computes the module: its class's, or another that is on the instance."""
    forward = vars(module).get("forward", type(module).forward)
    # `parallelize` compiles the method.
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return getattr(forward, "__func__", forward)


def has_global_hooks() -> bool:
    """Whether a hook on all modules does more than observe."""
    return any(map(sees_values, _GLOBAL_HOOKS))


def sees_values(hooks: dict[int, Any]) -> bool:
    """Whether one of the hooks may read or change what goes through a module: it is not one of `_OBSERVERS`."""
    return any(
        not (getattr(hook, "__module__", None) or "").startswith(_OBSERVERS) for hook in hooks.values()
    )


def behavior_of(module: nn.Module) -> tuple[Any, ...]:
    """A key that changes with what the module computes beside its parameters' values.

    With its modules, hooks and settings, such as the active adapter and its scale, and not with each call.
    """

    def key(value: Any) -> Any:
        if isinstance(value, bool | int | float | str | None):
            return value
        if isinstance(value, dict):
            return tuple((str(name), key(each)) for name, each in value.items())
        if isinstance(value, list | tuple):
            return tuple(map(key, value))
        return key(vars(value)) if isinstance(value, Backends) else id(value)

    return tuple(
        (type(part), *(key(value) for name, value in vars(part).items() if name != "_parameters"))
        for part in module.modules()
    )


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The module's forward hooks, forward pre-hooks, backward hooks and backward pre-hooks, by handle."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def why_called(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why the module is called and not part of a fused operation on a `kind`; None where it may be part of one."""
    if type(module) is not kind:
        return f"a {type(module).__module__}.{type(module).__qualname__} in place of {kind.__name__}"
    if forward_of(module) is not kind.forward or not is_original(kind):
        return "its forward was replaced"
    if not is_untouched(module):
        return "it has hooks"
    others = {type(each).__name__ for each in module._parameters.values() if type(each) not in _PLAIN_TENSORS}
    return f"its parameters are {', '.join(sorted(others))}" if others else None


def without_bias(
    layer: nn.Module, x: Tensor, recipe: NormRecipe | None = None
) -> tuple[Tensor, Tensor | None]:
    """`layer(x)` as (product, bias that is not added yet): a later fused kernel adds it and computes its gradient.

    `recipe` recomputes x in the backward pass; if given, it is saved instead of x. A layer that is not a plain
    nn.Linear (LoRA, float8) or has hooks is called: (its output, None).
    """
    if is_plain(layer, nn.Linear):
        return linear(x, layer.weight, recipe=recipe), layer.bias
    return layer(x), None


def with_bias(layer: nn.Module, x: Tensor, recipe: NormRecipe | None = None) -> Tensor:
    """`layer(x)`; a plain nn.Linear saves `recipe`, if given, instead of x."""
    if is_plain(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias, recipe)
    return layer(x)


class Layout(NamedTuple):
    """Positions and padding of a batch of sequences, for their attention.

    Attributes:
        rotation: Cosine and sine of rotary positions (N or 1, T, K / 2, 2); None: no rotation.
        present: Bool (N, T), False for padding that no token attends to; None: no padding.
        condition_present: The same for the condition's tokens (N, S), where cross-attention attends to them.
    """

    rotation: Tensor | None = None
    present: Tensor | None = None
    condition_present: Tensor | None = None


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang & Sennrich 2019, equation 4), in float32 at least; returns the dtype of x."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = nn.functional.rms_norm(wide, x.shape[-1:], eps=self.eps)
        return (y if self.weight is None else y * self.weight).to(x.dtype)


def make_norm(kind: str, width: int, affine: bool) -> nn.LayerNorm | RMSNorm:
    """A norm of NORMS over the last dimension; `affine`: with its own weight (and bias, for a layer norm)."""
    if kind == "rmsnorm":
        return RMSNorm(width, eps=1e-6, elementwise_affine=affine)
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)


class Attention(nn.Module):
    """Multi-head self-attention on one packed projection; rows of `qkv` are [q; k; v], each (heads, head_dim).

    `qk_norm`: RMSNorms of each head's queries and keys (Dehghani et al. 2023, section 2). Where the kernels run, these
    norms, the rotation and the bias before them are one operation, `dit_fast.kernels.qk_norm_rope`, unless a norm was
    replaced or has hooks. A layout with padding always uses PyTorch's attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        qk_norm: bool = False,
        backends: Backends | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_size {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.backends = backends or Backends()
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        # Identities where there are no norms: timm's names, so that its adapters and state dicts fit.
        self.q_norm: nn.Module = RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def project(
        self,
        x: Tensor,
        layout: Layout | None = None,
        recipe: NormRecipe | None = None,
        kernels: str = "reference",
    ) -> Tensor:
        """Queries, keys and values (N, T, 3, H, K) of tokens x (N, T, D), after QK-norm and rotation."""
        heads = (3, self.num_heads, self.head_dim)
        rotation = None if layout is None else layout.rotation
        norm = self.fused_norm() if uses_triton(kernels, x) and self.is_prepared(layout) else None
        if norm is not None:
            qkv, bias = without_bias(self.qkv, x, recipe)
            weight, eps = norm
            qkv = qk_norm_rope(qkv, self.num_heads, bias, weight, rotation, eps, kernels=kernels)
            return qkv.unflatten(2, heads)
        packed = with_bias(self.qkv, x, recipe).unflatten(2, heads)
        if not self.is_prepared(layout):
            return packed
        q, k, v = packed.unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        # `attention` divides by sqrt(head_dim).
        q = q if self.scale == self.head_dim**-0.5 else q * (self.scale * self.head_dim**0.5)
        return torch.stack([q, k, v], dim=2)

    def is_prepared(self, layout: Layout | None) -> bool:
        """Whether queries and keys are normalized, rotated or rescaled between projection and attention."""
        rotated = layout is not None and layout.rotation is not None
        norms = not (is_plain(self.q_norm, nn.Identity) and is_plain(self.k_norm, nn.Identity))
        return rotated or norms or self.scale != self.head_dim**-0.5

    def fused_norm(self) -> tuple[Tensor | None, float] | None:
        """Weights (2, K) of both norms (None without norms) and eps; None where `qk_norm_rope` does not fit."""
        q, k = self.q_norm, self.k_norm
        if self.head_dim > MAX_HEAD_DIM or self.scale != self.head_dim**-0.5:
            return None
        if is_plain(q, nn.Identity) and is_plain(k, nn.Identity):
            return None, 1e-6
        if not (is_plain(q, RMSNorm) and is_plain(k, RMSNorm)):
            return None
        if q.weight is None or k.weight is None or q.eps != k.eps:
            return None
        return torch.stack([q.weight, k.weight]), q.eps

    def attend(
        self,
        x: Tensor,
        layout: Layout | None = None,
        recipe: NormRecipe | None = None,
    ) -> Tensor:
        """Attention before the output projection (N, T, D), fused; `recipe` as in `without_bias`."""
        kernels = self.backends.kernels
        masked = layout is not None and layout.present is not None
        fused = attention_backend(x, self.head_dim, self.backends.attention, kernels) == "triton"
        if fused and not masked and not self.is_prepared(layout):
            return self._mix(*without_bias(self.qkv, x, recipe), layout, kernels)
        return self._mix(self.project(x, layout, recipe, kernels).flatten(2), None, layout, kernels)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        return with_bias(self.proj, self._mix(self.project(x, layout).flatten(2), None, layout))

    def _mix(self, qkv: Tensor, bias: Tensor | None, layout: Layout | None, kernels: str = "auto") -> Tensor:
        """Attention of qkv + bias, (N, T, 3 * H * K), among the tokens that are present: (N, T, D)."""
        if layout is None or layout.present is None:
            return attention(qkv, self.num_heads, bias, backend=self.backends.attention, kernels=kernels)
        packed = qkv.unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mask = layout.present[:, None, None]
        return scaled_dot_product(q, k, v, mask).transpose(1, 2).flatten(2)


def are_fusible(linears: tuple[nn.Module, nn.Module]) -> bool:
    """Whether `dit_fast.kernels.mlp` may read the weights of an MLP's layers; it needs the bias of the first."""
    return all(is_plain(linear, nn.Linear) for linear in linears) and linears[0].bias is not None


class Mlp(nn.Module):
    """Linear - GELU (tanh approximation) - Linear; `forward` is plain PyTorch."""

    activation = "gelu"

    def __init__(self, in_features: int, hidden_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return with_bias(self.fc2, self.act(with_bias(self.fc1, x)))

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        return self.fc1, self.fc2

    def is_fusible(self) -> bool:
        """Whether this module and its layers are unchanged, so that `dit_fast.kernels.mlp` computes the same."""
        linears = are_fusible(self.linears)
        tanh = is_plain(self.act, nn.GELU) and self.act.approximate == "tanh"
        return is_plain(self, Mlp) and linears and tanh


def swiglu_width(hidden_features: int) -> int:
    """Width of the `SwiGLU` with the parameters of a GELU MLP of `hidden_features`: 2/3 of it, a multiple of 8."""
    return -(-2 * hidden_features // 24) * 8


class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * w2 x), w1 and w2 in one matrix `w12` (Shazeer 2020, equation 6); `forward` is plain PyTorch.

    `hidden_features`: those of the GELU MLP that it replaces, see `swiglu_width`: its three matrices then have as many
    parameters as the two of that MLP.
    """

    activation = "swiglu"

    def __init__(self, in_features: int, hidden_features: int):
        super().__init__()
        hidden = swiglu_width(hidden_features)
        self.units = 2 * hidden_features // 3
        self.w12 = nn.Linear(in_features, 2 * hidden)
        self.w3 = nn.Linear(hidden, in_features)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = with_bias(self.w12, x).chunk(2, dim=-1)
        return with_bias(self.w3, nn.functional.silu(gate) * value)

    @torch.no_grad()
    def zero_padding(self) -> None:
        """Set the units beyond two thirds of `hidden_features` to zero, where training keeps them.

        They only round the width up: a unit of zeros outputs zero and gets no gradient. LightningDiT's SwiGLU does not
        have them.
        """
        for half in (*self.w12.weight.chunk(2), *self.w12.bias.chunk(2)):
            half[self.units :] = 0
        self.w3.weight[:, self.units :] = 0

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        return self.w12, self.w3

    def is_fusible(self) -> bool:
        """As in `Mlp`."""
        return is_plain(self, SwiGLU) and are_fusible(self.linears)
