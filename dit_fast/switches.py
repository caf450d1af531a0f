"""How a `DiT` is computed, whatever it is: switches of the whole model that change no weight and no result."""

from typing import Any, cast

from torch import nn

from dit_fast import kernels
from dit_fast.blocks import RECOMPUTE, TransformerBlock
from dit_fast.errors import ConfigError
from dit_fast.layers import Mlp
from dit_fast.options import one_of


class Switches(nn.Module):
    """Of a model with `x_embedder`, `blocks` and `final_layer`; each property may be assigned."""

    x_embedder: Any
    blocks: nn.ModuleList
    final_layer: Any

    @property
    def kernels(self) -> str:
        """Which kernels run: "auto", "triton" or "reference"; assign to change it for the whole model."""
        return self.x_embedder.kernels

    @kernels.setter
    def kernels(self, mode: str) -> None:
        kernels.uses_triton(mode, self.x_embedder.proj.weight)
        for module in (self.x_embedder, *self.blocks, self.final_layer):
            module.kernels = mode

    @property
    def attention(self) -> str:
        """Which attention runs: "auto", "triton", "sdpa", "cudnn" or "flash"; assign to change it in all blocks."""
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
            module = cast(TransformerBlock, block).mlp
            if isinstance(module, Mlp):
                module.epilogue = epilogue
            elif epilogue not in ("auto", "separate"):
                raise ConfigError(
                    f"mlp_epilogue={epilogue!r} applies a GELU, which mlp='swiglu' has not: "
                    "give 'auto' or 'separate'"
                )

    @property
    def recompute(self) -> str:
        """What the backward pass makes again: "none", "cheap" or "blocks"; assign to change it."""
        return self._recompute

    @recompute.setter
    def recompute(self, what: str) -> None:
        self._recompute = one_of("recompute", what, RECOMPUTE)
        for block in self.blocks:
            cast(TransformerBlock, block).recompute = what
