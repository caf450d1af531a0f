"""What implementations of one DiT compute differently, and a DiT that computes as another one does.

The weights of facebookresearch/DiT and of diffusers' DiTTransformer2DModel are the same numbers in another order,
but the two models are not the same function: diffusers divides the exponents of the timestep frequencies by 127
where the reference divides by 128, its norm before the MLP has another epsilon, and its pipeline guides every
channel of the noise where the reference guides three. A conversion that is exact has to carry these along.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, cast

import torch
from torch import Tensor, nn

from dit_fast.embedders import TimestepEmbedder
from dit_fast.errors import ConfigError
from dit_fast.models import DiT


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
        from dit_fast.interop.diffusers_folder import write_folder

        write_folder(self, folder)


def conventions_of(model: DiT) -> Conventions:
    """The conventions of a model: its own, or the reference's."""
    return model.conventions if isinstance(model, ConvertedDiT) else REFERENCE
