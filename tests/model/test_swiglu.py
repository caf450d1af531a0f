"""SwiGLU in a model: one operation with training epilogues stands for it, as for the GELU's MLP, wherever it may."""

import pytest
import torch
from torch import Tensor

from dit_fast.kernels.launch import record_launches
from dit_fast.model.cost import kept_bytes
from dit_fast.models import DiT
from tests.golden import CONFIG, golden_model, seeded
from tests.model.test_dit import Doubled, assert_same_gradients
from tests.tolerance import assert_close

T, Y = torch.tensor([0, 500, 999]), torch.tensor([1, 2, 4])


def swiglu_model(**options: str) -> DiT:
    return golden_model(mlp="swiglu", **options)


def images() -> Tensor:
    return seeded("swiglu", 3, 4, 8, 8)


def output_and_gradients(model: DiT) -> dict[str, Tensor]:
    out = model(images(), T, Y)
    model.zero_grad()
    (out * seeded("weights", *out.shape)).sum().backward()
    return {"out": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])
def test_outputs_and_gradients_are_those_of_the_module(recompute: str) -> None:
    expected = output_and_gradients(swiglu_model(kernels="reference"))
    found = output_and_gradients(swiglu_model(kernels="triton", recompute=recompute))
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_autocast(recompute: str) -> None:
    """As near to float32 as PyTorch's operations come under the same autocast."""
    exact = output_and_gradients(swiglu_model(kernels="reference"))
    with torch.autocast("cpu", torch.bfloat16):
        plain = output_and_gradients(swiglu_model(kernels="reference"))
        fused = output_and_gradients(swiglu_model(kernels="triton", recompute=recompute))
    for name, value in exact.items():
        error, allowed = ((found[name] - value).norm() / value.norm() for found in (fused, plain))
        assert fused[name].dtype == plain[name].dtype
        assert error <= 2 * allowed, name


def test_every_block_launches_it() -> None:
    """Recorded on the meta device: one pass forward and one backward a block, and no GELU."""
    with torch.device("meta"):
        model = DiT(**CONFIG, mlp="swiglu", kernels="triton")
    with record_launches() as launches:
        model(images().to("meta"), T.to("meta"), Y.to("meta")).sum().backward()
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert [names.count(f"_swiglu_{direction}_kernel") for direction in ("fwd", "bwd")] == [2, 2]
    assert not [name for name in names if "gelu" in name]


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("path", ["mlp", "mlp.w12", "mlp.w3"])
def test_hooks_inside_take_effect(path: str, pre: bool) -> None:
    model = swiglu_model(kernels="reference")
    without = model(images(), T, Y)
    for block in model.blocks:
        module = block.get_submodule(path)
        if pre:
            module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        else:
            module.register_forward_hook(lambda module, args, out: 2 * out)
    out = model(images(), T, Y)
    assert (out - without).abs().max() > 1e-3
    model.kernels = "triton"
    assert_close(model(images(), T, Y), out)


@pytest.mark.parametrize("name", ["w12", "w3"])
def test_another_layer_in_its_place_is_called(name: str) -> None:
    model = swiglu_model(kernels="triton")
    plain = model(images(), T, Y)
    for block in model.blocks:
        block.mlp.get_submodule(name).__class__ = Doubled
    fused = model(images(), T, Y)
    model.kernels = "reference"
    assert (fused - plain).abs().max() > 1e-3
    assert_close(fused, model(images(), T, Y))


def test_what_cheap_recomputation_does_not_keep() -> None:
    """Of every block two norm outputs and the activation, an SwiGLU's being two thirds of the GELU's."""
    model = swiglu_model()
    tokens, width, hidden = 4 * 16, 64, model.blocks[0].mlp.w3.in_features
    kept = kept_bytes(model.config, 4, precision="fp32")
    assert hidden == 176
    assert kept["none"] - kept["cheap"] == CONFIG["depth"] * 4 * tokens * (2 * width + hidden)


def test_the_epilogue_that_it_has_may_be_named() -> None:
    model = swiglu_model(kernels="triton", mlp_epilogue="separate")
    assert torch.equal(model(images(), T, Y), swiglu_model(kernels="triton")(images(), T, Y))
