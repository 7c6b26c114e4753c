"""Estimate the memory, operations and time of a run before anything is loaded."""
