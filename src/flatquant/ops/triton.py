"""What kernels have in common.

A kernel of one token is launched while the one before still runs (programmatic dependent launch, from Hopper on): it
may load what no kernel writes, weights and factors, and then waits until all that came before is done and seen. So is
one whose programs fill the device and walk over tokens. Not what lies between: programs that wait crowd the
multiprocessors which the last kernel has left, others stay empty.
"""

import functools
from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

P = ParamSpec("P")
R = TypeVar("R")

SHARED = 227 << 10  # bytes that a program may have on an H100
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 near it has no fraction, and its low bits are an integer


def on_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Make the device of the first tensor argument the current one meanwhile: Triton launches on the current device."""

    @functools.wraps(launch)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
            return launch(*args, **kwargs)

    return guarded


@triton.jit
def round_half_even(r):
    """The nearest integer, of two the even one, for |r| < 2^22."""
    return (r + MAGIC) - MAGIC


@triton.jit
def covering(low, high, LEVELS: tl.constexpr):
    """A range that holds 0, or [-1, 1] for an empty one, and the scale of the integers 0 .. LEVELS on it."""
    empty = low == high
    low = tl.where(empty, -1.0, low)
    high = tl.where(empty, 1.0, high)
    return low, high, tl.div_rn(high - low, tl.full(high.shape, LEVELS, tl.float32))


@triton.jit
def ratio(x, scale):
    """x / scale as it is rounded by a division, which is many more instructions.  # (R, C), (R,)

    With the rounded inverse of a divisor, the remainder of an approximate quotient corrects it to the nearest one
    (Markstein, IBM J. Res. Dev. 34, 1990). A power of two keeps the inverse, and the remainder's last bits, among the
    numbers that float32 has.
    """
    power = tl.where(scale < 2.0**-60, 2.0**66, 1.0)
    x, scale = x * power[:, None], scale * power
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
    near = x * inverse
    rest = tl.fma(-near, tl.broadcast_to(scale[:, None], x.shape), x)
    return tl.fma(rest, tl.broadcast_to(inverse, x.shape), near)


@triton.jit
def wait(EARLY: tl.constexpr):
    """Let the next kernel be launched, and wait for the one before; before this, constants alone may be read."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def early(x: Tensor, tokens: int, programs: int = 0) -> bool:
    """Whether a kernel on the device of x is launched before the last one is done.

    Args:
        tokens: that it has to do.
        programs: that walk over them, if any do: as many as the device runs at once.
    """
    return (tokens == 1 or 0 < programs < tokens) and x.is_cuda and _capability(x.device) >= (9, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have on a device; in the interpreter, as many as on an H100."""
    if device.type != "cuda":
        return SHARED
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
