"""`FastDiT`: adapter of a `DiT` for diffusers' `DiTPipeline`.

Importing diffusers takes three seconds, so the class is created at the first access to `dit_fast.FastDiT`.
"""

import contextlib
import functools
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError
from dit_fast.interop.adapter import CONFIG, check_base, merged, read_adapter, split
from dit_fast.interop.diffusers import (
    ADAPTER,
    CLASS_NAMES,
    NATIVE_NAMES,
    PIPELINE_NULL_CLASS,
    ConvertedDiT,
    adapter_config,
    config_from_diffusers,
    conventions_of,
    from_diffusers,
)
from dit_fast.kernels import BACKENDS
from dit_fast.model.dit import DiT
from dit_fast.utils.terminal import listed

# diffusers' names of attention backends -> ours.
_ATTENTION = {
    "native": "sdpa",
    "_native_efficient": "sdpa",
    "_native_math": "sdpa",
    "_native_cudnn": "cudnn",
    "_native_flash": "flash",
}

# Options of `from_pretrained` that place or quantize the parameters, which must already have our names.
_PLACEMENT = ("device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config")


_TABLE = "pos_embed.pos_embed"

_DOCUMENTATION = """A `DiT` that diffusers' `DiTPipeline` runs with any scheduler, saves and loads.

`FastDiT.from_dit(model)` wraps a model without copying it; `.dit` is the model, with its backends (`kernels`,
`attention`, ...). The arguments of the constructor, and their defaults, are those of diffusers' DiTTransformer2DModel
and four more: mlp_ratio, class_dropout_prob, timestep_freq_shift, cfg_channels (see `Conventions`). `FastDiT(**config)`
and `FastDiT.from_pretrained(folder)` of a DiTTransformer2DModel compute what it computes, and `FastDiT.from_dit` is
exact for weights of the reference. The timestep and label embedders run once per step, not in every block.

`DiTPipeline.from_pretrained(folder)` finds the class after `import dit_fast`. The pipeline guides all channels of the
noise; `cfg_channels` applies only to `.dit.forward_with_cfg`.
"""


def _read_whole(read: Callable[..., Any], source: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model, by diffusers' `from_pretrained` of its class, and what that says of its loading.

    Raises CheckpointError for tensors that are missing or left over, of which diffusers only warns.
    """
    options["output_loading_info"] = True
    try:
        model, information = read(source, **options)
    except OSError:
        # Shards that are not safetensors are found by diffusers only with use_safetensors=False.
        if options.get("use_safetensors") is not None:
            raise
        try:
            model, information = read(source, **options, use_safetensors=False)
        except OSError:
            model = None
        if model is None:
            raise
    problems = [f"missing {name}" for name in information["missing_keys"]]
    # Early releases saved the table of positions, which diffusers computes.
    problems += [f"unexpected {name}" for name in information["unexpected_keys"] if name != _TABLE]
    if problems:
        raise CheckpointError(f"{source} does not fit its config.json: {listed(problems)}")
    return model, information


@functools.cache
def fast_dit_class() -> Any:
    """The class `FastDiT`; MissingExtraError where diffusers is not installed."""
    try:
        from diffusers import ConfigMixin, DiTTransformer2DModel, ModelMixin
        from diffusers.configuration_utils import register_to_config
        from diffusers.loaders.peft import PeftAdapterMixin
        from diffusers.models.modeling_outputs import Transformer2DModelOutput
    except ImportError as error:
        raise MissingExtraError(
            "diffusers, whose pipelines FastDiT runs in, is not installed; pip install 'dit-fast[vae]'"
        ) from error

    class FastDiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
        _no_split_modules = ("DiTBlock",)
        _repeated_blocks = ("DiTBlock",)
        _group_offload_block_modules = ("dit",)
        _supports_gradient_checkpointing = True
        # As of DiTTransformer2DModel: the embedders and the layers of the adaptive norms.
        _skip_layerwise_casting_patterns = ("_embedder", "adaLN_modulation", "norm")

        @register_to_config
        def __init__(
            self,
            num_attention_heads: int = 16,
            attention_head_dim: int = 72,
            in_channels: int = 4,
            out_channels: int | None = None,
            num_layers: int = 28,
            dropout: float = 0.0,
            norm_num_groups: int = 32,
            attention_bias: bool = True,
            sample_size: int = 32,
            patch_size: int = 2,
            activation_fn: str = "gelu-approximate",
            num_embeds_ada_norm: int = 1000,
            upcast_attention: bool = False,
            norm_type: str = "ada_norm_zero",
            norm_elementwise_affine: bool = False,
            norm_eps: float = 1e-5,
            mlp_ratio: float = 4.0,
            class_dropout_prob: float = 0.1,
            timestep_freq_shift: float = 1,
            cfg_channels: int | None = None,
        ):
            super().__init__()
            config, conventions = config_from_diffusers(dict(self.config), ADAPTER)
            self.dit: DiT = ConvertedDiT(**config, conventions=conventions)

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
            """As of any model in diffusers; also a folder or repository with a DiTTransformer2DModel, converted.

            Raises:
                CheckpointError: The files have a model of another class, or other tensors than their configuration.
            """
            # Returns what only the weights' loader reads as the second value, instead of warning of it.
            config: Any = cls.load_config(
                pretrained_model_name_or_path, return_unused_kwargs=True, **options
            )[0]
            name = config.get("_class_name", ADAPTER)
            if name not in CLASS_NAMES:
                raise CheckpointError(
                    f"{pretrained_model_name_or_path} has a {name!r:.80}, FastDiT reads {', '.join(CLASS_NAMES)}: try "
                    "FastDiT.from_dit(dit_fast.load_model(path)[0])"
                )
            with_information = options.pop("output_loading_info", False)
            read = functools.partial(_read_whole, super().from_pretrained)
            if name == ADAPTER:
                adapter, information = read(pretrained_model_name_or_path, **options)
                return (adapter, information) if with_information else adapter
            placement = {name: options.pop(name) for name in _PLACEMENT if options.get(name) is not None}
            model, information = _read_whole(
                DiTTransformer2DModel.from_pretrained, pretrained_model_name_or_path, **options
            )
            adapter = cls.from_dit(from_diffusers(model))
            if placement:
                # A model that is offloaded to disk reads its files as long as it lives.
                kept = placement.get("offload_folder")
                with contextlib.nullcontext(kept) if kept else tempfile.TemporaryDirectory() as folder:
                    adapter.save_pretrained(folder)
                    adapter, _ = read(folder, torch_dtype=options.get("torch_dtype"), **placement)
            return (adapter, information) if with_information else adapter

        # The pipeline reads from the signature which of its own options it passes on.
        @functools.wraps(ModelMixin.save_pretrained)
        def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
            if self._hf_peft_config_loaded or any(".base_layer." in name for name in self.state_dict()):
                raise ConfigError(
                    "this FastDiT has an adapter: save_lora_adapter(folder) saves that; fuse_lora() and then "
                    "unload_lora(), or unload_lora() alone, leave weights that save_pretrained(folder) saves"
                )
            if getattr(self, "hf_quantizer", None) is None:
                self.dit.plain_state()
            # The model may have been changed since, for example by `regrid`.
            self.register_to_config(**adapter_config(self.dit.config, conventions_of(self.dit)))
            super().save_pretrained(save_directory, *arguments, **options)  # type: ignore[misc]

        @classmethod
        def from_config(cls, config: Any, **options: Any) -> Any:  # type: ignore[override]
            """Build from a configuration of FastDiT or of a DiTTransformer2DModel."""
            if isinstance(config, dict) and config.get("_class_name") in NATIVE_NAMES:
                # Of its fields, FastDiT lacks those of other Transformer2DModels, which must not have an effect.
                config_from_diffusers(config, config["_class_name"])
                known = inspect.signature(cls.__init__).parameters
                config = {key: value for key, value in config.items() if key in known}
            return super().from_config(config, **options)

        @classmethod
        def from_dit(cls, model: DiT) -> Any:
            """Wrap `model`, which shares its parameters; a DiTTransformer2DModel is converted, with copies of them."""
            if isinstance(model, DiTTransformer2DModel):
                model = from_diffusers(model).train(model.training)
            with torch.device("meta"):
                adapter = cls(**adapter_config(model.config, conventions_of(model)))
            adapter.dit = model
            return adapter.train(model.training)

        def load_lora_adapter(
            self,
            pretrained_model_name_or_path_or_dict: Any,
            prefix: Any = "transformer",
            hotswap: bool = False,
            **options: Any,
        ) -> Any:
            """As of any model in diffusers; also a folder of `train --lora`, or of peft for a `DiT` or FastDiT.

            Raises:
                CheckpointError: Such an adapter was trained on other weights, or is for other layers.
                ConfigError: It has modules that were trained whole, which diffusers' adapters cannot hold.
            """
            source = pretrained_model_name_or_path_or_dict
            if isinstance(source, str | Path) and (Path(source) / CONFIG).is_file():
                from peft import LoraConfig

                found = read_adapter(source)
                if whole := found.config.get("modules_to_save"):
                    raise ConfigError(
                        f"{source} has {', '.join(whole)} beside the adapter: load_model(path, adapter=folder) merges "
                        "it into the model; give that to FastDiT.from_dit"
                    )
                plain, _ = split(self.dit.state_dict())
                check_base(plain, self.dit.config, found, "this model")
                merged(plain, found.state, found.config, str(source))
                options = {"metadata": LoraConfig.from_pretrained(str(source)).to_dict(), **options}
                source, prefix = {f"dit.{name}": tensor for name, tensor in found.state.items()}, None
            return super().load_lora_adapter(source, prefix, hotswap, **options)

        @property
        def gradient_checkpointing(self) -> bool:
            """Whether every block is recomputed in the backward pass: `recompute="blocks"` of `.dit`."""
            return self.dit.recompute == "blocks"

        @gradient_checkpointing.setter
        def gradient_checkpointing(self, enable: bool) -> None:
            if enable or self.gradient_checkpointing:
                self.dit.recompute = "blocks" if enable else "none"

        def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
            """As of any model in diffusers; ConfigError for a function, since the blocks have their own."""
            if gradient_checkpointing_func is not None:
                raise ConfigError("FastDiT recomputes its blocks itself: give no gradient_checkpointing_func")
            super().enable_gradient_checkpointing()  # type: ignore[misc]

        def set_attention_backend(self, backend: str) -> None:
            """Set `.dit.attention` by one of diffusers' names for PyTorch's attention, or by one of ours."""
            name = str(getattr(backend, "value", backend)).lower()
            if name not in (*_ATTENTION, *BACKENDS):
                raise ConfigError(
                    f"FastDiT has no attention backend {name!r}: choose one of {', '.join((*_ATTENTION, *BACKENDS))}"
                )
            self.dit.attention = _ATTENTION.get(name, name)

        def reset_attention_backend(self) -> None:
            """Set `.dit.attention` to "auto"."""
            self.dit.attention = "auto"

        def forward(
            self,
            hidden_states: Tensor,
            timestep: Tensor | None = None,
            class_labels: Tensor | None = None,
            cross_attention_kwargs: dict[str, Any] | None = None,
            return_dict: bool = True,
        ) -> Any:
            """hidden_states (N, C, H, W), timestep (N,) or one number, class_labels (N,) -> `.sample` (N, out_channels,
            H, W), or a tuple of it; ConfigError without timestep or labels, or with `cross_attention_kwargs`.
            """
            if timestep is None or class_labels is None or cross_attention_kwargs:
                raise ConfigError("FastDiT takes timestep and class_labels, and no cross_attention_kwargs")
            timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(len(hidden_states))
            sample = self.dit(hidden_states, timestep, self._labels(class_labels, hidden_states))
            return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

        def _labels(self, labels: Tensor, images: Tensor) -> Tensor:
            """Labels (N,) with the null label of the pipeline replaced by that of the model.

            Where that label is also a class, it is the null one in the second half of a batch which repeats the images
            (N, C, H, W) of the first half and has no other label there: a batch of the pipeline with guidance.
            """
            classes, null = self.dit.num_classes, labels == PIPELINE_NULL_CLASS
            if classes > PIPELINE_NULL_CLASS:
                half = len(labels) // 2
                if len(labels) % 2 or not half or len(images) != len(labels):
                    return labels
                null = null[half:].all() & (images[:half] == images[half:]).all()
                null = null & (torch.arange(len(labels), device=labels.device) >= half)
            if self.dit.null_class is None and not torch.compiler.is_compiling() and bool(null.any()):
                raise ConfigError(
                    "guidance on a model without a null class (class_dropout_prob 0): use guidance_scale=1"
                )
            return torch.where(null, classes, labels)

    FastDiT.__doc__ = _DOCUMENTATION
    # diffusers and pickle look for the class there: diffusers stores the first part of __module__ in model_index.json.
    FastDiT.__module__, FastDiT.__qualname__ = "dit_fast", ADAPTER
    return FastDiT
