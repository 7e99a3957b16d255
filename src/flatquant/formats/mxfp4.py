"""MXFP4: e2m1 numbers in blocks of 32 with a power of two for a scale (OCP MX specification v1.0, sections 5.2, 6.3).

The scale is the largest power of two that is at most the block's largest magnitude, over 4, the largest of e2m1. A
largest magnitude of 6 to 8 such steps is cut to 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatquant.formats.base import BlockFormat
from flatquant.formats.minifloat import E2M1, E2M1_EXPONENT, from_e8m0, round_e2m1, to_e8m0


class MXFP4(BlockFormat):
    """See the module docstring."""

    magnitudes = E2M1
    scale_dtype = torch.uint8  # e8m0
    stretches = (2.0,)

    def magnitude(self, x: Tensor) -> Tensor:
        return round_e2m1(x)

    def scales(self, peak: Tensor, whole: Tensor | None) -> Tensor:
        return to_e8m0(peak * 2.0**-E2M1_EXPONENT)

    def steps(self, scales: Tensor, whole: Tensor | None) -> Tensor:
        return from_e8m0(scales)
