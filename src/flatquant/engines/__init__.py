"""Quantised models inside other people's inference engines."""
