"""Sampling: reproducible, guided as the reference guides, and refused where the model cannot do it."""

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError, NonFiniteError, OutputError
from dit_fast.models import DiT
from dit_fast.sampling import draw_grid, sample, to_uint8
from dit_fast.sampling.grid import grid_layout
from dit_fast.sampling.output import prepare_folder, write_atomically


def small_model(**changes) -> DiT:
    sizes = {
        "input_size": 4,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
    }
    torch.manual_seed(0)
    model = DiT(**{**sizes, "num_classes": 5, **changes})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> DiT:
    return small_model()


@pytest.fixture(scope="module")
def diffusion():
    return create_diffusion("6")


def test_same_seed_same_images_other_seed_others(model, diffusion):
    first, again, other = (
        sample(model, diffusion, [0, 1, 2], seed=seed, progress=False) for seed in (5, 5, 6)
    )
    assert first.shape == (3, 4, 4, 4)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert (first - other).abs().min() > 0


def test_reference_mode_is_the_recipe_of_sample_py(model, diffusion):
    """n noises doubled, null labels for the second half, a draw for all 2n at each step, first half kept."""
    torch.manual_seed(7)
    noise = torch.randn(2, 4, 4, 4)
    expected = diffusion.p_sample_loop(
        model.forward_with_cfg,
        (4, 4, 4, 4),
        torch.cat([noise, noise]),
        clip_denoised=False,
        model_kwargs={"y": torch.tensor([3, 1, 5, 5]), "cfg_scale": 2.5},
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        drawn = sample(model, diffusion, [3, 1], cfg_scale=2.5, seed=7, progress=False)
    assert torch.equal(drawn, expected[:2].detach())


def test_scale_1_is_the_unguided_model(model, diffusion):
    torch.manual_seed(3)
    expected = diffusion.p_sample_loop(
        model,
        (2, 4, 4, 4),
        clip_denoised=False,
        model_kwargs={"y": torch.tensor([0, 4])},
        device=torch.device("cpu"),
    ).detach()
    calls = []
    model.forward_with_cfg, guided = lambda *a, **k: calls.append(a), model.forward_with_cfg
    try:
        drawn = sample(model, diffusion, [0, 4], cfg_scale=1.0, seed=3, progress=False)
    finally:
        model.forward_with_cfg = guided
    assert torch.equal(drawn, expected)
    assert calls == []


@pytest.mark.parametrize("channels", [3, None, 1])
def test_fast_mode_equals_reference_mode_where_no_noise_is_drawn(model, channels):
    diffusion = create_diffusion("ddim10")
    options = {"cfg_scale": 3.0, "cfg_channels": channels, "solver": "ddim", "progress": False}
    slow, fast = (sample(model, diffusion, [0, 1, 2], mode=mode, **options) for mode in ("reference", "fast"))
    assert (slow - fast).abs().max() < 1e-5
    assert slow.abs().max() > 0.1


def test_fast_mode_has_the_reference_moments(model, diffusion):
    """Other draws of the same distribution: mean and spread over many samples of one class agree."""
    options = {"cfg_scale": 2.0, "progress": False, "batch_size": 512}
    slow, fast = (sample(model, diffusion, [1] * 512, mode=mode, **options) for mode in ("reference", "fast"))
    assert not torch.equal(slow, fast)
    spread = slow.std(dim=0)
    assert ((slow.mean(dim=0) - fast.mean(dim=0)).abs() / (spread / 16)).max() < 4.5
    assert (fast.std(dim=0) / spread - 1).abs().max() < 0.2


def test_guided_channels_reach_the_model(model):
    diffusion = create_diffusion("ddim5")
    three, every = (
        sample(model, diffusion, [1], cfg_scale=4.0, cfg_channels=n, solver="ddim", progress=False)
        for n in (3, None)
    )
    assert (three[:, 3] - every[:, 3]).abs().max() > 1e-3


def test_full_batches_do_not_depend_on_what_follows(model, diffusion):
    long = sample(model, diffusion, [0, 1, 0, 3, 4, 0], batch_size=2, progress=False)
    short = sample(model, diffusion, [0, 1, 0, 3], batch_size=2, progress=False)
    assert torch.equal(long[:4], short)
    assert (long[0] - long[2]).abs().max() > 1e-3, "batches must not share their noise"


def test_ddim_eta_1_draws_noise_and_eta_0_none(model):
    diffusion = create_diffusion("ddim10")

    def draw(eta):
        return sample(model, diffusion, [1], cfg_scale=1.0, solver="ddim", eta=eta, progress=False)

    assert torch.equal(draw(0.0), draw(0.0))
    assert (draw(1.0) - draw(0.0)).abs().max() > 1e-2


def test_clip_denoised_keeps_pixels_in_range(model, diffusion):
    assert sample(model, diffusion, [1] * 4, clip_denoised=False, progress=False).abs().max() > 1.5
    assert sample(model, diffusion, [1] * 4, clip_denoised=True, progress=False).abs().max() <= 1.0


def test_random_state_and_training_mode_are_left_alone(model, diffusion):
    model.train()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    sample(model, diffusion, [0], progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    model.eval()


def test_sampling_runs_in_eval_mode(diffusion):
    model = small_model(class_dropout_prob=0.9).train()
    drawn = sample(model, diffusion, [1, 2], cfg_scale=1.0, progress=False)
    assert torch.equal(drawn, sample(model.eval(), diffusion, [1, 2], cfg_scale=1.0, progress=False))


@pytest.mark.parametrize("size", [(4, 8), (6, 2)])
def test_sizes_that_are_not_square(diffusion, size):
    model = small_model(input_size=size, in_channels=1)
    assert sample(model, diffusion, [0, 1], progress=False).shape == (2, 1, *size)


@pytest.mark.parametrize(
    ("labels", "options", "line"),
    [
        ([0, 5], {}, "label 5 is out of range: the model has 5 classes, 0 to 4"),
        ([-1], {}, "label -1 is out of range"),
        ([], {}, "expected one integer per image"),
        ([0.5], {}, "expected one integer per image"),
        ([0], {"cfg_scale": float("nan")}, "guidance scale nan"),
        ([0], {"cfg_scale": -1.0}, "guidance scale -1.0"),
        ([0], {"cfg_channels": 0}, "guided channels 0"),
        ([0], {"solver": "euler"}, "unknown solver 'euler': choose ddpm or ddim"),
        ([0], {"mode": "quick"}, "unknown sampling mode 'quick'"),
        ([0], {"eta": 2.0}, "eta 2.0"),
        ([0], {"batch_size": 0}, "batch size 0"),
        ([0], {"seed": -1}, "seed -1"),
    ],
)
def test_impossible_requests_are_refused(model, diffusion, labels, options, line):
    with pytest.raises(ConfigError, match=line):
        sample(model, diffusion, labels, progress=False, **options)


def test_guidance_without_label_dropout_is_refused(diffusion):
    model = small_model(class_dropout_prob=0.0)
    with pytest.raises(ConfigError, match=r"guidance scale 4\.0 needs a model trained with label dropout"):
        sample(model, diffusion, [0], progress=False)
    assert sample(model, diffusion, [0], cfg_scale=1.0, progress=False).isfinite().all()


def test_nan_weights_are_reported(diffusion):
    model = small_model()
    with torch.no_grad():
        model.final_layer.linear.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="2 of 2 samples have NaN"):
        sample(model, diffusion, [0, 1], progress=False)


def test_progress_lines_without_a_terminal(model, capsys, monkeypatch):
    monkeypatch.setattr("dit_fast.sampling.sampler._LOG_SECONDS", 0.0)
    sample(model, create_diffusion("4"), [0, 1, 2], batch_size=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert lines[4].startswith("sampling: 2 of 3 images done, step 1 of 4, ")
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
