"""Training: configuration, loop, averaged weights, checkpoints and logs."""

from dit_fast.checkpoint.folder import find_checkpoint, load_checkpoint, read_manifest
from dit_fast.training.config import TrainConfig
from dit_fast.training.presets import PRESETS
from dit_fast.training.run import TrainResult, resume, train
from dit_fast.training.trainer import Trainer

__all__ = [
    "PRESETS",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "find_checkpoint",
    "load_checkpoint",
    "read_manifest",
    "resume",
    "train",
]
