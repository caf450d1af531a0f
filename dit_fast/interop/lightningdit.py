"""Conversion between state dicts of LightningDiT (Yao et al. 2025, arXiv:2501.01423) and of an equivalent `DiT`.

Names and layouts agree, including rotary pairs and the order of the halves of SwiGLU. The differences are converted,
exactly up to rounding:

- Its RMSNorms have a weight w before the modulation: norm(x) w (1 + scale) + shift. The scale is linear in the
  condition, so that w is folded into the layer that computes it: 1 + scale' = w (1 + scale).
- Without shifts (`wo_shift`) that layer computes only scale and gate; shifts of zero are inserted.
- Its SwiGLU has int(8 D / 3) units, which a `DiT` rounds up to a multiple of 8: the added units are zeros, which
  contribute nothing and receive no gradient.
- It saves the cosines and sines of its rotary positions, which a `DiT` recomputes.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop.diffusers import conventions_of
from dit_fast.model.dit import DiT
from dit_fast.model.positions import ROTARY, rotary_angles
from dit_fast.utils.terminal import one_line

_COS, _SIN = "feat_rope.freqs_cos", "feat_rope.freqs_sin"
_NORM, _ADALN = "blocks.0.norm1.weight", "blocks.0.adaLN_modulation.1.weight"
_WEIGHT = re.compile(r"(?:blocks\.\d{1,6}\.norm([12])|final_layer\.norm_final)\.weight")
_MODULATION = re.compile(r"blocks\.\d{1,6}\.adaLN_modulation\.1\.(?:weight|bias)")
_SWIGLU = re.compile(r"(blocks\.\d{1,6}\.mlp)\.w3\.weight")
# Index of the scale among the vectors of a modulation layer, by the number of the norm: the layer of a block computes
# (shift, scale, gate) twice, that of the final layer (shift, scale).
_PLACES = {"1": 1, "2": 4, None: 1}
# Tolerance for cosines and sines, which LightningDiT computes in float32.
_ANGLE_TOLERANCE = 1e-4


def is_lightningdit(state: Mapping[str, Tensor]) -> bool:
    """Whether only LightningDiT has such tensors (rotary positions, or an RMSNorm with adaLN)."""
    return _COS in state or (_NORM in state and _ADALN in state)


def state_from_lightningdit(
    state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert a state dict of LightningDiT.

    Args:
        state: Its tensors, float32.
        source: Name of the file, for messages.

    Returns:
        State dict of the `DiT`, and the fields of its configuration that shapes do not determine.

    Raises:
        CheckpointError: A `DiT` cannot represent it: layer norms of queries and keys, rotary positions with another
            base or grid, or tensors of other shapes.
    """
    if "blocks.0.attn.q_norm.bias" in state:
        raise CheckpointError(
            f"{source}: queries and keys have layer norms (use_qknorm without use_rmsnorm), a DiT has RMSNorms there"
        )
    known: dict[str, Any] = {"norm": "rmsnorm" if _NORM in state else "layernorm", "mlp_ratio": 4.0}
    converted = dict(state)
    try:
        if _COS in state:
            table, width = converted.pop(_COS), state["x_embedder.proj.weight"].shape[0]
            _require_angles(table, converted.pop(_SIN), state["pos_embed"], source)
            known["positions"] = "sincos_rope" if state["pos_embed"].any() else "rope"
            known["num_heads"] = width // table.shape[1]
        for key in state:
            if _MODULATION.fullmatch(key):
                converted[key] = _with_shifts(state[key], state["x_embedder.proj.weight"].shape[0])
        for key in state:
            if norm := _WEIGHT.fullmatch(key):
                layer = re.sub(r"norm.*", "adaLN_modulation.1", key)
                _fold(converted, key, layer, _PLACES[norm[1]])
            elif mlp := _SWIGLU.fullmatch(key):
                _set_width(converted, mlp[1], -(-state[key].shape[1] // 8) * 8)
    except (KeyError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{source}: its tensors are not those of a LightningDiT ({one_line(error)})"
        ) from None
    return converted, known


def state_to_lightningdit(model: DiT) -> dict[str, Tensor]:
    """Convert a model to a state dict for LightningDiT's class, built with the same options.

    LightningDiT always adds `pos_embed`, so that it can represent every kind of positions.

    Args:
        model: The model.

    Returns:
        The state dict.

    Raises:
        ConfigError: LightningDiT cannot represent the model.
    """
    config, options = model.config, model.options
    width, (rows, columns) = config["hidden_size"], model.x_embedder.grid_size
    gelu, units = options["mlp"] == "gelu", int(2 / 3 * (4 * width))
    refused = {
        f"conditioning={options['conditioning']!r}": options["conditioning"] != "adaln_zero",
        "no classes": not model.num_classes,
        f"a grid of {rows}x{columns}": rows != columns,
        "qk_norm without norm='rmsnorm'": options["qk_norm"] and options["norm"] != "rmsnorm",
        f"mlp_ratio={config['mlp_ratio']:g}": int(width * config["mlp_ratio"]) != 4 * width,
        "diffusers' conventions": not conventions_of(model).same_outputs_as_reference,
    }
    if others := [name for name, found in refused.items() if found]:
        raise ConfigError(f"LightningDiT cannot be this model: it has {', '.join(others)}")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if options["norm"] == "rmsnorm":
        norms = [f"blocks.{i}.norm{n}.weight" for i in range(len(model.blocks)) for n in (1, 2)]
        state |= {name: model.pos_embed.new_ones(width) for name in [*norms, "final_layer.norm_final.weight"]}
    if options["positions"] in ROTARY:
        angles = rotary_angles((rows, columns), model.head_dim).repeat_interleave(2, dim=1)
        state |= {_COS: angles.cos(), _SIN: angles.sin()}
    for i in range(0 if gelu else len(model.blocks)):
        _set_width(state, f"blocks.{i}.mlp", units)
    return state


def _require_angles(cos: Tensor, sin: Tensor, positions: Tensor, source: str) -> None:
    """Raise CheckpointError unless these are cosines and sines of `rotary_angles` for a square grid, each twice."""
    tokens, width = positions.shape[1], cos.shape[1]
    side = math.isqrt(tokens)
    far = math.inf
    if side * side == tokens == cos.shape[0] and cos.shape == sin.shape and width % 4 == 0:
        angles = rotary_angles((side, side), width).repeat_interleave(2, dim=1)
        far = max(float((cos - angles.cos()).abs().max()), float((sin - angles.sin()).abs().max()))
    if not far < _ANGLE_TOLERANCE:
        raise CheckpointError(
            f"{source}: {_COS} {tuple(cos.shape)} has rotary positions that a DiT does not have; expected those "
            f"of a square grid of {tokens} patches, numbered 0, 1, ..., with frequencies of base 10000"
        )


def _with_shifts(layer: Tensor, width: int) -> Tensor:
    """Weight or bias of a modulation layer, with zero rows inserted for missing shifts."""
    if layer.shape[0] != 4 * width:
        return layer
    none = layer.new_zeros(width, *layer.shape[1:])
    scale_1, gate_1, scale_2, gate_2 = layer.split(width)
    return torch.cat([none, scale_1, gate_1, none, scale_2, gate_2])


def _fold(state: dict[str, Tensor], norm: str, layer: str, place: int) -> None:
    """Fold the weight of a norm into vector `place` of a modulation layer; RuntimeError for another width."""
    w, weight = state.pop(norm).double(), state[f"{layer}.weight"].clone()
    bias = state[f"{layer}.bias"].clone()
    if w.shape != weight.shape[1:]:
        raise RuntimeError(f"{norm} {tuple(w.shape)} for {layer}.weight {tuple(weight.shape)}")
    rows = slice(place * len(w), (place + 1) * len(w))
    weight[rows] = (w[:, None] * weight[rows].double()).float()
    bias[rows] = (w * (1 + bias[rows].double()) - 1).float()
    state[f"{layer}.weight"], state[f"{layer}.bias"] = weight, bias


def _set_width(state: dict[str, Tensor], mlp: str, hidden: int) -> None:
    """Set the number of units of a SwiGLU by adding or removing units of zeros; ConfigError for other units."""
    names = [f"{mlp}.{name}" for name in ("w12.weight", "w12.bias", "w3.weight")]
    halves = [half for name in names[:2] for half in state[name].chunk(2)]
    # Transposed, so that units are the first axis of every part.
    parts = [*halves, state[names[2]].T]
    more = hidden - len(parts[0])
    if more < 0 and any(part[hidden:].any() for part in parts):
        raise ConfigError(f"{mlp} is {len(parts[0])} wide, LightningDiT's {hidden}, and the rest is not zero")
    if more:
        gate, value, gate_bias, value_bias, out = (
            torch.cat([part[:hidden], part.new_zeros(max(more, 0), *part.shape[1:])]) for part in parts
        )
        state[names[0]], state[names[1]] = torch.cat([gate, value]), torch.cat([gate_bias, value_bias])
        state[names[2]] = out.T.contiguous()
