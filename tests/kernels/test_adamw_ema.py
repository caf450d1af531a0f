"""The multi-tensor AdamW kernels against torch.optim.AdamW, clip_grad_norm_ and a separate average."""

import itertools

import pytest
import torch
from torch import Tensor

from dit_fast.kernels import AdamWSettings, AdamWTensors, adamw_ema, grad_square_sum
from dit_fast.kernels.adamw_tensors import MultiTensorLaunch
from tests.tolerance import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small blocks keep the interpreter quick: 257 and 700 elements have whole blocks and a tail, (0, 5) has none.
CONFIG = MultiTensorLaunch(block=256, num_warps=2, norm_programs=4)
SHAPES = ((3, 100), (0, 5), (256,), (257,), (1,), (7, 100), ())
SETTINGS = AdamWSettings((0.8, 0.95), 1e-6, weight_decay=0.1, ema_decay=0.9, max_norm=1.0)
FIELDS = ("params", "exp_avgs", "exp_avg_sqs", "steps", "averages", "copies")


def draw(shapes, seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE) for shape in shapes
    ]


def gradients(step: int, shapes=SHAPES) -> list[Tensor]:
    """Of a norm below 1 in every third step, which is not clipped."""
    return draw(shapes, 100 + step, (0.003, 0.1, 3.0)[step % 3])


def tensors(
    dtype=torch.float32, shapes=SHAPES, copy=torch.float16, average=True, config=CONFIG
) -> AdamWTensors:
    params = [p.to(dtype) for p in draw(shapes, 0)]
    return AdamWTensors(
        params,
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
        [torch.zeros((), device=DEVICE) for _ in params],
        [p.clone() for p in params] if average else None,
        [p.to(copy) for p in params] if copy else None,
        config=config,
    )


def rate(lr: float = 3e-3) -> Tensor:
    return torch.tensor(lr, dtype=torch.float64, device=DEVICE)


def step(held: AdamWTensors, grads, settings=SETTINGS, found_inf=None, kernels="triton") -> None:
    square_sum = None if settings.max_norm is None else grad_square_sum(held, grads, kernels=kernels)
    adamw_ema(held, grads, rate(), settings, square_sum=square_sum, found_inf=found_inf, kernels=kernels)


def torchs(dtype, steps: int, settings=SETTINGS, grad_dtype=None) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and averages of PyTorch's AdamW on the same gradients; steps of empty tensors do nothing."""
    params = [torch.nn.Parameter(p.to(dtype)) for p in draw(SHAPES, 0)]
    averages = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(
        params, 3e-3, settings.betas, settings.eps, settings.weight_decay, foreach=False
    )
    for index in range(steps):
        for p, grad in zip(params, gradients(index), strict=True):
            p.grad = grad.to(grad_dtype or dtype).to(dtype)
        if settings.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, settings.max_norm)
        optimizer.step()
        decay = settings.ema_decay
        averages = [decay * ema + (1 - decay) * p.detach() for ema, p in zip(averages, params, strict=True)]
    return [p.detach() for p in params], averages


def distance(left, right) -> float:
    pairs = zip(left, right, strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel())


def same_bits(left: AdamWTensors, right: AdamWTensors) -> bool:
    return all(
        torch.equal(a, b)
        for field in FIELDS
        for a, b in zip(getattr(left, field) or (), getattr(right, field) or (), strict=True)
    )


def test_twenty_steps_in_float64() -> None:
    held = tensors(torch.float64)
    for index in range(20):
        step(held, gradients(index))
    params, averages = torchs(torch.float64, 20)
    assert_close(held.params, params)
    assert_close(held.averages, averages)
    assert all(torch.equal(copy, p.half()) for copy, p in zip(held.copies, held.params, strict=True))
    assert all(float(count) == 20 for count in held.steps)


@pytest.mark.parametrize(
    "grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_float32_is_as_accurate_as_torch(grad_dtype) -> None:
    """Twice PyTorch's own error against float64 on the same, rounded, gradients; bf16 copies are p rounded."""
    held = tensors(copy=torch.bfloat16)
    for index in range(20):
        step(held, [grad.to(grad_dtype) for grad in gradients(index)])
    exact = torchs(torch.float64, 20, grad_dtype=grad_dtype)
    same = torchs(torch.float32, 20, grad_dtype=grad_dtype)
    for got, torch_has, want in zip((held.params, held.averages), same, exact, strict=True):
        assert distance(got, want) <= 2 * distance(torch_has, want)
    assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(held.copies, held.params, strict=True))


@pytest.mark.parametrize("settings", [AdamWSettings(ema_decay=0.9), AdamWSettings((0.0, 0.0), ema_decay=0.0)])
def test_other_settings_in_float64(settings) -> None:
    """The DiT recipe without decay and clipping, and moments and average without memory."""
    held = tensors(torch.float64)
    for index in range(3):
        step(held, gradients(index), settings)
    params, averages = torchs(torch.float64, 3, settings)
    assert_close(held.params, params)
    assert_close(held.averages, averages)


@pytest.mark.parametrize(("average", "copy"), [(False, None), (True, None), (False, torch.float16)])
def test_average_and_copy_are_optional(average, copy) -> None:
    full, held = tensors(), tensors(average=average, copy=copy)
    for index in range(2):
        step(full, gradients(index))
        step(held, gradients(index))
    assert same_bits(held, AdamWTensors(full.params, full.exp_avgs, full.exp_avg_sqs, full.steps,
                                        full.averages if average else None, full.copies if copy else None))  # fmt: skip


def test_kernel_and_reference_agree() -> None:
    """Steps that differ between tensors, warm-up of the average, and the default blocks and programs."""
    settings = AdamWSettings(ema_decay=0.9, ema_warmup=True, max_norm=0.5, weight_decay=0.01)
    pair = [tensors(torch.float64, config=MultiTensorLaunch()), tensors(torch.float64)]
    for held, kernels in zip(pair, ("triton", "reference"), strict=True):
        held.steps[2].fill_(40.0)
        for index in range(2):
            step(held, gradients(index), settings, kernels=kernels)
    for field in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
        assert_close(getattr(pair[0], field), getattr(pair[1], field))
    assert [float(count) for count in pair[0].steps] == [2, 2, 42, 2, 2, 2, 2]


def test_two_runs_agree_to_the_bit() -> None:
    pair = [tensors(), tensors()]
    for index in range(3):
        sums = [grad_square_sum(held, gradients(index), kernels="triton") for held in pair]
        assert torch.equal(*sums)
        for held in pair:
            step(held, gradients(index))
    assert same_bits(*pair)


def test_shards_have_the_bits_of_the_whole() -> None:
    """Cut unevenly, one shard empty, others not at 16 bytes: equal updates, and a sum of squares in another order."""
    settings = AdamWSettings(ema_decay=0.9)
    whole = tensors(shapes=((1003,),))
    cuts = (0, 333, 333, 590, 1003)
    ends = list(itertools.pairwise(cuts))
    parts = [tensors(shapes=((1003,),)) for _ in ends]
    shards = [
        AdamWTensors(*([[tensor[a:b] for tensor in getattr(held, field)] for field in FIELDS[:3]]), held.steps,
                     *([[tensor[a:b] for tensor in getattr(held, field)] for field in FIELDS[4:]]), config=CONFIG)
        for held, (a, b) in zip(parts, ends, strict=True)
    ]  # fmt: skip
    assert any(shard.params[0].data_ptr() % 16 for shard in shards)
    for index in range(3):
        (grad,) = (g.float() for g in gradients(index, ((1003,),)))
        total = grad_square_sum(whole, [grad], kernels="triton")
        sums = [
            grad_square_sum(shard, [grad[a:b]], kernels="triton")
            for shard, (a, b) in zip(shards, ends, strict=True)
        ]
        assert all(partial.shape == total.shape for partial in sums)
        assert_close(torch.stack(sums).double().sum().item(), total.double().sum().item())
        step(whole, [grad], settings)
        for shard, (a, b) in zip(shards, ends, strict=True):
            step(shard, [grad[a:b]], settings)
    for field in ("params", "exp_avgs", "exp_avg_sqs", "averages", "copies"):
        cat = torch.cat([getattr(shard, field)[0] for shard in shards])
        assert torch.equal(cat, getattr(whole, field)[0])
    # Nothing beside a shard was written.
    for held, (a, b) in zip(parts, ends, strict=True):
        assert torch.equal(held.params[0][:a], tensors(shapes=((1003,),)).params[0][:a])
        assert torch.equal(held.params[0][b:], tensors(shapes=((1003,),)).params[0][b:])


@pytest.mark.parametrize("offset", [0, 1, 4, 5])
def test_square_sum(offset) -> None:
    """Aligned or not, of several tensors, against float64; what stands behind a tensor is not counted."""
    grads = [torch.full((900,), float("nan"), device=DEVICE) for _ in range(2)]
    for grad, values in zip(grads, gradients(2, ((700,), (700,))), strict=True):
        grad[offset : offset + 700] = values
    views = [grad[offset : offset + 700] for grad in grads]
    sums = grad_square_sum(tensors(shapes=((700,), (700,))), views, kernels="triton")
    assert sums.shape == (CONFIG.norm_programs,)
    assert_close(sums.double().sum().item(), sum(view.double().square().sum().item() for view in views))


def test_found_inf_changes_nothing_and_a_bad_norm_is_not_hidden() -> None:
    held, kept = tensors(), tensors()
    bad = [grad.float() for grad in gradients(0)]
    bad[0][0, 0] = float("inf")
    step(held, bad, found_inf=torch.ones((), device=DEVICE))
    assert same_bits(held, kept)
    step(held, gradients(0), found_inf=torch.zeros((), device=DEVICE))
    step(kept, gradients(0))
    assert same_bits(held, kept)
    # As after clip_grad_norm_: a norm that is NaN reaches every parameter, so that it is seen.
    bad[0][0, 0] = float("nan")
    step(held, bad)
    assert all(p.isnan().all() for p in held.params)


def test_gradients_may_move_and_lie_otherwise() -> None:
    """A transposed or expanded gradient counts by its values; tables follow gradients to new memory."""
    shapes = ((6, 50), (50,))
    held, other = tensors(shapes=shapes), tensors(shapes=shapes)
    for index in range(3):
        matrix, vector = (grad.float() for grad in gradients(index, shapes))
        vector = vector[:1].expand(50)
        step(held, [matrix.t().contiguous().t(), vector])
        step(other, [matrix.clone(), vector.contiguous()])
    assert same_bits(held, other)


def test_the_learning_rate_is_read_on_the_device() -> None:
    held, other = tensors(), tensors()
    lr = rate(0.1)
    lr.fill_(3e-3)
    adamw_ema(held, gradients(0), lr, AdamWSettings(ema_decay=0.9), kernels="triton")
    adamw_ema(other, gradients(0), rate(), AdamWSettings(ema_decay=0.9), kernels="triton")
    assert same_bits(held, other)


def test_autograd_sees_that_parameters_changed() -> None:
    held = tensors(shapes=((4, 4),))
    held.params[0].requires_grad_()
    loss = held.params[0].square().sum()
    with torch.no_grad():
        step(held, gradients(0, ((4, 4),)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize(
    ("grads", "more", "message"),
    [
        ([torch.zeros(3)], {}, r"adamw_ema: 1 grads, expected 2"),
        (
            [torch.zeros(3), torch.zeros(5)],
            {},
            r"grads\[1\] is torch.float32 \(5,\) .* expected torch.float32 \(4,\)",
        ),
        ([torch.zeros(3), torch.zeros(4).half()], {}, r"grads\[1\] is torch.float16"),
        (
            [torch.zeros(3), torch.zeros(4)],
            {"lr": torch.zeros(2)},
            r"lr is \(2,\) on .*, expected one element",
        ),
        ([torch.zeros(3), torch.zeros(4)], {"found_inf": torch.zeros(2)}, r"found_inf is \(2,\)"),
        (
            [torch.zeros(3), torch.zeros(4)],
            {"settings": SETTINGS},
            "square_sum and settings.max_norm are given",
        ),
        ([torch.zeros(3), torch.zeros(4).long()], {}, r"grads\[1\] is torch.int64"),
        ([torch.zeros(3).long(), torch.zeros(4).long()], {}, r"grads are torch.int64, expected"),
    ],
)
def test_arguments_that_do_not_fit(grads, more, message, kernels) -> None:
    held, kept = tensors(shapes=((3,), (4,))), tensors(shapes=((3,), (4,)))
    more = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in more.items()}
    arguments = {"lr": rate(), "settings": AdamWSettings(), **more}
    with pytest.raises(ValueError, match=message):
        adamw_ema(held, [grad.to(DEVICE) for grad in grads], kernels=kernels, **arguments)
    assert same_bits(held, kept)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("params", [torch.zeros(4).half()], "params are torch.float16, expected float32 or float64"),
        ("params", [torch.zeros(8)[::2]], r"params\[0\] is .* strides \(2,\) .* no gaps"),
        ("params", [], "no parameters"),
        ("exp_avgs", [torch.zeros(5)], r"exp_avgs\[0\] is torch.float32 \(5,\)"),
        ("exp_avg_sqs", [torch.zeros(4).double()], r"exp_avg_sqs\[0\] is torch.float64"),
        ("averages", [torch.zeros(4)] * 2, "2 averages, expected 1"),
        ("copies", [torch.zeros(4)], "copies are torch.float32, expected bfloat16 or float16"),
        ("steps", [torch.zeros(1)], r"steps\[0\] is torch.float32 \(1,\)"),
        ("steps", [], "0 steps, expected 1"),
    ],
)
def test_tensors_that_do_not_fit(field, value, message) -> None:
    good = {name: getattr(tensors(shapes=((4,),)), name) for name in FIELDS}
    with pytest.raises(ValueError, match=f"adamw_ema: {message}"):
        AdamWTensors(**{**good, field: [tensor.to(DEVICE) for tensor in value]})
