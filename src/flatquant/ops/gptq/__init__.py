"""GPTQ's recursion inside one block of columns; one kernel on CUDA."""

import torch
from jaxtyping import Float
from torch import Tensor

from flatquant.ops import HAS_TRITON
from flatquant.ops.gptq import reference

_WIDEST = 1024  # columns that fit a program


def round_columns(
    w: Float[Tensor, "o b"],
    u: Float[Tensor, "b b"],
    scale: Float[Tensor, "o b"],
    zero: Float[Tensor, "o b"] | None,
    low: int,
    high: int,
) -> tuple[Float[Tensor, "o b"], Float[Tensor, "o b"]]:
    """`reference.round_columns`, or its kernel."""
    if w.is_cuda and HAS_TRITON and w.dtype == torch.float32 and w.shape[1] <= _WIDEST:
        from flatquant.ops.gptq import triton

        return triton.round_columns(w, u, scale, zero, low, high)
    return reference.round_columns(w, u, scale, zero, low, high)
