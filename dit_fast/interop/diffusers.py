"""The reference's state dict and configuration <-> those of diffusers' `DiTTransformer2DModel`, both directions.

Only names and shapes are changed here, so that there and back again is the same bits. diffusers keeps q, k and v
apart, stores the timestep and label embedders once in every block, and makes the positions anew. Nothing here
needs diffusers itself.
"""

import json
import math
import re
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
from dit_fast.model.embedders import TimestepEmbedder
from dit_fast.model.folder import load_weights
from dit_fast.model.positions import get_2d_sincos_pos_embed
from dit_fast.utils.files import read_object, write_atomically


@dataclass(frozen=True)
class Conventions:
    """What two DiTs of the same weights may compute differently; the defaults are the reference's.

    timestep_freq_shift  the sinusoids' frequencies are 10000^(-i / (128 - shift)); diffusers has 1
    norm2_eps            epsilon of the layer norm before the MLP; diffusers has 1e-5
    cfg_channels         how many channels of the noise guidance acts on, None for all, as diffusers' pipeline does

    Raises ConfigError for values that no model can have.
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
        """Whether `forward` is the reference's; guidance apart, which is another call."""
        return (self.timestep_freq_shift, self.norm2_eps) == (0, 1e-6)


REFERENCE = Conventions()
DIFFUSERS = Conventions(timestep_freq_shift=1, norm2_eps=1e-5, cfg_channels=None)


class ShiftedTimestepEmbedder(TimestepEmbedder):
    """`TimestepEmbedder` with frequencies 10000^(-i / (half - shift)), i = 0, ..., half - 1.

    A shift of 1 makes the last frequency 1 / 10000 exactly, as in Ho et al. 2020 and in diffusers; with 0 it is the
    reference's embedder.
    """

    def __init__(self, hidden_size: int, freq_shift: float):
        super().__init__(hidden_size)
        self.freq_shift = freq_shift

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_embedding_size // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device)
        freqs = torch.exp(-math.log(10000) * exponents / (half - self.freq_shift))
        args = t[:, None].float() * freqs[None]
        embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
        return self.mlp(embedding.to(cast(nn.Linear, self.mlp[0]).weight.dtype))


class ConvertedDiT(DiT):
    """A `DiT` that computes with the `conventions` of the implementation that its weights come from.

    The other arguments, the state dict and the methods are those of `DiT`. `forward_with_cfg` guides the channels
    that the conventions say, unless told otherwise. Saved, it is a folder in diffusers' layout, which `load_model`
    and diffusers read: the reference's `config.json` cannot tell the conventions.
    """

    def __init__(self, *args: Any, conventions: Conventions = REFERENCE, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conventions = conventions
        embedder = ShiftedTimestepEmbedder(self.pos_embed.shape[-1], conventions.timestep_freq_shift)
        embedder.mlp = self.t_embedder.mlp
        self.t_embedder = embedder
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
        """`DiT.forward_with_cfg`; `cfg_channels` is the conventions' when it is not given."""
        channels = self.conventions.cfg_channels if cfg_channels is ... else cfg_channels
        return super().forward_with_cfg(x, t, y, cfg_scale, cast(int | None, channels))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors` to `folder`, as diffusers would.

        Raises ConfigError for conventions or sizes that diffusers' files cannot tell.
        """
        write_folder(self, folder)


def conventions_of(model: DiT) -> Conventions:
    """The conventions of a model: its own, or the reference's."""
    return model.conventions if isinstance(model, ConvertedDiT) else REFERENCE


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


def diffusers_config_of(path: Path) -> dict[str, Any] | None:
    """The `config.json` at `path` when it is of a DiT that diffusers or `FastDiT` wrote, else None."""
    if not path.exists():
        return None
    config = read_object(path, CheckpointError)
    return config if config.get("_class_name") in CLASS_NAMES else None


def transformer_folder(folder: Path) -> Path:
    """The model's folder within a pipeline's, or `folder` itself."""
    return folder / "transformer" if (folder / "model_index.json").is_file() else folder


def read_folder(folder: Path, config: Mapping[str, Any]) -> tuple[WeightFile, dict[str, Any], Conventions]:
    """(weights under the reference's keys, `DiT.config`, conventions) of a folder with this `config.json`.

    Raises CheckpointError for files that are missing, unsafe or no DiT's.
    """
    source = str(folder / "config.json")
    ours, conventions = config_from_diffusers(config, source)
    path, state, notes = read_diffusers_weights(folder)
    if config["_class_name"] == ADAPTER:
        state = {key.removeprefix("dit."): value for key, value in state.items()}
    else:
        state = state_from_diffusers(state, ours, str(path))
    if not conventions.same_outputs_as_reference:
        notes = (
            *notes,
            f"{folder}: computed as diffusers does: timestep_freq_shift {conventions.timestep_freq_shift}, "
            f"norm2_eps {conventions.norm2_eps}",
        )
    return WeightFile(path, state, notes=notes), ours, conventions


def write_folder(model: DiT, folder: str | Path) -> None:
    """Write `model` as diffusers' `DiTTransformer2DModel.save_pretrained` would, made when missing.

    Raises ConfigError for what diffusers' files cannot tell: timestep frequencies other than diffusers' own, a grid
    that is not square, positions that are not its own, another MLP ratio than 4, no null class.
    """
    conventions = conventions_of(model)
    if conventions.timestep_freq_shift != 1:
        raise ConfigError(
            f"diffusers computes timestep frequencies with shift 1, this model with "
            f"{conventions.timestep_freq_shift}, and its files cannot say so: save FastDiT.from_dit(model), or give "
            "conventions=DIFFUSERS to export the weights as they are"
        )
    config = diffusers_config(model.config, conventions)
    check_positions(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # clone: q, k and v are views of one tensor and the embedders stand in every block.
    tensors = {
        key: value.detach().cpu().clone() for key, value in state_to_diffusers(model.state_dict()).items()
    }
    write_atomically(
        folder / f"{DIFFUSERS_WEIGHTS}.safetensors",
        lambda path: save_file(tensors, path, metadata={"format": "pt"}),
    )
    written = json.dumps({"_class_name": TRANSFORMER, "_dit_fast_version": __version__, **config}, indent=2)
    write_atomically(folder / "config.json", lambda path: path.write_text(written + "\n"))


def check_positions(model: DiT) -> None:
    """ConfigError when the model's positions are not the plain grid 0, 1, 2, ..., the only one diffusers makes."""
    plain = state_from_diffusers({}, model.config, "the model")["pos_embed"]
    own = model.pos_embed.detach().float().cpu()
    difference = (own - plain).abs().max().item() if own.shape == plain.shape else float("inf")
    if not difference < 1e-2:  # bfloat16 keeps 8 bits of a sine
        raise ConfigError(
            f"diffusers numbers positions 0, 1, 2, ...; this model's differ by up to {difference:.3g} (interpolated "
            "or trained): save FastDiT.from_dit(model)"
        )


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
