"""Utilities of all packages: option values, files, schemas, locks, keyed random numbers, terminal, NVTX ranges."""
