"""Tensor operations, each a folder with `reference.py`, the truth, beside any faster version."""

from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
