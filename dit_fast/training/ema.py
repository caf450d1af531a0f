"""Exponential moving average of a model's trained parameters."""

import torch
from torch import Tensor, nn


class Ema:
    """ema <- ema + (1 - d) * (parameter - ema) after every step, in float32.

    d = min(decay, (1 + step) / (10 + step)): the average follows the first steps closely, so that a short run
    does not keep the initial weights in it. Frozen parameters are copied once and left alone.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._state = {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}
        trained = [
            (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
        ]
        self._averages = [self._state[name] for name, _ in trained]
        self._parameters: list[Tensor] = [parameter for _, parameter in trained]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after optimiser step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._parameters, 1.0 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged state dict, with the model's names; the tensors are live, not copies."""
        return self._state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self._state.items():
            tensor.copy_(state[name])
