"""Timings beside their peers: `python -m benchmarks.<name>`, never part of the tests."""
