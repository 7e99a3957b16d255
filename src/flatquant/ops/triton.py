"""What kernels have in common.

A kernel of one token is launched while the one before still runs (programmatic dependent launch, from Hopper on): it
may load what no kernel writes, weights and factors, and then waits until all that came before is done and seen. Not
so with more tokens: programs that wait crowd the multiprocessors which the last kernel has left, others stay empty.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 near it has no fraction, and its low bits are an integer


@triton.jit
def round_half_even(r):
    """The nearest integer, of two the even one, for |r| < 2^22."""
    return (r + MAGIC) - MAGIC


@triton.jit
def wait(EARLY: tl.constexpr):
    """Let the next kernel be launched, and wait for the one before; before this, constants alone may be read."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def early(x: Tensor, tokens: int) -> bool:
    """Whether a kernel of so many tokens on the device of x is launched before the last one is done."""
    return tokens == 1 and x.is_cuda and _capability(x.device) >= (9, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
