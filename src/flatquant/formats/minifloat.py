"""Small floating-point numbers as bytes: e4m3 and e8m0 scales, and the magnitudes of e2m1.

- e2m1, e8m0: OCP Microscaling Formats (MX) specification v1.0, sections 5.3.3 and 5.4.1.
- e4m3: OCP 8-bit floating point specification v1.0; it has no infinity, and its largest number is 448.

Scales are stored as bytes of uint8: safetensors, casts of models and older tools all leave those alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code
E2M1_EXPONENT = 2  # of its largest power of two, 4
E4M3_MAX = 448.0
E8M0_NAN = 255
_FRACTION = 23  # bits of float32 below its exponent, whose bias is that of e8m0
_TINY_SCALE = 0.125  # what compressed-tensors stores where a scale rounds to 0


def round_e2m1(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Numbers of at least 0 to the nearest e2m1, ties to the even code, at most 6.  # x's shape and dtype"""
    spacing = (x >= 2).to(x.dtype).add_(1).mul_(0.5).add_(x >= 4)  # 0.5, 1 or 2
    return (x / spacing).round_().mul_(spacing).clamp_(max=E2M1[-1])


def to_e4m3(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Positive numbers to the nearest e4m3, ties to even, at most 448; 0.125 where that is 0.  # uint8, x's shape

    NaN stays NaN.
    """
    rounded = x.float().clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    number = rounded.float()
    return (
        torch.where(number == 0, torch.full_like(number, _TINY_SCALE), number).to(torch.float8_e4m3fn).view(torch.uint8)
    )


def from_e4m3(code: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """What bytes stand for.  # float32, code's shape"""
    return code.contiguous().view(torch.float8_e4m3fn).float()


def to_e8m0(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The largest power of two that is at most x, for x >= 0, as a biased exponent.  # uint8, x's shape

    2^-127 for anything below, 0 too; the NaN of e8m0 for NaN and infinity.
    """
    return (x.float().view(torch.int32) >> _FRACTION & E8M0_NAN).to(torch.uint8)  # float32's own exponent


def from_e8m0(code: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """2^(code - 127); NaN for 255.  # float32, code's shape"""
    bits = (code.to(torch.int32) << _FRACTION).masked_fill_(code == 0, 1 << _FRACTION - 1)  # 2^-127 is subnormal
    return bits.view(torch.float32).masked_fill_(code == E8M0_NAN, torch.nan)
