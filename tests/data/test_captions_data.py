"""Captions from files to training: folders of captions, embeddings, encoded sets, keyed drop, resume."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_fast.cli import main
from dit_fast.data import open_data, open_latents, open_stream
from dit_fast.data.captions import EmbeddingFile, list_captioned
from dit_fast.data.encode import EncodeConfig, encode
from dit_fast.encoders.text import TextEncoder
from dit_fast.errors import CheckpointError, ConfigError, DataError
from dit_fast.interop import load_model
from dit_fast.models import DiT
from dit_fast.sampling import Guidance, Sampler, SamplerConfig, sampling_schedule
from dit_fast.training.config import TrainConfig
from dit_fast.training.trainer import Trainer
from dit_fast.utils import keyed
from tests import latent_sets, text_models
from tests.caption_sets import CAPTIONS, MODEL, embeddings, write_captioned
from tests.latent_sets import write_vae
from tests.tolerance import assert_close, assert_trained_alike


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven images with a .txt each, and the stand-in autoencoder in vae/."""
    latent_sets.install(monkeypatch)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    write_vae(tmp_path / "vae")
    return write_captioned(tmp_path / "images")


def settings(images: Path, text_encoder: Path, **options: object) -> EncodeConfig:
    work = images.parent
    paths = {"data": str(images), "vae": str(work / "vae"), "out": str(work / "set")}
    small = {"image_size": 16, "shard_size": 3, "batch_size": 2, "num_workers": 1, "dtype": "float32"}
    return EncodeConfig(**{**paths, **small, "text_encoder": str(text_encoder), **options})


@pytest.fixture
def encoded(images: Path) -> Path:
    save_file(embeddings(), images.parent / "made.safetensors")
    return encode(settings(images, images.parent / "made.safetensors")).out


# Folders of captions


def test_captions_lie_beside_images_or_in_metadata(images):
    paths, texts = list_captioned(images, True)
    assert [path.name for path in paths] == [f"{i}.png" for i in range(7)]
    assert texts == CAPTIONS
    lines = [
        json.dumps({"file_name": "1.png", "text": "a dog", "more": 1}),
        "",
        json.dumps({"file_name": "2.png", "text": "b"}),
    ]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    (images / "2.txt").unlink()
    assert list_captioned(images, True)[1] == [CAPTIONS[0], "a dog", "b", *CAPTIONS[3:]]


def test_an_image_without_a_caption_is_named(images):
    (images / "3.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 7 images have no caption: 3\.png; put a \.txt"):
        list_captioned(images, True)
    (images / "metadata.jsonl").write_text('{"file_name": "3.png"}\n')
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 1: expected"):
        list_captioned(images, True)


def test_captions_without_embeddings_are_refused(images):
    with pytest.raises(
        DataError, match="captions but no embeddings: encode them with dit-fast encode --text-encoder"
    ):
        open_data(images)


# Embeddings


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_embeddings_of_others_are_stored_padded(images, suffix):
    made, path = embeddings(), images.parent / f"made{suffix}"
    if suffix == ".npz":
        np.savez(path, **{name: array.numpy() for name, array in made.items()})
    else:
        save_file(made, path)
    result = encode(settings(images, path, caption_tokens=5))
    assert (result.complete, result.images, result.encoded) == (True, 7, 3)
    data = open_latents(result.out, verify=True)
    assert (data.caption_tokens, data.caption_dim, data.describe()["captions"]["name"]) == (5, 6, path.name)
    told = data.train.conditioning(torch.arange(7))
    for number in range(7):
        own = made[f"{number}.png"]
        assert torch.equal(told[number, : len(own)], own)
        assert not told[number, len(own) :].any()
    again = encode(settings(images, path, caption_tokens=5))
    assert (again.encoded, again.kept) == (0, 3)


def test_a_damaged_or_lost_shard_of_captions_is_found(images, encoded):
    shard = encoded / "captions-00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4] + b"abcd")
    with pytest.raises(DataError, match=r"captions-00001\.npy was changed or damaged"):
        open_latents(encoded, verify=True)
    shard.unlink()
    with pytest.raises(DataError, match=r"captions-00001\.npy is missing"):
        open_latents(encoded)
    assert encode(settings(images, images.parent / "made.safetensors")).encoded == 1
    assert shard.read_bytes() == whole
    before = open_latents(encoded).fingerprint
    save_file({name: array + 1 for name, array in embeddings().items()}, images.parent / "other.safetensors")
    with pytest.raises(DataError, match="begun with other settings: captions is"):
        encode(settings(images, images.parent / "other.safetensors"))
    other = encode(settings(images, images.parent / "other.safetensors", out=str(images.parent / "other")))
    assert open_latents(other.out).fingerprint != before


def test_embeddings_that_do_not_fit_are_refused(images, tmp_path):
    path = tmp_path / "made.safetensors"
    made = embeddings()
    del made["2.png"]
    save_file(made, path)
    with pytest.raises(DataError, match=r"has no embedding of 2\.png"):
        encode(settings(images, path))
    with pytest.raises(ConfigError, match=r"--caption-tokens 2: .* has captions of 4 tokens"):
        EmbeddingFile(path, 2)
    save_file({"0.png": torch.zeros(3)}, path)
    with pytest.raises(DataError, match=r"made\.safetensors: 0\.png is float32 \(3,\)"):
        EmbeddingFile(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(DataError, match="not a readable file of embeddings"):
        EmbeddingFile(path)
    np.savez(tmp_path / "made.npz", **{"0.png": np.array([object()])})
    with pytest.raises(DataError, match="not a readable file of embeddings"):
        EmbeddingFile(tmp_path / "made.npz")
    with pytest.raises(ConfigError, match="--caption-tokens 3 applies only to captions"):
        encode(dataclasses.replace(settings(images, path), text_encoder=None, caption_tokens=3))


# Text encoders


@pytest.mark.parametrize(
    ("write", "tokens", "default"), [(text_models.write_t5, 6, 120), (text_models.write_clip, 6, 7)]
)
def test_a_text_encoder_of_transformers(tmp_path, write, tokens, default):
    folder = write(tmp_path / "text")
    encoder = TextEncoder(str(folder), tokens)
    assert (encoder.width, TextEncoder(str(folder)).tokens) == (text_models.WIDTH, default)
    made = encoder([], CAPTIONS)
    assert (made.shape, made.dtype) == ((7, tokens, text_models.WIDTH), torch.float32)
    # Words and the end of the caption; what is longer is cut.
    assert (made != 0).any(-1).sum(1).tolist() == [4, 4, 5, 2, 1, 4, 6]
    alone = encoder([], CAPTIONS[:1])
    assert_close(alone[0], made[0])
    assert (made[0] - made[1]).abs().max() > 1e-3
    assert TextEncoder(str(write(tmp_path / "other", 1)), tokens).sha256 != encoder.sha256


def test_text_encoders_that_cannot_be_are_refused(tmp_path, monkeypatch):
    clip = text_models.write_clip(tmp_path / "clip")
    with pytest.raises(ConfigError, match=r"--caption-tokens 8: .* takes up to 7"):
        TextEncoder(str(clip), 8)
    (clip / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot load the text encoder"):
        TextEncoder(str(clip))
    (clip / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is a bert: give a CLIP or a T5"):
        TextEncoder(str(clip))


# Training


def train(encoded: Path, **options: object) -> Trainer:
    small = {
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "patch_size": 2,
        "batch_size": 4,
        "device": "cpu",
        "steps": 4,
    }
    config = TrainConfig(data=str(encoded), **{"conditioning": "cross_attention", **small, **options})
    return Trainer(config, open_data(encoded))


def test_captions_are_dropped_as_labels_are(encoded):
    trainer = train(encoded, class_dropout_prob=0.8)
    moments, told = open_stream(trainer.data, 4, 0).stored(0)
    indices = trainer.stream.indices(0)
    assert torch.equal(told, trainer.data.train.conditioning(indices))
    dropped = keyed.uniform(keyed.key(0, "label drop"), torch.arange(4)) < 0.8
    assert 0 < int(dropped.sum()) < 4
    drawn = trainer.work.draw(moments, told)[3]
    assert torch.equal(drawn, told * ~dropped[:, None, None])


def test_micro_batches_make_the_same_step(encoded):
    whole, parts = train(encoded), train(encoded, accumulate=2)
    for trainer in (whole, parts):
        for step in range(2):
            trainer.train_step(*trainer.stream.stored(step))
    assert whole.model.caption_dim == 6
    assert_trained_alike(
        dict(parts.model.named_parameters()), dict(whole.model.named_parameters()), 2 * parts.config.lr
    )


def test_the_default_conditioning_says_what_to_give(encoded):
    with pytest.raises(ConfigError, match="give 'cross_attention' or 'in_context'"):
        train(encoded, conditioning="adaln_zero")


def test_a_run_is_resumed_bit_for_bit(encoded, tmp_path, capsys):
    options = ["--conditioning", "in_context", "--batch-size", "4", "--log-every", "2", *MODEL]
    for name, steps in (("whole", "4"), ("parts", "2")):
        assert (
            main(["train", "--data", str(encoded), "--out", str(tmp_path / name), "--steps", steps, *options])
            == 0
        )
    assert main(["train", "--resume", str(tmp_path / "parts"), "--steps", "4"]) == 0
    whole, parts = (
        next((tmp_path / name).rglob("*0004/ema.safetensors")).read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)


# Sampling


def test_prompts_are_drawn_with_the_training_s_encoder(images, tmp_path, capsys):
    text = text_models.write_t5(tmp_path / "text")
    out = encode(settings(images, text, caption_tokens=6)).out
    run = tmp_path / "run"
    options = ["--conditioning", "cross_attention", "--batch-size", "4", "--steps", "2", *MODEL]
    assert main(["train", "--data", str(out), "--out", str(run), *options]) == 0
    usual = [
        "sample",
        "--ckpt",
        str(run),
        "--vae",
        "none",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--cfg-scale",
        "2",
        "--no-graph",
    ]
    prompts = ["--prompt", "a red cat", "the blue dog", "--mode", "fast"]
    assert main([*usual, *prompts, "--num", "3", "--out", str(tmp_path / "out")]) == 0
    drawn = np.load(tmp_path / "out" / "latents.npy")
    assert drawn.shape == (3, 2, 4, 4)
    captions = TextEncoder(str(text), 6)([], ["a red cat", "the blue dog"])
    model, info = load_model(run)
    schedule = sampling_schedule(info.diffusion, "2", "ddpm", learn_sigma=True)
    config = SamplerConfig(guidance=Guidance(2.0), graph="never", precision="fp32")
    assert_close(Sampler(model, schedule, config)(captions[[0, 1, 0]], seed=0), drawn)
    capsys.readouterr()

    refusals = [
        ([], "give --prompt"),
        (["--prompt", "a", "--classes", "1"], "and no --classes"),
        (
            ["--prompt", "a", "--text-encoder", str(text_models.write_t5(tmp_path / "other", 1))],
            "did not encode the captions",
        ),
    ]
    for more, reason in refusals:
        assert main([*usual, *more, "--out", str(tmp_path / "refused")]) == 1
        error = capsys.readouterr().err
        assert reason in error


def test_a_model_of_classes_takes_no_prompt(tmp_path, capsys):
    DiT(input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=3).save_pretrained(tmp_path / "model")
    usual = ["sample", "--ckpt", str(tmp_path / "model"), "--vae", "none", "--steps", "2", "--device", "cpu"]
    assert main([*usual, "--prompt", "a cat", "--out", str(tmp_path / "out")]) == 1
    assert "apply only to models trained on captions; remove them" in capsys.readouterr().err
