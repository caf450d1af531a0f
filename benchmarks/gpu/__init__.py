"""Everything there is to show on one GPU, in a slot of 15 minutes."""
