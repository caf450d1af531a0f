"""A folder of images with captions, and embeddings of these, that tests build for themselves."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

CAPTIONS = ["a red cat", "the blue dog", "cat on the dog", "b", "", "red red red", "a b a b a b a b a b"]
MODEL = ["--hidden-size", "32", "--depth", "1", "--num-heads", "2", "--patch-size", "2", "--device", "cpu"]
NAMES = [f"{number}.png" for number in range(len(CAPTIONS))]


def write_captioned(folder: Path) -> Path:
    """Seven images of 16 x 16 with a .txt each."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption + "\n")
    return folder


def embeddings(tokens: int = 4, width: int = 6) -> dict[str, torch.Tensor]:
    """Of the seven images, one to `tokens` tokens each."""
    generator = torch.Generator().manual_seed(3)
    lengths = [tokens, *(1 + number % tokens for number in range(1, 7))]
    return {
        name: torch.randn(length, width, generator=generator)
        for name, length in zip(NAMES, lengths, strict=True)
    }


def padded(tokens: int = 4, width: int = 6) -> torch.Tensor:
    """The same as a model is told them, (7, tokens, width)."""
    made = embeddings(tokens, width).values()
    return torch.stack([torch.nn.functional.pad(one, (0, 0, 0, tokens - len(one))) for one in made])
