"""GPTQ (ICLR 2023, arXiv 2210.17323): round columns in turn, push each column's error onto those still free.

With U the upper Cholesky factor of H^-1 (H^-1 = U^T U), fixing column q costs e = (w_q - Q(w_q)) / U_qq per row and
the best correction of the rest is -e U_q,q+1: (paper, section 3, eq. 2-3). Updates reach columns outside the current
block of `block_size` lazily. The sum of e^2 is exactly tr(dW H dW^T) of the damped H: tests hold the code to that.
"""

import torch
from torch import Tensor

from flatquant.errors import CalibrationError
from flatquant.ops.gptq import round_columns
from flatquant.qtensor import QTensor
from flatquant.solvers.base import Grid, Solver, as_qtensor


class GPTQ(Solver):
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
        if hessian is None:
            raise CalibrationError("GPTQ needs calibration inputs; give calibration text or use the rtn solver")
        scale, zero = grid.grid(w)
        scale = scale.float().to(w.dtype)
        n = w.shape[-1]
        group = n // scale.shape[-1]
        h = hessian.to(w.dtype).clone()
        w = w.clone()
        dead = h.diagonal() == 0
        h.diagonal()[dead] = 1.0
        w[:, dead] = 0.0
        order = torch.argsort(h.diagonal(), descending=True) if self.act_order else torch.arange(n, device=w.device)
        w, h = w[:, order], h[order][:, order]
        upper = self._inverse_factor(h)
        groups = order // group
        q = torch.empty_like(w)
        for start in range(0, n, self.block_size):
            here, rest = slice(start, start + self.block_size), slice(start + self.block_size, n)
            s, z = scale[:, groups[here]], None if zero is None else zero[:, groups[here]]
            u = upper[here]
            q[:, here], errors = round_columns(w[:, here], u[:, here], s, z, grid.spec.low, grid.spec.high)
            w[:, rest] -= errors @ u[:, rest]
        values = torch.empty_like(q)
        values[:, order] = q
        return as_qtensor(values, scale, zero, grid.spec)

    def _inverse_factor(self, h: Tensor) -> Tensor:
        """Upper Cholesky factor of (h + damping)^-1.  # (n, n)"""
        damping = self.damping * h.diagonal().mean()
        for _ in range(4):
            lower, info = torch.linalg.cholesky_ex(h + damping * torch.eye(h.shape[0], dtype=h.dtype, device=h.device))
            if int(info) == 0:
                upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if int(info) == 0:
                    return upper
            damping = damping * 10
        raise CalibrationError(
            "GPTQ's Hessian is not positive definite even under strong damping: NaN in the inputs, or far too few "
            "calibration tokens; use more samples, a larger damping, or the rtn solver"
        )
