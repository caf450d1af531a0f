"""Training on latents that are made as the images are read: the same as of an encoded set, and what is refused."""

import pytest

from dit_fast.data import encode_in_loop, open_data, open_images, open_stream
from dit_fast.data.encode import encode
from dit_fast.encoders.autoencoder import LatentEncoder
from dit_fast.errors import ConfigError
from dit_fast.training import TrainConfig, Trainer
from dit_fast.training.config import open_set
from dit_fast.training.run import resume, train
from tests.latent_sets import SIZE, install, settings, write_images, write_vae
from tests.tolerance import assert_close


@pytest.fixture
def folder(tmp_path, monkeypatch):
    install(monkeypatch)
    write_vae(tmp_path / "vae")
    write_images(tmp_path / "images")
    return tmp_path


def config(folder, **options) -> TrainConfig:
    usual = {"data": str(folder / "images"), "vae": str(folder / "vae"), "image_size": SIZE, "patch_size": 2}
    small = {
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "batch_size": 4,
        "num_workers": 1,
        "device": "cpu",
    }
    return TrainConfig(**{**usual, **small, "steps": 2, "log_every": 1, **options})


def test_batches_are_those_of_an_encoded_set(folder):
    encode(settings(folder, dtype="float32"))
    stored = open_stream(open_data(folder / "set"), 4, seed=3)
    made = open_stream(open_set(config(folder)), 4, seed=3)
    for step in range(4):
        for ours, theirs in zip(made.batch(step), stored.batch(step), strict=True):
            assert_close(ours, theirs)
    assert made.mirrored(0).any()


def test_a_run_trains_and_goes_on(folder):
    whole = train(config(folder, steps=3), folder / "whole")
    train(config(folder, steps=2), folder / "run")
    resumed = resume(folder / "run", {"steps": 3})
    files = [result.checkpoint / "model.safetensors" for result in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    trainer = Trainer(config(folder), open_set(config(folder)))
    assert trainer.model.in_channels == 2
    assert trainer.model.x_embedder.img_size == (SIZE // 4, SIZE // 4)
    assert trainer.data.describe()["vae"]["sha256"] == LatentEncoder(str(folder / "vae")).sha256


def test_what_does_not_fit_is_refused(folder):
    encoder = LatentEncoder(str(folder / "vae"))
    with pytest.raises(
        ConfigError,
        match=r"--image-size 18 is not a multiple of 4, the downsampling factor of --vae .*: give 16",
    ):
        open_data(folder / "images", 18, encoder=encoder)
    grey = open_images(folder / "images", SIZE, channels=1)
    with pytest.raises(ConfigError, match=r"takes images of 3 channels, .*images has 1"):
        encode_in_loop(grey, encoder)
    encode(settings(folder))
    with pytest.raises(ConfigError, match=r"set holds latents already; remove it"):
        open_data(folder / "set", encoder=encoder)
    with pytest.raises(ConfigError, match="--vae nowhere: give ema, mse, or a folder"):
        open_set(config(folder, vae="nowhere"))
