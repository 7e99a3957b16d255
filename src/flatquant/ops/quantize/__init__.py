"""Rounding to uniform grids, with straight-through gradients."""
