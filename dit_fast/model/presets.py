"""Sizes of the paper, table 1, and a constructor for each with each patch size."""

from collections.abc import Callable
from typing import Any

from dit_fast.model.dit import DiT

SIZES: dict[str, dict[str, int]] = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
}


def _factory(size: str, patch: int) -> Callable[..., DiT]:
    def build(**kwargs: Any) -> DiT:
        return DiT(**{**SIZES[size], "patch_size": patch, **kwargs})

    build.__name__ = build.__qualname__ = f"DiT_{size}_{patch}"
    build.__doc__ = (
        f"DiT-{size}/{patch} of the paper's table 1; keyword arguments are the constructor's others."
    )
    return build


DiT_XL_2, DiT_XL_4, DiT_XL_8 = (_factory("XL", patch) for patch in (2, 4, 8))
DiT_L_2, DiT_L_4, DiT_L_8 = (_factory("L", patch) for patch in (2, 4, 8))
DiT_B_2, DiT_B_4, DiT_B_8 = (_factory("B", patch) for patch in (2, 4, 8))
DiT_S_2, DiT_S_4, DiT_S_8 = (_factory("S", patch) for patch in (2, 4, 8))

DiT_models: dict[str, Callable[..., DiT]] = {
    "DiT-XL/2": DiT_XL_2, "DiT-XL/4": DiT_XL_4, "DiT-XL/8": DiT_XL_8,
    "DiT-L/2": DiT_L_2, "DiT-L/4": DiT_L_4, "DiT-L/8": DiT_L_8,
    "DiT-B/2": DiT_B_2, "DiT-B/4": DiT_B_4, "DiT-B/8": DiT_B_8,
    "DiT-S/2": DiT_S_2, "DiT-S/4": DiT_S_4, "DiT-S/8": DiT_S_8,
}  # fmt: skip
