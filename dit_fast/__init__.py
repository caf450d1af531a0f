"""Diffusion Transformers, trained and sampled fast.

`__all__` lists the names that most programs need. Each is imported when it is first used, so that `import dit_fast`
loads neither PyTorch nor Triton. The packages below (`dit_fast.diffusion`, `dit_fast.sampling`, ...) have the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_fast.data import open_data, open_stream
    from dit_fast.diffusion import FlowMatching, GaussianDiffusion, create_diffusion
    from dit_fast.errors import DitFastError
    from dit_fast.interop import from_diffusers, load_model, save_diffusers, to_diffusers
    from dit_fast.interop.accelerate import accelerate
    from dit_fast.model.dit import DiT
    from dit_fast.model.presets import DiT_models
    from dit_fast.sampling import Guidance, Sampler, SamplerConfig
    from dit_fast.training import TrainConfig, TrainResult, resume, train

    FastDiT: Any

__version__ = "0.1.0"

__all__ = [
    "DiT",
    "DiT_models",
    "DitFastError",
    "FlowMatching",
    "GaussianDiffusion",
    "Guidance",
    "Sampler",
    "SamplerConfig",
    "TrainConfig",
    "TrainResult",
    "accelerate",
    "create_diffusion",
    "from_diffusers",
    "load_model",
    "open_data",
    "open_stream",
    "resume",
    "save_diffusers",
    "to_diffusers",
    "train",
]

_MODULES = {
    "DiT": "dit_fast.model.dit",
    "DiT_models": "dit_fast.model.presets",
    "DitFastError": "dit_fast.errors",
    "FlowMatching": "dit_fast.diffusion",
    "GaussianDiffusion": "dit_fast.diffusion",
    "Guidance": "dit_fast.sampling",
    "Sampler": "dit_fast.sampling",
    "SamplerConfig": "dit_fast.sampling",
    "TrainConfig": "dit_fast.training",
    "TrainResult": "dit_fast.training",
    "accelerate": "dit_fast.interop.accelerate",
    "create_diffusion": "dit_fast.diffusion",
    "from_diffusers": "dit_fast.interop",
    "load_model": "dit_fast.interop",
    "open_data": "dit_fast.data",
    "open_stream": "dit_fast.data",
    "resume": "dit_fast.training",
    "save_diffusers": "dit_fast.interop",
    "to_diffusers": "dit_fast.interop",
    "train": "dit_fast.training",
    # diffusers resolves the base class of a saved pipeline's component in the module that holds the component.
    "ModelMixin": "diffusers",
}


def __getattr__(name: str) -> Any:
    if name == "FastDiT":
        # Not in __all__ or dir(): it needs diffusers, and help(dit_fast) reads every name that dir() lists.
        return import_module("dit_fast.interop.fast_dit").fast_dit_class()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
