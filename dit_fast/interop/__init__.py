"""Other people's checkpoints and models: read safely, converted exactly, accelerated in place."""

from dit_fast.interop.acceleration import Acceleration, accelerate, restore
from dit_fast.interop.configuration import infer_config, registry_size, require_config
from dit_fast.interop.converted import DIFFUSERS, REFERENCE, Conventions, ConvertedDiT
from dit_fast.interop.diffusers_model import from_diffusers, save_diffusers, to_diffusers
from dit_fast.interop.load import ModelInfo, load_model
from dit_fast.interop.weight_file import WeightFile, read_weight_file

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
