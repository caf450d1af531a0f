"""Captions beside images: embeddings in the folder, in the loop, while training, in every command, on two ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dit_fast.checkpoint.folder import latest_checkpoint, load_checkpoint
from dit_fast.cli import main
from dit_fast.data import open_data, open_latents, open_stream
from dit_fast.data.encode import EncodeConfig, encode
from dit_fast.encoders.autoencoder import LatentEncoder
from dit_fast.encoders.text import TextEncoder
from dit_fast.errors import DataError
from dit_fast.evaluation import features
from dit_fast.interop import load_model
from dit_fast.models import DiT
from dit_fast.sampling import (
    Guidance,
    Sampler,
    SamplerConfig,
    draw_grid,
    sampling_schedule,
    short_label,
    to_uint8,
)
from dit_fast.sampling.explain import attention_maps
from dit_fast.training import TrainConfig, Trainer
from dit_fast.training.callbacks import Evaluation, SampleGrids
from dit_fast.training.config import open_set
from dit_fast.training.log import read_scores
from tests import caption_sets, latent_sets, text_models
from tests.caption_sets import CAPTIONS, MODEL, NAMES, embeddings, padded
from tests.cli.test_evaluate import SmallNetwork
from tests.distributed.ranks import train as train_on_ranks
from tests.tolerance import assert_close, assert_same_distance, assert_trained_alike

SMALL = {"hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4, "batch_size": 4, "device": "cpu"}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven images with captions and their embeddings."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    folder = caption_sets.write_captioned(tmp_path / "photos")
    save_file(embeddings(), folder / "embeddings.safetensors")
    return folder


def new_trainer(photos: Path, **options: Any) -> Trainer:
    config = TrainConfig(
        str(photos), **{"conditioning": "in_context", "steps": 2, "sample_steps": 3, **SMALL, **options}
    )
    return Trainer(config, open_set(config))


def run(*words: object) -> int:
    return main([str(word) for word in words])


# The folder


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_embeddings_beside_images_are_told(photos, suffix):
    if suffix == ".npz":
        (photos / "embeddings.safetensors").unlink()
        np.savez(photos / "embeddings.npz", **{name: array.numpy() for name, array in embeddings().items()})
    data = open_data(photos, holdout=0.3)
    assert (data.caption_tokens, data.caption_dim, len(data.train), len(data.heldout)) == (4, 6, 5, 2)
    assert list(data.captions.texts) == CAPTIONS
    assert data.train.lazy
    images, told = open_stream(data, 5, 0, flip=False).batch(0)
    members = data.train.members[open_stream(data, 5, 0).indices(0)]
    assert torch.equal(told, padded()[members])
    for image, member in zip(images, members.tolist(), strict=True):
        pixels = np.asarray(Image.open(photos / NAMES[member])).transpose(2, 0, 1)
        assert np.array_equal(((image + 1) * 127.5).round().numpy(), pixels)
    (photos / "3.txt").unlink()
    assert open_data(photos).captions.texts[3] == "3.png", "no more than a name is known of it"


def test_each_image_of_several_shapes_keeps_its_caption(photos):
    for number in (1, 4, 6):
        Image.open(photos / NAMES[number]).resize((32, 16)).save(photos / NAMES[number])
    stream = open_stream(open_data(photos, buckets=((8, 8), (8, 16))), 2, 0)
    for step in range(4):
        images, told = stream.batch(step)
        members = stream.indices(step)
        assert torch.equal(told, padded()[members])
        assert {member in (1, 4, 6) for member in members.tolist()} == {images.shape[3] == 16}


def test_embeddings_that_are_not_the_images_are_refused(photos):
    made, path = embeddings(), photos / "embeddings.safetensors"
    before = open_data(photos).fingerprint

    def refused() -> str:
        save_file(made, path)
        with pytest.raises(DataError) as error:
            open_data(photos)
        return str(error.value)

    made["0.png"] = made["0.png"] + 1
    save_file(made, path)
    assert open_data(photos).fingerprint != before
    lost = made.pop("2.png")
    assert "has no embedding of 2.png (6 embeddings, 7 images)" in refused()
    made |= {"2.png": lost, "cat.png": lost.clone()}
    assert "has an embedding cat.png without an image (8 embeddings, 7 images)" in refused()
    del made["cat.png"]
    made["2.png"] = torch.zeros(1, 5)
    assert "embeddings of one width are required, found [5, 6]" in refused()
    made["2.png"] = torch.full((1, 6), torch.inf)
    assert "2.png contains NaN or infinity" in refused()
    made["2.png"] = lost
    (photos / "embeddings.npz").touch()
    assert "has embeddings.safetensors and embeddings.npz: keep the one" in refused()
    (photos / "embeddings.npz").unlink()
    for said in ("[", '{"name": "x"}', '{"name": "x", "sha256": "", "tokens": 2, "width": 6}'):
        save_file(made, path, metadata={"encoder": said})
        with pytest.raises(DataError, match=r"embeddings\.safetensors"):
            open_data(photos)


def test_captions_without_embeddings_say_how_to_make_them(photos, capsys):
    (photos / "embeddings.safetensors").unlink()
    (photos / "more").mkdir()
    (photos / "0.png").rename(photos / "more" / "0.png")
    assert run("train", "--data", photos, "--out", photos / "run", *MODEL) == 1
    error = capsys.readouterr().err
    assert "captions but no embeddings: encode them with dit-fast encode" in error
    assert not (photos / "run").exists()


def test_in_the_loop_latents_and_captions_are_those_of_the_encoded_set(photos, tmp_path, monkeypatch):
    latent_sets.install(monkeypatch)
    vae = str(latent_sets.write_vae(tmp_path / "vae"))
    text = str(photos / "embeddings.safetensors")
    config = EncodeConfig(
        str(photos), str(tmp_path / "set"), vae, 16, "float32", "fp32", text_encoder=text, num_workers=1
    )
    stored = open_latents(encode(config).out)
    looped = open_data(photos, encoder=LatentEncoder(vae, "cpu"))
    assert (looped.caption_dim, looped.caption_tokens, looped.image_size) == (6, 4, 4)
    for one, other in zip(
        open_stream(stored, 4, 0).stored(1), open_stream(looped, 4, 0).stored(1), strict=True
    ):
        assert_close(one, other)
    assert run("train", "--data", photos, "--vae", vae, "--out", tmp_path / "run", *MODEL, "--conditioning",
               "cross_attention", "--batch-size", 4, "--steps", 1) == 0  # fmt: skip
    assert load_model(tmp_path / "run")[0].config["in_channels"] == 2


# From words to samples


def test_captions_are_encoded_into_the_folder_and_prompts_as_they_were(photos, tmp_path, capsys):
    text = text_models.write_t5(tmp_path / "text")
    path = photos / "embeddings.safetensors"
    path.unlink()
    usual = ["encode", "--data", photos, "--vae", "none", "--device", "cpu", "--batch-size", 2]
    for more, reason in [
        ((), "give --text-encoder"),
        (("--text-encoder", text, "--out", photos), "a file that ends in .safetensors"),
    ]:
        assert run(*usual, "--out", path, *more) == 1
        assert reason in capsys.readouterr().err
    more = ("--text-encoder", text, "--caption-tokens", 9, "--dtype", "float32")
    assert run(*usual, "--out", path, *more) == 0
    assert "embeddings of 7 captions" in capsys.readouterr().out
    encoder = TextEncoder(str(text), 9)
    with safe_open(path, framework="pt") as file:
        assert [len(file.get_tensor(name)) for name in NAMES] == [4, 4, 5, 2, 1, 4, 9], "without padding"
    data = open_data(photos)
    assert_close(data.train.conditioning(torch.arange(7)), encoder([], CAPTIONS))
    assert data.describe()["captions"] == encoder.identity()

    out = tmp_path / "run"
    trained = ["train", "--data", photos, "--out", out, *MODEL, "--conditioning", "cross_attention"]
    assert run(*trained, "--batch-size", 4, "--steps", 1) == 0
    sample = ["sample", "--ckpt", out, "--steps", 2, "--device", "cpu", "--out", tmp_path / "drawn"]
    assert run(*sample, "--prompt", "a red cat", "--num", 1, "--mode", "fast", "--npz") == 0
    model, info = load_model(out)
    config = SamplerConfig(guidance=Guidance(4.0), clip=True, graph="never", precision="fp32")
    schedule = sampling_schedule(info.diffusion, "2", "ddpm", learn_sigma=True)
    expected = Sampler(model, schedule, config)(encoder([], ["a red cat"]), seed=0)
    found = np.load(tmp_path / "drawn" / "samples.npz")["arr_0"]
    assert np.abs(found.astype(int) - to_uint8(expected)).max() <= 1


# While training


def test_grids_are_of_the_captions_of_training_samples(photos, tmp_path):
    trainer = new_trainer(photos, class_dropout_prob=0.5, holdout=0.3)
    for parameter in trainer.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    grids = SampleGrids(trainer)
    grids.draw(tmp_path / "samples" / "step.png")
    assert len(trainer.data.train) == 5
    names = [CAPTIONS[member] for member in trainer.data.train.members.tolist()]
    assert (tmp_path / "samples" / "captions.txt").read_text() == "".join(f"{name}\n" for name in names)
    told = padded()[trainer.data.train.members].repeat_interleave(8, dim=0)
    images = to_uint8(Sampler(trainer.model, grids.sampler.schedule, grids.sampler.config)(told, seed=0))
    rows = [(short_label(name), images[8 * row : 8 * row + 8]) for row, name in enumerate(names)]
    drawn = np.asarray(Image.open(tmp_path / "samples" / "step.png"))
    assert np.array_equal(drawn, np.asarray(draw_grid(rows)))
    assert grids.sampler.config.guidance.active
    assert not np.array_equal(images[0], images[8])


def test_a_long_caption_is_cut_to_a_label():
    assert short_label("a  red\ncat") == "a red cat"
    assert short_label("word " * 20) == "word word word word word word word wo..."


def training(photos: Path, steps: int) -> list[object]:
    """The words of a short run on captions."""
    options = ["--conditioning", "in_context", "--batch-size", 4, "--steps", steps]
    return ["train", "--data", photos, *MODEL, *options]


def test_a_run_with_grids_and_scores_is_the_run_without(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "InceptionFeatures", SmallNetwork)
    usual = training(photos, steps=2)
    assert run(*usual, "--out", tmp_path / "plain") == 0
    watched = ["--sample-every", 1, "--sample-steps", 2, "--evaluate-every", 1, "--evaluate-samples", 5]
    assert run(*usual, "--out", tmp_path / "run", *watched, "--evaluate-weights", "unused.pth") == 0
    one, other = (next((tmp_path / name).rglob("*/model.safetensors")) for name in ("plain", "run"))
    assert one.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "captions.txt", "step-0000001.png", "step-0000002.png",
    ]  # fmt: skip
    scores = read_scores(tmp_path / "run" / "log.jsonl")
    assert [line["num_samples"] for line in scores] == [5, 5]
    assert all(line["fid"] > 0 for line in scores)


def test_what_an_evaluation_draws_is_what_the_command_draws(photos, tmp_path, monkeypatch):
    """`dit-fast evaluate --ckpt` takes the same captions for the same seed, and the same noise."""
    monkeypatch.setattr(features, "InceptionFeatures", SmallNetwork)
    options = {"evaluate_every": 1, "evaluate_samples": 9, "evaluate_weights": "unused.pth"}
    trainer = new_trainer(photos, conditioning="cross_attention", ema_decay=0.0, **options)
    for parameter in trainer.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    trainer.train_step(*trainer.stream.stored(0))
    evaluation = Evaluation(trainer)
    score = evaluation.score()
    with trainer.writer(tmp_path / "run") as writer:
        trainer.save(writer)
    out = tmp_path / "scores.json"
    asked = ["--num", 9, "--steps", 3, "--against", photos, "--weights", "unused.pth", "--metrics", "fid"]
    assert run("evaluate", "--ckpt", tmp_path / "run", *asked, "--device", "cpu", "--out", out) == 0
    assert_same_distance(json.loads(out.read_text())["fid"], score.fid)


def test_captions_of_the_training_are_only_drawn_where_they_still_are(photos, tmp_path, capsys):
    usual = training(photos, steps=1)
    assert run(*usual, "--out", tmp_path / "run") == 0
    sample = [
        "sample",
        "--ckpt",
        tmp_path / "run",
        "--steps",
        2,
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
    ]
    capsys.readouterr()

    def refused(*more: object) -> str:
        assert run(*sample, *more) == 1
        return capsys.readouterr().err

    assert "give --prompt" in refused()
    assert "say how many images with --num" in refused("--npz")
    assert "and no --classes" in refused("--npz", "--classes", "random", "--num", 2)
    prompt = ("--prompt", "0.png", "--text-encoder", photos / "embeddings.safetensors", "--num", 1)
    assert "the model is conditioned on captions: score it" in refused(*prompt, "--compare-to")
    save_file({name: array + 1 for name, array in embeddings().items()}, photos / "embeddings.safetensors")
    assert "no longer has the captions" in refused("--npz", "--num", 2)
    (photos / "embeddings.safetensors").unlink()
    assert "no longer has the captions" in refused("--npz", "--num", 2)


# The other commands


def test_profile_samples_captions(photos, tmp_path, capsys):
    usual = ["profile", "--data", photos, *MODEL, "--conditioning", "cross_attention", "--batch-size", 9]
    words = ["--sample", "--first", 1, "--count", 1, "--top", 1, "--trace", tmp_path / "trace.json"]
    assert run(*usual, *words) == 0
    assert "1 sampling step after 1" in capsys.readouterr().out


@pytest.mark.parametrize("conditioning", ["in_context", "cross_attention"])
def test_attention_leaves_padding_out(conditioning):
    torch.manual_seed(0)
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2}
    model = DiT(conditioning=conditioning, caption_dim=6, **sizes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([30]), padded()[:1, :2]
    maps = attention_maps(model, x, t, y, 0)
    wide = attention_maps(model, x, t, torch.nn.functional.pad(y, (0, 0, 0, 3)), 0)
    assert_close(wide[:, :, : maps.shape[2]], maps)
    assert not wide[:, :, maps.shape[2] :].any()


def test_explain_shows_prompts(photos, tmp_path):
    DiT(16, 4, 3, 32, 1, 2, conditioning="in_context", caption_dim=6).save_pretrained(tmp_path / "model")
    words = [
        "--ckpt",
        tmp_path / "model",
        "--vae",
        "none",
        "--steps",
        3,
        "--device",
        "cpu",
        "--out",
        tmp_path,
    ]
    text = ["--prompt", "0.png", "5.png", "--text-encoder", photos / "embeddings.safetensors"]
    assert run("explain", *words, *text, "--frames", 2, "--scales", 1, 4) == 0
    heights = [Image.open(tmp_path / name).height for name in ("film.png", "attention.png")]
    assert heights[1] > 1.8 * heights[0], "two rows for each prompt"


# Dropped captions


def test_a_tenth_of_the_captions_is_dropped_and_trains_the_null_token(photos):
    trainer = new_trainer(photos)
    told = padded().repeat(600, 1, 1)
    trainer.work.positions = torch.arange(len(told))
    dropped = trainer.work.draw(torch.zeros(len(told), 3, 1, 1), told)[3]
    gone = (dropped == 0).flatten(1).all(1)
    assert torch.equal(dropped[~gone], told[~gone])
    # 4,200 draws of 0.1: three standard deviations are 0.0139.
    assert abs(gone.float().mean() - 0.1) < 0.0139
    embedder = trainer.model.y_embedder
    made = embedder(torch.where(torch.tensor([True, False])[:, None, None], 0, told[:2]), train=False)
    assert torch.equal(made[0, 0], embedder.null_token[0])
    assert not made[0, 1:].any()

    reached = []
    for probability in (0.0, 0.999):
        trainer = new_trainer(photos, class_dropout_prob=probability)
        before = {name: p.clone() for name, p in trainer.model.y_embedder.named_parameters()}
        trainer.optimizer.param_groups[0]["weight_decay"] = 0.0
        for parameter in trainer.model.final_layer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        trainer.train_step(*trainer.stream.stored(0))
        moved = {n for n, p in trainer.model.y_embedder.named_parameters() if not torch.equal(p, before[n])}
        reached.append(moved)
    assert "null_token" not in reached[0]
    assert "mlp.0.weight" in reached[0]
    assert reached[1] == {"null_token"}


# Several ranks


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_on_captions_as_one_process(photos, tmp_path, parallel):
    words = [
        *("--data", photos),
        *MODEL,
        "--conditioning",
        "cross_attention",
        "--batch-size",
        "4",
        "--steps",
        "3",
    ]
    words += ["--class-dropout-prob", "0.4", "--threads", "1", "--log-every", "1", "--timeout", "600"]
    words += ["--sample-every", "3", "--sample-steps", "2"]
    ended = train_on_ranks(
        tmp_path / "two", 2, [*words, "--parallel", parallel, "--out", tmp_path / "two" / "run"]
    )
    assert ended.codes == [0, 0], ended.text
    assert run("train", *words, "--out", tmp_path / "one") == 0
    one, two = (
        load_checkpoint(latest_checkpoint(run)) for run in (tmp_path / "one", tmp_path / "two" / "run")
    )
    assert_trained_alike(two.model, one.model, 3e-4)
    assert (tmp_path / "two" / "run" / "samples" / "captions.txt").exists()
