"""Choosing the free parameters: block by block against the original's outputs, then end to end, then rounding."""
