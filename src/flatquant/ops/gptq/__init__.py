"""GPTQ's recursion inside one block of columns; one kernel on CUDA."""

import torch
from torch import Tensor

from flatquant.ops import HAS_TRITON
from flatquant.ops.gptq import reference

_WIDEST = 1024  # columns that fit a program


def round_columns(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """`reference.round_columns`, or its kernel."""
    if w.is_cuda and HAS_TRITON and w.dtype == torch.float32 and w.shape[1] <= _WIDEST:
        from flatquant.ops.gptq import triton

        return triton.round_columns(w, u, scale, zero, low, high)
    return reference.round_columns(w, u, scale, zero, low, high)
