"""What the CPU path keeps in memory."""

import pytest
import torch

from dit_fast.models import DiT


@pytest.mark.parametrize("trained", [False, True])
def test_the_residual_stream_lies_token_after_token(trained: bool) -> None:
    """Not in the patch convolution's order, in which each pass of every block takes two to four times as long."""
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2).train(trained)
    seen = []
    for block in model.blocks:

        def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen.append(inputs[0].is_contiguous())

        block.register_forward_pre_hook(look)
    with torch.set_grad_enabled(trained):
        model(torch.randn(3, 4, 8, 8), torch.arange(3), torch.arange(3))
    assert seen == [True, True]
