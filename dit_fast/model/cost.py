"""Cost of a model, from its configuration alone: parameters, multiply-adds, memory of a training step.

Conventions. A multiply-add (MAC) is two FLOPs; the "Gflops" of Peebles & Xie 2023 are MACs. Counted are the linear
layers, the patch projection and attention's two products; elementwise work is not. Training is three times the forward
pass, since the backward pass has two products for each of the forward pass; recomputation is not counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_fast.model.backends import RECOMPUTE
from dit_fast.model.blocks import CONDITIONING
from dit_fast.model.dit import DiT
from dit_fast.model.presets import DiT_models

STATE_BYTES = {"weights": 4, "gradients": 4, "AdamW's moments": 8, "average": 4}
"""Bytes per trained parameter between two steps of `dit-fast train`, in every precision."""

CostPrecision = Literal["bf16", "fp16", "fp32"]
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
"""Precisions that can be counted, and the dtype of autocast in each."""


@dataclass(frozen=True)
class Counts:
    """Parameters and computation of a model.

    Attributes:
        parameters: Number of all parameters.
        fixed: Number of those that are not trained (the table of positions).
        tokens: Tokens of an image in the blocks.
        macs: Multiply-adds of one image's forward pass.
    """

    parameters: int
    fixed: int
    tokens: int
    macs: int

    @property
    def trained(self) -> int:
        return self.parameters - self.fixed

    @property
    def forward_flops(self) -> int:
        return 2 * self.macs

    @property
    def training_flops(self) -> int:
        return 3 * self.forward_flops

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes of each of `STATE_BYTES` for the whole model."""
        return {name: size * self.trained for name, size in STATE_BYTES.items()}

    def as_json(self) -> dict[str, int]:
        return {
            **asdict(self),
            "forward_flops": self.forward_flops,
            "training_flops": self.training_flops,
        }


def count(model: DiT, caption_tokens: int = 1, shapes: Mapping[tuple[int, int], int] | None = None) -> Counts:
    """Count a model on any device, such as "meta"; `tokens` are those of the model's own size.

    caption_tokens: tokens per caption; shapes: as in `mean_macs`.
    """
    parameters = list(model.parameters())
    return Counts(
        parameters=sum(p.numel() for p in parameters),
        fixed=sum(p.numel() for p in parameters if not p.requires_grad),
        tokens=model.x_embedder.num_patches,
        macs=mean_macs(model, caption_tokens, shapes),
    )


def mean_macs(
    model: DiT, caption_tokens: int = 1, shapes: Mapping[tuple[int, int], int] | None = None
) -> int:
    """`DiT.macs`, averaged over `shapes`, (height, width) -> number of images; None: the model's own size."""
    if not shapes:
        return model.macs(caption_tokens=caption_tokens)
    every = sum(number * model.macs(size, caption_tokens) for size, number in shapes.items())
    return round(every / sum(shapes.values()))


def table(input_size: int = 32) -> Iterator[tuple[str, str, Counts]]:
    """(size, conditioning, counts) of the paper's twelve sizes with each of the four conditionings."""
    for name, build in DiT_models.items():
        for conditioning in CONDITIONING:
            with torch.device("meta"):
                model = build(input_size=input_size, conditioning=conditioning)
            yield name, conditioning, count(model)


def kept_bytes(
    config: dict[str, Any],
    batch: int,
    *,
    precision: str = "bf16",
    residual: str = "fp32",
    caption_tokens: int = 1,
) -> dict[str, int]:
    """Bytes that a forward pass on the fused kernels saves for the backward pass, for each choice of `recompute`.

    Counted are the distinct storages that autograd holds; with "blocks", the inputs of every block and what one block
    saves while it is recomputed. Parameters are not counted, their low-precision copies under autocast are. The loss's
    own tensors, which have the images' size, are left out. Nothing is computed: the tensors are fake.

    Args:
        config: `DiT.config`.
        batch: Number of images.
        precision: One of PRECISIONS.
        residual: Dtype of the residual stream, "fp32" or "bf16".
        caption_tokens: Tokens per caption.
    """
    kept = {}
    for recompute in RECOMPUTE:
        # All blocks but the first save the same, so that two depths give any other.
        two, three = (
            _kept({**config, "depth": n}, batch, precision, residual, recompute, caption_tokens)
            for n in (2, 3)
        )
        kept[recompute] = two + (config["depth"] - 2) * (three - two)
        if recompute == "cheap":
            again = three - two
    return {**kept, "blocks": kept["blocks"] + again}


def _kept(
    config: dict[str, Any], batch: int, precision: str, residual: str, recompute: str, caption_tokens: int
) -> int:
    low = PRECISIONS[precision]
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    def keep_inputs(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        stream, c, *_ = inputs
        held.extend(keep(tensor) for tensor in (*stream, c) if isinstance(tensor, Tensor))

    held: list[Tensor] = []
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        model = DiT(**config, kernels="triton", recompute=recompute)
        if recompute == "blocks":
            for block in model.blocks:
                block.register_forward_pre_hook(keep_inputs)
        x = torch.empty(batch, model.in_channels, *model.x_embedder.img_size)
        t = y = torch.zeros(batch, dtype=torch.int64)
        if model.caption_dim:
            y = torch.zeros(batch, caption_tokens, model.caption_dim)
        if residual == "bf16":
            model.x_embedder.register_forward_hook(lambda module, inputs, tokens: tokens.to(torch.bfloat16))
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None),
        ):
            output = model.eval()(x, t, y)
        for parameter in model.parameters():
            storages.pop(parameter.untyped_storage()._cdata, None)
        del output  # until here it held what autograd saved
    return sum(storages.values())
