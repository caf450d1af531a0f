"""Models small enough for a test, with random weights everywhere: the zeros of a new model would hide most faults."""

import torch
from torch import nn

from dit_fast.models import DiT


def small_model(seed: int = 0, *, std: float = 0.1, redrawn: tuple[str, ...] = ("",), **options) -> DiT:
    """One block of width 32 on 8 x 8 images unless `options` say otherwise, in eval mode.

    Weights whose name contains one of `redrawn` are normal with the standard deviation `std`.
    """
    torch.manual_seed(seed)
    sizes = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
    }
    model = DiT(**{**sizes, "num_classes": 5, **options})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(part in name for part in redrawn):
            nn.init.normal_(parameter, std=std)
    return model.eval()
