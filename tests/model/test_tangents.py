"""DiT.forward(tangents=...): the derivative along a direction of image and timestep, beside a prediction with its
gradient. Against torch.func.jvp of the plain model and central differences.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dit_fast.errors import ConfigError
from dit_fast.models import DiT

CLOSE = 1e-12
OPTIONS: dict[str, dict[str, Any]] = {
    "adaln_zero": {},
    "adaln": {"conditioning": "adaln"},
    "cross_attention": {"conditioning": "cross_attention"},
    "in_context": {"conditioning": "in_context"},
    "trunk": {"positions": "rope", "qk_norm": True, "norm": "rmsnorm", "mlp": "swiglu"},
    "captions": {"conditioning": "cross_attention", "caption_dim": 7, "norm": "rmsnorm"},
    "captions in context": {"conditioning": "in_context", "caption_dim": 7, "positions": "sincos_rope"},
    # Heads of 12 columns, which no kernel takes.
    "unconditional": {"num_classes": 0, "positions": "learned", "hidden_size": 36, "qk_norm": True},
}
Batch = tuple[Tensor, Tensor, Tensor]


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def model_of(**options: Any) -> DiT:
    """A float64 model of which no parameter is zero."""
    sizes = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 3, "num_classes": 5} | options
    torch.manual_seed(0)
    model = DiT(**sizes, class_dropout_prob=0.0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(model: DiT) -> tuple[Batch, tuple[Tensor, Tensor]]:
    """Inputs and a direction of image and timestep."""
    y = torch.tensor([0, 3, 4])
    if model.caption_dim:
        y = draw(3, 4, model.caption_dim, seed=2)
        y[1, 2:] = 0
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    return (draw(3, 4, 8, 8), t, y), (draw(3, 4, 8, 8, seed=1), draw(3, seed=1))


def gradients(model: DiT, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (out * draw(*out.shape, seed=3)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: whole(gradient) for name, gradient in found.items() if gradient is not None}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def expected(
    model: DiT, inputs: Batch, along: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Prediction, derivative and gradients of the plain model."""
    kernels, model.kernels = model.kernels, "reference"
    recompute, model.recompute = model.recompute, "none"
    x, t, y = inputs
    out, derivative = torch.func.jvp(lambda x, t: model(x, t, y), (x, t), along)
    grads = gradients(model, model(*inputs))
    model.kernels, model.recompute = kernels, recompute
    return out, derivative, grads


def assert_equal(
    found: tuple[Tensor, Tensor], grads: dict[str, Tensor], wanted: tuple[Tensor, Tensor, dict[str, Tensor]]
) -> None:
    out, derivative, exact = wanted
    assert not found[1].requires_grad
    assert (found[0] - out).abs().max() <= CLOSE * out.abs().max()
    assert (found[1] - derivative).abs().max() <= CLOSE * derivative.abs().max()
    assert grads.keys() == exact.keys()
    for name, gradient in grads.items():
        assert (gradient - exact[name]).abs().max() <= CLOSE * max(1.0, exact[name].abs().max().item()), name


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(options: dict[str, Any], kernels: str) -> None:
    model = model_of(**options, kernels=kernels)
    inputs, along = batch(model)
    found = model(*inputs, tangents=along)
    assert_equal(found, gradients(model, found[0]), expected(model, inputs, along))
    (x, t, y), (x_t, t_t), step = inputs, along, 1e-5
    with torch.no_grad():
        ahead, behind = (model(x + s * x_t, t + s * t_t, y) for s in (step, -step))
    differences = (ahead - behind) / (2 * step)
    assert (found[1] - differences).abs().max() <= 1e-6 * differences.abs().max()


@pytest.mark.parametrize("constant", [0, 1])
def test_one_direction_alone(constant: int) -> None:
    model = model_of(kernels="triton")
    inputs, along = batch(model)
    told: list[Tensor | None] = [*along]
    told[constant] = None
    still = tuple(torch.zeros_like(x) if index == constant else x for index, x in enumerate(along))
    found = model(*inputs, tangents=tuple(told))
    assert_equal(found, gradients(model, found[0]), expected(model, inputs, still))


@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_recomputation(recompute: str, kernels: str) -> None:
    model = model_of(kernels=kernels, recompute=recompute)
    inputs, along = batch(model)
    found = model(*inputs, tangents=along)
    assert_equal(found, gradients(model, found[0]), expected(model, inputs, along))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("adaln_zero", "none"),
        pytest.param("adaln_zero", "cheap", marks=pytest.mark.nightly),
        pytest.param("adaln_zero", "blocks", marks=pytest.mark.nightly),
        *(pytest.param(name, "none", marks=pytest.mark.nightly) for name in OPTIONS if name != "adaln_zero"),
    ],
)
def test_one_graph(name: str, recompute: str) -> None:
    torch._dynamo.reset()
    model = model_of(**OPTIONS[name], depth=1, kernels="triton", recompute=recompute)
    inputs, along = batch(model)
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs, tangents=along)
    assert_equal(found, gradients(model, found[0]), expected(model, inputs, along))
    torch._dynamo.reset()


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_sharded(one_rank: None, recompute: str) -> None:
    """The hooks of `fully_shard` see plain tensors: they have no forward-mode derivative."""
    model = model_of(kernels="triton", recompute=recompute)
    inputs, along = batch(model)
    wanted = expected(model, inputs, along)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = model(*inputs, tangents=along)
    assert_equal(found, gradients(model, found[0]), wanted)


def test_hooks_see_dual_tensors() -> None:
    """What a hook computes has a derivative too."""
    model = model_of(kernels="triton")
    inputs, along = batch(model)
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: output * output.square().mean())
    found = model(*inputs, tangents=along)
    assert_equal(found, gradients(model, found[0]), expected(model, inputs, along))


def test_autocast() -> None:
    """In low precision the derivative is as far off as the prediction is."""
    model = model_of(kernels="triton").float()
    inputs, along = batch(model)
    x, t, y = inputs
    wide = model(x.float(), t.float(), y, tangents=(along[0].float(), along[1].float()))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x.float(), t.float(), y, tangents=(along[0].float(), along[1].float()))
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(low, wide, strict=True)]
    assert all(0 < error < 16 * torch.finfo(torch.bfloat16).eps for error in errors), errors
    assert gradients(model, low[0].double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t: (None, None), r"tangents=\(None, None\) is no direction"),
        (lambda x, t: (x[:, :1], t), r"the tangent of x is \(3, 1, 8, 8\).*give it like x"),
        (lambda x, t: (x.float(), t), r"the tangent of x is .*float32.*give it like x"),
        (lambda x, t: (x, t[:2]), r"the tangent of t is \(2,\).*give it like t"),
    ],
)
def test_directions_that_do_not_fit(change: Any, message: str) -> None:
    model = model_of()
    inputs, along = batch(model)
    with pytest.raises(ConfigError, match=message):
        model(*inputs, tangents=change(*along))


def test_whole_timesteps_have_no_direction() -> None:
    model = model_of()
    (x, _, y), along = batch(model)
    with pytest.raises(ConfigError, match=r"t is torch.int64: give fractions where it has a tangent"):
        model(x, torch.tensor([1, 2, 3]), y, tangents=along)
    assert math.isfinite(model(x, torch.tensor([1, 2, 3]), y, tangents=(along[0], None))[1].sum())
