"""Kernels: which leaves of a tree are kernels, along which axes, and how targets name them."""
