"""Self-attention on a packed projection: kernels for few and for many tokens, and the choice of a backend."""
