"""The kernels themselves: on a GPU, or on a CPU through Triton's interpreter (TRITON_INTERPRET=1)."""

import numpy as np
import pytest
import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret

if not INTERPRETED and not torch.cuda.is_available():
    # Without either, the registered operations run their references and these tests would show nothing.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """torch.empty is filled with NaN: a kernel that leaves an element unwritten cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def bfloat16_interpreter():
    """The interpreter truncates float32 to bfloat16 and multiplies bfloat16 bit patterns; round and widen instead."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widen(bits):
        return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)

    def narrow(values):
        return (
            torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().view(torch.uint16).numpy()
        )

    cast, convert, dot = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
        InterpreterBuilder.create_dot,
    )

    def cast_impl(self, source, target):
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(source.data), target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(source.data), target.scalar)
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(source.data), target.scalar)
        return convert(self, source, target, rounding)

    def create_dot(self, a, b, total, *options):
        if a.dtype.scalar == tl.bfloat16:
            a, b = TensorHandle(widen(a.data), tl.float32), TensorHandle(widen(b.data), tl.float32)
        return dot(self, a, b, total, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        patch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield
