"""The grid of patches that a `DiT` reads an image as: where its tokens stand, and how they become an image again."""

from typing import Self

from torch import Tensor, nn

from dit_fast import kernels
from dit_fast.embedders import as_pair
from dit_fast.errors import ConfigError
from dit_fast.positions import ROTARY, resized_table, rotary_angles, sincos_table
from dit_fast.switches import Switches


class Gridded(Switches):
    """Of a model with `x_embedder`, `patch_size`, `head_dim`, and `positions` of the kind that `pos_embed` holds."""

    patch_size: int
    head_dim: int
    positions: str
    pos_embed: nn.Parameter

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

    def regrid(self, input_size: int | tuple[int, int], mode: str | None = None) -> Self:
        """Take inputs of this size for the model's own from now on; returns the model.

        Replaces the position table, in place of the (1, T, D) parameter: "extend" numbers the new grid 0, 1, 2, ...
        as a model built for that size does; "interpolate" spreads the coordinates of the present grid over the
        new one, or resizes a learned table. None: "extend", where the table is learned "interpolate". Raises
        ConfigError for a size that is not a multiple of the patch, or a mode that the positions do not have.
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

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens of images (N, T, D), and their rotary angles (T, K / 2) where positions are so."""
        grid = self.x_embedder.grid_of(x.shape[-2:])
        own = grid == self.x_embedder.grid_size
        tokens = self.x_embedder(x, self.pos_embed if own else self._table(grid))
        if self.positions not in ROTARY:
            return tokens, None
        return tokens, rotary_angles(grid, self.head_dim, x.device)
