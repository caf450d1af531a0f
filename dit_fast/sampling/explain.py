"""Pictures that explain a model: its way from noise, what guidance and the number of steps do, where a head attends.

`decode` turns states float (M, C, H, W) into images float (M, 1 or 3, h, w) in [-1, 1]; every picture is PIL's, RGB.
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
from dit_fast.sampling.schedule import Nodes
from dit_fast.utils.images import draw_grid, to_uint8

Decode = Callable[[Tensor], Tensor]
# Of the heat in an overlay; the image keeps the rest.
_HEAT = 0.6


def film_strip(
    sampler: Sampler, labels: Tensor, names: Sequence[str], decode: Decode, seed: int = 0, frames: int = 10
) -> Image.Image:
    """A row for each of `labels` (M,) or captions (M, S, E), named: its state at about `frames` points on the way to
    the sample.
    """
    every = max(1, len(sampler.nodes) // max(frames - 1, 1))
    states: list[np.ndarray] = []

    def keep(step: Step) -> None:
        states.append(to_uint8(decode(step.state.float())))

    sampler(labels, seed=seed, batch_size=len(labels), on_step=keep, every=every)
    film = np.stack(states, axis=1)
    return draw_grid(list(zip(names, film, strict=True)))


def guidance_sweep(
    sampler: Sampler, labels: Tensor, scales: Sequence[float], decode: Decode, seed: int = 0
) -> Image.Image:
    """A row for each guidance scale, all from the same noise; `sampler` is as before afterwards."""
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
    """A row for each number of steps, all from the same noise; `sampler` is as before afterwards.

    Raises ConfigError for more steps than the sampler has.
    """
    nodes = sampler.nodes
    schedules = [thinned(nodes, count) for count in steps]
    try:
        rows = []
        for schedule in schedules:
            sampler.nodes = schedule
            rows.append((f"{len(schedule)} steps", _draw(sampler, labels, decode, seed)))
    finally:
        sampler.nodes = nodes
    return draw_grid(rows)


def thinned(nodes: Nodes, steps: int) -> Nodes:
    """`steps` of the nodes, evenly spaced, the first among them; ConfigError where there are not so many."""
    if not 1 <= steps <= len(nodes):
        raise ConfigError(f"{steps} steps: choose 1 to {len(nodes)}")
    kept = np.rint(np.linspace(0, len(nodes) - 1, steps)).astype(int)
    ends = np.append(kept, len(nodes))
    return dataclasses.replace(
        nodes,
        times=nodes.times[kept],
        levels=nodes.levels[kept],
        alphas=nodes.alphas[ends],
        sigmas=nodes.sigmas[ends],
        rates=None if nodes.rates is None else (nodes.rates[0][kept], nodes.rates[1][kept]),
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
    """Two rows for each of `labels` (M,) or captions (M, S, E): its state on the way from noise, and over it the
    attention that each place gets in `block` from all places, of one `head` or the mean of all (None), scaled to its
    greatest.

    The conditional branch is looked at, at the state that the next step starts from.
    """
    model, times = sampler.model, sampler.nodes.times
    # At least one of the states before the last is looked at.
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
    """ConfigError where the model has no such block or head."""
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
    """softmax(q k^T / sqrt(K)) of `block`: float32 (N, H, T, h, w), the attention of each of T tokens to each patch.

    x (N, C, H, W); t (N,) timesteps; y (N,) labels or captions (N, S, E). Tokens that are no patches (in-context
    conditioning) come after the patches among the T, and their share of the attention is not shown; padding gets none
    and gives none.
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

    # A block that finds a hook calls its attention as a module instead of using its parts.
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
    """uint8 images (M, H, W, 1 or 3) under maps (M, h, w) in red, each scaled to its greatest: uint8 (M, H, W, 3)."""
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
