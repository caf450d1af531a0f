"""The tensors of a multi-tensor AdamW step, and the table of their addresses that its kernels read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_fast.kernels.launch import cdiv


@dataclass(frozen=True)
class MultiTensorLaunch:
    """`block` elements of one tensor a program; `norm_programs` programs share all blocks of the sum of squares.

    8 elements a thread make 128-bit accesses of half-precision tensors. The sum's order is a function of these numbers
    alone, not of the device; 1024 programs are about 8 for each of 132 multiprocessors.
    """

    block: int = 2048
    num_warps: int = 8
    norm_programs: int = 1024


@dataclass(frozen=True)
class AdamWSettings:
    """What is constant during a run. `ema_warmup`: d = min(ema_decay, (1 + t) / (10 + t)) in place of ema_decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    max_norm: float | None = None


def without_gaps(x: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of the dimensions."""
    span = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1
    ):
        if stride != span:
            return False
        span *= size
    return True


def on_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """`values` in (page-locked) host memory and on the device; the copy does not wait for the device."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host, host.to(device, non_blocking=True)


class AdamWTensors:
    """Parameters, moments, steps, averages and copies that are updated together, and the table of their addresses.

    params, exp_avgs, exp_avg_sqs, averages: equally long lists of tensors of one dtype, float32 or float64, on one
    device, each with the shape and strides of its parameter and without gaps; steps: one float32 scalar each;
    averages or copies (one half-precision dtype) may be None. Raises ValueError naming what does not fit. The table
    is made once: replace the object when a tensor is replaced. Gradients may move, and are looked up at each step.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        averages: Sequence[Tensor] | None = None,
        copies: Sequence[Tensor] | None = None,
        *,
        config: MultiTensorLaunch = MultiTensorLaunch(),
    ):
        self.params, self.exp_avgs, self.exp_avg_sqs = list(params), list(exp_avgs), list(exp_avg_sqs)
        self.steps = list(steps)
        self.averages = None if averages is None else list(averages)
        self.copies = None if copies is None else list(copies)
        self.config = config
        self._check()
        self.shapes = [p.shape for p in self.params]
        self.strides = [p.stride() for p in self.params]
        self._blocks: Tensor | None = None
        self._addresses: list[int] = []
        self._captured: list[Tensor] = []

    def _check(self) -> None:
        if not self.params:
            raise ValueError("adamw_ema: no parameters")
        p, copies = self.params[0], self.copies or [self.params[0].new_empty(0, dtype=torch.bfloat16)]
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"adamw_ema: params are {p.dtype}, expected float32 or float64 (copies are for less)"
            )
        if copies[0].dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"adamw_ema: copies are {copies[0].dtype}, expected bfloat16 or float16")
        fields = {
            "params": (self.params, p.dtype),
            "exp_avgs": (self.exp_avgs, p.dtype),
            "exp_avg_sqs": (self.exp_avg_sqs, p.dtype),
            "averages": (self.averages, p.dtype),
            "copies": (self.copies, copies[0].dtype),
            "steps": (self.steps, torch.float32),
        }
        for name, (tensors, dtype) in fields.items():
            if tensors is None:
                continue
            if len(tensors) != len(self.params):
                raise ValueError(f"adamw_ema: {len(tensors)} {name}, expected {len(self.params)}")
            for index, (tensor, like) in enumerate(zip(tensors, self.params, strict=True)):
                expected = (torch.Size(), ()) if name == "steps" else (like.shape, like.stride())
                found = (tensor.shape, tensor.stride())
                if (
                    tensor.dtype != dtype
                    or tensor.device != p.device
                    or found != expected
                    or not without_gaps(tensor)
                ):
                    raise ValueError(
                        f"adamw_ema: {name}[{index}] is {tensor.dtype} {tuple(found[0])} with strides {found[1]} on "
                        f"{tensor.device}, expected {dtype} {tuple(expected[0])} with {expected[1]}, no gaps, "
                        f"on {p.device}"
                    )

    def accept(self, grads: "Sequence[Tensor] | Gradients") -> "Gradients":
        """The gradients, those laid out unlike their parameter copied; ValueError for one that does not fit."""
        if isinstance(grads, Gradients):
            if grads.of is not self:
                raise ValueError("adamw_ema: grads were accepted by other tensors")
            return grads
        if len(grads) != len(self.params):
            raise ValueError(f"adamw_ema: {len(grads)} grads, expected {len(self.params)}")
        dtype, device, fitting = grads[0].dtype, self.params[0].device, list(grads)
        if not dtype.is_floating_point:
            raise ValueError(f"adamw_ema: grads are {dtype}, expected float32, float64, bfloat16 or float16")
        # Whole lists are compared first: the loops below would take the host longer than the launches do.
        if [(grad.shape, grad.dtype, grad.device) for grad in grads] != [
            (shape, dtype, device) for shape in self.shapes
        ]:
            for index, (grad, shape) in enumerate(zip(grads, self.shapes, strict=True)):
                if (grad.shape, grad.dtype, grad.device) != (shape, dtype, device):
                    raise ValueError(
                        f"adamw_ema: grads[{index}] is {grad.dtype} {tuple(grad.shape)} on {grad.device}, "
                        f"expected {dtype} {tuple(shape)} on {device}"
                    )
        if [grad.stride() for grad in grads] != self.strides:
            for index, (grad, stride) in enumerate(zip(grads, self.strides, strict=True)):
                if grad.stride() != stride:
                    fitting[index] = torch.empty_like(self.params[index], dtype=dtype).copy_(grad)
        return Gradients(fitting, self)

    def point_to(self, grads: list[Tensor]) -> None:
        """Put the addresses of the gradients on the device, if they moved; the table too, the first time."""
        p = self.params[0]
        if self._blocks is None:
            self._make_table()
        addresses = [grad.data_ptr() for grad in grads]
        capturing = p.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing or addresses != self._addresses:
            self._host, self.grads = on_device(addresses, torch.int64, p.device)
            # A captured copy is repeated at each replay, from the same host memory; the capture itself does not copy.
            self._addresses = [] if capturing else addresses
            if capturing:
                self._captured.append(self._host)

    def _make_table(self) -> None:
        p, block = self.params[0], self.config.block
        counts = [cdiv(tensor.numel(), block) for tensor in self.params]
        firsts = [0]
        for count in counts[:-1]:
            firsts.append(firsts[-1] + count)
        absent = [p.new_empty(0)] * len(self.params)
        columns = [
            self.params,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.averages or absent,
            self.copies or absent,
        ]
        values = [[tensor.data_ptr() for tensor in column] for column in (*columns, self.steps)]
        values += [[tensor.numel() for tensor in self.params], firsts]
        _, table = on_device(
            [value for row in zip(*values, strict=True) for value in row], torch.int64, p.device
        )
        self.table = table
        rows = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        self._blocks = rows.to(p.device)
        self.scalars = torch.empty(len(counts), 8, dtype=p.dtype, device=p.device)

    @property
    def blocks(self) -> Tensor:
        """For each block of elements, the row of its tensor."""
        assert self._blocks is not None
        return self._blocks

    def bytes_moved(self, grad_itemsize: int = 4) -> int:
        """Unavoidable bytes of one update: p, m, v and the average read and written, g read, the copy written."""
        itemsize = self.params[0].itemsize
        each = 2 * itemsize * (3 if self.averages is None else 4) + grad_itemsize
        each += 0 if self.copies is None else self.copies[0].itemsize
        return each * sum(p.numel() for p in self.params)


@dataclass(frozen=True)
class Gradients:
    """Gradients that fit, so that several operations on them check them once."""

    tensors: list[Tensor]
    of: AdamWTensors
