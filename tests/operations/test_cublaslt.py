"""The cuBLASLt provider of `mlp` against bindings that follow cuBLASLt's documented rules on the CPU.

The real library needs a GPU. The stand-in below reads the descriptors, layouts and pointers that it is given the way
cuBLASLt does, columns first, and computes the product and its epilogue from them: a wrong transpose, leading dimension,
pointer or attribute gives wrong numbers.
"""

import ctypes
import enum
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.mlp import cublaslt


class Epilogue(enum.IntEnum):
    GELU_BIAS, GELU_AUX_BIAS, DGELU, DGELU_BGRAD = 36, 164, 192, 208


class MatmulDescAttribute(enum.IntEnum):
    TRANSA, EPILOGUE, BIAS_POINTER, EPILOGUE_AUX_POINTER, EPILOGUE_AUX_LD = 3, 7, 8, 11, 12


class MatmulPreferenceAttribute(enum.IntEnum):
    MAX_WORKSPACE_BYTES = 1


# Bytes of each attribute, as nvmath-python 1.0.0 states their types.
SIZES = {
    MatmulDescAttribute: dict(zip(MatmulDescAttribute, (4, 4, 8, 8, 8), strict=True)),
    MatmulPreferenceAttribute: {MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES: 8},
}


class CpuBindings:
    """The part of nvmath.bindings.cublasLt that the provider calls; handles are indices into `objects`."""

    Epilogue, MatmulDescAttribute = Epilogue, MatmulDescAttribute
    MatmulPreferenceAttribute = MatmulPreferenceAttribute

    def __init__(self) -> None:
        self.objects: list = [None]
        self.calls: list[str] = []
        self.algorithms = 1

    def _new(self, value) -> int:
        self.objects.append(value)
        return len(self.objects) - 1

    def create(self) -> int:
        return self._new("handle")

    def matmul_desc_create(self, compute_type: int, scale_type: int) -> int:
        assert (compute_type, scale_type) == (68, 0)  # CUBLAS_COMPUTE_32F, CUDA_R_32F
        return self._new({})

    def _set(self, kind, target: int, attribute: int, address: int, size: int) -> None:
        assert size == SIZES[kind][kind(attribute)]
        self.objects[target][kind(attribute)] = int.from_bytes(ctypes.string_at(address, size), "little")

    def matmul_desc_set_attribute(self, *args: int) -> None:
        self._set(MatmulDescAttribute, *args)

    def matmul_preference_set_attribute(self, *args: int) -> None:
        self._set(MatmulPreferenceAttribute, *args)

    def matrix_layout_create(self, data_type: int, rows: int, columns: int, ld: int) -> int:
        return self._new((data_type, rows, columns, ld))

    def matmul_preference_create(self) -> int:
        return self._new({})

    def matmul_preference_destroy(self, preference: int) -> None:
        self.objects[preference] = None

    def MatmulHeuristicResult(self, count: int) -> SimpleNamespace:
        return SimpleNamespace(ptr=4096, count=count)

    def matmul_algo_get_heuristic(
        self, handle, operation, a, b, c, d, preference, limit, result, found
    ) -> None:
        self.calls.append("plan")
        assert self.objects[handle] == "handle"
        assert self.objects[preference] == {MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES: cublaslt.WORKSPACE}
        ctypes.c_int32.from_address(found).value = self.algorithms

    def matrix(self, address: int, layout: int) -> np.ndarray:
        """The (rows, columns) view of memory that a layout describes, columns first."""
        data_type, rows, columns, ld = self.objects[layout]
        assert data_type == 2  # CUDA_R_16F
        return self.values(address, rows, columns, ld)

    @staticmethod
    def values(address: int, rows: int, columns: int, ld: int) -> np.ndarray:
        buffer = (ctypes.c_uint16 * (ld * columns)).from_address(address)
        return np.frombuffer(buffer, np.float16).reshape(columns, ld)[:, :rows].T

    def matmul(
        self, handle, operation, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout, algorithm,
        workspace, workspace_size, stream,
    ) -> None:  # fmt: skip
        self.calls.append("run")
        assert (algorithm, stream, workspace_size) == (4096, 77, cublaslt.WORKSPACE)
        assert workspace % 256 == 0 or workspace % 16 == 0
        assert ctypes.c_float.from_address(alpha).value == 1.0
        assert ctypes.c_float.from_address(beta).value == 0.0
        settings = self.objects[operation]
        left, right = self.matrix(a, a_layout), self.matrix(b, b_layout)
        left = left.T if settings.get(MatmulDescAttribute.TRANSA) else left
        out = self.matrix(d, d_layout)
        product = torch.from_numpy(left.astype(np.float64) @ right.astype(np.float64))
        kind = Epilogue(settings[MatmulDescAttribute.EPILOGUE])
        rows, columns = out.shape
        if kind != Epilogue.GELU_BIAS:
            ld = settings[MatmulDescAttribute.EPILOGUE_AUX_LD]
            assert ld % 8 == 0
            aux = self.values(settings[MatmulDescAttribute.EPILOGUE_AUX_POINTER], rows, columns, ld)
        if kind != Epilogue.DGELU:
            bias = self.values(settings[MatmulDescAttribute.BIAS_POINTER], rows, 1, rows)
        if kind in (Epilogue.GELU_BIAS, Epilogue.GELU_AUX_BIAS):
            product += torch.from_numpy(bias.astype(np.float64))
            if kind == Epilogue.GELU_AUX_BIAS:
                aux[...] = product.numpy()
            out[...] = reference.gelu(product).numpy()
            return
        pre = torch.from_numpy(aux.astype(np.float64))
        dpre, _, _ = reference.gelu_backward(product, pre, None)
        out[...] = dpre.numpy()
        if kind == Epilogue.DGELU_BGRAD:
            bias[...] = dpre.sum(1, keepdim=True).numpy()


@pytest.fixture
def bindings(monkeypatch) -> CpuBindings:
    fake = CpuBindings()
    monkeypatch.setattr(cublaslt, "bindings", lambda: fake)
    monkeypatch.setattr(cublaslt, "_handle", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    fake.create()
    cublaslt._plan.cache_clear()
    yield fake
    cublaslt._plan.cache_clear()


def draw(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64).half()


def assert_close(got: Tensor, want: Tensor) -> None:
    """To float16's rounding, of the value and of the largest."""
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= 2e-3 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("keep_pre", [True, False])
def test_forward_descriptors_and_pointers(bindings, keep_pre) -> None:
    torch.manual_seed(0)
    x, weight, bias = draw(5, 16), draw(24, 16), draw(24)
    pre, act = cublaslt.gemm_gelu(x, weight, bias, keep_pre)
    exact = x.double() @ weight.double().t() + bias.double()
    assert_close(act, reference.gelu(exact))
    if keep_pre:
        assert_close(pre, exact)
    else:
        assert pre.numel() == 0


@pytest.mark.parametrize("bias_gradient", [True, False])
def test_backward_descriptors_and_pointers(bindings, bias_gradient) -> None:
    torch.manual_seed(0)
    dout, weight, pre = draw(5, 16), draw(16, 24), draw(5, 24)
    dpre, act, dbias = cublaslt.gemm_gelu_backward(dout, weight, pre, False, bias_gradient)
    want, _, sums = reference.gelu_backward(dout.double() @ weight.double(), pre.double(), None)
    assert_close(dpre, want)
    assert act.numel() == 0
    if bias_gradient:
        assert_close(dbias, sums)
    else:
        assert dbias.numel() == 0


def test_a_plan_is_made_once_for_a_shape(bindings) -> None:
    """The second call of a shape only sets pointers, and takes other tensors' pointers."""
    weight, bias = draw(24, 16), draw(24)
    for _ in range(2):
        x = draw(5, 16)
        _, act = cublaslt.gemm_gelu(x, weight, bias, True)
        assert_close(act, reference.gelu(x.double() @ weight.double().t() + bias.double()))
    cublaslt.gemm_gelu(draw(6, 16), weight, bias, True)
    assert bindings.calls == ["plan", "run", "run", "plan", "run"]


def test_no_rows_call_nothing(bindings) -> None:
    _, act = cublaslt.gemm_gelu(draw(0, 16), draw(24, 16), draw(24), True)
    _, _, dbias = cublaslt.gemm_gelu_backward(draw(0, 16), draw(16, 24), draw(0, 24), False, True)
    assert act.shape == (0, 24)
    assert dbias.tolist() == [0.0] * 24
    assert bindings.calls == []


def test_refusals(bindings) -> None:
    with pytest.raises(ValueError, match=r"takes float16 and bfloat16, x is torch\.float32"):
        cublaslt.gemm_gelu(draw(5, 16).float(), draw(24, 16).float(), draw(24).float(), True)
    with pytest.raises(ValueError, match=r"multiples of 8, the weight is \(20, 16\)"):
        cublaslt.gemm_gelu(draw(5, 16), draw(20, 16), draw(20), True)
    bindings.algorithms = 0
    with pytest.raises(ValueError, match="cuBLASLt has no GELU_AUX_BIAS product for M, N, K = 5, 24, 16"):
        cublaslt.gemm_gelu(draw(5, 16), draw(24, 16), draw(24), True)


def test_missing_package_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nvmath", None)
    cublaslt.bindings.cache_clear()
    with pytest.raises(ImportError, match=r"needs nvmath-python .*pip install .*\[epilogues\]'") as error:
        cublaslt.gemm_gelu(draw(5, 16), draw(24, 16), draw(24), True)
    assert "\n" not in str(error.value)


def test_names_and_sizes_are_those_of_the_real_bindings() -> None:
    """The stand-in's numbers, where the package can be imported; it needs no GPU for that."""
    real = pytest.importorskip("nvmath.bindings.cublasLt", exc_type=ImportError)
    for kind in (Epilogue, MatmulDescAttribute, MatmulPreferenceAttribute):
        for member in kind:
            assert int(getattr(getattr(real, kind.__name__), member.name)) == member.value
    for attribute, size in SIZES[MatmulDescAttribute].items():
        kind = real.get_matmul_desc_attribute_dtype(getattr(real.MatmulDescAttribute, attribute.name))
        assert np.dtype(kind).itemsize == size
    assert real.matmul_heuristic_result_dtype.fields["algo"][1] == 0  # the algorithm is at its start
