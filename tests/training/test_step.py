"""The step by itself: shares of a batch, rates, loss scale, what is left out, and that the host waits for nothing."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from dit_fast.data import ImageSet, Posterior, from_arrays
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import NonFiniteError
from dit_fast.kernels.launch import record_launches
from dit_fast.models import DiT
from dit_fast.training import TrainConfig, Trainer
from dit_fast.training.graphs import WARM_UP, GraphedStep, compile_step
from dit_fast.training.optimizer import AdamWEma, learning_rate
from dit_fast.training.precision import LossScale
from dit_fast.training.step import StepOptions, StepState, TrainStep
from dit_fast.utils import keyed
from tests.tolerance import assert_close, assert_trained_alike, rounding

TINY: dict[str, Any] = {
    "data": "set", "hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "batch_size": 8, "lr": 1e-2,
    "ema_decay": 0.9,
}  # fmt: skip


def image_set(count: int = 40) -> ImageSet:
    images = np.random.default_rng(0).integers(0, 255, (count, 8, 8), dtype=np.uint8)
    return from_arrays("set", images, np.arange(count) % 2, ["a", "b"])


def trainer(count: int = 40, **changes: Any) -> Trainer:
    return Trainer(TrainConfig(**{**TINY, **changes}), image_set(count))


def run(each: Trainer, steps: int) -> None:
    for step in range(each.step, each.step + steps):
        each.train_step(*each.stream.stored(step))


def weights(each: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in each.trained.values()])


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_four_micro_batches_of_64_are_one_batch_of_256():
    """The same draws and, to float32's rounding, the same gradients."""
    whole, cut = trainer(300, batch_size=256), trainer(300, batch_size=256, accumulate=4)
    before = weights(whole)
    for each in (whole, cut):
        run(each, 1)
    assert_close(list(whole.values()[0][:4]), list(cut.values()[0][:4]))
    grads = [torch.cat([p.grad.flatten() for p in each.trained.values()]) for each in (whole, cut)]
    assert_close(grads[1], grads[0])
    assert not torch.equal(weights(whole), before)


def test_ranks_that_share_a_batch_draw_what_one_process_draws():
    each = trainer()
    run(each, 3)
    images, labels = each.stream.stored(3)
    whole = each.work.draw(images, labels)
    for rows in (slice(0, 4), slice(4, 8)):
        part = TrainStep(
            each.denoiser, each.optimizer, each.objective, each.work.options, each.state,
            torch.arange(8)[rows],
        ).draw(*each.stream.stored(3, rows))  # fmt: skip
        assert all(torch.equal(a, b[rows]) for a, b in zip(part[:4], whole[:4], strict=True))
    assert each.drawn(4) == {"timesteps": whole[1].tolist()}
    assert each.sample_ids(4) == each.stream.split.members[each.stream.indices(3)].tolist()


def test_moments_become_samples_on_the_device_as_in_the_stream():
    posterior = Posterior("logvar", (0.5,), (2.0,))
    each = trainer()
    each.work.posterior = posterior
    each.state.step.fill_(7)
    moments = torch.randn(8, 2, 1, 8, 8)
    samples = each.work.draw(moments, torch.zeros(8, dtype=torch.int64))[0]
    noise = keyed.normal(keyed.key(0, "posterior"), torch.arange(56, 64), (1, 8, 8))
    assert torch.equal(samples, posterior.sample(moments, noise))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5]),
    ],
)
def test_rates(schedule, expected):
    options = {"lr": 0.1, "schedule": schedule, "warmup_steps": 4, "total_steps": 8}
    assert [learning_rate(step, **options) / 0.1 for step in range(8)] == pytest.approx(expected)
    assert learning_rate(8, **options) == pytest.approx(0.0 if schedule == "cosine" else 0.1, abs=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw_ema", "torch"])
def test_the_optimiser_takes_the_rate_of_its_step(optimizer):
    """Adam's first update of each weight is the rate itself, or a little less."""
    each = trainer(optimizer=optimizer, warmup_steps=10)
    before = weights(each)
    run(each, 1)
    assert float((weights(each) - before).abs().max()) == pytest.approx(1e-3, rel=1e-3)
    assert float(each.state.lr) == pytest.approx(1e-3)


def test_torchs_optimiser_trains_like_ours():
    runs = [trainer(optimizer=name, max_grad_norm=0.5, weight_decay=0.1) for name in ("adamw_ema", "torch")]
    for each in runs:
        run(each, 3)
    assert_trained_alike(runs[1].trained, runs[0].trained, 3 * TINY["lr"])
    assert_trained_alike(runs[1].ema_state(), runs[0].ema_state(), 3 * TINY["lr"])
    # Of weights that may lie as far apart as above.
    assert [v.grad_norm for v in runs[1].values()] == pytest.approx(
        [v.grad_norm for v in runs[0].values()], rel=100 * rounding()
    )


def test_the_loss_scale_is_torchs_grad_scalers():
    """The same scales over 6 steps of which two overflow, with steps that are made where it makes them."""
    gradients = [1.0, math.inf, 2.0, math.nan, 3.0, 4.0]
    ours, torchs = LossScale(torch.device("cpu")), torch.amp.GradScaler("cpu", growth_interval=2)
    ours.INTERVAL = 2
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    for value in gradients:
        torchs.scale(torch.zeros(()))
        p.grad = torch.full((3,), value) * torchs.get_scale()
        mine = p.grad.clone()
        torchs.step(optimizer)
        torchs.update()
        ours.unscale([mine])
        assert bool(ours.found_inf) == (not math.isfinite(value))
        assert math.isfinite(value) != bool(ours.found_inf)
        if math.isfinite(value):
            assert_close(mine, value, 1)
        ours.update()
        assert ours.scale.item() == torchs.get_scale()
    copy = LossScale(torch.device("cpu"))
    copy.restore(ours.state())
    assert copy.state() == ours.state()


def overflow_at(each: Trainer, steps: set[int]) -> None:
    """Make one weight's gradient infinite in these steps, counted from 1."""
    parameter = each.model.final_layer.linear.bias
    parameter.register_hook(lambda grad: grad * math.inf if each.step + 1 in steps else grad)


def test_float16_overflow_halves_the_scale_and_leaves_the_step_out():
    each, plain = trainer(precision="fp16"), trainer(precision="fp32")
    overflow_at(each, {2})
    for both in (each, plain):
        run(both, 1)
    assert weights(each).sub(weights(plain)).abs().max() < 1e-2
    before = weights(each)
    run(each, 1)
    assert torch.equal(weights(each), before)
    run(each, 1)
    assert not torch.equal(weights(each), before)
    values = each.values()
    assert [value.loss_scale for value in values] == [2**16, 2**16, 2**15]
    assert [value.applied for value in values] == [1, 0, 1]
    assert values[0].grad_norm == pytest.approx(plain.values()[0].grad_norm, rel=2e-2)
    assert (int(each.state.skipped), each.manifest()["updates"]) == (0, 2)


@pytest.mark.parametrize("at_once", [True, False])
def test_steps_that_are_not_finite_are_left_out_up_to_the_cap(at_once):
    each = trainer(skip_nonfinite=2)
    each.checks_every_step = at_once
    overflow_at(each, {2, 3, 5})
    run(each, 4)
    each.check_finite()
    assert [value.applied for value in each.values()] == [1, 0, 0, 1]
    assert (int(each.state.skipped), each.manifest()["updates"]) == (2, 2)
    before = weights(each)
    if not at_once:
        run(each, 1)
    with pytest.raises(
        NonFiniteError, match=r"step 5: .*after 2 such steps were skipped.*\(training samples "
    ):
        run(each, 1) if at_once else each.check_finite()
    assert torch.equal(weights(each), before)


def test_the_loss_by_timestep_is_that_of_its_samples():
    each = trainer(batch_size=16)
    losses: list[Tensor] = []
    sound = each.work.loss

    def listening(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        terms = sound(*args, **kwargs)
        losses.append(terms["loss"].detach())
        return terms

    each.work.loss = listening
    run(each, 1)
    value, times = each.values()[0], torch.tensor(each.drawn(1)["timesteps"])
    for bucket in range(4):
        inside = (times >= 250 * bucket) & (times < 250 * (bucket + 1))
        assert value.bucket_counts[bucket] == int(inside.sum())
        assert_close(value.bucket_sums[bucket], float(losses[0][inside].sum()), 16)
    assert_close(sum(value.bucket_sums) / 16, value.loss, 16)


WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2",
    "unique_consecutive", "allclose",
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for the device; counts what PyTorch launches in `launched`.

    A device that computes nothing stands for CUDA. Copies between it and the host wait unless they are asked not to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise AssertionError(f"the host waits for the device in aten.{name}")
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "_to_copy" and source is not None and "device" in kwargs:
            moved = (source.device.type == "cpu") != (torch.device(kwargs["device"]).type == "cpu")
            if moved and not kwargs.get("non_blocking"):
                raise AssertionError("the host waits for a copy between it and the device")
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach")):
            self.launched.append(name)
        return func(*args, **kwargs)


def step_on_no_device(depth: int, **options: Any) -> TrainStep:
    """A step of a DiT on the kernels, as on CUDA, on tensors that hold nothing."""
    device = torch.device("meta")
    with device:
        model = DiT(
            input_size=8, patch_size=2, hidden_size=64, depth=depth, num_heads=2, num_classes=5,
            kernels="triton", recompute="cheap",
        ).eval()  # fmt: skip
    state = StepState(device, 10, torch.float64)
    optimizer = AdamWEma(
        [p for p in model.parameters() if p.requires_grad],
        lr=state.lr, ema_decay=0.9999, ema_warmup=True, max_grad_norm=1.0, kernels="triton",
    )  # fmt: skip
    return TrainStep(
        model, optimizer, create_diffusion(""),
        StepOptions(seed=0, batch_size=4, num_classes=5, class_dropout_prob=0.1, **options),
        state, torch.arange(4, device=device),
    )  # fmt: skip


def launches_of(step: TrainStep) -> tuple[int, int]:
    """Launches of Triton and of PyTorch in a step that follows two others; fails where the host waits."""
    images = torch.empty(4, 4, 8, 8, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    with record_launches() as launches:
        for _ in range(2):
            step(images, labels)
        launches.clear()
        with NoWaiting() as watched:
            step(images, labels)
    return len(launches), len(watched.launched)


def test_a_step_waits_for_nothing_and_its_launches_are_counted():
    """AdamW, clipping and averaging are 3 launches, whatever the number of parameters."""
    step = step_on_no_device(depth=2)
    (kernels, plain), (more_kernels, more_plain) = launches_of(step), launches_of(step_on_no_device(depth=3))
    with record_launches() as launches:
        step.optimizer.grad_norm()
        step.optimizer.step()
    assert len(launches) == 3
    print(f"launches of a step: {kernels} Triton + {plain} PyTorch with 2 blocks; "
          f"{more_kernels - kernels} + {more_plain - plain} a block")  # fmt: skip
    assert 3 < kernels < more_kernels < 2 * kernels
    assert more_plain - plain < 60


@pytest.mark.nightly
def test_a_compiled_loss_is_a_tenth_of_the_launches():
    """Of the hybrid loss, forward and backward, by Inductor; the same loss, gradients to float32's rounding."""
    eager, compiled = (trainer(prediction="epsilon").work for _ in range(2))
    compile_step(compiled)
    x, noise = torch.randn(2, 4, 4, 8, 8)
    t, output = torch.tensor([0, 10, 500, 999]), torch.randn(4, 8, 8, 8, requires_grad=True)

    def gradient(step: TrainStep) -> tuple[float, Tensor]:
        loss = step.loss(output * 1.0, step.add_noise(x, t, noise))["loss"].mean()
        output.grad = None
        loss.backward()
        return loss.item(), output.grad

    with NoWaiting() as watched:
        eager.loss(output * 1.0, eager.add_noise(x, t, noise))["loss"].mean().backward()
    metrics.reset()
    found = gradient(compiled)
    print(f"launches of the loss: {len(watched.launched)}, compiled {metrics.generated_kernel_count}")
    assert metrics.generated_kernel_count < len(watched.launched) / 8
    expected = gradient(eager)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


@pytest.mark.parametrize("wait", ["item", "cpu", "tolist", "nonzero", "bool", "from_numpy"])
def test_a_step_that_waits_is_seen(wait):
    step = step_on_no_device(depth=1)
    decide = step._judge

    def waiting(loss: Tensor, norm: Tensor) -> Tensor:
        match wait:
            case "bool":
                assert loss > 0
            case "from_numpy":
                torch.from_numpy(np.zeros(3)).to("meta")
            case "tolist":
                norm.reshape(1).tolist()
            case _:
                getattr(loss, wait)()
        return decide(loss, norm)

    launches_of(step)
    step._judge = waiting  # type: ignore[method-assign]
    images = torch.empty(4, 4, 8, 8, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    with pytest.raises(AssertionError, match="the host waits"), record_launches(), NoWaiting():
        step(images, labels)


class FakeGraphs:
    """Records the work of a capture, which does nothing yet, and does it at each replay.

    `failures`: how many captures fail, for the reason `failure`.
    """

    def __init__(self, failure: str = "", failures: int = 0):
        self.failure, self.failures = failure, failures
        self.warmed = self.replayed = 0

    def warm_up(self, work: Any) -> None:
        self.warmed += 1
        work()

    def capture(self, work: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise RuntimeError(self.failure)

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_graphed_run_is_the_eager_one(failures, caplog):
    """Captured once after the warm-up, with gradients that each step writes, or that are kept and zeroed where those
    cannot be captured; or eager all along, saying why."""
    plain, graphed = trainer(accumulate=2, warmup_steps=9), trainer(accumulate=2, warmup_steps=9)
    backend = FakeGraphs("operation not permitted\nwhen capturing", failures)
    graphed.run_step = step = GraphedStep(graphed.work, backend)
    for number in range(12):
        for each in (plain, graphed):
            run(each, 1)
        assert torch.equal(weights(plain), weights(graphed)), number
    assert plain.values() == graphed.values()
    assert backend.warmed == (1 if failures == 0 else 2) * WARM_UP
    assert graphed.work.keep_gradients == (failures == 1)
    if failures < 2:
        eager = WARM_UP + failures * (1 + WARM_UP)
        assert (step.captures, backend.replayed, step.refused) == (1, 12 - eager, None)
        assert "could not be captured" not in caplog.text
    else:
        assert (step.captures, step.refused) == (0, "operation not permitted")
        assert caplog.text.count("could not be captured (operation not permitted)") == 1


def test_gradients_of_a_step_are_written_not_added_to_zeros():
    """Counted in what autograd runs: gradients that are kept cost an addition per parameter."""
    additions = []
    for kept in (False, True):
        each = trainer()
        each.work.keep_gradients = kept
        run(each, 2)
        images, labels = each.stream.stored(2)
        with torch.profiler.profile() as profile:
            each.train_step(images, labels)
        additions.append(sum(event.name == "aten::add_" for event in profile.events()))
    assert additions[1] - additions[0] == len(each.trained)


def test_each_shape_of_batches_has_a_graph_of_its_own():
    """Two shapes in turn, as of --buckets: two captures, the weights of eager steps."""
    plain, graphed = trainer(), trainer()
    backend = FakeGraphs()
    graphed.run_step = step = GraphedStep(graphed.work, backend)
    for number in range(2 * WARM_UP + 6):
        images, labels = plain.stream.stored(number)
        for each in (plain, graphed):
            each.train_step(images if number % 2 else images[..., :4], labels)
        assert torch.equal(weights(plain), weights(graphed)), number
    assert (step.captures, backend.warmed, backend.replayed) == (2, 2 * WARM_UP, 6)
    assert plain.values() == graphed.values()
