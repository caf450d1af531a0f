"""torch.compile of the whole model in one graph: same numbers as eager, no graph for every batch size."""

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from dit_fast.model.layers import is_plain
from dit_fast.models import DiT
from tests.golden import GOLDEN, golden_model, seeded
from tests.model.test_dit import assert_same_gradients
from tests.tolerance import assert_close

MODES = ("reference", "triton")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler on the CPU"
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tensor([0, 17, 500, 999, 3])[:size]
    return seeded("compiled", 5, 4, 8, 8)[:size], t, torch.tensor([0, 1, 2, 4, 9])[:size]


def run(model: nn.Module, size: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients by the name of the uncompiled parameter."""
    model.zero_grad()
    out = model(*batch(size))
    (out * seeded("weights", 5, 8, 8, 8)[:size]).sum().backward()
    parameters = {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters()}
    return out.detach(), {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def assert_equal_to_eager(compiled: nn.Module, eager: DiT, size: int = 4) -> None:
    (out, grads), (expected, expected_grads) = run(compiled, size), run(eager, size)
    assert_close(out, expected)
    assert_same_gradients(grads, expected_grads)


@pytest.mark.parametrize("mode", MODES)
def test_one_graph_equals_eager(mode: str) -> None:
    model = golden_model(kernels=mode)
    assert_equal_to_eager(torch.compile(model, backend="aot_eager", fullgraph=True), model)


def test_layers_are_plain_to_the_compiler_too() -> None:
    """Else a compiled model would call its layers one by one, without any fused operation."""
    layers = nn.Linear(2, 2), nn.LayerNorm(2)

    def plain(x: Tensor) -> tuple[Tensor, list[bool]]:
        return x + 1, [is_plain(layer, type(layer)) for layer in layers]

    assert torch.compile(plain, backend="eager", fullgraph=True)(torch.ones(2))[1] == [True, True]


@pytest.mark.parametrize("mode", MODES)
def test_guidance_is_one_graph(mode: str) -> None:
    model = golden_model(kernels=mode)
    guided = torch.compile(model.forward_with_cfg, backend="aot_eager", fullgraph=True)
    out = guided(seeded("ax", 4, 4, 8, 8), torch.tensor([30, 40, 30, 40]), torch.tensor([1, 2, 10, 10]), 4.0)
    assert_close(out.detach(), torch.from_numpy(GOLDEN["a.cfg"]))


@pytest.mark.parametrize("mode", MODES)
def test_training_mode_with_label_dropout_is_one_graph(mode: str) -> None:
    model = golden_model(kernels=mode, class_dropout_prob=0.5).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(5)
    out = compiled(*batch(4))
    torch.manual_seed(5)
    assert_close(out, model(*batch(4)))


@pytest.mark.parametrize("mode", MODES)
def test_two_changes_of_batch_size_compile_one_more_graph(mode: str) -> None:
    """Batch 4 is compiled as it is, the change to 3 compiles for every size, and 5 finds that graph."""
    counter = CompileCounter()
    compiled = torch.compile(golden_model(kernels=mode), backend=counter, fullgraph=True)
    for size, graphs in ((4, 1), (3, 2), (5, 2)):
        compiled(*batch(size))
        assert counter.frame_count == graphs, f"batch of {size}"


@pytest.mark.parametrize("mode", MODES)
def test_batch_marked_dynamic_is_compiled_once(mode: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = golden_model(kernels=mode)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    inputs = batch(4)
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    compiled(*inputs).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (3, 5):
            assert_equal_to_eager(compiled, model, size)
    assert counter.frame_count == 1


@needs_compiler
def test_inductor_equals_eager_at_every_batch_size() -> None:
    """One graph for all batch sizes, so that the C++ compiler runs once; "auto" is the reference on a CPU."""
    model = golden_model()
    del model.blocks[1:]
    inputs = batch(4)
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    compiled = torch.compile(model, fullgraph=True)
    compiled(*inputs).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (4, 3, 5):
            assert_equal_to_eager(compiled, model, size)
