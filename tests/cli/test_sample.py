"""`dit-fast sample` from the command line to the files it writes, and every refusal in one line."""

import argparse
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.cli import main, sample
from dit_fast.cli.labels import numbers_of
from dit_fast.cli.sample_request import SampleRequest
from dit_fast.data import open_images
from dit_fast.sampling import Guidance, Sampler
from tests.checkpoints import save_checkpoint
from tests.small_models import small_model as build

NAMES = tuple(str(digit) for digit in range(10))


small_model = partial(build, patch_size=4, in_channels=1, num_classes=10)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as the trainer leaves it, of an untrained model on the digits."""
    folder = tmp_path_factory.mktemp("run")
    model, ema = small_model(0), small_model(1)
    zeros = {f"exp_avg.{name}": torch.zeros_like(p) for name, p in model.named_parameters()}
    manifest = {
        "step": 30,
        "train_config": {"flip": None},
        "data": open_images("digits").describe(),
        "class_names": list(NAMES),
        "diffusion": {"noise_schedule": "squaredcos_cap_v2", "learn_sigma": True, "diffusion_steps": 100},
    }
    save_checkpoint(folder, model, ema.state_dict(), zeros, manifest)
    return folder


def command(*arguments) -> int:
    return main(["sample", *map(str, arguments)])


def test_run_folder_to_grid_images_and_scores(run, tmp_path, capsys):
    options = ("--ckpt", run, "--num", 23, "--steps", 4, "--seed", 3, "--cfg-scale", 2, "--columns", 2)
    assert command(*options, "--out", tmp_path, "--save-images", "--compare-to", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert f"EMA weights at step 30 of {run / 'checkpoints' / 'step-0000030'}; 23 images, 4 ddpm steps" in out
    assert "drew 23 images" in out
    assert "label agreement: " in out
    assert "nearest training image: median RMS distance" in out

    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == [f"{i:06d}-class{i % 10}.png" for i in range(23)]
    written = [np.asarray(Image.open(tmp_path / "images" / name)) for name in names]
    assert {image.shape for image in written} == {(8, 8)}

    grid = np.asarray(Image.open(tmp_path / "sample.png"))
    assert grid.shape[0] == 24 + 10 * 60 - 4
    left = grid.shape[1] - 12 - (2 * 60 - 4)
    for row, column, index in [(0, 0, 0), (0, 1, 10), (7, 1, 17)]:
        tile = grid[12 + 60 * row : 68 + 60 * row, left + 60 * column : left + 56 + 60 * column]
        assert np.array_equal(tile[3::7, 3::7, 0], written[index])

    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["data"], scores["step"], scores["steps"], scores["seed"]) == ("digits", 30, 4, 3)
    assert scores["labels"]["num_samples"] == 23
    assert scores["labels"]["classifier_accuracy"] > 0.95
    assert scores["left_out"] == "heldout"
    assert scores["nearest"]["samples_median"] > scores["nearest"]["heldout_median"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "sample.png", "scores.json"]


def test_the_checkpoint_s_own_diffusion_and_clipping_are_used(run, tmp_path, monkeypatch):
    seen = {}
    draw = Sampler.__call__

    def spy(sampler, labels, **options):
        seen.update(options, sampler=sampler, labels=labels.tolist())
        return draw(sampler, labels, **options)

    monkeypatch.setattr(Sampler, "__call__", spy)
    for weights, seed in (("ema", 1), ("model", 0)):
        assert command("--ckpt", run, "--num", 2, "--steps", 5, "--weights", weights, "--out", tmp_path) == 0
        for key, value in small_model(seed).state_dict().items():
            assert torch.equal(seen["sampler"].model.state_dict()[key], value)
    sampler = seen["sampler"]
    assert sampler.schedule.times.tolist() == [99, 74, 50, 25, 0]
    assert (sampler.config.clip, sampler.config.mode, seen["seed"]) == (True, "reference", 0)
    assert sampler.config.guidance == Guidance(4.0, None)
    assert command("--ckpt", run, "--num", 1, "--out", tmp_path) == 0
    assert len(seen["sampler"].schedule) == 100
    guided = ("--cfg-channels", "all", "--cfg-interval", 0.1, 0.7, "--cfg-schedule", "linear")
    assert command("--ckpt", run, "--steps", 1, "--no-clip-denoised", *guided, "--out", tmp_path) == 0
    config = seen["sampler"].config
    assert (config.clip, config.guidance) == (False, Guidance(4.0, None, (0.1, 0.7), "linear"))
    assert seen["labels"] == (list(range(10)) * 8)[64:]


def test_same_seed_same_pixels(run, tmp_path):
    pictures = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        out = tmp_path / name
        assert command("--ckpt", run, "--num", 4, "--steps", 3, "--seed", seed, "--out", out) == 0
        pictures.append((out / "sample.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize(
    ("classes", "labels"),
    [(["3"], [3, 3, 3]), (["7,1"], [7, 1, 7]), (["cat", "2"], [0, 2, 0]), (["red, green", "cat"], [1, 0, 1])],
)
def test_classes_by_number_and_by_name(classes, labels):
    numbers = numbers_of(classes, 10, ("cat", "red, green", *NAMES[2:]))
    assert [numbers[i % len(numbers)] for i in range(3)] == labels


@pytest.mark.parametrize(
    ("names", "tag"),
    [
        (None, "class1"),
        (("0", "1"), "class1"),
        (("a", "golden retriever, b"), "class1-golden_retriever"),
        (("a", "../../etc"), "class1-etc"),
        (("a", "/ .."), "class1"),
    ],
)
def test_names_of_single_images(names, tag):
    assert sample._tag(1, names) == tag


def test_many_classes_show_eight_of_them():
    assert numbers_of((), 1000, None) == [0, 143, 285, 428, 571, 714, 856, 999]
    assert numbers_of((), 20, None) == list(range(20))


def test_one_class_wraps_into_rows(run, tmp_path):
    assert (
        command("--ckpt", run, "--classes", 3, "--num", 5, "--columns", 2, "--steps", 1, "--out", tmp_path)
        == 0
    )
    picture = Image.open(tmp_path / "sample.png")
    assert picture.height == 24 + 3 * 60 - 4
    assert 24 + 2 * 60 - 4 < picture.width < 24 + 3 * 60


def test_rgb_save_pretrained_folder_with_the_reference_s_flags(tmp_path):
    model = small_model(in_channels=3)
    model.save_pretrained(tmp_path / "model")
    flags = (
        "--image-size",
        8,
        "--num-classes",
        10,
        "--num-sampling-steps",
        2,
        "--cfg-scale",
        1.5,
        "--seed",
        1,
    )
    assert (
        command("--ckpt", tmp_path / "model", *flags, "--vae", "none", "--num", 3, "--out", tmp_path / "o")
        == 0
    )
    assert Image.open(tmp_path / "o" / "sample.png").mode == "RGB"


def test_train_py_file_and_undecoded_latents(tmp_path, capsys):
    model = small_model(in_channels=4)
    content = {
        "model": model.state_dict(),
        "ema": model.state_dict(),
        "opt": {},
        "args": argparse.Namespace(lr=1),
    }
    torch.save(content, tmp_path / "a.pt")
    ask = ("--ckpt", tmp_path / "a.pt", "--num-heads", 2, "--steps", 2, "--num", 3, "--out", tmp_path)
    assert command(*ask, "--vae", "none", "--image-size", 64) == 0
    assert "4 channels, not decoded" in capsys.readouterr().out
    latents = np.load(tmp_path / "latents.npy", allow_pickle=False)
    assert (latents.shape, latents.dtype) == ((3, 4, 8, 8), np.float32)


def test_latent_models_are_decoded(tmp_path, monkeypatch):
    class Decoder:
        factor, sha256, shift, scale = 8, "0" * 64, (0.0,) * 4, (0.18215,) * 4

        def __init__(self, name, channels, device):
            assert (name, channels) == ("mse", 4)

        def __call__(self, latents, shift, scale):
            assert (shift, scale) == (None, None)
            return torch.ones(len(latents), 3, 64, 64)

    monkeypatch.setattr("dit_fast.cli.sample_request.LatentDecoder", Decoder)
    small_model(in_channels=4).save_pretrained(tmp_path / "model")
    ask = ("--ckpt", tmp_path / "model", "--steps", 1, "--num", 2, "--save-images")
    assert command(*ask, "--image-size", 64, "--out", tmp_path / "o") == 0
    image = np.asarray(Image.open(tmp_path / "o" / "images" / "000001-class1.png"))
    assert image.shape == (64, 64, 3)
    assert (image == 255).all()


def test_a_run_on_latents_is_decoded_by_their_autoencoder(tmp_path, monkeypatch):
    """Unless another is asked for; the set's shift and scale go along."""
    seen = []

    class Decoder:
        factor, sha256, shift, scale = 8, "0" * 64, (0.0,) * 4, (0.18215,) * 4

        def __init__(self, name, channels, device):
            seen.append(name)

        def __call__(self, latents, shift, scale):
            seen.append((shift, scale))
            return torch.ones(len(latents), 3, 64, 64)

    monkeypatch.setattr("dit_fast.cli.sample_request.LatentDecoder", Decoder)
    model = small_model(in_channels=4)
    facts = {"name": "set", "image_size": 64, "shift": [0.0] * 4, "scale": [0.18215] * 4}
    zeros = {f"exp_avg.{name}": torch.zeros_like(p) for name, p in model.named_parameters()}
    manifest = {"step": 1, "data": {**facts, "vae": {"name": "ema", "source": "a", "sha256": "b"}}}
    save_checkpoint(tmp_path / "run", model, model.state_dict(), zeros, manifest)
    ask = ("--ckpt", tmp_path / "run", "--steps", 1, "--num", 2, "--out", tmp_path / "o")
    assert command(*ask) == 0
    assert command(*ask, "--vae", "mse") == 0
    assert seen == ["ema", ([0.0] * 4, [0.18215] * 4), "mse", ([0.0] * 4, [0.18215] * 4)]


def test_a_latent_set_s_own_shift_and_scale_are_the_decoder_s():
    seen = []
    plan = SimpleNamespace(decoder=lambda *given: seen.append(given), info=SimpleNamespace(data={}))
    SampleRequest.decode(plan, "latents")
    plan.info.data = {"shift": [0.1], "scale": [2.0]}
    SampleRequest.decode(plan, "latents")
    assert seen == [("latents", None, None), ("latents", [0.1], [2.0])]


def test_gif_shows_the_way_from_noise_to_the_samples(run, tmp_path, capsys):
    out = ("--out", tmp_path, "--columns", 4, "--classes", 1, "--num", 4)
    assert command("--ckpt", run, "--steps", 6, "--gif", *out) == 0
    assert "trajectory.gif (6 frames)" in capsys.readouterr().out
    film, grid = Image.open(tmp_path / "trajectory.gif"), Image.open(tmp_path / "sample.png").convert("RGB")
    assert film.n_frames == 6
    film.seek(5)
    last = np.asarray(film.convert("RGB")).astype(int)
    final = np.asarray(grid)[:, -last.shape[1] :].astype(int)
    # The last frame is the grid without its label; a GIF has 256 colours.
    assert np.abs(last[12:68, 12:248] - final[12:68, 12:248]).mean() < 4


def test_flags_of_sample_ddp(run, tmp_path):
    flags = ("--num-fid-samples", 5, "--per-proc-batch-size", 2, "--global-seed", 3, "--sample-dir", tmp_path)
    assert command("--ckpt", run, "--num-sampling-steps", 2, "--npz", "--no-tf32", *flags) == 0
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        assert (archive["arr_0"].shape, archive["arr_0"].dtype) == ((5, 8, 8, 1), np.uint8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample.png", "samples.npz"]


def test_folder_without_heldout_images_is_compared_leaving_one_out(run, tmp_path, capsys):
    generator = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (10, 12), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    ask = ("--ckpt", run, "--num", 4, "--steps", 1, "--out", tmp_path / "o")
    assert command(*ask, "--compare-to", tmp_path / "data") == 0
    assert json.loads((tmp_path / "o" / "scores.json").read_text())["left_out"] == "training"
    assert "training images, themselves left out, among 40" in capsys.readouterr().out


# Refusals


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--classes", "10"], "--classes 10: the model has 10 classes, 0 to 9"),
        (["--classes", "-1"], "--classes -1: the model has 10 classes"),
        (["--classes", "seven"], "--classes seven: the checkpoint has no class of that name"),
        (
            ["--cfg-interval", "0.5", "0.2"],
            "--cfg-interval [0.5, 0.2]: give two noise levels between 0 (data)",
        ),
        (["--steps", "101"], "101 steps of a section that has 100"),
        (["--steps", "0"], "keeps no step"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--model", "DiT-XXL/2"], "unknown model 'DiT-XXL/2'; the nearest are DiT-XL/2"),
        (["--model", "DiT-S/2"], "depth is 1 in the checkpoint, 12 expected; hidden_size is 32"),
        (["--num-classes", "1000"], "num_classes is 10 in the checkpoint, 1000 expected"),
        (["--image-size", "32"], "it makes 8x8 images, --image-size 32 expected"),
        (["--vae", "nowhere"], "--vae nowhere: "),
        (["--compare-to", "nowhere"], "neither a folder nor a built-in set"),
    ],
)
def test_bad_options_are_one_line_and_draw_nothing(run, tmp_path, capsys, monkeypatch, options, line):
    monkeypatch.setattr(Sampler, "__call__", lambda *a, **k: pytest.fail("sampling began"))
    assert command("--ckpt", run, "--out", tmp_path, *options) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("dit-fast: error: ")
    assert captured.err.count("\n") == 1
    assert line in captured.err
    assert list(tmp_path.iterdir()) == []


def test_unlabelled_dropout_and_unknown_data_and_missing_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "__call__", lambda *a, **k: pytest.fail("sampling began"))
    small_model(class_dropout_prob=0.0).save_pretrained(tmp_path / "model")
    out = ("--out", tmp_path / "o")
    assert command("--ckpt", tmp_path / "model", "--cfg-scale", 4, *out) == 1
    assert "guidance scale 4.0 needs a model trained with label dropout" in capsys.readouterr().err
    assert command("--ckpt", tmp_path / "model", "--cfg-scale", 1, "--compare-to", *out) == 1
    assert "does not record its training data: give --compare-to DATA" in capsys.readouterr().err
    assert command(*out) == 1
    assert "--ckpt is missing" in capsys.readouterr().err
    assert command("--ckpt", tmp_path / "none.pt", *out) == 1
    assert "none.pt: no such file or folder" in capsys.readouterr().err


def test_data_of_another_number_of_classes(run, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / name / "0.png")
    assert command("--ckpt", run, "--compare-to", tmp_path / "data", "--out", tmp_path / "o") == 1
    assert "has 2 classes, the model 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kept", "writes"), [("images", "--save-images"), ("samples.npz", "--npz"), ("scores.json", "")]
)
def test_results_of_two_commands_do_not_lie_side_by_side(kept, writes, run, tmp_path, capsys):
    """`dit-fast evaluate OUT` would score the older ones in place of those that were just drawn."""
    (tmp_path / kept).mkdir()
    for other in {"--save-images", "--npz", "--gif"} - ({writes} - {"--save-images"}):
        assert command("--ckpt", run, "--out", tmp_path, other) == 1
        assert f"{kept} of an earlier command is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [kept]


def test_single_images_do_not_become_a_class_of_a_data_set(run, tmp_path, capsys):
    """Pictures beside folders of grids do no harm."""
    data = tmp_path / "data"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(data / name / "0.png")
    words = ["--ckpt", run, "--steps", 2, "--num", 1]
    assert command(*words, "--out", data, "--save-images") == 1
    assert f"{data} holds folders of images (cat, dog)" in capsys.readouterr().err
    assert sorted(path.name for path in data.iterdir()) == ["cat", "dog"]
    assert command(*words, "--out", tmp_path / "many" / "one") == 0
    assert command(*words, "--out", tmp_path / "many", "--save-images") == 0


def test_outputs_that_cannot_be_written(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "__call__", lambda *a, **k: pytest.fail("sampling began"))
    (tmp_path / "file").write_text("")
    assert command("--ckpt", run, "--out", tmp_path / "file" / "deep") == 1
    assert "cannot write to" in capsys.readouterr().err
    (tmp_path / "images").mkdir()
    assert command("--ckpt", run, "--out", tmp_path, "--save-images") == 1
    assert "is there already" in capsys.readouterr().err
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("dit_fast.utils.files.shutil.disk_usage", lambda _: usage)
    assert command("--ckpt", run, "--out", tmp_path / "o") == 1
    assert "no space in" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_is_named(run, tmp_path, capsys):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-0000030" / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    for path in (tmp_path / "run", file.parent):
        assert command("--ckpt", path, "--out", tmp_path / "o") == 1
        assert "ema.safetensors does not match its SHA-256" in capsys.readouterr().err
