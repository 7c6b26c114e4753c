"""What LoRA costs: each script runs as `python -m benchmarks.NAME`; see README.md."""
