"""`FastDiT`: adapter of a `DiT` for diffusers' `DiTPipeline`.

Importing diffusers takes three seconds, so the class is created at the first access to `dit_fast.FastDiT`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import ConfigError, MissingExtraError
from dit_fast.interop.diffusers import (
    ADAPTER,
    ConvertedDiT,
    adapter_config,
    config_from_diffusers,
    conventions_of,
    from_diffusers,
)
from dit_fast.model.dit import DiT

# Label that diffusers' pipeline passes for the unconditional half, whatever the number of classes.
_PIPELINE_NULL = 1000

_DOCUMENTATION = """A `DiT` that diffusers' `DiTPipeline` runs with any scheduler, saves and loads.

`FastDiT.from_dit(model)` wraps a model without copying it; `.dit` is the model, with its backends (`kernels`,
`attention`, ...). The arguments of the constructor are those of diffusers' DiTTransformer2DModel and four more:
mlp_ratio, class_dropout_prob, timestep_freq_shift, cfg_channels (see `Conventions`). Unlike the model of diffusers, it
is exact for weights of the reference, and the timestep and label embedders run once per step, not in every block.

`DiTPipeline.from_pretrained(folder)` finds the class after `import dit_fast`. The pipeline guides all channels of the
noise; `cfg_channels` applies only to `.dit.forward_with_cfg`.
"""


@functools.cache
def fast_dit_class() -> Any:
    """The class `FastDiT`; MissingExtraError where diffusers is not installed."""
    try:
        from diffusers import ConfigMixin, DiTTransformer2DModel, ModelMixin
        from diffusers.configuration_utils import register_to_config
        from diffusers.models.modeling_outputs import Transformer2DModelOutput
    except ImportError as error:
        raise MissingExtraError(
            "diffusers, whose pipelines FastDiT runs in, is not installed; pip install 'dit-fast[vae]'"
        ) from error

    class FastDiT(ModelMixin, ConfigMixin):
        _no_split_modules = ("DiTBlock",)

        @register_to_config
        def __init__(
            self,
            num_attention_heads: int = 16,
            attention_head_dim: int = 72,
            in_channels: int = 4,
            out_channels: int | None = 8,
            num_layers: int = 28,
            sample_size: int = 32,
            patch_size: int = 2,
            num_embeds_ada_norm: int = 1000,
            norm_eps: float = 1e-6,
            mlp_ratio: float = 4.0,
            class_dropout_prob: float = 0.1,
            timestep_freq_shift: float = 0,
            cfg_channels: int | None = 3,
        ):
            super().__init__()
            config, conventions = config_from_diffusers(dict(self.config), ADAPTER)
            self.dit: DiT = ConvertedDiT(**config, conventions=conventions)

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
            """As of any model in diffusers; also a folder or repository with a DiTTransformer2DModel, converted."""
            # Returns what only the weights' loader reads as the second value, instead of warning of it.
            config: Any = cls.load_config(
                pretrained_model_name_or_path, return_unused_kwargs=True, **options
            )[0]
            if config.get("_class_name") != DiTTransformer2DModel.__name__:
                return super().from_pretrained(pretrained_model_name_or_path, **options)
            model = DiTTransformer2DModel.from_pretrained(pretrained_model_name_or_path, **options)
            return cls.from_dit(from_diffusers(model))

        @classmethod
        def from_config(cls, config: Any, **options: Any) -> Any:  # type: ignore[override]
            """Build from a configuration of FastDiT or of a DiTTransformer2DModel."""
            if not isinstance(config, dict) or config.get("_class_name") != DiTTransformer2DModel.__name__:
                return super().from_config(config, **options)
            dit_config, conventions = config_from_diffusers(config, DiTTransformer2DModel.__name__)
            return cls.from_dit(ConvertedDiT(**dit_config, conventions=conventions))

        @classmethod
        def from_dit(cls, model: DiT) -> Any:
            """Wrap `model`; its parameters are shared, not copied."""
            with torch.device("meta"):
                adapter = cls(**adapter_config(model.config, conventions_of(model)))
            adapter.dit = model
            return adapter.train(model.training)

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
            sample = self.dit(hidden_states, timestep, self._labels(class_labels))
            return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

        def _labels(self, labels: Tensor) -> Tensor:
            """Labels (N,) with the null label of the pipeline replaced by that of the model, unless it is a class."""
            classes = self.dit.num_classes
            if classes >= _PIPELINE_NULL:
                return labels
            null = labels == _PIPELINE_NULL
            if self.dit.null_class is None and bool(null.any()):
                raise ConfigError(
                    "guidance on a model without a null class (class_dropout_prob 0): use guidance_scale=1"
                )
            return torch.where(null, classes, labels)

    FastDiT.__doc__ = _DOCUMENTATION
    # diffusers and pickle look for the class there: diffusers stores the first part of __module__ in model_index.json.
    FastDiT.__module__, FastDiT.__qualname__ = "dit_fast", ADAPTER
    return FastDiT
