"""Kronecker-structured products."""
