"""A stand-in for diffusers' AutoencoderKL, image folders and latent sets that tests build for themselves."""

import json
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dit_fast.data.encode import EncodeConfig

SIZE = 16
SCALE = 0.25
SHIFT = 0.5


class Config(dict):
    __getattr__ = dict.__getitem__


CONFIG = {
    "in_channels": 3, "latent_channels": 2, "block_out_channels": [4, 4, 4], "scaling_factor": SCALE,
    "shift_factor": SHIFT,
}  # fmt: skip


class StandInVae(torch.nn.Module):
    """What `LatentEncoder` uses of an AutoencoderKL: one strided convolution that shrinks images by 4."""

    def __init__(self, config: dict[str, Any] = CONFIG) -> None:
        super().__init__()
        self.config = Config(config)
        self.encoder = torch.nn.Conv2d(3, 4, 4, stride=4)
        self.quant_conv = torch.nn.Conv2d(4, 4, 1)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "StandInVae":
        return cls(config)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=StandInVae))


def write_vae(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    return save_vae(StandInVae(), folder)


def save_vae(vae: torch.nn.Module, folder: Path) -> Path:
    """As diffusers lays a model out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(vae.config))
    save_file(vae.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_images(folder: Path, counts: tuple[int, ...] = (4, 3)) -> Path:
    """Class sub-folders a, b, ... of 24 x 20 noise images; their names sort in the order of their numbers."""
    generator = np.random.default_rng(0)
    for label, count in enumerate(counts):
        part = folder / "abcdefgh"[label]
        part.mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(part / f"{index:03d}.png")
    return folder


def settings(folder: Path, **options: Any) -> EncodeConfig:
    """From folder/images by folder/vae to folder/set: seven images in three shards, two at a time."""
    usual = {"data": folder / "images", "vae": folder / "vae", "out": folder / "set"}
    paths = {name: str(options.pop(name, path)) for name, path in usual.items()}
    small = {"image_size": SIZE, "shard_size": 3, "batch_size": 2, "num_workers": 1}
    return EncodeConfig(**paths, **{**small, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its exit status, 0 or 1, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(count: int, call: Callable[..., Any], before: bool) -> Callable[..., Any]:
    """`call`, whose `count`-th call kills the process, before or after it does its work."""
    calls = [0]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and before:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = call(*args, **kwargs)
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    return deadly
