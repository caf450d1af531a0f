"""AdamWEma against torch.optim.AdamW, clip_grad_norm_ and a separate average; state dicts; shards of two processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dit_fast.errors import ConfigError
from dit_fast.training.optimizer import AdamWEma, TorchAdamWEma, make_optimizer
from tests.tolerance import FEW, assert_close, rounding

STEPS = 20


def model(dtype: torch.dtype = torch.float64, width: int = 24) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, width), nn.GELU(), nn.Linear(width, 3)).to(dtype)


def gradients(module: nn.Module, steps: int = STEPS, seed: int = 1) -> Iterator[list[Tensor]]:
    """The same gradients in any dtype: drawn in float64, large enough in some steps that they are clipped."""
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        scale = (0.01, 1.0, 10.0)[step % 3]
        yield [
            (scale * torch.randn(p.shape, generator=draw, dtype=torch.float64)).to(p.dtype)
            for p in module.parameters()
        ]


def give(module: nn.Module, grads: list[Tensor]) -> None:
    for p, grad in zip(module.parameters(), grads, strict=True):
        p.grad = grad


def torchs(module: nn.Module, options: dict, max_norm: float | None, decay: float) -> list[Tensor]:
    """Train `module` with PyTorch's AdamW and clip_grad_norm_; returns ema = decay * ema + (1 - decay) * p."""
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False, **options)
    averages = [p.detach().clone() for p in module.parameters()]
    for grads in gradients(module):
        give(module, grads)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        optimizer.step()
        averages = [
            decay * ema + (1 - decay) * p.detach()
            for ema, p in zip(averages, module.parameters(), strict=True)
        ]
    return averages


def ours(module: nn.Module, **options) -> AdamWEma:
    optimizer = AdamWEma(module.parameters(), **options)
    if optimizer.low_precision_copy is not None:
        for p in module.parameters():
            optimizer.copy(p)
    for grads in gradients(module):
        give(module, grads)
        optimizer.step()
    return optimizer


def distance(tensors, others) -> float:
    return max(
        (a.detach().double() - b.detach().double()).abs().max().item()
        for a, b in zip(tensors, others, strict=True)
    )


OPTIONS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("options", [{"lr": 1e-3, "weight_decay": 0}, OPTIONS], ids=["dit", "decay"])
def test_twenty_steps_in_float64(options, max_norm) -> None:
    plain, fused = model(), model()
    averages = torchs(plain, options, max_norm, 0.9)
    optimizer = ours(
        fused, **options, max_grad_norm=max_norm, ema_decay=0.9, low_precision_copy=torch.bfloat16
    )
    assert_close([*plain.parameters()], [*fused.parameters()])
    assert_close(averages, [optimizer.average(p) for p in fused.parameters()])
    assert all(torch.equal(optimizer.copy(p), p.detach().bfloat16()) for p in fused.parameters())
    assert all(float(optimizer.state[p]["step"]) == STEPS for p in fused.parameters())


def test_float32_is_as_accurate_as_torch() -> None:
    exact, plain, fused = model(), model(torch.float32), model(torch.float32)
    averages = torchs(exact, OPTIONS, 1.0, 0.9)
    torch_averages = torchs(plain, OPTIONS, 1.0, 0.9)
    optimizer = ours(fused, **OPTIONS, max_grad_norm=1.0, ema_decay=0.9)
    for got, same, want in (
        (fused.parameters(), plain.parameters(), exact.parameters()),
        ([optimizer.average(p) for p in fused.parameters()], torch_averages, averages),
    ):
        want = list(want)
        assert distance(got, want) <= 2 * distance(same, want)


def test_clipping_leaves_the_gradients_and_grad_norm_is_the_norm() -> None:
    module = model()
    optimizer = AdamWEma(module.parameters(), max_grad_norm=0.5)
    grads = next(gradients(module))
    give(module, [10 * grad for grad in grads])
    expected = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])
    assert_close(optimizer.grad_norm(), expected.item())
    optimizer.step()
    assert all(torch.equal(p.grad, 10 * grad) for p, grad in zip(module.parameters(), grads, strict=True))


def test_a_norm_taken_before_zero_grad_is_not_used() -> None:
    modules = [model(), model()]
    for early, module in zip((True, False), modules, strict=True):
        optimizer = AdamWEma(module.parameters(), max_grad_norm=0.5)
        first, second = gradients(module, 2)
        if early:
            give(module, first)
            optimizer.grad_norm()
            optimizer.zero_grad()
        give(module, second)
        optimizer.step()
    assert distance(modules[0].parameters(), modules[1].parameters()) == 0


@pytest.mark.parametrize("name", ["adamw_ema", "torch"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_the_training_loops_optimizers_are_the_plain_recipe(name, max_norm) -> None:
    """d = min(0.9, (1 + t) / (10 + t)), written out; a void step changes neither weights nor averages."""
    plain, module = model(torch.float32), model(torch.float32)
    rate = torch.zeros((), dtype=torch.float64 if name == "adamw_ema" else torch.float32)
    options = {"betas": (0.8, 0.95), "weight_decay": 0.1, "ema_decay": 0.9, "max_grad_norm": max_norm}
    optimizer = make_optimizer(name, module.parameters(), lr=rate, **options)
    assert isinstance(optimizer, AdamWEma if name == "adamw_ema" else TorchAdamWEma)
    reference = torch.optim.AdamW(plain.parameters(), lr=3e-3, betas=(0.8, 0.95), weight_decay=0.1)
    averages, made = [p.detach().clone() for p in plain.parameters()], 0
    for step, grads in enumerate(gradients(module)):
        rate.fill_(3e-3)
        give(module, [grad.clone() for grad in grads])
        expected = torch.nn.utils.get_total_norm(grads)
        assert_close(optimizer.grad_norm(), expected)
        # Near the end, since an average forgets within a few steps.
        optimizer.found_inf = torch.tensor(float(step == STEPS - 2))
        optimizer.step()
        if step == STEPS - 2:
            continue
        made += 1
        give(plain, grads)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        reference.step()
        decay = min(0.9, (1 + made) / (10 + made))
        averages = [
            decay * ema + (1 - decay) * p.detach()
            for ema, p in zip(averages, plain.parameters(), strict=True)
        ]
    assert_close([*plain.parameters()], [*module.parameters()])
    assert_close(averages, [optimizer.average(p) for p in module.parameters()])
    assert {float(state["step"]) for state in optimizer.state.values()} == {made}


def test_found_inf_changes_nothing() -> None:
    module = model(torch.float32)
    optimizer = ours(module, ema_decay=0.5, low_precision_copy=torch.float16, max_grad_norm=1.0)
    held = [value.clone() for state in optimizer.state.values() for value in state.values()]
    weights = [p.detach().clone() for p in module.parameters()]
    give(module, [torch.full_like(p, float("nan")) for p in module.parameters()])
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert distance(weights, module.parameters()) == 0
    assert distance(held, [value for state in optimizer.state.values() for value in state.values()]) == 0
    assert all(torch.equal(optimizer.copy(p), p.detach().half()) for p in module.parameters())
    optimizer.found_inf = torch.zeros(())
    give(module, next(gradients(module)))
    optimizer.step()
    assert all(float(state["step"]) == STEPS + 1 for state in optimizer.state.values())


def test_a_parameter_without_gradient_stays_and_its_step_too() -> None:
    plain, fused = model(), model()
    torch_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0, foreach=False)
    optimizer = AdamWEma(fused.parameters(), lr=1e-2)
    for step, grads in enumerate(gradients(plain)):
        for module, each in ((plain, torch_optimizer), (fused, optimizer)):
            give(module, [grad.clone() for grad in grads])
            if step % 4 == 1:
                module[2].bias.grad = None
            each.step()
    assert_close([*plain.parameters()], [*fused.parameters()])
    assert float(optimizer.state[fused[2].bias]["step"]) == 15


def test_groups_learning_rates_and_schedulers() -> None:
    """Two groups with options of their own; a float and a tensor learning rate follow a scheduler alike."""
    results = []
    for kind in ("torch", "float", "tensor"):
        module = model()
        lr: float | Tensor = torch.tensor(1e-2, dtype=torch.float64) if kind == "tensor" else 1e-2
        groups = [
            {"params": module[0].parameters(), "lr": lr},
            {"params": module[2].parameters(), "lr": 1e-3, "weight_decay": 0.2, "betas": (0.5, 0.9)},
        ]
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, weight_decay=0, foreach=False)
            if kind == "torch"
            else AdamWEma(groups, max_grad_norm=1.0)
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for grads in gradients(module, 6):
            give(module, grads)
            if kind == "torch":
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        results.append(list(module.parameters()))
    assert_close(results[0], results[1])
    assert_close(results[1], results[2])


@pytest.mark.parametrize(
    "implementation", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"]
)
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_state_dicts_are_interchangeable(direction, implementation) -> None:
    """Ten steps with one optimiser and ten with the other are twenty with torch's."""
    kinds: list[Callable] = [
        lambda p: torch.optim.AdamW(p, **OPTIONS, **implementation),
        lambda p: AdamWEma(p, **OPTIONS, ema_decay=0.9),
    ]
    plain, mixed = model(), model()
    torchs(plain, OPTIONS, None, 0.9)
    first, second = kinds if direction == "from torch" else kinds[::-1]
    optimizer, steps = first(mixed.parameters()), gradients(mixed)
    for step, grads in enumerate(steps):
        if step == STEPS // 2:
            state = optimizer.state_dict()
            optimizer = second(mixed.parameters())
            optimizer.load_state_dict(state)
        give(mixed, grads)
        optimizer.step()
    assert_close([*plain.parameters()], [*mixed.parameters()])


def test_resumed_run_is_the_uninterrupted_one_to_the_bit() -> None:
    whole, resumed = model(torch.float32), model(torch.float32)
    options = {"ema_decay": 0.9, "max_grad_norm": 1.0, "lr": 1e-2}
    optimizer = ours(whole, **options)
    other = AdamWEma(resumed.parameters(), **options)
    for step, grads in enumerate(gradients(resumed)):
        if step == 7:
            state = other.state_dict()
            other = AdamWEma(resumed.parameters(), **options)
            other.load_state_dict(state)
        give(resumed, grads)
        other.step()
    assert distance(whole.parameters(), resumed.parameters()) == 0
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(optimizer.average(a), other.average(b)) for a, b in pairs)


def test_state_that_is_replaced_is_used() -> None:
    """The training loop puts tensors of a checkpoint into `state`, all steps perhaps one tensor."""
    plain, fused = model(), model()
    torchs(plain, OPTIONS, None, 0.9)
    optimizer = AdamWEma(fused.parameters(), **OPTIONS)
    for step, grads in enumerate(gradients(fused)):
        if step == 5:
            shared = torch.tensor(5.0)
            for p in fused.parameters():
                former = optimizer.state[p]
                moments = {name: former[name].clone() for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": shared, **moments}
                for tensor in former.values():
                    tensor.fill_(float("nan"))
        give(fused, grads)
        optimizer.step()
    assert_close([*plain.parameters()], [*fused.parameters()])


def test_copies_follow_a_loaded_model() -> None:
    module = model(torch.float32)
    optimizer = ours(module, low_precision_copy=torch.bfloat16)
    module.load_state_dict(model(torch.float32).state_dict())
    optimizer.refresh_copies()
    assert all(torch.equal(optimizer.copy(p), p.detach().bfloat16()) for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0: expected a number from 0"),
        ({"lr": float("nan")}, "lr=nan: expected"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): expected two numbers"),
        ({"eps": -1e-8}, "eps=-1e-08: expected"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: expected"),
        ({"ema_decay": 1.5}, "ema_decay=1.5: expected"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: expected"),
        ({"low_precision_copy": torch.float64}, "low_precision_copy=torch.float64: expected"),
        ({"kernels": "cuda"}, "kernels='cuda': choose one of"),
    ],
)
def test_options_that_cannot_work(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamWEma(model().parameters(), **options)


def test_parameters_and_states_that_cannot_work() -> None:
    with pytest.raises(
        ConfigError, match=r"parameter 0 of group 0 is torch.bfloat16: expected float32 or float64"
    ):
        AdamWEma(model(torch.bfloat16).parameters())
    module = model()
    amsgrad = torch.optim.AdamW(module.parameters(), amsgrad=True)
    with pytest.raises(ConfigError, match="the state dict belongs to an AdamW with amsgrad=True"):
        AdamWEma(module.parameters()).load_state_dict(amsgrad.state_dict())
    with pytest.raises(ConfigError, match="keeps no average"):
        AdamWEma(module.parameters()).average(module[0].weight)
    gaps = nn.Parameter(torch.zeros(4, 6)[:, :3])
    gaps.grad = torch.zeros(4, 3)
    optimizer = AdamWEma([gaps])
    with pytest.raises(ConfigError, match=r"params\[0\] is torch.float32 \(4, 3\) with strides .* no gaps"):
        optimizer.step()


@dataclass(frozen=True)
class Case:
    """A model `width` wide on a mesh; how far its shards may be from the whole."""

    width: int
    dtype: torch.dtype
    max_norm: float | None = None
    tolerance: float = 0.0
    mesh: tuple[int, ...] = (2,)


CASES = (
    Case(32, torch.float32),
    # 27 rows do not divide by two, and one row leaves the second process nothing. PyTorch's fused AdamW for the CPU
    # rounds the elements behind its last whole vector otherwise, and those are others in a shard.
    Case(27, torch.float64, tolerance=rounding(FEW, torch.float64)),
    Case(1, torch.float64, tolerance=rounding(FEW, torch.float64)),
    # The norm is summed in another order.
    Case(27, torch.float32, max_norm=0.5, tolerance=rounding()),
    # Replicas, not shards, whose sums must not be added.
    Case(27, torch.float32, max_norm=0.5, tolerance=rounding(), mesh=(2, 1)),
)


def compare(case: Case) -> None:
    """A sharded model beside a whole one on the same batches, in one of two processes."""
    names = ("replicate", "shard")[-len(case.mesh) :]
    options = {
        "lr": 1e-2, "ema_decay": 0.9, "max_grad_norm": case.max_norm, "low_precision_copy": torch.bfloat16,
    }  # fmt: skip
    whole, sharded = model(case.dtype, case.width), model(case.dtype, case.width)
    fully_shard(sharded, mesh=init_device_mesh("cpu", case.mesh, mesh_dim_names=names))
    optimizer, other = AdamWEma(whole.parameters(), **options), AdamWEma(sharded.parameters(), **options)
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        optimizer.copy(p)
        other.copy(q)
    draw = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = torch.randn(8, 10, generator=draw, dtype=torch.float64).to(case.dtype)
        for module, each in ((whole, optimizer), (sharded, other)):
            each.zero_grad()
            # The mean over ranks of equal gradients is that gradient, to the bit.
            (100 * module(x).square().mean()).backward()
        norm, sharded_norm = optimizer.grad_norm(), other.grad_norm()
        assert_close(sharded_norm, norm)
        assert case.max_norm is None or norm > case.max_norm
        optimizer.step()
        other.step()
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert isinstance(other.average(q), DTensor)
        for mine, full in (
            (p.detach(), q.full_tensor().detach()),
            (optimizer.average(p), other.average(q).full_tensor()),
            (optimizer.copy(p), other.copy(q).full_tensor()),
            (optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"].full_tensor()),
            (optimizer.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"].full_tensor()),
        ):
            assert mine.shape == full.shape
            limit = case.tolerance if mine.dtype == case.dtype or case.tolerance == 0 else 1e-2
            error = (mine - full).abs().max() / max(1.0, mine.abs().max().item())
            assert error <= limit, f"{case}: {tuple(p.shape)} differs by {error}"


def run_cases(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for case in CASES:
        compare(case)
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path) -> None:
    """fully_shard: parameters, moments, averages and copies are those of one process."""
    mp.spawn(run_cases, args=(str(tmp_path / "rendezvous"),), nprocs=2)
