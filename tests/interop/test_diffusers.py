"""Ours <-> diffusers: the same numbers both ways, on disk and live, and in diffusers' own pipeline."""

import copy
import json
import pickle
import shutil
import warnings

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    TorchAoConfig,
)
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import EMAModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import dit_fast
from dit_fast.cli import main
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop import (
    DIFFUSERS,
    REFERENCE,
    Conventions,
    ConvertedDiT,
    from_diffusers,
    load_model,
    save_diffusers,
    to_diffusers,
)
from dit_fast.interop.diffusers import (
    config_from_diffusers,
    diffusers_config,
    state_from_diffusers,
    state_to_diffusers,
)
from dit_fast.models import DiT
from tests.reference_layout import inputs, randomise
from tests.tolerance import SUM, assert_close

SMALL = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
THEIRS = {
    "num_attention_heads": 4, "attention_head_dim": 8, "out_channels": 8, "num_layers": 2, "sample_size": 8,
    "num_embeds_ada_norm": 10,
}  # fmt: skip
MIXED = Conventions(timestep_freq_shift=0.5, norm2_eps=1e-3, cfg_channels=2)


def ours(conventions: Conventions | None = None, **changes) -> DiT:
    sizes = {**SMALL, **changes}
    model = DiT(**sizes) if conventions is None else ConvertedDiT(**sizes, conventions=conventions)
    positions = model.pos_embed.detach().clone()
    randomise(model)
    with torch.no_grad():
        model.pos_embed.copy_(positions)
    return model


def theirs(**changes) -> DiTTransformer2DModel:
    """Random weights, with the embedders that a DiT has once the same in every block."""
    model = randomise(DiTTransformer2DModel(**{**THEIRS, **changes}))
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@torch.no_grad()
def answer(model) -> torch.Tensor:
    x, t, y = inputs()
    out = model(x, t, y)
    return out if isinstance(out, torch.Tensor) else out.sample


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


# Live models


@pytest.mark.parametrize("conventions", [None, REFERENCE, DIFFUSERS, MIXED])
def test_ours_to_diffusers_and_back(conventions) -> None:
    model = ours(conventions)
    converted = to_diffusers(model)
    assert_close(answer(converted), answer(model))
    assert answer(model).abs().max() > 0.5
    back = from_diffusers(converted, cfg_channels=(conventions or REFERENCE).cfg_channels)
    assert back.conventions == (conventions or REFERENCE)
    assert back.config == model.config
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.state_dict().items())
    assert torch.equal(answer(back), answer(model))


@pytest.mark.parametrize(
    "changes", [{}, {"norm_eps": 1e-6}, {"out_channels": 4}, {"in_channels": 4, "patch_size": 4}]
)
def test_diffusers_to_ours_and_back(changes) -> None:
    model = theirs(**changes)
    converted = from_diffusers(model)
    assert converted.conventions == Conventions(1, changes.get("norm_eps", 1e-5), None)
    assert_close(answer(converted), answer(model))
    back = to_diffusers(converted)
    assert {**back.config, "_use_default_values": 0} == {**model.config, "_use_default_values": 0}
    assert list(back.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.state_dict().items())
    assert torch.equal(answer(back), answer(model))


def test_conventions_matter() -> None:
    """What the conversion carries along is no rounding: without it the answers are others."""
    model = theirs()
    converted = from_diffusers(model)
    for wrong in (Conventions(0, 1e-5), Conventions(1, 1e-2)):
        other = ConvertedDiT(**converted.config, conventions=wrong).eval()
        other.load_state_dict(converted.state_dict())
        assert error(answer(other), answer(model)) > 1e-3


def test_guidance_follows_the_conventions() -> None:
    x, t, y = torch.randn(4, 4, 8, 8), torch.full((4,), 300), torch.tensor([1, 2, 10, 10])
    with torch.no_grad():
        for conventions, channels in ((REFERENCE, 3), (DIFFUSERS, None), (MIXED, 2)):
            model = ours(conventions)
            own = model.forward_with_cfg(x, t, y, 4.0)
            assert torch.equal(own, DiT.forward_with_cfg(model, x, t, y, 4.0, channels))
            assert not torch.equal(own, model.forward_with_cfg(x, t, y, 4.0, 1))


def test_modulations_and_compile_of_a_converted_model() -> None:
    model = ours(DIFFUSERS)
    x, t, y = inputs()
    with torch.no_grad():
        assert torch.equal(model.forward_modulated(x, model.modulations(t, y)), answer(model))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(compiled(x, t, y), answer(model))


def test_state_dicts_alone_go_there_and_back() -> None:
    state = ours().state_dict()
    back = state_from_diffusers(state_to_diffusers(state), ours().config, "a")
    assert back.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_dtype_and_mode_are_kept() -> None:
    converted = from_diffusers(to_diffusers(ours().to(torch.bfloat16)))
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    assert not converted.training
    assert [name for name, p in converted.named_parameters() if not p.requires_grad] == ["pos_embed"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda m: m.regrid((8, 4)), "square, this model is 8x4"),
        (lambda m: m.regrid(16, "interpolate"), r"numbers positions 0, 1, 2.*differ by up to"),
        (lambda m: ours(mlp_ratio=2.0), r"mlp_ratio 2.0 \(4 wanted\)"),
        (lambda m: ours(class_dropout_prob=0.0), "no null class"),
    ],
)
def test_what_diffusers_cannot_be(change, line, tmp_path) -> None:
    model = change(ours())
    with pytest.raises(ConfigError, match=line):
        to_diffusers(model)
    with pytest.raises(ConfigError, match=line):
        save_diffusers(model, tmp_path / "a", conventions=DIFFUSERS)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention", "in_context"])
def test_other_blocks_of_the_paper_are_not_diffusers(conditioning) -> None:
    with pytest.raises(ConfigError, match=f"the paper's, this model has conditioning='{conditioning}'"):
        diffusers_config({**ours().config, "conditioning": conditioning}, DIFFUSERS)


def test_live_models_that_are_no_dit() -> None:
    with pytest.raises(ConfigError, match="takes a DiTTransformer2DModel, this is a Linear"):
        from_diffusers(torch.nn.Linear(2, 2))
    model = theirs()
    torch.nn.init.ones_(model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.norm1\.emb.*differs from another block's"):
        from_diffusers(model)
    model = theirs()
    model.transformer_blocks[1].norm3.eps = 1e-3
    with pytest.raises(CheckpointError, match="a DiT has one for all"):
        from_diffusers(model)
    model.transformer_blocks[0].norm1.emb.time_proj.flip_sin_to_cos = False
    with pytest.raises(CheckpointError, match=r"\[sin, cos\]"):
        from_diffusers(model)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda model: cpu_offload(model, torch.device("cpu")),
            "weight is offloaded: convert the model before",
        ),
        (
            lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn),
            "is torch.float8_e4m3fn: convert",
        ),
        (lambda model: quantize_(model, Int8WeightOnlyConfig()), "is Int8Tensor: convert the model before"),
        (
            lambda model: apply_group_offloading(
                model, torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path="offloaded"
            ),
            "weight is offloaded: convert the model before",
        ),
    ],
    ids=["offloaded", "cast", "quantized", "on disk"],
)
def test_live_models_whose_weights_are_elsewhere(change, line, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = theirs()
    change(model)
    with pytest.raises(ConfigError, match=line):
        from_diffusers(model)


# Folders


def test_a_folder_of_diffusers_loads(tmp_path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for path in (
        tmp_path / "whole",
        tmp_path / "whole" / "diffusion_pytorch_model.safetensors",
        tmp_path / "shards",
    ):
        loaded, info = load_model(path)
        assert isinstance(loaded, ConvertedDiT)
        assert_close(answer(loaded), answer(model))
        assert "timestep_freq_shift 1, norm2_eps 1e-05" in info.notes[-1]


def test_the_first_releases_folder_loads(tmp_path) -> None:
    """A Transformer2DModel, its weights in a .bin, as the published DiT was uploaded."""
    model = theirs()
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    extra = {"cross_attention_dim": None, "only_cross_attention": False, "norm_num_groups": 32}
    config = {**model.config, **extra, "_class_name": "Transformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_close(answer(load_model(tmp_path)[0]), answer(model))


def test_a_converted_model_saves_as_diffusers_does(tmp_path) -> None:
    model = from_diffusers(theirs())
    model.save_pretrained(tmp_path)
    native = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    assert_close(answer(native), answer(model))
    loaded, _ = load_model(tmp_path)
    assert torch.equal(answer(loaded), answer(model))
    with pytest.raises(CheckpointError, match="unknown key 'attention_head_dim'"):
        DiT.from_pretrained(tmp_path)  # never read without its conventions


def test_exporting_the_references_weights_is_asked_for(tmp_path) -> None:
    model = ours()
    with pytest.raises(ConfigError, match=r"frequencies with shift 1, this model with 0.*FastDiT"):
        save_diffusers(model, tmp_path / "a")
    with pytest.raises(ConfigError, match="has timestep_freq_shift 1"):
        save_diffusers(model, tmp_path / "a", conventions=REFERENCE)
    assert not (tmp_path / "a").exists()
    save_diffusers(model, tmp_path / "a", conventions=DIFFUSERS)
    native = DiTTransformer2DModel.from_pretrained(tmp_path / "a").eval()
    as_diffusers = ConvertedDiT(**model.config, conventions=DIFFUSERS).eval()
    as_diffusers.load_state_dict(model.state_dict())
    assert_close(answer(native), answer(as_diffusers))
    assert error(answer(native), answer(model)) > 1e-3


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"dropout": 0.1}, r"dropout=0\.1 \(a DiT has 0\.0\)"),
        ({"norm_type": "ada_norm"}, "norm_type='ada_norm'"),
        ({"num_layers": 10**9}, "num_layers=1000000000"),
        ({"num_layers": 5}, "depth is 2 in the checkpoint, 5 expected"),
        ({"sample_size": "8"}, "sample_size='8'"),
        ({"sample_size": True}, "sample_size=True"),
        ({"sample_size": 2**23}, r"describes 4194304x4194304 tokens of width 32"),
        ({"sample_size": 9}, "cannot be built: input_size 9x9 is not a positive multiple of patch_size 2"),
        ({"out_channels": 5}, "out_channels=5 for in_channels=4"),
        ({"norm_eps": float("nan")}, "norm2_eps=nan"),
        ({"mlp_ratio": 1e300}, "mlp_ratio=1e"),
        ({"attention_head_dim": 2**20}, r"width 4194304, its pos_embed\.proj\.bias is \(32,\)"),
        ({"_target_": "os.system", "target": "os.system"}, "unknown 'target'='os.system'"),
    ],
)
def test_hostile_configurations_are_one_line(change, line, tmp_path) -> None:
    theirs().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=line) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weight_map", "line"),
    [
        (
            {"a": "../outside.safetensors"},
            "refused: '../outside.safetensors' is not a safetensors file in this folder",
        ),
        ({"a": "/etc/passwd"}, "refused"),
        ({"a": "weights.pt"}, "refused"),
        ({"a": "gone.safetensors"}, r"gone\.safetensors: no such file"),
        ({"a": 3}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_hostile_shards(weight_map, line, tmp_path) -> None:
    folder = tmp_path / "model"
    theirs().save_pretrained(folder)
    shutil.move(folder / "diffusion_pytorch_model.safetensors", tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model\.safetensors beside"):
        load_model(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=line):
        load_model(folder)


def test_missing_and_foreign_tensors_are_named() -> None:
    config, _ = config_from_diffusers(THEIRS, "a")
    state = state_to_diffusers(ours().state_dict())
    del state["transformer_blocks.1.attn1.to_k.weight"]
    state["transformer_blocks.0.attn2.to_q.weight"] = torch.zeros(2)
    back = state_from_diffusers(state, config, "a")
    foreign = {key for key in back if key.startswith("transformer_blocks")}
    assert foreign == {
        "transformer_blocks.1.attn1.to_q.weight", "transformer_blocks.1.attn1.to_v.weight",
        "transformer_blocks.0.attn2.to_q.weight",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"blocks\.0\.extra is not a tensor of a DiT"):
        state_to_diffusers({"blocks.0.extra": torch.zeros(2), "blocks.0.attn.qkv.bias": torch.zeros(6)})


# Pipelines


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def images(pipeline, guidance: float = 3.0):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        [1, 7], guidance_scale=guidance, num_inference_steps=4, generator=generator, output_type="pt"
    ).images


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("conventions", [None, DIFFUSERS])
def test_our_model_in_their_pipeline(scheduler, conventions, tmp_path) -> None:
    """The images of diffusers' own model of the same weights, saved and loaded again by the pipeline."""
    model = ours(conventions, num_classes=10)
    adapter = dit_fast.FastDiT.from_dit(model)
    assert adapter.dit.blocks[0].mlp.fc1.weight is model.blocks[0].mlp.fc1.weight
    pipeline = DiTPipeline(adapter, autoencoder(), scheduler())
    fast = images(pipeline)
    assert fast.std() > 0.05

    native = to_diffusers(ours(conventions, num_classes=1000))
    table = model.y_embedder.embedding_table.weight
    for block in native.transformer_blocks:
        # diffusers' pipeline takes row 1000 for the null class: give its model our ten rows and ours there
        weight = block.norm1.emb.class_embedder.embedding_table.weight
        with torch.no_grad():
            weight[:10], weight[1000] = table[:10], table[10]
    native.load_state_dict(
        {k: v for k, v in state_to_diffusers(model.state_dict()).items() if "embedding_table" not in k},
        strict=False,
    )
    # Four steps, each with guidance.
    assert_close(images(DiTPipeline(native, autoencoder(), scheduler())), fast, terms=16 * SUM)

    pipeline.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    assert type(again.transformer) is dit_fast.FastDiT
    assert torch.equal(images(again), fast)
    loaded, _ = load_model(tmp_path)
    assert loaded.conventions == (conventions or REFERENCE)
    assert torch.equal(answer(loaded), answer(model))


def test_guidance_without_a_null_class_is_refused() -> None:
    adapter = dit_fast.FastDiT.from_dit(ours(class_dropout_prob=0.0))
    pipeline = DiTPipeline(adapter, autoencoder(), DDIMScheduler())
    with pytest.raises(ConfigError, match="guidance on a model without a null class"):
        images(pipeline)
    assert images(pipeline, guidance=1.0).isfinite().all()
    compiled = torch.compile(adapter, fullgraph=True, backend="eager")
    x, t, _ = inputs()
    y = torch.tensor([1, 7, 9])
    with torch.no_grad():
        assert_close(compiled(x, t, y).sample, adapter(x, t, y).sample)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({}, {}),
        ({"safe_serialization": False}, {}),
        ({"max_shard_size": "20KB"}, {}),
        ({"max_shard_size": "20KB", "safe_serialization": False}, {"use_safetensors": False}),
        ({"max_shard_size": "20KB", "safe_serialization": False}, {}),
        ({"variant": "fp16"}, {"variant": "fp16"}),
        ({"variant": "bf16", "max_shard_size": "20KB"}, {"variant": "bf16"}),
        ({}, {"torch_dtype": torch.bfloat16}),
        ({}, {"device_map": "cpu"}),
        ({}, {"device_map": {"": "disk"}, "offload_folder": "offloaded"}),
    ],
    ids=[
        "safetensors", "bin", "shards", "shards of bin", "shards of bin unasked", "variant", "shards of a variant",
        "bfloat16", "device map", "disk",
    ],
)  # fmt: skip
def test_the_adapter_reads_what_diffusers_wrote(tmp_path, monkeypatch, saved, loaded) -> None:
    """`FastDiT.from_pretrained` and `from_config` take a DiTTransformer2DModel's folder, with its conventions."""
    monkeypatch.chdir(tmp_path)
    theirs().save_pretrained(tmp_path / "t", **saved)
    adapter = dit_fast.FastDiT.from_pretrained(tmp_path, subfolder="t", **loaded)
    native = {name: value for name, value in loaded.items() if name in ("variant", "torch_dtype")}
    if "bin" in str(list((tmp_path / "t").iterdir())):
        native["use_safetensors"] = False
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "t", **native)
    x, t, y = inputs()
    x = x.to(loaded.get("torch_dtype", torch.float32))
    with torch.no_grad():
        output, expected = adapter(x, t, y).sample, again(x, timestep=t, class_labels=y).sample
    assert not adapter.training
    assert output.dtype == expected.dtype
    assert_close(output, expected)
    fresh = dit_fast.FastDiT.from_config(DiTTransformer2DModel.load_config(tmp_path / "t"))
    assert fresh.dit.config == adapter.dit.config
    assert fresh.dit.conventions == adapter.dit.conventions
    if "offload_folder" in loaded:
        return
    adapter.save_pretrained(tmp_path / "ours")
    ours_again = dit_fast.FastDiT.from_pretrained(tmp_path / "ours", torch_dtype=loaded.get("torch_dtype"))
    with torch.no_grad():
        assert torch.equal(ours_again(x, t, y).sample, output)


@pytest.mark.parametrize("changes", [{}, {"norm_eps": 1e-3, "out_channels": 4}])
def test_the_adapter_has_the_arguments_of_diffusers(changes) -> None:
    """`FastDiT(**model.config)` is what `from_dit(model)` is, but for the weights."""
    model = theirs(**changes)
    adapter = dit_fast.FastDiT(**model.config).eval()
    converted = dit_fast.FastDiT.from_dit(model)
    assert {k: v for k, v in adapter.config.items() if k in model.config and k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert adapter.dit.conventions == converted.dit.conventions
    adapter.load_state_dict(converted.state_dict())
    assert_close(answer(adapter), answer(model))
    assert_close(answer(converted), answer(model))
    assert dit_fast.FastDiT.from_dit(model.train()).training
    with pytest.raises(CheckpointError, match=r"dropout=0\.1 \(a DiT has 0\.0\)"):
        dit_fast.FastDiT(dropout=0.1)


def test_the_adapter_reads_the_first_releases_folder(tmp_path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    extra = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "only_cross_attention": False}
    (tmp_path / "config.json").write_text(json.dumps({**config, **extra}))
    adapter, information = dit_fast.FastDiT.from_pretrained(tmp_path, output_loading_info=True)
    assert_close(answer(adapter), answer(model))
    assert not information["missing_keys"]
    fresh = dit_fast.FastDiT.from_config(json.loads((tmp_path / "config.json").read_text()))
    assert fresh.dit.config == adapter.dit.config


@pytest.mark.parametrize("of", ["FastDiT", "DiTTransformer2DModel"])
def test_the_adapter_refuses_other_weights(tmp_path, of) -> None:
    """diffusers would leave out or initialize tensors, and warn."""
    model = theirs() if of == "DiTTransformer2DModel" else dit_fast.FastDiT.from_dit(ours())
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    first = next(iter(state))
    save_file(
        {"more" if key == first else key: value for key, value in state.items()}, file, {"format": "pt"}
    )
    with pytest.raises(
        CheckpointError, match=f"does not fit its config.json: missing {first}, unexpected more"
    ):
        dit_fast.FastDiT.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "PixArtTransformer2DModel"}))
    with pytest.raises(CheckpointError, match="has a 'PixArtTransformer2DModel', FastDiT reads"):
        dit_fast.FastDiT.from_pretrained(tmp_path)


def test_the_adapter_saves_only_what_it_can_read(tmp_path) -> None:
    adapter = dit_fast.FastDiT.from_dit(ours(hidden_size=64))
    plain = answer(adapter)
    adapter.add_adapter(LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
    adapted = answer(adapter)
    with pytest.raises(ConfigError, match="has an adapter: save_lora_adapter"):
        adapter.save_pretrained(tmp_path)
    adapter.fuse_lora()
    adapter.unload_lora()
    adapter.save_pretrained(tmp_path)
    assert_close(answer(dit_fast.FastDiT.from_pretrained(tmp_path)), adapted)
    assert error(adapted, plain) > 1e-2
    quantize_(adapter, Int8WeightOnlyConfig())
    with pytest.raises(ConfigError, match=r"is quantized or sharded \(Int8Tensor\): save the model before"):
        adapter.save_pretrained(tmp_path)
    kept = dit_fast.FastDiT.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), torch_dtype=torch.float32
    )
    assert_close(answer(kept), answer(adapter))


@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_reads_what_peft_wrote(tmp_path, dora) -> None:
    """Trained on a `DiT` or on a FastDiT, with a scale that is not 1."""
    targets = ["x_embedder.proj", "qkv", "proj", "blocks.0.mlp.fc1"]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, use_dora=dora, init_lora_weights=False)
    for number, model in enumerate((ours(), dit_fast.FastDiT.from_dit(ours()))):
        plain = answer(model)
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(tmp_path / str(number))
        reader = dit_fast.FastDiT.from_dit(ours())
        reader.load_lora_adapter(tmp_path / str(number), adapter_name="mine")
        assert_close(answer(reader), answer(adapted))
        assert error(answer(reader), plain) > 1e-2
    config.modules_to_save = ["final_layer"]
    get_peft_model(ours(), config).save_pretrained(tmp_path / "more")
    with pytest.raises(ConfigError, match="has final_layer beside the adapter"):
        reader.load_lora_adapter(tmp_path / "more")


@pytest.mark.parametrize("classes", [3, 999, 1000, 1001, 2000])
def test_the_pipeline_guides_by_the_models_null_class(classes) -> None:
    """Label 1000 of the pipeline is the null class, also where the model has a class 1000."""
    adapter = dit_fast.FastDiT.from_dit(ours(num_classes=classes))
    seen: list[list[int]] = []
    adapter.dit.y_embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0].tolist()))
    labels = [1, classes - 1]
    pipeline = DiTPipeline(adapter, autoencoder(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline(labels, guidance_scale=3.0, num_inference_steps=2, output_type="pt")
    assert seen == [[*labels, classes, classes]] * 2
    # Not a batch with guidance.
    del seen[:]
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        adapter(x, 5, torch.tensor([2, 1000]))
    assert seen == [[2, 1000 if classes > 1000 else classes]]


def test_an_export_of_other_than_1000_classes_warns(tmp_path, capsys) -> None:
    model = ours(num_classes=3)
    line = "label 1000 for the null class, a DiTTransformer2DModel of 3 classes has label 3.*FastDiT.from_dit"
    with pytest.warns(UserWarning, match=line):
        save_diffusers(model, tmp_path / "a", conventions=DIFFUSERS)
    with pytest.warns(UserWarning, match=line):
        to_diffusers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_diffusers(ours(num_classes=1000), tmp_path / "b", conventions=DIFFUSERS)
    model.save_pretrained(tmp_path / "c")
    assert (
        main(["export", "--ckpt", f"{tmp_path / 'c'}", "--out", f"{tmp_path / 'd'}", "--format", "diffusers"])
        == 0
    )
    notes = [line for line in capsys.readouterr().out.splitlines() if "null class" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: diffusers' DiTPipeline takes label 1000")


def test_settings_of_diffusers_are_settings_of_the_model() -> None:
    adapter = dit_fast.FastDiT.from_dit(ours())
    for name, own in (("native", "sdpa"), ("_native_cudnn", "cudnn"), ("triton", "triton"), ("auto", "auto")):
        adapter.set_attention_backend(name)
        assert adapter.dit.attention == own
    adapter.set_attention_backend("native")
    adapter.reset_attention_backend()
    assert adapter.dit.attention == "auto"
    with pytest.raises(ConfigError, match="no attention backend 'sage': choose one of native"):
        adapter.set_attention_backend("sage")
    adapter.dit.recompute = "cheap"
    adapter.disable_gradient_checkpointing()
    assert adapter.dit.recompute == "cheap"
    adapter.enable_gradient_checkpointing()
    assert adapter.dit.recompute == "blocks"
    with pytest.raises(ConfigError, match="give no gradient_checkpointing_func"):
        adapter.enable_gradient_checkpointing(torch.utils.checkpoint.checkpoint)


def test_habits_of_users_of_diffusers(tmp_path) -> None:
    adapter = dit_fast.FastDiT.from_dit(ours())
    expected = answer(adapter)
    for again in (pickle.loads(pickle.dumps(adapter)), copy.deepcopy(adapter)):
        assert type(again) is dit_fast.FastDiT
        assert torch.equal(answer(again), expected)
        assert again.dit.blocks[0].backends is again.dit.backends
    average = EMAModel(adapter.parameters(), model_cls=dit_fast.FastDiT, model_config=adapter.config)
    average.save_pretrained(tmp_path)
    read = EMAModel.from_pretrained(tmp_path, dit_fast.FastDiT)
    assert all(map(torch.equal, average.shadow_params, read.shadow_params))
    assert adapter.num_parameters() == sum(p.numel() for p in adapter.parameters())
    adapter.dit.regrid(16)
    adapter.save_pretrained(tmp_path / "larger")
    larger = dit_fast.FastDiT.from_pretrained(tmp_path / "larger")
    assert larger.config.sample_size == 16
    assert torch.equal(answer(larger), expected)
    prepared = Accelerator(cpu=True).prepare(adapter)
    assert torch.equal(answer(prepared), expected)
    pipeline = DiTPipeline(adapter, autoencoder(), DDIMScheduler())
    assert torch.equal(
        images(DiTPipeline.from_pipe(pipeline, transformer=pipeline.transformer)), images(pipeline)
    )


def test_the_adapter_is_a_model_of_diffusers(tmp_path) -> None:
    adapter = dit_fast.FastDiT.from_dit(ours(mlp_ratio=2.0))
    adapter.save_pretrained(tmp_path)
    again = dit_fast.FastDiT.from_pretrained(tmp_path)
    x, t, y = inputs()
    with torch.no_grad():
        assert torch.equal(again(x, t, y, return_dict=False)[0], answer(adapter.dit))
        assert torch.equal(again(x, 5, y).sample, adapter.dit(x, torch.tensor([5, 5, 5]), y))
    with pytest.raises(ConfigError, match="no cross_attention_kwargs"):
        adapter(x, t, y, {"scale": 1.0})
    with pytest.raises(AttributeError, match="no attribute 'FasterDiT'"):
        _ = dit_fast.FasterDiT
