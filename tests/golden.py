"""The reference's golden numbers and the inputs they were made with (tests/golden/reference_dit.npz)."""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_fast.models import DiT

GOLDEN = np.load(Path(__file__).parent / "golden" / "reference_dit.npz", allow_pickle=False)
CONFIG = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=10)


def seeded(name: str, *shape: int) -> Tensor:
    """Standard normals drawn from a generator seeded by the name, as the golden file's inputs were."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def golden_model(**kwargs) -> DiT:
    """Model `a` of the golden file: every tensor but pos_embed overwritten by seeded normals; eval mode."""
    torch.manual_seed(0)
    model = DiT(**CONFIG, **kwargs)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key != "pos_embed":
                std = 0.1 if "adaLN" in key else 0.05 if value.ndim > 1 else 0.02
                value.copy_(seeded(key, *value.shape) * std)
    return model.eval()
