"""Interoperability: load, convert and accelerate checkpoints and models of other implementations."""

from dit_fast.checkpoint.weight_file import WeightFile, read_weight_file
from dit_fast.interop.accelerate import Acceleration, accelerate, restore
from dit_fast.interop.diffusers import (
    DIFFUSERS,
    REFERENCE,
    Conventions,
    ConvertedDiT,
    from_diffusers,
    save_diffusers,
    to_diffusers,
)
from dit_fast.interop.infer_config import infer_config, registry_size, require_config
from dit_fast.interop.load import ModelInfo, load_model

__all__ = [
    "DIFFUSERS",
    "REFERENCE",
    "Acceleration",
    "Conventions",
    "ConvertedDiT",
    "ModelInfo",
    "WeightFile",
    "accelerate",
    "from_diffusers",
    "infer_config",
    "load_model",
    "read_weight_file",
    "registry_size",
    "require_config",
    "restore",
    "save_diffusers",
    "to_diffusers",
]
