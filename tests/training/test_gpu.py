"""The step on a GPU: nothing waits for it, a graphed step is the eager one, batches arrive, bf16 stays near float32."""

from typing import Any

import pytest
import torch

from dit_fast.training.graphs import WARM_UP, GraphedStep
from dit_fast.training.run import prefetch
from tests.tolerance import FEW, assert_close
from tests.training.test_step import run, trainer, weights

pytestmark = pytest.mark.gpu
CUDA: dict[str, Any] = {
    "device": "cuda",
    "precision": "bf16",
    "hidden_size": 64,
    "depth": 2,
    "max_grad_norm": 1.0,
}


@pytest.mark.parametrize("optimizer", ["adamw_ema", "torch"])
def test_a_step_does_not_wait_for_the_device(optimizer):
    """PyTorch raises at each wait that it knows of; a value that is read is one."""
    each = trainer(optimizer=optimizer, **CUDA)
    run(each, 2)
    batches = prefetch(each.stream.read(2, 5), each.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for samples, labels in batches:
            each.train_step(samples, labels)
        with pytest.raises(RuntimeError, match="synchroniz"):
            each.state.step.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(each.values()) == 5


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2, "lr_schedule": "cosine", "steps": 9, "warmup_steps": 3}]
)
def test_a_graphed_run_is_the_eager_one(options):
    """To the bit: the same kernels in the same order."""
    plain, graphed = trainer(**CUDA, **options), trainer(**CUDA, **options, cuda_graph=True)
    for each in (plain, graphed):
        run(each, WARM_UP + 5)
    assert isinstance(graphed.run_step, GraphedStep)
    assert (graphed.run_step.captures, graphed.run_step.refused) == (1, None)
    assert torch.equal(weights(plain), weights(graphed))
    assert plain.values() == graphed.values()


def test_a_graph_for_each_shape_replayed_in_any_order():
    """As of --buckets: three shapes, whose graphs share their memory, in an order that is not that of their capture."""
    plain, graphed = trainer(**CUDA), trainer(**CUDA, cuda_graph=True)
    order = [n for n in range(3) for _ in range(WARM_UP + 1)] + [2, 0, 1, 1, 0, 2, 0]
    for number, shape in enumerate(order):
        images, labels = plain.stream.stored(number)
        for each in (plain, graphed):
            each.train_step((images, images[..., :4], images[..., :4, :])[shape], labels)
    assert isinstance(graphed.run_step, GraphedStep)
    assert (graphed.run_step.captures, graphed.run_step.refused) == (3, None)
    assert torch.equal(weights(plain), weights(graphed))
    assert plain.values() == graphed.values()


def test_prefetched_batches_are_those_of_the_stream():
    each = trainer(**CUDA)
    for step, (images, labels) in enumerate(prefetch(each.stream.read(0, 8), each.device)):
        assert images.is_cuda
        assert torch.equal(images.cpu(), each.stream.batch(step)[0])
        assert torch.equal(labels.cpu(), each.stream.batch(step)[1])
    assert step == 7


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_losses_stay_near_those_of_float32(precision):
    low, full = trainer(**{**CUDA, "precision": precision}), trainer(**{**CUDA, "precision": "fp32"})
    for each in (low, full):
        run(each, 5)
    pairs = zip(low.values(), full.values(), strict=True)
    assert all(a.loss == pytest.approx(b.loss, rel=2e-2) for a, b in pairs)


def test_draws_are_those_of_the_cpu():
    there, here = trainer(**CUDA), trainer(hidden_size=64, depth=2)
    images, labels = here.stream.stored(0)
    drawn = [each.work.draw(images.to(each.device), labels.to(each.device)) for each in (there, here)]
    assert torch.equal(drawn[0][1].cpu(), drawn[1][1])
    assert torch.equal(drawn[0][3].cpu(), drawn[1][3])
    # No sums: logarithm, root and cosine of two libraries.
    assert_close(drawn[0][2].cpu(), drawn[1][2], FEW)
