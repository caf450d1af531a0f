"""Scores and pictures of models of many aspect ratios: samples in the proportion of the training images' shapes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.cli import main
from dit_fast.data import apportion, open_images
from dit_fast.diffusion import GaussianDiffusion
from dit_fast.diffusion.likelihood import GREY_LEVEL
from dit_fast.errors import ConfigError, DataError
from dit_fast.evaluation import collect, features, open_source, score
from dit_fast.interop import load_model
from dit_fast.sampling import Guidance, Sampler, SamplerConfig
from dit_fast.training import TrainConfig, Trainer, train
from dit_fast.training import scaling_study as scaling
from dit_fast.training.callbacks import Evaluation
from dit_fast.training.config import open_set
from dit_fast.training.log import read_scores
from dit_fast.utils import keyed
from tests.cli.test_evaluate import SmallNetwork, write_npz
from tests.data.test_buckets import BUCKETS, SHAPES, TALL, WIDE
from tests.tolerance import assert_close, assert_same_distance
from tests.training.test_evaluate import OneOfTwo

SIZES = "16x16,8x24,24x8"
SCORED: dict[str, Any] = {
    "evaluate_every": 2, "evaluate_samples": 10, "evaluate_weights": "unused.pth", "sample_steps": 3,
}  # fmt: skip


class Network(SmallNetwork):
    """Resizes what it sees, as Inception does."""

    def __call__(self, images: torch.Tensor) -> features.Features:
        return super().__call__(torch.nn.functional.interpolate(images.float(), (16, 16)))


def config(folder: Path, **options: Any) -> TrainConfig:
    small = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "batch_size": 4, "device": "cpu"}
    usual = {"buckets": SIZES, "num_workers": 1, "steps": 2, "log_every": 1, "threads": 1, "lr": 1e-2}
    return TrainConfig(**{"data": str(folder), **small, **usual, "ema_decay": 0.5, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of coloured ramps, each 6 squares, 5 wide and 3 tall ones."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("day", "night"):
        (root / name).mkdir()
        for number, (height, width) in enumerate((*SHAPES, *WIDE, *TALL)):
            pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
    return root


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "InceptionFeatures", Network)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, scored and drawn at the second; learned positions are resized for each shape."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "InceptionFeatures", Network)
        train(config(folder, **SCORED, sample_every=2, positions="learned"), out)
    return out


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words), "--weights", "unused.pth", "--device", "cpu"])


@pytest.mark.parametrize(
    ("total", "images", "shares"),
    [(10, [12, 10, 6], [4, 4, 2]), (7, [1], [7]), (5, [0, 3, 0, 3], [0, 2, 0, 3]), (3, [1, 1000], [0, 3])],
)
def test_samples_are_shared_out_in_proportion(total: int, images: list[int], shares: list[int]) -> None:
    assert apportion(total, images) == shares


def test_real_images_are_those_of_training(folder: Path) -> None:
    """Each in its bucket, to the pixel, whatever the order."""
    trained = open_images(folder, buckets=BUCKETS, num_workers=1)
    source = open_source(folder, buckets=BUCKETS)
    assert (source.num, set(source.sizes)) == (28, set(BUCKETS))
    scored = sorted(image.numpy().tobytes() for batch in source.batches(5) for image in batch)
    pixels = [trained.train.batch(torch.tensor([index]))[0] for index in range(28)]
    assert scored == sorted(((image + 1) * 127.5).round().byte().numpy().tobytes() for image in pixels)


def test_a_run_s_score_is_what_dit_fast_evaluate_says_of_its_checkpoint(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    (line,) = read_scores(run / "log.jsonl")
    assert (line["num_samples"], line["num_reference"]) == (10, 28)
    asked = ("--ckpt", run, "--num", 10, "--steps", 3, "--against", folder, "--metrics", "fid")
    samples = tmp_path / "samples"
    assert evaluate(*asked, "--sample-dir", samples, "--out", tmp_path / "scores.json") == 0
    assert_same_distance(json.loads((tmp_path / "scores.json").read_text())["fid"], line["fid"])
    shapes = {path.name: np.load(path / "samples.npz")["arr_0"].shape for path in samples.iterdir()}
    assert shapes == {"16x16": (4, 16, 16, 3), "8x24": (4, 8, 24, 3), "24x8": (2, 24, 8, 3)}

    # A folder of the same samples in buckets is scored alike, and statistics are taken as a reference.
    for name in shapes:
        for number, image in enumerate(np.load(samples / name / "samples.npz")["arr_0"]):
            (tmp_path / "files").mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / "files" / f"{name}-{number}.png")
    statistics = tmp_path / "real.npz"
    assert evaluate(folder, "--buckets", SIZES, "--save-statistics", statistics) == 0
    others = ("--against", statistics, "--metrics", "fid", "--out", tmp_path / "others.json")
    assert evaluate(tmp_path / "files", "--buckets", SIZES, *others) == 0
    assert_same_distance(json.loads((tmp_path / "others.json").read_text())["fid"], line["fid"])

    # And all as squares of one size, when that is asked for.
    assert evaluate(*asked, "--image-size", 12, "--out", tmp_path / "square.json") == 0
    assert json.loads((tmp_path / "square.json").read_text())["fid"] != pytest.approx(line["fid"], rel=1e-3)


def test_each_shape_is_drawn_with_its_own_positions_and_seed(run: Path, folder: Path) -> None:
    each = Trainer(asked := config(folder, **SCORED, positions="learned", seed=3), open_set(asked))
    model, _ = load_model(run)
    each.model.load_state_dict(model.state_dict())
    each.optimizer.state.clear()
    evaluation = Evaluation(each)
    with evaluation.sampler.averages():
        for bucket, size in enumerate(BUCKETS):
            labels = torch.tensor([0, 1])
            drawn = evaluation.sampler.draw(labels, bucket=bucket)
            alone = Sampler(
                load_model(run, input_size=size)[0],
                evaluation.sampler.schedule,
                SamplerConfig(guidance=Guidance(1.0), clip=True, graph="never"),
            )(labels, seed=3 + bucket)
            assert drawn.shape == (2, 3, *size)
            assert_close(drawn, alone)


def test_ranks_share_the_samples_of_all_shapes(folder: Path) -> None:
    each = Trainer(asked := config(folder, **SCORED), open_set(asked))
    alone = Evaluation(each)
    parts = []
    for rank in range(2):
        each.world = OneOfTwo(rank=rank, size=2)
        evaluation = Evaluation(each)
        parts.append(evaluation)
    pairs = [
        pair for part in parts for pair in zip(part.bucket_of.tolist(), part.numbers.tolist(), strict=True)
    ]
    assert sorted(pairs) == sorted(zip(alone.bucket_of.tolist(), alone.numbers.tolist(), strict=True))
    assert sorted(pairs) == [*((0, i) for i in range(4)), *((1, i) for i in range(4)), (2, 0), (2, 1)]


def test_a_grid_shows_all_shapes(run: Path) -> None:
    """Two samples of each of three shapes in a row, on tiles of 24 x 24, enlarged by 3."""
    with Image.open(run / "samples" / "step-0000002.png") as picture:
        pixels = np.asarray(picture)
    drawn = (pixels != 255).any(axis=2)
    rows, columns = drawn.any(axis=1), drawn.any(axis=0)
    assert rows.sum() > 0
    assert columns.sum() > 0
    assert picture.height == 2 * 12 + 2 * (72 + 4) - 4


def test_pictures_of_any_weights_in_any_shape(run: Path, tmp_path: Path) -> None:
    """`dit-fast explain` of the averages and of the model itself, on images that are not square."""
    films = []
    for weights in ("ema", "model"):
        out = tmp_path / weights
        words = ["--ckpt", run, "--weights", weights, "--image-size", "8x24", "--steps", 3, "--cfg-scale", 1]
        assert main(["explain", *map(str, words), "--out", str(out), "--frames", "3"]) == 0
        assert sorted(path.name for path in out.iterdir()) == ["attention.png", "film.png", "steps.png"]
        films.append(np.asarray(Image.open(out / "film.png")))
    assert films[0].shape == films[1].shape
    assert (films[0] != films[1]).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--image-size", 8, "--buckets", SIZES), "does not go with --image-size, one size: leave one out"),
        (("--buckets", "16x"), "--buckets 16x: '16x' is not HEIGHTxWIDTH"),
    ],
)
def test_refusals_of_a_folder(words: tuple[object, ...], message: str, folder: Path, capsys) -> None:
    assert evaluate(folder, "--against", folder, *words) == 1
    assert message in capsys.readouterr().err


def test_what_has_one_shape_is_refused(run: Path, folder: Path, tmp_path: Path, capsys) -> None:
    ckpt = ("--ckpt", run, "--num", 4, "--against")
    archive = write_npz(tmp_path / "real.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    classifier = ["evaluate", *map(str, ckpt), str(folder), "--features", "classifier"]
    assert main(classifier) == 1
    assert "--features classifier needs images of one size" in capsys.readouterr().err
    for against in (archive, "digits"):
        assert evaluate(*ckpt, against) == 1
        assert "--buckets applies only to a folder of images" in capsys.readouterr().err
    assert evaluate(*ckpt, folder, "--buckets", SIZES) == 1
    assert "does not go with --ckpt, which has buckets of its own" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--evaluate-features classifier needs images of one size"):
        config(folder, evaluate_every=2, evaluate_features="classifier")
    with pytest.raises(DataError, match="applies only to a folder"):
        Evaluation(Trainer(asked := config(folder, **SCORED, evaluate_against=str(archive)), open_set(asked)))


def test_the_mixture_matters(folder: Path) -> None:
    """Squares alone are not what the folder holds: their distance is not 0, that of the folder to itself is."""
    network = Network()
    whole = collect(open_source(folder, buckets=BUCKETS), network)
    squares = collect(open_source(folder, 16), network)
    assert score(whole, whole.statistics, None, False, ["fid"]).fid == pytest.approx(0, abs=1e-6)
    assert score(squares, whole.statistics, None, False, ["fid"]).fid > 1e-3


def test_likelihood_is_of_each_image_in_its_own_shape(folder: Path, tmp_path: Path) -> None:
    """A flow that stands still has the bits of the prior, image by image; batches are of one shape."""
    options = {
        "objective": "flow",
        "lr": 1e-12,
        "steps": 1,
        "ema_decay": 0.0,
        "holdout": 0.4,
        "positions": "rope",
    }
    train(config(folder, **options), tmp_path / "run")
    words = ["--ckpt", tmp_path / "run", "--steps", 2, "--batch-size", 3, "--out", tmp_path / "bits.json"]
    assert main(["likelihood", *map(str, words)]) == 0
    found = json.loads((tmp_path / "bits.json").read_text())
    split = open_images(folder, buckets=BUCKETS, holdout=0.4, num_workers=1).heldout
    bits = []
    for number in range(len(split)):
        x = split.batch(torch.tensor([number]))
        place = keyed.uniform(keyed.key(0, "dequantise"), torch.tensor([number]), tuple(x.shape[1:]))
        nats = 0.5 * ((x + (place - 0.5) * GREY_LEVEL).double() ** 2 + math.log(2 * math.pi)).mean()
        bits.append(float(nats) / math.log(2) - math.log2(GREY_LEVEL))
    assert len(set(split.buckets.tolist())) == 3
    assert (found["images"], found["split"]) == (len(split), "held-out")
    assert_close(found["bits_per_dimension"], float(np.mean(bits)))
    error = float(np.std(bits, ddof=1) / len(bits) ** 0.5)
    assert_close(found["standard_error"], error, scale=max(bits))


def test_a_scaling_study_counts_and_measures_all_shapes(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """FLOPs of the mean over the training images' shapes; the loss of the averaged weights on held-out ones of each."""
    monkeypatch.setattr(scaling, "DRAWS", 40)
    drawn: list[tuple[int, ...]] = []
    losses = GaussianDiffusion.training_losses

    def listen(self: Any, model: Any, x: torch.Tensor, *others: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            drawn.append(tuple(x.shape[2:]))
        return losses(self, model, x, *others, **named)

    monkeypatch.setattr(GaussianDiffusion, "training_losses", listen)
    words = [
        "--data",
        folder,
        "--buckets",
        "16x16,8x24,24x16",
        "--holdout",
        0.4,
        "--patch-size",
        4,
        "--batch-size",
        4,
    ]
    words += ["--sizes", "32x1", "64x1", "--steps", 6, "--threads", 1, "--num-workers", 1, "--device", "cpu"]
    assert main(["scaling", *map(str, words), "--out", str(tmp_path)]) == 0
    assert set(drawn) == {(16, 16), (8, 24), (24, 16)}
    shapes = open_set(config(folder, buckets="16x16,8x24,24x16", holdout=0.4)).shapes
    assert sum(shapes.values()) == 28 - 2 * round(0.4 * 14)
    for measured in json.loads((tmp_path / "scaling.json").read_text())["models"]:
        model, _ = load_model(tmp_path / measured["name"])
        mean = sum(number * model.macs(size) for size, number in shapes.items()) / sum(shapes.values())
        assert measured["counts"]["macs"] == round(mean) != model.macs()
        assert measured["losses"][-1][1] == 6 * 4 * 6 * round(mean)
        assert np.isfinite(measured["metric"])
