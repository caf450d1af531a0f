"""Checkpoints: folders of a run, manifests, sharded tensor files, weight files from others, post-hoc EMA."""
