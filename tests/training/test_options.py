"""What a run computes in and on: precisions, residual stream, recomputation, compilation, float8, apex's optimiser."""

import functools
import sys
import types
from typing import Any

import pytest
import torch
import torch.distributed.fsdp as fsdp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dit_fast.checkpoint.folder import latest_checkpoint
from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError
from dit_fast.training import TrainConfig, Trainer, read_manifest
from dit_fast.training.config import CHANGEABLE, resumed_config
from dit_fast.training.precision import choose_precision, use_float8
from tests.tolerance import assert_close, assert_trained_alike
from tests.training.test_step import TINY, image_set, run, trainer, weights
from tests.utils.test_nvtx import two_ranks


def losses(steps: int = 3, **changes: Any) -> list[float]:
    each = trainer(**changes)
    run(each, steps)
    return [value.loss for value in each.values()]


def test_auto_is_float32_on_a_cpu_and_bfloat16_where_cuda_has_it(monkeypatch):
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert choose_precision("auto", torch.device("cuda")) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"capability 8.0, float8 needs 8.9; give --precision bf16"):
        choose_precision("fp8", torch.device("cuda"))
    assert trainer().config.precision == "fp32", "a run keeps what auto chose"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_train_float32_weights(precision):
    low, full = losses(precision=precision), losses()
    assert low == pytest.approx(full, rel=2e-2)
    assert low != full
    each = trainer(precision=precision)
    seen = []
    each.denoiser.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run(each, 1)
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float16]
    assert all(p.dtype == torch.float32 for p in each.trained.values())


def test_the_residual_stream_is_in_the_dtype_asked_for():
    for residual, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        each = trainer(precision="bf16", residual=residual, depth=2)
        seen: list[torch.dtype] = []

        def listen(module: nn.Module, args: Any, out: Any, seen: list[torch.dtype] = seen) -> None:
            seen.append(out.dtype)

        for block in each.denoiser.blocks:
            block.register_forward_hook(listen)
        run(each, 1)
        assert seen == [dtype, dtype]
    with pytest.raises(ConfigError, match="--residual bf16 goes with --precision bf16 or fp8, not fp32"):
        trainer(precision="auto", residual="bf16", device="cpu")


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_what_is_recomputed_changes_no_number(kernels):
    runs = [losses(recompute=what, kernels=kernels) for what in ("none", "cheap", "blocks")]
    for other in runs[1:]:
        assert_close(other, runs[0])


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 2},
        {"learn_sigma": False, "loss_weighting": "min-snr", "prediction": "v", "accumulate": 2},
        {"objective": "flow", "prediction": "x0", "loss_weighting": "likelihood"},
    ],
    ids=["hybrid", "min-snr", "flow"],
)
def test_blocks_draws_and_loss_are_compiled_each_by_itself(options, monkeypatch):
    """Traced whole; not through Inductor, whose minute of work says nothing about that."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    eager, compiled = trainer(**options), trainer(**options, compile=True)
    for each in (eager, compiled):
        run(each, 2)
    assert_close([value.loss for value in compiled.values()], [value.loss for value in eager.values()])
    assert all("forward" in vars(block) for block in compiled.model.blocks)
    assert_close([value.mse for value in compiled.values()], [value.mse for value in eager.values()])
    functions = [getattr(compiled.work, name) for name in ("draw", "add_noise", "loss")]
    assert all(hasattr(function, "_torchdynamo_orig_callable") for function in functions)
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()


def test_a_run_is_not_continued_in_another_precision_or_length_of_its_cosine():
    saved = {"data": "set", "precision": "bf16", "residual": "fp32", "lr_schedule": "cosine", "steps": 10}
    for name, value in (("precision", "fp32"), ("residual", "bf16"), ("steps", 20), ("weight_decay", 0.1)):
        with pytest.raises(CheckpointError, match=f"--{name.replace('_', '-')} is .* there and {value} here"):
            resumed_config(saved, {name: value}, "file")
    assert resumed_config({**saved, "lr_schedule": "constant"}, {"steps": 20}, "file").steps == 20
    changed = resumed_config(saved, {"accumulate": 2, "optimizer": "torch", "recompute": "blocks"}, "file")
    assert (changed.accumulate, changed.optimizer, changed.recompute) == (2, "torch", "blocks")
    assert TrainConfig.__dataclass_fields__.keys() >= CHANGEABLE


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16"},
        {"optimizer": "torch", "lr_schedule": "cosine", "warmup_steps": 2, "steps": 6},
        {"accumulate": 4, "max_grad_norm": 0.1, "skip_nonfinite": 1},
    ],
    ids=["fp16", "torch", "accumulate"],
)
def test_a_restored_run_goes_on_bit_for_bit(options, tmp_path):
    whole = trainer(**options)
    if "skip_nonfinite" in options:
        bias = whole.model.final_layer.linear.bias
        bias.register_hook(lambda grad: grad * float("nan") if whole.step == 1 else grad)
    run(whole, 3)
    writer = whole.writer(tmp_path)
    whole.save(writer)
    path = writer.wait()
    run(whole, 3)
    resumed = trainer(**options)
    resumed.restore(path, read_manifest(path))
    run(resumed, 3)
    assert torch.equal(weights(whole), weights(resumed))
    for name, average in whole.ema_state().items():
        assert torch.equal(average, resumed.ema_state()[name])
    ends = [each.manifest() for each in (whole, resumed)]
    assert [end[key] for end in ends for key in ("updates", "skipped", "loss_scale")] == [
        ends[0][key] for key in ("updates", "skipped", "loss_scale")
    ] * 2
    assert ends[0]["skipped"] == options.get("skip_nonfinite", 0)


def test_without_torchao_float8_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(MissingExtraError, match=r"torchao is not installed; pip install .*\[fp8\]'"):
        trainer(precision="fp8")


class Float8Linear(nn.Linear):
    """What torchao puts in a linear's place, without its arithmetic."""


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for torchao, and the options that it is given."""
    configs: list[dict[str, Any]] = []

    def convert(module: nn.Module, *, module_filter_fn: Any, config: Any, prefix: str = "") -> None:
        for name, child in list(module.named_children()):
            path = f"{prefix}{name}"
            if isinstance(child, nn.Linear) and module_filter_fn(child, path):
                made = Float8Linear(child.in_features, child.out_features, device="meta")
                made.weight, made.bias = child.weight, child.bias
                setattr(module, name, made)
            else:
                convert(child, module_filter_fn=module_filter_fn, config=config, prefix=f"{path}.")

    def make_config(**options: Any) -> dict[str, Any]:
        configs.append(options)
        return options

    fake = types.SimpleNamespace(Float8LinearConfig=make_config, convert_to_float8_training=convert)
    monkeypatch.setitem(sys.modules, "torchao", types.SimpleNamespace(float8=fake))
    monkeypatch.setitem(sys.modules, "torchao.float8", fake)
    return configs


def float8_layers(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, Float8Linear)]


TOKENS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def test_float8_takes_the_linears_over_tokens(torchao):
    """Which layers are replaced, and that their parameters stay where they were."""
    each = trainer(precision="fp8", hidden_size=32)
    assert float8_layers(each.model) == [f"blocks.0.{name}" for name in TOKENS]
    assert torchao == [{"emulate": True}]
    assert each.trained.keys() == trainer(hidden_size=32).trained.keys()
    before = weights(each)
    run(each, 1)
    assert not torch.equal(before, weights(each))
    assert not float8_layers(trainer(precision="fp8", hidden_size=24).model), "24 is no 16s"


def test_float8_linears_are_made_before_the_model_is_sharded(torchao, monkeypatch):
    """torchao's order. Weights are then sharded and travel in bfloat16, as `fully_shard` sees them, not in float8."""
    found: list[list[str]] = []
    fully_shard = fsdp.fully_shard

    def listening(module: nn.Module, **options: Any) -> nn.Module:
        found.append(float8_layers(module))
        assert options["mp_policy"].param_dtype is torch.bfloat16
        return fully_shard(module, **options)

    monkeypatch.setattr(fsdp, "fully_shard", listening)
    with two_ranks() as world:
        config = TrainConfig(**{**TINY, "hidden_size": 32, "precision": "fp8", "parallel": "fsdp"})
        each = Trainer(config, image_set(), world=world)
        each.checks_every_step, each._patience = False, config.timeout
        each.train_step(*each.stream.stored(0, each.rows))
        layers = [module for module in each.model.modules() if isinstance(module, Float8Linear)]
        assert [isinstance(layer.weight, DTensor) for layer in layers] == [True] * 4
    assert found == [list(TOKENS), [f"blocks.0.{name}" for name in TOKENS]]


def test_float8_by_torchao_trains_like_bfloat16():
    pytest.importorskip("torchao")
    low, half = (losses(precision=precision, hidden_size=32, steps=5) for precision in ("fp8", "bf16"))
    assert low == pytest.approx(half, rel=5e-2)
    assert low != half
    model = trainer(hidden_size=32).model
    use_float8(model, torch.device("cpu"))
    assert sum("Float8" in type(module).__name__ for module in model.modules()) == 4
    assert model.state_dict().keys() == trainer(hidden_size=32).model.state_dict().keys()


def test_without_apex_its_optimiser_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(
        ConfigError, match=r"--optimizer apex: NVIDIA's apex is not installed .apex on PyPI is"
    ):
        trainer(optimizer="apex")


class StandInFusedAdam(torch.optim.Optimizer):
    """What FusedAdam(capturable=True) does with float32 parameters, in its order of business."""

    def __init__(self, params: Any, lr: float, adam_w_mode: bool, capturable: bool, **options: Any):
        assert adam_w_mode
        assert capturable
        super().__init__(params, {"lr": torch.tensor(lr), **options})
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    def step(self, grad_scaler: Any) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
        found = grad_scaler._check_inf_per_device(self)[torch.device("cpu")]
        self._dummy_overflow_buf.copy_(found)
        inverse = grad_scaler._get_scale_async().double().reciprocal().float()
        if bool(self._dummy_overflow_buf):
            return
        t, (beta1, beta2) = int(group["step"]), group["betas"]
        for p in group["params"]:
            state, grad = self.state[p], p.grad * inverse
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            size = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
            update = state["exp_avg"] / (1 - beta1**t) / size + group["weight_decay"] * p.detach()
            p.data -= group["lr"] * update


def test_apexs_optimiser_trains_like_ours(monkeypatch):
    """On a stand-in, since apex needs CUDA: rates, clipping, void steps and averages reach it."""
    optimizers = types.SimpleNamespace(FusedAdam=StandInFusedAdam)
    monkeypatch.setitem(sys.modules, "apex", types.SimpleNamespace(optimizers=optimizers))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    options = {"max_grad_norm": 0.5, "weight_decay": 0.1, "warmup_steps": 3, "skip_nonfinite": 1}
    runs = [trainer(optimizer=name, **options) for name in ("adamw_ema", "apex")]
    for each in runs:
        bias = each.model.final_layer.linear.bias
        bias.register_hook(lambda grad, each=each: grad * float("inf") if each.step == 1 else grad)
        run(each, 4)
    assert_trained_alike(runs[1].trained, runs[0].trained, 3 * TINY["lr"])
    assert_trained_alike(runs[1].ema_state(), runs[0].ema_state(), 3 * TINY["lr"])
    assert [each.manifest()["updates"] for each in runs] == [3, 3]


def test_a_cuda_graph_needs_cuda():
    with pytest.raises(ConfigError, match="--cuda-graph needs a CUDA device, this is cpu; remove it"):
        Trainer(TrainConfig(data="set", patch_size=4, batch_size=4, cuda_graph=True), image_set())


def test_prefetched_batches_are_those_of_the_stream():
    from dit_fast.training.run import prefetch

    each = trainer()
    batches: list[tuple[Tensor, Tensor]] = list(prefetch(each.stream.read(0, 4), torch.device("cpu")))
    for step, (images, labels) in enumerate(batches):
        assert torch.equal(images, each.stream.batch(step)[0])
        assert torch.equal(labels, each.stream.batch(step)[1])
    assert len(batches) == 4


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_bf16_reads_the_optimizer_s_copies_and_gives_the_bits_of_autocast(kernels, monkeypatch):
    """With them no matrix is cast in a step; without them (accumulation has none) autocast casts each."""
    on, off = trainer(precision="bf16", kernels=kernels), None
    with monkeypatch.context() as patch:
        patch.setattr("dit_fast.training.trainer.on_copies", lambda model, optimizer: model)
        off = trainer(precision="bf16", kernels=kernels)
    casts = []
    for each in (on, off):
        run(each, 3)
        drawn = each.work.draw(*each.stream.stored(3))
        each.optimizer.zero_grad()
        with torch.profiler.profile(record_shapes=True) as profile:
            each.work._accumulate(*drawn)
        shapes = {tuple(p.shape) for p in each.trained.values() if p.ndim == 2 and p.numel() > 1000}
        events = [event for event in profile.events() if event.name == "aten::_to_copy"]
        casts.append(
            sum(bool(event.input_shapes) and tuple(event.input_shapes[0]) in shapes for event in events)
        )
    assert torch.equal(weights(on), weights(off))
    assert on.values() == off.values()
    # Each matrix to bfloat16, and its gradient back.
    assert casts[0] == 0 < casts[1]
    matrices = [m.weight for m in on.denoiser.modules() if isinstance(m, nn.Linear)]
    masters = [m.weight for m in on.model.modules() if isinstance(m, nn.Linear)]
    assert {m.dtype for m in matrices} == {torch.bfloat16}
    assert all(torch.equal(low, high.bfloat16()) for low, high in zip(matrices, masters, strict=True))
    assert {p.dtype for p in on.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"optimizer": "torch"}, {"precision": "fp32"}])
def test_no_copies_where_sums_of_gradients_or_the_optimizer_want_float32(changes):
    each = trainer(**{"precision": "bf16", **changes})
    assert each.denoiser is each.model
    run(each, 1)
    assert {p.grad.dtype for p in each.trained.values()} == {torch.float32}


def test_copies_follow_a_restored_checkpoint(tmp_path):
    first, second = trainer(precision="bf16"), trainer(precision="bf16", seed=0)
    run(first, 2)
    writer = first.writer(tmp_path)
    first.save(writer)
    writer.wait()
    run(first, 2)
    path = latest_checkpoint(tmp_path)
    assert not torch.equal(weights(first), weights(second))
    second.restore(path, read_manifest(path))
    run(second, 2)
    assert torch.equal(weights(first), weights(second))
