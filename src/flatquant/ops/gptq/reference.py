"""GPTQ's recursion inside one block of columns; the rows are independent of one another."""

import torch
from jaxtyping import Float
from torch import Tensor

from flatquant.ops.quantize.reference import quantize


def round_columns(
    w: Float[Tensor, "o b"],
    u: Float[Tensor, "b b"],
    scale: Float[Tensor, "o b"],
    zero: Float[Tensor, "o b"] | None,
    low: int,
    high: int,
) -> tuple[Float[Tensor, "o b"], Float[Tensor, "o b"]]:
    """Round columns from left to right, each column's error pushed onto those to its right (arXiv 2210.17323, eq. 2-3).

    Args:
        w: float32 or float64, (o, b); unchanged.
        u: the block of the upper Cholesky factor of H^-1 on its diagonal, (b, b).
        scale, zero: (o, b); zero None for a symmetric grid.
        low, high: integer range of the grid.

    Returns:
        Integers in w's dtype and errors (w_q - Q(w_q)) / u_qq as they were when each column was rounded, both (o, b).
    """
    w = w.clone()
    q, errors = torch.empty_like(w), torch.empty_like(w)
    for i in range(w.shape[1]):
        s, z = scale[:, i], None if zero is None else zero[:, i]
        column = w[:, i]
        q[:, i] = qi = quantize(column, s, z, low, high)
        errors[:, i] = (column - s * (qi if z is None else qi - z)) / u[i, i]
        w[:, i + 1 :] -= errors[:, i : i + 1] * u[i, i + 1 :]
    return q, errors
