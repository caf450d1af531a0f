"""The modulation vectors of a whole trajectory, made before it begins.

In a DiT they depend on timestep and label alone (Peebles & Xie 2023, figure 3), so the adaLN layers, a third of the
weights, need not be read at every step: all steps and labels go through each of them in one product of
(steps * labels) rows.
"""

import torch
from torch import Tensor, nn

from dit_fast.models import DiT


def modulation_layers(model: DiT) -> list[nn.Module]:
    """The adaLN layer of each block and of the final layer, in the order of `DiT.modulations`."""
    return [layer.get_submodule("adaLN_modulation") for layer in (*model.blocks, model.final_layer)]


def loop_parameters(model: DiT) -> list[Tensor]:
    """The parameters that a step with given modulation vectors reads."""
    hoisted = ("t_embedder.", "y_embedder.")
    return [
        p
        for name, p in model.named_parameters()
        if not name.startswith(hoisted) and ".adaLN_modulation." not in name
    ]


def modulation_width(model: DiT) -> int:
    """Numbers in one modulation vector: (6 depth + 2) D."""
    return (6 * len(model.blocks) + 2) * model.pos_embed.shape[-1]


class ModulationTable:
    """Modulation vectors of up to `steps` consecutive nodes for `rows` labels, (steps, rows, (6 depth + 2) D).

    `values` keeps its memory when it is filled again. With `offload`, the adaLN weights wait on the CPU and each is
    brought to the table's device while it is used.
    """

    def __init__(self, model: DiT, steps: int, rows: int, *, offload: bool = False) -> None:
        self.model, self.offload = model, offload
        like = model.pos_embed
        self.values = torch.zeros(steps, rows, modulation_width(model), dtype=like.dtype, device=like.device)

    def fill(self, times: Tensor, labels: Tensor) -> None:
        """Make the vectors of `times` (at most `steps`) and `labels` (rows,), up to the null class."""
        t = self.model.t_embedder(times)
        y = self.model.y_embedder(labels, False)
        c = (t[:, None] + y[None]).flatten(0, 1)
        start = 0
        for layer in modulation_layers(self.model):
            if self.offload:
                layer.to(c.device)
            made = layer(c).unflatten(0, (len(times), len(labels)))
            if self.offload:
                layer.to("cpu")
            self.values[: len(times), :, start : start + made.shape[-1]] = made
            start += made.shape[-1]
