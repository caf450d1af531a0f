"""Ranks, signals, agreement between ranks in a step, and sharding of a model."""
