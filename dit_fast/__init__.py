"""Diffusion Transformers, trained and sampled fast.

`dit_fast.accelerate(model)` speeds up somebody else's DiT in place; `dit_fast.FastDiT` is ours for diffusers'
pipelines. Both are looked up when they are first asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# ModelMixin: diffusers looks beside FastDiT for the base class that says how to load it.
_LAZY = {
    "accelerate": ("dit_fast.interop.accelerate", "accelerate"),
    "FastDiT": ("dit_fast.interop.fast_dit", "fast_dit_class"),
    "ModelMixin": ("diffusers", "ModelMixin"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    return value() if name == "FastDiT" else value
