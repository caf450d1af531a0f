"""What an operation of dit_fast launches inside, and how many bytes each launch moves.

The operation's CUDA implementation is run on meta tensors: its Triton launches are recorded, the PyTorch calls
between them intercepted. The rule is that of `inductor.py`: a launch moves each tensor that it is given once. What a
launch is given and does not count as memory traffic stands in KERNEL_RULES.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dit_fast.kernels.launch import Launch, record_launches
from dit_fast.kernels.library import IMPLEMENTATIONS

Counted = tuple[str, str, int, int]
"""kind, name, bytes read, bytes written: see `Pass`."""

LIBRARY_KINDS = {
    "gemm": re.compile(r"aten::(mm|addmm|bmm|baddbmm|_addmm_activation|_scaled_mm|dot|mv|addmv)\b"),
    "attention": re.compile(r"aten::_(scaled_dot_product|flash|efficient|cudnn)\w*attention\w*"),
    "convolution": re.compile(r"aten::convolution\w*"),
}
ALLOCATIONS = re.compile(r"aten::(new_)?empty(_like|_strided)?\b")


@dataclass(frozen=True)
class KernelRule:
    """A kernel that is a matrix product or an attention: `kind`, and the arguments that are traffic beside it."""

    kind: str
    counted: tuple[str, ...] = ()


KERNEL_RULES: dict[str, KernelRule] = {
    "gemm_gelu_fwd": KernelRule("gemm", ("pre_ptr",)),
    "gemm_gelu_bwd": KernelRule("gemm", ("pre_ptr", "act_ptr", "partial_ptr")),
    "attention": KernelRule("attention", ("partial_ptr",)),  # shares of the projection's bias gradient
}
"""By a prefix of the kernel's name; every other kernel is memory-bound and counts all its tensors."""


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements: a dimension of stride 0 is one element long."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= 1 if stride == 0 and size else size
    return elements * tensor.itemsize


def kind_of(operation: Any) -> str:
    """The kind of a launch that PyTorch makes for an operation of its own."""
    name = operation.name()
    return next((kind for kind, names in LIBRARY_KINDS.items() if names.match(name)), "torch")


def on_meta(value: Any) -> Any:
    """The same nested values with each tensor as one of its shape, strides and dtype on the meta device."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")

    with unset_fake_temporarily():
        return tree_map(convert, value)


def launches(operation: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Counted]:
    """What one call of a registered operation launches, in order."""
    with record_launches() as recorded:
        interceptor = Interceptor(recorded)
        with interceptor:
            operation(*arguments, **keywords)
        interceptor.take_launches()
    return interceptor.counted


class Interceptor(TorchDispatchMode):
    """Counts what is launched while it is entered: Triton kernels from `recorded`, PyTorch's operations itself.

    A tensor is read by a launch when an earlier launch, or the caller (`given`), has written it, and else written.
    """

    def __init__(self, recorded: list[Launch], given: Any = ()) -> None:
        super().__init__()
        self.counted: list[Counted] = []
        self._recorded = recorded
        self._taken = 0
        self._written: dict[int, Tensor] = {}  # by storage; holding the tensor keeps the address its own
        self._write(tensors(given))

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.take_launches()
        given = tensors((args, kwargs))
        if operation.namespace == "dit_fast":
            self._write(given)
            with self:
                return IMPLEMENTATIONS[operation.name().partition("::")[2]](*args, **(kwargs or {}))
        if operation.namespace == "prim":  # questions to a tensor
            return operation(*args, **(kwargs or {}))
        if operation._can_decompose():  # `to` and its like, which autograd would have taken apart
            with self:
                return operation.decompose(*args, **(kwargs or {}))
        answer = operation(*args, **(kwargs or {}))
        made = tensors(answer)
        if ALLOCATIONS.match(operation.name()) or operation.is_view:
            return answer
        changed = [
            value
            for value, argument in zip(args, operation._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]
        if changed or not set(map(_storage, made)) <= set(map(_storage, given)):
            read = [tensor for tensor in given if _storage(tensor) in self._written]
            self._count(kind_of(operation), operation.name(), read, changed or made)
        return answer

    def take_launches(self) -> None:
        """Count the Triton kernels that were recorded since the last call."""
        for launch in self._recorded[self._taken :]:
            name = launch.kernel.fn.__name__.strip("_")
            rule = next((rule for prefix, rule in KERNEL_RULES.items() if name.startswith(prefix)), None)
            kind = rule.kind if rule else "dit_fast"
            pointers = {
                argument: base
                for argument, value in launch.arguments.items()
                if isinstance(
                    base := getattr(value, "base", value), Tensor
                )  # a tensor, or a descriptor of one
            }
            read, written = self._split(pointers.values())
            self._count(kind, name, read, written)
            if rule:
                beside = {id(pointers[argument]) for argument in rule.counted if argument in pointers}
                chosen = [[tensor for tensor in side if id(tensor) in beside] for side in (read, written)]
                self._count("epilogue", name, *chosen)
        self._taken = len(self._recorded)

    def _split(self, given: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of a launch as read and written; one given twice is read, then written in place."""
        read: list[Tensor] = []
        written: list[Tensor] = []
        places = set()
        for tensor in given:
            place = (_storage(tensor), tensor.storage_offset(), tensor.shape)
            known = _storage(tensor) in self._written and place not in places
            (read if known else written).append(tensor)
            places.add(place)
        return read, written

    def _count(self, kind: str, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        self.counted.append((kind, name, sum(map(tensor_bytes, read)), sum(map(tensor_bytes, written))))
        self._write(written)

    def _write(self, written: list[Tensor]) -> None:
        self._written |= {_storage(tensor): tensor for tensor in written}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
