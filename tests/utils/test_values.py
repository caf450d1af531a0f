"""Arguments of the API: NumPy's numbers are taken, empty batches are correct, anything else is one clear error."""

import copy
import dataclasses
import json
import math
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dit_fast.cli.labels import Labels
from dit_fast.data import from_arrays, open_data, open_images, open_stream
from dit_fast.data.encode import EncodeConfig
from dit_fast.data.stream import BatchStream
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError, DitFastError
from dit_fast.interop import load_model
from dit_fast.models import DiT
from dit_fast.sampling import Guidance, Sampler, SamplerConfig, flow_schedule
from dit_fast.training.config import TrainConfig
from dit_fast.utils import keyed
from dit_fast.utils.options import options_of, value_of
from dit_fast.utils.values import MANY, Flag, Number, OneOf, Place, Several, Text, Value, Whole
from tests.patience import PATIENCE
from tests.tolerance import assert_close

SMALL: dict[str, Any] = {
    "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3,
}  # fmt: skip
NOT_A_NUMBER: list[Any] = [
    "1",
    None,
    [1],
    math.nan,
    math.inf,
    -math.inf,
    True,
    np.bool_(True),
    10**400,
    1 + 2j,
]


@pytest.fixture(scope="module")
def model() -> DiT:
    """A model whose output depends on its input: the zeros of its initialization are replaced."""
    torch.manual_seed(0)
    model = DiT(**SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def digits(count: int = 12) -> Any:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 255, (count, 8, 8), dtype=np.uint8)
    return from_arrays("drawn", images, np.arange(count) % 3, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("value", "given", "taken"),
    [
        (Whole(), np.int64(3), 3), (Whole(), np.uint8(3), 3), (Whole(2, besides=(0,)), 0, 0),
        (Number(), 3, 3.0), (Number(), np.float32(0.5), 0.5), (Number(), np.int64(2), 2.0),
        (Flag(), np.bool_(False), False), (OneOf(("a", "b")), np.str_("b"), "b"), (Text(), "\u732b", "\u732b"),
    ],
)  # fmt: skip
def test_values_are_kept_in_pythons_types(value: Value, given: Any, taken: Any) -> None:
    kept = value.check("x", given)
    assert kept == taken
    assert type(kept) is type(taken)


@pytest.mark.parametrize("word", ["3", "+3", "003"])
def test_words_are_read_as_decimal_numbers(word: str) -> None:
    assert Whole()(word) == 3
    assert Number()(word) == 3.0


@pytest.mark.parametrize("given", [*NOT_A_NUMBER, 1.0, np.float64(1), -1, 10**30, MANY + 1])
def test_no_whole_number(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"^x .{1,70}: give a whole number from 1 to 1000000000000$"):
        Whole().check("x", given)


@pytest.mark.parametrize("given", [*NOT_A_NUMBER, -1, 1e300, "nan"])
def test_no_number(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"^x .{1,70}: give a number above 0, up to 3e\+38$"):
        Number(above=True).check("x", given)


@pytest.mark.parametrize(
    ("value", "inside", "outside"),
    [
        (Number(0, 1, above=True), (5e-324, 1), (0, math.nextafter(1, 2))),
        (Number(0, 1, below=True), (0, math.nextafter(1, 0)), (-5e-324, 1)),
        (Whole(1, 3), (1, 3), (0, 4)),
    ],
)
def test_limits_are_in_or_out(value: Value, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert tuple(value.check("x", each) for each in inside) == inside
    for each in outside:
        with pytest.raises(ConfigError):
            value.check("x", each)


@pytest.mark.parametrize(
    "given", ["", " ", "a\0", "x" * 256, "d/" + "\u00e9" * 128, "a/" * 2100, b"x", 3, None]
)
def test_no_path(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"^x .*: give a path"):
        Place().check("x", given)


CONFIGS: list[tuple[type, dict[str, Any]]] = [
    (TrainConfig, {"data": "digits"}),
    (EncodeConfig, {"data": "images", "out": "set"}),
    (SamplerConfig, {}),
    (Guidance, {}),
]


@pytest.mark.parametrize(("config", "needed"), CONFIGS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_field_of_a_configuration_has_its_values(config: type, needed: dict[str, Any]) -> None:
    fields = {field.name for field in dataclasses.fields(config)}
    ranges = {field.name: value_of(field) for field in options_of(config)}
    assert fields - ranges.keys() <= {"guidance", "device"}
    built = config(**needed)
    for field, value in ranges.items():
        empty = () if isinstance(value, Several) else ([],)
        for nonsense in ("", "\0", math.nan, -1, 10**40, 10**400, *empty, object(), b"x"):
            with pytest.raises(ConfigError) as caught:
                config(**{**needed, field: nonsense})
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 400
        given = getattr(built, field)
        if isinstance(value, Whole) and given is not None:
            kept = getattr(config(**{**needed, field: np.int64(given)}), field)
            assert (kept, type(kept)) == (given, int)
    json.dumps(dataclasses.asdict(built))


def test_sizes_of_a_model_are_pythons(model: DiT) -> None:
    sized = DiT(**{name: np.int64(value) for name, value in SMALL.items()})
    assert json.dumps(sized.config) == json.dumps(model.config)
    for field in SMALL:
        for nonsense in ("1", 1.5, True, math.nan, 10**30):
            with pytest.raises(ConfigError):
                DiT(**{**SMALL, field: nonsense})


def test_an_empty_batch_has_an_empty_output(model: DiT) -> None:
    nothing, labels = torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64)
    assert model(nothing, labels, labels).shape == (0, 2, 8, 8)
    assert model.forward_with_cfg(nothing, labels, labels, 4.0).shape == (0, 2, 8, 8)
    assert model.forward_mixed([], labels, labels) == []
    sampler = Sampler(model, create_diffusion("2"))
    for empty in ([], np.array([]), labels, iter(())):
        drawn = sampler(empty)
        assert drawn.shape == (0, 1, 8, 8)
        assert drawn.dtype == torch.float32


def test_guidance_takes_pairs(model: DiT) -> None:
    x, t, y = torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1])
    with pytest.raises(ConfigError, match="a batch of 1: guidance takes pairs"):
        model.forward_with_cfg(x, t, y, 4.0)
    two = Sampler(model, create_diffusion("2"))([1, 1])
    one = Sampler(model, create_diffusion("2"))([1])
    assert_close(one[0], two[0])


X, T, Y = torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("scale", [*NOT_A_NUMBER, 1e7, -1e7, np.float32("nan")])
def test_no_guidance_scale(model: DiT, scale: Any) -> None:
    with pytest.raises(ConfigError, match=r"^cfg_scale .{1,70}: give a number from -1e\+06"):
        model.forward_with_cfg(X, T, Y, scale)


def test_guidance_scales_of_any_kind(model: DiT) -> None:
    x, t, y = torch.randn(4, 1, 8, 8), torch.full((4,), 3), torch.tensor([1, 2, 3, 3])
    expected = model.forward_with_cfg(x, t, y, 2.0)
    for scale in (2, np.float32(2), np.int64(2), torch.tensor(2.0), torch.full((2, 1, 1, 1), 2.0)):
        assert torch.equal(model.forward_with_cfg(x, t, y, scale), expected)
    assert not torch.equal(model.forward_with_cfg(x, t, y, -1.0), expected)


@pytest.mark.parametrize(
    ("x", "t", "y", "message"),
    [
        (X[0], T, Y, r"x is \(1, 8, 8\): give images"),
        (torch.zeros(2, 3, 8, 8), T, Y, r"x is \(2, 3, 8, 8\): give images \(N, 1, height, width\)"),
        (torch.zeros(2, 1, 9, 9), T, Y, "input_size 9x9 is not a positive multiple of patch_size 4"),
        (X, T[0], Y, r"t is \(\): give a tensor of 2 timesteps"),
        (X, 3, Y, "t is 3: give a tensor of 2 timesteps"),
        (X, torch.zeros(3), Y, r"t is \(3,\): give a tensor of 2 timesteps"),
        (X, T, None, "y is NoneType: the model has 3 classes"),
        (X, T, np.zeros(2, int), "y is ndarray: the model has 3 classes"),
        (X, T, Y.float(), r"y is torch\.float32: give labels of an integer dtype"),
        (X, T, Y.bool(), r"y is torch\.bool: give labels of an integer dtype"),
        (X, T, torch.zeros(3, dtype=torch.int64), "y has 3 rows, x 2"),
        (X, T, Y + 9, "labels are 9 to 9: the model has 3 classes, 0 to 2"),
        (X, T, Y - 1, "labels are -1 to -1"),
        (X.to("meta"), T, Y, "x is on meta, the model on cpu"),
        (X, T, Y.to("meta"), "y is on meta, the model on cpu"),
    ],
)
def test_inputs_that_do_not_fit_a_model(model: DiT, x: Any, t: Any, y: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(x, t, y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_any_integer_dtype(model: DiT, dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 2])
    assert torch.equal(model(X, T, labels.to(dtype)), model(X, T, labels))
    sampler = Sampler(model, create_diffusion("2"))
    assert torch.equal(sampler(labels.to(dtype)), sampler(labels))
    # The null class of guidance is beyond the range of 8 bits.
    many = DiT(**{**SMALL, "num_classes": 300}).eval()
    for parameter in many.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    guided = Sampler(many, create_diffusion("2"), SamplerConfig(guidance=Guidance(4.0)))
    assert torch.equal(guided(labels.to(dtype)), guided(labels))


def test_numpys_integers_are_numbers(model: DiT) -> None:
    for steps in (np.int64(4), np.uint8(4), [np.int64(4)], np.array([4])):
        assert create_diffusion(steps).timestep_map == create_diffusion(4).timestep_map
    assert np.array_equal(flow_schedule(np.int32(3)).times, flow_schedule(3).times)
    sampler = Sampler(model, create_diffusion(np.int64(2)))
    expected = sampler([1, 2, 0], seed=3, numbers=torch.tensor([4, 5, 6]), batch_size=2)
    for labels in (np.array([1, 2, 0]), [np.int64(1), np.uint8(2), 0], np.array([1, 2, 0], dtype=np.int8)):
        drawn = sampler(labels, seed=np.int64(3), numbers=np.array([4, 5, 6]), batch_size=np.int64(2))
        assert torch.equal(drawn, expected)
    assert Guidance(np.float32(4), np.int64(3)) == Guidance(4.0, 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda m: Sampler(m, 25),
            'process 25: give a diffusion process, for example create_diffusion("25")',
        ),
        (lambda m: Sampler(m, np.int64(25)), "process 25: give a diffusion process"),
        (lambda m: Sampler("DiT-S/2", create_diffusion(2)), "model 'DiT-S/2': give a DiT"),
        (lambda m: Sampler(m, create_diffusion(2), 4.0), "config 4.0: give a SamplerConfig"),
        (lambda m: Sampler(m, create_diffusion(2), Guidance(4.0)), "give a SamplerConfig"),
        (lambda m: SamplerConfig(guidance=4.0), "guidance 4.0: give a Guidance, for example Guidance(4.0)"),
        (lambda m: Guidance(interval=0.5), "guidance interval 0.5: give two noise levels"),
        (lambda m: create_diffusion(25.0), "timestep respacing 25.0 is invalid"),
        (
            lambda m: create_diffusion("4", diffusion_steps=10**12),
            "diffusion steps 1000000000000: give a whole",
        ),
        (lambda m: flow_schedule(10**12), "steps 1000000000000: give a whole number from 1 to 1048576"),
        (lambda m: flow_schedule(3, start=math.nan), "start nan: give a number from 0, below 1"),
        (lambda m: Sampler(m, create_diffusion(2))(3), "labels 3: give a tensor or a sequence of integers"),
        (lambda m: Sampler(m, create_diffusion(2))(["1"]), "labels ['1']: give a tensor or a sequence"),
        (
            lambda m: Sampler(m, create_diffusion(2))([True]),
            "labels are torch.bool (1,), expected one integer",
        ),
        (
            lambda m: Sampler(m, create_diffusion(2))([1.0]),
            "labels are torch.float64 (1,), expected one integer",
        ),
        (lambda m: Sampler(m, create_diffusion(2))([10**30]), "give a tensor or a sequence of integers"),
        (lambda m: Sampler(m, create_diffusion(2))(Y.to("meta")), "give a tensor or a sequence of integers"),
        (lambda m: Sampler(m, create_diffusion(2))([1], seed=1.5), "seed 1.5: give a whole number from 0"),
        (lambda m: Sampler(m, create_diffusion(2))([1], every=1.5), "every 1.5: give a whole number from 1"),
        (
            lambda m: Sampler(m, create_diffusion(2))([1], numbers=[-3]),
            "numbers contain -3: samples are numbered from 0",
        ),
        (lambda m: open_stream(digits(), 0, 0, False), "batch_size 0: give a whole number from 1"),
        (lambda m: open_stream(digits(), 4.0, 0, False), "batch_size 4.0: give a whole number"),
        (lambda m: open_stream(digits(), 4, None, False), "seed None: give a whole number"),
        (lambda m: open_stream(digits(), 4, 0, False).batch(-1), "step -1: give a whole number from 0"),
        (lambda m: open_images("digits", "8"), "size '8': give SIZE or HEIGHTxWIDTH"),
        (lambda m: open_images("digits", (8, 8, 8)), "size (8, 8, 8): give SIZE or HEIGHTxWIDTH"),
        (lambda m: open_images("digits", holdout="x"), "--holdout 'x': give a number from 0, below 1"),
        (lambda m: open_images(""), "--data '': give a path"),
        (lambda m: open_data("x" * 300), "give a path that is not empty"),
        (lambda m: load_model(""), "path '': give a path"),
        (lambda m: load_model("x" * 300), "give a path that is not empty"),
        (lambda m: load_model(None), "path None: give a path"),
        (lambda m: load_model("x", weights=3), "weights 3: give text"),
    ],
)
def test_nonsense_is_one_clear_error(model: DiT, build: Callable[[DiT], Any], message: str) -> None:
    with pytest.raises(DitFastError) as caught:
        build(model)
    assert isinstance(caught.value, ValueError)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _first(stream: BatchStream, results: Any) -> None:
    images, labels = stream.batch(3)
    results.put((images.numpy(), labels.numpy()))


def test_streams_and_samplers_are_pickled_and_copied(model: DiT) -> None:
    stream = open_stream(digits(), np.int64(4), np.int64(7), True)
    expected = stream.batch(3)
    for again in (pickle.loads(pickle.dumps(stream)), copy.deepcopy(stream)):
        assert all(torch.equal(a, b) for a, b in zip(again.batch(3), expected, strict=True))
        assert again._order._queues is not stream._order._queues
    for precision in (None, "bf16"):
        sampler = Sampler(model, create_diffusion("2"), SamplerConfig(precision=precision))
        drawn = sampler([0, 1])
        for copied in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)):
            assert torch.equal(copied([0, 1]), drawn)


def test_a_stream_goes_to_a_worker_that_is_spawned() -> None:
    stream = open_stream(digits(), 4, 7, True)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=_first, args=(stream, results))
    worker.start()
    images, labels = results.get(timeout=PATIENCE)
    worker.join(PATIENCE)
    assert np.array_equal(images, stream.batch(3)[0].numpy())
    assert np.array_equal(labels, stream.batch(3)[1].numpy())


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"diffusion_steps": 20}, False),
        ({"diffusion_steps": 20, "prediction": "x0"}, True),
        ({"diffusion_steps": 20, "prediction": "v"}, True),
        ({"diffusion_steps": 21}, True),
        ({"diffusion_steps": 20, "noise_schedule": "squaredcos_cap_v2"}, True),
        ({"diffusion_steps": 19}, False),
        ({"diffusion_steps": 1, "noise_schedule": "squaredcos_cap_v2"}, True),
    ],
)
def test_what_cannot_be_sampled_is_not_trained(options: dict[str, Any], fits: bool) -> None:
    if fits:
        TrainConfig(data="digits", **options)
        return
    with pytest.raises(ConfigError, match=r"diffusion.steps"):
        TrainConfig(data="digits", **options)


def test_labels_of_any_number_of_samples_are_computed_where_they_are_read() -> None:
    many = 3 * 10**11
    drawn = Labels.random(many, 7, 10)
    numbers = torch.tensor([0, 5, many - 1])
    assert torch.equal(drawn.of(numbers), keyed.integers(keyed.key(7, "sampling labels"), numbers, 10))
    assert torch.equal(drawn.first(6)[5], drawn.of(numbers)[1])
    turn = Labels.in_turn(many, [4, 2])
    assert turn.of(numbers).tolist() == [4, 2, 2]
    assert turn.first(5).tolist() == [4, 2, 4, 2, 4]
    assert len(Labels.in_turn(3, [1]).first(5)) == 3
    assert len({turn.rule, drawn.rule, Labels.in_turn(3, [4]).rule}) == 3


def test_one_timestep_is_that_of_the_batch(model: DiT) -> None:
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x, torch.tensor([3]), Y), model(x, torch.tensor([3, 3]), Y))
