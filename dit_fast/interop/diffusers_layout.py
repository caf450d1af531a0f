"""The reference's state dict and configuration <-> those of diffusers' `DiTTransformer2DModel`, both directions.

Only names and shapes are changed here, so that there and back again is the same bits. diffusers keeps q, k and v
apart, stores the timestep and label embedders once in every block, and makes the positions anew. Nothing here
needs diffusers itself.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop.converted import Conventions
from dit_fast.options import beyond_the_paper
from dit_fast.positions import get_2d_sincos_pos_embed

TRANSFORMER = "DiTTransformer2DModel"
ADAPTER = "FastDiT"
# The first releases wrote the DiT as a Transformer2DModel with norm_type "ada_norm_zero".
CLASS_NAMES = (TRANSFORMER, ADAPTER, "Transformer2DModel")

_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_THEIR_BLOCK = re.compile(r"transformer_blocks\.(\d{1,6})\.(.+)")
_OUR_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

# XL on 256 x 256 latents has 19 million.
_MOST_POSITIONS = 1 << 25

# diffusers trains with this share of dropped labels, whatever its configuration.
_LABEL_DROPOUT = 0.1

_INT, _NUMBER = (int,), (int, float)
_DEFAULTS: dict[str, tuple[tuple[type, ...], Any]] = {
    "num_attention_heads": (_INT, 16), "attention_head_dim": (_INT, 72), "in_channels": (_INT, 4),
    "out_channels": ((int, type(None)), None), "num_layers": (_INT, 28), "sample_size": (_INT, 32),
    "patch_size": (_INT, 2), "num_embeds_ada_norm": (_INT, 1000), "norm_eps": (_NUMBER, 1e-5),
    "mlp_ratio": (_NUMBER, 4.0), "class_dropout_prob": (_NUMBER, _LABEL_DROPOUT),
    "timestep_freq_shift": (_NUMBER, 1), "cfg_channels": ((int, type(None)), None),
}  # fmt: skip
# Fields of FastDiT alone; in a file of diffusers they would be ignored by diffusers itself.
_OURS = ("mlp_ratio", "class_dropout_prob", "timestep_freq_shift", "cfg_channels")
_FIXED = {
    "dropout": 0.0, "attention_bias": True, "activation_fn": "gelu-approximate", "upcast_attention": False,
    "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
}  # fmt: skip
_IGNORED = ("norm_num_groups", "attention_type", "interpolation_scale")


def diffusers_config(config: Mapping[str, Any], conventions: Conventions) -> dict[str, Any]:
    """Arguments of diffusers' DiTTransformer2DModel for `DiT.config`.

    Raises ConfigError for a grid that is not square, another MLP ratio than 4, or a model without a null class,
    which diffusers' class cannot be. `timestep_freq_shift` is not among its arguments: see `diffusers_model`.
    """
    arguments = adapter_config(config, conventions)
    problems = []
    if int(config["mlp_ratio"] * config["hidden_size"]) != 4 * config["hidden_size"]:
        problems.append(f"mlp_ratio {config['mlp_ratio']} (4 wanted)")
    if not config["class_dropout_prob"]:
        problems.append("no null class (class_dropout_prob above 0 wanted)")
    if problems:
        raise ConfigError(f"{TRANSFORMER} cannot be this model: {', '.join(problems)}")
    return {key: value for key, value in arguments.items() if key not in _OURS}


def adapter_config(config: Mapping[str, Any], conventions: Conventions) -> dict[str, Any]:
    """Arguments of `FastDiT` for `DiT.config`: diffusers' names, and what they cannot say.

    Raises ConfigError for a grid that is not square, or a model with other options than the paper's.
    """
    if others := beyond_the_paper(config):
        raise ConfigError(f"diffusers' DiT is the paper's, this model has {others}")
    height, width = config["input_size"]
    if height != width:
        raise ConfigError(
            f"diffusers' DiT is square, this model is {height}x{width}: model.regrid(...) first"
        )
    channels, heads = config["in_channels"], config["num_heads"]
    return {
        "num_attention_heads": heads,
        "attention_head_dim": config["hidden_size"] // heads,
        "in_channels": channels,
        "out_channels": 2 * channels if config["learn_sigma"] else channels,
        "num_layers": config["depth"],
        "sample_size": height,
        "patch_size": config["patch_size"],
        "num_embeds_ada_norm": config["num_classes"],
        "norm_eps": conventions.norm2_eps,
        "mlp_ratio": config["mlp_ratio"],
        "class_dropout_prob": config["class_dropout_prob"],
        "timestep_freq_shift": conventions.timestep_freq_shift,
        "cfg_channels": conventions.cfg_channels,
    }


def config_from_diffusers(config: Mapping[str, Any], source: str) -> tuple[dict[str, Any], Conventions]:
    """(`DiT.config`, conventions) of the configuration of a DiTTransformer2DModel or `FastDiT`.

    Missing fields have diffusers' defaults. Raises CheckpointError, in one line that names `source`, for fields
    that are unknown, of another type, or that make another model of it (dropout, affine norms, another activation).
    """
    problems = []
    for key, value in config.items():
        if key.startswith("_") or key in _IGNORED or key in _DEFAULTS:
            continue
        if key in _FIXED:
            if value != _FIXED[key]:
                problems.append(f"{key}={value!r} (a DiT has {_FIXED[key]!r})")
        elif value is not None and value is not False:
            problems.append(f"unknown {key!r}={value!r:.60}")
    values: dict[str, Any] = {}
    for key, (kinds, default) in _DEFAULTS.items():
        value = values[key] = config.get(key, default)
        wrong = not isinstance(value, kinds) or isinstance(value, bool)
        if wrong or (isinstance(value, int) and key not in _OURS and not 0 < value < 1 << 24):
            problems.append(f"{key}={value!r}")
    if not problems:
        channels, out = values["in_channels"], values["out_channels"] or values["in_channels"]
        if out not in (channels, 2 * channels):
            problems.append(f"out_channels={out} for in_channels={channels}")
        if not (0 < values["mlp_ratio"] <= 1024 and 0 <= values["class_dropout_prob"] <= 1):
            problems.append(
                f"mlp_ratio={values['mlp_ratio']}, class_dropout_prob={values['class_dropout_prob']}"
            )
    if problems:
        listed = ", ".join(problem[:120] for problem in problems[:8])
        raise CheckpointError(f"{source} is not the configuration of a DiT in diffusers: {listed}")
    try:
        conventions = Conventions(values["timestep_freq_shift"], values["norm_eps"], values["cfg_channels"])
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return {
        "input_size": [values["sample_size"]] * 2,
        "patch_size": values["patch_size"],
        "in_channels": channels,
        "hidden_size": values["num_attention_heads"] * values["attention_head_dim"],
        "depth": values["num_layers"],
        "num_heads": values["num_attention_heads"],
        "mlp_ratio": values["mlp_ratio"],
        "class_dropout_prob": values["class_dropout_prob"],
        "num_classes": values["num_embeds_ada_norm"],
        "learn_sigma": out == 2 * channels,
    }, conventions  # fmt: skip


def state_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' keys for the reference's; the tensors are those of `state` or views of them.

    The embedders stand in every block. `pos_embed` is left out: diffusers makes it anew.
    """
    converted: dict[str, Tensor] = {}
    depth = 1 + max((int(match[1]) for key in state if (match := _OUR_BLOCK.match(key))), default=-1)
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        if stem in _OUTER:
            converted[f"{_OUTER[stem]}.{leaf}"] = value
        elif stem in _EMBEDDERS:
            for i in range(depth):
                converted[f"transformer_blocks.{i}.{_EMBEDDERS[stem]}.{leaf}"] = value
        elif match := _OUR_BLOCK.match(stem):
            block = f"transformer_blocks.{match[1]}"
            if match[2] == "attn.qkv":
                for name, part in zip(_QKV, value.chunk(3), strict=True):
                    converted[f"{block}.{name}.{leaf}"] = part
            else:
                converted[f"{block}.{_BLOCK[match[2]]}.{leaf}"] = value
        elif key != "pos_embed":
            raise CheckpointError(f"{key} is no tensor of a DiT: nothing in diffusers' layout stands for it")
    return converted


def state_from_diffusers(
    state: Mapping[str, Tensor], config: Mapping[str, Any], source: str
) -> dict[str, Tensor]:
    """The reference's keys for diffusers'; `config` is `DiT.config`.

    What has no place in the reference's layout keeps its name, so that loading it is refused by name. Raises
    CheckpointError where the embedders of two blocks differ: the reference has one for all.
    """
    names = {theirs: ours for ours, theirs in _OUTER.items()}
    in_block = {theirs: ours for ours, theirs in _BLOCK.items()}
    embedders = {theirs: ours for ours, theirs in _EMBEDDERS.items()}
    converted: dict[str, Tensor] = {}
    qkv: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        match = _THEIR_BLOCK.fullmatch(stem)
        if stem in names:
            converted[f"{names[stem]}.{leaf}"] = value
        elif match and match[2] in embedders:
            ours = f"{embedders[match[2]]}.{leaf}"
            first = converted.setdefault(ours, value)
            if first is not value and not (first.shape == value.shape and torch.equal(first, value)):
                raise CheckpointError(
                    f"{source}: {key} differs from another block's: its blocks were trained apart, and a DiT has "
                    "one embedder for all"
                )
        elif match and match[2] in _QKV:
            qkv.setdefault((match[1], leaf), {})[match[2]] = value
        elif match and match[2] in in_block:
            converted[f"blocks.{match[1]}.{in_block[match[2]]}.{leaf}"] = value
        elif key != "pos_embed.pos_embed":
            converted[key] = value
    for (block, leaf), parts in qkv.items():
        if len(parts) == 3 and len({part.shape[1:] for part in parts.values()}) == 1:
            converted[f"blocks.{block}.attn.qkv.{leaf}"] = torch.cat([parts[name] for name in _QKV])
        else:
            converted.update({f"transformer_blocks.{block}.{n}.{leaf}": part for n, part in parts.items()})
    converted["pos_embed"] = _positions(converted, config, source)
    return converted


def _positions(state: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> Tensor:
    """(1, T, D) float32, numbered 0, 1, 2, ... on both axes, as the reference and diffusers make them."""
    rows, columns = (size // config["patch_size"] for size in config["input_size"])
    width, bias = config["hidden_size"], state.get("x_embedder.proj.bias")
    # Before anything of that size is made: the file must have weights of that width, and few enough tokens.
    if (bias is not None and bias.shape != (width,)) or not 0 < rows * columns * width <= _MOST_POSITIONS:
        found = None if bias is None else tuple(bias.shape)
        raise CheckpointError(
            f"{source} says {rows}x{columns} tokens of width {width}, its pos_embed.proj.bias is {found}"
        )
    try:
        table = get_2d_sincos_pos_embed(width, (rows, columns))
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return torch.from_numpy(table).float().unsqueeze(0)
