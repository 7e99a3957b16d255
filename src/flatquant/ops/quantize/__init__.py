"""Rounding to uniform grids, with straight-through gradients; fused into one kernel a direction on CUDA."""

import torch
from jaxtyping import Float
from torch import Tensor

from flatquant.ops import HAS_TRITON
from flatquant.ops.quantize import reference


def _fused(x: Tensor) -> bool:
    return x.is_cuda and HAS_TRITON and x.dtype in (torch.float16, torch.bfloat16, torch.float32)


def fake_quantize_rows(
    x: Float[Tensor, "*batch n"], low_ratio: Float[Tensor, "..."], high_ratio: Float[Tensor, "..."], low: int, high: int
) -> Float[Tensor, "*batch n"]:
    """`reference.fake_quantize_rows`, or its kernel."""
    if _fused(x):
        from flatquant.ops.quantize import triton

        return triton.fake_quantize_rows(x, low_ratio, high_ratio, low, high)
    return reference.fake_quantize_rows(x, low_ratio, high_ratio, low, high)


def fake_quantize_clamped(
    x: Float[Tensor, "*batch n"], low_ratio: Float[Tensor, "..."], high_ratio: Float[Tensor, "..."], low: int, high: int
) -> Float[Tensor, "*batch n"]:
    """`reference.fake_quantize_clamped`, or its kernel (symmetric grids)."""
    if _fused(x) and low < 0:
        from flatquant.ops.quantize import triton

        return triton.fake_quantize_clamped(x, low_ratio, high_ratio, low, high)
    return reference.fake_quantize_clamped(x, low_ratio, high_ratio, low, high)
