"""Captured trajectories on the CPU: a stub that records every ATen call and replays it into the same memory.

As a CUDA graph does, it reads what lies in the memory that was captured and overwrites the tensors of its last run.
"""

from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_fast.diffusion import create_diffusion
from dit_fast.models import DiT
from dit_fast.sampling import SOLVERS, Guidance, Sampler, SamplerConfig, classifier_cond_fn, flow_schedule
from dit_fast.sampling.schedule import VELOCITY_SOLVERS
from dit_fast.sampling.trajectory import TrajectoryCache
from tests.small_models import small_model as build
from tests.tolerance import assert_close


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Recording(TorchDispatchMode):
    """Calls with the tensors that they read and made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            memory = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
            for old, new in zip(tensors(made), tensors(func(*args, **kwargs)), strict=True):
                # A view of an argument is there already; what was made anew goes where it was then.
                if old.untyped_storage().data_ptr() not in memory:
                    old.copy_(new)


class FakeGraphs:
    """Captures on any device; `fails` is raised in place of the n-th capture."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.captures, self.fails = 0, fails

    def unavailable(self, device):
        return None

    def pool(self):
        return object()

    def capture(self, run, pool):
        self.captures += 1
        if self.fails is not None:
            raise self.fails
        with Recording() as recording:
            run()
        return recording.replay


small_model = partial(build, input_size=4, hidden_size=16, depth=2, num_classes=9)


@pytest.fixture
def model() -> DiT:
    return small_model()


def process_of(solver: str, steps: str):
    flow = solver.startswith("sde") or solver in VELOCITY_SOLVERS
    return flow_schedule(int(steps), start=0.1) if flow else create_diffusion(steps)


def pair(model, steps="5", config=None, **options) -> tuple[Sampler, Sampler]:
    """A sampler that captures and one that does not."""
    config = config or SamplerConfig(**options)
    process = process_of(config.solver, steps)
    graph = Sampler(model, process, config, graphs=FakeGraphs())
    return graph, Sampler(model, graph.schedule, replace(config, graph="never"))


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver != "dopri5"])
@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_replays_are_the_eager_trajectory_for_other_labels_seeds_and_numbers(model, solver, mode):
    graph, eager = pair(model, solver=solver, eta=0.3, mode=mode, guidance=Guidance(2.0, interval=(0.2, 0.9)))
    for labels, seed in (([1, 2], 0), ([3, 8], 5), ([0, 1], 5)):
        numbers = torch.tensor([seed, seed + 7])
        drawn = graph(labels, seed=seed, numbers=numbers)
        assert graph.eager_reason is None
        assert torch.equal(drawn, eager(labels, seed=seed, numbers=numbers))
    assert graph.trajectories.captures == graph.graphs.captures == 1


def test_what_the_caller_keeps_is_never_overwritten(model):
    """Results and previews are clones: later replays of the same graph leave them alone."""
    graph, eager = pair(model)
    seen = []
    first = graph([1, 2], on_step=seen.append, every=2)
    kept = [first.clone(), *(step.state.clone() for step in seen)]
    graph([3, 4], seed=1, on_step=lambda step: None, every=2)
    for tensor, copy in zip([first, *(step.state for step in seen)], kept, strict=True):
        assert torch.equal(tensor, copy)
    outputs = [
        state for trajectory in graph.trajectories._trajectories.values() for _, state in trajectory.replays
    ]
    memory = {state.untyped_storage().data_ptr() for state in outputs}
    assert memory.isdisjoint(t.untyped_storage().data_ptr() for t in [first, *(s.state for s in seen)])
    assert torch.equal(first, eager([1, 2], on_step=lambda step: None, every=2))


@pytest.mark.parametrize("budget", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("solver", ["ddpm", "straight-heun", "unipc", "rk4"])
def test_segments_of_any_length_give_the_same_samples(model, solver, budget):
    graph, eager = pair(model, "7", solver=solver, table_bytes=budget)
    whole = Sampler(model, graph.schedule, replace(eager.config, table_bytes=1 << 30))([1, 2, 3])
    drawn = eager([1, 2, 3])
    # The products that make the table have other numbers of rows: they may round otherwise.
    assert_close(drawn, whole)
    assert torch.equal(graph([1, 2, 3]), drawn)
    assert torch.equal(graph([1, 2, 3]), drawn)
    lengths = {1: 7, 20_000: 2, 1 << 30: 1}
    assert graph.graphs.captures >= lengths[budget]


def test_another_key_is_another_capture_and_an_old_key_is_not(model):
    graph, eager = pair(model)
    base = graph.config

    def captures(labels=(1, 2), **change) -> int:
        before = graph.trajectories.captures
        graph.config = replace(base, **change)
        eager.config, eager.schedule = replace(graph.config, graph="never"), graph.schedule
        assert torch.equal(graph(list(labels)), eager(list(labels)))
        return graph.trajectories.captures - before

    assert captures() == 1
    assert captures((7, 8)) == 0, "other labels"
    assert captures((1, 1)) == 1, "one row of the table in place of two"
    assert captures((1, 2, 3)) == 1, "batch"
    assert captures(guidance=Guidance(2.0)) == 1
    assert captures() == 0, "still there"
    assert captures(solver="ddim") == 1
    assert captures(clip=True) == 1
    schedule = graph.schedule
    graph.schedule = Sampler(model, create_diffusion("6")).schedule
    assert captures() == 1, "steps"
    graph.schedule = schedule
    assert captures((1, 2), precision="bf16") == 1


def test_weights_in_place_are_followed_and_moved_ones_captured_again(model):
    graph, eager = pair(model)
    before = graph([1, 2])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(graph([1, 2]), eager([1, 2]))
    assert (graph([1, 2]) - before).abs().max() > 1e-3
    assert graph.trajectories.captures == 1
    model.load_state_dict(small_model(1).state_dict(), assign=True)
    assert torch.equal(graph([1, 2]), eager([1, 2]))
    assert graph.trajectories.captures == 2


def test_a_cast_copy_follows_the_model_s_weights(model):
    graph, eager = pair(model, precision="bf16")
    before = graph([1, 2])
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(3)
    after = graph([1, 2])
    assert (after - before).abs().max() > 1e-2
    assert torch.equal(after, eager([1, 2]))
    assert graph([1, 2]).dtype == torch.float32


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_changes_beside_the_weights_are_followed(model, precision):
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    graph, _ = pair(model, "3", precision=precision)

    def drawn() -> torch.Tensor:
        _, eager = pair(model, "3", precision=precision)
        found = graph([1, 2])
        assert torch.equal(found, eager([1, 2]))
        return found

    with_adapter = drawn()
    with adapted.disable_adapter():
        assert not torch.equal(drawn(), with_adapter)
    assert torch.equal(drawn(), with_adapter)
    assert graph.eager_reason is None
    layer = model.blocks[0].attn.qkv
    layer.set_scale("default", 3.0)
    scaled = drawn()
    assert not torch.equal(scaled, with_adapter)
    handle = layer.register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.equal(drawn(), scaled)
    handle.remove()
    assert torch.equal(drawn(), scaled)
    model.blocks[1].mlp.act = torch.nn.ReLU()
    assert not torch.equal(drawn(), scaled)


def test_random_batches_of_many_labels_share_a_capture():
    graph, _ = pair(small_model(num_classes=100))
    for seed in range(4):
        labels = torch.randint(100, (8,), generator=torch.Generator().manual_seed(seed))
        assert len(set(labels.tolist())) > 4
        graph(labels)
    assert graph.trajectories.captures == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not permitted")]
)
def test_what_cannot_be_captured_is_run_eagerly_and_says_why(model, error):
    _, eager = pair(model)
    graph = Sampler(model, eager.schedule, SamplerConfig(), graphs=FakeGraphs(fails=error))
    assert torch.equal(graph([1, 2]), eager([1, 2]))
    assert graph.eager_reason == f"capture failed: {error}"
    graph([3, 4])
    assert graph.eager_reason == f"capture failed: {error}"
    assert graph.graphs.captures == 1, "not tried again for the same request"


def test_reasons_for_running_eagerly(model):
    process = create_diffusion("3")
    sampler = Sampler(model, process)
    sampler([1])
    assert sampler.eager_reason == "there are no CUDA graphs on cpu"
    sampler.config = SamplerConfig(graph="never")
    sampler([1])
    assert sampler.eager_reason == "graph is 'never'"
    cond_fn = classifier_cond_fn(lambda x, t: x.flatten(1)[:, :9])
    guided = Sampler(model, process, cond_fn=cond_fn, graphs=FakeGraphs())
    guided([1])
    assert guided.eager_reason == "a classifier's gradient is not captured"


def test_the_cache_keeps_the_last_used():
    cache = TrajectoryCache(2)
    for key in "aabac":
        cache.get(key, lambda key=key: key.upper())
    assert list(cache._trajectories) == ["a", "c"]
    assert cache.captures == 3


@pytest.mark.gpu
@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver != "dopri5"])
def test_cuda_graphs_are_the_eager_trajectory(solver):
    model = small_model().cuda()
    config = SamplerConfig(solver=solver, guidance=Guidance(2.0, interval=(0.2, 0.9)))
    graph = Sampler(model, process_of(solver, "5"), config)
    eager = Sampler(model, graph.schedule, replace(config, graph="never"))
    for labels, seed in (([1, 2], 0), ([3, 8], 5)):
        assert torch.equal(graph(labels, seed=seed), eager(labels, seed=seed))
        assert graph.eager_reason is None
    assert graph.trajectories.captures == 1
