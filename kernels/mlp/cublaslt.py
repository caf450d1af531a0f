"""The products of an MLP with cuBLASLt's own training epilogues, through NVIDIA's nvmath-python bindings.

Forward   pre = x w^T + bias, act = GELU(pre): epilogue GELU_AUX_BIAS with pre as its second output, or GELU_BIAS.
Backward  d_act = dout w, d_pre = d_act * GELU'(pre), d_bias = sum_M(d_pre): epilogue DGELU_BGRAD, or DGELU.
Numerics  float16 and bfloat16, sums in float32; the GELU is the tanh form. act comes from the sums before they are
          rounded to pre, so computing it again from pre differs by that rounding. cuBLASLt has no epilogue that writes
          act again in the backward pass: a pass of gelu.py does, so this provider is best with the activation kept.

cuBLASLt counts columns first: a row-major (M, N) tensor is an (N, M) matrix with leading dimension N, and a product is
that of its transposes, w first. A plan (descriptors, layouts and the algorithm that cuBLASLt's heuristic names) is made
once for each shape; a call then sets its pointers, takes a workspace from PyTorch's allocator and runs on PyTorch's
current stream, so that it can be captured in a CUDA graph after one call outside of it.
"""

import ctypes
import functools
import importlib
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_fast.kernels.mlp.gelu import plan_gelu

CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF = 0, 2, 14  # cudaDataType_t
COMPUTE_32F = 68  # cublasComputeType_t
TRANSPOSE = 1  # cublasOperation_t
DATA_TYPES = {torch.float16: CUDA_R_16F, torch.bfloat16: CUDA_R_16BF}
WORKSPACE = 32 * 2**20
"""Bytes; NVIDIA's recommendation for sm_90, more than older architectures ask for."""

_setting_pointers = threading.Lock()


@functools.cache
def bindings() -> Any:
    """The module nvmath.bindings.cublasLt; ImportError naming the extra where it is missing."""
    try:
        return importlib.import_module("nvmath.bindings.cublasLt")
    except ImportError as error:
        raise ImportError(
            f"mlp: epilogue='cublaslt' needs nvmath-python ({error}); pip install 'dit-fast[epilogues]'"
        ) from error


def installed() -> bool:
    """Whether nvmath-python imports."""
    try:
        bindings()
    except ImportError:
        return False
    return True


@functools.cache
def _handle(device: int) -> int:
    """One cuBLASLt handle for each device, for the life of the process."""
    with torch.cuda.device(device):
        return bindings().create()


@dataclass(frozen=True)
class Plan:
    """What cuBLASLt is given for one product: handles of the bindings, and `result`, which holds the algorithm."""

    operation: int
    a_layout: int
    b_layout: int
    d_layout: int
    result: Any


def _set(setter: Any, target: int, attribute: Any, value: Any) -> None:
    """Set an attribute of a descriptor from a ctypes value."""
    setter(target, int(attribute), ctypes.addressof(value), ctypes.sizeof(value))


@functools.cache
def _plan(device: int, epilogue: str, transposed: bool, M: int, N: int, K: int, data_type: int) -> Plan:
    """The plan of (M, N) = a (M, K) times w, (N, K) if `transposed` else (K, N). Raises ValueError if there is none."""
    lt = bindings()
    attribute = lt.MatmulDescAttribute
    operation = lt.matmul_desc_create(COMPUTE_32F, CUDA_R_32F)
    if transposed:
        _set(lt.matmul_desc_set_attribute, operation, attribute.TRANSA, ctypes.c_int32(TRANSPOSE))
    kind = ctypes.c_int32(int(getattr(lt.Epilogue, epilogue)))
    _set(lt.matmul_desc_set_attribute, operation, attribute.EPILOGUE, kind)
    if epilogue != "GELU_BIAS":
        _set(lt.matmul_desc_set_attribute, operation, attribute.EPILOGUE_AUX_LD, ctypes.c_int64(N))
        # cuBLASLt looks for an algorithm only when the pointer is set; the call sets the real one.
        _set(lt.matmul_desc_set_attribute, operation, attribute.EPILOGUE_AUX_POINTER, ctypes.c_uint64(16))
    rows, columns = (K, N) if transposed else (N, K)
    a_layout = lt.matrix_layout_create(data_type, rows, columns, rows)
    b_layout = lt.matrix_layout_create(data_type, K, M, K)
    d_layout = lt.matrix_layout_create(data_type, N, M, N)
    preference = lt.matmul_preference_create()
    try:
        limit = lt.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES
        _set(lt.matmul_preference_set_attribute, preference, limit, ctypes.c_uint64(WORKSPACE))
        result, found = lt.MatmulHeuristicResult(1), ctypes.c_int32(0)
        lt.matmul_algo_get_heuristic(
            _handle(device), operation, a_layout, b_layout, d_layout, d_layout, preference, 1, result.ptr,
            ctypes.addressof(found),
        )  # fmt: skip
    finally:
        lt.matmul_preference_destroy(preference)
    if found.value == 0:
        raise ValueError(
            f"mlp: cuBLASLt has no {epilogue} product for M, N, K = {M}, {N}, {K}; use epilogue='separate'"
        )
    return Plan(operation, a_layout, b_layout, d_layout, result)


def _run(
    epilogue: str,
    a: Tensor,
    weight: Tensor,
    transposed: bool,
    out: Tensor,
    aux: Tensor | None,
    bias: Tensor | None,
) -> None:
    """out (M, N) = epilogue(a (M, K) times weight); `aux` is pre, `bias` is read or, in DGELU_BGRAD, written."""
    lt = bindings()
    (M, K), N = a.shape, out.shape[1]
    plan = _plan(a.get_device(), epilogue, transposed, M, N, K, DATA_TYPES[a.dtype])
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=a.device)
    alpha, beta = ctypes.c_float(1.0), ctypes.c_float(0.0)
    attribute = lt.MatmulDescAttribute
    # The plan is shared between threads: its pointers hold until the launch has read them.
    with _setting_pointers, torch.cuda.device_of(a):
        for which, tensor in (
            (attribute.EPILOGUE_AUX_POINTER, aux),
            (attribute.BIAS_POINTER, bias),
        ):
            if tensor is not None:
                address = ctypes.c_uint64(tensor.data_ptr())
                _set(lt.matmul_desc_set_attribute, plan.operation, which, address)
        lt.matmul(
            _handle(a.get_device()), plan.operation, ctypes.addressof(alpha),
            weight.data_ptr(), plan.a_layout, a.data_ptr(), plan.b_layout, ctypes.addressof(beta),
            out.data_ptr(), plan.d_layout, out.data_ptr(), plan.d_layout,
            plan.result.ptr, workspace.data_ptr(), WORKSPACE, torch.cuda.current_stream(a.device).cuda_stream,
        )  # fmt: skip


def _check(a: Tensor, weight: Tensor) -> None:
    """ValueError for what cuBLASLt's GELU epilogues do not take."""
    if a.dtype not in DATA_TYPES:
        raise ValueError(f"mlp: epilogue='cublaslt' takes float16 and bfloat16, x is {a.dtype}")
    if a.shape[1] % 8 or any(size % 8 for size in weight.shape):
        raise ValueError(
            f"mlp: epilogue='cublaslt' takes widths that are multiples of 8, the weight is {tuple(weight.shape)}"
        )


def gemm_gelu(x: Tensor, weight: Tensor, bias: Tensor, keep_pre: bool) -> tuple[Tensor, Tensor]:
    """(pre, act) of x (M, K), weight (N, K), bias (N,): pre = x weight^T + bias, empty unless `keep_pre`."""
    bindings()
    _check(x, weight)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    act = x.new_empty(x.shape[0], weight.shape[0])
    pre = torch.empty_like(act) if keep_pre else x.new_empty(0)
    if act.numel():
        epilogue = "GELU_AUX_BIAS" if keep_pre else "GELU_BIAS"
        _run(epilogue, x, weight, True, act, pre if keep_pre else None, bias)
    return pre, act


def gemm_gelu_backward(
    dout: Tensor, weight: Tensor, pre: Tensor, activation: bool, bias_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_pre, act, d_bias) of dout (M, K), weight (K, N), pre (M, N); act, d_bias empty where not asked for."""
    bindings()
    _check(dout, weight)
    dout, weight, pre = dout.contiguous(), weight.contiguous(), pre.contiguous()
    dpre = torch.empty_like(pre)
    dbias = pre.new_zeros(pre.shape[1] if bias_gradient else 0)
    if pre.numel():
        epilogue = "DGELU_BGRAD" if bias_gradient else "DGELU"
        _run(epilogue, dout, weight, False, dpre, pre, dbias if bias_gradient else None)
    act = plan_gelu(pre, *pre.shape)(pre, None) if activation else pre.new_empty(0)
    return dpre, act, dbias
