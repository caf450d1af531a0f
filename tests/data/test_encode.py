"""`dit_fast.data.encode`: what a set holds, kills and ranks, and what bad input gets."""

import json
import resource
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.data import center_crop, open_latents, to_pixels
from dit_fast.data.encode import encode
from dit_fast.data.shards import read_sealed
from dit_fast.encoders.autoencoder import LatentEncoder
from dit_fast.errors import CheckpointError, ConfigError, DataError, MissingExtraError, OutputError
from tests import latent_sets
from tests.latent_sets import SIZE, contents, in_child, kill_at, settings, write_images, write_vae
from tests.tolerance import SUM, assert_close, largest, rounding


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `images` (classes a: 4, b: 3) and `vae`."""
    latent_sets.install(monkeypatch)
    write_images(tmp_path / "images")
    write_vae(tmp_path / "vae")
    return tmp_path


@pytest.fixture
def whole(work: Path) -> dict[str, bytes]:
    """The files of a set that one process encoded without interruption."""
    assert encode(settings(work, out=work / "uninterrupted")).complete
    return contents(work / "uninterrupted")


def pixels_of(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        pixels = np.asarray(center_crop(image.convert("RGB"), SIZE))
    return to_pixels(torch.from_numpy(pixels.copy()).permute(2, 0, 1))


DEPTH = 20
"""Layers of the largest autoencoder here, each of which adds sums to those before."""


def assert_stored(found: torch.Tensor, expected: torch.Tensor, terms: int = SUM) -> None:
    """Each value is the nearest one of the dtype, around which the order of sums may move what is rounded."""
    info = torch.finfo(found.dtype)
    nearest = torch.maximum(expected.abs() * info.eps, torch.tensor(info.smallest_normal * info.eps)) / 2
    assert ((found.float() - expected).abs() <= nearest + rounding(terms) * largest(expected)).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_set_holds_both_flips_of_every_image(work, dtype):
    result = encode(settings(work, dtype=dtype))
    assert (result.images, result.encoded, result.kept, result.missing) == (7, 3, 0, 0)
    paths = sorted((work / "images").rglob("*.png"))
    vae = LatentEncoder(str(work / "vae"))
    pixels = torch.stack([pixels_of(path) for path in paths])
    data = open_latents(work / "set", verify=True)
    assert (data.class_names, data.train.labels.tolist()) == (("a", "b"), [0, 0, 0, 0, 1, 1, 1])
    assert (data.image_size, data.pixel_size, data.channels) == (4, 16, 2)
    for flip in (False, True):
        with torch.no_grad():
            mean, logvar = vae.quant_conv(vae.encoder(pixels.flip(-1) if flip else pixels)).chunk(2, 1)
        moments = data.train.moments(torch.arange(7), torch.full((7,), flip))
        assert moments.dtype == getattr(torch, dtype)
        assert_stored(moments[:, 0], mean)
        assert_stored(moments[:, 1], logvar)
    manifest = read_sealed(work / "set" / "manifest.json")
    assert manifest["vae"]["scale"] == [latent_sets.SCALE] * 2
    assert manifest["vae"]["shift"] == [latent_sets.SHIFT] * 2
    assert json.loads((work / "set" / "names.json").read_text())[:5] == [
        *(f"a/{index:03d}.png" for index in range(4)),
        "b/000.png",
    ]


@pytest.mark.parametrize(
    ("stage", "count"),
    [
        *(("encoder", count) for count in range(1, 6)),
        *(("before rename", count) for count in range(1, 11)),
        *(("after rename", count) for count in range(1, 10)),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(work, whole, stage, count):
    # Five batches of four convolutions; ten files, the manifest last.
    def die():
        if stage == "encoder":
            torch.nn.Conv2d.forward = kill_at(4 * count, torch.nn.Conv2d.forward, before=True)
        else:
            Path.replace = kill_at(count, Path.replace, before=stage == "before rename")
        encode(settings(work))

    assert in_child(die) == -9
    assert not (work / "set" / "manifest.json").exists()
    with pytest.raises(DataError, match="not a finished latent set"):
        open_latents(work / "set")
    result = encode(settings(work))
    assert result.complete
    assert result.encoded + result.kept == 3
    assert contents(work / "set") == whole


def test_shards_that_are_whole_are_not_encoded_again(work, whole):
    out = work / "set"
    shutil.copytree(work / "uninterrupted", out)
    assert (encode(settings(work)).encoded, encode(settings(work)).kept) == (0, 3)
    stamp = (out / "shard-00000.npy").stat().st_mtime_ns
    with (out / "shard-00001.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    result = encode(settings(work))
    assert (result.encoded, result.kept, result.complete) == (1, 2, True)
    assert (out / "shard-00000.npy").stat().st_mtime_ns == stamp
    assert contents(out) == whole


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_make_the_set_that_one_process_makes(work, whole, world_size):
    missing = [encode(settings(work), rank, world_size).missing for rank in range(world_size)]
    assert missing == [sum(shard % world_size > rank for shard in range(3)) for rank in range(world_size)]
    assert contents(work / "set") == whole


def test_a_run_goes_on_with_another_number_of_ranks(work, whole):
    assert encode(settings(work), 1, 3).missing == 2
    assert encode(settings(work)).kept == 1
    assert contents(work / "set") == whole


def test_unreadable_images_are_all_named_and_their_shards_left_out(work, whole):
    good = {name: (work / "images" / name).read_bytes() for name in ("a/001.png", "b/002.png")}
    (work / "images" / "a/001.png").write_bytes(good["a/001.png"][:300])
    (work / "images" / "b/002.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2 of 7 images cannot be read: .*a/001\.png \(.*b/002\.png \("):
        encode(settings(work))
    names = set(contents(work / "set"))
    assert names == {"encoding.json", "shard-00001.npy", "shard-00001.json"}
    for name, data in good.items():
        (work / "images" / name).write_bytes(data)
    assert (encode(settings(work)).encoded, contents(work / "set")) == (2, whole)


def test_another_autoencoder_is_refused_with_both_names(work):
    write_vae(work / "other", seed=1)
    encode(settings(work), 0, 3)
    before = contents(work / "set")
    with pytest.raises(
        DataError, match=r"begun with the autoencoder .*/vae \(SHA-256 \w{12}\), --vae .*/other "
    ):
        encode(settings(work, vae=work / "other"))
    assert contents(work / "set") == before
    shutil.copytree(work / "vae", work / "copy")
    assert encode(settings(work, vae=work / "copy")).complete, "the same weights elsewhere are the same"


def test_other_settings_are_refused(work):
    encode(settings(work), 0, 3)
    with pytest.raises(
        DataError, match="begun with other settings: image_size is 16 there, 8 here; shard_size is 3"
    ):
        encode(settings(work, image_size=8, shard_size=4))


def test_changed_images(work, whole):
    encode(settings(work), 0, 2)
    Image.new("RGB", (30, 30)).save(work / "images" / "a" / "000.png")
    assert encode(settings(work)).encoded == 2, "the shard of the changed image and the one that was missing"
    assert contents(work / "set")["shard-00001.npy"] == whole["shard-00001.npy"]
    (work / "images" / "b" / "000.png").unlink()
    with pytest.raises(DataError, match=r"a finished set of 7 images that are not those of .*\(6 images\)"):
        encode(settings(work))


def test_a_latent_that_is_not_finite(work):
    vae = latent_sets.StandInVae()
    vae.quant_conv.bias.data = torch.full((4,), 1e5)
    latent_sets.save_vae(vae, work / "vae")
    with pytest.raises(DataError, match=r"a/000\.png: its latent is not finite in float16.*--dtype float32"):
        encode(settings(work))
    assert encode(settings(work, out=work / "wide", dtype="float32")).complete
    vae.quant_conv.bias.data[0] = 3e38
    vae.quant_conv.weight.data[0] = 3e38
    latent_sets.save_vae(vae, work / "vae")
    with pytest.raises(DataError, match=r"a/000\.png: its latent is not finite in float32.*another --vae"):
        encode(settings(work, out=work / "nan", dtype="float32"))
    assert set(contents(work / "nan")) == {"encoding.json"}


def test_a_full_disk_is_seen_before_the_first_shard(work, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(OutputError, match=r"no space in .*MiB needed"):
        encode(settings(work), 0, 3)
    assert set(contents(work / "set")) == {"encoding.json"}


def test_a_disk_that_fills_up_leaves_no_partial_file(work):
    (work / "set").mkdir()

    def fill():
        encode(settings(work), 1, 3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        with pytest.raises(OutputError, match=r"cannot write .*shard-00000\.npy \(File too large\)"):
            encode(settings(work))

    assert in_child(fill) == 0
    assert set(contents(work / "set")) == {"encoding.json", "shard-00001.npy", "shard-00001.json"}
    assert encode(settings(work)).kept == 1


def test_out_that_cannot_be_written(work):
    with pytest.raises(OutputError, match=r"cannot write to .*000\.png/set \(Not a directory\)"):
        encode(settings(work, out=work / "images" / "a" / "000.png" / "set"))


def test_the_folder_must_hold_images(work, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        encode(settings(work, data=work / "nowhere"))
    (work / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="1 sub-folders without any readable image"):
        encode(settings(work, data=work / "empty"))
    assert not (work / "set").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 18}, r"--image-size 18 is not a multiple of 4, .*; give 16"),
        ({"image_size": 0}, "--image-size 0: give a whole number from 1"),
        ({"shard_size": 0}, "--shard-size 0: give a whole number from 1"),
        ({"dtype": "int8"}, "--dtype 'int8': give one of float16, float32"),
        ({"precision": "fp16"}, "--precision 'fp16': give one of fp32"),
        ({"vae": "nowhere"}, "--vae nowhere: give ema, mse, or a folder with a diffusers AutoencoderKL"),
    ],
)
def test_options_that_do_not_fit(work, options, message):
    with pytest.raises(ConfigError, match=message):
        encode(settings(work, **options))


def test_a_rank_outside_the_world(work):
    with pytest.raises(ConfigError, match=r"RANK 2 is outside 0\.\.1"):
        encode(settings(work), 2, 2)


def test_a_missing_autoencoder_says_what_to_install(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"encodes latents, is not installed; pip install .*\[vae\]'"):
        encode(settings(work))
    assert not list((work / "set").iterdir())


def test_diffusers_own_autoencoder(tmp_path):
    """The real class, built with few channels and random weights, through the real loading path."""
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=SIZE,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    write_images(tmp_path / "images")
    encoder = LatentEncoder(str(tmp_path / "vae"))
    assert (encoder.factor, encoder.scale, encoder.shift) == (4, (0.18215,) * 4, (0.0,) * 4)
    images = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(images).latent_dist
    assert_close(encoder(images), torch.stack([expected.mean, expected.logvar], dim=1), DEPTH * SUM)
    assert encode(settings(tmp_path)).complete
    data = open_latents(tmp_path / "set", verify=True)
    with torch.no_grad():
        expected = vae.encode(pixels_of(tmp_path / "images" / "b" / "002.png").flip(-1)[None]).latent_dist
    moments = data.train.moments(torch.tensor([6]), torch.tensor([True]))
    assert_stored(moments[:, 0], expected.mean, DEPTH * SUM)
    assert_stored(moments[:, 1], expected.logvar, DEPTH * SUM)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"cannot load the autoencoder .*/vae: "):
        LatentEncoder(str(tmp_path / "vae"))


def test_scaling_by_channel(work):
    """A configuration with latents_mean and latents_std: (z - mean) / std * scaling_factor."""
    vae = latent_sets.StandInVae(
        {**latent_sets.CONFIG, "latents_mean": [1.0, -1.0], "latents_std": [2.0, 4.0]}
    )
    latent_sets.save_vae(vae, work / "vae")
    encoder = LatentEncoder(str(work / "vae"))
    assert encoder.shift == (1.0, -1.0)
    assert encoder.scale == (latent_sets.SCALE / 2, latent_sets.SCALE / 4)


def test_unreadable_images_are_left_out_up_to_the_number_given(work):
    """The set is of the others; which ones it lacks follows from the images, not from ranks or interruptions."""
    expected = open_everything(work / "images", encode(settings(work, out=work / "whole")).out)
    for name in ("a/001.png", "b/002.png"):
        path = work / "images" / name
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="skip them with --skip-unreadable 2"):
        encode(settings(work, skip_unreadable=1))
    assert not (work / "set" / "manifest.json").exists()
    result = encode(settings(work, skip_unreadable=2))
    assert result.complete
    assert result.images == 5
    assert list(result.unreadable) == ["a/001.png", "b/002.png"]
    data = open_latents(work / "set", verify=True, holdout=0.3)
    assert (len(data.train), len(data.heldout)) == (3, 2)
    data = open_latents(work / "set", verify=True)
    assert data.train.members.tolist() == [0, 2, 3, 4, 5]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    indices = torch.arange(5)
    assert torch.equal(data.train.moments(indices), expected[[0, 2, 3, 4, 5]])
    assert torch.equal(
        data.train.moments(indices, torch.ones(5, dtype=torch.bool)).isnan().any(), torch.tensor(False)
    )
    before = contents(work / "set")
    for rank in (2, 0, 1):
        again = encode(settings(work, out=work / "ranks", skip_unreadable=2), rank, 3)
    assert again.complete
    assert contents(work / "ranks") == before
    assert encode(settings(work, skip_unreadable=2)).kept == 3
    with pytest.raises(DataError, match="2 of 7 images cannot be read"):
        encode(settings(work))


def open_everything(images: Path, out: Path) -> torch.Tensor:
    data = open_latents(out)
    return data.train.moments(torch.arange(len(data.train)))


def test_ranks_that_left_out_too_many_together_do_not_finish(work):
    for name in ("a/001.png", "b/002.png"):
        (work / "images" / name).write_bytes(b"no image")
    assert not encode(settings(work, skip_unreadable=1), 0, 3).complete
    assert not encode(settings(work, skip_unreadable=1), 1, 3).complete
    with pytest.raises(
        DataError, match=r"2 images cannot be read: .*a/001\.png .*b/002\.png .*--skip-unreadable 2"
    ):
        encode(settings(work, skip_unreadable=1), 2, 3)
    assert not (work / "set" / "manifest.json").exists()
    assert encode(settings(work, skip_unreadable=2), 2, 3).complete


def test_how_files_became_pixels_is_part_of_the_set(work):
    image = np.zeros((SIZE, SIZE, 4), dtype=np.uint8)
    image[..., 0] = 255  # red, all of it transparent
    Image.fromarray(image).save(work / "images" / "a" / "000.png")
    moments = {}
    for name, options in {"white": {}, "black": {"background": "black"}, "raw": {"raw_pixels": True}}.items():
        data = open_latents(encode(settings(work, out=work / name, **options)).out)
        moments[name] = data.train.moments(torch.tensor([0]))
    vae = LatentEncoder(str(work / "vae"))
    for name, colour in {
        "white": (1.0, 1.0, 1.0),
        "black": (-1.0, -1.0, -1.0),
        "raw": (1.0, -1.0, -1.0),
    }.items():
        expected = vae(torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE))
        assert_stored(moments[name], expected)
    with pytest.raises(DataError, match=r"begun with other settings: pixels is .*white.* there, .*black"):
        encode(settings(work, out=work / "white", background="black"))
    said = open_latents(work / "black").describe()["pixels"]
    assert said == {"background": "black", "raw_pixels": False}
    assert "pixels" not in open_latents(work / "raw").describe(), "as sets that know of no choice"


def test_a_flat_folder_is_encoded_without_classes(work):
    with pytest.raises(DataError, match="train without classes: --num-classes 0"):
        encode(settings(work, data=work / "images" / "a"))
    assert encode(settings(work, data=work / "images" / "a", num_classes=0)).images == 4
    with pytest.raises(DataError, match=r"1 class found; .*--num-classes 0 trains without classes"):
        open_latents(work / "set")
    assert len(open_latents(work / "set", num_classes=0).train) == 4
    with pytest.raises(ConfigError, match="--num-classes 5: sub-folders are classes; give 0 for none"):
        settings(work, num_classes=5)


@pytest.mark.parametrize("suffix", ["webp", "tiff", "gif"])
def test_files_of_several_frames_are_counted_and_named(work, caplog, suffix):
    """The first frame is encoded; each rank names its own files, as training does. A GIF may be named .png."""
    first = encode(settings(work, out=work / "single")).out
    name = f"a/001.{'png' if suffix == 'gif' else suffix}"
    (work / "images" / "a" / "001.png").rename(work / "images" / name)
    frames = [Image.new("RGB", (24, 20), color) for color in ((255, 0, 0), (0, 255, 0))]
    kind, exact = ("GIF" if suffix == "gif" else None), {"lossless": True} if suffix == "webp" else {}
    frames[0].save(work / "images" / name, format=kind, save_all=True, append_images=frames[1:], **exact)
    caplog.clear()
    for rank in range(2):
        encode(settings(work), rank, 2)
    said = [line for line in caplog.messages if "frames" in line]
    assert said == [
        f"{work / 'images'}: 1 files have several frames or pages; only the first is read: {name}"
    ]
    frames[0].save(work / "images" / name, format=kind, **exact)
    alone = encode(settings(work, out=work / "alone")).out
    assert (alone / "shard-00000.npy").read_bytes() == (work / "set" / "shard-00000.npy").read_bytes()
    assert (alone / "shard-00000.npy").read_bytes() != (first / "shard-00000.npy").read_bytes()
