"""What every package uses: checks of values, files, locks, keyed draws, the terminal, CUDA graphs, NVTX ranges."""
