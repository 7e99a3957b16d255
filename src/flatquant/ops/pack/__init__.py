"""Integers of 2 to 8 bits packed into bytes."""
