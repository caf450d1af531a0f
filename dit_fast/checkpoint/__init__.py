"""Checkpoints on disk: folders, manifests, tensor files, weight files of others, averages of any width."""
