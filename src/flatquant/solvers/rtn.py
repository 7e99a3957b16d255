"""Round to nearest: the paper's default after a fitted transform."""

from typing import TypeVar

from torch import Tensor

from flatquant.solvers.base import Grid, Solver

Result = TypeVar("Result")


class RTN(Solver[Grid[Result], Result]):
    """Each weight to its nearest grid point; no data."""

    needs_hessian = False

    def solve(self, w: Tensor, grid: Grid[Result], hessian: Tensor | None) -> Result:
        return grid.nearest(w)
