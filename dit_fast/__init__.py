"""Diffusion Transformers, trained and sampled fast."""

__version__ = "0.1.0"
