"""A DiT of ours as a live model of diffusers, and the other way round."""

from pathlib import Path
from typing import Any

import torch

from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError
from dit_fast.interop.converted import DIFFUSERS, Conventions, ConvertedDiT, conventions_of
from dit_fast.interop.diffusers_folder import check_positions, write_folder
from dit_fast.interop.diffusers_layout import (
    config_from_diffusers,
    diffusers_config,
    state_from_diffusers,
    state_to_diffusers,
)
from dit_fast.models import DiT, load_weights


def to_diffusers(model: DiT) -> Any:
    """diffusers' `DiTTransformer2DModel` with copies of the model's weights and the same outputs, in eval mode.

    The model's `Conventions` go with it: norm_eps as its configuration, the timestep frequencies as
    `downscale_freq_shift` of its live embedders. diffusers does not save the latter, so that a model of the
    reference's frequencies is exact as long as it lives: to keep one on disk, save `FastDiT.from_dit(model)`.

    Raises MissingExtraError without diffusers, ConfigError for a model that diffusers' class cannot be.
    """
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise MissingExtraError(
            "diffusers, which to_diffusers makes a model of, is not installed; pip install 'dit-fast[vae]'"
        ) from error
    conventions = conventions_of(model)
    check_positions(model)
    parameter = model.x_embedder.proj.weight
    theirs: Any = DiTTransformer2DModel(**diffusers_config(model.config, conventions))
    theirs.load_state_dict(state_to_diffusers(model.state_dict()))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = conventions.timestep_freq_shift
    # Asked for the dtype it has, diffusers' `to` warns all the same.
    dtype = {} if parameter.dtype == torch.float32 else {"dtype": parameter.dtype}
    return theirs.to(parameter.device, **dtype).eval()


def from_diffusers(model: Any, *, cfg_channels: int | None = None) -> ConvertedDiT:
    """A `ConvertedDiT` with copies of the weights and the same outputs as diffusers' live `DiTTransformer2DModel`.

    On the model's device, in its dtype, in eval mode. diffusers keeps guidance in the pipeline: `cfg_channels`, what
    `forward_with_cfg` guides, is None for all channels, as there, or what the caller knows. For a folder that
    diffusers wrote, use `load_model`, which does not need diffusers. Raises ConfigError for another class,
    CheckpointError where its blocks differ in what a DiT has once.
    """
    name = type(model).__name__
    if name != "DiTTransformer2DModel":
        raise ConfigError(f"from_diffusers takes a DiTTransformer2DModel, this is a {name}")
    config, _ = config_from_diffusers(dict(model.config), name)
    conventions = _live_conventions(model, cfg_channels)
    state = state_from_diffusers(model.state_dict(), config, name)
    weight = state["x_embedder.proj.weight"]
    state["pos_embed"] = state["pos_embed"].to(weight)
    with torch.device("meta"):
        ours = ConvertedDiT(**config, conventions=conventions)
    load_weights(ours, {key: value.detach().clone() for key, value in state.items()}, name, assign=True)
    return ours.eval()


def save_diffusers(model: DiT, folder: str | Path, *, conventions: Conventions | None = None) -> None:
    """Write a folder that diffusers loads natively, `DiTTransformer2DModel.from_pretrained(folder)`.

    Its outputs are the model's when the model has diffusers' timestep frequencies. The reference's own weights do
    not: with `conventions=DIFFUSERS` they are exported as diffusers' own conversion does, for a model that computes
    a little else. Raises ConfigError where the outputs would differ and that was not asked for.
    """
    if conventions is not None:
        if conventions.timestep_freq_shift != DIFFUSERS.timestep_freq_shift:
            raise ConfigError(f"{conventions}: a folder of diffusers has timestep_freq_shift 1")
        with torch.device("meta"):
            other = ConvertedDiT(**model.config, conventions=conventions)
        load_weights(other, model.state_dict(), "the model", assign=True)
        model = other
    write_folder(model, folder)


def _live_conventions(model: Any, cfg_channels: int | None) -> Conventions:
    """What the modules themselves say, which may have been changed since they were built."""
    found = set()
    for block in model.transformer_blocks:
        time_proj = block.norm1.emb.time_proj
        if not time_proj.flip_sin_to_cos or time_proj.scale != 1:
            raise CheckpointError(
                f"{type(model).__name__}: timesteps embedded as [sin, cos] or scaled are no DiT's"
            )
        found.add((time_proj.downscale_freq_shift, block.norm1.norm.eps, block.norm3.eps))
    if len(found) != 1 or (only := next(iter(found)))[1] != 1e-6:
        raise CheckpointError(
            f"{type(model).__name__}: blocks with (timestep_freq_shift, eps of norm1, eps of norm3) {sorted(found)}; "
            "a DiT has one for all, and 1e-6 in its first norm"
        )
    return Conventions(only[0], only[2], cfg_channels)
