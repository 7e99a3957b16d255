"""What kernels have in common."""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 near it has no fraction, and its low bits are an integer


@triton.jit
def round_half_even(r):
    """The nearest integer, of two the even one, for |r| < 2^22."""
    return (r + MAGIC) - MAGIC
