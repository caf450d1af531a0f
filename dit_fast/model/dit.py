"""`DiT`, the Diffusion Transformer (Peebles & Xie 2023): embedders, blocks and final layer.

`N` batch, `C` channels, `T` tokens, `D` width, `P` patch size, `S` and `E` tokens and width of a caption.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dit_fast import __version__
from dit_fast.errors import ConfigError
from dit_fast.kernels import jvp, unpatchify
from dit_fast.model.backends import Backends, one_of
from dit_fast.model.blocks import (
    ADAPTIVE,
    BLOCKS,
    Stream,
    run_block,
    run_block_along,
    run_final_layer,
    takes_stream,
)
from dit_fast.model.config import OPTIONS, PAPER, check_sizes
from dit_fast.model.embedders import CaptionEmbedder, LabelEmbedder, PatchEmbed, TimestepEmbedder, as_pair
from dit_fast.model.folder import load_weights, plain_state, read_model, write_model
from dit_fast.model.layers import Layout, SwiGLU, is_seen, matrix_size, why_called
from dit_fast.model.positions import ROTARY, SINES, check_rotary, resized_table, rotary_angles, sincos_table
from dit_fast.utils.values import Number

CFG_SCALE = Number(-1e6, 1e6)
_LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class DiT(nn.Module):
    """Diffusion model with a transformer backbone, conditioned on a timestep and a class, a caption or nothing else.

    The defaults are the paper's DiT-XL/2; docs/models.md describes every option.

    Args:
        input_size: Height and width of the latent (or image), one number or a pair.
        patch_size: Side of a patch.
        in_channels: Channels of the latent.
        hidden_size: Width D of the tokens.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        mlp_ratio: Width of an MLP's hidden layer over `hidden_size`.
        class_dropout_prob: Fraction of labels dropped in training; 0 for a model without a null class.
        num_classes: Number of classes; 0 for an unconditional model.
        learn_sigma: Predict the variance beside the noise, in as many channels again.
        conditioning: How blocks take the condition: "adaln_zero", "adaln", "cross_attention" or "in_context".
        positions: "sincos", "learned", "rope" or "sincos_rope".
        norm: "layernorm" or "rmsnorm".
        mlp: "gelu" or "swiglu".
        qk_norm: Normalize the queries and keys of each head.
        caption_dim: Width E of caption tokens (N, S, E), which then replace labels (`num_classes` is ignored). A token
            of zeros is padding, a caption of zeros the null caption. 0: labels.
        kernels: As in `Backends`, like the next three; each is also an attribute that may be assigned.
        attention: As in `Backends`.
        mlp_epilogue: As in `Backends`.
        recompute: As in `Backends`.

    Raises:
        ConfigError: A value out of range, or values that do not fit together.
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
        caption_dim: int = 0,
        kernels: str = "auto",
        attention: str = "auto",
        mlp_epilogue: str = "auto",
        recompute: str = "none",
    ):
        super().__init__()
        (
            patch_size, in_channels, hidden_size, depth, num_heads,
            mlp_ratio, class_dropout_prob, num_classes, learn_sigma, caption_dim,
        ) = check_sizes(
            patch_size=patch_size, in_channels=in_channels, hidden_size=hidden_size, depth=depth, num_heads=num_heads,
            mlp_ratio=mlp_ratio, class_dropout_prob=class_dropout_prob, num_classes=num_classes,
            learn_sigma=learn_sigma, caption_dim=caption_dim,
        ).values()  # fmt: skip
        self.backends = Backends(kernels, attention, "auto", recompute)
        self.learn_sigma = learn_sigma
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.options = dict(zip(OPTIONS, (conditioning, positions, norm, mlp, qk_norm), strict=True))
        for name, value in self.options.items():
            one_of(name, value, OPTIONS[name])
        self.conditioning, self.positions, self.caption_dim = conditioning, positions, caption_dim
        if caption_dim and conditioning in ADAPTIVE:
            raise ConfigError(
                f"conditioning={conditioning!r} takes one vector and a caption is many tokens: "
                "give 'cross_attention' or 'in_context', or classes instead of captions"
            )
        make_block, make_final = BLOCKS[conditioning]
        self._sizes = {"hidden_size": hidden_size, "depth": depth, "mlp_ratio": mlp_ratio}
        try:
            self.x_embedder = PatchEmbed(
                input_size, patch_size, in_channels, hidden_size, backends=self.backends
            )
            self.t_embedder = TimestepEmbedder(hidden_size)
            self.y_embedder: LabelEmbedder | CaptionEmbedder | None = None
            if caption_dim:
                self.y_embedder = CaptionEmbedder(caption_dim, hidden_size, class_dropout_prob)
            elif num_classes:
                self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
            # A parameter, as in the reference's state dict, and frozen unless it is learned. For "rope" it stays zeros.
            self.pos_embed = nn.Parameter(
                torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=positions == "learned"
            )
            trunk: dict[str, Any] = {"norm": norm, "mlp": mlp, "qk_norm": qk_norm, "backends": self.backends}
            self.blocks = nn.ModuleList(
                make_block(hidden_size, num_heads, mlp_ratio, **trunk) for _ in range(depth)
            )
            self.final_layer = make_final(
                hidden_size, patch_size, self.out_channels, norm=norm, backends=self.backends
            )
            self.mlp_epilogue = mlp_epilogue
            if positions in ROTARY:
                check_rotary(self.head_dim)
            self.initialize_weights()
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def initialize_weights(self) -> None:
        """Initialize as the paper does, drawing random numbers in the reference's order."""

        def xavier(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        self.apply(xavier)
        for module in self.modules():
            if isinstance(module, SwiGLU):
                module.zero_padding()
        if self.positions in SINES:
            self._set_positions(self._table(self.x_embedder.grid_size))

        # As a linear layer of (D, C * P * P): what a convolution with stride P is.
        weight = self.x_embedder.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))

        if self.y_embedder is not None:
            self.y_embedder.initialize_weights()
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

    @overload
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, tangents: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        tangents: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict the noise (and variance) of noisy latents.

        In training mode, a fraction `class_dropout_prob` of the labels or captions is replaced by the null one.

        Args:
            x: Noisy latents (N, C, H, W), of any size that the patch divides. A size other than the model's own gets
                the positions that `regrid` would give it.
            t: Timesteps (N,), integer or fractional.
            y: Class labels (N,), or captions (N, S, E) of any S; ignored by an unconditional model.
            tangents: A direction, of x and of t, each in the shape and dtype of its value, or None for a constant; t
                is then fractional. The derivative of the prediction along it comes out of the same pass.

        Returns:
            The prediction (N, out_channels, H, W); with `tangents` a pair, the prediction, which has its gradient as
            ever, and its derivative, which is a constant: the Jacobian-vector product of MeanFlow (Geng et al. 2025,
            equation 8) and of continuous-time consistency models (Lu & Song 2024, appendix F).

        Raises:
            ConfigError: Inputs that do not fit each other or the model.
        """
        t = self._check_inputs(x, t, y)
        grid = self.x_embedder.grid_of(x.shape[-2:])
        if tangents is None:
            stream, c = self._start(x, t, y)
            return self._to_images(self._run_blocks(stream, c), grid)
        recompute = self._recomputes_blocks
        (stream, c), along = jvp(self._start, (x, t, y), self._check_tangents(x, t, *tangents))
        for block in self.blocks:
            stream, stream_t = run_block_along(
                block, stream, c, along, kernels=self.kernels, recompute=recompute
            )
            along = (stream_t, along[1])

        def finish(stream: Stream, c: Tensor) -> Tensor:
            return self._to_images(run_final_layer(self.final_layer, stream, c, kernels=self.kernels), grid)

        return jvp(finish, (stream, c), along)

    def _start(self, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Stream, Tensor]:
        """The token sequence and the blocks' condition."""
        c = self.condition(self.embed_times(t), self.embed_labels(y, self.training))
        return self._tokens(x, c), c

    def forward_mixed(self, images: Sequence[Tensor], t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """`forward` of N images of different sizes in one batch, each (C, H, W): N predictions (out_channels, H, W).

        Tokens are padded to those of the largest image, and none attends to padding, so that a prediction depends on
        no other image (NaViT, Dehghani et al. 2023, with one image per row).
        """
        c = self.condition(self.embed_times(t), self.embed_labels(y, self.training))
        if not images:
            return []
        embedded = [self._embed(image[None]) for image in images]
        tokens = pad_sequence([tokens[0] for tokens, _ in embedded], batch_first=True)
        rotary = [angles for _, angles in embedded if angles is not None]
        angles = pad_sequence(rotary, batch_first=True) if rotary else None
        lengths = [tokens.new_ones(own.shape[1], dtype=torch.bool) for own, _ in embedded]
        present = pad_sequence(lengths, batch_first=True)
        out = self._run_blocks(self._stream(tokens, c, angles, present), c)
        grids = [self.x_embedder.grid_of(image.shape[-2:]) for image in images]
        return [self._to_images(row[None], grid)[0] for row, grid in zip(out, grids, strict=True)]

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float | Tensor, cfg_channels: int | None = 3
    ) -> Tensor:
        """Predict with classifier-free guidance (Ho & Salimans 2022, equation 6, in the reference's scaling).

        eps = uncond + cfg_scale * (cond - uncond) in the first `cfg_channels` channels of the noise; every other
        output channel is that of each half alone.

        Args:
            x: Noisy latents (2n, C, H, W); only the first half is read.
            t: Timesteps (2n,).
            y: Labels (2n,) or captions (2n, S, E): the first half conditional, the second half null.
            cfg_scale: Guidance scale, from -1e6 to 1e6; the values of a tensor are not checked.
            cfg_channels: Guided channels; None: all. The reference guides the first 3, also of 4.

        Returns:
            The prediction (2n, out_channels, H, W).

        Raises:
            ConfigError: A model without a null class or caption, an odd batch, or a scale out of range.
        """
        if not isinstance(cfg_scale, Tensor) and not torch.compiler.is_compiling():
            cfg_scale = CFG_SCALE.check("cfg_scale", cfg_scale)
        if not self.has_null:
            raise ConfigError(
                "guidance needs a null class: num_classes (or caption_dim) and class_dropout_prob above 0"
            )
        if len(x) % 2:
            raise ConfigError(
                f"a batch of {len(x)}: guidance takes pairs, a conditional half and a null half; give an even number"
            )
        # Both halves of the labels see the same latents, as in the reference.
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        guided = self.in_channels if cfg_channels is None else min(cfg_channels, self.in_channels)
        eps, rest = out[:, :guided], out[:, guided:]
        cond, uncond = eps.chunk(2)
        eps = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Timesteps (N,), a single one repeated; ConfigError for inputs that do not fit each other or the model."""
        weight = self.pos_embed
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ConfigError(
                f"x is {tuple(x.shape)}: give images (N, {self.in_channels}, height, width), of the model's channels"
            )
        if isinstance(t, Tensor) and t.shape == (1,):
            t = t.expand(x.shape[0])
        if not isinstance(t, Tensor) or t.shape != x.shape[:1]:
            found = tuple(t.shape) if isinstance(t, Tensor) else repr(t)
            raise ConfigError(f"t is {found}: give a tensor of {x.shape[0]} timesteps, one for each image")
        for name, tensor in (("x", x), ("t", t), ("y", y)):
            if not isinstance(tensor, Tensor) or (name == "y" and self.y_embedder is None):
                continue
            if tensor.shape[0] != x.shape[0]:
                raise ConfigError(
                    f"{name} has {tensor.shape[0]} rows, x {x.shape[0]}: give one for each image"
                )
            if tensor.device.type != weight.device.type:
                raise ConfigError(
                    f"{name} is on {tensor.device}, the model on {weight.device}: move one of them"
                )
        return t

    @staticmethod
    def _check_tangents(
        x: Tensor, t: Tensor, x_t: Tensor | None, t_t: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        """Tangents of x, t and y; ConfigError for one that does not fit its value."""
        if t_t is not None and t_t.shape == (1,):
            t_t = t_t.expand(t.shape)
        for name, value, tangent in (("x", x, x_t), ("t", t, t_t)):
            if tangent is None:
                continue
            if not value.is_floating_point():
                raise ConfigError(f"{name} is {value.dtype}: give fractions where it has a tangent")
            if (tangent.shape, tangent.dtype, tangent.device) != (value.shape, value.dtype, value.device):
                found, wanted = (
                    f"{tuple(part.shape)} {part.dtype} on {part.device}" for part in (tangent, value)
                )
                raise ConfigError(f"the tangent of {name} is {found}, {name} {wanted}: give it like {name}")
        if x_t is None and t_t is None:
            raise ConfigError("tangents=(None, None) is no direction: give that of x or of t, or no tangents")
        return x_t, t_t, None

    def embed_times(self, t: Tensor) -> Tensor:
        """Embedded timesteps (N, D)."""
        if isinstance(self.t_embedder, TimestepEmbedder):
            return self.t_embedder(t, self.pos_embed.dtype)
        return self.t_embedder(t)

    def embed_labels(self, y: Tensor | None, train: bool = False) -> Tensor | None:
        """Embedded labels (N, D) or captions (N, S, D), some dropped if `train`; None for an unconditional model."""
        if self.y_embedder is None:
            return None
        if (
            not isinstance(y, Tensor)
            or y.ndim != (3 if self.caption_dim else 1)
            or (y.ndim == 3 and y.shape[2] != self.caption_dim)
        ):
            wanted = (
                f"was trained on captions, give their tokens (N, S, {self.caption_dim})"
                if self.caption_dim
                else f"has {self.num_classes} classes, give a label for each image"
            )
            raise ConfigError(
                f"y is {tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}: the model {wanted}"
            )
        if not self.caption_dim:
            if y.dtype not in _LABELS:
                raise ConfigError(f"y is {y.dtype}: give labels of an integer dtype")
            y = y if y.dtype in (torch.int64, torch.int32) else y.long()
        return self.y_embedder(y, train)

    def condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        """The blocks' condition from embedded timesteps (N, D) and labels or captions: the sum, or tokens (N, S, D)."""
        if self.conditioning in ADAPTIVE:
            return t if y is None else t + y
        if y is None:
            return t[:, None]
        return torch.cat([t[:, None].to(y.dtype), y if self.caption_dim else y[:, None]], dim=1)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens of images (N, T, D), positions added, and rotary angles (T, K / 2); None for positions without."""
        grid = self.x_embedder.grid_of(x.shape[-2:])
        own = grid == self.x_embedder.grid_size
        pos = self.pos_embed if own else self._table(grid)
        # Hooks of the embedder see what those of the reference do: tokens without positions.
        plain = type(self.x_embedder) is PatchEmbed and not is_seen(self.x_embedder)
        tokens = self.x_embedder(x, pos) if plain else self.x_embedder(x.to(pos.dtype)) + pos
        if self.positions not in ROTARY:
            return tokens, None
        return tokens, rotary_angles(grid, self.head_dim, x.device)

    def _tokens(self, x: Tensor, c: Tensor | None) -> Stream:
        tokens, angles = self._embed(x)
        return self._stream(tokens, c, None if angles is None else angles[None])

    def _stream(
        self, tokens: Tensor, c: Tensor | None, angles: Tensor | None, present: Tensor | None = None
    ) -> Stream:
        """The token sequence with its layout; in-context condition tokens are appended without a position.

        tokens (N, T, D); angles (N or 1, T, K / 2); present bool (N, T), False for padding.
        """
        # `CaptionEmbedder` keeps padding tokens at zero, so that `c` itself shows which tokens are padding.
        condition_present = (cast(Tensor, c) != 0).any(dim=-1) if self.caption_dim else None
        if self.conditioning == "in_context":
            c = cast(Tensor, c)
            if condition_present is not None:
                present = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if present is None else present
                present = torch.cat([present, condition_present], dim=1)
            elif present is not None:
                present = nn.functional.pad(present, (0, c.shape[1]), value=True)
            tokens = torch.cat([tokens, c.to(tokens.dtype)], dim=1)
            # An angle of 0 leaves the condition's queries and keys as they are.
            angles = None if angles is None else nn.functional.pad(angles, (0, 0, 0, c.shape[1]))
        if angles is None and present is None and condition_present is None:
            return Stream(tokens)
        rotation = None if angles is None else torch.stack([angles.cos(), angles.sin()], dim=-1)
        return Stream(tokens, layout=Layout(rotation, present, condition_present))

    def _run_blocks(self, stream: Stream, c: Tensor) -> Tensor:
        """Blocks and final layer: (N, T, P * P * C); T includes in-context condition tokens and padding."""
        for block in self.blocks:
            stream = run_block(block, stream, c, kernels=self.kernels, recompute=self._recomputes_blocks)
        return run_final_layer(self.final_layer, stream, c, kernels=self.kernels)

    @property
    def _recomputes_blocks(self) -> bool:
        return self.backends.recompute == "blocks" and torch.is_grad_enabled()

    def _to_images(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images from the final layer's tokens, without those that belong to no patch."""
        return self.unpatchify(tokens[:, : grid[0] * grid[1]], grid)

    def unpatchify(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens (N, T, P * P * C) of a grid of (rows, columns) to images (N, C, H, W).

        Without `grid`: the model's own grid, or the square of T tokens where T differs from the model's.
        """
        rows, columns = self.x_embedder.grid_size if grid is None else grid
        if x.shape[1] != rows * columns:
            rows = columns = int(x.shape[1] ** 0.5)
            if rows * columns != x.shape[1]:
                raise ValueError(
                    f"{x.shape[1]} tokens are neither a square nor the model's grid {self.x_embedder.grid_size}"
                )
        return unpatchify(x, self.patch_size, rows, columns, kernels=self.backends.kernels)

    def modulation_layers(self) -> list[nn.Module]:
        """Layers whose input is the condition alone, one per block or final layer.

        The adaLN layers, or cross-attention's projections to keys and values. In context, and for captions, the
        identity: keys and values of all blocks would take (S + 1) * 2 D * depth elements per caption and step. Also the
        identity where hooks see a block: they may load its layers, and what they see is the condition.
        """
        if self._keeps_condition:
            return [nn.Identity()]
        layers = (cast(Any, module).condition_layer for module in (*self.blocks, self.final_layer))
        return [layer for layer in layers if layer is not None]

    @property
    def _keeps_condition(self) -> bool:
        tokens = self.conditioning == "in_context" or self.caption_dim > 0
        return tokens or not all(map(takes_stream, (*self.blocks, self.final_layer)))

    def modulation_widths(self, caption_tokens: int = 1) -> list[int]:
        """Widths of `modulations` for each block, and then for the final layer (or the condition's tokens)."""
        width, tokens = self.pos_embed.shape[-1], self.condition_tokens(caption_tokens)
        if self._keeps_condition:
            return [0] * len(self.blocks) + [width if self.conditioning in ADAPTIVE else tokens * width]
        each, last = {
            "adaln_zero": (6 * width, 2 * width),
            "adaln": (4 * width, 2 * width),
            "cross_attention": (tokens * 2 * width, 0),
        }[self.conditioning]
        return [each] * len(self.blocks) + [last]

    def modulations(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Outputs of all `modulation_layers` for t and y, (N, sum of `modulation_widths`), for `forward_modulated`.

        Sampling computes them once for all steps. t (N,) and y as in `forward`; y may contain the null class, and no
        label is dropped.
        """
        c = self.condition(self.embed_times(t), self.embed_labels(y))
        return torch.cat([layer(c).flatten(1) for layer in self.modulation_layers()], dim=1)

    def forward_modulated(self, x: Tensor, modulations: Tensor) -> Tensor:
        """`forward` of x (N, C, H, W) with the `modulations` of its timesteps and labels."""
        grid = self.x_embedder.grid_of(x.shape[-2:])
        if self._keeps_condition:
            c = modulations.unflatten(1, (-1, self.pos_embed.shape[-1]))
            c = c[:, 0] if self.conditioning in ADAPTIVE else c
            return self._to_images(self._run_blocks(self._tokens(x, c), c), grid)
        *slices, last = modulations.split(self.modulation_widths(), dim=1)
        stream = self._tokens(x, None)
        for block, modulation in zip(self.blocks, slices, strict=True):
            stream = run_block(block, stream, None, modulation, kernels=self.kernels)
        out = run_final_layer(self.final_layer, stream, None, last, kernels=self.kernels)
        return self._to_images(out, grid)

    def regrid(self, input_size: int | tuple[int, int], mode: str | None = None) -> Self:
        """Change the model's own input size; returns the model.

        The position table becomes a new (1, T, D) parameter.

        Args:
            input_size: Height and width, one number or a pair.
            mode: "extend" numbers the new grid 0, 1, 2, ... as a model built for that size does; "interpolate" spreads
                the coordinates of the old grid over the new one, or resizes a learned table. None: "interpolate" for
                a learned table, else "extend".

        Raises:
            ConfigError: A size that is not a multiple of the patch, or a mode that the positions do not support.
        """
        modes = {"sincos": ("extend", "interpolate"), "learned": ("interpolate",)}.get(
            self.positions, ("extend",)
        )
        if mode is not None and mode not in modes:
            known = " or ".join(map(repr, modes))
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

    def _set_positions(self, table: Tensor) -> None:
        self.pos_embed = nn.Parameter(table.detach().to(self.pos_embed), self.pos_embed.requires_grad)

    def _table(self, grid: tuple[int, int], steps: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """Positions (1, T, D) added to the tokens of a grid: sines, zeros, or the learned table resized."""
        own = self.pos_embed
        if self.positions == "learned":
            return resized_table(own, self.x_embedder.grid_size, grid)
        if self.positions == "rope":
            return own.new_zeros(1, grid[0] * grid[1], own.shape[-1])
        return sincos_table(grid, own.shape[-1], steps, own.device).to(own.dtype)

    @property
    def num_classes(self) -> int:
        """Number of classes without the null class; 0 for a model of captions and an unconditional one."""
        # Also through a wrapper that passes attributes on, as peft's of `modules_to_save` does.
        return getattr(self.y_embedder, "num_classes", 0)

    @property
    def null_class(self) -> int | None:
        """The label of the null class; None for a model without one."""
        return self.num_classes if self.num_classes and self.has_null else None

    @property
    def has_null(self) -> bool:
        """Whether the model has a null class or caption, which guidance needs."""
        return self.y_embedder is not None and self.y_embedder.dropout_prob > 0

    def condition_tokens(self, caption_tokens: int = 1) -> int:
        """Number of condition tokens, of timestep and class or caption, where `conditioning` takes tokens."""
        return 1 + (caption_tokens if self.caption_dim else self.y_embedder is not None)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON values, without the backends.

        Options with the paper's value are left out, so that other readers of DiT configurations accept the file.
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
            **({"caption_dim": self.caption_dim} if self.caption_dim else {}),
        }

    def macs(self, input_size: int | tuple[int, int] | None = None, caption_tokens: int = 1) -> int:
        """Multiply-adds of one image's forward pass: linear layers, patch projection, attention's two products.

        input_size: height and width of the image; None: the model's own. caption_tokens: S, including padding, which
        is computed too.
        """
        rows, columns = self.x_embedder.grid_of(as_pair(input_size or self.x_embedder.img_size))
        image, condition = rows * columns, self.condition_tokens(caption_tokens)
        tokens = image + condition if self.conditioning == "in_context" else image
        modules = (*self.blocks, self.final_layer)
        trunk = sum(cast(Any, module).macs(tokens, condition) for module in modules)
        captions = matrix_size(cast(CaptionEmbedder, self.y_embedder).mlp) if self.caption_dim else 0
        return (
            trunk
            + image * matrix_size(self.x_embedder)
            + matrix_size(self.t_embedder)
            + caption_tokens * captions
        )

    def called_layers(self) -> dict[str, str]:
        """Layers of the blocks that are called, and not part of a fused operation, and why.

        Name of the module -> reason: hooks (offloading, casting, pruning), another module in its place (adapters,
        parametrizations), tensor subclasses (quantized weights). What they do takes effect, at the speed of PyTorch's
        own operations. Empty for an unchanged model.
        """
        own, found = dict(self.named_modules()), {}
        for name, module in self._plain().named_modules():
            fused = (
                name.startswith(("x_embedder", "blocks.", "final_layer")) and "adaLN_modulation" not in name
            )
            if not fused or name not in own or takes_stream(own[name]):
                continue
            if why := why_called(own[name], type(module)):
                found[name] = why
        return found

    def plain_state(self) -> dict[str, Tensor]:
        """The state dict, of a model whose layers are those of a new one.

        Raises:
            ConfigError: Adapters, parametrizations, pruning, or weights that are quantized, cast for storage or not in
                memory, and what to call first.
        """
        return plain_state(self, self._plain().state_dict())

    def _plain(self) -> "DiT":
        """A new model of this configuration without memory."""
        with torch.device("meta"):
            return DiT(**self.config)

    # Kept as attributes of the model, though `backends` holds the values: they predate it, and are its public names.

    @property
    def kernels(self) -> str:
        """`Backends.kernels` of the whole model."""
        return self.backends.kernels

    @kernels.setter
    def kernels(self, mode: str) -> None:
        self.backends.kernels = mode

    @property
    def attention(self) -> str:
        """`Backends.attention` of the whole model."""
        return self.backends.attention

    @attention.setter
    def attention(self, backend: str) -> None:
        self.backends.attention = backend

    @property
    def mlp_epilogue(self) -> str:
        """`Backends.mlp_epilogue` of the whole model; an MLP with SwiGLU has only "auto" and "separate"."""
        return self.backends.mlp_epilogue

    @mlp_epilogue.setter
    def mlp_epilogue(self, epilogue: str) -> None:
        if self.options["mlp"] == "swiglu" and epilogue in ("triton", "cublaslt"):
            raise ConfigError(
                f"mlp_epilogue={epilogue!r} applies a GELU, which mlp='swiglu' has not: give 'auto' or 'separate'"
            )
        self.backends.mlp_epilogue = epilogue

    @property
    def recompute(self) -> str:
        """`Backends.recompute` of the whole model."""
        return self.backends.recompute

    @recompute.setter
    def recompute(self, what: str) -> None:
        self.backends.recompute = what

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` to `folder`, which is created when missing.

        Raises:
            ConfigError: As `plain_state`; nothing is written.
        """
        config = {"_class_name": "DiT", "_dit_fast_version": __version__, **self.config}
        write_model(self.plain_state(), config, Path(folder))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, weights: str = "model", kernels: str = "auto", device: str = "cpu"
    ) -> "DiT":
        """Load the model of a folder that `save_pretrained` or the trainer wrote, in eval mode.

        Args:
            folder: Folder with `config.json` and `<weights>.safetensors`.
            weights: "model", or "ema" for a training checkpoint's averaged weights.
            kernels: As in `Backends`.
            device: Device of the model.

        Raises:
            CheckpointError: The folder is incomplete, or its weights do not fit its configuration.
        """
        config, state, source = read_model(Path(folder), weights)
        with torch.device("meta"):
            model = cls(**config, kernels=kernels)
        load_weights(model, state, source, assign=True)
        return model.to(device).eval()
