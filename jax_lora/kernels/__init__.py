"""Kernels: the leaves that can be adapted, the roles of their axes, and how targets select them."""
