"""The order of each epoch, which depends on its key and on nothing else.

An order is drawn at once, by a generator of its own, seeded by (seed, stream, epoch): what a sample is given in a
step is drawn by `dit_fast.keyed` instead, keyed by the sample's number.
"""

import hashlib

import torch


def key(seed: int, stream: str, index: int) -> int:
    """A 63-bit seed from (seed, stream, index); equal keys give equal draws, on every machine."""
    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, stream: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one draw. CPU and CUDA generators give different numbers for one key."""
    return torch.Generator(device=device).manual_seed(key(seed, stream, index))
