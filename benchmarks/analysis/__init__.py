"""What a kernel is without a GPU: what the operations take, and what the compiler makes of their launches."""
