"""Random draws that depend on a key and on nothing else.

A training step must not depend on what was drawn before it, or a resumed run would differ from an
uninterrupted one. Every draw therefore has its own generator, seeded by (seed, stream, index): the index
is the global step or the epoch, and one stream each for order, flip, time, noise and label drop keeps
them apart, so that a new stream shifts none of the others.
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
