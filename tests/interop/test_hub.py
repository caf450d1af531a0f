"""Models by their ids on the Hugging Face hub, from a cache made here, and pipelines' folders; never from a network."""

import json
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
)
from huggingface_hub import constants
from PIL import Image

from dit_fast.checkpoint.hub import is_hub_id
from dit_fast.cli import main
from dit_fast.cli.labels import numbers_of
from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError
from dit_fast.interop import ConvertedDiT, load_model
from tests.tolerance import assert_close

COMMIT, OLDER = "1" * 40, "2" * 40
# DiTPipeline takes 1000 for the null class.
NAMES = {i: f"thing {i}" for i in range(1000)} | {0: "tench, Tinca tinca", 2: "drake"}


def transformer(seed: int = 0) -> DiTTransformer2DModel:
    """Random weights, with the embedders that a DiT has once the same in every block."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def pipeline() -> DiTPipeline:
    blocks = {"up_block_types": ("UpDecoderBlock2D",) * 2, "down_block_types": ("DownEncoderBlock2D",) * 2}
    torch.manual_seed(1)
    vae = AutoencoderKL(
        **blocks, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, scaling_factor=0.5
    )
    return DiTPipeline(transformer(), vae, DDIMScheduler(clip_sample=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "DiT-tiny"
    pipeline().save_pretrained(path)
    # As the published pipelines have it; diffusers reads it and does not write it.
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "id2label": NAMES}))
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def publish(hub: Path, name: str, commit: str = COMMIT, ref: str = "main") -> Path:
    """The folder of a model in the cache, as huggingface_hub keeps it."""
    root = hub / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def command(*words) -> int:
    return main(["sample", *map(str, words)])


# Ids


def test_an_id_and_a_pinned_revision(hub):
    transformer(0).save_pretrained(publish(hub, "org/tiny"))
    transformer(1).save_pretrained(publish(hub, "org/tiny", OLDER, "v1"))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.tensor([0, 2])
    for name, seed in (
        ("org/tiny", 0),
        ("org/tiny@v1", 1),
        (f"org/tiny@{OLDER}", 1),
        (Path("org/tiny@main"), 0),
    ):
        model, info = load_model(name)
        assert isinstance(model, ConvertedDiT)
        with torch.no_grad():
            assert_close(model(x, t, y), transformer(seed)(x, t, y).sample, what=name)
        assert info.path.parent.name == (OLDER if seed else COMMIT)


def test_weights_in_bin_are_read_where_there_are_no_others(hub):
    snapshot = publish(hub, "facebook/DiT-tiny")
    transformer().save_pretrained(snapshot / "transformer")
    (snapshot / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    expected = load_model("facebook/DiT-tiny")[0].state_dict()
    (snapshot / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(transformer().state_dict(), snapshot / "transformer" / "diffusion_pytorch_model.bin")
    model, info = load_model("facebook/DiT-tiny")
    assert info.path.suffix == ".bin"
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "saved",
    [
        {"variant": "bf16"},
        {"variant": "fp16", "max_shard_size": "10KB"},
        {"variant": "fp16", "safe_serialization": False},
        {"variant": "fp16", "safe_serialization": False, "max_shard_size": "10KB"},
        {"safe_serialization": False, "max_shard_size": "10KB"},
    ],
    ids=["bf16", "shards of fp16", "bin of fp16", "shards of bin of fp16", "shards of bin"],
)
def test_a_repository_of_variants_only(hub, tmp_path, monkeypatch, saved):
    """Fetched step by step, as the patterns of the files ask for them, into an empty folder."""
    transformer().save_pretrained(tmp_path / "remote" / "transformer", **saved)
    (tmp_path / "remote" / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    (tmp_path / "local").mkdir()

    def download(name, revision, allow_patterns):
        for path in (tmp_path / "remote").rglob("*.*"):
            file = path.relative_to(tmp_path / "remote")
            if any(fnmatch(str(file), pattern) for pattern in allow_patterns):
                (tmp_path / "local" / file).parent.mkdir(exist_ok=True)
                shutil.copy(path, tmp_path / "local" / file)
        return str(tmp_path / "local")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model, info = load_model("org/tiny")
    variant = saved.get("variant")
    assert any(f"only variants of the weights, using {variant!r}" in note for note in info.notes) == bool(
        variant
    )
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.tensor([0, 2])
    with torch.no_grad():
        assert_close(model(x, t, y), transformer()(x, t, y).sample)
    names = {path.name for path in (tmp_path / "local" / "transformer").iterdir()}
    assert names == {path.name for path in (tmp_path / "remote" / "transformer").iterdir()}


def test_what_is_fetched_is_what_is_read(hub, monkeypatch):
    """Of a pipeline's repository: no other precisions, no pickles where there are safetensors."""
    snapshot, asked = publish(hub, "org/tiny"), []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, revision, allow_patterns: (
            asked.append((name, revision, allow_patterns)) or str(snapshot)
        ),
    )
    transformer().save_pretrained(snapshot)
    load_model("org/tiny@v2")
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("org/tiny", "v2")
    files = [
        "model_index.json", "config.json", "scheduler/scheduler_config.json", "model.safetensors",
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json", "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    ]  # fmt: skip
    others = [
        "transformer/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.safetensors", "README.md", "optimizer.pt", "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    for names, wanted in ((files, True), (others, False)):
        assert {file: any(fnmatch(file, pattern) for pattern in patterns) for file in names} == dict.fromkeys(
            names, wanted
        )


def test_what_is_written_like_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("facebook/DiT-XL-2-256", "a/b@main", "a/b@refs/pr/1", "a.b/c_d"):
        assert is_hub_id(name), name
    for name in (
        "runs/mine",
        "runs/mime",
        "runs/mine.pt",
        "/a/b",
        "./a/b",
        "../a",
        "a",
        "a/b/c",
        "a/",
        "a/b@",
        "a/b@../c",
        "~/a",
    ):
        assert not is_hub_id(name), name


def test_a_misspelled_path_is_not_looked_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    assert command("--ckpt", "runs/photo", "--out", "o") == 1
    line = "dit-fast: error: runs/photo: no such file or folder; did you mean runs/photos?\n"
    assert capsys.readouterr().err == line


def test_offline_is_one_line(hub, capsys, monkeypatch):
    publish(hub, "org/tiny")
    for name in ("org/none", "org/tiny@v9"):
        assert command("--ckpt", name, "--out", "o") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        model, _, revision = name.partition("@")
        wanted = f"hf download {model}{' --revision v9' if revision else ''}`"
        assert (
            f"{name}: no such file or folder, and no such model in the Hugging Face cache or from the network"
            in error
        )
        assert wanted in error
    assert command("--ckpt", "org/tiny", "--out", "o") == 1
    assert "no checkpoint in this folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[hub\]'"):
        load_model("org/none")


def test_a_hostile_bin_is_not_run(hub, tmp_path):
    class Call:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    snapshot = publish(hub, "org/evil")
    transformer().save_pretrained(snapshot)
    (snapshot / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weight": Call()}, snapshot / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused"):
        load_model("org/evil")
    assert not (tmp_path / "canary").exists()


# Pipelines' folders


def test_a_pipeline_tells_names_schedule_and_autoencoder(folder):
    _, info = load_model(folder)
    assert info.class_names == tuple(NAMES.values())
    assert info.diffusion == {"noise_schedule": "linear", "diffusion_steps": 1000, "predict_xstart": False}
    assert info.vae == str(folder / "vae")
    assert info.latent
    _, inner = load_model(folder / "transformer")
    assert (inner.class_names, inner.diffusion, inner.vae) == (info.class_names, info.diffusion, info.vae)
    _, alone = load_model(folder / "transformer", objective="diffusion")
    assert (alone.class_names, alone.vae) == (None, None)


@pytest.mark.parametrize("kind", ["pipeline", "transformer", "hub"])
def test_sampling_from_a_folder_of_diffusers(kind, folder, hub, tmp_path, monkeypatch, capsys):
    """`dit-fast sample` draws what diffusers' own pipeline draws: same guidance, schedule, autoencoder and rounding."""
    source = folder / "transformer" if kind == "transformer" else folder
    if kind == "hub":
        publish(hub, "org/tiny").rmdir()
        (hub / "models--org--tiny" / "snapshots" / COMMIT).symlink_to(folder)
        source = "org/tiny"
    ask = ["--ckpt", source, "--steps", "ddim4", "--solver", "ddim", "--save-images", "--device", "cpu"]
    classes = [0, 2, 1] if kind == "transformer" else ["Tinca tinca", "drake", 1]
    extra = ["--num", 3, "--classes", *classes, *(["--vae", folder / "vae"] if kind == "transformer" else [])]
    assert command(*ask, *extra, "--out", "o", "--seed", 3) == 0
    labels = [0, 2, 1]
    pictures = sorted(Path("o/images").iterdir())
    tags = ["class0-tench", "class2-drake", "class1-thing_1"]
    assert [path.stem[7:] for path in pictures] == (
        [f"class{label}" for label in labels] if kind == "transformer" else tags
    )
    ours = np.stack([np.asarray(Image.open(path)) for path in pictures]).astype(int)
    assert ours.shape == (3, 16, 16, 3)

    theirs = DiTPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    start = torch.randn(3, 4, 8, 8)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **options: start)
    # Its spacing of 4 steps is that of "ddim4": 0, 250, 500, 750.
    drawn = theirs(labels, guidance_scale=4.0, num_inference_steps=4, output_type="np").images
    assert np.abs(ours - 255 * drawn).max() < 0.51, "nothing but the rounding to 256 levels"


@pytest.mark.parametrize(
    ("scheduler", "line"),
    [
        ({"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear'"),
        ({"beta_end": 0.012}, "betas 0.0001 to 0.012"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"num_train_timesteps": -1}, "num_train_timesteps -1"),
        ({"prediction_type": "flow"}, "prediction_type 'flow'"),
    ],
)
def test_a_schedule_that_is_another_is_refused(folder, tmp_path, scheduler, line):
    shutil.copytree(folder, tmp_path / "p")
    path = tmp_path / "p" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))
    with pytest.raises(CheckpointError, match=line) as caught:
        load_model(tmp_path / "p")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=line):
        load_model(tmp_path / "p" / "transformer")
    load_model(tmp_path / "p" / "transformer", objective="diffusion")


def test_names_that_two_classes_share():
    names = ("tench, Tinca tinca", "crane", "drake, crane", "a, b", "c, b")
    assert numbers_of(["Tinca tinca", "crane", "a, b", "drake,a"], 5, names) == [0, 1, 3, 2, 3]
    with pytest.raises(ConfigError, match="--classes b: the name of classes 3 and 4; give the number"):
        numbers_of(["b"], 5, names)
    with pytest.raises(
        ConfigError,
        match=r"--classes Tinca: .*no class of that name; near it: Tinca tinca",
    ):
        numbers_of(["tench,Tinca"], 5, names)
