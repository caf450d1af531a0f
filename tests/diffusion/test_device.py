"""What the diffusion does on a device: copies, temporaries, random numbers, types, compilation."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_fast.diffusion import create_diffusion
from tests.tolerance import assert_close

SHAPE = (3, 4, 8, 8)


def twice(x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
    return torch.cat([x, 0.1 * x], dim=1)


class ConvModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * (1 + t.float().view(-1, 1, 1, 1) / 1000)


class Trace(TorchDispatchMode):
    """Counts operators that see host tensors, and lists those whose result is new and as big as the data."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.host = 0
        self.fresh = 0
        self.full_size: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        self.host += any(tensor.device.type == "cpu" for tensor in tensors)
        self.fresh += func is torch.ops.aten.lift_fresh.default
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        storages = {leaf.untyped_storage()._cdata for leaf in given}
        for leaf in tree_leaves(out):
            is_new = isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in storages
            if is_new and leaf.numel() >= self.size:
                self.full_size.append(func.overloadpacket.__name__)
        return out


def every_step(diffusion, device: str) -> None:
    """One call of everything that runs inside a training or sampling loop."""
    x, noise = torch.empty(SHAPE, device=device), torch.empty(SHAPE, device=device)
    t = torch.zeros(3, dtype=torch.int64, device=device)
    diffusion.training_losses(twice, x, t, noise=noise)
    diffusion.p_sample(twice, x, t, cond_fn=lambda x, t: x)
    diffusion.ddim_sample(twice, x, t, cond_fn=lambda x, t: x)
    diffusion.ddim_reverse_sample(twice, x, t)
    for out in diffusion.p_sample_loop_progressive(twice, SHAPE, noise=noise):
        assert out["sample"].device.type == device
    diffusion.ddim_sample_loop(twice, SHAPE, device=device, eta=0.5)
    diffusion.calc_bpd_loop(twice, x)


@pytest.mark.parametrize("respacing", ["ddim5", "4"])
def test_nothing_crosses_from_host_to_device_after_the_first_use(respacing):
    """On the meta device a read of a value raises and a host tensor is seen, so neither can hide."""
    diffusion = create_diffusion(respacing)
    with Trace(size=1 << 60) as first:
        every_step(diffusion, "meta")
    assert first.host > 0
    with Trace(size=1 << 60) as warm:
        every_step(diffusion, "meta")
    assert (warm.host, warm.fresh) == (0, 0)


def test_no_tensor_is_made_from_host_data_on_the_cpu():
    diffusion = create_diffusion("ddim5")
    every_step(diffusion, "cpu")
    with Trace(size=1 << 60) as trace:
        every_step(diffusion, "cpu")
    assert trace.fresh == 0


def test_coefficients_are_broadcast_not_expanded():
    diffusion = create_diffusion("ddim5", learn_sigma=False)
    x, noise, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0, 1, 4])
    diffusion.q_sample(x, t, noise)
    with Trace(size=x.numel()) as trace:
        diffusion.q_sample(x, t, noise)
    assert trace.full_size == ["mul", "mul", "add"]
    with Trace(size=x.numel()) as trace:
        diffusion.q_posterior_mean_variance(x, x, t)
        diffusion.q_mean_variance(x, t)
    assert trace.full_size == ["mul", "mul", "add", "mul"]
    with Trace(size=x.numel()) as trace:
        diffusion.p_sample(lambda x, t: noise, x, t, clip_denoised=False)
    # x_0 (3), mean (3), noise, standard deviation (2), noise scaled (2) and added.
    assert len(trace.full_size) == 12
    assert set(trace.full_size) == {"mul", "sub", "add", "exp", "randn_like"}


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_one_normal_draw_for_each_step(loop):
    diffusion = create_diffusion("4")
    torch.manual_seed(0)
    getattr(diffusion, loop)(twice, SHAPE, device="cpu")
    state = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(1 + 4):
        torch.randn(SHAPE)
    assert torch.equal(state, torch.get_rng_state())


def test_draws_of_training_and_of_the_bound():
    diffusion, x = create_diffusion("4"), torch.zeros(SHAPE)
    t = torch.tensor([0, 1, 3])
    for draws, call in (
        (1, lambda: diffusion.training_losses(twice, x, t)),
        (0, lambda: diffusion.training_losses(twice, x, t, noise=x)),
        (1, lambda: diffusion.q_sample(x, t)),
        (0, lambda: diffusion.ddim_reverse_sample(twice, x, t)),
        (4, lambda: diffusion.calc_bpd_loop(twice, x)),
    ):
        torch.manual_seed(0)
        call()
        state = torch.get_rng_state()
        torch.manual_seed(0)
        for _ in range(draws):
            torch.randn(SHAPE)
        assert torch.equal(state, torch.get_rng_state())


def test_loops_give_the_model_the_original_timesteps_the_last_first():
    diffusion, seen = create_diffusion("4"), []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(t)
        return twice(x, t)

    outs = list(
        diffusion.p_sample_loop_progressive(model, SHAPE, device="cpu", model_kwargs={"y": torch.zeros(3)})
    )
    assert [t.tolist() for t in seen] == [[i] * 3 for i in (999, 666, 333, 0)]
    assert all(t.dtype == torch.int64 and t.is_contiguous() for t in seen)
    assert len(outs) == 4
    assert all(set(out) == {"sample", "pred_xstart"} for out in outs)


def test_sampling_records_no_gradient_but_leaves_the_callers_mode():
    diffusion, model = create_diffusion("3"), ConvModel()
    for out in diffusion.ddim_sample_loop_progressive(model, SHAPE):
        assert not out["sample"].requires_grad
        assert torch.is_grad_enabled()


def test_device_is_found_from_the_model_its_method_or_the_noise(capfd):
    diffusion, model = create_diffusion("2"), ConvModel()
    for call in (model, model.forward):
        assert diffusion.p_sample_loop(call, SHAPE).device.type == "cpu"
    noise = torch.empty(SHAPE, device="meta")
    assert diffusion.ddim_sample_loop(twice, SHAPE, noise=noise, progress=False).device.type == "meta"
    assert "it/s" not in capfd.readouterr().err
    diffusion.ddim_sample_loop(model, SHAPE, progress=True)
    assert "2/2" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_read_in_float32(dtype):
    diffusion, t = create_diffusion("10"), torch.tensor([0, 5, 9])
    x, output = torch.randn(SHAPE).to(dtype), torch.randn(3, 8, 8, 8).to(dtype)
    low = diffusion.p_mean_variance(lambda x, t: output, x, t)
    full = diffusion.p_mean_variance(lambda x, t: output.float(), x.float(), t)
    for name in ("mean", "variance", "log_variance", "pred_xstart"):
        assert low[name].dtype == torch.float32
        assert torch.equal(low[name], full[name])
    low_losses = diffusion.training_losses(lambda x, t: output, x, t, noise=x)
    assert {value.dtype for value in low_losses.values()} == {torch.float32}

    noisy = diffusion.q_sample(x, t, noise=x)
    assert torch.equal(noisy, diffusion.q_sample(x.float(), t, noise=x.float()).to(dtype))
    for sampler in (diffusion.p_sample, diffusion.ddim_sample, diffusion.ddim_reverse_sample):
        assert sampler(lambda x, t: output, x, t)["sample"].dtype == dtype
    assert diffusion.p_sample_loop(twice, SHAPE, noise=x).dtype == dtype


def test_float64_data_stay_float64():
    diffusion, x = create_diffusion("10"), torch.randn(SHAPE, dtype=torch.float64)
    t = torch.tensor([0, 5, 9])
    assert diffusion.p_sample(twice, x, t)["sample"].dtype == torch.float64
    assert diffusion.training_losses(twice, x, t)["loss"].dtype == torch.float64


def test_tables_hold_the_float64_values_rounded_once():
    diffusion = create_diffusion("")
    t = torch.arange(1000)
    for name in ("sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "posterior_log_variance_clipped"):
        (got,) = diffusion._coefficients.at(t, 4, name)
        assert got.shape == (1000, 1, 1, 1)
        assert torch.equal(got.flatten(), torch.from_numpy(getattr(diffusion, name))[t].float())


def test_tables_made_in_inference_mode_serve_training():
    diffusion, model = create_diffusion("5"), ConvModel()
    x, t = torch.randn(SHAPE), torch.tensor([0, 2, 4])
    with torch.inference_mode():
        diffusion.p_sample_loop(model, SHAPE)
    diffusion.training_losses(model, x, t)["loss"].mean().backward()
    assert model.conv.weight.grad.abs().min() > 0


def test_copies_leave_device_tables_behind():
    diffusion = create_diffusion("5")
    every_step(diffusion, "meta")
    for clone in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        assert clone._coefficients._table._copies == {}
        assert clone.timestep_map == diffusion.timestep_map
        every_step(clone, "cpu")


@pytest.mark.parametrize("respacing", ["", "50"])
def test_one_graph_for_all_timesteps(respacing):
    diffusion, model = create_diffusion(respacing), ConvModel()
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    draws = [torch.tensor(t) for t in ([0, 5, 49], [1, 2, 3], [49, 0, 0])]
    with torch.inference_mode():
        diffusion.p_mean_variance(model, x, draws[0])
    for method, arguments in (
        (diffusion.training_losses, {"noise": noise}),
        (diffusion.p_mean_variance, {"clip_denoised": False}),
    ):
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(method, fullgraph=True, backend=backend)
        for t in draws:
            expected, got = method(model, x, t, **arguments), compiled(model, x, t, **arguments)
            assert set(expected) == set(got)
            for name, value in expected.items():
                if value is None:
                    assert got[name] is None
                else:
                    assert_close(got[name], value, what=name)
        assert backend.frame_count == 1
    expected_grad = torch.autograd.grad(
        diffusion.training_losses(model, x, draws[0], noise=noise)["loss"].mean(), model.conv.weight
    )
    unused = create_diffusion(respacing)
    compiled = torch.compile(unused.training_losses, fullgraph=True, backend="aot_eager")
    got_grad = torch.autograd.grad(
        compiled(model, x, draws[0], noise=noise)["loss"].mean(), model.conv.weight
    )
    assert_close(got_grad, expected_grad)
