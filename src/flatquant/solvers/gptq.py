"""GPTQ (ICLR 2023, arXiv 2210.17323): the recursion with a grid."""

from typing import TypeVar

import torch
from torch import Tensor

from flatquant.solvers.base import Grid, Solver
from flatquant.solvers.recursion import compensate, revived

Result = TypeVar("Result")


class GPTQ(Solver[Grid[Result], Result]):
    """Error-compensating rounding; scales are fixed before the recursion (static groups), or updated in it."""

    needs_hessian = True

    def __init__(
        self, *, damping: float = 0.01, block_size: int = 128, act_order: bool = False, updated: bool = False
    ) -> None:
        """`damping` is relative to the mean of H's diagonal; `act_order` rounds large diagonals first.

        `updated` finds the scale of a block of columns when the first of them is fixed; it keeps columns in order.
        """
        assert not (act_order and updated), "a block's columns are fixed together where its scale follows them"
        self.damping = damping
        self.block_size = block_size
        self.act_order = act_order
        self.updated = updated

    def solve(self, w: Tensor, grid: Grid[Result], hessian: Tensor | None) -> Result:
        """See `Solver.solve`.

        Raises:
            CalibrationError: no Hessian, or one that stays indefinite under 1000 times the damping.
        """
        columns = grid.columns(w, updated=self.updated)
        w, h = revived(w, hessian)
        n = w.shape[-1]
        order = torch.argsort(h.diagonal(), descending=True) if self.act_order else torch.arange(n, device=w.device)
        block_size = -(-self.block_size // columns.block) * columns.block if self.updated else self.block_size
        compensate(w, h, order, columns.fix, damping=self.damping, block_size=block_size)
        return columns.result()
