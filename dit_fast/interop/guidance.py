"""Default guidance of a model, for grids, evaluation and `dit-fast sample` alike."""

from dit_fast.interop.diffusers import REFERENCE, conventions_of
from dit_fast.model.dit import DiT
from dit_fast.sampling import Guidance

DEFAULT_SCALE = 4.0
"""Guidance scale for a model that has a null class."""
_REFERENCE_CHANNELS = 4


def default_guidance(model: DiT, trained_here: bool) -> Guidance:
    """Guidance where the user gives none.

    The reference guides the first three channels of its latents of four, which samples of its published weights need.
    Every other model is guided in all channels, or in those that the `config.json` of a `FastDiT` names.

    Args:
        model: The model.
        trained_here: Whether `dit-fast train` trained it, and not the reference.

    Returns:
        Scale and channels; scale 1, no guidance, for a model without a null class.
    """
    conventions = conventions_of(model)
    channels = conventions.cfg_channels
    if conventions == REFERENCE and (trained_here or model.in_channels != _REFERENCE_CHANNELS):
        channels = None
    return Guidance(DEFAULT_SCALE if model.has_null else 1.0, channels)
