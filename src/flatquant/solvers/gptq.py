"""GPTQ (ICLR 2023, arXiv 2210.17323): the recursion with a uniform grid."""

import torch
from torch import Tensor

from flatquant.ops.gptq import round_columns
from flatquant.qtensor import QTensor
from flatquant.solvers.base import Grid, Solver, as_qtensor
from flatquant.solvers.recursion import compensate, revived


class GPTQ(Solver[Grid, QTensor]):
    """Error-compensating rounding; scales are fixed before the recursion (static groups)."""

    needs_hessian = True

    def __init__(self, *, damping: float = 0.01, block_size: int = 128, act_order: bool = False) -> None:
        """`damping` is relative to the mean of H's diagonal; `act_order` rounds large diagonals first."""
        self.damping = damping
        self.block_size = block_size
        self.act_order = act_order

    def solve(self, w: Tensor, grid: Grid, hessian: Tensor | None) -> QTensor:
        """See `Solver.solve`.

        Raises:
            CalibrationError: no Hessian, or one that stays indefinite under 1000 times the damping.
        """
        scale, zero = grid.grid(w)
        scale = scale.float().to(w.dtype)
        w, h = revived(w, hessian)
        n = w.shape[-1]
        group = n // scale.shape[-1]
        order = torch.argsort(h.diagonal(), descending=True) if self.act_order else torch.arange(n, device=w.device)
        values = torch.empty_like(w)

        def fix(columns: Tensor, block: Tensor, u: Tensor) -> Tensor:
            groups = columns // group
            s, z = scale[:, groups], None if zero is None else zero[:, groups]
            values[:, columns], errors = round_columns(block, u, s, z, grid.spec.low, grid.spec.high)
            return errors

        compensate(w, h, order, fix, damping=self.damping, block_size=self.block_size)
        return as_qtensor(values, scale, zero, grid.spec)
