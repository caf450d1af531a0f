"""Checkpoints of every kind, read safely, and the autoencoder that latent models need."""

from dit_fast.interop.configuration import infer_config, registry_size, require_config
from dit_fast.interop.load import ModelInfo, load_model
from dit_fast.interop.weight_file import WeightFile, read_weight_file

__all__ = [
    "ModelInfo",
    "WeightFile",
    "infer_config",
    "load_model",
    "read_weight_file",
    "registry_size",
    "require_config",
]
