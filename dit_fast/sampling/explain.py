"""Pictures that explain a model: trajectories, effects of guidance and of the number of steps, attention of a head.

`decode` maps states, float (M, C, H, W), to images, float (M, 1 or 3, h, w) in [-1, 1]. Pictures are RGB images of PIL.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.model.blocks import Attention
from dit_fast.model.dit import DiT
from dit_fast.sampling.sampler import Sampler, Step
from dit_fast.sampling.schedule import NoiseSchedule
from dit_fast.utils.images import draw_grid, to_uint8

Decode = Callable[[Tensor], Tensor]
# Opacity of the heat map in an overlay.
_HEAT = 0.6


def film_strip(
    sampler: Sampler, labels: Tensor, names: Sequence[str], decode: Decode, seed: int = 0, frames: int = 10
) -> Image.Image:
    """Draw states on the way from noise to the sample, one row per label.

    Args:
        sampler: The sampler.
        labels: Labels (M,) or captions (M, S, E).
        names: Name of each row.
        decode: Maps states to images.
        seed: Random seed.
        frames: Approximate number of states per row.

    Returns:
        The picture.
    """
    every = max(1, len(sampler.schedule) // max(frames - 1, 1))
    states: list[np.ndarray] = []

    def keep(step: Step) -> None:
        states.append(to_uint8(decode(step.state.float())))

    sampler(labels, seed=seed, batch_size=len(labels), on_step=keep, every=every)
    film = np.stack(states, axis=1)
    return draw_grid(list(zip(names, film, strict=True)))


def guidance_sweep(
    sampler: Sampler, labels: Tensor, scales: Sequence[float], decode: Decode, seed: int = 0
) -> Image.Image:
    """Draw samples for several guidance scales, one row per scale, from the same noise.

    Args:
        sampler: The sampler; its configuration is restored afterwards.
        labels: Labels (M,) or captions (M, S, E).
        scales: Guidance scales.
        decode: Maps states to images.
        seed: Random seed.

    Returns:
        The picture.
    """
    config = sampler.config
    try:
        rows = []
        for scale in scales:
            sampler.config = dataclasses.replace(
                config, guidance=dataclasses.replace(config.guidance, scale=scale)
            )
            rows.append((f"scale {scale:g}", _draw(sampler, labels, decode, seed)))
    finally:
        sampler.config = config
    return draw_grid(rows)


def steps_sweep(
    sampler: Sampler, labels: Tensor, steps: Sequence[int], decode: Decode, seed: int = 0
) -> Image.Image:
    """Draw samples for several numbers of steps, one row per number, from the same noise.

    Args:
        sampler: The sampler; its noise schedule is restored afterwards.
        labels: Labels (M,) or captions (M, S, E).
        steps: Numbers of steps.
        decode: Maps states to images.
        seed: Random seed.

    Returns:
        The picture.

    Raises:
        ConfigError: The sampler has fewer steps.
    """
    whole = sampler.schedule
    schedules = [thinned(whole, count) for count in steps]
    try:
        rows = []
        for schedule in schedules:
            sampler.schedule = schedule
            rows.append((f"{len(schedule)} steps", _draw(sampler, labels, decode, seed)))
    finally:
        sampler.schedule = whole
    return draw_grid(rows)


def thinned(schedule: NoiseSchedule, steps: int) -> NoiseSchedule:
    """`steps` evenly spaced steps of a schedule, the first one included; ConfigError where it has fewer."""
    if not 1 <= steps <= len(schedule):
        raise ConfigError(f"{steps} steps: choose 1 to {len(schedule)}")
    kept = np.rint(np.linspace(0, len(schedule) - 1, steps)).astype(int)
    # alphas and sigmas have one entry more: the end of the trajectory.
    ends = np.append(kept, len(schedule))
    return dataclasses.replace(
        schedule,
        times=schedule.times[kept],
        levels=schedule.levels[kept],
        alphas=schedule.alphas[ends],
        sigmas=schedule.sigmas[ends],
    )


def attention_film(
    sampler: Sampler,
    labels: Tensor,
    names: Sequence[str],
    decode: Decode,
    block: int,
    head: int | None,
    seed: int = 0,
    frames: int = 10,
) -> Image.Image:
    """Draw states on the way from noise and, in a second row per label, the attention that each patch receives.

    The attention is that of the conditional branch at the state from which the next step starts, averaged over all
    tokens that attend and scaled to its maximum.

    Args:
        sampler: The sampler.
        labels: Labels (M,) or captions (M, S, E).
        names: Name of each row.
        decode: Maps states to images.
        block: Number of the block.
        head: Number of the head; None averages all heads.
        seed: Random seed.
        frames: Approximate number of states per row.

    Returns:
        The picture.

    Raises:
        ConfigError: The model has no such block or head.
    """
    model, times = sampler.model, sampler.schedule.times
    # At least one state before the last is shown.
    every = max(1, min(len(times) - 1, len(times) // max(frames - 1, 1)))
    plain: list[np.ndarray] = []
    heated: list[np.ndarray] = []
    check_attention(model, block, head)

    def keep(step: Step) -> None:
        if step.done == len(times):
            return
        state = step.state
        t = torch.full((len(state),), times[step.done], dtype=torch.float32, device=state.device)
        maps = attention_maps(model, state.to(model.pos_embed.dtype), t, labels.to(state.device), block)
        received = maps.mean(dim=2)
        chosen = received.mean(dim=1) if head is None else received[:, head]
        image = to_uint8(decode(state.float()))
        plain.append(np.repeat(image, 3, axis=3) if image.shape[3] == 1 else image)
        heated.append(overlay(image, chosen))

    sampler(labels, seed=seed, batch_size=len(labels), on_step=keep, every=every)
    rows = []
    for number, name in enumerate(names):
        rows.append((name, np.stack([frame[number] for frame in plain])))
        rows.append(("attention", np.stack([frame[number] for frame in heated])))
    return draw_grid(rows)


def check_attention(model: DiT, block: int, head: int | None) -> None:
    """Raise ConfigError where the model has no such block or head."""
    if not 0 <= block < len(model.blocks):
        raise ConfigError(f"block {block}: the model has blocks 0 to {len(model.blocks) - 1}")
    heads = _attention(model, block).num_heads
    if head is not None and not 0 <= head < heads:
        raise ConfigError(f"head {head}: block {block} has heads 0 to {heads - 1}")


def _attention(model: DiT, block: int) -> Attention:
    module = model.blocks[block].attn
    assert isinstance(module, Attention)
    return module


def attention_maps(model: DiT, x: Tensor, t: Tensor, y: Tensor, block: int) -> Tensor:
    """Attention maps softmax(q k^T / sqrt(K)) of a block.

    Args:
        model: The model.
        x: States (N, C, H, W).
        t: Timesteps (N,).
        y: Labels (N,) or captions (N, S, E).
        block: Number of the block.

    Returns:
        Attention of each of T tokens to each patch, float32 (N, heads, T, h, w). In-context conditioning tokens follow
        the patches along T; the attention to them is not returned. Padding neither attends nor is attended to.

    Raises:
        ConfigError: The model has no such block.
    """
    check_attention(model, block, None)
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        packed = module.project(*inputs).float()
        q, k = packed[:, :, 0].transpose(1, 2), packed[:, :, 1].transpose(1, 2)
        scores = q @ k.transpose(2, 3) * module.scale
        layout = inputs[1] if len(inputs) > 1 else None
        if layout is None or layout.present is None:
            kept.append(scores.softmax(dim=3))
        else:
            present = layout.present[:, None, None]
            maps = scores.masked_fill(~present, -torch.inf).softmax(dim=3)
            kept.append(maps * present.transpose(2, 3))

    # A block whose attention has a hook calls it as a module instead of fusing its layers.
    handle = _attention(model, block).register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            model(x, t, y)
    finally:
        handle.remove()
    (maps,) = kept
    height, width = model.x_embedder.grid_size
    return maps[..., : height * width].unflatten(3, (height, width))


def overlay(images: np.ndarray, maps: Tensor) -> np.ndarray:
    """Overlay images with red heat maps, each scaled to its maximum.

    Args:
        images: uint8 (M, H, W, 1 or 3).
        maps: Heat maps (M, h, w).

    Returns:
        uint8 (M, H, W, 3).
    """
    size = images.shape[1:3]
    heat = F.interpolate(maps[:, None].float().cpu(), size, mode="bilinear", align_corners=False)[
        :, 0
    ].numpy()
    heat = _HEAT * heat / np.maximum(heat.max(axis=(1, 2), keepdims=True), 1e-12)
    red = np.array([255.0, 40.0, 0.0])
    mixed = images * (1 - heat[..., None]) + red * heat[..., None]
    return np.rint(mixed).astype(np.uint8)


def _draw(sampler: Sampler, labels: Tensor, decode: Decode, seed: int) -> np.ndarray:
    return to_uint8(decode(sampler(labels, seed=seed, batch_size=len(labels))))
