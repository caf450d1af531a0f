"""Conversion between `DiT` and diffusers' `DiTTransformer2DModel`: state dicts, configurations, folders, live models.

Only names and shapes change, so that a round trip is exact. diffusers has separate q, k and v, stores the timestep and
label embedders in every block, and recomputes the positions. Only `to_diffusers` needs the diffusers package.
"""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dit_fast import __version__
from dit_fast.checkpoint.weight_file import DIFFUSERS_WEIGHTS, WeightFile, read_diffusers_weights
from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError
from dit_fast.model.config import beyond_the_paper
from dit_fast.model.dit import DiT
from dit_fast.model.folder import load_weights, on_disk
from dit_fast.model.positions import get_2d_sincos_pos_embed
from dit_fast.utils.files import read_object, write_atomically


@dataclass(frozen=True)
class Conventions:
    """Differences in computation between implementations of DiT with the same weights; the reference's by default.

    Args:
        timestep_freq_shift: The frequencies of the timestep embedding are 10000^(-i / (128 - shift)); 1 in diffusers.
        norm2_eps: Epsilon of the layer norm before the MLP; 1e-5 in diffusers.
        cfg_channels: Number of channels that are guided; None for all, as in diffusers' pipeline.

    Raises:
        ConfigError: A value is out of range.
    """

    timestep_freq_shift: float = 0
    norm2_eps: float = 1e-6
    cfg_channels: int | None = 3

    def __post_init__(self) -> None:
        if not 0 <= self.timestep_freq_shift <= 1:
            raise ConfigError(
                f"timestep_freq_shift={self.timestep_freq_shift!r}: 0 (reference) to 1 (diffusers)"
            )
        if not 0 < self.norm2_eps < 1:
            raise ConfigError(f"norm2_eps={self.norm2_eps!r}: a small positive number, 1e-6 or 1e-5")
        if self.cfg_channels is not None and self.cfg_channels < 1:
            raise ConfigError(f"cfg_channels={self.cfg_channels!r}: at least 1, or None for all")

    @property
    def same_outputs_as_reference(self) -> bool:
        """Whether `forward` computes what the reference computes; guidance is not part of it."""
        return (self.timestep_freq_shift, self.norm2_eps) == (0, 1e-6)


REFERENCE = Conventions()
DIFFUSERS = Conventions(timestep_freq_shift=1, norm2_eps=1e-5, cfg_channels=None)


class ConvertedDiT(DiT):
    """A `DiT` with the `conventions` of the implementation from which its weights come.

    The other arguments, the state dict and the methods are those of `DiT`. By default, `forward_with_cfg` guides the
    channels of the conventions. It is saved in the layout of diffusers, which `load_model` and diffusers read, since
    the `config.json` of a `DiT` does not store conventions.

    Args:
        args: Arguments of `DiT`.
        conventions: The conventions.
        kwargs: Arguments of `DiT`.
    """

    def __init__(self, *args: Any, conventions: Conventions = REFERENCE, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conventions = conventions
        self.t_embedder.freq_shift = conventions.timestep_freq_shift
        for block in self.blocks:
            cast(nn.LayerNorm, block.norm2).eps = conventions.norm2_eps

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float | Tensor,
        cfg_channels: int | EllipsisType | None = ...,
    ) -> Tensor:
        """`DiT.forward_with_cfg`; `cfg_channels` defaults to that of the conventions."""
        channels = self.conventions.cfg_channels if cfg_channels is ... else cfg_channels
        return super().forward_with_cfg(x, t, y, cfg_scale, cast(int | None, channels))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors` to `folder`, as diffusers does.

        Raises:
            ConfigError: The files of diffusers cannot represent the conventions or sizes.
        """
        write_folder(self, folder)


def conventions_of(model: DiT) -> Conventions:
    """Conventions of a model; those of the reference for a plain `DiT`."""
    return model.conventions if isinstance(model, ConvertedDiT) else REFERENCE


TRANSFORMER = "DiTTransformer2DModel"
ADAPTER = "FastDiT"
# The first releases wrote the DiT as a Transformer2DModel with norm_type "ada_norm_zero".
NATIVE_NAMES = (TRANSFORMER, "Transformer2DModel")
CLASS_NAMES = (*NATIVE_NAMES, ADAPTER)

PIPELINE_NULL_CLASS = 1000
"""Label that diffusers' pipeline passes for the unconditional half, whatever the number of classes."""

# Names of the reference -> names of diffusers: outside of the blocks, embedders, and within a block.
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
_DIFFUSERS_BLOCK = re.compile(r"transformer_blocks\.(\d{1,6})\.(.+)")
_REFERENCE_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

# Upper bound on T * D of the position table; XL on latents of 256 x 256 has 19 million.
_MOST_POSITIONS = 1 << 25

# diffusers drops labels with this probability in training, whatever its configuration.
_LABEL_DROPOUT = 0.1

_INT, _NUMBER = (int,), (int, float)
_DEFAULTS: dict[str, tuple[tuple[type, ...], Any]] = {
    "num_attention_heads": (_INT, 16), "attention_head_dim": (_INT, 72), "in_channels": (_INT, 4),
    "out_channels": ((int, type(None)), None), "num_layers": (_INT, 28), "sample_size": (_INT, 32),
    "patch_size": (_INT, 2), "num_embeds_ada_norm": (_INT, 1000), "norm_eps": (_NUMBER, 1e-5),
    "mlp_ratio": (_NUMBER, 4.0), "class_dropout_prob": (_NUMBER, _LABEL_DROPOUT),
    "timestep_freq_shift": (_NUMBER, 1), "cfg_channels": ((int, type(None)), None),
}  # fmt: skip
# Fields that only FastDiT has; diffusers ignores them in its files.
_ADAPTER_FIELDS = ("mlp_ratio", "class_dropout_prob", "timestep_freq_shift", "cfg_channels")
# Fields that a DiT has with these values only.
_FIXED = {
    "dropout": 0.0, "attention_bias": True, "activation_fn": "gelu-approximate", "upcast_attention": False,
    "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
}  # fmt: skip
# Fields of other Transformer2DModels, without effect on a DiT.
_IGNORED = ("norm_num_groups", "attention_type", "interpolation_scale")


def diffusers_config(config: Mapping[str, Any], conventions: Conventions) -> dict[str, Any]:
    """Convert `DiT.config` to arguments of diffusers' DiTTransformer2DModel.

    Args:
        config: `DiT.config`.
        conventions: Conventions of the model; diffusers has no argument for `timestep_freq_shift`, see `to_diffusers`.

    Returns:
        The arguments.

    Raises:
        ConfigError: diffusers cannot represent the model: its grid is not square, its MLP ratio is not 4, or it has no
            null class.
    """
    arguments = adapter_config(config, conventions)
    problems = []
    if int(config["mlp_ratio"] * config["hidden_size"]) != 4 * config["hidden_size"]:
        problems.append(f"mlp_ratio {config['mlp_ratio']} (4 wanted)")
    if not config["class_dropout_prob"]:
        problems.append("no null class (class_dropout_prob above 0 wanted)")
    if problems:
        raise ConfigError(f"{TRANSFORMER} cannot be this model: {', '.join(problems)}")
    if (classes := config["num_classes"]) != PIPELINE_NULL_CLASS:
        warnings.warn(
            f"diffusers' DiTPipeline takes label {PIPELINE_NULL_CLASS} for the null class, a {TRANSFORMER} of "
            f"{classes} classes has label {classes}: call it with guidance_scale=1, or use FastDiT.from_dit(model)",
            stacklevel=3,
        )
    return {key: value for key, value in arguments.items() if key not in _ADAPTER_FIELDS}


def adapter_config(config: Mapping[str, Any], conventions: Conventions) -> dict[str, Any]:
    """Convert `DiT.config` to arguments of `FastDiT`: those of diffusers, and four that it lacks.

    Args:
        config: `DiT.config`.
        conventions: Conventions of the model.

    Returns:
        The arguments.

    Raises:
        ConfigError: The grid is not square, or the model has options that the paper's DiT does not have.
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
    """Convert the configuration of a DiTTransformer2DModel or `FastDiT`.

    Args:
        config: The configuration; missing fields have the defaults of diffusers.
        source: Name of the file, for messages.

    Returns:
        `DiT.config` and the conventions.

    Raises:
        CheckpointError: A field is unknown, has a wrong type, or describes a model that a DiT is not (dropout, affine
            norms, another activation).
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
        if wrong or (isinstance(value, int) and key not in _ADAPTER_FIELDS and not 0 < value < 1 << 24):
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
    """Convert a state dict of the reference to the keys of diffusers.

    Args:
        state: State dict of a `DiT`.

    Returns:
        The tensors of `state`, or views of them. The embedders appear in every block. `pos_embed` is omitted, since
        diffusers recomputes it.

    Raises:
        CheckpointError: A tensor has no counterpart in diffusers.
    """
    converted: dict[str, Tensor] = {}
    # diffusers has a copy of the embedders in every block.
    depth = 1 + max((int(match[1]) for key in state if (match := _REFERENCE_BLOCK.match(key))), default=-1)
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        if stem in _OUTER:
            converted[f"{_OUTER[stem]}.{leaf}"] = value
        elif stem in _EMBEDDERS:
            for i in range(depth):
                converted[f"transformer_blocks.{i}.{_EMBEDDERS[stem]}.{leaf}"] = value
        elif match := _REFERENCE_BLOCK.match(stem):
            block = f"transformer_blocks.{match[1]}"
            if match[2] == "attn.qkv":
                # qkv stacks the output rows of q, k and v.
                for name, part in zip(_QKV, value.chunk(3), strict=True):
                    converted[f"{block}.{name}.{leaf}"] = part
            else:
                converted[f"{block}.{_BLOCK[match[2]]}.{leaf}"] = value
        elif key != "pos_embed":
            raise CheckpointError(
                f"{key} is not a tensor of a DiT: it has no counterpart in the layout of diffusers"
            )
    return converted


def state_from_diffusers(
    state: Mapping[str, Tensor], config: Mapping[str, Any], source: str
) -> dict[str, Tensor]:
    """Convert a state dict of diffusers to the keys of the reference.

    Args:
        state: State dict of a DiTTransformer2DModel.
        config: `DiT.config`.
        source: Name of the file, for messages.

    Returns:
        The tensors, with `pos_embed`. Tensors without a counterpart keep their names, so that loading them fails with
        these names.

    Raises:
        CheckpointError: The embedders of two blocks differ, where the reference has one embedder for all blocks.
    """
    names = {new: old for old, new in _OUTER.items()}
    in_block = {new: old for old, new in _BLOCK.items()}
    embedders = {new: old for old, new in _EMBEDDERS.items()}
    converted: dict[str, Tensor] = {}
    qkv: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        match = _DIFFUSERS_BLOCK.fullmatch(stem)
        if stem in names:
            converted[f"{names[stem]}.{leaf}"] = value
        elif match and match[2] in embedders:
            first = converted.setdefault(f"{embedders[match[2]]}.{leaf}", value)
            if first is not value and not (first.shape == value.shape and torch.equal(first, value)):
                raise CheckpointError(
                    f"{source}: {key} differs from another block's: its blocks were trained with separate "
                    "embedders, and a DiT has one for all"
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
    """Position table float32 (1, T, D) for positions 0, 1, 2, ... on both axes, as in the reference and diffusers."""
    rows, columns = (size // config["patch_size"] for size in config["input_size"])
    width, bias = config["hidden_size"], state.get("x_embedder.proj.bias")
    # Checked before memory is allocated: the file must have weights of that width, and not too many tokens.
    if (bias is not None and bias.shape != (width,)) or not 0 < rows * columns * width <= _MOST_POSITIONS:
        found = None if bias is None else tuple(bias.shape)
        raise CheckpointError(
            f"{source} describes {rows}x{columns} tokens of width {width}, its pos_embed.proj.bias is {found}"
        )
    try:
        table = get_2d_sincos_pos_embed(width, (rows, columns))
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return torch.from_numpy(table).float().unsqueeze(0)


def diffusers_config_of(path: Path) -> dict[str, Any] | None:
    """The `config.json` at `path` where it describes a DiT of diffusers or a `FastDiT`, else None."""
    if not path.exists():
        return None
    config = read_object(path, CheckpointError)
    return config if config.get("_class_name") in CLASS_NAMES else None


def transformer_folder(folder: Path) -> Path:
    """The folder of the transformer within a pipeline, or `folder` itself."""
    return folder / "transformer" if (folder / "model_index.json").is_file() else folder


def read_folder(folder: Path, config: Mapping[str, Any]) -> tuple[WeightFile, dict[str, Any], Conventions]:
    """Read a folder of diffusers or `FastDiT`.

    Args:
        folder: The folder.
        config: Its `config.json`.

    Returns:
        The weights under the keys of the reference, `DiT.config`, and the conventions.

    Raises:
        CheckpointError: Files are missing, unsafe, or do not describe a DiT.
    """
    source = str(folder / "config.json")
    dit_config, conventions = config_from_diffusers(config, source)
    path, state, notes = read_diffusers_weights(folder)
    if config["_class_name"] == ADAPTER:
        state = {key.removeprefix("dit."): value for key, value in state.items()}
    else:
        state = state_from_diffusers(state, dit_config, str(path))
    if not conventions.same_outputs_as_reference:
        notes = (
            *notes,
            f"{folder}: computed as diffusers does: timestep_freq_shift {conventions.timestep_freq_shift}, "
            f"norm2_eps {conventions.norm2_eps}",
        )
    return WeightFile(path, state, notes=notes), dit_config, conventions


def write_folder(model: DiT, folder: str | Path) -> None:
    """Write `model` as diffusers' `DiTTransformer2DModel.save_pretrained` does.

    Args:
        model: The model.
        folder: The folder; created where missing.

    Raises:
        ConfigError: The files of diffusers cannot represent the model: timestep frequencies, positions or an MLP ratio
            other than those of diffusers, a grid that is not square, or no null class.
    """
    conventions = conventions_of(model)
    if conventions.timestep_freq_shift != 1:
        raise ConfigError(
            f"diffusers computes timestep frequencies with shift 1, this model with "
            f"{conventions.timestep_freq_shift}, and its files cannot store that: save FastDiT.from_dit(model), or "
            "give conventions=DIFFUSERS to export the weights as they are"
        )
    config = diffusers_config(model.config, conventions)
    check_positions(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, since safetensors refuses shared memory: q, k and v are views, and the embedders appear in every block.
    tensors = {
        key: value.detach().cpu().clone() for key, value in state_to_diffusers(model.plain_state()).items()
    }
    write_atomically(
        folder / f"{DIFFUSERS_WEIGHTS}.safetensors",
        lambda path: save_file(tensors, path, metadata={"format": "pt"}),
    )
    written = json.dumps({"_class_name": TRANSFORMER, "_dit_fast_version": __version__, **config}, indent=2)
    write_atomically(folder / "config.json", lambda path: path.write_text(written + "\n"))


def check_positions(model: DiT) -> None:
    """Raise ConfigError where the positions are not those of the grid 0, 1, 2, ..., which diffusers computes."""
    plain = state_from_diffusers({}, model.config, "the model")["pos_embed"]
    own = model.pos_embed.detach().float().cpu()
    difference = (own - plain).abs().max().item() if own.shape == plain.shape else float("inf")
    if not difference < 1e-2:  # bfloat16 keeps 8 bits of a sine
        raise ConfigError(
            f"diffusers numbers positions 0, 1, 2, ...; this model's differ by up to {difference:.3g} (interpolated "
            "or trained): save FastDiT.from_dit(model)"
        )


def to_diffusers(model: DiT) -> Any:
    """Convert a model to diffusers' `DiTTransformer2DModel`.

    The `Conventions` are kept: norm_eps in its configuration, the timestep frequencies as `downscale_freq_shift` of its
    embedders. diffusers does not save the latter; to save a model with the frequencies of the reference, save
    `FastDiT.from_dit(model)`.

    Args:
        model: The model.

    Returns:
        A model with copies of the weights and the same outputs, on the same device, in eval mode.

    Raises:
        MissingExtraError: diffusers is not installed.
        ConfigError: diffusers cannot represent the model.
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
    converted: Any = DiTTransformer2DModel(**diffusers_config(model.config, conventions))
    converted.load_state_dict(state_to_diffusers(model.plain_state()))
    for block in converted.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = conventions.timestep_freq_shift
    # diffusers' `to` warns about every explicit dtype, even the present one.
    dtype = {} if parameter.dtype == torch.float32 else {"dtype": parameter.dtype}
    return converted.to(parameter.device, **dtype).eval()


def from_diffusers(model: Any, *, cfg_channels: int | None = None) -> ConvertedDiT:
    """Convert diffusers' `DiTTransformer2DModel`; for a folder use `load_model`, which does not need diffusers.

    Args:
        model: The model.
        cfg_channels: Channels that `forward_with_cfg` guides; None for all, as in diffusers' pipeline.

    Returns:
        A model with copies of the weights and the same outputs, on the same device, in the same dtype, in eval mode.

    Raises:
        ConfigError: The model is of another class, or its weights are offloaded, quantized or stored in 8 bits.
        CheckpointError: Its blocks differ where a DiT has one value for all.
    """
    name = type(model).__name__
    if name != "DiTTransformer2DModel":
        raise ConfigError(f"from_diffusers takes a DiTTransformer2DModel, this is a {name}")
    config, _ = config_from_diffusers(dict(model.config), name)
    conventions = _live_conventions(model, cfg_channels)
    own = model.state_dict()
    for key, value in own.items():
        owner = model.get_submodule(key.rpartition(".")[0])
        kind = "offloaded" if value.is_meta or on_disk(owner) else None
        kind = type(value).__name__ if type(value) is not Tensor else kind
        if kind or value.itemsize == 1:
            raise ConfigError(
                f"{name}: {key} is {kind or value.dtype}: convert the model before it is offloaded, cast or quantized"
            )
    state = state_from_diffusers(own, config, name)
    weight = state["x_embedder.proj.weight"]
    state["pos_embed"] = state["pos_embed"].to(weight)
    with torch.device("meta"):
        converted = ConvertedDiT(**config, conventions=conventions)
    load_weights(converted, {key: value.detach().clone() for key, value in state.items()}, name, assign=True)
    return converted.eval()


def save_diffusers(model: DiT, folder: str | Path, *, conventions: Conventions | None = None) -> None:
    """Write a folder for `DiTTransformer2DModel.from_pretrained(folder)`.

    Args:
        model: The model.
        folder: The folder; created where missing.
        conventions: None keeps the outputs of the model, which must then have the timestep frequencies of diffusers.
            `DIFFUSERS` exports weights of the reference as diffusers' own conversion does: the outputs change slightly.

    Raises:
        ConfigError: The outputs would change and `conventions` is None, or diffusers cannot represent the model.
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
    """Conventions read from the modules, which may have been changed since they were built."""
    found = set()
    for block in model.transformer_blocks:
        time_proj = block.norm1.emb.time_proj
        if not time_proj.flip_sin_to_cos or time_proj.scale != 1:
            raise CheckpointError(
                f"{type(model).__name__}: timesteps embedded as [sin, cos] or scaled are not those of a DiT"
            )
        found.add((time_proj.downscale_freq_shift, block.norm1.norm.eps, block.norm3.eps))
    if len(found) != 1 or (only := next(iter(found)))[1] != 1e-6:
        raise CheckpointError(
            f"{type(model).__name__}: blocks with (timestep_freq_shift, eps of norm1, eps of norm3) {sorted(found)}; "
            "a DiT has one for all, and 1e-6 in its first norm"
        )
    return Conventions(only[0], only[2], cfg_channels)
