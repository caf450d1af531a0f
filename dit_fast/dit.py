"""`DiT`, the Diffusion Transformer (Peebles & Xie 2023): embedders, blocks, final layer, and what is done with them.

`N` batch, `C` channels, `T` tokens, `D` width.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_fast import __version__, kernels
from dit_fast.blocks import RECOMPUTE, Stream, TransformerBlock
from dit_fast.conditioning import ADAPTIVE, BLOCKS, CONDITION_TOKENS, CONDITIONING
from dit_fast.embedders import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    as_pair,
    get_2d_sincos_pos_embed,
    get_2d_sincos_pos_embed_from_grid,
    stepped_grid,
)
from dit_fast.errors import ConfigError
from dit_fast.layers import matrix_size
from dit_fast.model_files import load_weights, read_model, write_model


def one_of(name: str, value: str, words: tuple[str, ...]) -> str:
    """`value`; ConfigError where it is none of `words`."""
    if value not in words:
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(map(repr, words))}")
    return value


class DiT(nn.Module):
    """Diffusion model with a transformer backbone, class-conditional.

    input_size: height and width of the latent (or image), one number or a pair; patch_size: side of a patch;
    in_channels: channels of the latent; hidden_size, depth, num_heads, mlp_ratio: the transformer;
    class_dropout_prob: share of labels dropped in training, 0 for a model without a null class;
    num_classes; learn_sigma: predict the variance beside the noise; conditioning, how blocks learn of timestep and
    class: "adaln_zero", "adaln", "cross_attention" or "in_context"; kernels: "auto" (Triton on CUDA, PyTorch
    elsewhere), "triton" or "reference"; attention: "auto", "triton", "sdpa" or "flash"; mlp_epilogue, who applies
    the GELU: "auto" (as the device's tuned table says), "separate", "triton" or "cublaslt"; recompute, in the
    backward pass: "none", "cheap" (norm outputs and GELU, where the kernels run: a third less memory for no matrix
    product) or "blocks" (every block from its input). Raises ConfigError for sizes that do not fit each other.
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
        self.conditioning = one_of("conditioning", conditioning, CONDITIONING)
        make_block, make_final = BLOCKS[conditioning]
        self._sizes = {"hidden_size": hidden_size, "depth": depth, "mlp_ratio": mlp_ratio}
        try:
            self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, kernels=kernels)
            self.t_embedder = TimestepEmbedder(hidden_size)
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
            # Fixed sine-cosine positions: a parameter so that it is saved, frozen so that it is not trained.
            self.pos_embed = nn.Parameter(
                torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=False
            )
            self.blocks = nn.ModuleList(
                make_block(hidden_size, num_heads, mlp_ratio, kernels=kernels) for _ in range(depth)
            )
            self.final_layer = make_final(hidden_size, patch_size, self.out_channels, kernels=kernels)
            self.attention, self.mlp_epilogue, self.recompute = attention, mlp_epilogue, recompute
            self.initialize_weights()
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def kernels(self) -> str:
        """Which kernels run: "auto", "triton" or "reference"; assign to change it for the whole model."""
        return self.x_embedder.kernels

    @kernels.setter
    def kernels(self, mode: str) -> None:
        kernels.uses_triton(mode, self.pos_embed)
        for module in (self.x_embedder, *self.blocks, self.final_layer):
            module.kernels = mode

    @property
    def attention(self) -> str:
        """Which attention runs: "auto", "triton", "sdpa" or "flash"; assign to change it for the whole model."""
        return self._attention

    @attention.setter
    def attention(self, backend: str) -> None:
        self._attention = one_of("attention", backend, kernels.BACKENDS)
        for block in self.blocks:
            cast(TransformerBlock, block).attn.backend = backend

    @property
    def mlp_epilogue(self) -> str:
        """Who applies the GELU: "auto", "separate", "triton" or "cublaslt"; assign to change it for the whole model."""
        return self._mlp_epilogue

    @mlp_epilogue.setter
    def mlp_epilogue(self, epilogue: str) -> None:
        self._mlp_epilogue = one_of("mlp_epilogue", epilogue, kernels.EPILOGUES)
        for block in self.blocks:
            cast(TransformerBlock, block).mlp.epilogue = epilogue

    @property
    def recompute(self) -> str:
        """What the backward pass makes again: "none", "cheap" or "blocks"; assign to change it."""
        return self._recompute

    @recompute.setter
    def recompute(self, what: str) -> None:
        self._recompute = one_of("recompute", what, RECOMPUTE)
        for block in self.blocks:
            cast(TransformerBlock, block).recompute = what

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON values, without those that say how it is computed.

        `conditioning` is there where it is not "adaln_zero": what every reader of DiT configurations takes for granted.
        """
        config: dict[str, Any] = {
            "input_size": list(self.x_embedder.img_size),
            "patch_size": self.patch_size,
            "in_channels": self.in_channels,
            "hidden_size": self._sizes["hidden_size"],
            "depth": self._sizes["depth"],
            "num_heads": self.num_heads,
            "mlp_ratio": self._sizes["mlp_ratio"],
            "class_dropout_prob": self.y_embedder.dropout_prob,
            "num_classes": self.y_embedder.num_classes,
            "learn_sigma": self.learn_sigma,
        }
        return config if self.conditioning == "adaln_zero" else {**config, "conditioning": self.conditioning}

    def initialize_weights(self) -> None:
        """The paper's initialisation, drawing random numbers in the reference's order."""

        def xavier(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        self.apply(xavier)
        table = get_2d_sincos_pos_embed(self.pos_embed.shape[-1], self.x_embedder.grid_size)
        self._set_positions(table)

        # The patch projection is initialised like the linear layer that it is.
        weight = self.x_embedder.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))

        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02)

        # A zero projection makes the output zero; zero gates make every block the identity (adaLN-Zero).
        zero = [self.final_layer.linear]
        if self.conditioning == "adaln_zero":
            zero += [cast(nn.Sequential, layer)[-1] for layer in self.modulation_layers()]
        for parameter in nn.ModuleList(zero).parameters():
            nn.init.zeros_(parameter)

    def _set_positions(self, table: Any) -> None:
        positions = torch.from_numpy(table).float().unsqueeze(0).to(self.pos_embed)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)

    def regrid(self, input_size: int | tuple[int, int], mode: str = "extend") -> "DiT":
        """Take inputs of another size from now on; returns the model.

        Replaces the position table, in place of the (1, T, D) parameter: "extend" numbers the new grid 0, 1, 2, ...
        as a model built for that size does; "interpolate" spreads the coordinates of the present grid over the
        new one. Raises ConfigError for a size that is not a multiple of the patch.
        """
        if mode not in ("extend", "interpolate"):
            raise ConfigError(f"regrid mode {mode!r}: choose 'extend' or 'interpolate'")
        old_rows, old_columns = self.x_embedder.grid_size
        try:
            self.x_embedder.set_img_size(as_pair(input_size))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        rows, columns = self.x_embedder.grid_size
        steps = (old_rows / rows, old_columns / columns) if mode == "interpolate" else (1.0, 1.0)
        grid = stepped_grid((rows, columns), steps)
        self._set_positions(get_2d_sincos_pos_embed_from_grid(self.pos_embed.shape[-1], grid))
        return self

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (N, T, P * P * C) to images (N, C, H, W); a T that is not the model's own must be a square."""
        rows, columns = self.x_embedder.grid_size
        if x.shape[1] != rows * columns:
            rows = columns = int(x.shape[1] ** 0.5)
            if rows * columns != x.shape[1]:
                raise ValueError(
                    f"{x.shape[1]} tokens are no square and not the model's {self.x_embedder.grid_size} grid"
                )
        return kernels.unpatchify(x, self.patch_size, rows, columns, kernels=self.kernels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noise (and variance) predicted for noisy latents.

        x (N, C, H, W); t (N,) timesteps, int or fractional; y (N,) class labels -> (N, out_channels, H, W).
        In training mode a share `class_dropout_prob` of the labels becomes the null class.
        """
        c = self.condition(self.t_embedder(t), self.y_embedder(y, self.training))
        stream = self._enter(x, c)
        for block in self.blocks:
            if self.recompute == "blocks" and torch.is_grad_enabled():
                # A block draws nothing, and generators' states cannot be read while a CUDA graph is captured.
                stream = checkpoint(block, stream, c, use_reentrant=False, preserve_rng_state=False)
            else:
                stream = block(stream, c)
        return self._leave(self.final_layer(stream, c))

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """What blocks are told, of embedded timesteps and labels (N, D): their sum, or the two as tokens (N, 2, D)."""
        return t + y if self.conditioning in ADAPTIVE else torch.stack([t.to(y.dtype), y], dim=1)

    def _enter(self, x: Tensor, c: Tensor | None) -> Stream:
        """The tokens of images, (N, T, D), and after them, in context, those of the condition."""
        tokens = self.x_embedder(x, self.pos_embed)
        if self.conditioning == "in_context":
            tokens = torch.cat([tokens, cast(Tensor, c).to(tokens.dtype)], dim=1)
        return Stream(tokens)

    def _leave(self, tokens: Tensor) -> Tensor:
        """Images of the final layer's tokens, the condition's removed: narrow by now, so that this copies little."""
        return self.unpatchify(tokens[:, :-CONDITION_TOKENS] if self.conditioning == "in_context" else tokens)

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
        width, tokens = self.pos_embed.shape[-1], CONDITION_TOKENS
        return {
            "adaln_zero": [6 * width] * len(self.blocks) + [2 * width],
            "adaln": [4 * width] * len(self.blocks) + [2 * width],
            "cross_attention": [tokens * 2 * width] * len(self.blocks) + [0],
            "in_context": [0] * len(self.blocks) + [tokens * width],
        }[self.conditioning]

    def modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """What `forward` makes of timesteps and labels, (N, sum of `modulation_widths`), blocks first.

        t, y (N,), labels up to the null class; nothing is dropped. `forward_modulated` takes it, so that sampling
        makes it once for all steps.
        """
        c = self.condition(self.t_embedder(t), self.y_embedder(y, False))
        return torch.cat([layer(c).flatten(1) for layer in self.modulation_layers()], dim=1)

    def forward_modulated(self, x: Tensor, modulations: Tensor) -> Tensor:
        """`forward` with what `modulations` gave for its timesteps and labels: x (N, C, H, W)."""
        *parts, last = modulations.split(self.modulation_widths(), dim=1)
        c = last.unflatten(1, (CONDITION_TOKENS, -1)) if self.conditioning == "in_context" else None
        stream = self._enter(x, c)
        for block, modulation in zip(self.blocks, parts, strict=True):
            stream = block(stream, None, modulation)
        return self._leave(self.final_layer(stream, None, last))

    def macs(self) -> int:
        """Multiply-adds of one image's forward pass: linear layers, the patch projection, attention's two products."""
        image = self.x_embedder.num_patches
        tokens = image + CONDITION_TOKENS if self.conditioning == "in_context" else image
        modules = (*self.blocks, self.final_layer)
        trunk = sum(cast(Any, module).macs(tokens) for module in modules)
        return trunk + image * matrix_size(self.x_embedder) + matrix_size(self.t_embedder)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: int | None = 3
    ) -> Tensor:
        """Classifier-free guidance in one batch: the first half of `y` conditional, the second half null labels.

        Only the first half of `x` (2n, C, H, W) is read. eps = uncond + cfg_scale * (cond - uncond) on the first
        `cfg_channels` channels of the noise (the reference's 3; None for all); every other output channel stays
        each half's own. Ho & Salimans 2022, equation 6, in the reference's scaling.
        """
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
