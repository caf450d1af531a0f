"""Sampling: reproducible, guided as the reference guides, independent of batches, and refused where it cannot be."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.models.plain_dit import PlainDiT
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError, NonFiniteError, OutputError
from dit_fast.models import DiT
from dit_fast.sampling import (
    SOLVERS,
    Guidance,
    Sampler,
    SamplerConfig,
    draw_grid,
    flow_schedule,
    to_uint8,
)
from dit_fast.sampling.progress import Progress
from dit_fast.sampling.schedule import VELOCITY_SOLVERS
from dit_fast.sampling.trajectory import KeyedNoise
from dit_fast.utils.files import prepare_folder, write_atomically
from dit_fast.utils.images import grid_layout
from tests.golden import GOLDEN, golden_model, seeded
from tests.small_models import small_model as build
from tests.tolerance import SUM, assert_close, rounding

small_model = partial(build, input_size=4)


@pytest.fixture(scope="module")
def model() -> DiT:
    return small_model()


@pytest.fixture(scope="module")
def diffusion():
    return create_diffusion("6")


def draw(model, process, labels, *, seed=0, batch_size=64, numbers=None, scale=4.0, channels=3, **config):
    guidance = Guidance(scale, channels)
    sampler = Sampler(model, process, SamplerConfig(guidance=guidance, **config))
    return sampler(labels, seed=seed, batch_size=batch_size, numbers=numbers)


def relative(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_same_seed_same_images_other_seed_others(model, diffusion):
    first, again, other = (draw(model, diffusion, [0, 1, 2], seed=seed) for seed in (5, 5, 6))
    assert first.shape == (3, 4, 4, 4)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert (first - other).abs().min() > 0


# The steps of dopri5 are those of the batch.
@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver != "dopri5"])
def test_a_sample_depends_on_its_number_not_on_its_batch(model, diffusion, solver):
    """Sample i is the same in batches of 1, 4 and 8, and wherever in a batch it stands."""
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    if solver.startswith("sde") or solver in VELOCITY_SOLVERS:
        diffusion = flow_schedule(6, start=0.1)
    whole = draw(model, diffusion, labels, solver=solver, eta=0.5)
    for size in (1, 4):
        assert_close(draw(model, diffusion, labels, solver=solver, eta=0.5, batch_size=size), whole)
    order = torch.tensor([6, 1, 3])
    some = draw(model, diffusion, labels[order], numbers=order, solver=solver, eta=0.5)
    assert_close(some, whole[order])
    assert (whole[0] - whole[5]).abs().max() > 1e-2, "samples of one class have noise of their own"


@torch.no_grad()
@pytest.mark.parametrize("scale", [2.5, 1.0])
def test_reference_mode_is_sample_py_on_a_plain_model(scale):
    """250 DDPM steps in float32 against the plain DiT and the paper's equations, with the reference's draws.

    n noises doubled, null labels for the second half, guidance on three channels, a draw for all 2n at each step, the
    first half kept. Untrained models leave the range of data: differences are relative to the largest value.
    """
    ours = small_model()
    plain = PlainDiT(**ours.config).eval()
    plain.load_state_dict(ours.state_dict())
    diffusion = create_diffusion("250")
    labels = [3, 1]
    drawn = draw(ours, diffusion, labels, scale=scale, seed=7, mode="reference")

    torch.manual_seed(7)
    x = torch.randn(2, 4, 4, 4)
    y = torch.tensor(labels)
    if scale != 1:
        x, y = torch.cat([x, x]), torch.tensor([*labels, 5, 5])
    bars = diffusion.alphas_cumprod.tolist()
    for i in reversed(range(250)):
        before = bars[i - 1] if i else 1.0
        beta = 1 - bars[i] / before
        posterior = beta * (1 - before) / (1 - bars[i])
        if i == 0:
            posterior = (1 - bars[1] / bars[0]) * (1 - bars[0]) / (1 - bars[1])
        inputs = x if scale == 1 else torch.cat([x[:2], x[:2]])
        out = plain(inputs, torch.full((len(x),), diffusion.timestep_map[i]), y)
        eps, values = out[:, :4], out[:, 4:]
        if scale != 1:
            guided = eps[2:, :3] + scale * (eps[:2, :3] - eps[2:, :3])
            eps = torch.cat([torch.cat([guided, guided]), eps[:, 3:]], dim=1)
        data = (x - math.sqrt(1 - bars[i]) * eps) / math.sqrt(bars[i])
        mean = (
            beta * math.sqrt(before) / (1 - bars[i]) * data
            + (1 - before) * math.sqrt(1 - beta) / (1 - bars[i]) * x
        )
        log_variance = (values + 1) / 2 * math.log(beta) + (1 - values) / 2 * math.log(posterior)
        x = mean + (i > 0) * (log_variance / 2).exp() * torch.randn_like(x)
    assert_close(drawn, x[:2], terms=4096)


def test_reference_mode_is_the_drop_in_s_loop(model, diffusion):
    """The reference's own calls, on the drop-in's model and diffusion; a second batch has a seed of its own."""
    for respaced in (diffusion, create_diffusion("250")):
        torch.manual_seed(7)
        noise = torch.randn(2, 4, 4, 4)
        with torch.no_grad():
            expected = respaced.p_sample_loop(
                model.forward_with_cfg,
                (4, 4, 4, 4),
                torch.cat([noise, noise]),
                clip_denoised=False,
                model_kwargs={"y": torch.tensor([3, 1, 5, 5]), "cfg_scale": 2.5},
                device=torch.device("cpu"),
            )
        drawn = draw(model, respaced, [3, 1, 2], scale=2.5, seed=7, mode="reference", batch_size=2)
        assert_close(drawn[:2], expected[:2])
        assert (drawn[2] - drawn[0]).abs().max() > 1e-2


def test_golden_ddim25_through_the_sampler(monkeypatch):
    """The recorded trajectory of the reference, from its own start: 1e-5 of the largest value."""
    start = seeded("ax", 4, 4, 8, 8)
    monkeypatch.setattr("dit_fast.sampling.trajectory.KeyedNoise.start", lambda self: start)
    drawn = draw(golden_model(), create_diffusion("ddim25"), [0, 1, 2, 4], scale=1.0, solver="ddim")
    assert_close(drawn, torch.from_numpy(GOLDEN["a.ddim25"]))


@pytest.mark.parametrize("channels", [3, None, 1])
def test_reference_and_fast_mode_guide_alike(model, channels):
    """From one start, without noise on the way, the two modes give the same images."""
    diffusion = create_diffusion("ddim10")
    torch.manual_seed(0)
    noise = torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        expected = diffusion.ddim_sample_loop(
            model.forward_with_cfg,
            (6, 4, 4, 4),
            torch.cat([noise, noise]),
            clip_denoised=False,
            model_kwargs={"y": torch.tensor([0, 1, 2, 5, 5, 5]), "cfg_scale": 3.0, "cfg_channels": channels},
        )[:3]
    drawn = draw(model, diffusion, [0, 1, 2], scale=3.0, channels=channels, solver="ddim", mode="reference")
    assert_close(drawn, expected)


def test_fast_mode_has_the_reference_moments(model, diffusion):
    """Other draws of the same distribution: mean and spread over many samples of one class agree."""
    slow, fast = (
        draw(model, diffusion, [1] * 512, scale=2.0, batch_size=512, mode=mode)
        for mode in ("reference", "fast")
    )
    assert not torch.equal(slow, fast)
    spread = slow.std(dim=0)
    assert ((slow.mean(dim=0) - fast.mean(dim=0)).abs() / (spread / 16)).max() < 4.5
    assert (fast.std(dim=0) / spread - 1).abs().max() < 0.2


def test_full_batches_of_the_reference_do_not_depend_on_what_follows(model, diffusion):
    options = {"batch_size": 2, "mode": "reference"}
    long = draw(model, diffusion, [0, 1, 0, 3, 4, 0], **options)
    assert torch.equal(long[:4], draw(model, diffusion, [0, 1, 0, 3], **options))
    assert (long[0] - long[2]).abs().max() > 1e-3, "batches must not share their noise"


def test_ddim_eta_1_draws_noise(model):
    diffusion = create_diffusion("ddim10")
    none, full = (draw(model, diffusion, [1], scale=1.0, solver="ddim", eta=eta) for eta in (0.0, 1.0))
    assert (none - full).abs().max() > 1e-2


def test_clip_keeps_pixels_in_range(model, diffusion):
    assert draw(model, diffusion, [1] * 4).abs().max() > 1.5
    assert draw(model, diffusion, [1] * 4, clip=True).abs().max() <= 1.0


def test_random_state_and_training_mode_are_left_alone(model, diffusion):
    model.train()
    torch.manual_seed(11)
    expected = torch.rand(3)
    for mode in ("fast", "reference"):
        torch.manual_seed(11)
        draw(model, diffusion, [0], mode=mode)
        assert torch.equal(torch.rand(3), expected)
    assert model.training
    model.eval()


def test_labels_are_never_dropped(diffusion):
    model = small_model(class_dropout_prob=0.9).train()
    drawn = draw(model, diffusion, [1, 2], scale=1.0)
    assert torch.equal(drawn, draw(model.eval(), diffusion, [1, 2], scale=1.0))


@pytest.mark.parametrize("size", [(4, 8), (6, 2)])
def test_sizes_that_are_not_square(diffusion, size):
    model = small_model(input_size=size, in_channels=1)
    assert draw(model, diffusion, [0, 1]).shape == (2, 1, *size)


def test_precision_is_of_the_loop_not_of_the_states(model, diffusion):
    exact = draw(model, diffusion, [0, 1], scale=1.0)
    for precision, bound in (("bf16", 3e-2), ("fp16", 4e-3)):
        drawn = draw(model, diffusion, [0, 1], scale=1.0, precision=precision)
        assert drawn.dtype == torch.float32
        assert 0 < relative(drawn, exact) < bound
    assert model.pos_embed.dtype == torch.float32


@pytest.mark.parametrize("solver", ["euler", "ddim", "heun", "straight-heun", "dpm++2m"])
def test_models_of_flow_matching(solver):
    """A model of the velocity: Euler's method is x + dt v, with t from 0 (noise) to 1 (data) as the model reads it."""
    model = small_model(learn_sigma=False, in_channels=1)
    schedule = flow_schedule(4)
    drawn = draw(model, schedule, [0, 1], scale=1.0, solver=solver)
    x = KeyedNoise(0, torch.arange(2), (1, 4, 4)).start()
    with torch.no_grad():
        for t in (0.0, 0.25, 0.5, 0.75):
            x = x + 0.25 * model(x, torch.full((2,), t), torch.tensor([0, 1]))
    error, four_steps = relative(drawn, x), rounding(4 * SUM)
    assert error <= four_steps if solver in ("euler", "ddim") else four_steps < error < 0.2


@pytest.mark.parametrize(
    ("labels", "options", "line"),
    [
        ([0, 5], {}, "label 5 is out of range: the model has 5 classes, 0 to 4"),
        ([-1], {}, "label -1 is out of range"),
        ([0.5], {}, "expected one integer per image"),
        ([0], {"scale": float("nan")}, "guidance scale nan"),
        ([0], {"scale": -1.0}, r"guidance scale -1\.0"),
        ([0], {"channels": 0}, "guidance channels 0"),
        ([0], {"solver": "rk45"}, "solver 'rk45': give one of ddpm, ddim"),
        ([0], {"mode": "quick"}, "mode 'quick': give one of fast, reference"),
        ([0], {"precision": "fp4"}, "precision 'fp4': give one of fp32, bf16, fp16"),
        ([0], {"graph": "always"}, "graph 'always'"),
        ([0], {"eta": 2.0}, r"eta 2\.0"),
        ([0], {"table_bytes": 0}, "table_bytes 0"),
        ([0], {"batch_size": 0}, "batch_size 0"),
        ([0], {"seed": -1}, "seed -1"),
        ([0], {"numbers": torch.zeros(2)}, r"numbers are torch\.float32 \(2,\), expected int64 \(1,\)"),
    ],
)
def test_impossible_requests_are_refused(model, diffusion, labels, options, line):
    with pytest.raises(ConfigError, match=line):
        draw(model, diffusion, labels, **options)


def test_models_that_do_not_fit_the_request(diffusion):
    plain = small_model(class_dropout_prob=0.0, learn_sigma=False)
    with pytest.raises(ConfigError, match=r"guidance scale 4\.0 needs a model trained with label dropout"):
        draw(plain, diffusion, [0])
    with pytest.raises(ConfigError, match="learned variance and the model predicts none"):
        draw(plain, diffusion, [0], scale=1.0)
    with pytest.raises(ConfigError, match="solver ddpm applies only to diffusion models"):
        draw(plain, flow_schedule(4), [0], scale=1.0)
    fixed = create_diffusion("6", learn_sigma=False)
    assert draw(plain, fixed, [0], scale=1.0).isfinite().all()
    with pytest.raises(ConfigError, match="every 0: give a whole number from 1"):
        Sampler(plain, fixed, SamplerConfig(guidance=Guidance(1.0)))([0], every=0)


def test_nan_weights_are_reported(diffusion):
    model = small_model()
    with torch.no_grad():
        model.final_layer.linear.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="2 of 2 samples have NaN"):
        draw(model, diffusion, [0, 1])


def test_steps_are_reported_with_their_states(model):
    seen = []
    sampler = Sampler(model, create_diffusion("7"))
    drawn = sampler([0, 1, 2], batch_size=2, on_step=seen.append, every=3)
    assert [(s.first, s.images, s.done, s.total) for s in seen] == [
        (0, 2, 3, 7), (0, 2, 6, 7), (0, 2, 7, 7), (2, 1, 3, 7), (2, 1, 6, 7), (2, 1, 7, 7),
    ]  # fmt: skip
    assert torch.equal(seen[2].state, drawn[:2])
    assert torch.equal(seen[5].state, drawn[2:])
    assert torch.equal(drawn, sampler([0, 1, 2], batch_size=2))


def test_progress_lines_without_a_terminal(model, capsys, monkeypatch):
    monkeypatch.setattr("dit_fast.sampling.progress._LOG_SECONDS", 0.0)
    progress = Progress(3, 4)
    sampler = Sampler(model, create_diffusion("4"))
    sampler([0, 1], on_step=progress.step)
    progress.finish(2)
    sampler([2], on_step=progress.step)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert lines[5].startswith("sampling: 2 of 3 images done, step 1 of 4, ")
    assert capsys.readouterr().out == ""


# Pictures


def test_uint8_rule_clamps_and_truncates():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.0039, 0.99, 1.0, 3.0]).reshape(1, 1, 1, 7)
    assert to_uint8(values).flatten().tolist() == [0, 0, 128, 128, 254, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_holds_every_pixel_at_its_place(channels):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (5, 8, 8, channels), dtype=np.uint8)
    rows = [("zero", images[:3]), ("a rather long name", images[3:])]
    layout = grid_layout(rows)
    picture = draw_grid(rows)
    assert (layout.tile_height, layout.tile_width, layout.columns, layout.rows) == (56, 56, 3, 2)
    assert picture.size == layout.size == (24 + layout.left + 3 * 60 - 4, 24 + 2 * 60 - 4)
    pixels = np.asarray(picture)
    for row, column, index in [(0, 0, 0), (0, 2, 2), (1, 1, 4)]:
        x, y = layout.corner(row, column)
        tile = pixels[y : y + 56, x : x + 56]
        expected = np.broadcast_to(images[index].repeat(7, axis=0).repeat(7, axis=1), (56, 56, 3))
        assert np.array_equal(tile, expected)
    x, y = layout.corner(1, 2)
    assert (pixels[y : y + 56, x : x + 56] == 255).all(), "a short row ends in paper"
    labels = pixels[:, : layout.left]
    assert (labels < 100).any(axis=(1, 2))[12:68].any(), "the first row has its label"
    assert (labels < 100).any(axis=(1, 2))[72:128].any(), "the second row has its label"
    assert (labels[:, :12] == 255).all(), "no label leaves the margin"


def test_large_images_are_not_enlarged():
    rows = [("", np.zeros((1, 64, 80, 3), dtype=np.uint8))]
    assert draw_grid(rows).size == (24 + 80, 24 + 64)


# Files


def test_interrupted_writes_leave_the_old_file(tmp_path):
    path = tmp_path / "sample.png"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"cannot write .*sample\.png \(No space left on device\)"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["sample.png"]
    written = []

    def save(temporary):
        Image.new("L", (2, 2)).save(temporary)
        written.append(temporary.stat().st_ino)

    write_atomically(path, save)
    assert Image.open(path).size == (2, 2)
    assert path.stat().st_ino == written[0], "renamed into place, never copied over the old file"


def test_folder_problems_are_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to .*file"):
        prepare_folder(tmp_path / "file")
    with pytest.raises(OutputError, match=r"cannot write to .*file/below"):
        prepare_folder(tmp_path / "file" / "below")
    with pytest.raises(OutputError, match=r"no space in .*: 1099511627776\.0 MiB needed"):
        prepare_folder(tmp_path / "new", needed_bytes=2**60)
    prepare_folder(tmp_path / "new", needed_bytes=1)
    assert list((tmp_path / "new").iterdir()) == []
