"""Sampling with float8 blocks: the error that rounding can make, what is replaced, and what is refused."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dit_fast.cli import main
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError
from dit_fast.sampling import Sampler, SamplerConfig
from dit_fast.sampling.float8 import Float8Linear, quantize, require_float8_device
from dit_fast.sampling.trajectory import loop_parameters
from tests.sampling.test_graphs import FakeGraphs
from tests.small_models import small_model as build

# Half of the spacing of e4m3's 3 bits of mantissa, relative; below its normal numbers, in units of the scale.
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of both signs over eight orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10 ** (torch.rand(shape, generator=generator) * 8 - 4)
    return magnitudes * torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)


def rounding(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.maximum(RELATIVE * x.abs(), ABSOLUTE * scales)


small_model = partial(
    build, std=0.2, redrawn=("adaLN", "final"), hidden_size=64, depth=2, num_heads=4, num_classes=10
)


def test_values_are_within_half_a_spacing():
    x = spread(64, 48)
    x[5] = 0
    values, scales = quantize(x)
    assert values.dtype is torch.float8_e4m3fn
    assert values.float().abs().amax(dim=1).tolist() == [448.0] * 5 + [0.0] + [448.0] * 58
    assert ((values.float() * scales - x).abs() <= rounding(x, scales) * 1.00001).all()
    assert (values.float() * scales - x).abs().max() > 0.5 * rounding(x, scales).max(), "the bound is tight"
    assert quantize(torch.tensor([[1.0, float("nan")]]))[0].float().isnan().any()
    assert quantize(torch.tensor([[1.0, float("inf")]]))[0].float().isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_is_within_the_bound_of_its_rounding(dtype):
    linear = nn.Linear(64, 48).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(spread(48, 64, seed=1))
    x = spread(3, 7, 64, seed=2).to(dtype)
    low = Float8Linear(linear)
    x64, w64 = x.double(), linear.weight.detach().double()
    exact = x64 @ w64.t() + linear.bias.detach().double()
    of_x, of_w = rounding(x64, quantize(x)[1]), rounding(w64, low.scales)
    bound = of_x @ w64.abs().t() + x64.abs() @ of_w.t() + of_x @ of_w.t()
    bound += 2 * torch.finfo(dtype).eps * (x64.abs() @ w64.abs().t() + 1)
    answer = low(x)
    assert (answer.shape, answer.dtype) == ((3, 7, 48), dtype)
    assert ((answer - exact).abs() <= bound).all()
    assert (answer - exact).norm() / exact.norm() < 0.06
    assert (answer - exact).norm() / exact.norm() > 0.003, "this is no float8"


def test_a_token_is_what_it_is_whatever_is_beside_it():
    low = Float8Linear(nn.Linear(32, 32))
    x = spread(4, 5, 32)
    x[0] *= 1000
    assert torch.equal(low(x)[2:3], low(x[2:3]))


def test_the_linears_over_tokens_are_replaced_in_a_copy():
    model = small_model()
    sampler = Sampler(model, create_diffusion("4"), SamplerConfig(precision="fp8", solver="ddim"))
    sampler([1, 2])
    copy = sampler._cast_model()
    low = {name for name, module in copy.named_modules() if isinstance(module, Float8Linear)}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert low == {f"blocks.{i}.{part}" for i in range(2) for part in parts}
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16, torch.float8_e4m3fn}
    assert {type(module) for module in model.modules()}.isdisjoint({Float8Linear})
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    crossed = Sampler(
        small_model(conditioning="cross_attention"), sampler.schedule, SamplerConfig(precision="fp8")
    )
    low = {name for name, module in crossed._cast_model().named_modules() if isinstance(module, Float8Linear)}
    assert low == {f"blocks.{i}.{part}" for i in range(2) for part in (*parts, "cross.q", "cross.proj")}


def test_a_step_reads_half_the_bytes_of_bfloat16():
    model, bytes_read = small_model(hidden_size=128, num_heads=2), {}
    for precision in ("bf16", "fp8"):
        sampler = Sampler(model, create_diffusion("4"), SamplerConfig(precision=precision))
        read = {id(p) for p in loop_parameters(sampler._cast_model())}
        blocks = [p for p in sampler._cast_model().blocks.parameters() if id(p) in read and p.ndim == 2]
        bytes_read[precision] = sum(p.numel() * p.itemsize for p in blocks)
    assert bytes_read["fp8"] * 2 == bytes_read["bf16"]


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++2m"])
def test_samples_are_near_those_of_float32(solver):
    model, drawn = small_model(), {}
    for precision in ("fp32", "bf16", "fp8"):
        config = SamplerConfig(precision=precision, solver=solver)
        drawn[precision] = Sampler(model, create_diffusion("20"), config)([1, 2, 3, 4], seed=1)
    scale = drawn["fp32"].std()
    errors = {name: ((drawn[name] - drawn["fp32"]).std() / scale).item() for name in ("bf16", "fp8")}
    assert 1.1 * errors["bf16"] < errors["fp8"] < 0.04, errors


def test_a_sample_does_not_depend_on_its_batch():
    model = small_model()
    sampler = Sampler(model, create_diffusion("5"), SamplerConfig(precision="fp8"))
    together, alone = (sampler([1, 2, 3, 4], seed=1, batch_size=size) for size in (4, 1))
    assert (together - alone).abs().max() < 0.02 * together.std()


def test_captured_and_compiled_as_eager():
    model, schedule = small_model(), create_diffusion("4")
    config = SamplerConfig(precision="fp8", solver="ddim")
    graph = Sampler(model, schedule, config, graphs=FakeGraphs())
    eager = Sampler(model, schedule, replace(config, graph="never"))
    expected = eager([1, 2])
    assert torch.equal(graph([1, 2]), expected)
    assert graph.eager_reason is None
    # bfloat16 is another copy, and so is float8 of other weights.
    graph.config = replace(config, precision="bf16")
    assert not torch.equal(graph([1, 2]), expected)
    graph.config = config
    assert torch.equal(graph([1, 2]), expected)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
    changed = graph([1, 2])
    assert torch.equal(changed, eager([1, 2]))
    assert not torch.equal(changed, expected)
    low, x = Float8Linear(nn.Linear(32, 32)), spread(4, 32)
    with torch.no_grad():
        assert torch.equal(torch.compile(low, fullgraph=True, backend="aot_eager")(x), low(x))


def test_on_the_command_line(tmp_path):
    small_model(in_channels=3).save_pretrained(tmp_path / "model")
    ask = [
        "sample",
        "--ckpt",
        tmp_path / "model",
        "--num",
        4,
        "--steps",
        4,
        "--npz",
        "--cfg-scale",
        1,
        "--device",
        "cpu",
    ]
    for precision in ("fp32", "fp8"):
        words = [*ask, "--precision", precision, "--out", tmp_path / precision]
        assert main(list(map(str, words))) == 0
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("fp32", "fp8"))
    assert 0 < np.abs(a - b).mean() < 6, np.abs(a - b).mean()


def test_what_float8_cannot_be_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"capability 8\.0, float8 needs 8\.9; give --precision bf16"):
        require_float8_device(torch.device("cuda"))
    with pytest.raises(ConfigError, match="mps has no float8 products"):
        require_float8_device(torch.device("mps"))
    small_model(in_channels=3, hidden_size=24).save_pretrained(tmp_path / "model")
    ask = ["sample", "--ckpt", str(tmp_path / "model"), "--precision", "fp8", "--out", str(tmp_path / "o")]
    assert main([*ask, "--device", "cpu"]) == 1
    assert "multiples of 16, the model's is 24; give --precision bf16\n" in capsys.readouterr().err
