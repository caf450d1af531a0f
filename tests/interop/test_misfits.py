"""Weights, autoencoders, text encoders and schedulers that do not fit are refused; real ones in old layouts load."""

import json
import os
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from dit_fast.encoders.autoencoder import LatentDecoder, LatentEncoder, check_autoencoder
from dit_fast.encoders.text import TextEncoder
from dit_fast.errors import CheckpointError, ConfigError, DitFastError, NonFiniteError
from dit_fast.interop import load_model
from dit_fast.interop.diffusers import DIFFUSERS, save_diffusers
from dit_fast.interop.objective import pipeline_facts
from dit_fast.models import DiT
from tests import text_models
from tests.tolerance import SUM, assert_close

WEIGHTS = "diffusion_pytorch_model.safetensors"
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def write_vae(folder: Path, **options: object) -> Path:
    torch.manual_seed(0)
    sizes = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4, **LEVELS, **options}
    AutoencoderKL(**sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "good")


@pytest.fixture
def vae(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(good, tmp_path / "vae"))


def change_weights(folder: Path, change: object, name: str = WEIGHTS) -> None:
    state = load_file(folder / name)
    save_file(change(state), folder / name, metadata={"format": "pt"})


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


FIRST = "encoder.conv_in.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: {f"first_stage_model.{key}": value for key, value in state.items()},
            f"missing {FIRST}",
        ),
        (
            lambda state: {key: value for key, value in state.items() if not key.startswith("decoder.up")},
            "missing decoder.up_blocks.0",
        ),
        (lambda state: {**state, "loss.logvar": torch.zeros(1)}, "unexpected loss.logvar"),
        (
            lambda state: {**state, FIRST: torch.zeros(4, 3, 1, 1)},
            f"{FIRST} is (4, 3, 1, 1), expected (4, 3, 3, 3)",
        ),
        (lambda state: {**state, FIRST: state[FIRST] * float("nan")}, f"{FIRST} contains NaN"),
        (lambda state: {**state, FIRST: state[FIRST].long()}, "not dense floating-point weights"),
    ],
)
def test_weights_that_do_not_fit_an_autoencoder(vae: Path, change: object, said: str) -> None:
    change_weights(vae, change)
    for load in (lambda: LatentDecoder(str(vae), 4), lambda: LatentEncoder(str(vae))):
        with pytest.raises(CheckpointError) as error:
            load()
        assert said in one_line(error)
        assert str(vae) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"_class_name": "AsymmetricAutoencoderKL"},
            "describes a diffusers AsymmetricAutoencoderKL, expected an AutoencoderKL",
        ),
        ({"_class_name": None}, "describes a diffusers None"),
        ({"layers_per_block": 2}, "missing decoder.up_blocks"),
        ({"block_out_channels": [4, 8]}, "expected (8, "),
        ({"block_out_channels": [4, 4, 4]}, "lists of different lengths"),
        ({"block_out_channels": [2**30, 4]}, "block_out_channels[0] is 1073741824"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ({"norm_num_groups": 3}, "no AutoencoderKL can be built from it"),
        ({"down_block_types": ["DownEncoderBlock2D", "Nothing"]}, "no AutoencoderKL can be built from it"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "statistics for other than 4 channels"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 1.0, 0.0]}, "latents_std[3] is 0.0"),
    ],
)
def test_configurations_that_are_of_another_autoencoder(vae: Path, fields: dict, said: str) -> None:
    change_config(vae, **fields)
    with pytest.raises(CheckpointError) as error:
        LatentDecoder(str(vae), 4)
    assert said in one_line(error)


def test_folders_that_are_of_no_autoencoder(vae: Path, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny"
    AutoencoderTiny().save_pretrained(tiny)
    with pytest.raises(
        CheckpointError, match="describes a diffusers AutoencoderTiny, expected an AutoencoderKL"
    ):
        LatentDecoder(str(tiny), 4)
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(vae, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"this is the folder of a pipeline; give .*/pipeline/vae$"):
        LatentDecoder(str(tmp_path / "pipeline"), 4)
    assert LatentDecoder(str(tmp_path / "pipeline" / "vae"), 4).factor == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match=r"config\.json: no such file, expected a folder with a diffusers"
    ):
        LatentDecoder(str(tmp_path / "empty"), 4)
    for name in ("config.json", WEIGHTS):
        path = Path(shutil.copytree(vae, tmp_path / f"piped {name}")) / name
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match="cannot load the autoencoder") as error:
            LatentDecoder(str(path.parent), 4)
        assert one_line(error)


def test_the_layout_of_the_first_releases_loads(vae: Path) -> None:
    """sd-vae-ft-ema still has these names; diffusers' own class gives the values to compare with."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(state: dict) -> dict:
        renamed = {}
        for key, value in state.items():
            for today, then in new.items():
                key = key.replace(f"attentions.0.{today}.", f"attentions.0.{then}.")
            renamed[key] = value
        assert sum(key not in state for key in renamed) == 16
        return renamed

    z = torch.randn(2, 4, 4, 4)
    before = LatentDecoder(str(vae), 4)
    change_weights(vae, older)
    after = LatentDecoder(str(vae), 4)
    assert before.sha256 == after.sha256
    theirs = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        expected = theirs.decode(z / 0.18215).sample
    assert torch.equal(before(z), after(z))
    # Sums on sums, of some twenty layers.
    assert_close(after(z), expected, 20 * SUM)


def test_other_ways_in_which_autoencoders_are_saved(vae: Path, tmp_path: Path) -> None:
    """In shards, in half precision, of grey images, from an older diffusers that knew fewer fields."""
    z = torch.randn(1, 4, 4, 4)
    expected = LatentDecoder(str(vae), 4)(z)
    model = AutoencoderKL.from_pretrained(vae)
    model.save_pretrained(tmp_path / "shards", max_shard_size="5kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(LatentDecoder(str(tmp_path / "shards"), 4)(z), expected)
    change_weights(vae, lambda state: {key: value.half() for key, value in state.items()})
    half = LatentDecoder(str(vae), 4)(z)
    assert half.dtype == torch.float32
    assert (half - expected).abs().max() < 0.1
    path = vae / "config.json"
    known = json.loads(path.read_text())
    for name in ("shift_factor", "latents_mean", "latents_std", "scaling_factor", "mid_block_add_attention"):
        del known[name]
    path.write_text(json.dumps({**known, "of_a_later_version": 1}))
    assert torch.equal(LatentDecoder(str(vae), 4)(z), half)
    grey = write_vae(tmp_path / "grey", in_channels=1, out_channels=1)
    images = LatentDecoder(str(grey), 4)(z)
    assert images.shape == (1, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])
    with pytest.raises(ConfigError, match="produces images of 2 channels; grayscale or RGB needed"):
        LatentDecoder(str(write_vae(tmp_path / "two", out_channels=2)), 4)


def test_decoded_images_that_are_not_finite_are_refused(good: Path) -> None:
    decoder = LatentDecoder(str(good), 4)
    z = torch.randn(3, 4, 4, 4)
    z[1, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="1 of 3 decoded images contain NaN or infinity") as error:
        decoder(z, batch_size=1)
    assert str(good) in one_line(error)
    assert decoder(z[:1]).isfinite().all()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"latent_size": 4}, "its factor is 2, the latents are 4x4 for images of 64x64"),
        ({"scale": [0.13025] * 4}, "its scale is 0.18215, that of the latents 0.13025"),
        ({"shift": [0.0, 0.0, 0.0, 0.1]}, "its shift is 0, that of the latents 0, 0, 0, 0.1"),
        ({"shift": [0.0] * 16}, "its shift is 0"),
    ],
)
def test_an_autoencoder_that_contradicts_a_run(good: Path, facts: dict, said: str) -> None:
    decoder = LatentDecoder(str(good), 4)
    run = {
        "image_size": 64,
        "latent_size": 32,
        "shift": [0.0] * 4,
        "scale": [0.18215] * 4,
        "vae": {"sha256": "a"},
    }
    check_autoencoder("x", decoder, run, "run")
    check_autoencoder("x", decoder, {}, "run")
    with pytest.raises(ConfigError) as error:
        check_autoencoder("x", decoder, {**run, **facts}, "the run")
    assert said in one_line(error)
    # The statistics of a cache that another program wrote are its own.
    if "latent_size" not in facts:
        check_autoencoder("x", decoder, {**run, **facts, "vae": {"sha256": None}}, "run")
    with pytest.raises(ConfigError, match="has 4 latent channels, the model has 16"):
        LatentDecoder(str(good), 16)


# Text encoders


def change_text(folder: Path, change: object) -> Path:
    change_weights(folder, change, "model.safetensors")
    return folder


@pytest.mark.parametrize("write", [text_models.write_clip, text_models.write_t5])
def test_weights_that_do_not_fit_a_text_encoder(tmp_path: Path, write: object) -> None:
    good = write(tmp_path / "good")
    expected = TextEncoder(str(good))([], ["a red cat"])
    name = next(
        key
        for key in load_file(good / "model.safetensors")
        if key.endswith("layer_norm.weight") or "norm1" in key
    )
    changes = {
        "prefixed": (lambda state: {f"module.{key}": value for key, value in state.items()}, "missing "),
        "half": (lambda state: {k: v for k, v in state.items() if k != name}, f"missing {name}"),
        "misshaped": (lambda state: {**state, name: torch.zeros(3)}, f"misshaped {name}"),
        "more": (lambda state: {**state, "encoder.other": torch.zeros(3)}, "unexpected encoder.other"),
        "nan": (lambda state: {**state, name: state[name] * float("nan")}, f"{name} contains NaN"),
    }
    for kind, (change, said) in changes.items():
        bad = change_text(Path(shutil.copytree(good, tmp_path / kind)), change)
        with pytest.raises(CheckpointError, match="cannot load the text encoder") as error:
            TextEncoder(str(bad))
        assert said in one_line(error), kind
    # Harmless, and of real checkpoints: buffers and halves that the encoder does not have.
    more = {
        "vision_model.a": torch.zeros(1),
        "logit_scale": torch.zeros(1),
        "text_projection.weight": torch.zeros(1),
    }
    more |= {"decoder.block.0.a": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    more |= {"embeddings.position_ids": torch.zeros(1)}
    whole = change_text(Path(shutil.copytree(good, tmp_path / "whole")), lambda state: {**state, **more})
    assert torch.equal(TextEncoder(str(whole))([], ["a red cat"]), expected)


def test_the_text_half_of_whole_models_loads(tmp_path: Path) -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": 0,
        "vocab_size": 16,
        "max_position_embeddings": 7,
    }
    config = transformers.CLIPConfig(
        text_config={**sizes, **ends},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    folder = text_models.write_clip(tmp_path / "clip")
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(folder)
    encoder = TextEncoder(str(folder))
    ids = encoder.tokenizer(["a cat"], padding="max_length", max_length=7, return_tensors="pt")
    with torch.no_grad():
        expected = clip.text_model(
            input_ids=ids.input_ids, attention_mask=ids.attention_mask
        ).last_hidden_state
    made, length = encoder([], ["a cat"]), int(ids.attention_mask.sum())
    assert_close(made[:, :length], expected[:, :length], 20 * SUM)
    folder = text_models.write_t5(tmp_path / "t5")
    wanted = TextEncoder(str(folder)).sha256
    state = load_file(folder / "model.safetensors")
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, tie_word_embeddings=False))
    t5.load_state_dict(state, strict=False)
    t5.save_pretrained(folder)
    assert TextEncoder(str(folder)).sha256 == wanted
    # The embedding under its other name, to which it is tied.
    change_text(folder, lambda _: {**{k: v for k, v in state.items() if k != "shared.weight"},
                                   "encoder.embed_tokens.weight": state["shared.weight"]})  # fmt: skip
    assert TextEncoder(str(folder)).sha256 == wanted


def test_folders_that_are_of_no_text_encoder(tmp_path: Path) -> None:
    good = text_models.write_clip(tmp_path / "good")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        path = Path(shutil.copytree(good, tmp_path / f"piped {name}")) / name
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match="a pipe, expected"):
            TextEncoder(str(path.parent))
    for number, fields in enumerate(
        ({"hidden_size": 2**20}, {"num_hidden_layers": 10**9}, {"hidden_size": "8"})
    ):
        folder = Path(shutil.copytree(good, tmp_path / str(number)))
        change_config(folder, **fields)
        with pytest.raises(CheckpointError, match="cannot load the text encoder") as error:
            TextEncoder(str(folder))
        assert one_line(error)
    (good / "model_index.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"the folder of a pipeline; give .*/text_encoder, with its tokenizer"
    ):
        TextEncoder(str(good))


# Schedulers of pipelines


def write_scheduler(folder: Path, config: dict, name: object = "DDIMScheduler") -> Path:
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", name]}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


DDPM = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SOLVERS = (
    "DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "PNDM", "DPMSolverMultistep",
    "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "EulerDiscrete",
    "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete", "SASolver",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_of_ddpm_are_read(tmp_path: Path, name: str) -> None:
    """Whatever solver the pipeline was saved with, the model is the same."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**DDPM)
    scheduler.save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", f"{name}Scheduler"]}))
    known = {"noise_schedule": "linear", "diffusion_steps": 1000, "predict_xstart": False}
    assert pipeline_facts(tmp_path, 10).diffusion == known


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("FlowMatchEulerDiscrete", "flow matching"),
        ("FlowMatchHeunDiscrete", "flow matching"),
        ("EDMEuler", "EDM"),
        ("EDMDPMSolverMultistep", "EDM"),
        ("LCM", "a consistency model"),
        ("CMStochasticIterative", "another objective"),
    ],
)
def test_other_kinds_of_models_are_not_taken_for_ddpm(tmp_path: Path, name: str, kind: str) -> None:
    getattr(diffusers, f"{name}Scheduler")().save_pretrained(tmp_path / "scheduler")
    index = tmp_path / "model_index.json"
    for content in ({}, {"scheduler": ["diffusers", f"{name}Scheduler"]}):
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=f"trained for {kind}") as error:
            pipeline_facts(tmp_path, 10)
        assert f"{name}Scheduler" in one_line(error)
    # The index alone names it.
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(CheckpointError, match=f"trained for {kind}"):
        pipeline_facts(tmp_path, 10)


@pytest.mark.parametrize("named", ["", "diffusion_pytorch_model.safetensors"])
def test_the_transformer_of_a_pipeline_is_of_its_scheduler(tmp_path: Path, named: str) -> None:
    """Its own folder and file are not taken for noise prediction where the pipeline says otherwise."""
    model = DiT(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    save_diffusers(model, tmp_path / "transformer", conventions=DIFFUSERS)
    given = tmp_path / "transformer" / named
    flow = "FlowMatchEulerDiscreteScheduler"
    write_scheduler(tmp_path, {"_class_name": flow}, flow)
    with pytest.raises(CheckpointError, match="trained for flow matching") as error:
        load_model(given)
    one_line(error)
    assert load_model(given, objective="flow")[1].diffusion["objective"] == "flow"
    write_scheduler(tmp_path, {"_class_name": "DDIMScheduler", **DDPM, "prediction_type": "sample"})
    assert load_model(given)[1].diffusion["predict_xstart"]
    (tmp_path / "model_index.json").unlink()
    assert load_model(given)[1].diffusion == {}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ({"prediction_type": ["epsilon"]}, "prediction_type"),
        ({"prediction_type": "v_prediction"}, "prediction_type 'v_prediction'"),
        ({"beta_end": 0.012}, "betas"),
        ({"beta_end": "0.02"}, "betas"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear'"),
        ({"trained_betas": [0.1] * 1000}, "beta_schedule"),
        ({"num_train_timesteps": True}, "num_train_timesteps True"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"_class_name": 5}, "its scheduler is '5'"),
    ],
)
def test_schedules_that_a_model_cannot_be_sampled_with(tmp_path: Path, fields: dict, said: str) -> None:
    folder = write_scheduler(tmp_path / "pipeline", {"_class_name": "DDIMScheduler", **DDPM, **fields})
    with pytest.raises(DitFastError) as error:
        pipeline_facts(folder, 10)
    assert said in one_line(error)
