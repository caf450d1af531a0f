"""The checks that diffusers' own tests make of a DiT and of its pipeline, for any class that stands in its place.

They are those of diffusers 0.42's ModelTesterMixin (tests/models/testing_utils) and PipelineTesterMixin
(tests/pipelines/test_pipelines_common.py) which run for DiTTransformer2DModel and DiTPipeline, under their names, with
random weights in every layer. What needs an accelerator there runs here with the CPU as the device of computation.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, Transformer2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dit_fast
from tests.reference_layout import randomise
from tests.tolerance import SUM, assert_close

INIT: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "attention_bias": True, "sample_size": 8, "patch_size": 2, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 8, "norm_type": "ada_norm_zero",
}  # fmt: skip
CPU = torch.device("cpu")


class NotOfferedError(Exception):
    """The class declares that it does not have what a check is about; diffusers' test then skips."""


@dataclass(frozen=True)
class Subject:
    """A class under test: `make` turns a new DiTTransformer2DModel or FastDiT into it, in place."""

    title: str
    cls: Any
    make: Callable[[Any], object] = lambda model: None

    def build(self, **changes: Any) -> Any:
        """A model with random weights, in eval mode."""
        return self.ready(randomise(self.cls(**{**INIT, **changes})))

    def load(self, folder: Path, **options: Any) -> Any:
        return self.ready(self.cls.from_pretrained(folder, **options))

    def ready(self, model: Any) -> Any:
        self.make(model)
        return model

    def require(self, attribute: str) -> None:
        if not getattr(self.cls, attribute):
            raise NotOfferedError(f"{attribute} is {getattr(self.cls, attribute)}")


def subjects() -> tuple[Subject, Subject, Subject]:
    """diffusers' own class, ours in its place, and its own with our operations in its blocks."""
    return (
        Subject("DiTTransformer2DModel", DiTTransformer2DModel),
        Subject("FastDiT", dit_fast.FastDiT),
        Subject("accelerate(model)", DiTTransformer2DModel, dit_fast.accelerate),
    )


Check = Callable[[Subject, Path], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def images(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=generator).to(dtype),
        "timestep": torch.randint(0, 1000, (4,), generator=generator),
        "class_labels": torch.randint(0, 4, (4,), generator=generator),
    }


@torch.no_grad()
def output(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(**images(dtype), return_dict=False)[0]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0.1
    assert_close(found, expected)


def loss_of(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    found = model(**images(dtype), return_dict=False)[0]
    target = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    return nn.functional.mse_loss(found.float(), target)


# Models: files


@check
def from_save_pretrained(subject: Subject, folder: Path) -> None:
    model = subject.build()
    model.save_pretrained(folder)
    again = subject.load(folder)
    assert type(again) is type(model)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert_same(output(again), output(model))


@check
def from_save_pretrained_variant(subject: Subject, folder: Path) -> None:
    model = subject.build()
    model.save_pretrained(folder, variant="fp16")
    assert_same(output(subject.load(folder, variant="fp16")), output(model))
    with pytest.raises(OSError) as caught:
        subject.load(folder)
    assert "no file named diffusion_pytorch_model.bin" in str(caught.value)


def _saved_dtype(subject: Subject, folder: Path, dtype: torch.dtype) -> None:
    subject.build().to(dtype).save_pretrained(folder)
    for low_memory in (True, False):
        again = subject.load(folder, low_cpu_mem_usage=low_memory, torch_dtype=dtype)
        assert again.dtype == dtype
        assert {parameter.dtype for parameter in again.parameters()} == {dtype}


@check
def from_save_pretrained_dtype_fp32(subject: Subject, folder: Path) -> None:
    _saved_dtype(subject, folder, torch.float32)


@check
def from_save_pretrained_dtype_fp16(subject: Subject, folder: Path) -> None:
    _saved_dtype(subject, folder, torch.float16)


@check
def from_save_pretrained_dtype_bf16(subject: Subject, folder: Path) -> None:
    _saved_dtype(subject, folder, torch.bfloat16)


def _dtype_inference(subject: Subject, folder: Path, dtype: torch.dtype) -> None:
    model = subject.build().to(dtype)
    model.save_pretrained(folder)
    found = output(subject.load(folder, torch_dtype=dtype), dtype)
    assert found.dtype == dtype
    assert_same(found, output(model, dtype))


@check
def from_save_pretrained_dtype_inference_fp16(subject: Subject, folder: Path) -> None:
    _dtype_inference(subject, folder, torch.float16)


@check
def from_save_pretrained_dtype_inference_bf16(subject: Subject, folder: Path) -> None:
    _dtype_inference(subject, folder, torch.bfloat16)


def _sharded(subject: Subject, folder: Path, **options: Any) -> None:
    model = subject.build()
    model.save_pretrained(folder, max_shard_size="10KB", **options)
    assert list(folder.glob("*.index*.json"))
    assert len([*folder.glob("*-of-*")]) > 1
    assert_same(output(subject.load(folder, **options)), output(model))


@check
def sharded_checkpoints(subject: Subject, folder: Path) -> None:
    _sharded(subject, folder)


@check
def sharded_checkpoints_with_variant(subject: Subject, folder: Path) -> None:
    _sharded(subject, folder, variant="fp16")


@check
def sharded_checkpoints_with_parallel_loading(subject: Subject, folder: Path) -> None:
    from diffusers.models import modeling_utils

    modeling_utils.HF_ENABLE_PARALLEL_LOADING = True
    try:
        _sharded(subject, folder)
    finally:
        modeling_utils.HF_ENABLE_PARALLEL_LOADING = False


@check
def getattr_is_correct(subject: Subject, folder: Path) -> None:
    model = subject.build()
    model.dummy_attribute = 5
    model.register_to_config(test_attribute=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.dummy_attribute == 5
        assert model.save_pretrained == model.save_pretrained
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert model.test_attribute == 5
    assert any(issubclass(warning.category, FutureWarning) for warning in caught)
    with pytest.raises(AttributeError) as caught:
        _ = model.does_not_exist
    assert str(caught.value) == f"'{type(model).__name__}' object has no attribute 'does_not_exist'"


@check
def correct_class_remapping_from_dict_config(subject: Subject, folder: Path) -> None:
    model = subject.cls.from_config({**INIT, "_class_name": "Transformer2DModel"})
    assert type(model) is subject.cls
    if subject.cls is DiTTransformer2DModel:
        assert type(Transformer2DModel.from_config(INIT)) is DiTTransformer2DModel


@check
def wrong_device_map_raises_error(subject: Subject, folder: Path) -> None:
    subject.build().save_pretrained(folder)
    for device_map in ("no device", -1):
        with pytest.raises(ValueError, match="device_map"):
            subject.load(folder, device_map=device_map)


def _device_map(subject: Subject, folder: Path, device_map: Any) -> None:
    model = subject.build()
    model.save_pretrained(folder)
    assert_same(output(subject.load(folder, device_map=device_map)), output(model))


@check
def passing_dict_device_map_works(subject: Subject, folder: Path) -> None:
    _device_map(subject, folder, {"": "cpu"})


@check
def passing_non_dict_device_map_works(subject: Subject, folder: Path) -> None:
    _device_map(subject, folder, CPU)
    _device_map(subject, folder, "cpu")


# Models: outputs


@check
def determinism(subject: Subject, folder: Path) -> None:
    model = subject.build()
    assert torch.equal(output(model), output(model))


@check
def output_shape(subject: Subject, folder: Path) -> None:
    assert output(subject.build()).shape == (4, 8, 8, 8)


@check
def outputs_equivalence(subject: Subject, folder: Path) -> None:
    model = subject.build()
    with torch.no_grad():
        named = model(**images())
    assert torch.equal(named.sample, output(model))
    assert torch.equal(named["sample"], named[0])


# Models: training


@check
def training(subject: Subject, folder: Path) -> None:
    model = subject.build().train()
    loss_of(model).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, missing


@check
def training_with_ema(subject: Subject, folder: Path) -> None:
    model = subject.build().train()
    average = EMAModel(model.parameters())
    loss_of(model).backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], 0.1).step()
    average.step(model.parameters())
    average.store(model.parameters())
    average.copy_to(model.parameters())
    average.restore(model.parameters())


@check
def gradient_checkpointing(subject: Subject, folder: Path) -> None:
    subject.require("_supports_gradient_checkpointing")
    model = subject.build()
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@check
def gradient_checkpointing_is_applied(subject: Subject, folder: Path) -> None:
    subject.require("_supports_gradient_checkpointing")
    model = subject.build()
    model.enable_gradient_checkpointing()
    having = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert {type(module).__name__ for module in having} == {subject.cls.__name__}
    assert all(module.gradient_checkpointing for module in having)


@check
def gradient_checkpointing_equivalence(subject: Subject, folder: Path) -> None:
    subject.require("_supports_gradient_checkpointing")
    gradients: list[list[Tensor]] = []
    calls: list[int] = []
    for enable in (False, True):
        model = subject.build()
        blocks = model.dit.blocks if hasattr(model, "dit") else model.transformer_blocks
        blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        if enable:
            model.enable_gradient_checkpointing()
        loss_of(model).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        calls.append(0)
    # Once in the forward pass alone; with checkpointing again in the backward pass.
    assert calls == [1, 0, 1, 1, 0]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


@check
def mixed_precision_training(subject: Subject, folder: Path) -> None:
    model = subject.build().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# Models: memory


@check
def cpu_offload(subject: Subject, folder: Path) -> None:
    model = subject.build()
    expected = output(model)
    accelerate.cpu_offload(model, execution_device=CPU)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert_same(output(model), expected)


@check
def disk_offload(subject: Subject, folder: Path) -> None:
    model = subject.build()
    expected = output(model)
    accelerate.disk_offload(model, str(folder), execution_device=CPU)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert_same(output(model), expected)


def _group_offload(subject: Subject, folder: Path, **options: Any) -> None:
    subject.require("_supports_group_offloading")
    expected = output(subject.build())
    for kind in ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}):
        model = subject.build()
        model.enable_group_offload(CPU, **kind, **options)
        assert_same(output(model), expected)


@check
def group_offloading(subject: Subject, folder: Path) -> None:
    _group_offload(subject, folder)
    _group_offload(subject, folder, non_blocking=True)


@check
def group_offloading_with_disk(subject: Subject, folder: Path) -> None:
    _group_offload(subject, folder, offload_to_disk_path=str(folder))
    assert list(folder.glob("*.safetensors"))


@check
def group_offloading_with_layerwise_casting(subject: Subject, folder: Path) -> None:
    subject.require("_supports_group_offloading")
    expected = subject.build()
    expected.enable_layerwise_casting(torch.float16, torch.float32)
    for kind in ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}):
        model = subject.build()
        model.enable_group_offload(CPU, **kind)
        model.enable_layerwise_casting(torch.float16, torch.float32)
        assert_same(output(model), output(expected))


def _cast(subject: Subject, storage: torch.dtype, computed: torch.dtype = torch.float32) -> Any:
    model = subject.build().to(computed)
    model.enable_layerwise_casting(storage, computed)
    assert storage in {parameter.dtype for parameter in model.parameters()}
    return model


@check
def layerwise_casting_inference(subject: Subject, folder: Path) -> None:
    expected = output(subject.build())
    found = output(_cast(subject, torch.float16))
    # The weights are rounded to half precision, and nothing else.
    assert_close(found, expected, dtype=torch.float16, terms=8 * SUM)
    assert not torch.equal(found, expected)
    for storage, computed in ((torch.float8_e4m3fn, torch.float32), (torch.float8_e5m2, torch.bfloat16)):
        assert output(_cast(subject, storage, computed), computed).isfinite().all()


@check
def layerwise_casting_memory(subject: Subject, folder: Path) -> None:
    sizes = [
        _cast(subject, storage, computed).get_memory_footprint()
        for storage, computed in (
            (torch.float8_e4m3fn, torch.bfloat16), (torch.float8_e4m3fn, torch.float32), (torch.float32, torch.float32)
        )
    ]  # fmt: skip
    assert sizes == sorted(set(sizes))


@check
def layerwise_casting_training(subject: Subject, folder: Path) -> None:
    for storage in (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        model = _cast(subject, storage).train()
        with torch.autocast("cpu"):
            loss = loss_of(model)
        loss.backward()


# Models: compilation


def _compiled(model: Any, compile_it: Callable[[Any], Any], **limits: Any) -> None:
    torch.compiler.reset()
    expected = output(model)
    model = compile_it(model)
    with torch._dynamo.config.patch(**limits):
        for _ in range(2):
            assert_same(output(model), expected)


@check
def torch_compile_recompilation_and_graph_break(subject: Subject, folder: Path) -> None:
    compile_it = partial(torch.compile, fullgraph=True, backend="aot_eager")
    _compiled(subject.build(), compile_it, error_on_recompile=True)


@check
def torch_compile_repeated_blocks(subject: Subject, folder: Path) -> None:
    subject.require("_repeated_blocks")

    def compile_blocks(model: Any) -> Any:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        return model

    # As for the UNet there: the first block of a FastDiT gets no addition of the block before.
    _compiled(subject.build(), compile_blocks, recompile_limit=2)


@check
def compile_with_group_offloading(subject: Subject, folder: Path) -> None:
    subject.require("_supports_group_offloading")

    def compile_offloaded(model: Any) -> Any:
        model.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)
        model.compile(backend="eager")
        return model

    _compiled(subject.build(), compile_offloaded)


@check
def compile_works_with_aot(subject: Subject, folder: Path) -> None:
    model = subject.build()
    exported = torch.export.export(model, args=(), kwargs=images())
    torch.export.save(exported, folder / "model.pt2")
    again = torch.export.load(folder / "model.pt2").module()
    assert_same(again(**images()).sample, output(model))


# Models: attention


@check
def set_attention_backend(subject: Subject, folder: Path) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    model = subject.build()
    with attention_backend(AttentionBackendName.NATIVE):
        expected = output(model)
    for name in ("native", "_native_math"):
        model.set_attention_backend(name)
        assert_same(output(model), expected)
    model.reset_attention_backend()
    with pytest.raises(ValueError, match="no backend"):
        model.set_attention_backend("no backend")


# Models: adapters


def _lora(subject: Subject, model: Any, **options: Any) -> None:
    if not issubclass(subject.cls, PeftAdapterMixin):
        raise NotOfferedError("no PeftAdapterMixin")
    names = ["qkv", "proj", "fc1"] if hasattr(model, "dit") else ["to_q", "to_k", "to_v", "to_out.0"]
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=names, init_lora_weights=False), **options)
    assert _has_lora(model)


def _has_lora(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@check
def save_load_lora_adapter(subject: Subject, folder: Path) -> None:
    model = subject.build()
    before = output(model)
    _lora(subject, model)
    adapted = output(model)
    assert (adapted - before).abs().max() > 1e-2
    model.save_lora_adapter(folder)
    model.unload_lora()
    assert not _has_lora(model)
    assert_same(output(model), before)
    model.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    assert_same(output(model), adapted)
    model.disable_adapters()
    assert_same(output(model), before)
    model.enable_adapters()
    model.fuse_lora()
    assert_same(output(model), adapted)
    model.unfuse_lora()
    assert_same(output(model), adapted)


@check
def lora_wrong_adapter_name_raises_error(subject: Subject, folder: Path) -> None:
    model = subject.build()
    _lora(subject, model)
    with pytest.raises(ValueError) as caught:
        model.save_lora_adapter(folder, adapter_name="foo")
    assert "foo not found in the model" in str(caught.value)


@check
def lora_adapter_metadata_is_loaded_correctly(subject: Subject, folder: Path) -> None:
    model = subject.build()
    _lora(subject, model)
    wanted = model.peft_config["default"].to_dict()
    model.save_lora_adapter(folder)
    model.unload_lora()
    model.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    found = model.peft_config["default_0"].to_dict()
    assert {**found, "target_modules": 0} == {**wanted, "target_modules": 0}
    assert set(found["target_modules"]) == set(wanted["target_modules"])


@check
def lora_adapter_wrong_metadata_raises_error(subject: Subject, folder: Path) -> None:
    model = subject.build()
    _lora(subject, model)
    model.save_lora_adapter(folder)
    file = folder / "pytorch_lora_weights.safetensors"
    wrong = {"foo": 1, "r": 4, "target_modules": ["qkv"]}
    save_file(load_file(file), file, {"format": "pt", "lora_adapter_metadata": json.dumps(wrong)})
    model.unload_lora()
    with pytest.raises(TypeError) as caught:
        model.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    assert "could not be instantiated" in str(caught.value)


@check
def hotswapping_model(subject: Subject, folder: Path) -> None:
    model, outputs = subject.build(), []
    for name in ("one", "two"):
        _lora(subject, model, adapter_name=name)
        nn.init.constant_(next(p for n, p in model.named_parameters() if f"lora_B.{name}" in n), 0.1)
        model.set_adapter(name)
        outputs.append(output(model))
        model.save_lora_adapter(folder / name, adapter_name=name)
    model = subject.build()
    one, two = (folder / name / "pytorch_lora_weights.safetensors" for name in ("one", "two"))
    model.load_lora_adapter(one, prefix=None, adapter_name="one")
    assert_same(output(model), outputs[0])
    model.load_lora_adapter(two, prefix=None, adapter_name="one", hotswap=True)
    assert_same(output(model), outputs[1])


# Pipelines


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def pipeline(subject: Subject) -> DiTPipeline:
    pipe = DiTPipeline(subject.build(num_embeds_ada_norm=1000), autoencoder(), DDIMScheduler())
    return quiet(pipe)


def quiet(pipe: DiTPipeline) -> DiTPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _again(subject: Subject, folder: Path, **options: Any) -> DiTPipeline:
    pipe = quiet(DiTPipeline.from_pretrained(folder, **options))
    subject.ready(pipe.transformer)
    assert type(pipe.transformer) is subject.cls
    return pipe


def sampled(pipe: DiTPipeline, labels: tuple[int, ...] = (1,), **options: Any) -> np.ndarray:
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    options = {"num_inference_steps": 2, "output_type": "np", **options}
    found = pipe(list(labels), generator=generator, **options)[0]
    assert np.isfinite(found).all()
    return found


def assert_images(found: np.ndarray, expected: np.ndarray, dtype: torch.dtype = torch.float32) -> None:
    assert expected.std() > 0.01
    assert_close(found, expected, dtype=dtype, terms=16 * SUM)


@check
def pipeline_inference(subject: Subject, folder: Path) -> None:
    found = sampled(pipeline(subject))
    assert found.shape == (1, 16, 16, 3)
    assert found.std() > 0.01


@check
def pipeline_save_load_local(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    pipe.save_pretrained(folder, safe_serialization=False)
    assert_images(sampled(_again(subject, folder)), sampled(pipe))


@check
def pipeline_save_load_optional_components(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    assert not pipe._optional_components
    pipe.save_pretrained(folder)
    assert_images(sampled(_again(subject, folder)), sampled(pipe))


@check
def pipeline_save_load_float16(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject).to(torch.float16)
    pipe.save_pretrained(folder)
    again = _again(subject, folder, torch_dtype=torch.float16)
    assert again.transformer.dtype == torch.float16
    assert_images(sampled(again), sampled(pipe), torch.float16)


@check
def pipeline_serialization_with_variants(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    pipe.save_pretrained(folder, variant="fp16")
    names = [path.name for path in (folder / "transformer").iterdir() if path.suffix == ".safetensors"]
    assert names == ["diffusion_pytorch_model.fp16.safetensors"]
    assert_images(sampled(_again(subject, folder, variant="fp16")), sampled(pipe))


@check
def pipeline_loading_with_incorrect_variants_raises_error(subject: Subject, folder: Path) -> None:
    pipeline(subject).save_pretrained(folder, variant="fp16")
    with pytest.raises((OSError, ValueError)) as caught:
        _again(subject, folder, variant="bf16")
    assert "bf16" in str(caught.value)


@check
def pipeline_torch_dtype_dict(subject: Subject, folder: Path) -> None:
    pipeline(subject).save_pretrained(folder)
    dtypes = {"transformer": torch.bfloat16, "default": torch.float16}
    again = _again(subject, folder, torch_dtype=dtypes)
    assert (again.transformer.dtype, again.vae.dtype) == (torch.bfloat16, torch.float16)


@check
def pipeline_inference_batch_consistent(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    assert [len(sampled(pipe, (1,) * size)) for size in (1, 2)] == [1, 2]


@check
def pipeline_inference_batch_single_identical(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    assert_images(sampled(pipe, (1, 2, 3))[:1], sampled(pipe))


@check
def pipeline_dict_tuple_outputs_equivalent(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    assert_images(sampled(pipe, return_dict=False), sampled(pipe))


@check
def pipeline_components_function(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    assert set(pipe.components) == {"transformer", "vae", "scheduler"}
    again = quiet(DiTPipeline(**pipe.components))
    assert_images(sampled(again), sampled(pipe))


@check
def pipeline_float16_inference(subject: Subject, folder: Path) -> None:
    expected = sampled(pipeline(subject))
    assert_images(sampled(pipeline(subject).to(torch.float16)), expected, torch.float16)


@check
def pipeline_to_device(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject).to("cpu")
    assert pipe.transformer.device == CPU
    sampled(pipe)


@check
def pipeline_to_dtype(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.float32, torch.float32)
    pipe.to(dtype=torch.float16)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.float16, torch.float16)


@check
def pipeline_attention_slicing_forward_pass(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    expected = sampled(pipe)
    for size in (1, 2):
        pipe.enable_attention_slicing(slice_size=size)
        assert_images(sampled(pipe), expected)


@check
def pipeline_sequential_offload_forward_pass_twice(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    expected = sampled(pipe)
    accelerate.cpu_offload(pipe.transformer, CPU, offload_buffers=True)
    for _ in range(2):
        # The pipeline reads the device of latents from the hooks.
        assert pipe._execution_device == CPU
        assert_images(sampled(pipe), expected)


@check
def pipeline_cpu_offload_forward_pass_twice(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    expected = sampled(pipe)
    hook = None
    for _ in range(2):
        _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, CPU, prev_module_hook=hook)
        assert_images(sampled(pipe), expected)


@check
def pipeline_layerwise_casting_inference(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject).to(torch.bfloat16)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    sampled(pipe)


@check
def pipeline_group_offloading_inference(subject: Subject, folder: Path) -> None:
    subject.require("_supports_group_offloading")
    pipe = pipeline(subject)
    expected = sampled(pipe)
    pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level")
    assert_images(sampled(pipe), expected)


@check
def pipeline_karras_schedulers_shape(subject: Subject, folder: Path) -> None:
    pipe = pipeline(subject)
    pipe.scheduler.register_to_config(skip_prk_steps=True)
    for scheduler in KarrasDiffusionSchedulers:
        if scheduler.name == "DPMSolverSDEScheduler":  # needs torchsde
            continue
        pipe.scheduler = getattr(diffusers, scheduler.name).from_config(pipe.scheduler.config)
        steps = 5 if "KDPM2" in scheduler.name else 2
        assert sampled(pipe, num_inference_steps=steps).shape == (1, 16, 16, 3), scheduler.name


def outcome(function: Check, subject: Subject, folder: Path) -> tuple[str, str]:
    """("pass", ""), ("not offered", why) or ("fail", why)."""
    folder.mkdir(parents=True)
    try:
        function(subject, folder)
    except NotOfferedError as error:
        return "not offered", str(error)
    except (Exception, pytest.fail.Exception) as error:  # the code under test may raise anything
        return "fail", f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return "pass", ""
