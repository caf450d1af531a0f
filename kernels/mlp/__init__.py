"""The MLP of a block: its activations, and who applies them."""
