"""`DiT`, the Diffusion Transformer (Peebles & Xie 2023): embedders, blocks, final layer, and what is done with them.

`N` batch, `C` channels, `T` tokens, `D` width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from dit_fast import __version__, kernels
from dit_fast.blocks import Stream
from dit_fast.conditioning import ADAPTIVE, BLOCKS
from dit_fast.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder, as_pair
from dit_fast.errors import ConfigError
from dit_fast.layers import Layout, matrix_size
from dit_fast.model_files import load_weights, read_model, write_model
from dit_fast.options import OPTIONS, PAPER, one_of
from dit_fast.positions import check_rotary, resized_table, rotary_angles, sincos_table
from dit_fast.switches import Switches


class DiT(Switches):
    """Diffusion model with a transformer backbone, class-conditional or unconditional.

    input_size: height and width of the latent (or image), one number or a pair; patch_size: side of a patch;
    in_channels: channels of the latent; hidden_size, depth, num_heads, mlp_ratio: the transformer;
    class_dropout_prob: share of labels dropped in training, 0 for a model without a null class;
    num_classes, 0 for an unconditional model; learn_sigma: predict the variance beside the noise.
    conditioning, how blocks learn of timestep and class: "adaln_zero", "adaln", "cross_attention" or "in_context";
    positions: "sincos", "learned" or "rope"; norm: "layernorm" or "rmsnorm"; mlp: "gelu" or "swiglu"; qk_norm: norms
    of each head's queries and keys. The paper's are the defaults; docs/models.md says what the others are.
    kernels: "auto" (Triton on CUDA, PyTorch elsewhere), "triton" or "reference"; attention: "auto", "triton", "sdpa"
    or "flash"; mlp_epilogue, who applies the GELU: "auto" (as the device's tuned table says), "separate", "triton" or
    "cublaslt"; recompute, in the backward pass: "none", "cheap" (norm outputs and GELU, where the kernels run: a third
    less memory for no matrix product) or "blocks" (every block from its input). No kernel is made for RMSNorm, SwiGLU,
    rotation and qk_norm: with any `kernels` they are PyTorch's operations (for Inductor to fuse) between those that
    have one, and "cheap" keeps their outputs. Raises ConfigError for what does not fit together.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        *,
        conditioning: str = "adaln_zero",
        positions: str = "sincos",
        norm: str = "layernorm",
        mlp: str = "gelu",
        qk_norm: bool = False,
        kernels: str = "auto",
        attention: str = "auto",
        mlp_epilogue: str = "auto",
        recompute: str = "none",
    ):
        super().__init__()
        self.learn_sigma = learn_sigma
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.options = dict(zip(OPTIONS, (conditioning, positions, norm, mlp, qk_norm), strict=True))
        for name, value in self.options.items():
            one_of(name, value, OPTIONS[name])
        self.conditioning, self.positions = conditioning, positions
        make_block, make_final = BLOCKS[conditioning]
        self._sizes = {"hidden_size": hidden_size, "depth": depth, "mlp_ratio": mlp_ratio}
        try:
            self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, kernels=kernels)
            self.t_embedder = TimestepEmbedder(hidden_size)
            self.y_embedder = (
                LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if num_classes else None
            )
            # A parameter so that it is saved; frozen unless it is learned. Rotary positions add nothing: zeros.
            self.pos_embed = nn.Parameter(
                torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=positions == "learned"
            )
            trunk: dict[str, Any] = {"norm": norm, "mlp": mlp, "qk_norm": qk_norm, "kernels": kernels}
            self.blocks = nn.ModuleList(
                make_block(hidden_size, num_heads, mlp_ratio, **trunk) for _ in range(depth)
            )
            self.final_layer = make_final(
                hidden_size, patch_size, self.out_channels, norm=norm, kernels=kernels
            )
            self.attention, self.mlp_epilogue, self.recompute = attention, mlp_epilogue, recompute
            if positions == "rope":
                check_rotary(self.head_dim)
            self.initialize_weights()
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def num_classes(self) -> int:
        """Classes, without the null class; 0 for an unconditional model."""
        return 0 if self.y_embedder is None else self.y_embedder.num_classes

    @property
    def null_class(self) -> int | None:
        """The label that stands for no class, which guidance needs; None for a model without one."""
        return None if self.y_embedder is None or not self.y_embedder.dropout_prob else self.num_classes

    @property
    def condition_tokens(self) -> int:
        """Tokens that timestep and class become, where `conditioning` takes them as tokens."""
        return 1 if self.y_embedder is None else 2

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON values, without those that say how it is computed.

        An option is there where it is not the paper's, which every reader of DiT configurations takes for granted.
        """
        return {
            "input_size": list(self.x_embedder.img_size),
            "patch_size": self.patch_size,
            "in_channels": self.in_channels,
            "hidden_size": self._sizes["hidden_size"],
            "depth": self._sizes["depth"],
            "num_heads": self.num_heads,
            "mlp_ratio": self._sizes["mlp_ratio"],
            "class_dropout_prob": 0.0 if self.y_embedder is None else self.y_embedder.dropout_prob,
            "num_classes": self.num_classes,
            "learn_sigma": self.learn_sigma,
            **{name: value for name, value in self.options.items() if value != PAPER[name]},
        }

    def initialize_weights(self) -> None:
        """The paper's initialisation, drawing random numbers in the reference's order."""

        def xavier(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        self.apply(xavier)
        if self.positions == "sincos":
            self._set_positions(self._table(self.x_embedder.grid_size))

        # The patch projection is initialised like the linear layer that it is.
        weight = self.x_embedder.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))

        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02)

        # A zero projection makes the output zero; zero gates make every block the identity (adaLN-Zero).
        zero = [self.final_layer.linear]
        if self.conditioning == "adaln_zero":
            zero += [cast(nn.Sequential, layer)[-1] for layer in self.modulation_layers()]
        for parameter in nn.ModuleList(zero).parameters():
            nn.init.zeros_(parameter)

        if self.positions == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)

    def _set_positions(self, table: Tensor) -> None:
        self.pos_embed = nn.Parameter(table.detach().to(self.pos_embed), self.pos_embed.requires_grad)

    def _table(self, grid: tuple[int, int], steps: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """What is added to the tokens of a grid, (1, T, D), made anew: sines, zeros, or the learned table resized."""
        own = self.pos_embed
        if self.positions == "learned":
            return resized_table(own, self.x_embedder.grid_size, grid)
        if self.positions == "rope":
            return own.new_zeros(1, grid[0] * grid[1], own.shape[-1])
        return sincos_table(grid, own.shape[-1], steps, own.device).to(own.dtype)

    def regrid(self, input_size: int | tuple[int, int], mode: str | None = None) -> "DiT":
        """Take inputs of this size for the model's own from now on; returns the model.

        Replaces the position table, in place of the (1, T, D) parameter: "extend" numbers the new grid 0, 1, 2, ...
        as a model built for that size does; "interpolate" spreads the coordinates of the present grid over the
        new one, or resizes a learned table. None: "extend", where the table is learned "interpolate". Raises
        ConfigError for a size that is not a multiple of the patch, or a mode that the positions do not have.
        """
        modes = {"sincos": ("extend", "interpolate"), "learned": ("interpolate",), "rope": ("extend",)}
        if mode is not None and mode not in modes[self.positions]:
            known = " or ".join(map(repr, modes[self.positions]))
            raise ConfigError(f"regrid mode {mode!r}: choose {known} where positions={self.positions!r}")
        size = as_pair(input_size)
        try:
            rows, columns = self.x_embedder.grid_of(size)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        old_rows, old_columns = self.x_embedder.grid_size
        steps = (old_rows / rows, old_columns / columns) if mode == "interpolate" else (1.0, 1.0)
        self._set_positions(self._table((rows, columns), steps))
        self.x_embedder.set_img_size(size)
        return self

    def unpatchify(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens (N, T, P * P * C) of a grid of (rows, columns) to images (N, C, H, W).

        Without `grid` it is the model's own; a T that is not the model's must then be a square.
        """
        rows, columns = self.x_embedder.grid_size if grid is None else grid
        if x.shape[1] != rows * columns:
            rows = columns = int(x.shape[1] ** 0.5)
            if rows * columns != x.shape[1]:
                raise ValueError(
                    f"{x.shape[1]} tokens are no square and not the model's {self.x_embedder.grid_size} grid"
                )
        return kernels.unpatchify(x, self.patch_size, rows, columns, kernels=self.kernels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Noise (and variance) predicted for noisy latents.

        x (N, C, H, W) of any size that the patch divides; t (N,) timesteps, int or fractional; y (N,) class labels,
        not read by an unconditional model -> (N, out_channels, H, W). Another size than the model's own has its
        positions made as `regrid` does. In training mode a share `class_dropout_prob` of the labels becomes the null
        class.
        """
        c = self.condition(self.t_embedder(t), self.embed_labels(y, self.training))
        return self._leave(self._through(self._enter(x, c), c), self.x_embedder.grid_of(x.shape[-2:]))

    def forward_mixed(self, images: Sequence[Tensor], t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """`forward` of N images of any sizes in one batch, each (C, H, W): N answers (out_channels, H, W).

        Their tokens, padded to the longest image's, are one batch in which no token attends to padding, so that an
        answer depends on no other image (NaViT, Dehghani et al. 2023, with one image to a row).
        """
        c = self.condition(self.t_embedder(t), self.embed_labels(y, self.training))
        parts = [self._embed(image[None]) for image in images]
        tokens = pad_sequence([tokens[0] for tokens, _ in parts], batch_first=True)
        turned = [angles for _, angles in parts if angles is not None]
        angles = pad_sequence(turned, batch_first=True) if turned else None
        there = [tokens.new_ones(own.shape[1], dtype=torch.bool) for own, _ in parts]
        out = self._through(self._stream(tokens, c, angles, pad_sequence(there, batch_first=True)), c)
        grids = [self.x_embedder.grid_of(image.shape[-2:]) for image in images]
        return [self._leave(row[None], grid)[0] for row, grid in zip(out, grids, strict=True)]

    def embed_labels(self, y: Tensor | None, train: bool = False) -> Tensor | None:
        """Embedded labels (N, D), some dropped where `train`; None for an unconditional model."""
        if self.y_embedder is None:
            return None
        if y is None:
            raise ValueError(
                f"y is None: the model has {self.num_classes} classes, give a label for each image"
            )
        return self.y_embedder(y, train)

    def condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        """What blocks are told, of embedded timesteps and labels (N, D): their sum, or each as a token (N, S, D)."""
        if self.conditioning in ADAPTIVE:
            return t if y is None else t + y
        return torch.stack([t] if y is None else [t.to(y.dtype), y], dim=1)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens of images (N, T, D), and their rotary angles (T, K / 2) where positions are so."""
        grid = self.x_embedder.grid_of(x.shape[-2:])
        own = grid == self.x_embedder.grid_size
        tokens = self.x_embedder(x, self.pos_embed if own else self._table(grid))
        if self.positions != "rope":
            return tokens, None
        return tokens, rotary_angles(grid, self.head_dim, x.device)

    def _enter(self, x: Tensor, c: Tensor | None) -> Stream:
        tokens, angles = self._embed(x)
        return self._stream(tokens, c, None if angles is None else angles[None])

    def _stream(
        self, tokens: Tensor, c: Tensor | None, angles: Tensor | None, present: Tensor | None = None
    ) -> Stream:
        """Tokens (N, T, D) and after them, in context, those of the condition, which have no place; with the layout of
        all. angles (N or 1, T, K / 2); present (N, T), False for padding.
        """
        if self.conditioning == "in_context":
            c = cast(Tensor, c)
            tokens = torch.cat([tokens, c.to(tokens.dtype)], dim=1)
            angles = None if angles is None else nn.functional.pad(angles, (0, 0, 0, c.shape[1]))
            present = None if present is None else nn.functional.pad(present, (0, c.shape[1]), value=True)
        if angles is None and present is None:
            return Stream(tokens)
        rotation = None if angles is None else torch.stack([angles.cos(), angles.sin()], dim=-1)
        return Stream(tokens, layout=Layout(rotation, present))

    def _through(self, stream: Stream, c: Tensor) -> Tensor:
        """Blocks and final layer: (N, T, P * P * C), the condition's tokens and padding among the T."""
        for block in self.blocks:
            if self.recompute == "blocks" and torch.is_grad_enabled():
                # A block draws nothing, and generators' states cannot be read while a CUDA graph is captured.
                stream = checkpoint(block, stream, c, use_reentrant=False, preserve_rng_state=False)
            else:
                stream = block(stream, c)
        return self.final_layer(stream, c)

    def _leave(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images of the final layer's tokens, those of no patch cut off: narrow by now, so that this copies little."""
        return self.unpatchify(tokens[:, : grid[0] * grid[1]], grid)

    def modulation_layers(self) -> list[nn.Module]:
        """What is applied to the condition alone, each output going to one block or to the final layer.

        The adaLN layers, or cross-attention's keys and values; in context the tokens themselves.
        """
        if self.conditioning == "in_context":
            return [nn.Identity()]
        layers = (cast(Any, module).condition_layer for module in (*self.blocks, self.final_layer))
        return [layer for layer in layers if layer is not None]

    def modulation_widths(self) -> list[int]:
        """Numbers of one timestep and label for each block, and for the final layer or, in context, the tokens."""
        width, tokens = self.pos_embed.shape[-1], self.condition_tokens
        return {
            "adaln_zero": [6 * width] * len(self.blocks) + [2 * width],
            "adaln": [4 * width] * len(self.blocks) + [2 * width],
            "cross_attention": [tokens * 2 * width] * len(self.blocks) + [0],
            "in_context": [0] * len(self.blocks) + [tokens * width],
        }[self.conditioning]

    def modulations(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """What `forward` makes of timesteps and labels, (N, sum of `modulation_widths`), blocks first.

        t, y (N,), labels up to the null class; nothing is dropped. `forward_modulated` takes it, so that sampling
        makes it once for all steps.
        """
        c = self.condition(self.t_embedder(t), self.embed_labels(y))
        return torch.cat([layer(c).flatten(1) for layer in self.modulation_layers()], dim=1)

    def forward_modulated(self, x: Tensor, modulations: Tensor) -> Tensor:
        """`forward` with what `modulations` gave for its timesteps and labels: x (N, C, H, W)."""
        *parts, last = modulations.split(self.modulation_widths(), dim=1)
        c = last.unflatten(1, (self.condition_tokens, -1)) if self.conditioning == "in_context" else None
        stream = self._enter(x, c)
        for block, modulation in zip(self.blocks, parts, strict=True):
            stream = block(stream, None, modulation)
        return self._leave(self.final_layer(stream, None, last), self.x_embedder.grid_of(x.shape[-2:]))

    def macs(self, input_size: int | tuple[int, int] | None = None) -> int:
        """Multiply-adds of one image's forward pass: linear layers, the patch projection, attention's two products.

        input_size: of the image; None: the model's own.
        """
        rows, columns = self.x_embedder.grid_of(as_pair(input_size or self.x_embedder.img_size))
        image, told = rows * columns, self.condition_tokens
        tokens = image + told if self.conditioning == "in_context" else image
        modules = (*self.blocks, self.final_layer)
        trunk = sum(cast(Any, module).macs(tokens, told) for module in modules)
        return trunk + image * matrix_size(self.x_embedder) + matrix_size(self.t_embedder)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: int | None = 3
    ) -> Tensor:
        """Classifier-free guidance in one batch: the first half of `y` conditional, the second half null labels.

        Only the first half of `x` (2n, C, H, W) is read. eps = uncond + cfg_scale * (cond - uncond) on the first
        `cfg_channels` channels of the noise (the reference's 3; None for all); every other output channel stays
        each half's own. Ho & Salimans 2022, equation 6, in the reference's scaling. Raises ConfigError for a model
        without a null class.
        """
        if self.null_class is None:
            raise ConfigError("guidance needs a null class: num_classes and class_dropout_prob above 0")
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        guided = self.in_channels if cfg_channels is None else min(cfg_channels, self.in_channels)
        eps, rest = out[:, :guided], out[:, guided:]
        cond, uncond = eps.chunk(2)
        eps = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` to `folder`, made when missing."""
        write_model(
            self, {"_class_name": "DiT", "_dit_fast_version": __version__, **self.config}, Path(folder)
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, weights: str = "model", kernels: str = "auto", device: str = "cpu"
    ) -> "DiT":
        """The model of a folder that `save_pretrained` or the trainer wrote, in eval mode.

        `weights`: "model", or "ema" for a training checkpoint's averaged weights. Raises CheckpointError for a
        folder that is incomplete or whose weights are not of its configuration.
        """
        config, state, source = read_model(Path(folder), weights)
        with torch.device("meta"):
            model = cls(**config, kernels=kernels)
        load_weights(model, state, source, assign=True)
        return model.to(device).eval()
