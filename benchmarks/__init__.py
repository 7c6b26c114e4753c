"""Benchmarks of LoRA training; each script runs as `python -m benchmarks.NAME` (see README.md)."""
