"""Processes and what they share: ranks, signals, sharding of a model."""
