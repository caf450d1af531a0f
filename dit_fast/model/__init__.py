"""The Diffusion Transformer: blocks, embedders, positions, its configuration and its cost."""
