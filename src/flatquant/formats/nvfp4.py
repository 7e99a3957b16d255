"""NVFP4: e2m1 numbers in blocks of 16 with e4m3 scales, and one float32 scale for the whole tensor.

https://docs.nvidia.com/cuda/cublas/#block-scaling and compressed-tensors' `nvfp4-pack-quantized`. The tensor scale g is
stored as that tool does, as what block scales are multiplied by before they are rounded to e4m3:

    g = 448 * 6 / max |x|,  s = e4m3(g max_block |x| / 6),  x ~ code * s / g

Weights have the g of all that is stored together. That of activations is static, from calibration text; their block
scales are found anew for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatquant.formats.base import BlockFormat
from flatquant.formats.minifloat import E2M1, E4M3_MAX, from_e4m3, round_e2m1, to_e4m3


class NVFP4(BlockFormat):
    """See the module docstring."""

    magnitudes = E2M1
    scale_dtype = torch.uint8  # e4m3
    stretches = (1.5,)

    def tensor_scale(self, peak: Tensor) -> Tensor:
        peak = peak.float().clamp(min=torch.finfo(torch.float32).tiny)
        return (E4M3_MAX * E2M1[-1] / peak).nan_to_num(1.0, 1.0, 1.0).reshape(1)

    def magnitude(self, x: Tensor) -> Tensor:
        return round_e2m1(x)

    def scales(self, peak: Tensor, whole: Tensor | None) -> Tensor:
        assert whole is not None
        return to_e4m3(whole * (peak / E2M1[-1]))

    def steps(self, scales: Tensor, whole: Tensor | None) -> Tensor:
        assert whole is not None
        return from_e4m3(scales) / whole
