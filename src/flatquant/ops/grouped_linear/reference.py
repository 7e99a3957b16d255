"""y_i = x_i W_e^T, where e is the group that row i belongs to: experts of a mixture, one after another."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def grouped_linear(
    x: Float[Tensor, "rows n"], weight: Float[Tensor, "groups o n"], counts: Sequence[int]
) -> Float[Tensor, "rows o"]:
    """Multiply rows by the matrix of their group.

    Args:
        x: rows, those of a group together, in the order of the groups, (P, n).
        weight: a matrix for each group, (E, o, n), in x's dtype.
        counts: rows of each group, P in all; 0 for one that is empty.

    Returns:
        In x's dtype, (P, o).
    """
    parts = zip(x.split(list(counts)), weight, strict=True)
    found = [part @ w.mT for part, w in parts if len(part)]
    return torch.cat(found) if found else x.new_empty(0, weight.shape[1])
