"""Drop-in for the reference's `models.py`: `from dit_fast.models import DiT_models`.

Names, constructor arguments, state dict, initialization and outputs are those of the reference.
"""

from dit_fast.model.blocks import DiTBlock, FinalLayer, modulate
from dit_fast.model.dit import DiT
from dit_fast.model.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder
from dit_fast.model.folder import load_weights, read_config
from dit_fast.model.layers import Attention, Mlp
from dit_fast.model.positions import (
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
    get_2d_sincos_pos_embed_from_grid,
)
from dit_fast.model.presets import (
    DiT_B_2,
    DiT_B_4,
    DiT_B_8,
    DiT_L_2,
    DiT_L_4,
    DiT_L_8,
    DiT_models,
    DiT_S_2,
    DiT_S_4,
    DiT_S_8,
    DiT_XL_2,
    DiT_XL_4,
    DiT_XL_8,
)

__all__ = [
    "Attention",
    "DiT",
    "DiTBlock",
    "DiT_B_2",
    "DiT_B_4",
    "DiT_B_8",
    "DiT_L_2",
    "DiT_L_4",
    "DiT_L_8",
    "DiT_S_2",
    "DiT_S_4",
    "DiT_S_8",
    "DiT_XL_2",
    "DiT_XL_4",
    "DiT_XL_8",
    "DiT_models",
    "FinalLayer",
    "LabelEmbedder",
    "Mlp",
    "PatchEmbed",
    "TimestepEmbedder",
    "get_1d_sincos_pos_embed_from_grid",
    "get_2d_sincos_pos_embed",
    "get_2d_sincos_pos_embed_from_grid",
    "load_weights",
    "modulate",
    "read_config",
]
