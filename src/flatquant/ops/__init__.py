"""Tensor operations, each a folder with `reference.py`, the truth, beside any faster version."""
