"""Checkpoints as one process writes them, of tensors that a test makes."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dit_fast.checkpoint.folder import Retention, model_config
from dit_fast.checkpoint.writer import CheckpointWriter
from dit_fast.models import DiT


def save_checkpoint(
    run: Path,
    model: DiT,
    ema: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    manifest: dict[str, Any],
    keep: int = 0,
) -> Path:
    """Write step manifest["step"] of a run, then remove all but the newest `keep`."""
    state = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer}
    with CheckpointWriter(run, Retention(keep), background=False) as writer:
        writer.save(model_config(model), state, manifest)
        path = writer.wait()
    assert path is not None
    return path
