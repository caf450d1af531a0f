"""The modulation vectors of a whole trajectory, made before it begins.

In a DiT they depend on timestep and label alone (Peebles & Xie 2023, figure 3), so the adaLN layers, a third of the
weights, need not be read at every step: all steps and labels go through each of them in one product of
(steps * labels) rows. The same holds for the keys and values of cross-attention and the tokens in context; of captions
the embedded tokens alone.
"""

import torch
from torch import Tensor

from dit_fast.models import DiT


def loop_parameters(model: DiT) -> list[Tensor]:
    """The parameters that a step with given modulation vectors reads."""
    hoisted = {id(p) for layer in model.modulation_layers() for p in layer.parameters()}
    return [
        p
        for name, p in model.named_parameters()
        if not name.startswith(("t_embedder.", "y_embedder.")) and id(p) not in hoisted
    ]


def modulation_width(model: DiT, caption_tokens: int = 1) -> int:
    """Numbers in one modulation vector: (6 depth + 2) D under adaLN-Zero, (1 + S) D of a caption of S tokens."""
    return sum(model.modulation_widths(caption_tokens))


class ModulationTable:
    """Modulation vectors of up to `steps` consecutive nodes for `rows` labels, or captions of `caption_tokens` tokens:
    (steps, rows, `modulation_width`).

    `values` keeps its memory when it is filled again. With `offload`, the adaLN weights wait on the CPU and each is
    brought to the table's device while it is used.
    """

    def __init__(
        self, model: DiT, steps: int, rows: int, *, caption_tokens: int = 1, offload: bool = False
    ) -> None:
        self.model, self.offload = model, offload
        like = model.pos_embed
        width = modulation_width(model, caption_tokens)
        self.values = torch.zeros(steps, rows, width, dtype=like.dtype, device=like.device)

    def fill(self, times: Tensor, labels: Tensor) -> None:
        """Make the vectors of `times` (at most `steps`) and `labels` (rows,), up to the null class, or captions."""
        t = self.model.t_embedder(times)
        y = self.model.embed_labels(labels)
        y = None if y is None else y.repeat(len(times), *[1] * (y.ndim - 1))
        c = self.model.condition(t.repeat_interleave(len(labels), 0), y)
        start = 0
        for layer in self.model.modulation_layers():
            if self.offload:
                layer.to(c.device)
            made = layer(c).flatten(1).unflatten(0, (len(times), len(labels)))
            if self.offload:
                layer.to("cpu")
            self.values[: len(times), :, start : start + made.shape[-1]] = made
            start += made.shape[-1]
